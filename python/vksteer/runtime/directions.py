"""What steering by a direction adds behind the norms of a layer (docs/method.md sections 6 and 7):
to values, and to the input of the MLP.

D width, G key/value heads, F width of the MLP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..base.types import Float32Array

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site


def normed(model: Model, direction: Float32Array) -> Float32Array:
    """What adding `direction` to the residual stream adds to the output of a norm before the scale
    and the gain, float32 [D]: the direction, without its mean where the norm is LayerNorm.
    """
    direction = np.asarray(direction, np.float32)
    if model.config.norm != "layer" or not model.config.pre_norms:
        return direction
    centred: Float32Array = (direction - direction.mean(dtype=np.float64)).astype(np.float32)
    return centred


def _applied(model: Model, matrix: str, gain: str, layer: int, x: Float32Array) -> Float32Array:
    """The matrix times x, times the gain where there is a norm, float32 [rows]."""
    if model.config.pre_norms:
        x = normed(model, x) * model._engine.vector(gain, layer)
    product: Float32Array = model._engine.apply(matrix, layer, np.ascontiguousarray(x[None]))[0]
    return product


def value_direction(model: Model, direction: Float32Array, layer: int) -> Float32Array:
    """What steering by `direction` adds to the values of `layer`, up to the norm's scale: W_V
    (n(s) * gain), float32 [G, d_head]; W_V s where no norm is before attention. Biases are no part
    of it, and it is before a clamp of the values.
    """
    c = model.config
    product = _applied(model, "qkv", "ln1", layer, np.asarray(direction, np.float32))
    values = product[(c.n_heads + c.n_kv_heads) * c.d_head :]
    return np.asarray(values.reshape(c.n_kv_heads, c.d_head))


def ablations(
    model: Model, ablate: str, direction: Float32Array, layer: int
) -> Iterator[tuple[Site, str, Float32Array]]:
    """(site, kind of edit, operand) for what subtracts `direction` from the input of the values
    ("svv") or of the MLP ("mlp_direct") of one layer, when each operand is taken -a times.

    With norms before attention and MLP the operands are divided by the scale of the row's own norm
    ("add_scaled"). Without them the direction itself is subtracted ("add"): from the values, and
    behind the projections of the MLP, whose input is the residual stream itself.
    """
    c, sites = model.config, model._sites.by_name
    kind = "add_scaled" if c.pre_norms else "add"
    if ablate == "svv":
        site = sites[f"blocks.{layer}.attn.hook_v"]
        yield site, kind, value_direction(model, direction, layer)
    elif c.pre_norms:
        yield sites[f"blocks.{layer}.ln2.hook_normalized"], kind, normed(model, direction)
    else:
        product = _applied(model, "gate_up", "ln2", layer, direction)
        parts = ("hook_pre", "hook_pre_linear") if c.gated else ("hook_pre",)
        for name, part in zip(parts, np.split(product, len(parts))):
            yield sites[f"blocks.{layer}.mlp.{name}"], kind, part
