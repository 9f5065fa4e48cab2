"""Fewer dimensions, the same norm: which dimensions of a steering vector carry its effect
(method.md section 8).

Four ways to choose what is set to zero: by the gradient of the metric, by the effect of each
dimension, by magnitude, at random. `sweep` runs them all.
"""

from __future__ import annotations

import math
import warnings

import numpy as np

from ..base.checks import require_int
from ..base.provenance import digest
from ..inputs.vectors import SteeringVector


class SparseVector(SteeringVector):
    """A steering vector of which some dimensions were set to zero, rescaled to the norm it had.

    kept: bool [D], read-only: the dimensions that were not set to zero. sparsity: share that
    was. Algebra keeps both; a file keeps the direction, and `kept_of` finds them again as
    those that are not 0.
    """

    def __init__(self, direction, layer, *, kept=None, position=None, method="", meta=None):
        super().__init__(direction, layer, position=position, method=method, meta=meta or {})
        kept = self.direction != 0 if kept is None else np.array(kept, dtype=bool)
        if kept.shape != self.direction.shape or self.direction[~kept].any():
            raise ValueError(
                f"kept must be bool [{self.width}], False only where the direction is 0"
            )
        kept.flags.writeable = False
        object.__setattr__(self, "kept", kept)

    @property
    def sparsity(self) -> float:
        return float(1.0 - self.kept.mean())

    def __repr__(self):
        return (
            f"SparseVector({int(self.kept.sum())} of {self.width} dimensions, layer={self.layer},"
            f" norm={self.norm:.4g})"
        )

    def __reduce__(self):
        return _rebuild, (
            np.array(self.direction),
            self.layer,
            np.array(self.kept),
            self.position,
            self.method,
            dict(self.meta),
        )

    def _scaled(self, factor):
        scaled = super()._scaled(factor)
        return SparseVector(
            scaled.direction,
            self.layer,
            kept=self.kept,
            position=self.position,
            method=self.method,
            meta=scaled.meta,
        )


def _rebuild(direction, layer, kept, position, method, meta):
    return SparseVector(direction, layer, kept=kept, position=position, method=method, meta=meta)


def _check(vector) -> SteeringVector:
    if not isinstance(vector, SteeringVector):
        raise ValueError(f"vector must be a SteeringVector, not {type(vector).__name__}")
    if vector.norm == 0:
        raise ValueError("the vector is zero: there is nothing to keep")
    return vector


def _with(vector: SteeringVector, kept: np.ndarray, how: dict) -> SparseVector:
    """`vector` on `kept`, rescaled to its norm."""
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


def effects(vector: SteeringVector, scores) -> np.ndarray:
    """The effect of each dimension, float64 [D]: `scores.dims` of the steering node (a result of
    `patching.attribute`), or numbers [D].

    Raises ValueError for scores without dimensions, another width, numbers that are
    not finite or all zero.
    """
    dims = getattr(scores, "dims", scores)
    if dims is None:
        raise ValueError(
            "these scores hold no dimensions: make them with attribute(..., dims='steer')"
        )
    try:
        dims = np.asarray(dims, dtype=np.float64)
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


def gradient_ratio(vector, scores) -> np.ndarray:
    """|r_i| = (|IE_i| / |IE|) / (|s_i| / |s|), float64 [D]; inf where s_i is 0 and IE_i is
    not, NaN where both are.
    """
    dims, s = effects(_check(vector), scores), np.abs(vector.direction.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.abs(dims) / np.linalg.norm(dims) / (s / np.linalg.norm(s))


def by_gradient(vector, scores, tau: float) -> SparseVector:
    """Keeps the dimensions with |IE_i| / |IE| >= tau |s_i| / |s|, where IE / s is the gradient
    summed over positions (sign ignored).

    scores: a result of attribute(), or the effect of each dimension, numbers [D]. tau: from
    0 (keeps all) on. Raises ValueError for tau that is negative or not finite, or so large
    that nothing is left.
    """
    dims, s = effects(_check(vector), scores), np.abs(vector.direction.astype(np.float64))
    if (
        isinstance(tau, (bool, np.bool_))
        or not isinstance(tau, (int, float, np.integer, np.floating))
        or not math.isfinite(tau)
        or tau < 0
    ):
        raise ValueError(f"tau must be a finite number from 0 on, not {tau!r}")
    kept = np.abs(dims) / np.linalg.norm(dims) >= float(tau) * (s / np.linalg.norm(s))
    if not (kept & (s > 0)).any():
        raise ValueError(
            f"tau={tau!r} keeps no dimension: the largest |r_i| is"
            f" {np.nanmax(np.where(s > 0, gradient_ratio(vector, scores), 0)):.4g}"
        )
    return _with(vector, kept, {"by": "gradient", "tau": float(tau)})


def _k(k, vector: SteeringVector) -> int:
    k = require_int(k, "k", 0)
    if k >= vector.width:
        raise ValueError(
            f"k={k}: of {vector.width} dimensions at most {vector.width - 1} can be set to zero"
        )
    return k


def _without_smallest(sizes: np.ndarray, k: int) -> np.ndarray:
    kept = np.ones(sizes.size, bool)
    kept[np.argsort(sizes, kind="stable")[:k]] = False  # equal ones by index: the lower goes first
    return kept


def by_effect(vector, scores, k: int) -> SparseVector:
    """Sets the k dimensions of smallest |IE_i| to zero, ties by index. scores: as in
    `by_gradient`. k: 0 to D - 1.
    """
    dims = np.abs(effects(_check(vector), scores))
    return _with(vector, _without_smallest(dims, _k(k, vector)), {"by": "effect", "k": int(k)})


def by_magnitude(vector, k: int) -> SparseVector:
    """Sets the k dimensions of smallest |s_i| to zero, ties by index. k: 0 to D - 1."""
    return _with(
        _check(vector),
        _without_smallest(np.abs(vector.direction), _k(k, vector)),
        {"by": "magnitude", "k": int(k)},
    )


def by_random(vector, k: int, seed: int) -> SparseVector:
    """Sets k dimensions drawn at random to zero; the same for the same seed. k: 0 to D - 1."""
    kept = np.ones(_check(vector).width, bool)
    kept[
        np.random.default_rng(require_int(seed, "seed", 0)).permutation(vector.width)[
            : _k(k, vector)
        ]
    ] = False
    return _with(vector, kept, {"by": "random", "k": int(k), "seed": int(seed)})


# -- which dimensions two vectors share ------------------------------------------------------------


def kept_of(vector) -> np.ndarray:
    """Bool [D]: the kept dimensions of a sparse vector; of another SteeringVector those that are
    not 0; of numbers True or not 0. ValueError else.
    """
    if isinstance(vector, SteeringVector):
        return getattr(vector, "kept", vector.direction != 0)
    mask = np.asarray(vector)
    if mask.ndim != 1 or not mask.size or mask.dtype.kind not in "buif":
        raise ValueError(f"kept dimensions are a SteeringVector or a mask [D], not {vector!r}")
    return mask != 0


def _both(a, b) -> tuple[np.ndarray, np.ndarray]:
    a, b = kept_of(a), kept_of(b)
    if a.shape != b.shape:
        raise ValueError(
            f"kept dimensions of vectors of different widths, {a.size} and {b.size}, cannot be"
            " compared"
        )
    return a, b


def iou(a, b) -> float:
    """Kept by both over kept by either. a, b: SteeringVectors or masks [D]. Raises ValueError for
    different widths and where neither keeps any.
    """
    a, b = _both(a, b)
    if not (a | b).any():
        raise ValueError("neither keeps a dimension: their overlap is undefined")
    return float((a & b).sum() / (a | b).sum())


def overlap_test(a, b, *, log: bool = False) -> float:
    """P(X >= shared) if as many dimensions were drawn independently at random: the one-sided
    hypergeometric test (method.md section 8).

    X ~ hypergeometric(D, kept by a, kept by b). Small: the two share more than chance.
    log: its natural logarithm, where the number itself is 0 in float64. Raises ValueError
    for different widths.
    """
    a, b = _both(a, b)
    value = log_tail(int((a & b).sum()), a.size, int(a.sum()), int(b.sum()))
    return value if log else math.exp(value)


def log_tail(x: int, total: int, marked: int, drawn: int) -> float:
    """Log P(X >= x), X the marked among `drawn` out of `total` of which `marked` are: sum_i C(K, i)
    C(N - K, n - i) / C(N, n), in logarithms.

    The shorter side is summed: beyond the mean the tail itself, below it what is missing to 1.
    Relative error of either side about 1e-11.
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
    choose = lambda n, k: math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    log_term = lambda i: (
        choose(marked, i) + choose(total - marked, drawn - i) - choose(total, drawn)
    )

    def log_sum(terms):
        top = max(terms)
        return top + math.log(math.fsum(math.exp(t - top) for t in terms))

    if x > drawn * marked / total:
        return min(0.0, log_sum([log_term(i) for i in range(x, most + 1)]))
    below = log_sum([log_term(i) for i in range(least, x)])
    return (
        math.log1p(-math.exp(below))
        if below < 0
        else log_sum([log_term(i) for i in range(x, most + 1)])
    )
