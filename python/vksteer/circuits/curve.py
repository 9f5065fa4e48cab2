"""Faithfulness by circuit size as numbers: pooling over samples, bootstrap intervals, and the curve
with its file, table and picture (docs/method.md section 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.display import Table
from ..base.figures import new_figure
from ..base.json_files import load_json, save_json
from ..base.types import Float64Array, IntArray, PathLike
from ..errors import ModelError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .circuit import Circuit

#: From here on the paper calls a circuit faithful.
THRESHOLD = 0.85
FORMAT = "vksteer.faithfulness_curve"


def pooled(per_sample: Mapping[str, Any]) -> tuple[float, float, float]:
    """(m(C), m(M), m(0)) over all samples: means weighted by the samples' metric positions; NaN
    where no sample has one.

    per_sample: {"value", "full", "empty", "weight"}, float [n_samples] each.
    """
    weight = np.asarray(per_sample["weight"], np.float64)
    used = weight > 0
    if not used.any():
        return math.nan, math.nan, math.nan

    def mean(name: str) -> float:
        values = np.asarray(per_sample[name], np.float64)[used]
        return float(weight[used] @ values / weight[used].sum())

    return mean("value"), mean("full"), mean("empty")


def bootstrap(
    per_sample: Mapping[str, Any], draws: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """(low, high) of faithfulness when samples are drawn with replacement: percentile intervals
    (Efron 1979). Each draw is pooled before the ratio is taken.

    per_sample: {"value", "full", "empty", "weight"}, float [n_samples] each; samples of weight 0
    are left out, and so are draws whose denominator is 0. NaN for fewer than two samples. Raises
    ValueError for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence!r}")
    weight = np.asarray(per_sample["weight"], np.float64)
    used = weight > 0
    n = int(used.sum())
    if n < 2 or draws < 1:
        return math.nan, math.nan
    value, full, empty = (
        np.asarray(per_sample[name], np.float64)[used] for name in ("value", "full", "empty")
    )
    counts = (
        np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws) * weight[used]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (counts @ (value - empty)) / (counts @ (full - empty))
    ratios = ratios[np.isfinite(ratios)]
    if not ratios.size:
        return math.nan, math.nan
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass
class FaithfulnessCurve(Table):
    """Faithfulness by circuit size; rows are in the order of `sizes`, which ascends.

    sizes: requested numbers of edges, int64 [n]. edges: how many edges the circuits have (pruning
    may keep a few more), int64 [n]. n_edges: edges of the whole graph. faithfulness, low, high: by
    `metric`, with the bootstrap interval (NaN where there is none), float64 [n] each. random:
    faithfulness of r random circuits of at least twice the size, float64 [n, r] (NaN where the
    graph has fewer edges); random_edges: their edges, int64 [n, r]. values: for each metric
    {"faithfulness", "value"} as float64 [n] and "full", "empty" as numbers. setting: how it was
    measured. circuits: the Circuit of each row; they are not saved.
    """

    metric: str
    n_edges: int
    sizes: IntArray
    edges: IntArray
    faithfulness: Float64Array
    low: Float64Array
    high: Float64Array
    random: Float64Array
    random_edges: IntArray
    values: dict[str, dict[str, Any]]
    setting: dict[str, Any]
    circuits: list[Circuit] = field(default_factory=list, repr=False, compare=False)

    def __len__(self) -> int:
        return self.sizes.size

    def __repr__(self) -> str:
        return self.to_markdown()

    def smallest(self, threshold: float = THRESHOLD) -> int | None:
        """The smallest size on the curve that reaches the threshold, or None."""
        reach = np.flatnonzero(self.faithfulness >= threshold)
        return int(self.sizes[reach[0]]) if reach.size else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes None, and the circuits are left out."""
        names = (*_ARRAYS, "values", "setting")
        return {
            "metric": self.metric,
            "n_edges": self.n_edges,
            **{name: _plain(getattr(self, name)) for name in names},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> FaithfulnessCurve:
        """The curve of a `to_dict`, without circuits. Raises ValueError for anything else."""
        try:
            arrays: dict[str, Any] = {
                name: np.array(content[name], kind) for name, kind in _ARRAYS.items()
            }
            n = arrays["sizes"].size
            for name in ("random", "random_edges"):
                arrays[name] = arrays[name].reshape(n, -1) if n else arrays[name].reshape(0, 0)
            curve = cls(
                metric=str(content["metric"]),
                n_edges=int(content["n_edges"]),
                **arrays,
                values=dict(content["values"]),
                setting=dict(content["setting"]),
            )
            for values in curve.values.values():
                values.update(
                    {name: np.array(values[name], np.float64) for name in ("faithfulness", "value")}
                )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"no faithfulness curve: {error!r}") from None
        if (
            any(arrays[name].shape != (n,) for name in ("edges", "faithfulness", "low", "high"))
            or arrays["random"].shape != arrays["random_edges"].shape
        ):
            raise ValueError("no faithfulness curve: its columns differ in length")
        return curve

    def save(self, path: PathLike) -> None:
        """Writes JSON with a checksum; an existing file is replaced in one step."""
        save_json(path, self.to_dict(), format=FORMAT, indent=1)

    @classmethod
    def load(cls, path: PathLike) -> FaithfulnessCurve:
        """Reads what `save` wrote. Raises ModelError for a file that was cut short or edited, or
        that holds something else.
        """
        content = load_json(path, format=FORMAT, what="faithfulness curve", limit=1 << 26)
        try:
            return cls.from_dict(content)
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from None

    def to_markdown(self) -> str:
        """A table with one row for each size: edges, share, faithfulness with its interval, mean of
        the random circuits of twice the size, and faithfulness by the other metrics.
        """
        more = [name for name in self.values if name != self.metric]
        control = self.random.shape[1] > 0
        head = ["requested", "edges", "share", "faithfulness"]
        head += ["random, twice the size"] if control else []
        head += more
        lines = [self._title(), "", "| " + " | ".join(head) + " |", "|" + "---:|" * len(head)]
        for i in range(len(self)):
            interval = f" [{self.low[i]:.3f}, {self.high[i]:.3f}]"
            cells = [
                f"{self.sizes[i]}",
                f"{self.edges[i]}",
                f"{100 * self.edges[i] / self.n_edges:.2f} %",
                f"{self.faithfulness[i]:.3f}" + (interval if np.isfinite(self.low[i]) else ""),
            ]
            if control:
                found = self.random[i][np.isfinite(self.random[i])]
                cells.append(f"{found.mean():.3f}" if found.size else "-")
            cells += [f"{self.values[name]['faithfulness'][i]:.3f}" for name in more]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _title(self) -> str:
        s = self.setting
        how = (
            f"found on {s['n_found_on']}, judged on {s['n_judged_on']} other samples"
            if s.get("halves")
            else f"{s.get('n_samples', '?')} samples"
        )
        title = (
            f"Faithfulness by {self.metric} of {s.get('method', '?')} circuits out of"
            f" {self.n_edges} edges; {how}"
        )
        if np.isfinite(self.low).any():
            title += f"; {100 * s.get('confidence', 0.95):g} % bootstrap intervals over samples"
        return title + "."

    def plot(self, path: PathLike | None = None, *, threshold: float | None = THRESHOLD) -> Figure:
        """Faithfulness against size with its interval, and the random circuits: a matplotlib
        Figure, saved to `path` if one is given. Raises ImportError without matplotlib.
        """
        figure = new_figure(6.4, 3.8)
        axes = figure.add_subplot()
        share = 100 * self.edges / self.n_edges
        if np.isfinite(self.low).any():
            axes.fill_between(share, self.low, self.high, color="#4878a8", alpha=0.2, linewidth=0)
        axes.plot(
            share,
            self.faithfulness,
            "o-",
            ms=3.5,
            color="#4878a8",
            label=f"{self.setting.get('method', '')} circuits".strip(),
        )
        for r in range(self.random.shape[1]):
            axes.plot(
                share,
                self.random[:, r],
                ".",
                ms=5,
                color="#999999",
                label="random, twice the size" if r == 0 else None,
            )
        if threshold is not None:
            axes.axhline(threshold, color="#c8643c", lw=0.8, ls="--", label=f"{threshold:g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"edges in the circuit, % of {self.n_edges}")
        axes.set_ylabel(f"faithfulness ({self.metric})")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


_ARRAYS: dict[str, type[np.generic]] = {
    "sizes": np.int64,
    "edges": np.int64,
    "faithfulness": np.float64,
    "low": np.float64,
    "high": np.float64,
    "random": np.float64,
    "random_edges": np.int64,
}


def _plain(x: Any) -> Any:
    """Lists, dicts and numbers that JSON can hold; what is not finite becomes None."""
    if isinstance(x, (list, np.ndarray)):
        return [_plain(v) for v in x]
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, (float, np.floating)):
        return float(x) if math.isfinite(x) else None
    return x.item() if isinstance(x, np.generic) else x


def per_sample_of(result: object) -> dict[str, Float64Array] | None:
    """The per-sample values of a metric's result, where it has all that `bootstrap` needs."""
    found = getattr(result, "per_sample", None)
    complete = found is not None and {"value", "full", "empty", "weight"} <= set(found)
    return found if complete else None
