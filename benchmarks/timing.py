"""Comparisons: calls that take turns, their medians, and the rows of a result."""

from __future__ import annotations

import statistics
import time


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def take_turns(calls: dict, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` times in turn, so that other load slows all of them alike."""
    for call in calls.values():
        for _ in range(warm_up):
            call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return times


def summary(times: list[float]) -> dict:
    return {
        "median_s": statistics.median(times),
        "fastest_s": min(times),
        "slowest_s": max(times),
        "n": len(times),
    }


def row(
    what: str, value: float, unit: str, *, target: str = "", met: bool | None = None, **details
) -> dict:
    """One row of a result: a figure, its target and details. A ratio is the peer's time divided by
    ours.
    """
    return {"what": what, "value": value, "unit": unit, "target": target, "met": met, **details}


def at_least(what, value, least, unit="x", **details) -> dict:
    return row(what, value, unit, target=f">= {least:g}", met=value >= least, **details)


def at_most(what, value, most, unit, **details) -> dict:
    return row(what, value, unit, target=f"<= {most:g}", met=value <= most, **details)
