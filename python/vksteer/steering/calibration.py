"""The result of `vs.steering.calibrate`: what was measured, and the intervals that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.figures import new_figure
from ..base.types import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..judge import Rate


class Side(NamedTuple):
    """One way of steering: its sign and the kind of prompts that it should change."""

    sign: int
    prompts: str


SIDES = {"plus": Side(1, "harmless"), "minus": Side(-1, "harmful")}


@dataclass(frozen=True)
class Bounds:
    """What a coefficient that counts must keep: see `vs.steering.calibrate`."""

    kl: float  # nats
    repetition: float  # rise
    unended: float  # fall of "ended"
    effect: float  # share of what the rate could move

    def left(self, side: str, unsteered: Mapping[str, Rate]) -> float:
        """How far the rate can move: harmless prompts can be refused, harmful ones answered."""
        asr = unsteered[SIDES[side].prompts].asr
        return asr if side == "plus" else 1 - asr


@dataclass(frozen=True)
class RangeRow:
    """One coefficient of one side. kl: KL(unsteered || steered) of the next token in nats, on the
    prompts that should stay as they are. dose: `vs.dose` on the steered prompts. rate: of the
    steered answers, None where the KL divergence alone is outside its bound. effect: the share of
    what the rate could move that it moved, None likewise. broken: the bounds that it breaks.
    """

    side: str
    coefficient: float  # a magnitude
    dose: float
    kl: float
    rate: Rate | None
    effect: float | None
    broken: tuple[str, ...]
    counts: bool  # changes behaviour, inside all bounds

    @property
    def inside(self) -> bool:
        """Whether no bound is broken."""
        return not self.broken

    @classmethod
    def of(
        cls,
        side: str,
        coefficient: float,
        dose: float,
        kl: float,
        rate: Rate | None,
        unsteered: Mapping[str, Rate],
        bounds: Bounds,
    ) -> RangeRow:
        broken = ["KL"] if kl > bounds.kl else []
        effect = None
        if rate is not None:
            base = unsteered[SIDES[side].prompts]
            moved = base.asr - rate.asr if side == "plus" else rate.asr - base.asr
            effect = moved / bounds.left(side, unsteered)
            # answers of one kind are compared with what the other kind was like
            ended = min(r.ended for r in unsteered.values())
            if rate.repetition - base.repetition > bounds.repetition:
                broken.append("repetition")
            if ended - rate.ended > bounds.unended:
                broken.append("ended")
        counts = not broken and effect is not None and effect >= bounds.effect
        return cls(side, coefficient, dose, kl, rate, effect, tuple(broken), counts)


class Range:
    """The coefficients that count, for each side.

    rows: RangeRows, side by side in ascending order. bounds: Bounds. unsteered: {"harmless",
    "harmful"}, the rates without steering. setting: how it was measured.
    """

    def __init__(
        self,
        rows: Sequence[RangeRow],
        bounds: Bounds,
        unsteered: Mapping[str, Rate],
        setting: Mapping[str, Any],
    ) -> None:
        self.rows, self.bounds = tuple(rows), bounds
        self.unsteered, self.setting = dict(unsteered), dict(setting)

    def _side(self, side: str, counting: bool = False) -> list[RangeRow]:
        return [r for r in self.rows if r.side == side and (r.counts or not counting)]

    def _interval(self, side: str) -> tuple[float, float] | None:
        """Around the recommended coefficient, up to the first that does not count."""
        best, rows = self._best(side), self._side(side)
        if best is None:
            return None
        bad = [r.coefficient for r in rows if not r.counts]
        below, above = (x for x in bad if x < best), (x for x in bad if x > best)
        low, high = max(below, default=-1.0), min(above, default=float("inf"))
        found = [r.coefficient for r in rows if low < r.coefficient < high]
        return min(found), max(found)

    @property
    def plus(self) -> tuple[float, float] | None:
        """(lowest, highest) coefficient a that counts for harmless prompts under +a; None: none."""
        return self._interval("plus")

    @property
    def minus(self) -> tuple[float, float] | None:
        """The same for harmful prompts under -a, as magnitudes."""
        return self._interval("minus")

    @property
    def recommended(self) -> tuple[float | None, float | None]:
        """(plus, minus), as other calls take it: the coefficient that moves its rate most, minus
        what it adds to repetition and takes from "ended"; among equals the smallest. None for an
        empty side.
        """
        return self._best("plus"), self._best("minus")

    def _best(self, side: str) -> float | None:
        def gain(row: RangeRow) -> float:
            assert row.rate is not None and row.effect is not None  # it counts
            base = self.unsteered[SIDES[side].prompts]
            harm = max(0.0, row.rate.repetition - base.repetition)
            return row.effect - harm - max(0.0, base.ended - row.rate.ended)

        found = self._side(side, counting=True)
        best = min(found, key=lambda r: (-gain(r), r.coefficient), default=None)
        return None if best is None else best.coefficient

    @property
    def reason(self) -> dict[str, str]:
        """Why a side is empty, by its name."""
        return {side: self._why(side) for side in SIDES if self._interval(side) is None}

    def _why(self, side: str) -> str:
        prompts, rows = SIDES[side].prompts, self._side(side)
        done = "refused" if side == "plus" else "answered"
        if not rows:
            return f"nothing to change: all {prompts} prompts are {done} without steering"
        effects = [r for r in rows if r.effect is not None]
        strongest = max(effects, key=lambda r: r.effect or 0.0, default=None)
        outside = min((r for r in rows if r.broken), key=lambda r: r.coefficient, default=None)
        if outside is None:
            assert strongest is not None  # nothing is outside, so answers were generated
            return (
                f"no effect up to {rows[-1].coefficient:g}: at {strongest.coefficient:g} the rate"
                f" moves by {strongest.effect:.2f} of what it could, and {self.bounds.effect:g} is"
                " needed; a larger high may help"
            )
        values = [self._broken(outside, name) for name in outside.broken]
        told = f"side effects come first: from {outside.coefficient:g} on {' and '.join(values)}"
        inside = [r for r in effects if r.inside]
        if not inside:
            return f"{told}; a smaller coefficient was not measured, a smaller low may help"
        best = max(inside, key=lambda r: r.effect or 0.0)
        return (
            f"{told}; below, the rate moves by at most {best.effect:.2f} of what it could (at"
            f" {best.coefficient:g}), and {self.bounds.effect:g} is needed"
        )

    def _broken(self, row: RangeRow, name: str) -> str:
        if name == "KL":
            return f"KL is {row.kl:.2f} nats, above {self.bounds.kl:g}"
        assert row.rate is not None
        base = self.unsteered[SIDES[row.side].prompts]
        if name == "repetition":
            rise = row.rate.repetition - base.repetition
            return f"repetition rises by {rise:.2f}, more than {self.bounds.repetition:g}"
        fall = min(r.ended for r in self.unsteered.values()) - row.rate.ended
        return f"the share of ended texts falls by {fall:.2f}, more than {self.bounds.unended:g}"

    def __repr__(self) -> str:
        def shown(interval: tuple[float, float] | None) -> str:
            return "none" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"

        return f"Range(plus {shown(self.plus)}, minus {shown(self.minus)}, {len(self.rows)} rows)"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: intervals, recommendation, reasons, bounds, unsteered rates, rows, setting."""
        return {
            "plus": self.plus,
            "minus": self.minus,
            "recommended": list(self.recommended),
            "reason": self.reason,
            "bounds": asdict(self.bounds),
            "unsteered": {side: asdict(rate) for side, rate in self.unsteered.items()},
            "rows": [asdict(row) for row in self.rows],
            "setting": self.setting,
        }

    def _cells(self) -> list[list[str]]:
        head = ["prompts", "a", "dose", "KL", "ASR", "effect", "ended", "repetition", "verdict"]
        lines = [head]
        for r in self.rows:
            sign, prompts = ("+", "harmless") if r.side == "plus" else ("-", "harmful")
            rates = ["", "", "", ""]
            if r.rate is not None and r.effect is not None:
                rates = [
                    f"{x:.2f}" for x in (r.rate.asr, r.effect, r.rate.ended, r.rate.repetition)
                ]
            verdict = "works" if r.counts else ", ".join(r.broken) or "no effect"
            name = f"{sign}{r.coefficient:.4g}"
            lines.append([prompts, name, f"{r.dose:.3f}", f"{r.kl:.3f}", *rates, verdict])
        return lines

    def _summary(self) -> list[str]:
        told = []
        for side, best in zip(SIDES, self.recommended, strict=True):
            interval, sign = self._interval(side), "+" if side == "plus" else "-"
            where = f"{SIDES[side].prompts.capitalize()} prompts under {sign}a: "
            if interval is None:
                told.append(f"{where}no coefficient: {self._why(side)}.")
            else:
                told.append(
                    f"{where}{interval[0]:.4g} to {interval[1]:.4g}, recommended {best:.4g}."
                )
        return told

    def to_markdown(self) -> str:
        """The intervals, and a table with one row for each coefficient that was measured."""
        head, *rows = self._cells()
        lines = ["| " + " | ".join(cells) + " |" for cells in rows]
        rule = "|:---|" + "---:|" * (len(head) - 2) + ":---|"
        return "\n".join([*self._summary(), "", "| " + " | ".join(head) + " |", rule, *lines])

    def _repr_html_(self) -> str:
        head, *rows = self._cells()
        told = "".join(f"<p>{line}</p>" for line in self._summary())
        titles = "".join(f"<th>{cell}</th>" for cell in head)
        body = "".join(
            "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>" for cells in rows
        )
        return f"{told}<table><tr>{titles}</tr>{body}</table>"

    def plot(self, path: PathLike | None = None) -> Figure:
        """Effect and KL divergence over the coefficient for each side, with the interval shaded: a
        matplotlib Figure, saved to `path` if one is given. Raises ImportError without matplotlib.
        """
        figure = new_figure(8, 3.2)
        for axes, side in zip(figure.subplots(1, 2, sharey=True), SIDES, strict=True):
            rows, interval = self._side(side), self._interval(side)
            known = [r for r in rows if r.effect is not None]
            axes.plot(
                [r.coefficient for r in known],
                [r.effect for r in known],
                marker="o",
                ms=3,
                color="#c8643c",
                label="effect",
            )
            axes.plot(
                [r.coefficient for r in rows],
                [min(r.kl / self.bounds.kl, 1.5) for r in rows],
                marker="s",
                ms=3,
                color="#4878a8",
                label="KL / bound",
            )
            axes.axhline(self.bounds.effect, color="#c8643c", ls=":")
            axes.axhline(1, color="#4878a8", ls=":")
            if interval is not None:
                axes.axvspan(*interval, color="#70a070", alpha=0.2)
            sign = "+" if side == "plus" else "-"
            axes.set(xlabel="a", title=f"{SIDES[side].prompts} prompts under {sign}a")
            axes.legend(frameon=False, fontsize=8)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure
