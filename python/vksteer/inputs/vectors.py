"""Steering vectors as objects: a direction, the layer whose input it is added to, and its origin.

This module owns the type, its algebra and its checks; `vector_files.py` owns the file formats.
"""

from __future__ import annotations

import builtins
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ..base.arrays import as_float32, as_numpy
from ..base.checks import require_int
from ..base.display import html_table
from ..base.provenance import fingerprint
from ..base.types import Array, Float32Array, PathLike
from ..errors import ModelError
from . import vector_files

if TYPE_CHECKING:
    from ..loading.config import Config
    from ..runtime.model import Model


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """A direction that is added to `blocks.{layer}.hook_resid_pre` (docs/method.md section 1).

    direction: float32 [D], copied and read-only; any numbers are taken, torch tensors and bfloat16
    among them. layer: whose input it steers, counted from 0; in a model of L layers, L steers the
    output of the last block, `blocks.{L-1}.hook_resid_post`.
    position: the post-instruction position it was taken from (negative), or None. method: "dim",
    "ntp", "random", ... as free text. meta: provenance, a mapping that JSON can hold (model and
    tokenizer hash, prompts' hash, versions); read-only here.

    Raises ValueError for a direction that is not one row of finite float32 numbers, for a negative
    layer, and for meta that JSON cannot hold.
    """

    direction: Float32Array
    layer: int
    position: int | None = field(default=None, kw_only=True)
    method: str = field(default="", kw_only=True)
    meta: Mapping[str, Any] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        # an overflow is reported as such below, with its index
        direction = np.array(as_float32(self.direction), order="C")
        if direction.ndim != 1 or direction.size == 0:
            raise ValueError(
                "a steering vector is one row of numbers [D], not an array of shape"
                f" {direction.shape}"
            )
        bad = np.flatnonzero(~np.isfinite(direction))
        if bad.size:
            raise ValueError(
                f"a steering vector must be finite in float32: entry {bad[0]} is"
                f" {direction[bad[0]]} ({bad.size} of {direction.size} are not finite)"
            )
        layer = require_int(self.layer, "layer")
        if layer < 0:
            raise ValueError(
                f"layer must be 0 or more (0 steers the input of the first block), not {layer}"
            )
        direction.flags.writeable = False
        try:
            meta = json.loads(json.dumps(dict(self.meta)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta must be a mapping that JSON can hold: {error}") from None
        object.__setattr__(self, "direction", direction)
        object.__setattr__(self, "layer", layer)
        object.__setattr__(
            self,
            "position",
            None if self.position is None else require_int(self.position, "position"),
        )
        object.__setattr__(self, "method", str(self.method))
        object.__setattr__(self, "meta", MappingProxyType(meta))

    # A mapping proxy cannot be pickled or deep-copied; the constructor's arguments can.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (
            np.array(self.direction),
            self.layer,
            self.position,
            self.method,
            dict(self.meta),
        )

    def __repr__(self) -> str:
        at = "" if self.position is None else f", position={self.position}"
        how = f", method={self.method!r}" if self.method else ""
        return (
            f"SteeringVector(width={self.width}, layer={self.layer}{at}{how}, norm={self.norm:.4g})"
        )

    def _repr_html_(self) -> str:
        rows: list[tuple[str, object]] = [
            ("steers", f"the residual stream before layer {self.layer}"),
            ("method", self.method or "not said"),
            ("position", "not said" if self.position is None else self.position),
            ("norm", f"{self.norm:.4g}"),
            ("width", self.width),
        ]
        made = {"model": "from the model", "model_hash": "model's hash"}
        rows += [(text, self.meta[name]) for name, text in made.items() if self.meta.get(name)]
        return html_table(("SteeringVector", ""), rows)

    @property
    def width(self) -> int:
        """D, the width of the residual stream it belongs to."""
        return self.direction.size

    @property
    def norm(self) -> float:
        """Euclidean length, in float64."""
        return float(np.linalg.norm(self.direction.astype(np.float64)))

    # -- algebra: a scaled vector keeps its provenance and says by how much it was scaled ----------

    def _scaled(self, factor: float) -> SteeringVector:
        factor = float(factor)
        if not math.isfinite(factor):
            raise ValueError(
                f"a steering vector can be scaled by a finite number only, not {factor}"
            )
        meta = dict(self.meta, scaled_by=self.meta.get("scaled_by", 1.0) * factor)
        direction: Array = self.direction.astype(np.float64) * factor
        return SteeringVector(
            direction, self.layer, position=self.position, method=self.method, meta=meta
        )

    def __neg__(self) -> SteeringVector:
        return self._scaled(-1.0)

    def __mul__(self, factor: object) -> SteeringVector:
        return self._scaled(factor) if _is_real(factor) else NotImplemented

    __rmul__ = __mul__
    #: NumPy scalars on the left (`np.float32(2) * v`) call __rmul__ instead of iterating over the
    #: vector.
    __array_ufunc__ = None

    def __truediv__(self, factor: object) -> SteeringVector:
        if not _is_real(factor):
            return NotImplemented
        if factor == 0:
            raise ValueError("a steering vector cannot be divided by 0")
        return self._scaled(1.0 / float(factor))

    def with_norm(self, norm: float) -> SteeringVector:
        """The same direction with another length. Raises ValueError for a zero vector,
        which has no direction.
        """
        if self.norm == 0:
            raise ValueError("a zero vector has no direction: it cannot be given another norm")
        return self._scaled(float(norm) / self.norm)

    def cosine(self, other: SteeringVector | Array) -> float:
        """Cosine of the angle to another vector (a SteeringVector or numbers [D]), in
        float64, from -1 to 1.

        Raises ValueError for another width and where one of the two is zero.
        """
        theirs = (
            other.direction if isinstance(other, SteeringVector) else np.asarray(as_numpy(other))
        )
        if theirs.shape != self.direction.shape:
            raise ValueError(
                f"cosine needs two vectors of one width: this one has {self.width}, the other has"
                f" shape {theirs.shape}"
            )
        a, b = self.direction.astype(np.float64), theirs.astype(np.float64)
        lengths = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
        if not lengths > 0 or not math.isfinite(lengths):
            raise ValueError("cosine with a zero (or not finite) vector is undefined")
        return float(np.clip(a @ b / lengths, -1.0, 1.0))

    # -- files -------------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Writes to `.safetensors`, `.npz` (no pickle) or `.gguf` (a control vector for llama.cpp),
        by the name's ending; an existing file is replaced whole.

        GGUF's `direction.N` is added to the output of block N, so resid_pre of layer l is written
        as `direction.{l-1}`.
        Raises ValueError for another ending, a zero vector, and for GGUF below layer 2
        (`direction.0` does not exist).
        """
        vector_files.save(self, path)

    @classmethod
    def load(
        cls, path: PathLike, layer: int | None = None, model: Model | Config | None = None
    ) -> SteeringVector:
        """Reads what `save` or another program wrote.

        Files of other programs hold one direction for each layer: GGUF control vectors, and npz and
        safetensors whose entries are called "direction.N" or "N"; N is added to the output of block
        N and is loaded as layer N + 1.
        layer: which one, where a file holds several (`list` names them). model: what
        the vector has to fit (`check`). Raises ValueError where several layers are in the file and
        none is named, or the named one is not there (both list them); vs.ModelError where the file
        is damaged or not a steering vector; OSError where it cannot be read.
        """
        direction, at, position, method, meta = vector_files.load(path, layer)
        try:
            vector = cls(direction, at, position=position, method=method, meta=meta)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None
        if vector.norm == 0:
            raise ModelError(f"{path}: the direction is zero: it steers nothing")
        if model is not None:
            vector.check(model)
        return vector

    @staticmethod
    def list(path: PathLike) -> builtins.list[int]:
        """The layers for which a file holds directions, ascending, as `load` takes them.

        Layer l is the input of block l; the number of a model's layers is the output of its last
        block. Raises as `load`.
        """
        return vector_files.layers(path)

    def check(self, model: Model | Config, *, output: bool = True) -> None:
        """Raises ValueError where this vector cannot steer `model`: another width, or a layer that
        the model does not have.

        output: whether a vector for the output of the last block may pass; no layer is left behind
        it whose computation could be studied. Warns where the vector was made from another model of
        the same width.
        """
        config: Any = getattr(model, "config", model)
        if self.width != config.d_model:
            raise ValueError(
                f"the vector has width {self.width}, the model {config.d_model}: it belongs to"
                " another model"
            )
        if self.layer == config.n_layers and not output:
            raise ValueError(
                f"the vector steers the output of the last block (layer {self.layer}): no layer"
                " computes anything from it. It can be used in run and generate; this call needs"
                f" one of the layers 0 to {config.n_layers - 1}"
            )
        if self.layer > config.n_layers:
            raise ValueError(
                f"the vector steers layer {self.layer}, the model has layers 0 to"
                f" {config.n_layers - 1} (and {config.n_layers}, the output of the last block)"
            )
        made_with, mine = self.meta.get("model_hash"), fingerprint(model)
        if made_with and mine and made_with != mine:
            warnings.warn(
                f"this vector was made from another model ({self.meta.get('model', 'unnamed')},"
                f" {made_with[:12]}; this one is {mine[:12]})",
                stacklevel=2,
            )


def _is_real(value: object) -> TypeGuard[float]:
    """A real number, finite or not; booleans are none."""
    kinds = (int, float, np.integer, np.floating)
    return isinstance(value, kinds) and not isinstance(value, (bool, np.bool_))


def _rebuild(
    direction: Float32Array,
    layer: int,
    position: int | None,
    method: str,
    meta: Mapping[str, Any],
) -> SteeringVector:
    return SteeringVector(direction, layer, position=position, method=method, meta=meta)
