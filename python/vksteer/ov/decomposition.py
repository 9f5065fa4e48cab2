"""The steered OV circuit taken apart: direct part (attention-weighted steering value vectors) and
indirect part of every head's output.

With H the residual stream without the added a*s and D_c = 1/RMS(H + a*s), a head's output is
    A^h D_c (H * gain) W_V W_O^h + b_V W_O^h   (indirect)   +   D_{c^h} svv^h(s),  D_{c^h} =
    A^h D_c a   (direct),
before a post-norm, at every position: method.md section 7. Here A^h and the RMS are
those of the steered run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base.checks import require_int
from ..base.progress import Progress
from ..inputs.prompts import as_tokens, batches
from ..inputs.samples import check_steering
from ..runtime.edits import Steer
from .value_vectors import check_vector

#: Captured float32 that may be held at a time while shares are summed.
CAPTURE_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Decomposition:
    """One layer of one batch. Rows are left-padded, padded entries are 0.

    direct, indirect: float32 [B, S, H, D]; their sum is `attn.hook_result` of the steered
    run. scales: float32 [B, S, H], A^h D_c a of the method: of a's sign, positive where a >
    0. base: float32 [B, S, H, D], the unsteered run's. tokens: int32 [B, S]; mask: bool [B,
    S]. layer: whose heads.
    """

    direct: np.ndarray
    indirect: np.ndarray
    scales: np.ndarray
    base: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray
    layer: int

    @property
    def heads_share(self) -> np.ndarray:
        """float64 [H]: how much of the steered change of each head's output the direct part
        explains: sum over positions of direct . change over that of |change|^2, change = steered -
        unsteered. The rest is the indirect part's. NaN where nothing changes.
        """
        direct, change = self._parts()
        return _ratio(
            np.einsum("bshd,bshd->h", direct, change), np.einsum("bshd,bshd->h", change, change)
        )

    @property
    def share(self) -> float:
        """The same for the heads' sum, which is what the layer's attention writes."""
        direct, change = (part.sum(axis=2) for part in self._parts())
        return float(_ratio((direct * change).sum(), (change * change).sum()))

    def _parts(self):
        direct = self.direct.astype(np.float64)
        return direct, direct + self.indirect - self.base


def _ratio(a, b):
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(b) > 0, np.divide(a, b), np.nan)


def _layer(layer, vector, config) -> int:
    layer = require_int(layer, "layer", 0)
    if not vector.layer <= layer < config.n_layers:
        raise ValueError(
            f"layer {layer} has no steered OV circuit: steering at layer {vector.layer} reaches"
            f" layers {vector.layer} to {config.n_layers - 1}"
        )
    return layer


def _scales(run, layer: int, coefficient: float) -> np.ndarray:
    """A^h D_c a, float64 [B, S, H]."""
    rms = run[f"blocks.{layer}.ln1.hook_scale"][..., 0].astype(np.float64)
    inverse = np.where(run.mask, 1.0 / np.where(run.mask, rms, 1.0), 0.0)
    return coefficient * np.einsum(
        "bhqk,bk->bqh", run[f"blocks.{layer}.attn.hook_pattern"].astype(np.float64), inverse
    )


def _sites(layer: int) -> list[str]:
    return [
        f"blocks.{layer}.attn.hook_result",
        f"blocks.{layer}.attn.hook_pattern",
        f"blocks.{layer}.ln1.hook_scale",
    ]


def decompose(
    model, prompts, vector, coefficient: float, layer: int, *, responses=None
) -> Decomposition:
    """The two parts of every head's output of `layer` when `vector` steers all
    positions by `coefficient`.

    prompts: texts or token lists; responses: one per prompt, after it. layer: from the vector's on.
    Two runs: steered and unsteered. The direct part is computed from the value vectors, the run's
    patterns and norms alone; the indirect part is what the head writes beyond it, value biases
    included. Raises ValueError before any work for a vector of another width or layer or zero, a
    layer below the vector's, no prompt.
    """
    model._check_open()
    check_vector(model, vector)
    coefficient, layer = (
        check_steering(model, vector, coefficient),
        _layer(layer, vector, model.config),
    )
    rows = as_tokens(model, prompts, "prompts")
    sites = _sites(layer)
    steered = model.run(
        rows, responses, edits=[Steer(vector, coefficient)], capture=sites, logits=None
    )
    base = model.run(rows, responses, capture=sites[:1], logits=None)
    scales = _scales(steered, layer, coefficient)
    # before a post-norm: without its gain
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
class DirectShares:
    """How much of the steered change the direct part explains, over prompts (see
    Decomposition.heads_share and .share).

    layers: int64 [n]. heads: float64 [n, H]; total: float64 [n], of the heads' sum. n_positions:
    tokens that were summed over.
    """

    layers: np.ndarray
    heads: np.ndarray
    total: np.ndarray
    n_positions: int

    def to_dict(self) -> dict:
        plain = lambda x: (
            [plain(v) for v in x]
            if isinstance(x, np.ndarray)
            else None
            if np.isnan(x)
            else float(x)
        )
        return {
            "layers": self.layers.tolist(),
            "heads": plain(self.heads),
            "total": plain(self.total),
            "n_positions": self.n_positions,
        }

    def to_markdown(self) -> str:
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
        percent = lambda x: "-" if np.isnan(x) else f"{100 * x:.0f} %"
        return "\n".join(
            lines
            + [
                f"| {l} | {percent(t)} | " + " | ".join(map(percent, row)) + " |"
                for l, t, row in zip(self.layers, self.total, self.heads)
            ]
        )


def direct_shares(
    model, prompts, vector, coefficient: float, layers=None, *, progress=True
) -> DirectShares:
    """`Decomposition.heads_share` and `.share` over many prompts, for `layers` (None: all from the
    vector's on), in batches that fit.

    Sums run in float64 over every real position of every prompt. Raises ValueError as `decompose`.
    """
    model._check_open()
    check_vector(model, vector)
    c, coefficient = model.config, check_steering(model, vector, coefficient)
    layers = (
        list(range(vector.layer, c.n_layers))
        if layers is None
        else [layers]
        if isinstance(layers, (int, np.integer))
        else list(layers)
    )
    layers = [_layer(l, vector, c) for l in layers]
    if not layers:
        raise ValueError("layers is empty: name at least one, or None for all")
    rows = as_tokens(model, prompts, "prompts")
    # bytes that one prompt and layer take, steered and not
    one = 8 * max(map(len, rows)) * c.n_heads * (c.d_model + max(map(len, rows)))
    at_once = max(1, min(len(layers), CAPTURE_BYTES // one))
    values = model._engine.value_vectors(vector.direction, vector.layer, False).astype(np.float64)
    # direct . change, |change|^2
    per_head, together = np.zeros((2, len(layers), c.n_heads)), np.zeros((2, len(layers)))
    with Progress(progress, len(rows) * len(layers), "direct shares") as bar:
        for part in batches(rows, tokens=4096, most=max(1, CAPTURE_BYTES // (one * at_once))):
            for first in range(0, len(layers), at_once):
                some = layers[first : first + at_once]
                steered = model.run(
                    rows[part],
                    edits=[Steer(vector, coefficient)],
                    capture=[s for l in some for s in _sites(l)],
                    logits=None,
                )
                base = model.run(rows[part], capture=[_sites(l)[0] for l in some], logits=None)
                for i, layer in enumerate(some, first):
                    result = _sites(layer)[0]
                    change = steered[result].astype(np.float64) - base[result]
                    scales, svv = _scales(steered, layer, coefficient), values[layer - vector.layer]
                    per_head[0, i] += np.einsum(
                        "bsh,bshd,hd->h", scales, change, svv, optimize=True
                    )
                    per_head[1, i] += np.einsum("bshd,bshd->h", change, change)
                    direct, change = np.einsum("bsh,hd->bsd", scales, svv), change.sum(axis=2)
                    together[0, i] += (direct * change).sum()
                    together[1, i] += (change * change).sum()
                bar.step(len(steered.mask) * len(some))
    return DirectShares(np.array(layers), _ratio(*per_head), _ratio(*together), sum(map(len, rows)))
