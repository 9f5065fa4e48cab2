"""Sparse steering vectors: some dimensions are set to zero and the rest is rescaled to the norm of
the whole vector (docs/method.md section 8).

The dimensions are chosen by the gradient of the metric, by the effect of each dimension, by
magnitude, or at random. `sweep` compares the four methods.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.arrays import as_numpy
from ..base.checks import is_number, require_int
from ..base.provenance import digest
from ..base.types import Array, BoolArray, Float64Array
from ..inputs.vectors import SteeringVector

if TYPE_CHECKING:
    from ..patching.edge_scores import EdgeScores


class SparseVector(SteeringVector):
    """A steering vector with some dimensions set to zero, rescaled to the norm that it had before.

    kept: bool [D], read-only: the dimensions that were not set to zero. Multiplication by a number
    keeps it. A file holds only the direction; `kept_of` then takes the dimensions that are not 0.
    """

    kept: BoolArray

    def __init__(
        self,
        direction: Array,
        layer: int,
        *,
        kept: npt.ArrayLike | None = None,
        position: int | None = None,
        method: str = "",
        meta: Mapping[str, Any] | None = None,
    ):
        super().__init__(direction, layer, position=position, method=method, meta=dict(meta or {}))
        mask = np.array(self.direction != 0 if kept is None else kept, dtype=np.bool_)
        if mask.shape != self.direction.shape or self.direction[~mask].any():
            raise ValueError(
                f"kept must be bool [{self.width}], False only where the direction is 0"
            )
        mask.flags.writeable = False
        object.__setattr__(self, "kept", mask)  # the base class is a frozen dataclass

    @property
    def sparsity(self) -> float:
        """The share of dimensions that were set to zero."""
        return float(1.0 - self.kept.mean())

    def __repr__(self) -> str:
        return (
            f"SparseVector({int(self.kept.sum())} of {self.width} dimensions, layer={self.layer},"
            f" norm={self.norm:.4g})"
        )

    def __reduce__(self) -> tuple[Callable[..., SparseVector], tuple[Any, ...]]:
        return _rebuild, (
            np.array(self.direction),
            self.layer,
            np.array(self.kept),
            self.position,
            self.method,
            dict(self.meta),
        )

    def _scaled(self, factor: float) -> SparseVector:
        scaled = super()._scaled(factor)
        return SparseVector(
            scaled.direction,
            self.layer,
            kept=self.kept,
            position=self.position,
            method=self.method,
            meta=scaled.meta,
        )


def _rebuild(
    direction: Array,
    layer: int,
    kept: BoolArray,
    position: int | None,
    method: str,
    meta: dict[str, Any],
) -> SparseVector:
    """What pickle and copy call."""
    return SparseVector(direction, layer, kept=kept, position=position, method=method, meta=meta)


def _check(vector: SteeringVector) -> SteeringVector:
    if not isinstance(vector, SteeringVector):
        raise ValueError(f"vector must be a SteeringVector, not {type(vector).__name__}")
    if vector.norm == 0:
        raise ValueError("the vector is zero: there is nothing to keep")
    return vector


def _with(vector: SteeringVector, kept: BoolArray, how: dict[str, Any]) -> SparseVector:
    """`vector` with the dimensions outside `kept` set to zero, rescaled to the norm of `vector`."""
    direction = np.where(kept, vector.direction.astype(np.float64), 0.0)
    left = np.linalg.norm(direction)
    if not left > 0:
        raise ValueError(f"{how}: no dimension of the vector that is not 0 is left: keep more")
    meta = dict(
        vector.meta, sparsified={**how, "n_kept": int(kept.sum()), "of": digest(vector.direction)}
    )
    return SparseVector(
        direction * (vector.norm / left),
        vector.layer,
        kept=kept,
        position=vector.position,
        method=vector.method,
        meta=meta,
    )


def effects(vector: SteeringVector, scores: EdgeScores | npt.ArrayLike) -> Float64Array:
    """The effect IE of each dimension, float64 [D]: the row of the steering node in `scores.dims`,
    where `scores` is a result of `patching.attribute`, or numbers [D].

    Raises ValueError for scores without dimensions or of another width, and for numbers that are
    not finite or all zero. Warns if the scores were made with another vector.
    """
    given = getattr(scores, "dims", scores)
    if given is None:
        raise ValueError(
            "these scores hold no dimensions: make them with attribute(..., dims='steer')"
        )
    try:
        dims: Float64Array = np.asarray(as_numpy(given), dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"scores must be a result of attribute() or numbers [D]: {error}"
        ) from None
    if dims.ndim == 2 and len(dims) > 1:
        names = getattr(scores, "node_names", None)
        if not names or "steer" not in names:
            raise ValueError(
                f"scores of {len(dims)} nodes do not say which is the steering node: give its row,"
                f" numbers [{vector.width}]"
            )
        dims = dims[list(names).index("steer")]
    if dims.ndim == 2 and len(dims) == 1:
        dims = dims[0]
    if dims.shape != (vector.width,):
        raise ValueError(
            f"scores of shape {list(dims.shape)} for a vector of width {vector.width}: they belong"
            " to another model"
        )
    if not np.isfinite(dims).all():
        raise ValueError(
            f"scores must be finite: {int((~np.isfinite(dims)).sum())} of {dims.size} are not"
        )
    if not dims.any():
        raise ValueError("all scores are zero: no dimension has an effect to go by")
    made_for = (getattr(scores, "provenance", None) or {}).get("vector_hash")
    if made_for not in (None, digest(vector.direction)):
        warnings.warn(
            "the scores were made with another steering vector than the one that is sparsified",
            stacklevel=3,
        )
    return dims


def gradient_ratio(vector: SteeringVector, scores: EdgeScores | npt.ArrayLike) -> Float64Array:
    """|r_i| = (|IE_i| / |IE|) / (|s_i| / |s|), float64 [D]: inf where only s_i is 0, NaN where both
    s_i and IE_i are 0.
    """
    dims, s = effects(_check(vector), scores), np.abs(vector.direction.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Float64Array = np.abs(dims) / np.linalg.norm(dims) / (s / np.linalg.norm(s))
    return ratio


def by_gradient(
    vector: SteeringVector, scores: EdgeScores | npt.ArrayLike, tau: float
) -> SparseVector:
    """Keeps the dimensions with |IE_i| / |IE| >= tau |s_i| / |s|. IE_i / s_i is the gradient of the
    metric, summed over positions.

    scores: a result of attribute(), or the effect of each dimension, numbers [D]. tau: 0 or more;
    0 keeps all. Raises ValueError for a tau that is negative or not finite, or so large that no
    dimension is left.
    """
    dims, s = effects(_check(vector), scores), np.abs(vector.direction.astype(np.float64))
    if not is_number(tau) or tau < 0:
        raise ValueError(f"tau must be a finite number from 0 on, not {tau!r}")
    kept = np.abs(dims) / np.linalg.norm(dims) >= float(tau) * (s / np.linalg.norm(s))
    if not (kept & (s > 0)).any():
        raise ValueError(
            f"tau={tau!r} keeps no dimension: the largest |r_i| is"
            f" {np.nanmax(np.where(s > 0, gradient_ratio(vector, scores), 0)):.4g}"
        )
    return _with(vector, kept, {"by": "gradient", "tau": float(tau)})


def _k(k: int, vector: SteeringVector) -> int:
    """The number of dimensions to set to zero, checked."""
    k = require_int(k, "k", 0)
    if k >= vector.width:
        raise ValueError(
            f"k={k}: of {vector.width} dimensions at most {vector.width - 1} can be set to zero"
        )
    return k


def _without_smallest(sizes: Array, k: int) -> BoolArray:
    """Bool [D]: all but the k smallest. The stable sort drops the lower index first among ties."""
    kept = np.ones(sizes.size, np.bool_)
    kept[np.argsort(sizes, kind="stable")[:k]] = False
    return kept


def by_effect(vector: SteeringVector, scores: EdgeScores | npt.ArrayLike, k: int) -> SparseVector:
    """Sets the k dimensions of smallest |IE_i| to zero, the lower index first among ties.

    scores: as in `by_gradient`. k: 0 to D - 1. Raises ValueError as `by_gradient` does.
    """
    dims = np.abs(effects(_check(vector), scores))
    return _with(vector, _without_smallest(dims, _k(k, vector)), {"by": "effect", "k": int(k)})


def by_magnitude(vector: SteeringVector, k: int) -> SparseVector:
    """Sets the k dimensions of smallest |s_i| to zero, the lower index first among ties.

    k: 0 to D - 1. Raises ValueError where no dimension that is not 0 is left.
    """
    return _with(
        _check(vector),
        _without_smallest(np.abs(vector.direction), _k(k, vector)),
        {"by": "magnitude", "k": int(k)},
    )


def by_random(vector: SteeringVector, k: int, seed: int) -> SparseVector:
    """Sets k dimensions drawn at random to zero; the same seed draws the same dimensions.

    k: 0 to D - 1. Raises ValueError where no dimension that is not 0 is left.
    """
    kept = np.ones(_check(vector).width, np.bool_)
    order = np.random.default_rng(require_int(seed, "seed", 0)).permutation(vector.width)
    kept[order[: _k(k, vector)]] = False
    return _with(vector, kept, {"by": "random", "k": int(k), "seed": int(seed)})


# -- which dimensions two vectors share ------------------------------------------------------------


def kept_of(vector: SteeringVector | npt.ArrayLike) -> BoolArray:
    """Bool [D]: the kept dimensions of a SparseVector, or the dimensions of another SteeringVector
    or of an array [D] that are not 0. Raises ValueError for anything else.
    """
    if isinstance(vector, SparseVector):
        return vector.kept
    if isinstance(vector, SteeringVector):
        return np.asarray(vector.direction != 0)
    mask = np.asarray(as_numpy(vector))
    if mask.ndim != 1 or not mask.size or mask.dtype.kind not in "buif":
        raise ValueError(f"kept dimensions are a SteeringVector or a mask [D], not {vector!r}")
    return np.asarray(mask != 0)


def _both(
    a: SteeringVector | npt.ArrayLike, b: SteeringVector | npt.ArrayLike
) -> tuple[BoolArray, BoolArray]:
    """The kept dimensions of both, of one width."""
    kept_a, kept_b = kept_of(a), kept_of(b)
    if kept_a.shape != kept_b.shape:
        raise ValueError(
            f"kept dimensions of vectors of different widths, {kept_a.size} and {kept_b.size},"
            " cannot be compared"
        )
    return kept_a, kept_b


def iou(a: SteeringVector | npt.ArrayLike, b: SteeringVector | npt.ArrayLike) -> float:
    """Intersection over union of the kept dimensions. a, b: SteeringVectors or masks [D].

    Raises ValueError for different widths, and where neither keeps a dimension.
    """
    kept_a, kept_b = _both(a, b)
    if not (kept_a | kept_b).any():
        raise ValueError("neither keeps a dimension: their overlap is undefined")
    return float((kept_a & kept_b).sum() / (kept_a | kept_b).sum())


def overlap_test(
    a: SteeringVector | npt.ArrayLike, b: SteeringVector | npt.ArrayLike, *, log: bool = False
) -> float:
    """The one-sided hypergeometric test (docs/method.md section 8): the probability of at least as
    many shared dimensions if both sets were drawn independently at random.

    It is P(X >= shared) with X ~ hypergeometric(D, kept by a, kept by b); a small value says that
    the two share more than chance. log: return the natural logarithm, for probabilities that are 0
    in float64. Raises ValueError for different widths.
    """
    kept_a, kept_b = _both(a, b)
    shared = int((kept_a & kept_b).sum())
    value = log_tail(shared, kept_a.size, int(kept_a.sum()), int(kept_b.sum()))
    return value if log else math.exp(value)


def log_tail(x: int, total: int, marked: int, drawn: int) -> float:
    """Log P(X >= x), where X counts the marked ones among `drawn` (n) drawn out of `total` (N) of
    which `marked` (K) are marked: the log of sum over i of C(K, i) C(N - K, n - i) / C(N, n).

    Above the mean the tail itself is summed, below it the complement, so that few terms are added.
    The relative error is about 1e-11 on either side. Raises ValueError for counts out of range.
    """
    least, most = max(0, marked + drawn - total), min(marked, drawn)
    if not 0 <= marked <= total or not 0 <= drawn <= total:
        raise ValueError(
            f"{marked} marked and {drawn} drawn out of {total} is no hypergeometric case"
        )
    if x <= least:
        return 0.0
    if x > most:
        return -math.inf

    def log_sum(counts: range) -> float:
        terms = [
            _log_choose(marked, i)
            + _log_choose(total - marked, drawn - i)
            - _log_choose(total, drawn)
            for i in counts
        ]
        top = max(terms)
        return top + math.log(math.fsum(math.exp(t - top) for t in terms))

    if x > drawn * marked / total:
        return min(0.0, log_sum(range(x, most + 1)))
    below = log_sum(range(least, x))
    return math.log1p(-math.exp(below)) if below < 0 else log_sum(range(x, most + 1))


def _log_choose(n: int, k: int) -> float:
    """The natural logarithm of the binomial coefficient."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
