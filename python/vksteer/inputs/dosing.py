"""How strong steering is: the length of what is added, over the length of the residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, is_number
from ..base.types import Array, Float32Array, Float64Array, Prompts
from ..runtime.edit_compiler import OPEN, RowShape, resolve
from ..runtime.resume import keeps_layer_inputs
from .prompts import as_list, as_tokens, batches

if TYPE_CHECKING:
    from ..runtime.model import Model
    from .vectors import SteeringVector

#: Tokens of a pass, and bytes of activations that it may return.
PASS_TOKENS, PASS_BYTES = 8192, 256 << 20


@dataclass(frozen=True, eq=False)
class Dose:
    """ratio: float64 [prompts], the mean over a row's steered positions of |a s| / |h|; never
    negative. coefficient: a. norms: one float64 [positions] for each row, |h| of the unsteered run
    at the steered positions.
    """

    ratio: Float64Array
    coefficient: float
    norms: tuple[Float64Array, ...]

    @property
    def mean(self) -> float:
        """The mean over prompts."""
        return float(self.ratio.mean())

    def __repr__(self) -> str:
        return (
            f"Dose(mean={self.mean:.3f}, {len(self.ratio)} prompts from {self.ratio.min():.3f} to"
            f" {self.ratio.max():.3f}, coefficient={self.coefficient:g})"
        )


def dose(
    model: Model,
    prompts: Prompts,
    vector: SteeringVector,
    coefficient: float,
    responses: Sequence[str | Sequence[int]] | None = None,
    positions: Any = None,
) -> Dose:
    """How strong steering is on these prompts: |a s| / |h^l|, the mean over steered positions.

    prompts: texts or token lists. vector: s; h^l is what it is added to, in the unsteered run: the
    input of layer l, or the output of the last block for a vector of layer L. coefficient: a; its
    sign does not matter. responses: what follows each prompt (texts or token lists), teacher
    forced. positions: as in `Steer` (default: all tokens of prompt and response).

    Returns a Dose with `.ratio` float64 [prompts] and `.mean`. Raises ValueError before any work
    for bad prompts, as many responses as prompts missing, rows too long for the context, a
    coefficient that is no finite number, a vector of another width or layer, and rows in which
    `positions` name no token.
    """
    vector.check(model)
    if not is_number(coefficient):
        raise ValueError(f"coefficient must be a finite number, not {coefficient!r}")
    rows, lengths = _rows(model, prompts, responses)
    at = [_positions(positions, n, len(row), i) for i, (row, n) in enumerate(zip(rows, lengths))]
    norms = stream_norms(model, rows, vector.layer)
    chosen = tuple(row[index] for row, index in zip(norms, at, strict=True))
    size = abs(float(coefficient)) * vector.norm
    ratio = np.array([float(np.mean(size / row)) for row in chosen])
    return Dose(ratio, float(coefficient), chosen)


def stream_norms(
    model: Model, rows: Sequence[Sequence[int]], layer: int
) -> tuple[Float64Array, ...]:
    """|h^layer| of every token of unsteered rows, one float64 [tokens] for each row. layer: as in a
    SteeringVector, so that L means the output of the last block.
    """
    config = model.config
    captured: Iterable[Float32Array]
    if layer < config.n_layers and keeps_layer_inputs(model):
        # layers above are not run, and a shared prefix once
        captured = model._layer_inputs.get([tuple(r) for r in rows], layer, every_layer=False)
    else:
        last = layer == config.n_layers
        site = f"blocks.{layer - last}.hook_resid_{'post' if last else 'pre'}"
        captured = captured_rows(model, rows, site, config.d_model)
    return tuple(np.linalg.norm(row.astype(np.float64), axis=1) for row in captured)


def captured_rows(
    model: Model, rows: Sequence[Sequence[int]], site: str, width: int
) -> Iterator[Float32Array]:
    """A site of this width of unedited rows, float32 [tokens, width] for each row, in passes of
    bounded size.
    """
    longest = max(map(len, rows))
    most = max(1, PASS_BYTES // (4 * longest * width))
    for part in batches(rows, tokens=PASS_TOKENS, most=most):
        some = [list(row) for row in rows[part]]
        captured = model.run(some, capture=[site], logits=None)[site]
        for row, values in zip(some, captured, strict=True):
            yield values[len(values) - len(row) :]  # rows are padded on the left


def _rows(
    model: Model, prompts: Prompts, responses: Sequence[str | Sequence[int]] | None
) -> tuple[list[list[int]], list[int]]:
    """(prompt and response of each row, lengths of the prompts)."""
    rows = as_tokens(model, prompts, "prompts")
    lengths = [len(row) for row in rows]
    if responses is None:
        return rows, lengths
    given = as_list(responses, "responses")
    if len(given) != len(rows):
        raise ValueError(f"{len(rows)} prompts need as many responses, not {len(given)}")
    for i, response in enumerate(given):
        rows[i] = rows[i] + _tokens(model, response, f"responses[{i}]")
        if len(rows[i]) > model.config.n_ctx:
            raise ValueError(
                f"prompt {i} and its response have {len(rows[i])} tokens, the model's context holds"
                f" {model.config.n_ctx}"
            )
    return rows, lengths


def _tokens(model: Model, response: str | Sequence[int], what: str) -> list[int]:
    if not isinstance(response, str):
        return [int(t) for t in response]
    if model.tokenizer is None:
        raise ValueError(f"{what} is a text, and this model has no tokenizer: give token ids")
    return [int(t) for t in model.tokenizer.encode(response, add_bos=False)]


def _positions(positions: Any, prompt: int, total: int, row: int) -> Array:
    """The steered positions of one row, ascending."""
    selection = resolve(positions, RowShape(prompt, total))
    if selection.listed is not None:
        found = sorted({p for p in selection.listed if p < total and is_int(p)})
    else:
        stop = total if selection.stop == OPEN else min(selection.stop, total)
        found = list(range(selection.start, stop, selection.step))
    if not found:
        raise ValueError(f"positions={positions!r} name no token of prompt {row} ({total} tokens)")
    return np.array(found, dtype=np.int64)
