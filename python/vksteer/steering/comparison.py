"""The result of `vs.steering.compare`: rates, cosines and circuits of several vectors, as tables
and pictures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.display import Table
from ..base.figures import new_figure
from ..base.types import Float64Array, PathLike
from ..judge import Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..circuits.circuit import Circuit


@dataclass(frozen=True)
class ComparedVector:
    """One vector with the strengths it was used with and both rates."""

    name: str
    coefficient: tuple[float, float]  # (plus, minus)
    norm: float  # as it was used
    harmless: Rate
    harmful: Rate
    circuit: Circuit | None = None  # None where circuits were not compared
    n_samples: int = 0  # samples that the circuit was found on
    # Shares of the circuit's edges by the type of the input they end in.
    distribution: Mapping[str, float] | None = None
    # |a s| / |h| on harmless prompts under +a and on harmful ones under -a (`vs.dose`)
    dose: tuple[float, float] = (float("nan"), float("nan"))


@dataclass
class Comparison(Table):
    """What `compare` found. comparison[name] is the row of one vector.

    unsteered: rates of the unsteered model on harmless and on harmful prompts. cosines, overlaps,
    cross: float64 [n, n] in the order of `names`, NaN where not measured. overlaps: of circuits
    (docs/method.md section 5). cross[i, j]: faithfulness of the circuit of vector i under vector j,
    on j's samples. setting: how it was measured. notes: what was left out, and why. prompted: rates
    under an instruction instead of a vector (harmless, harmful), or None.
    """

    rows: list[ComparedVector]
    unsteered: tuple[Rate, Rate]  # harmless, harmful
    cosines: Float64Array
    overlaps: Float64Array
    cross: Float64Array
    setting: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    prompted: tuple[Rate, Rate] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the vectors, in the order of the rows."""
        return [row.name for row in self.rows]

    def __getitem__(self, name: str) -> ComparedVector:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no vector {name!r}; there are: {', '.join(self.names)}")

    def __iter__(self) -> Iterator[ComparedVector]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return self.to_markdown()

    def to_dict(self) -> dict[str, Any]:
        """For JSON; NaN becomes None, and circuits are represented by their sizes."""

        def plain(matrix: Float64Array) -> list[list[float | None]]:
            return [[None if np.isnan(x) else float(x) for x in row] for row in matrix]

        rows = {
            r.name: {
                "coefficient": list(r.coefficient),
                "norm": r.norm,
                "dose": [None if np.isnan(d) else d for d in r.dose],
                "harmless": asdict(r.harmless),
                "harmful": asdict(r.harmful),
                "n_samples": r.n_samples,
                "circuit_size": None if r.circuit is None else len(r.circuit),
                "distribution": None if r.distribution is None else dict(r.distribution),
            }
            for r in self.rows
        }
        unsteered = {"harmless": asdict(self.unsteered[0]), "harmful": asdict(self.unsteered[1])}
        return {
            "setting": self.setting,
            "vectors": rows,
            "unsteered": unsteered,
            "prompted": None
            if self.prompted is None
            else {
                "harmless": asdict(self.prompted[0]),
                "harmful": asdict(self.prompted[1]),
            },
            "cosines": plain(self.cosines),
            "overlaps": plain(self.overlaps),
            "cross_faithfulness": plain(self.cross),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """A table of rates, then one each of cosines, circuits, overlaps and cross-faithfulness, as
        far as they were measured.
        """
        lines = [*self._rates(), *self._square("cosine", self.cosines), *self._circuits()]
        lines += self._square("overlap", self.overlaps)
        lines += self._square("faithfulness of row's circuit under", self.cross)
        lines += [""] * bool(self.notes) + [f"Left out: {note}." for note in self.notes]
        return "\n".join(lines)

    def _rates(self) -> list[str]:
        def rate(r: Rate) -> str:
            return f"{r.asr:.2f} [{r.low:.2f}, {r.high:.2f}]"

        def both(a: Rate, b: Rate) -> str:
            ended = f"{a.ended:.2f} / {b.ended:.2f}"
            return f"{rate(a)} | {rate(b)} | {ended} | {a.repetition:.2f} / {b.repetition:.2f}"

        s = self.setting
        lines = [
            (
                f"Harmless prompts under +a ({s['n_harmless']}), harmful prompts under -a"
                f" ({s['n_harmful']}); {s['max_new_tokens']} new tokens; judge of harmful answers:"
                f" {s['judge']}."
            ),
            "",
            (
                "| vector | layer | norm | +a / -a | dose | harmless ASR | harmful ASR | ended |"
                " repetition |"
            ),
            "|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for r, layer in zip(self.rows, s["layers"]):
            strengths = f"{r.coefficient[0]:g} / {r.coefficient[1]:g}"
            lines.append(
                f"| {r.name} | {layer} | {r.norm:.3g} | {strengths} |"
                f" {r.dose[0]:.3f} / {r.dose[1]:.3f} | {both(r.harmless, r.harmful)} |"
            )
        if self.prompted is not None:
            lines.append(f"| prompt | | | | | {both(*self.prompted)} |")
        return [*lines, f"| none | | | | | {both(*self.unsteered)} |"]

    def _circuits(self) -> list[str]:
        found = [(r, r.circuit, r.distribution) for r in self.rows if r.distribution]
        if not found:
            return []
        kinds = list(found[0][2] or ())
        lines = [
            "",
            "| circuit of | samples | edges | " + " | ".join(kinds) + " |",
            "|:---|---:|---:|" + "---:|" * len(kinds),
        ]
        for r, circuit, distribution in found:
            assert circuit is not None and distribution is not None  # they come together
            shares = " | ".join(f"{100 * distribution[k]:.1f} %" for k in kinds)
            lines.append(f"| {r.name} | {r.n_samples} | {len(circuit)} | {shares} |")
        return lines

    def _square(self, title: str, matrix: Float64Array) -> list[str]:
        if np.isnan(matrix).all():
            return []

        def cell(x: float) -> str:
            return "-" if np.isnan(x) else f"{x:.2f}"

        return [
            "",
            f"| {title} | " + " | ".join(self.names) + " |",
            "|:---|" + "---:|" * len(self.names),
            *(
                f"| {name} | " + " | ".join(map(cell, row)) + " |"
                for name, row in zip(self.names, matrix)
            ),
        ]

    def plot(self, path: PathLike | None = None) -> Figure:
        """Rates as bars with their intervals, and cosines, overlaps and cross-faithfulness, where
        measured, as maps: a matplotlib Figure, saved to `path` if one is given. Raises ImportError
        without matplotlib.
        """
        maps = [
            (title, m)
            for title, m in (
                ("cosine", self.cosines),
                ("circuits' overlap", self.overlaps),
                ("cross-faithfulness", self.cross),
            )
            if not np.isnan(m).all()
        ]
        figure = new_figure(4.2 + 2.9 * len(maps), 3.2)
        widths = {"width_ratios": [1.4] + [1] * len(maps)}
        axes = figure.subplots(1, 1 + len(maps), gridspec_kw=widths, squeeze=False)[0]
        self._plot_rates(axes[0])
        for ax, (title, matrix) in zip(axes[1:], maps, strict=True):
            self._plot_map(ax, title, matrix)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _plot_rates(self, axes: Axes) -> None:
        prompted = [] if self.prompted is None else [self.prompted]
        names = self.names + ["prompt"] * len(prompted)
        at = np.arange(len(names))
        for i, (shift, side, colour) in enumerate(
            ((-0.2, "harmless", "#4878a8"), (0.2, "harmful", "#c8643c"))
        ):
            rates = [getattr(r, side) for r in self.rows] + [pair[i] for pair in prompted]
            asr = np.array([r.asr for r in rates])
            spread = np.abs(np.array([[r.low for r in rates], [r.high for r in rates]]) - asr)
            label = f"{side}, {'+' if side == 'harmless' else '-'}a"
            axes.bar(at + shift, asr, 0.38, yerr=spread, capsize=2, color=colour, label=label)
        axes.set_xticks(at, names)
        axes.set_ylim(0, 1.05)
        axes.set_ylabel("attack success rate")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)

    def _plot_map(self, axes: Axes, title: str, matrix: Float64Array) -> None:
        axes.imshow(matrix, vmin=min(0.0, float(np.nanmin(matrix))), vmax=1, cmap="Blues")
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(len(self.rows)), self.names)
        axes.set_yticks(range(len(self.rows)), self.names)
        for i, j in np.ndindex(*matrix.shape):
            x = float(matrix[i, j])
            if not np.isnan(x):
                color = "white" if x > 0.6 else "black"
                axes.text(j, i, f"{x:.2f}", ha="center", va="center", fontsize=8, color=color)
