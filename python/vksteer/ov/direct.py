"""Direct logit attribution: what every head and MLP adds to a logit by itself, through the final
norm and the unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, require_int
from ..base.figures import new_figure
from ..base.types import Array, Float64Array, IntArray, Prompts
from ..inputs.prompts import as_tokens, batches, token_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..loading.config import Config
    from ..runtime.model import Model

#: Tokens of a pass, and bytes of activations that it may return.
PASS_TOKENS, PASS_BYTES = 4096, 256 << 20


@dataclass(frozen=True, eq=False)
class Attribution:
    """Parts of one logit (or of a difference of two) of each of B prompts, before a soft cap.

    heads: float64 [B, L, H], what each head adds to the residual stream, read by the final norm and
    the unembedding; value biases pass through the heads. mlps: float64 [B, L]. embed: float64 [B],
    learned positions included. bias: float64 [B], the output biases of attention and MLP, and the
    biases of the final norm and of the unembedding. total: float64 [B], their sum: the logit.
    tokens, minus: the token texts whose logits (or differences) these are.
    """

    heads: Float64Array
    mlps: Float64Array
    embed: Float64Array
    bias: Float64Array
    tokens: tuple[str, ...]
    minus: tuple[str, ...] | None

    @property
    def total(self) -> Float64Array:
        """The sum of all parts, float64 [B]."""
        parts: Float64Array = (
            self.heads.sum(axis=(1, 2)) + self.mlps.sum(axis=1) + self.embed + self.bias
        )
        return parts

    def __len__(self) -> int:
        return len(self.embed)

    def __repr__(self) -> str:
        return f"Attribution({len(self)} prompts, mean logit {self.total.mean():.3f})"

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The n parts of the largest size, mean over prompts: (name, value) as "a5.h0", "m3",
        "embed" or "bias", the largest first.
        """
        heads, mlps = self.heads.mean(axis=0), self.mlps.mean(axis=0)
        parts = [(f"a{l}.h{h}", float(v)) for (l, h), v in np.ndenumerate(heads)]
        parts += [(f"m{l}", float(v)) for l, v in enumerate(mlps)]
        parts += [("embed", float(self.embed.mean())), ("bias", float(self.bias.mean()))]
        return sorted(parts, key=lambda part: -abs(part[1]))[:n]

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{name}</td><td>{v:.3f}</td></tr>" for name, v in self.top(12))
        return (
            f"<table><tr><th>part</th><th>logit</th></tr>{rows}"
            f"<tr><th>total</th><th>{self.total.mean():.3f}</th></tr></table>"
        )

    def plot(self) -> Figure:
        """A map of the heads and bars of the MLPs, mean over prompts. Raises ImportError, naming
        what to install, without matplotlib.
        """
        heads, mlps = self.heads.mean(axis=0), self.mlps.mean(axis=0)
        figure = new_figure(7, 3.5)
        left, right = figure.subplots(1, 2, width_ratios=[3, 1])
        size = float(np.abs(heads).max()) or 1.0
        image = left.imshow(heads, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
        left.set(xlabel="head", ylabel="layer", title="heads")
        figure.colorbar(image, ax=left)
        right.barh(range(len(mlps)), mlps, color="#4878a8")
        right.invert_yaxis()
        right.set(xlabel="logit", title="MLPs")
        return figure


def direct_logit_attribution(
    model: Model,
    prompts: Prompts,
    tokens: int | Sequence[int],
    *,
    position: int = -1,
    minus: int | Sequence[int] | None = None,
) -> Attribution:
    """What heads, MLPs, embedding and biases each add to a logit, as the final norm and the
    unembedding read it.

    prompts: texts or token lists. tokens: whose logit, one id for all prompts or one for each.
    position: whose next token, counted as in a list. minus: the token ids whose logit is taken
    away, likewise. The scale of the final norm, and those of post-norms, are those of the run
    itself. Parts are what is added to the residual stream: after a post-norm, times the factor on
    what layers add. Their sum is the logit before a soft cap.

    Returns an Attribution with float64 parts. Raises ValueError before any work for bad prompts,
    ids outside the vocabulary, as many ids as prompts missing, and a position outside a prompt.
    """
    rows = as_tokens(model, prompts, "prompts")
    ids = _ids(tokens, len(rows), model.config, "tokens")
    away = None if minus is None else _ids(minus, len(rows), model.config, "minus")
    at = [_position(position, len(row), i) for i, row in enumerate(rows)]
    read, constant = _reading(model, ids, away)
    found = _Parts(model, len(rows))
    c = model.config
    longest = max(map(len, rows))
    most = max(1, PASS_BYTES // (4 * longest * c.n_layers * (c.n_heads * c.d_head + c.d_model)))
    for part in batches(rows, tokens=PASS_TOKENS, most=most):
        index = np.arange(len(rows))[part]
        captured = _captured(model, rows[part], at[part])
        found.add(index, captured, read[part])
    found.bias += constant
    texts = [
        tuple(token_text(model, t) for t in some) for some in (ids, () if away is None else away)
    ]
    return Attribution(
        found.heads,
        found.mlps,
        found.embed,
        found.bias,
        texts[0],
        texts[1] if minus is not None else None,
    )


def _ids(given: int | Sequence[int], n: int, config: Config, what: str) -> IntArray:
    listed = [given] * n if is_int(given) else list(given)  # type: ignore[arg-type]
    if len(listed) != n:
        raise ValueError(f"{what} must be one token id, or one for each of {n} prompts")
    for token in listed:
        if not is_int(token) or not 0 <= token < config.d_vocab:
            raise ValueError(f"{what}: {token!r} is no token id (0 to {config.d_vocab - 1})")
    return np.array(listed, dtype=np.int64)


def _position(position: Any, length: int, i: int) -> int:
    at = require_int(position, "position")
    if not -length <= at < length:
        raise ValueError(f"position {at} lies outside prompt {i}, which has {length} tokens")
    return at % length


def _reading(
    model: Model, ids: IntArray, away: IntArray | None
) -> tuple[Float64Array, Float64Array]:
    """(what the logit reads of the stream divided by the final norm's scale, float64 [B, D]; the
    part of the biases of the final norm and of the unembedding, float64 [B]).
    """
    engine, c = model._engine, model.config

    def row(token: int) -> Float64Array:
        values: Float64Array = engine.rows("unembed", 0, int(token), 1)[0].astype(np.float64)
        return values

    unembed = np.stack([row(t) for t in ids])
    if away is not None:
        unembed -= np.stack([row(t) for t in away])
    read = unembed * engine.vector("ln_final", 0)
    if c.norm == "layer":
        read -= read.mean(axis=1, keepdims=True)  # the norm takes the mean out of the stream
    constant = np.zeros(len(ids))
    if c.norm_bias:
        constant += unembed @ engine.vector("b_ln_final", 0)
    if c.unembed_bias:
        bias = engine.vector("b_unembed", 0).astype(np.float64)
        constant += bias[ids] - (0 if away is None else bias[away])
    return read, constant


def _captured(model: Model, rows: list[list[int]], at: list[int]) -> dict[str, Float64Array]:
    """What the parts are made of at one position of each row, float64 [rows, ...] by site."""
    c = model.config
    names = ["blocks.0.hook_resid_pre", "ln_final.hook_scale"]
    for l in range(c.n_layers):
        names += [f"blocks.{l}.attn.hook_z", f"blocks.{l}.hook_mlp_out"]
        if c.post_norms:
            names += [f"blocks.{l}.ln{i}_post.hook_scale" for i in (1, 2)]
    run = model.run(rows, capture=names, logits=None)
    width = max(map(len, rows))
    columns = [width - len(row) + p for row, p in zip(rows, at, strict=True)]
    every = np.arange(len(rows))
    return {name: run[name][every, columns].astype(np.float64) for name in names}


class _Parts:
    """The parts of all prompts, filled batch by batch."""

    def __init__(self, model: Model, n: int) -> None:
        c = model.config
        self.model = model
        self.heads: Float64Array = np.zeros((n, c.n_layers, c.n_heads))
        self.mlps: Float64Array = np.zeros((n, c.n_layers))
        self.embed: Float64Array = np.zeros(n)
        self.bias: Float64Array = np.zeros(n)

    def add(self, index: Array, captured: dict[str, Float64Array], read: Float64Array) -> None:
        """Fills the rows `index`."""
        c = self.model.config
        read = read / captured["ln_final.hook_scale"]
        self.embed[index] = _along(captured["blocks.0.hook_resid_pre"], read)
        for l in range(c.n_layers):
            self._add_layer(l, index, captured, read)

    def _add_layer(
        self, l: int, index: Array, captured: dict[str, Float64Array], read: Float64Array
    ) -> None:
        c, engine = self.model.config, self.model._engine
        of_attention = of_mlp = read
        if c.post_norms:
            # what reads a sublayer's output before its post-norm
            scales = [captured[f"blocks.{l}.ln{i}_post.hook_scale"] for i in (1, 2)]
            of_attention = read * engine.vector("ln1_post", l) / scales[0]
            of_mlp = read * engine.vector("ln2_post", l) / scales[1]
        w = engine.rows("o", l, 0, c.d_model).astype(np.float64) * c.residual_scale  # [D, H dh]
        through = (of_attention @ w).reshape(len(read), c.n_heads, c.d_head)
        z = captured[f"blocks.{l}.attn.hook_z"]
        self.heads[index, l] = (through * z).sum(axis=-1)
        self.mlps[index, l] = _along(captured[f"blocks.{l}.hook_mlp_out"], read)
        if c.o_bias:
            self.bias[index] += of_attention @ engine.vector("b_o", l)
        if c.mlp_bias:
            from_bias = of_mlp @ engine.vector("b_down", l)
            self.bias[index] += from_bias
            self.mlps[index, l] -= from_bias


def _along(x: Float64Array, read: Float64Array) -> Float64Array:
    sums: Float64Array = np.einsum("bd,bd->b", x, read)
    return sums
