"""A sparse autoencoder as arrays: what it computes, and where in the model it belongs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.arrays import as_float32
from ..base.checks import is_number, require_int
from ..base.types import Array, Float32Array
from ..inputs.vectors import SteeringVector

if TYPE_CHECKING:
    from ..runtime.model import Model

KINDS = ("jumprelu", "relu", "topk", "batchtopk", "gated")
#: Bytes of intermediate results of `encode` and `decode`.
TILE_BYTES = 32 << 20
_SITE = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.((?:attn\.|mlp\.|ln[12]\.)?hook_\w+)", re.ASCII)


class SAE:
    """A sparse autoencoder of activations of width D with F features.

    W_enc: [D, F]. b_enc: [F]; for kind "gated" the bias of the gate. W_dec: [F, D]. b_dec: [D].
    kind, with u = h W_enc + b_enc (float32; threshold, k, r_mag and b_mag only where named):

    - "jumprelu": z = u where u > threshold, else 0, with no ReLU besides (Rajamanoharan et al.,
      "Jumping Ahead", 2024, as Gemma Scope stores it). threshold: [F], or one number for all;
      infinite ones are allowed.
    - "batchtopk": the same; its one threshold is what training measured (Bussmann et al., 2024).
    - "relu": z = max(u, 0).
    - "topk": the k largest u of a token, negative ones as 0 (Gao et al., 2024).
    - "gated": z = max(h W_enc exp(r_mag) + b_mag, 0) where u > 0 (Rajamanoharan et al., "Improving
      Dictionary Learning with Gated Sparse Autoencoders", 2024). r_mag, b_mag: [F].

    site: what it encodes, for example "blocks.12.hook_resid_post"; None where that is not known.
    subtract_b_dec: h - b_dec is encoded instead of h. meta: provenance, any JSON object.

    Raises ValueError, naming the array, for shapes that do not fit together, values that are not
    finite, an unknown kind, and what a kind needs or does not know.
    """

    def __init__(
        self,
        W_enc: npt.ArrayLike,
        b_enc: npt.ArrayLike,
        W_dec: npt.ArrayLike,
        b_dec: npt.ArrayLike,
        threshold: npt.ArrayLike | None = None,
        kind: str = "jumprelu",
        site: str | None = None,
        subtract_b_dec: bool = False,
        *,
        k: int | None = None,
        r_mag: npt.ArrayLike | None = None,
        b_mag: npt.ArrayLike | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not known: use one of {', '.join(KINDS)}")
        self.kind, self.subtract_b_dec = kind, bool(subtract_b_dec)
        self.site = None if site is None else _checked_site(site)
        self.meta: dict[str, Any] = json.loads(json.dumps(dict(meta or {})))
        self.W_enc = _array(W_enc, "W_enc", (None, None), "[D, F]")
        d, f = self.W_enc.shape
        self.W_dec = _array(W_dec, "W_dec", (f, d), "[F, D] as W_enc is [D, F]")
        self.b_enc = _array(b_enc, "b_enc", (f,), "[F] as W_enc is [D, F]")
        self.b_dec = _array(b_dec, "b_dec", (d,), "[D] as W_enc is [D, F]")
        jump = kind in ("jumprelu", "batchtopk")
        self.threshold = _of_kind(kind, "threshold", threshold, jump, f)
        self.r_mag = _of_kind(kind, "r_mag", r_mag, kind == "gated", f)
        self.b_mag = _of_kind(kind, "b_mag", b_mag, kind == "gated", f)
        if (k is not None) != (kind == "topk"):
            raise ValueError(f"k={k!r}: kind 'topk' needs k, and the other kinds have none")
        self.k = None if k is None else require_int(k, "k", 1)
        if self.k is not None and self.k > f:
            raise ValueError(f"k={k}: the autoencoder has {f} features")

    @property
    def width(self) -> int:
        """D, the width of what it encodes."""
        return int(self.W_enc.shape[0])

    @property
    def n_features(self) -> int:
        """F."""
        return int(self.W_enc.shape[1])

    def __repr__(self) -> str:
        return (
            f"SAE({self.kind}, width={self.width}, features={self.n_features}, site={self.site!r})"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the arrays and of what decides their meaning."""
        made = hashlib.sha256(
            json.dumps([self.kind, self.site, self.subtract_b_dec, self.k]).encode()
        )
        for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag"):
            array = getattr(self, name)
            made.update(name.encode() + (b"" if array is None else array.tobytes()))
        return made.hexdigest()

    # -- what it computes --------------------------------------------------------------------------

    def encode(self, h: npt.ArrayLike) -> Float32Array:
        """The features of activations h [..., D]: float32 [..., F], on the CPU, a tile of rows at
        a time.

        Raises ValueError for another width. The whole result is returned: `features` and
        `target_atoms` encode long texts on the device and never hold it.
        """
        rows, shape = _rows(h, self.width, "h")
        out = np.zeros((len(rows), self.n_features), np.float32)
        step = max(1, TILE_BYTES // (4 * self.n_features))
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            out[some] = self._activations(self._inputs(rows[some]) @ self.W_enc)
        return out.reshape(*shape, self.n_features)

    def decode(self, z: npt.ArrayLike) -> Float32Array:
        """The reconstruction z W_dec + b_dec of features z [..., F]: float32 [..., D], on the CPU.
        Raises ValueError for another number of features.
        """
        rows, shape = _rows(z, self.n_features, "z")
        out: Float32Array = rows @ self.W_dec + self.b_dec
        return out.reshape(*shape, self.width)

    def _inputs(self, h: Float32Array) -> Float32Array:
        """What is multiplied by W_enc: h, or h - b_dec."""
        return np.ascontiguousarray(h - self.b_dec if self.subtract_b_dec else h, np.float32)

    def _activations(self, product: Array) -> Array:
        """The features of inputs times W_enc, without bias."""
        u = product + self.b_enc
        if self.threshold is not None:
            return np.where(u > self.threshold, u, np.float32(0))
        if self.kind == "relu":
            return np.maximum(u, 0)
        if self.r_mag is not None and self.b_mag is not None:
            magnitude = np.maximum(product * np.exp(self.r_mag) + self.b_mag, 0)
            return np.where(u > 0, magnitude, np.float32(0))
        # of equal values the lower index counts, as on the device
        order = np.argsort(-u, axis=1, kind="stable")[:, : self.k]
        z: Array = np.zeros_like(u)
        np.put_along_axis(z, order, np.maximum(np.take_along_axis(u, order, 1), 0), 1)
        return z

    # -- where it belongs --------------------------------------------------------------------------

    def check(self, model: Model) -> str:
        """The site that it encodes in this model.

        Raises ValueError where the autoencoder names none, where the model has no such site, and
        for another width or a site with heads.
        """
        if self.site is None:
            raise ValueError(
                "this autoencoder does not say what it encodes: name it, for example"
                " load(path, site='blocks.12.hook_resid_post')"
            )
        c = model.config
        if self.width != c.d_model:
            raise ValueError(
                f"the autoencoder encodes activations of width {self.width}, the model has width"
                f" {c.d_model}: it belongs to another model"
            )
        if self.site not in model.sites:
            raise ValueError(
                f"the autoencoder belongs to {self.site}, which this model of {c.n_layers} layers"
                " does not have: is it of another model?"
            )
        site = model._sites.by_name[self.site]
        if site.has_heads or site.width != self.width:
            raise ValueError(
                f"the autoencoder belongs to {self.site}, {model.sites[self.site]}: sites of the"
                " model's width without heads can be encoded"
            )
        return self.site

    @property
    def layer(self) -> int:
        """The layer whose input the site is, as a SteeringVector's: l for resid_pre of block l,
        l + 1 for its resid_post. Raises ValueError for other sites, which no vector steers.
        """
        match = _SITE.fullmatch(self.site or "")
        if match is None or match[2] not in ("hook_resid_pre", "hook_resid_post"):
            raise ValueError(
                "a vector steers the residual stream between blocks (hook_resid_pre or"
                f" hook_resid_post), and this autoencoder belongs to {self.site}"
            )
        return int(match[1]) + (match[2] == "hook_resid_post")

    def vector(self, feature: int, norm: float | None = None) -> SteeringVector:
        """The decoder's direction of one feature as a SteeringVector, which steers by it.

        feature: 0 to F - 1. norm: its length (default: as in W_dec). Raises ValueError for a
        feature that there is not, a norm that is not positive, and a site that no vector steers.
        """
        feature = require_int(feature, "feature", 0)
        if feature >= self.n_features:
            raise ValueError(f"feature {feature}: the autoencoder has {self.n_features}")
        if norm is not None and (not is_number(norm) or norm <= 0):
            raise ValueError(f"norm must be a positive number, not {norm!r}")
        meta = {"feature": feature, "sae_hash": self.fingerprint, "site": self.site}
        made = SteeringVector(self.W_dec[feature], self.layer, method="sae feature", meta=meta)
        return made if norm is None else made.with_norm(norm)


def _checked_site(site: Any) -> str:
    if not isinstance(site, str) or not _SITE.fullmatch(site):
        raise ValueError(
            f"site={site!r} is no site of a block: write, for example, 'blocks.12.hook_resid_post'"
        )
    return site


def _array(
    values: npt.ArrayLike, name: str, shape: tuple[int | None, ...], meaning: str
) -> Float32Array:
    array = np.array(as_float32(values), order="C")
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape))
    if not fits or not array.size:
        expected = "" if None in shape else f" = {list(shape)}"
        raise ValueError(f"{name} must be {meaning}{expected}, not {list(array.shape)}")
    bad = np.isnan(array) if name == "threshold" else ~np.isfinite(array)
    if bad.any():
        raise ValueError(f"{name} holds {int(bad.sum())} values that are not finite")
    array.flags.writeable = False
    return array


def _of_kind(
    kind: str, name: str, values: npt.ArrayLike | None, needed: bool, f: int
) -> Float32Array | None:
    if (values is not None) != needed:
        raise ValueError(
            f"kind {kind!r} {'needs' if needed else 'has no'} {name}"
            + ("" if needed else ": leave it out, or name the kind that has one")
        )
    if values is None:
        return None
    if np.ndim(values) == 0 or (name == "threshold" and np.shape(values) == (1,)):
        values = np.full(f, np.float32(np.reshape(np.asarray(values), ())), np.float32)
    return _array(values, name, (f,), "[F] as W_enc is [D, F]")


def _rows(values: npt.ArrayLike, width: int, name: str) -> tuple[Float32Array, tuple[int, ...]]:
    """([rows, width] float32, the leading axes)."""
    array = as_float32(values)
    if array.ndim == 0 or array.shape[-1] != width:
        raise ValueError(f"{name} must end in an axis of {width}, not {list(array.shape)}")
    return np.ascontiguousarray(array.reshape(-1, width)), array.shape[:-1]
