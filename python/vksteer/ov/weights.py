"""A head's weights as NumPy, its two circuits factored, and their singular vectors
read through the lens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..base.checks import require_int
from .lens import Lens, logit_lens


class Factored(NamedTuple):
    """A [D, D] matrix of rank d_head at most, as left [D, d_head] @ right [d_head, D];
    never multiplied out.
    """

    left: np.ndarray
    right: np.ndarray

    def svd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(U float32 [D, d_head], S float32 [d_head] falling, Vt float32 [d_head, D]): left @
        right = U diag(S) Vt.

        By QR of both factors and the SVD of a d_head x d_head matrix, in float64. Of the two signs
        of a pair, that with the larger positive entry in Vt's row.
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
    """For rows of the residual stream x [.., D] (after the norm): q = x @ W_Q, k = x @ W_K, v = x @
    W_V, output z @ W_O.

    W_Q, W_K, W_V: float32 [D, d_head]; W_O: float32 [d_head, D]. Key and value weights are those
    of the head's group.
    """

    W_Q: np.ndarray
    W_K: np.ndarray
    W_V: np.ndarray
    W_O: np.ndarray

    @property
    def qk(self) -> Factored:
        """W_QK = W_Q W_K^T: x_query W_QK x_key^T is the score before scale, rotation and (where the
        model has them) q/k norms.
        """
        return Factored(self.W_Q, np.ascontiguousarray(self.W_K.T))

    @property
    def ov(self) -> Factored:
        """W_OV = W_V W_O: what a token that is attended to writes is x @ W_OV."""
        return Factored(self.W_V, self.W_O)


def head_weights(model, layer: int, head: int, *, folded: bool = False) -> HeadWeights:
    """(W_Q, W_K, W_V, W_O) of one query head as the device holds them: [D, d_head] three
    times, and [d_head, D].

    folded: with the gain of the norm before attention in W_Q, W_K, W_V and that of a post-norm in
    W_O, so that x may be the normalised stream before its gain; then `s @ W_V @ W_O` is the head's
    steering value vector. Biases are not in.
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
    group = head // (c.n_heads // c.n_kv_heads)
    row = lambda block: engine.rows("qkv", layer, block * c.d_head, c.d_head).T
    inputs = [row(head), row(c.n_heads + group), row(c.n_heads + c.n_kv_heads + group)]
    out = engine.rows("o", layer, 0, c.d_model)[:, head * c.d_head : (head + 1) * c.d_head].T
    if folded:
        inputs = [w * engine.vector("ln1", layer)[:, None] for w in inputs]
        if c.post_norms:
            out = out * engine.vector("ln1_post", layer)
    return HeadWeights(*map(np.ascontiguousarray, (*inputs, out)))


def singular_lens(
    model,
    layer: int,
    head: int,
    *,
    n: int = 5,
    circuit: str = "ov",
    side: str | None = None,
    top: int = 20,
    by: str = "logit",
) -> Lens:
    """What the n strongest singular vectors of a head's circuit say, both signs: a Lens with the
    axes (sign, singular vector).

    circuit: "ov" with side "out" (what the head writes, default) or "in" (what it reads); "qk" with
    side "query" (default) or "key". Norm gains are folded in. Raises ValueError for other words, a
    head that the model does not have, n outside 1 to d_head.
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
