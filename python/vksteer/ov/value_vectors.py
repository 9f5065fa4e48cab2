"""Steering value vectors: the direct, input-independent part of what steering adds to the output of
every head, up to a positive scale for each position (docs/method.md section 7).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..base.display import Table
from ..base.types import Float32Array, Float64Array, IntArray
from ..inputs.vectors import SteeringVector

if TYPE_CHECKING:
    from ..runtime.model import Model


def check_vector(model: Model, vector: SteeringVector) -> None:
    """Raises ValueError unless `vector` is a steering vector of this model and not zero."""
    if not isinstance(vector, SteeringVector):
        raise ValueError(
            f"vector must be a SteeringVector (direction and layer), not {type(vector).__name__}"
        )
    vector.check(model, output=False)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it adds nothing to any head")
    if model.config.norm == "layer" and np.ptp(vector.direction) == 0:
        raise ValueError(
            "all entries of the vector are equal: LayerNorm subtracts their mean, so the vector"
            " adds nothing to any head"
        )


@dataclass(frozen=True, eq=False)
class SteeringValueVectors(Table):
    """svv^h(s) = (n(s) * gain) W_V^{g(h)} W_O^h (* post-norm gain), one for every head h of every
    layer from the vector's on. n(s) is s, or s without its mean where the norm is LayerNorm; a
    layer without a norm before attention has no gain.

    values: float32 [n, H, D], read-only. layers: int64 [n], read-only. vector: the SteeringVector
    s. sign: -1 for `negated`.
    """

    values: Float32Array
    layers: IntArray
    vector: SteeringVector
    sign: int = 1

    def __post_init__(self) -> None:
        for array in (self.values, self.layers):
            array.flags.writeable = False

    def __repr__(self) -> str:
        n, H, D = self.values.shape
        return (
            f"SteeringValueVectors({n} layers from {self.layers[0]} on, {H} heads, width"
            f" {D}{', negated' if self.sign < 0 else ''})"
        )

    def __getitem__(self, place: tuple[int, int]) -> Float32Array:
        """float32 [D] of one (layer, head); the layer is counted as in the model. Raises KeyError
        where there is none.
        """
        layer, head = place
        if layer not in self.layers or not 0 <= head < self.values.shape[1]:
            raise KeyError(
                f"no head {head} of layer {layer}: there are layers {self.layers[0]} to"
                f" {self.layers[-1]} with heads 0 to {self.values.shape[1] - 1}"
            )
        one: Float32Array = self.values[int(layer) - int(self.layers[0]), int(head)]
        return one

    @property
    def labels(self) -> list[list[str]]:
        """Names of the two leading axes: layers such as "L12", heads such as "H3"."""
        return [[f"L{l}" for l in self.layers], [f"H{h}" for h in range(self.values.shape[1])]]

    @property
    def negated(self) -> SteeringValueVectors:
        """The same with the opposite sign: what the heads write under a negative coefficient."""
        return replace(self, values=-self.values, sign=-self.sign)

    def sum_over_heads(self) -> Float32Array:
        """float32 [n, D], summed in float64: what steering writes through a layer's OV circuit when
        all heads have the same attention pattern.
        """
        total: Float64Array = self.values.sum(axis=1, dtype=np.float64)
        return total.astype(np.float32)

    @property
    def norms(self) -> Float64Array:
        """float64 [n, H]: the Euclidean norm of each vector."""
        norms: Float64Array = np.linalg.norm(self.values.astype(np.float64), axis=-1)
        return norms

    @property
    def shares(self) -> Float64Array:
        """float64 [n, H]: each head's share of the sum S over a layer's heads, svv^h . S / |S|^2.
        The shares of a layer add up to 1; a head that writes against the others has a negative one.
        How much a head really writes depends on its attention: see `ov.direct_shares`.
        """
        values = self.values.astype(np.float64)
        total = values.sum(axis=1)
        with np.errstate(invalid="ignore"):
            shares: Float64Array = np.einsum("nhd,nd->nh", values, total) / (total**2).sum(
                -1, keepdims=True
            )
        return shares

    def largest(self, k: int = 10) -> list[tuple[int, int]]:
        """(layer, head) of the k vectors of largest norm, in falling order; ties by layer, then by
        head.
        """
        order = np.argsort(-self.norms, axis=None, kind="stable")[:k]
        return [
            (int(self.layers[n]), int(h))
            for n, h in zip(*np.unravel_index(order, self.norms.shape))
        ]

    def to_markdown(self, k: int = 10) -> str:
        """A table of the k vectors of largest norm: layer, head, norm, share of the layer's sum."""
        lines = ["| layer | head | norm | share of the layer's sum |", "|---:|---:|---:|---:|"]
        norms, shares, first = self.norms, self.shares, int(self.layers[0])
        return "\n".join(
            lines
            + [
                f"| {l} | {h} | {norms[l - first, h]:.4g} | {100 * shares[l - first, h]:.1f} % |"
                for l, h in self.largest(k)
            ]
        )


def steering_value_vectors(model: Model, vector: SteeringVector) -> SteeringValueVectors:
    """The steering value vectors of every head of every layer from the vector's on, computed on the
    device (docs/method.md section 7).

    Each W_V and W_O is read once, all layers in one call. Norm gains (Gemma's 1 + w), post-norm
    gains and the factor on what a layer adds (Granite) are included; biases are not part of a value
    vector, and it is that of values inside a clamp (OLMo's clip_qkv). Raises ValueError before any
    work for a vector of another width or layer, or zero, and for a vector of equal entries in a
    model with LayerNorm, which reads nothing of it.
    """
    model._check_open()
    check_vector(model, vector)
    return SteeringValueVectors(
        model._engine.value_vectors(vector.direction, vector.layer),
        np.arange(vector.layer, model.config.n_layers),
        vector,
    )
