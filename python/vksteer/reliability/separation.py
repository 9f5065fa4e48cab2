"""Quantities of two classes of activations that predict how reliably their difference in means
steers. NumPy only, in float64.

Source: Braun, "Reliability of steering vectors" (arXiv 2602.17881 and 2505.22637) and its code,
whose names are kept. What differs from that code is said at each quantity.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base.checks import require_int
from ..base.types import Array, Float64Array

#: Stability of the vector: so many samples in a draw, so many draws.
DRAWN, DRAWS = 25, 100
NO_VARIANCE = "d_prime is infinite: no variance within the classes"


def predictors(
    a_pos: Array,
    a_neg: Array,
    *,
    leave_one_out: bool = False,
    bins: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """The predictors of one set of activation pairs.

    a_pos, a_neg: [n, D], row i of both from the same question with the matching and the
    non-matching answer. d_i = a_pos[i] - a_neg[i], v = mean d_i, and kappa(a) =
    2 <a - midpoint of the class means, v> / |v|^2, so that the class means lie at +1 and -1.
    Returns a dictionary of floats, unless said otherwise:
    mean_cosine: mean of cos(d_i, v). v contains d_i, as in the paper; leave_one_out=True takes the
    mean of the others instead.
    pairwise_cosine: mean of cos(d_i, d_k) over pairs i < k.
    d_prime: (mean kappa_pos - mean kappa_neg) / sqrt((var kappa_pos + var kappa_neg) / 2) with
    population variances; inf where both variances are 0, which `flags` says.
    overlap: shared area of the two histograms of kappa, with `bins` bins over their common range;
    1 for equal samples, 0 for separate ones.
    auc: area under the ROC curve of kappa as a score; ties count one half.
    norm_ratio: |v| / mean |d_i|.
    stability_mean, stability_sd: cosines of v with the mean of 25 samples, over 100 draws without
    replacement (fewer than 25 samples: n draws with replacement); `seed` starts the draws.
    n: int, samples. n_undefined: int, samples with d_i = 0, which have no cosine and are left out
    of the cosines. flags: tuple of str, what was undefined.

    Results are bit-identical for any order of the rows, which are sorted before they are summed.
    Raises ValueError for arrays of other or unequal shapes, fewer than 2 samples, values that are
    not finite, classes with equal means, and bins < 1.
    """
    pos, neg = _checked(a_pos, a_neg)
    require_int(bins, "bins", least=1)
    n = len(pos)
    d = pos - neg
    v = d.mean(axis=0)
    length = float(np.linalg.norm(v))
    if equal_means(pos, neg):
        raise ValueError("a_pos and a_neg have equal means: there is no steering vector")
    norms = np.linalg.norm(d, axis=1)
    defined = norms > 0
    mean_cosine, pairwise = _cosines(d[defined], norms[defined], v, n, leave_one_out)
    kappa_pos, kappa_neg = _kappa(pos, neg, v)
    variance = _variance(kappa_pos, kappa_neg, 2 * _rounding(pos, neg) / length)
    apart = float(kappa_pos.mean() - kappa_neg.mean())
    stability = _stability(d, v, seed)
    return {
        "mean_cosine": mean_cosine,
        "pairwise_cosine": pairwise,
        "d_prime": apart / float(np.sqrt(variance)) if variance > 0 else float("inf"),
        "overlap": _overlap(kappa_pos, kappa_neg, bins),
        "auc": _auc(kappa_pos, kappa_neg),
        "norm_ratio": length / float(norms.mean()),
        "stability_mean": float(stability.mean()),
        "stability_sd": float(stability.std()),
        "n": n,
        "n_undefined": int(n - defined.sum()),
        "flags": () if variance > 0 else (NO_VARIANCE,),
    }


def _checked(a_pos: Array, a_neg: Array) -> tuple[Float64Array, Float64Array]:
    """Both arrays in float64, the samples in an order that only their values decide."""
    pos, neg = (np.asarray(a, dtype=np.float64) for a in (a_pos, a_neg))
    for name, a in (("a_pos", pos), ("a_neg", neg)):
        if a.ndim != 2 or a.shape[1] < 1:
            raise ValueError(f"{name} must be activations [samples, width], not {a.shape}")
        if not np.isfinite(a).all():
            row = int(np.flatnonzero(~np.isfinite(a).all(axis=1))[0])
            raise ValueError(f"{name}[{row}] holds values that are not finite")
    if pos.shape != neg.shape:
        raise ValueError(
            f"a_pos {pos.shape} and a_neg {neg.shape} must be pairs: as many rows of the same width"
        )
    if len(pos) < 2:
        raise ValueError(f"predictors need at least 2 pairs, not {len(pos)}")
    order = sorted(range(len(pos)), key=lambda i: (pos[i].tobytes(), neg[i].tobytes()))
    return np.ascontiguousarray(pos[order]), np.ascontiguousarray(neg[order])


def equal_means(a_pos: Array, a_neg: Array) -> bool:
    """Whether the means of two classes are the same but for rounding; pairs [n, D]."""
    pos, neg = (np.asarray(a, dtype=np.float64) for a in (a_pos, a_neg))
    return float(np.linalg.norm((pos - neg).mean(axis=0))) <= _rounding(pos, neg)


def _rounding(pos: Float64Array, neg: Float64Array) -> float:
    """A length within which two means are equal but for the rounding of float64."""
    largest = max(np.abs(pos).max(), np.abs(neg).max())
    return float(4 * np.finfo(np.float64).eps * largest * np.sqrt(pos.shape[1]))


def _kappa(
    pos: Float64Array, neg: Float64Array, v: Float64Array
) -> tuple[Float64Array, Float64Array]:
    """Give kappa of both classes, [n] each."""
    middle = (pos.mean(axis=0) + neg.mean(axis=0)) / 2
    along = 2 * v / (v @ v)
    return (pos - middle) @ along, (neg - middle) @ along


def _variance(pos: Float64Array, neg: Float64Array, rounding: float) -> float:
    """The mean variance of both classes; 0 where it is that of rounding."""
    variance = float((pos.var() + neg.var()) / 2)
    return variance if variance > rounding**2 else 0.0


def _cosines(
    d: Float64Array, norms: Float64Array, v: Float64Array, n: int, leave_one_out: bool
) -> tuple[float, float]:
    """(mean cosine, pairwise cosine) of the differences that have a direction, of n samples."""
    m = len(d)
    unit = d / norms[:, None]
    others = (n * v - d) / (n - 1) if leave_one_out else np.broadcast_to(v, d.shape)
    lengths = np.linalg.norm(others, axis=1)
    known = lengths > 0  # a sample's others may cancel out
    along = np.einsum("ij,ij->i", unit, others)[known] / lengths[known]
    mean = float(along.mean()) if known.any() else float("nan")
    # |mean of unit vectors|^2 = (1 + (m - 1) pairwise) / m
    together = float(np.sum(unit.mean(axis=0) ** 2))
    return mean, (m * together - 1) / (m - 1) if m > 1 else float("nan")


def _overlap(pos: Float64Array, neg: Float64Array, bins: int) -> float:
    low, high = min(pos.min(), neg.min()), max(pos.max(), neg.max())
    counts = [np.histogram(k, bins=bins, range=(low, high))[0] / len(k) for k in (pos, neg)]
    return float(np.minimum(*counts).sum())


def _auc(pos: Float64Array, neg: Float64Array) -> float:
    ordered = np.sort(neg)
    below = np.searchsorted(ordered, pos, side="left")
    ties = np.searchsorted(ordered, pos, side="right") - below
    return float((below + ties / 2).sum() / (len(pos) * len(neg)))


def _stability(d: Float64Array, v: Float64Array, seed: int) -> Float64Array:
    """Cosines of v with the vectors of the draws; a draw whose mean is zero counts as 0."""
    n = len(d)
    generator = np.random.default_rng(seed)
    cosines = np.zeros(DRAWS)
    for i in range(DRAWS):
        drawn = generator.choice(n, size=min(DRAWN, n), replace=n < DRAWN)
        mean = d[np.sort(drawn)].mean(axis=0)
        length = np.linalg.norm(mean) * np.linalg.norm(v)
        cosines[i] = mean @ v / length if length > 0 else 0.0
    return cosines
