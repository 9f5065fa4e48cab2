"""The output of every head under steering, divided into a direct part (steering value vectors
weighted by attention) and an indirect part.

With H the residual stream without the added a*s, scale the `hook_scale` of the norm before
attention and D_c = 1/scale(H + a*s), the output of head h before a post-norm is, at every position,

    D_{c^h} svv^h(s)                                              (direct),    D_{c^h} = A^h D_c a
    + A^h D_c (n(H) * gain) W_V W_O^h + (b_norm W_V + b_V) W_O^h     (indirect)

where A^h and the scale are those of the steered run (docs/method.md section 7). n(H) is H, without
its mean where the norm is LayerNorm; without a norm before attention D_c is 1. Where values are
clamped (OLMo's clip_qkv) the direct part is what steering adds before the clamp, and what the clamp
takes away is in the indirect part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import require_int
from ..base.display import Table
from ..base.progress import Progress
from ..base.types import Array, BoolArray, Float32Array, Float64Array, IntArray
from ..inputs.prompts import as_tokens, batches
from ..inputs.samples import check_steering
from ..inputs.vectors import SteeringVector
from ..runtime.edits import Steer
from .value_vectors import check_vector

if TYPE_CHECKING:
    from ..loading.config import Config
    from ..runtime.model import Model
    from ..runtime.run import Run

#: Most bytes of captured float32 values that are held while shares are summed.
CAPTURE_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The two parts for one layer and one batch. Rows are left-padded; padded entries are 0.

    direct, indirect: float32 [B, S, H, D]; their sum is `attn.hook_result` of the steered run.
    scales: float32 [B, S, H], A^h D_c a, which has the sign of a. base: float32 [B, S, H, D],
    `attn.hook_result` of the unsteered run. tokens: int32 [B, S]; mask: bool [B, S].
    """

    direct: Float32Array
    indirect: Float32Array
    scales: Float32Array
    base: Float32Array
    tokens: Array
    mask: BoolArray
    layer: int

    @property
    def heads_share(self) -> Float64Array:
        """float64 [H]: the share of the change of each head's output that the direct part explains.

        It is the sum over positions of direct . change, divided by that of |change|^2, where change
        = steered - unsteered. The indirect part explains the rest. NaN where nothing changes.
        """
        direct, change = self._parts()
        return _ratio(
            np.einsum("bshd,bshd->h", direct, change), np.einsum("bshd,bshd->h", change, change)
        )

    @property
    def share(self) -> float:
        """The same for the sum over heads, which is what the layer's attention writes."""
        direct, change = (part.sum(axis=2) for part in self._parts())
        return float(_ratio((direct * change).sum(), (change * change).sum()))

    def _parts(self) -> tuple[Float64Array, Float64Array]:
        """(direct part, change), float64 [B, S, H, D]."""
        direct = self.direct.astype(np.float64)
        return direct, direct + self.indirect - self.base


def _ratio(a: Any, b: Any) -> Float64Array:
    """The quotient a / b, NaN where b is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(b) > 0, np.divide(a, b), np.nan)


def _layer(layer: int, vector: SteeringVector, config: Config) -> int:
    layer = require_int(layer, "layer", 0)
    if not vector.layer <= layer < config.n_layers:
        raise ValueError(
            f"layer {layer} has no steered OV circuit: steering at layer {vector.layer} reaches"
            f" layers {vector.layer} to {config.n_layers - 1}"
        )
    return layer


def _scales(model: Model, run: Run, layer: int, coefficient: float) -> Float64Array:
    """A^h D_c a, float64 [B, S, H]."""
    inverse = run.mask.astype(np.float64)
    if model.config.pre_norms:
        scale = run[f"blocks.{layer}.ln1.hook_scale"][..., 0].astype(np.float64)
        inverse = np.where(run.mask, 1.0 / np.where(run.mask, scale, 1.0), 0.0)
    pattern = run[f"blocks.{layer}.attn.hook_pattern"].astype(np.float64)
    scales: Float64Array = coefficient * np.einsum("bhqk,bk->bqh", pattern, inverse)
    return scales


def _sites(model: Model, layer: int) -> list[str]:
    """The results first, then what `_scales` reads."""
    names = ["attn.hook_result", "attn.hook_pattern"]
    names += ["ln1.hook_scale"] if model.config.pre_norms else []
    return [f"blocks.{layer}.{name}" for name in names]


def decompose(
    model: Model,
    prompts: Sequence[Any],
    vector: SteeringVector,
    coefficient: float,
    layer: int,
    *,
    responses: Sequence[Any] | None = None,
) -> Decomposition:
    """The direct and the indirect part of the output of every head of `layer`, when `vector` times
    `coefficient` is added at all positions (docs/method.md section 7).

    prompts: texts or token lists; responses: one for each prompt, appended to it. layer: the
    vector's layer or a later one. Runs the model twice, steered and unsteered. The direct part is
    computed only from the value vectors and the attention patterns and norms of the steered run;
    the indirect part is the rest of what the head writes, value biases included.
    Raises ValueError before any work for a vector of another width or layer or zero, a layer below
    the vector's, and no prompts.
    """
    model._check_open()
    check_vector(model, vector)
    coefficient, layer = (
        check_steering(model, vector, coefficient),
        _layer(layer, vector, model.config),
    )
    rows = as_tokens(model, prompts, "prompts")
    sites = _sites(model, layer)
    steered = model.run(
        rows, responses, edits=[Steer(vector, coefficient)], capture=sites, logits=None
    )
    base = model.run(rows, responses, capture=sites[:1], logits=None)
    scales = _scales(model, steered, layer, coefficient)
    # hook_result is before a post-norm, so the gain of the post-norm is left out.
    values = model._engine.value_vectors(vector.direction, layer, False)[0]
    direct = scales.astype(np.float32)[..., None] * values
    return Decomposition(
        direct,
        steered[sites[0]] - direct,
        scales.astype(np.float32),
        base[sites[0]],
        steered.tokens,
        steered.mask,
        layer,
    )


# -- over data -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class DirectShares(Table):
    """`Decomposition.heads_share` and `.share` over many prompts.

    layers: int64 [n]. heads: float64 [n, H]; total: float64 [n], of the sum over heads.
    n_positions: tokens that were summed over.
    """

    layers: IntArray
    heads: Float64Array
    total: Float64Array
    n_positions: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"layers": [n], "heads": [n][H], "total": [n], "n_positions": int}, as nested
        lists; a share that is not defined (NaN) becomes None.
        """
        return {
            "layers": self.layers.tolist(),
            "heads": [_plain(row) for row in self.heads],
            "total": _plain(self.total),
            "n_positions": self.n_positions,
        }

    def to_markdown(self) -> str:
        """A table with a row for each layer and a column for each head, in percent."""
        lines = [
            (
                "Share of the steered change of attention's output that the direct part explains;"
                f" {self.n_positions} positions."
            ),
            "",
            "| layer | all heads | "
            + " | ".join(f"H{h}" for h in range(self.heads.shape[1]))
            + " |",
            "|---:" * (self.heads.shape[1] + 2) + "|",
        ]
        return "\n".join(
            lines
            + [
                f"| {l} | {_percent(t)} | " + " | ".join(map(_percent, row)) + " |"
                for l, t, row in zip(self.layers, self.total, self.heads)
            ]
        )


def _plain(shares: Float64Array) -> list[float | None]:
    return [None if np.isnan(x) else float(x) for x in shares]


def _percent(share: float) -> str:
    return "-" if np.isnan(share) else f"{100 * share:.0f} %"


def direct_shares(
    model: Model,
    prompts: Sequence[Any],
    vector: SteeringVector,
    coefficient: float,
    layers: int | Sequence[int] | None = None,
    *,
    progress: bool | Callable[[int, int], Any] = True,
) -> DirectShares:
    """`Decomposition.heads_share` and `.share` over many prompts, for `layers` (None: all from the
    vector's on), in batches that fit in memory.

    Sums run in float64 over every real position of every prompt. Raises ValueError as `decompose`
    does, and for an empty list of layers.
    """
    model._check_open()
    check_vector(model, vector)
    c, coefficient = model.config, check_steering(model, vector, coefficient)
    if layers is None:
        layers = range(vector.layer, c.n_layers)
    elif isinstance(layers, (int, np.integer)):
        layers = [layers]
    chosen = [_layer(l, vector, c) for l in layers]
    if not chosen:
        raise ValueError("layers is empty: name at least one, or None for all")
    rows = as_tokens(model, prompts, "prompts")
    longest = max(map(len, rows))
    # Bytes that one prompt takes for one layer: results and patterns, steered and unsteered.
    one = 8 * longest * c.n_heads * (c.d_model + longest)
    at_once = max(1, min(len(chosen), CAPTURE_BYTES // one))
    values = model._engine.value_vectors(vector.direction, vector.layer, False).astype(np.float64)
    # Of each: direct . change, and |change|^2.
    per_head, together = np.zeros((2, len(chosen), c.n_heads)), np.zeros((2, len(chosen)))
    edits = [Steer(vector, coefficient)]
    with Progress(progress, len(rows) * len(chosen), "direct shares") as bar:
        for part in batches(rows, tokens=4096, most=max(1, CAPTURE_BYTES // (one * at_once))):
            for first in range(0, len(chosen), at_once):
                some = chosen[first : first + at_once]
                sites = [s for l in some for s in _sites(model, l)]
                steered = model.run(rows[part], edits=edits, capture=sites, logits=None)
                results = [_sites(model, l)[0] for l in some]
                base = model.run(rows[part], capture=results, logits=None)
                for i, (layer, result) in enumerate(zip(some, results), first):
                    scales = _scales(model, steered, layer, coefficient)
                    svv = values[layer - vector.layer]
                    change = steered[result].astype(np.float64) - base[result]
                    heads, total = _products(scales, svv, change)
                    per_head[:, i] += heads
                    together[:, i] += total
                bar.step(len(steered.mask) * len(some))
    return DirectShares(np.array(chosen), _ratio(*per_head), _ratio(*together), sum(map(len, rows)))


def _products(
    scales: Float64Array, svv: Float64Array, change: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """(direct . change, |change|^2), summed over positions: of each head, [2, H], and of the sum
    over heads, [2].

    scales: [B, S, H]; svv: the layer's value vectors [H, D]; change: [B, S, H, D].
    """
    heads = [
        np.einsum("bsh,bshd,hd->h", scales, change, svv, optimize=True),
        np.einsum("bshd,bshd->h", change, change),
    ]
    direct, change = np.einsum("bsh,hd->bsd", scales, svv), change.sum(axis=2)
    return np.array(heads), np.array([(direct * change).sum(), (change * change).sum()])
