"""How well an estimate of effects agrees with the effects of real patches
(`vs.patching.agreement`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

import numpy as np

from ..base.checks import require_int
from ..base.figures import new_figure
from ..circuits.search import ranking


def average_ranks(values) -> np.ndarray:
    """Ranks from 1 on, ascending; equal values share the mean of their ranks. float64 [n]."""
    values = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def correlation(x, y) -> float:
    """Pearson's, in float64; NaN where one of the two is constant."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x, y = x - x.mean(), y - y.mean()
    lengths = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(np.clip(x @ y / lengths, -1, 1)) if lengths > 0 else math.nan


def top_overlap(x, y, k: int) -> float:
    """Share of the k largest |x| that are among the k largest |y|; ties by order."""
    return np.intersect1d(ranking(x)[:k], ranking(y)[:k]).size / k


@dataclass(frozen=True)
class Agreement:
    """n values; pearson, spearman (average ranks); overlap: {k: share of the k strongest that both
    name}; sign: share of equal signs among those that are not 0 in both; slope: of exact on
    estimate through the origin; worst: (index, estimate, exact) of the largest difference.
    """

    n: int
    pearson: float
    spearman: float
    overlap: dict[int, float]
    sign: float
    slope: float
    worst: tuple[int, float, float]
    estimate: np.ndarray = field(repr=False, compare=False)
    exact: np.ndarray = field(repr=False, compare=False)

    def __str__(self):
        tops = ", ".join(f"top {k}: {share:.2f}" for k, share in self.overlap.items())
        i, a, b = self.worst
        return (
            f"Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}, slope {self.slope:.3f},"
            f" equal signs {self.sign:.3f}, overlap of the strongest {tops} ({self.n} values; worst"
            f" is number {i}: estimate {a:.4g}, exact {b:.4g})"
        )

    def to_dict(self) -> dict:
        content = {
            name: value for name, value in asdict(self).items() if name not in ("estimate", "exact")
        }
        finite = lambda x: x if math.isfinite(x) else None
        return content | {
            "pearson": finite(self.pearson),
            "spearman": finite(self.spearman),
            "slope": finite(self.slope),
            "sign": finite(self.sign),
            "overlap": {str(k): v for k, v in self.overlap.items()},
            "worst": list(self.worst),
        }

    def plot(self, path=None, *, labels=("estimate", "exact patch")):
        """Estimate against exact, one point each: a matplotlib Figure, saved to `path` if one is
        given (needs matplotlib).
        """
        figure = new_figure(4.4, 4.2)
        axes = figure.add_subplot()
        ends = [
            min(self.estimate.min(), self.exact.min()),
            max(self.estimate.max(), self.exact.max()),
        ]
        axes.plot(ends, ends, color="#bbbbbb", lw=0.8, zorder=1)
        axes.scatter(
            self.estimate, self.exact, s=8, alpha=0.6, color="#4878a8", linewidths=0, zorder=2
        )
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.set_title(
            f"r = {self.pearson:.3f}, rho = {self.spearman:.3f}, n = {self.n}", fontsize=9
        )
        axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def agreement(estimate, exact, k=None) -> Agreement:
    """Pearson, Spearman and overlap of the strongest between estimated and exact
    effects, with a plot.

    estimate: float [n], or an EdgeScores (its edges, or its nodes where `exact` has one value for
    each node). exact: float [n], from `exact`. k: an int or a list of them (default: 10, 30, 100,
    300, 1000, as far as they are below n; else half of n).
    Raises ValueError for fewer than two values, different lengths, and numbers that are not finite.
    """
    exact = np.asarray(exact, np.float64).ravel()
    if hasattr(estimate, "edges"):
        estimate = (
            estimate.nodes
            if estimate.nodes is not None
            and exact.size == estimate.graph.n_upstream != estimate.graph.n_edges
            else estimate.edges
        )
    estimate = np.asarray(estimate, np.float64).ravel()
    if estimate.shape != exact.shape:
        raise ValueError(f"{estimate.size} estimates but {exact.size} exact effects")
    n = exact.size
    if n < 2:
        raise ValueError(f"agreement needs at least two values, not {n}")
    for name, values in (("estimate", estimate), ("exact", exact)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}")
    if k is None:
        k = [i for i in (10, 30, 100, 300, 1000) if i < n] or [max(1, n // 2)]
    k = [require_int(i, "k", 1) for i in (k if hasattr(k, "__iter__") else [k])]
    if any(i > n for i in k):
        raise ValueError(f"k: {max(k)} of {n} values")
    some = (estimate != 0) | (exact != 0)
    sign = float((np.sign(estimate) == np.sign(exact))[some].mean()) if some.any() else math.nan
    square = float(estimate @ estimate)
    worst = int(np.abs(estimate - exact).argmax())
    return Agreement(
        n,
        correlation(estimate, exact),
        correlation(average_ranks(estimate), average_ranks(exact)),
        {i: top_overlap(estimate, exact, i) for i in k},
        sign,
        float(estimate @ exact) / square if square else math.nan,
        (worst, float(estimate[worst]), float(exact[worst])),
        estimate,
        exact,
    )
