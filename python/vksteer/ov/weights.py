"""The weights of a head as NumPy arrays, its QK and OV circuits as low-rank products, and the
logit lens on their singular vectors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..base.checks import require_int
from ..base.types import Float32Array
from .lens import Lens, logit_lens

if TYPE_CHECKING:
    from ..runtime.model import Model


class Factored(NamedTuple):
    """A [D, D] matrix of rank at most d_head, as left [D, d_head] @ right [d_head, D], both
    float32. The product is never formed.
    """

    left: Float32Array
    right: Float32Array

    def svd(self) -> tuple[Float32Array, Float32Array, Float32Array]:
        """The singular value decomposition left @ right = U diag(S) Vt, as (U float32 [D, d_head],
        S float32 [d_head] in falling order, Vt float32 [d_head, D]).

        Computed in float64 by QR of both factors and the SVD of a d_head x d_head matrix. The sign
        of each pair is chosen so that the largest entry of its row of Vt by magnitude is positive.
        """
        q_left, r_left = np.linalg.qr(self.left.astype(np.float64))
        q_right, r_right = np.linalg.qr(self.right.T.astype(np.float64))
        u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
        u, vt = q_left @ u, vt @ q_right.T
        signs = np.where(vt[np.arange(len(vt)), np.abs(vt).argmax(axis=1)] < 0, -1.0, 1.0)
        return (
            (u * signs).astype(np.float32),
            s.astype(np.float32),
            (vt * signs[:, None]).astype(np.float32),
        )


class HeadWeights(NamedTuple):
    """For the normed residual stream x [..., D]: q = x @ W_Q, k = x @ W_K, v = x @ W_V, and the
    output is z @ W_O, times `config.residual_scale` unless the weights are folded.

    W_Q, W_K, W_V: float32 [D, d_head]; W_O: float32 [d_head, D]. Key and value weights are those
    of the key/value head that the query head uses.
    """

    W_Q: Float32Array
    W_K: Float32Array
    W_V: Float32Array
    W_O: Float32Array

    @property
    def qk(self) -> Factored:
        """W_QK = W_Q W_K^T: x_query W_QK x_key^T is the attention score before the scale, the
        rotary embedding and (where the model has them) the query and key norms.
        """
        return Factored(self.W_Q, np.ascontiguousarray(self.W_K.T))

    @property
    def ov(self) -> Factored:
        """W_OV = W_V W_O: a token that is attended to writes x @ W_OV."""
        return Factored(self.W_V, self.W_O)


def head_weights(model: Model, layer: int, head: int, *, folded: bool = False) -> HeadWeights:
    """The weights of one query head as the device holds them.

    folded: multiply the gain of the norm before attention into W_Q, W_K and W_V, and that of a
    post-norm and the factor on what a layer adds (Granite) into W_O. Then x is the stream divided
    by the norm's scale, without the gain, and `s @ W_V @ W_O` is the head's steering value vector.
    Where the norm is LayerNorm, the mean over D is taken out of every column of the three, too:
    x @ W is then the same for x and for x without its mean. Biases are not included.
    Raises ValueError for a layer or head that the model does not have.
    """
    model._check_open()
    c, engine = model.config, model._engine
    layer, head = require_int(layer, "layer", 0), require_int(head, "head", 0)
    if layer >= c.n_layers or head >= c.n_heads:
        raise ValueError(
            f"no head {head} of layer {layer}: the model has layers 0 to {c.n_layers - 1} with"
            f" heads 0 to {c.n_heads - 1}"
        )
    kv_head = head // (c.n_heads // c.n_kv_heads)
    # The rows of qkv are all queries, then all keys, then all values, d_head for each head.
    places = (head, c.n_heads + kv_head, c.n_heads + c.n_kv_heads + kv_head)
    inputs = [engine.rows("qkv", layer, i * c.d_head, c.d_head).T for i in places]
    out = engine.rows("o", layer, 0, c.d_model)[:, head * c.d_head : (head + 1) * c.d_head].T
    if folded:
        if c.pre_norms:
            inputs = [w * engine.vector("ln1", layer)[:, None] for w in inputs]
        if c.pre_norms and c.norm == "layer":
            inputs = [_centred(w) for w in inputs]
        if c.residual_scale != 1:
            out = out * np.float32(c.residual_scale)
        if c.post_norms:
            out = out * engine.vector("ln1_post", layer)
    return HeadWeights(*map(np.ascontiguousarray, (*inputs, out)))


def _centred(w: Float32Array) -> Float32Array:
    """The columns of [D, d_head] without their means: (x - mean x) W = x (W - mean of W)."""
    centred: Float32Array = (w - w.mean(axis=0, dtype=np.float64)).astype(np.float32)
    return centred


def singular_lens(
    model: Model,
    layer: int,
    head: int,
    *,
    n: int = 5,
    circuit: str = "ov",
    side: str | None = None,
    top: int = 20,
    by: str = "logit",
) -> Lens:
    """The logit lens on the n strongest singular vectors of a head's circuit, with both signs: a
    Lens with the axes (sign, singular vector).

    circuit: "ov" with side "out" (what the head writes, the default) or "in" (what it reads); "qk"
    with side "query" (the default) or "key". Norm gains are folded in, as in
    `head_weights`. Raises ValueError for
    another circuit or side, a head that the model does not have, and n outside 1 to d_head.
    """
    sides = {"ov": ("out", "in"), "qk": ("query", "key")}
    if circuit not in sides or side not in (None, *sides[circuit]):
        raise ValueError(
            f"circuit={circuit!r}, side={side!r}: use 'ov' with 'out' or 'in', 'qk' with 'query' or"
            " 'key'"
        )
    side = side or sides[circuit][0]
    n = require_int(n, "n", 1)
    if n > model.config.d_head:
        raise ValueError(
            f"n={n}: a head of size {model.config.d_head} has no more singular vectors than that"
        )
    u, s, vt = getattr(head_weights(model, layer, head, folded=True), circuit).svd()
    if not s[n - 1] > 0:
        raise ValueError(f"head {head} of layer {layer} has fewer than {n} singular values above 0")
    vectors = vt[:n] if side in ("out", "key") else u.T[:n]
    names = [f"{name} {value:.3g}" for name, value in zip([f"s{i}" for i in range(n)], s)]
    return logit_lens(
        model, np.stack([vectors, -vectors]), top, by, labels=[["+", "-"], names], progress=False
    )
