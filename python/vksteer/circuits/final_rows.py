"""What metrics need of the base run and the steered run of samples: the output of the final norm at
the positions where a metric may be read (docs/method.md section 5).

These are positions P - 1 to S - 1 of a sample with P prompt tokens and S tokens in all; the logits
at position p predict the token at p + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ..base.progress import Progress
from ..base.types import Array, Float32Array, Float64Array, IntArray, ProgressLike
from ..runtime.batch import Batch
from ..runtime.edits import Steer
from ..runtime.gradients import pack

if TYPE_CHECKING:
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

#: Tokens that are run together.
BATCH_TOKENS = 2048

#: What `request` makes.
Request: TypeAlias = tuple[Any, ...]
T = TypeVar("T")


@dataclass
class FinalRows:
    """One sample at positions first, ..., first + n - 1.

    base, steered: the final norm's output in both runs, float32 [n, D]. targets: the next token, 0
    after the last, uint32 [n]. kl_base: KL(P_steer||P_base); kl_steered: KL(P_base||P_steer); both
    in nats. greedy_base, greedy_steered: greedy tokens, int64 [n]. logprob_base, logprob_steered:
    log p(target).
    """

    first: int
    base: Float32Array
    steered: Float32Array
    targets: npt.NDArray[np.uint32]
    kl_base: Float64Array
    kl_steered: Float64Array
    greedy_base: IntArray
    greedy_steered: IntArray
    logprob_base: Float64Array
    logprob_steered: Float64Array


def request(
    softcap: float,
    a: Array | None = None,
    b: Array | None = None,
    reference: Array | None = None,
    other: Array | None = None,
    targets: Array | None = None,
    logits: bool = False,
) -> Request:
    """The request that the engine's measure and Circuits.forward take, row by row
    (csrc/analysis/read_logits.h).

    softcap: of the logits, 0 for none. a, b: tokens whose logits are read, [n]. reference, other:
    final rows of the distributions that KL is taken against, [n, D]. targets: tokens whose log
    probability is read, [n]. logits: whether whole rows of logits are returned.
    """

    def as_ids(x: Array | None) -> npt.NDArray[np.uint32] | None:
        return None if x is None else np.ascontiguousarray(x, np.uint32)

    def as_rows(x: Array | None) -> Float32Array | None:
        return None if x is None else np.ascontiguousarray(x, np.float32)

    return (
        float(softcap),
        as_ids(a),
        as_ids(b),
        as_rows(reference),
        as_rows(other),
        as_ids(targets),
        bool(logits),
    )


def _rows(
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    site: tuple[int, int],
    gain: Float32Array,
    bias: Float32Array | None,
) -> tuple[list[Float32Array], list[Float32Array]]:
    """Final rows of the base runs and of the steered runs of some samples, float32 [n, D] each."""
    rows = [list(s.tokens) for s in samples]
    lengths = [len(r) for r in rows]
    n, width = len(rows), max(lengths)
    inputs = model._layer_inputs.get([tuple(r) for r in rows], vector.layer)
    edits = [[Steer(vector, coefficient)] if i % 2 else [] for i in range(2 * n)]

    def double(values: Sequence[T]) -> list[T]:
        return [v for v in values for _ in range(2)]

    batch = Batch(
        model,
        double([len(s.prompt_tokens) for s in samples]),
        double(lengths),
        (edits, False),
        None,
    )
    cache, slots = model._run_cache(double(lengths), 1)
    _, captured = batch.forward(
        cache,
        double(rows),
        slots=slots,
        columns=double([width - t for t in lengths]),
        n_columns=width,
        capture=[site],
        first_layer=vector.layer,
        inputs=double(inputs),
    )
    normed = captured[site]
    parts = [
        normed[i, width - t + len(s.prompt_tokens) - 1 :] * gain
        for i, (s, t) in enumerate(zip(double(samples), double(lengths)))
    ]
    if bias is not None:
        parts = [part + bias for part in parts]
    return parts[0::2], parts[1::2]


def final_rows(
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    *,
    capped: bool = True,
    progress: ProgressLike = False,
) -> list[FinalRows]:
    """Runs both runs of every sample, from the kept input of the steering layer on.

    capped: whether probabilities are those after the final softcap. progress: as in Progress, in
    samples.
    """
    from ..runtime.device import _engine

    site = model._sites.by_name["ln_final.hook_normalized"].key
    gain = model._engine.vector("ln_final", 0)
    bias = model._engine.vector("b_ln_final", 0) if model.config.norm_bias else None
    softcap = model.config.final_softcap if capped else 0.0
    found = []
    groups = pack([2 * len(s) for s in samples], BATCH_TOKENS)
    with Progress(progress, len(samples), "base and steered runs") as bar:
        for group in groups:
            some = [samples[i] for i in group]
            base, steered = _rows(model, some, vector, coefficient, site, gain, bias)
            targets = [np.array([*s.response_tokens, 0], np.uint32) for s in some]
            both = np.stack([np.concatenate(steered), np.concatenate(base)])
            _, distributions, _ = _engine().measure(
                model._engine,
                both,
                both.shape[1],
                request(softcap, reference=both[0], other=both[1], targets=np.concatenate(targets)),
            )
            ends = np.cumsum([len(t) for t in targets])
            for s, b, st, t, end in zip(some, base, steered, targets, ends):
                x, y = (distributions[i, end - len(t) : end].astype(np.float64) for i in (0, 1))
                found.append(
                    FinalRows(
                        first=len(s.prompt_tokens) - 1,
                        base=b,
                        steered=st,
                        targets=t,
                        kl_base=y[:, 0],
                        kl_steered=x[:, 1],
                        greedy_base=y[:, 3].astype(np.int64),
                        greedy_steered=x[:, 3].astype(np.int64),
                        logprob_base=y[:, 2],
                        logprob_steered=x[:, 2],
                    )
                )
            bar.step(len(some))
    return found
