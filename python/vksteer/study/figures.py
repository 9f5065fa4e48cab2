"""A figure of the report, and how its numbers and rates are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from .charts import Series

#: What each finished step found, as in results.json.
Steps: TypeAlias = Mapping[str, Mapping[str, Any]]
WILSON = "Intervals are 95 % Wilson intervals."


@dataclass(frozen=True)
class Figure:
    """title; sentence: what it means; chart: SVG or ""; head, rows: its data; note: sample counts
    and intervals. part: a file of the page that draws `data`, or "".
    """

    title: str
    sentence: str
    chart: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str
    part: str = ""
    data: Any = None


def number(value: Any, digits: int = 3) -> str:
    """A number for a table; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def rate(found: Mapping[str, Any]) -> str:
    """A rate with its interval."""
    return f"{found['asr']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def rates(label: str, found: Sequence[Mapping[str, Any]], x: Sequence[float] = ()) -> Series:
    """One series of rates with their intervals."""
    return Series(
        label,
        [r["asr"] for r in found],
        x,
        [r["low"] for r in found],
        [r["high"] for r in found],
    )
