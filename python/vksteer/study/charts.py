"""Small charts as SVG text for the report: bars, lines, points and matrices.

Colours are CSS classes (s0, s1, ...), so light, dark and printed pages choose their own. Lines
also differ by dash, bars by hatching, and cells below 0 are struck through or show their sign, so
that no meaning rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 46

Number = float | None


@dataclass(frozen=True)
class Series:
    """One line or group of bars. low, high: the ends of intervals, or empty."""

    label: str
    y: Sequence[Number]
    x: Sequence[float] = ()
    low: Sequence[Number] = field(default_factory=tuple)
    high: Sequence[Number] = field(default_factory=tuple)


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    span = high - low or 1.0
    step = 10.0 ** _floor_log(span / 4)
    for factor in (1, 2, 5, 10):
        if span / (step * factor) <= 6:
            step *= factor
            break
    first = -(-low // step) * step
    return [first + i * step for i in range(int((high - first) / step + 1e-9) + 1)]


def _floor_log(value: float) -> int:
    exponent = 0
    while value >= 10:
        value, exponent = value / 10, exponent + 1
    while value < 1:
        value, exponent = value * 10, exponent - 1
    return exponent


class _Frame:
    """The axes of a chart: maps values to places."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.across(x), self.up(y)

    def across(self, x: float) -> float:
        low, high = self.x
        return LEFT + (x - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def up(self, y: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (y - low) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def y_axis(self, label: str) -> list[str]:
        parts = []
        for t in _ticks(*self.y):
            y = self.up(t)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(LEFT - 6, y + 4, f"{t:g}", "end"))
        turn = f' transform="rotate(-90 12 {HEIGHT / 2:.0f})"'
        return [*parts, _text(12, HEIGHT / 2, label, "middle", turn)]

    def x_axis(self, label: str) -> list[str]:
        parts = [_text(self.across(t), HEIGHT - BOTTOM + 16, f"{t:g}") for t in _ticks(*self.x)]
        return [*parts, _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, label)]


def _svg(parts: Sequence[str], title: str, height: float = HEIGHT) -> str:
    body = "".join(parts)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img"'
        f' aria-label="{escape(title, quote=True)}">{body}</svg>'
    )


def _legend(series: Sequence[Series], bar: bool = False) -> str:
    if len(series) < 2:
        return ""
    marks = []
    for i, s in enumerate(series):
        mark = f'<path class="line s{i % 5}" d="M1 6H25"/>'
        if bar:
            mark = f'<rect class="fill s{i % 5}" width="26" height="12"/>{_hatch(i, 0, 0, 26, 12)}'
        drawing = f'<svg viewBox="0 0 26 12" aria-hidden="true">{mark}</svg>'
        marks.append(f'<span class="key">{drawing}{escape(s.label)}</span>')
    return f'<p class="legend">{"".join(marks)}</p>'


def _hatch(i: int, x: float, y: float, width: float, height: float) -> str:
    """Lines over the bars of series i: none, level, upright, both, and closer level ones."""
    step = 3 if i % 5 == 4 else 5
    level = [] if i % 5 in (0, 2) else [y + step * k for k in range(1, 1 + int(height // step))]
    upright = [] if i % 5 in (0, 1, 4) else [x + 4 * k for k in range(1, 1 + int(width // 4))]
    parts = [f"M{x:.1f} {v:.1f}h{width:.1f}" for v in level if v < y + height]
    parts += [f"M{v:.1f} {y:.1f}v{height:.1f}" for v in upright if v < x + width]
    return f'<path class="hatch" d="{"".join(parts)}"/>' if parts else ""


def bars(title: str, names: Sequence[str], series: Sequence[Series], y_label: str) -> str:
    """Grouped bars from 0 to 1 with intervals."""
    frame = _Frame((0, len(names)), (0, 1))
    parts = frame.y_axis(y_label)
    wide = 0.8 / len(series)
    for i, s in enumerate(series):
        for j, value in enumerate(s.y):
            if value is None:
                continue
            x, y = frame.at(j + 0.1 + wide * i, value)
            w = frame.across(wide) - frame.across(0)
            tall = max(0.0, frame.up(0) - y)
            parts.append(
                f'<rect class="fill s{i % 5}" x="{x:.1f}" y="{y:.1f}" width="{w - 1:.1f}"'
                f' height="{tall:.1f}"/>{_hatch(i, x, y, w - 1, tall)}'
            )
            if s.low and s.low[j] is not None and s.high[j] is not None:
                low, high = frame.up(s.low[j] or 0.0), frame.up(s.high[j] or 0.0)
                parts.append(f'<path class="whisker" d="M{x + w / 2:.1f} {low:.1f}V{high:.1f}"/>')
    for j, name in enumerate(names):
        parts.append(_text(frame.across(j + 0.5), HEIGHT - BOTTOM + 16, name))
    return _svg(parts, title) + _legend(series, bar=True)


def lines(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Lines with markers and interval bands."""
    points = [(x, y) for s in series for x, y in zip(s.x, s.y, strict=True) if y is not None]
    points += [(x, y) for s in series for x, y in zip(s.x, s.low) if y is not None]
    points += [(x, y) for s in series for x, y in zip(s.x, s.high) if y is not None]
    if not points:
        return ""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    frame = _Frame((min(xs), max(xs)), (min(0.0, *ys), max(1.0, *ys)))
    parts = frame.y_axis(y_label) + frame.x_axis(x_label)
    for i, s in enumerate(series):
        band = [
            (x, low, high)
            for x, low, high in zip(s.x, s.low, s.high)
            if low is not None and high is not None
        ]
        if band:
            there = [frame.at(x, high) for x, _, high in band]
            back = [frame.at(x, low) for x, low, _ in reversed(band)]
            parts.append(f'<path class="band s{i % 5}" d="{_path([*there, *back])}Z"/>')
        places = [frame.at(x, y) for x, y in zip(s.x, s.y, strict=True) if y is not None]
        parts.append(f'<path class="line s{i % 5}" d="{_path(places)}"/>')
        parts += [
            f'<circle class="dot s{i % 5}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places
        ]
    return _svg(parts, title) + _legend(series)


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def points(title: str, x: Sequence[float], y: Sequence[float], x_label: str, y_label: str) -> str:
    """Points on axes of one scale, with the diagonal on which both are equal."""
    low, high = min(*x, *y, 0.0), max(*x, *y, 0.0)
    frame = _Frame((low, high), (low, high))
    parts = frame.y_axis(y_label) + frame.x_axis(x_label)
    parts.append(f'<path class="whisker" d="{_path([frame.at(low, low), frame.at(high, high)])}"/>')
    for a, b in zip(x, y, strict=True):
        across, up = frame.at(a, b)
        parts.append(f'<circle class="dot s0" cx="{across:.1f}" cy="{up:.1f}" r="3"/>')
    return _svg(parts, title)


def matrix(
    title: str, rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[Number]]
) -> str:
    """A matrix of cells shaded by value, largest magnitude darkest, with the numbers where there
    is room.
    """
    wide = min(46.0, (WIDTH - 120) / max(1, len(columns)))
    high = min(max(wide, 18.0), 46.0, 420 / max(1, len(rows)))
    most = max((abs(v) for row in values for v in row if v is not None), default=0) or 1
    parts = []
    for i, row in enumerate(values):
        y = TOP + high * i
        parts.append(_text(112, y + high / 2 + 4, rows[i], "end"))
        for j, v in enumerate(row):
            if v is not None:
                parts.append(_cell(v, v / most, 120 + wide * j, y, wide, high))
    below = TOP + high * len(rows)
    if wide >= 30:
        parts += [_text(120 + wide * (j + 0.5), below + 18, name) for j, name in enumerate(columns)]
        return _svg(parts, title, below + 40)
    for j in range(0, len(columns), max(1, -(-12 // int(max(1, wide))))):
        x = 120 + wide * (j + 0.5) + 3
        turn = f' class="small" transform="rotate(-60 {x:.1f} {below + 8:.1f})"'
        parts.append(_text(x, below + 8, columns[j], "end", turn))
    return _svg(parts, title, below + 60)


def _cell(value: float, share: float, x: float, y: float, wide: float, high: float) -> str:
    """One cell; a negative one that has no room for its number is struck through."""
    shape = (
        f'<rect class="cell {"minus" if value < 0 else "plus"}" x="{x:.1f}" y="{y:.1f}"'
        f' width="{wide - 1:.1f}" height="{high - 1:.1f}" fill-opacity="{abs(share):.2f}"/>'
    )
    if wide >= 30:
        return shape + _text(x + wide / 2, y + high / 2 + 4, f"{value:.2g}")
    if share > -0.05:
        return shape
    middle = y + high / 2
    return shape + f'<path class="strike" d="M{x + 1:.1f} {middle:.1f}h{wide - 3:.1f}"/>'
