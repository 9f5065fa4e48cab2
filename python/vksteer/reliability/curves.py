"""Curves of propensity over coefficients, and what is read from them.

Source: Tan et al., "Analyzing the generalization and reliability of steering vectors" (arXiv
2407.12404) and its code; differences are said at each quantity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.display import Table
from ..base.figures import new_figure
from ..base.types import Array, BoolArray, Float64Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Transfer:
    """How a vector of one data set steers another: s(v_A, D_B) / s(v_B, D_B), mean slopes.

    ratio is None where the denominator is smaller than its standard error, where it means nothing.
    """

    numerator: float
    denominator: float
    standard_error: float  # of the denominator, over items
    ratio: float | None


@dataclass(frozen=True)
class BiasShares:
    """Shares of the variance of the items' slopes (R^2) that two properties of an item explain:
    each alone, and both with their interaction. NaN where the slopes do not vary or a property
    is not given or is the same for all items.
    """

    first: float
    second: float
    both: float


@dataclass(frozen=True, eq=False)
class Curves(Table):
    """Propensity of n items at k coefficients.

    coefficients: float64 [k]. propensity: float64 [n, k], log p(positive) - log p(negative) summed
    over the answer's tokens. dose: `vs.dose` of coefficient 1 on the prompts, or NaN. meta:
    provenance.
    """

    coefficients: Float64Array
    propensity: Float64Array
    dose: float = float("nan")
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.propensity)

    def __repr__(self) -> str:
        return (
            f"Curves({len(self)} items, {len(self.coefficients)} coefficients: mean slope"
            f" {self.mean_slope:.3f}, {100 * self.anti_steerable:.0f} % anti-steerable)"
        )

    @property
    def normalised(self) -> Float64Array:
        """p(positive) / (p(positive) + p(negative)), float64 [n, k]."""
        return 1 / (1 + np.exp(-np.clip(self.propensity, -700, 700)))

    @property
    def accuracy(self) -> Float64Array:
        """Share of items that prefer the positive answer at each coefficient, float64 [k]."""
        share: Float64Array = (self.propensity > 0).mean(axis=0)
        return share

    @property
    def slope(self) -> Float64Array:
        """The steerability of each item: the least-squares slope of its propensity over the
        coefficients, float64 [n].
        """
        x = self.coefficients - self.coefficients.mean()
        slopes: Float64Array = self.propensity @ x / (x @ x)
        return slopes

    @property
    def residual(self) -> Float64Array:
        """The sum of squared residuals of each item's straight line, float64 [n]."""
        x = self.coefficients - self.coefficients.mean()
        line = self.propensity.mean(axis=1, keepdims=True) + np.outer(self.slope, x)
        squares: Float64Array = ((self.propensity - line) ** 2).sum(axis=1)
        return squares

    @property
    def spearman(self) -> Float64Array:
        """Rank correlation of coefficient and propensity of each item, float64 [n]; NaN where the
        propensity is constant.
        """
        x = _ranks(self.coefficients)
        return np.array([_correlation(x, _ranks(row)) for row in self.propensity])

    @property
    def constant(self) -> BoolArray:
        """Items whose propensity does not change, bool [n]."""
        same: BoolArray = np.ptp(self.propensity, axis=1) == 0
        return same

    @property
    def anti_steerable(self) -> float:
        """The share of items with a negative slope."""
        return float((self.slope < 0).mean())

    @property
    def mean_slope(self) -> float:
        """The mean of the items' slopes."""
        return float(self.slope.mean())

    def transfer(self, own: Curves) -> Transfer:
        """How the vector of these curves does on the data set, beside that data set's own vector:
        `self` = the foreign vector on the items, `own` = the items' own vector.
        """
        slopes = own.slope
        error = float(slopes.std(ddof=1) / np.sqrt(len(slopes))) if len(slopes) > 1 else np.inf
        top, bottom = self.mean_slope, own.mean_slope
        return Transfer(top, bottom, error, top / bottom if abs(bottom) >= error else None)

    def bias_shares(
        self, first: Sequence[bool], second: Sequence[bool] | None = None
    ) -> BiasShares:
        """How much of the spread of the slopes a bias explains.

        first, second: a property of each item, such as "the positive answer is A" and "the positive
        answer is Yes"; bool [n]. Raises ValueError for another length.
        """
        groups = []
        for name, given in (("first", first), ("second", second)):
            flags = np.zeros(len(self), bool) if given is None else np.asarray(given, bool)
            if flags.shape != (len(self),):
                raise ValueError(f"{name} must say something of each of {len(self)} items")
            groups.append(flags.astype(int))
        a, b = groups
        return BiasShares(*(_explained(self.slope, g) for g in (a, b, 2 * a + b)))

    def to_dict(self) -> dict[str, Any]:
        """For JSON: coefficients, propensity, slope, residual and spearman as lists (None for NaN),
        anti_steerable, mean_slope, accuracy, dose and meta.
        """

        def plain(a: Array) -> Any:
            if a.ndim > 1:
                return [plain(row) for row in a]
            return [None if np.isnan(x) else float(x) for x in a]

        names = ("coefficients", "propensity", "slope", "residual", "spearman", "accuracy")
        return {name: plain(getattr(self, name)) for name in names} | {
            "anti_steerable": self.anti_steerable,
            "mean_slope": self.mean_slope,
            "dose": None if np.isnan(self.dose) else self.dose,
            "meta": self.meta,
        }

    def to_markdown(self) -> str:
        """A table with one row for each coefficient, and a line of what the curves say."""
        lines = [
            "| coefficient | dose | mean propensity | standard deviation | positive preferred |",
            "|---:|---:|---:|---:|---:|",
        ]
        for i, a in enumerate(self.coefficients):
            column = self.propensity[:, i]
            lines.append(
                f"| {a:g} | {abs(a) * self.dose:.3f} | {column.mean():.3f} | {column.std():.3f} |"
                f" {100 * self.accuracy[i]:.0f} % |"
            )
        known = self.spearman[~self.constant]
        rank = f"{known.mean():.2f}" if known.size else "undefined"
        constant = int(self.constant.sum())
        lines += [
            "",
            f"{len(self)} items: mean slope {self.mean_slope:.3f} (standard deviation"
            f" {self.slope.std():.3f}), {100 * self.anti_steerable:.0f} % anti-steerable, mean rank"
            f" correlation {rank}" + (f", {constant} constant" if constant else "") + ".",
        ]
        return "\n".join(lines)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def plot(self, ax: Axes | None = None) -> Figure:
        """Every item's curve, anti-steerable ones in red, and their mean. Returns the figure;
        raises ImportError, naming what to install, without matplotlib.
        """
        if ax is None:
            ax = new_figure(5, 3.5).subplots()
        for row, slope in zip(self.propensity, self.slope, strict=True):
            ax.plot(
                self.coefficients,
                row,
                color="#c8643c" if slope < 0 else "#4878a8",
                alpha=0.35,
                linewidth=0.8,
            )
        ax.plot(self.coefficients, self.propensity.mean(axis=0), color="black", label="mean")
        ax.axhline(0, color="0.6", linewidth=0.8, linestyle="--")
        ax.set(xlabel="coefficient", ylabel="log p(positive) - log p(negative)")
        ax.legend(frameon=False)
        figure: Any = ax.figure
        result: Figure = figure
        return result


def _ranks(values: Float64Array) -> Float64Array:
    """Ranks from 0 on; equal values share the mean of theirs."""
    order = np.sort(values)
    low = np.searchsorted(order, values, side="left")
    high = np.searchsorted(order, values, side="right")
    return (low + high - 1) / 2


def _correlation(x: Float64Array, y: Float64Array) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size > 0 else float("nan")


def _explained(values: Float64Array, groups: Array) -> float:
    """The share of variance between the groups: R^2 of the group means."""
    kinds = np.unique(groups)
    whole = float(((values - values.mean()) ** 2).sum())
    if len(kinds) < 2 or whole == 0:
        return float("nan")
    inside = sum(float(((v - v.mean()) ** 2).sum()) for v in (values[groups == k] for k in kinds))
    return 1 - inside / whole
