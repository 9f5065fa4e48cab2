"""How well estimated effects agree with those of exact patches (`vs.patching.agreement`)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.checks import require_int
from ..base.figures import new_figure
from ..base.types import Float64Array, PathLike
from ..circuits.search import ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .edge_scores import EdgeScores


def average_ranks(values: npt.ArrayLike) -> Float64Array:
    """Ranks from 1 on, ascending, float64 [n]; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(
        np.asarray(values, np.float64), return_inverse=True, return_counts=True
    )
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse])


def correlation(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Pearson's correlation, in float64; NaN where x or y is constant."""
    a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
    a, b = a - a.mean(), b - b.mean()
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(np.clip(a @ b / lengths, -1, 1)) if lengths > 0 else math.nan


def top_overlap(x: npt.ArrayLike, y: npt.ArrayLike, k: int) -> float:
    """Share of the k largest |x| that are among the k largest |y|; ties in the given order."""
    return np.intersect1d(ranking(x)[:k], ranking(y)[:k]).size / k


@dataclass(frozen=True)
class Agreement:
    """Agreement of n estimates with n exact effects.

    pearson, spearman: correlations, the latter of average ranks. overlap: {k: share of the k
    largest |estimate| that are among the k largest |exact|}. sign: share of equal signs, without
    pairs of zeros. slope: of exact on estimate, through the origin. worst: (index, estimate, exact)
    of the largest difference. estimate, exact: float64 [n].
    """

    n: int
    pearson: float
    spearman: float
    overlap: dict[int, float]
    sign: float
    slope: float
    worst: tuple[int, float, float]
    estimate: Float64Array = field(repr=False, compare=False)
    exact: Float64Array = field(repr=False, compare=False)

    def __str__(self) -> str:
        tops = ", ".join(f"top {k}: {share:.2f}" for k, share in self.overlap.items())
        i, a, b = self.worst
        return (
            f"Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}, slope {self.slope:.3f},"
            f" equal signs {self.sign:.3f}, overlap of the strongest {tops} ({self.n} values; worst"
            f" is number {i}: estimate {a:.4g}, exact {b:.4g})"
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the arrays; NaN becomes None."""
        content = {
            name: value for name, value in asdict(self).items() if name not in ("estimate", "exact")
        }

        def finite(x: float) -> float | None:
            return x if math.isfinite(x) else None

        return content | {
            "pearson": finite(self.pearson),
            "spearman": finite(self.spearman),
            "slope": finite(self.slope),
            "sign": finite(self.sign),
            "overlap": {str(k): v for k, v in self.overlap.items()},
            "worst": list(self.worst),
        }

    def plot(
        self, path: PathLike | None = None, *, labels: tuple[str, str] = ("estimate", "exact patch")
    ) -> Figure:
        """Estimates against exact effects, one point each: a matplotlib Figure, saved to `path` if
        one is given. Raises ImportError without matplotlib.
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


def agreement(
    estimate: npt.ArrayLike | EdgeScores, exact: npt.ArrayLike, k: int | Iterable[int] | None = None
) -> Agreement:
    """Correlations and overlap of estimated with exact effects, with a plot.

    estimate: float [n], or an EdgeScores: its edges, or its nodes where `exact` has one value for
    each node. exact: float [n], from `vs.patching.exact`. k: one or several sizes of the overlap
    (default: 10, 30, 100, 300 and 1000, as far as they are below n; else half of n). Raises
    ValueError for fewer than two values, different lengths, and numbers that are not finite.
    """
    measured = np.asarray(exact, np.float64).ravel()
    guessed = _estimates(estimate, measured.size)
    if guessed.shape != measured.shape:
        raise ValueError(f"{guessed.size} estimates but {measured.size} exact effects")
    n = measured.size
    if n < 2:
        raise ValueError(f"agreement needs at least two values, not {n}")
    for name, values in (("estimate", guessed), ("exact", measured)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}")
    sizes = _overlap_sizes(k, n)
    some = (guessed != 0) | (measured != 0)
    equal = np.sign(guessed) == np.sign(measured)
    square = float(guessed @ guessed)
    worst = int(np.abs(guessed - measured).argmax())
    return Agreement(
        n,
        correlation(guessed, measured),
        correlation(average_ranks(guessed), average_ranks(measured)),
        {i: top_overlap(guessed, measured, i) for i in sizes},
        float(equal[some].mean()) if some.any() else math.nan,
        float(guessed @ measured) / square if square else math.nan,
        (worst, float(guessed[worst]), float(measured[worst])),
        guessed,
        measured,
    )


def _estimates(estimate: npt.ArrayLike | EdgeScores, n: int) -> Float64Array:
    """The estimates, float64; of an EdgeScores its nodes where only they are n."""
    values: Any = estimate
    if hasattr(estimate, "edges"):
        graph, nodes = values.graph, values.nodes
        by_node = nodes is not None and n == graph.n_upstream != graph.n_edges
        values = nodes if by_node else values.edges
    return np.asarray(values, np.float64).ravel()


def _overlap_sizes(k: int | Iterable[int] | None, n: int) -> list[int]:
    if k is None:
        k = [i for i in (10, 30, 100, 300, 1000) if i < n] or [max(1, n // 2)]
    sizes = [require_int(i, "k", 1) for i in (k if isinstance(k, Iterable) else [k])]
    if any(i > n for i in sizes):
        raise ValueError(f"k: {max(sizes)} of {n} values")
    return sizes
