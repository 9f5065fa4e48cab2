"""The peak rates of a device, measured in a few hundred milliseconds, and the operations and bytes
that a model needs: together they give a share of the peak.

The two peaks are the rate of the engine's own matrix kernel on a large batch of rows, and the rate
at which memory is read.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .model import Model


@dataclass(frozen=True)
class Ceilings:
    """matrix: float operations per second of the engine's matrix kernel. read: bytes per second
    that a kernel reads from memory.
    """

    matrix: float
    read: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(model: Model, rounds: int = 2) -> Ceilings:
    """The ceilings of the device that holds `model`: best of `rounds`, each the
    median of five dispatches.

    The matrix rate is that of the model's own MLP products over 512 rows. The read rate is that of
    a kernel that only reads 256 MiB, more than any cache holds, or that of the unembedding times
    one row where that is higher.
    """
    engine, c = model._engine, model.config
    shapes = ((512, (1 + c.gated) * c.d_mlp, c.d_model), (512, c.d_model, c.d_mlp))
    return Ceilings(
        max(engine.measure_linear(*shape)[0] for shape in shapes for _ in range(rounds)),
        max(
            max(
                engine.measure_read(256 << 20),
                engine.measure_linear(1, c.d_vocab, c.d_model, True)[1],
            )
            for _ in range(rounds)
        ),
    )


# -- operations and bytes of a model ---------------------------------------------------------------


def weight_size(model: Model) -> float:
    """Bytes of one weight on the device, from the engine's own plan."""
    c = model.config
    numbers = matrix_weights(model) + (0 if c.tied else c.d_vocab * c.d_model)
    return 2 if model._engine.plan()["weights"] < 3 * numbers else 4


def matrix_weights(model: Model) -> int:
    """Weights that every token is multiplied with, the unembedding included."""
    c = model.config
    mlp = (3 if c.gated else 2) * c.d_model * c.d_mlp
    layer = c.d_model * c.d_head * (2 * c.n_heads + 2 * c.n_kv_heads) + mlp
    return c.n_layers * layer + c.d_vocab * c.d_model


def prefill_operations(model: Model, tokens: int, logits: int = 1) -> float:
    """Float operations of one row of `tokens` tokens with `logits` of its positions unembedded:
    matrices, attention scores and attention output.
    """
    c = model.config
    matrices = (
        2 * tokens * (matrix_weights(model) - c.d_vocab * c.d_model)
        + 2 * logits * c.d_vocab * c.d_model
    )
    return matrices + c.n_layers * 2 * tokens * (tokens + 1) * c.n_heads * c.d_head


def decode_bytes(model: Model, context: float, rows: int = 1) -> float:
    """Bytes that one decoding step reads: every weight once, and each row's keys and values."""
    return (
        matrix_weights(model) * weight_size(model)
        + rows * context * model._engine.plan()["cache_per_token"]
    )
