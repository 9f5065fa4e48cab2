"""Encoding on the device: sums of features over segments of tokens, and the largest of a token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..base.checks import require_int
from ..base.types import Float32Array, Float64Array, Int32Array
from .autoencoder import SAE

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Default bound on the bytes that encoding takes beside the encoder's weights.
MAX_MEMORY = 256 << 20
#: The largest tile: tokens and features.
ROWS, COLUMNS = 1024, 8192
#: Bytes of weights that are handed over at a time.
LOAD_BYTES = 32 << 20


class Encoder:
    """An SAE's encoder on a model's device; its memory is freed with the object.

    max_memory: bytes for tiles and results beside the weights. Raises ValueError where that is too
    little for one token, and for a topk autoencoder of more than 512, which the device does not
    keep; DeviceError where the weights do not fit.
    """

    def __init__(self, model: Model, sae: SAE, max_memory: int = MAX_MEMORY) -> None:
        from .. import _engine

        names, most = _engine.constants, _engine.constants["TOPK_MAX"]
        if sae.k is not None and sae.k > most:
            raise ValueError(f"k={sae.k}: the device keeps at most {most} features of a token")
        self.sae = sae
        self.rows, columns, self.segments = _tiles(sae, require_int(max_memory, "max_memory", 1))
        kind = "GATE" if sae.kind == "gated" else "LINEAR" if sae.kind == "topk" else "JUMP"
        self._engine = _engine.Encoder(
            model._engine, sae.n_features, sae.width, names[f"ENCODER_{kind}"], self.rows, columns
        )
        step = max(1, LOAD_BYTES // (4 * sae.width) // 32) * 32
        for first in range(0, sae.n_features, step):
            part = sae.W_enc[:, first : first + step]
            self._engine.load(first, np.ascontiguousarray(part.T))
        self._engine.vectors(*_vectors(sae))

    def sums(self, segments: list[Float32Array]) -> Float64Array:
        """The sum of the features over each segment, activations [tokens, D]: float64 [segments,
        F]. A segment's sum does not depend on the others.
        """
        if self.sae.k is not None:
            return np.stack([self._scattered(segment) for segment in segments])
        out = np.empty((len(segments), self.sae.n_features))
        for first in range(0, len(segments), self.segments):
            some = segments[first : first + self.segments]
            counts = np.array([len(segment) for segment in some], np.uint32)
            out[first : first + len(some)] = self._engine.sums(
                self.sae._inputs(np.concatenate(some)), counts
            )
        return out

    def _scattered(self, segment: Float32Array) -> Float64Array:
        """The sum of a topk autoencoder's features."""
        total: Float64Array = np.zeros(self.sae.n_features)
        for first in range(0, len(segment), self.rows):
            values, features = self.top(segment[first : first + self.rows], self.sae.k or 1)
            active = features >= 0
            np.add.at(total, features[active], values[active].astype(np.float64))
        return total

    def top(self, h: Float32Array, n: int) -> tuple[Float32Array, Int32Array]:
        """(values, features) of the n largest features of each token that are not 0, falling, of
        equal ones the lower first: [tokens, n]. The rest of a row is 0 and -1.
        """
        k = min(n, self.sae.n_features)
        values, indices = self._engine.top(self.sae._inputs(h), k)
        features = indices.astype(np.int32)
        # a topk autoencoder has no features behind its k largest, nor negative ones
        off = values <= 0 if self.sae.k is not None else values == 0
        off |= np.arange(k) >= (self.sae.k or k)
        values[off], features[off] = 0, -1
        order = np.argsort(features < 0, axis=1, kind="stable")
        pad = ((0, 0), (0, n - k))
        return (
            np.pad(np.take_along_axis(values, order, 1), pad),
            np.pad(np.take_along_axis(features, order, 1), pad, constant_values=-1),
        )


def _tiles(sae: SAE, max_memory: int) -> tuple[int, int, int]:
    """(tokens and features of a tile, segments at a time) that max_memory holds."""
    features, width = _rounded(sae.n_features), _rounded(sae.width)
    each_segment = 12 * features  # on the device, in the memory read back, and as the result
    columns = min(COLUMNS, features)
    rows = 0
    while True:
        rows = min(ROWS, max_memory // 2 // (4 * (width + columns + 48)))
        if rows >= 16 or columns == 32:
            break
        columns = max(32, columns // 2 // 32 * 32)
    segments = max_memory // 2 // each_segment
    if rows < 1 or segments < 1:
        least = 2 * max(each_segment, 4 * (width + 32 + 48))
        raise ValueError(
            f"max_memory={max_memory:,} bytes are too few for {sae.n_features:,} features of width"
            f" {sae.width}: give at least {least:,}"
        )
    return rows, columns, segments


def _rounded(n: int) -> int:
    return (n + 31) // 32 * 32


def _vectors(sae: SAE) -> tuple[Float32Array | None, ...]:
    """The encoder's vectors, in the order of csrc/analysis/encode.h."""
    if sae.r_mag is not None:
        return sae.b_enc, np.exp(sae.r_mag), sae.b_mag
    if sae.kind == "topk":
        return sae.b_enc, None, None
    zero = np.zeros(sae.n_features, np.float32)
    return sae.b_enc, zero if sae.threshold is None else sae.threshold, None


def grouped(rows: Iterable[Float32Array], most: int) -> Iterator[list[Float32Array]]:
    """Consecutive rows in lists of about `most` tokens."""
    some: list[Float32Array] = []
    n = 0
    for row in rows:
        if some and n + len(row) > most:
            yield some
            some, n = [], 0
        some.append(row)
        n += len(row)
    if some:
        yield some
