"""Vectors for the keys and values of every layer: the type, its algebra and its checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.arrays import as_float32
from ..base.checks import require_int
from ..base.provenance import fingerprint
from ..base.types import Float32Array, Float64Array, PathLike
from ..errors import ModelError
from . import cache_files

if TYPE_CHECKING:
    from ..loading.config import Config
    from ..runtime.model import Model

ROTATIONS = ("cache", "unrotated")


@dataclass(frozen=True, eq=False)
class CacheVector:
    """A direction for the keys and one for the values of every layer and key/value head.

    keys, values: float32 [L, G, d_head], copied and read-only. rotate: what the keys are: "cache",
    as they lie in the cache, after norm and rotation; "unrotated", after the norm and before
    rotation, so that they are rotated to the entry's position when they are added. position: the
    prompt position they were taken from, as an edit counts it, or None. meta: provenance, a mapping
    that JSON can hold; read-only.

    Raises ValueError for arrays that are not two of one shape of three axes with finite numbers,
    another `rotate`, and meta that JSON cannot hold.
    """

    keys: Float32Array
    values: Float32Array
    rotate: str = field(default="cache", kw_only=True)
    position: int | None = field(default=None, kw_only=True)
    meta: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("keys", "values"):
            array = np.array(as_float32(getattr(self, name)), order="C")
            if array.ndim != 3 or array.size == 0:
                raise ValueError(
                    f"{name} must have the axes [layers, key/value heads, d_head], not shape"
                    f" {list(array.shape)}"
                )
            if not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite in float32")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        if self.keys.shape != self.values.shape:
            raise ValueError(
                f"keys {list(self.keys.shape)} and values {list(self.values.shape)} must have one"
                " shape"
            )
        if self.rotate not in ROTATIONS:
            raise ValueError(f"rotate={self.rotate!r}: use 'cache' or 'unrotated'")
        try:
            meta = json.loads(json.dumps(dict(self.meta)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta must be a mapping that JSON can hold: {error}") from None
        position = None if self.position is None else require_int(self.position, "position")
        object.__setattr__(self, "position", position)
        object.__setattr__(self, "meta", MappingProxyType(meta))

    # A mapping proxy cannot be pickled or deep-copied; the constructor's arguments can.
    def __reduce__(self) -> tuple[Any, ...]:
        arrays = np.array(self.keys), np.array(self.values)
        return _rebuild, (*arrays, self.rotate, self.position, dict(self.meta))

    def __repr__(self) -> str:
        layers, heads, width = self.keys.shape
        return (
            f"CacheVector({layers} layers, {heads} key/value heads of {width}, keys as"
            f" {self.rotate!r}, mean norm of values {self.head_norms.mean():.4g})"
        )

    @property
    def head_norms(self) -> Float64Array:
        """Euclidean lengths of the values of each layer and head, float64 [L, G]."""
        norms: Float64Array = np.linalg.norm(self.values.astype(np.float64), axis=2)
        return norms

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of keys, values and what the keys are."""
        parts = self.keys.tobytes() + self.values.tobytes()
        return hashlib.sha256(parts + self.rotate.encode()).hexdigest()

    def keep_heads(self, k: int) -> CacheVector:
        """Keeps the k heads of each layer with the longest values, and sets the keys and values of
        the others to zero; of equal lengths the lower head is kept. Raises ValueError for a k that
        is not 1 to G.
        """
        n_heads = self.keys.shape[1]
        k = require_int(k, "keep_heads", 1)
        if k > n_heads:
            raise ValueError(f"keep_heads={k}: there are {n_heads} key/value heads")
        order = np.argsort(-self.head_norms, axis=1, kind="stable")
        kept = np.zeros(self.keys.shape[:2], bool)
        np.put_along_axis(kept, order[:, :k], True, axis=1)
        keys, values = (np.where(kept[:, :, None], x, 0) for x in (self.keys, self.values))
        meta = dict(self.meta, keep_heads=k)
        return CacheVector(keys, values, rotate=self.rotate, position=self.position, meta=meta)

    def save(self, path: PathLike) -> None:
        """Writes to `.safetensors` or `.npz` (no pickle), by the name's ending; an existing file is
        replaced whole. Arrays are called kv.key.l and kv.value.l, float32 [G, d_head] for layer l.
        Raises ValueError for another ending.
        """
        cache_files.save(self, path)

    @classmethod
    def load(cls, path: PathLike, model: Model | Config | None = None) -> CacheVector:
        """Reads what `save` wrote. model: what the vector has to fit (`check`). Raises
        vs.ModelError where the file is damaged or holds no such vector, OSError where it cannot be
        read.
        """
        keys, values, facts = cache_files.load(path)
        try:
            vector = cls(keys, values, **facts)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None
        if model is not None:
            vector.check(model)
        return vector

    def check(self, model: Model | Config) -> None:
        """Raises ValueError where this vector does not belong to `model`: another number of layers
        or key/value heads, another width of a head, or keys and values that were taken from other
        weights.
        """
        config: Any = getattr(model, "config", model)
        theirs = (config.n_layers, config.n_kv_heads, config.d_head)
        if self.keys.shape != theirs:
            raise ValueError(
                f"the cache vector has shape {list(self.keys.shape)} (layers, key/value heads,"
                f" d_head), the model {list(theirs)}: it belongs to another model"
            )
        made_with, mine = self.meta.get("model_hash"), fingerprint(model)
        if made_with and mine and made_with != mine:
            raise ValueError(
                "the cache vector was made from another model"
                f" ({self.meta.get('model', 'unnamed')}, {str(made_with)[:12]}; this one is"
                f" {mine[:12]}): extract it from this one. CacheVector(v.keys, v.values) without"
                " meta is taken as it is"
            )


def load(path: PathLike, model: Model | Config | None = None) -> CacheVector:
    """`CacheVector.load`."""
    return CacheVector.load(path, model)


def _rebuild(
    keys: Float32Array,
    values: Float32Array,
    rotate: str,
    position: int | None,
    meta: Mapping[str, Any],
) -> CacheVector:
    return CacheVector(keys, values, rotate=rotate, position=position, meta=meta)
