"""Small charts as SVG text for the report: bars, lines, points and matrices.

Colours are CSS classes (s0, s1, ...), so light, dark and printed pages choose their own; series
also differ by dash and marker, so that no meaning rests on colour alone.
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


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    marks = "".join(
        f'<span class="key"><svg viewBox="0 0 26 10" aria-hidden="true"><path class="line s{i % 5}"'
        f' d="M1 5H25"/></svg>{escape(s.label)}</span>'
        for i, s in enumerate(series)
    )
    return f'<p class="legend">{marks}</p>'


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
            parts.append(
                f'<rect class="fill s{i % 5}" x="{x:.1f}" y="{y:.1f}" width="{w - 1:.1f}"'
                f' height="{max(0.0, frame.up(0) - y):.1f}"/>'
            )
            if s.low and s.low[j] is not None and s.high[j] is not None:
                low, high = frame.up(s.low[j] or 0.0), frame.up(s.high[j] or 0.0)
                parts.append(f'<path class="whisker" d="M{x + w / 2:.1f} {low:.1f}V{high:.1f}"/>')
    for j, name in enumerate(names):
        parts.append(_text(frame.across(j + 0.5), HEIGHT - BOTTOM + 16, name))
    return _svg(parts, title) + _legend(series)


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
    """A matrix of squares shaded by value, largest magnitude darkest, with the numbers where there
    is room.
    """
    side = min(46.0, (WIDTH - 120) / max(1, len(columns)), 420 / max(1, len(rows)))
    tall = TOP + side * len(rows) + 40
    most = max((abs(v) for row in values for v in row if v is not None), default=0) or 1
    parts = []
    for i, row in enumerate(values):
        parts.append(_text(112, TOP + side * (i + 0.5) + 4, rows[i], "end"))
        for j, v in enumerate(row):
            if v is None:
                continue
            x, y = 120 + side * j, TOP + side * i
            sign = "plus" if v >= 0 else "minus"
            parts.append(
                f'<rect class="cell {sign}" x="{x:.1f}" y="{y:.1f}" width="{side - 1:.1f}"'
                f' height="{side - 1:.1f}" fill-opacity="{abs(v) / most:.2f}"/>'
            )
            if side >= 30:
                parts.append(_text(x + side / 2, y + side / 2 + 4, f"{v:.2g}"))
    shown = max(1, -(-len(columns) * 34 // (WIDTH - 120)))
    every = range(0, len(columns), shown if side < 30 else 1)
    parts += [_text(120 + side * (j + 0.5), tall - 22, columns[j]) for j in every]
    return _svg(parts, title, tall)
