"""The sample counts that a budget chooses among: a ladder from the tiny size to the full one."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from ..base.checks import is_number
from .settings import SIZES, Settings

#: Between the tiny and the small size: as many prompts and samples as intervals and held-out halves
#: need, while answers, coefficients and training stay short.
PROMPTS: dict[str, Any] = {
    **SIZES["tiny"],
    "train": 64,
    "validation": 16,
    "test": 64,
    "samples": 32,
    "patches": 40,
    "epochs": 2,
    "grid": 0.05,
}
#: The same with the small size's answers, coefficients, shares and thresholds.
ANSWERS: dict[str, Any] = {
    **SIZES["small"],
    "train": 80,
    "validation": 32,
    "test": 72,
    "samples": 40,
}
#: Rungs at which the counts are those named; the rungs between them are interpolated.
FIXED = (SIZES["tiny"], PROMPTS, ANSWERS, SIZES["full"])
BETWEEN = 12

_PARTS = re.compile(r"\s*(?:(\d+(?:\.\d+)?)h)?\s*(?:(\d+(?:\.\d+)?)m)?\s*(?:(\d+(?:\.\d+)?)s)?\s*")


def seconds_of(budget: object) -> float:
    """A budget in seconds: a number above 0, or a text such as "90s", "30m" or "1h30m".

    Raises ValueError for anything else.
    """
    if isinstance(budget, str):
        match = _PARTS.fullmatch(budget.lower())
        parts = [float(x or 0) for x in match.groups()] if match else []
        value = sum(x * unit for x, unit in zip(parts, (3600, 60, 1), strict=False))
    else:
        value = float(budget) if is_number(budget) else 0.0
    if not 0 < value < 1e9:
        raise ValueError(
            f"budget={budget!r}: use a time above 0 with its unit, such as '90s', '30m' or"
            " '1h30m', or a number of seconds"
        )
    return value


def said(seconds: float) -> str:
    """A time as `seconds_of` reads it, to about two digits, rounded up: "85s", "14m", "1h10m"."""
    whole = -(-seconds // 1)
    if whole < 120:
        return f"{whole:.0f}s"
    minutes = int(-(-seconds // 60))
    hours, rest = divmod(minutes, 60)
    return f"{minutes}m" if minutes < 120 else f"{hours}h" + (f"{rest}m" if rest else "")


def rungs(seed: int = 0) -> list[Settings]:
    """Settings from the tiny size to the full one; no count falls from one rung to the next."""
    found = []
    for low, high in pairwise(FIXED):
        found += [_between(low, high, i / BETWEEN) for i in range(BETWEEN)]
    return [Settings.of_counts("budget", counts, seed) for counts in [*found, FIXED[-1]]]


def _between(low: dict[str, Any], high: dict[str, Any], share: float) -> dict[str, Any]:
    """Numbers on the way from low to high, in equal factors; lists are those of `low`."""
    counts: dict[str, Any] = {}
    for name, a in low.items():
        if isinstance(a, tuple):
            counts[name] = a
            continue
        value = a * (high[name] / a) ** share
        counts[name] = round(value) if isinstance(a, int) else round(value, 3)
    return counts
