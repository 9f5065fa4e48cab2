"""Seconds that a call took, on an idle or a loaded machine."""

import time


def clocks() -> tuple[float, float]:
    """Wall time and the processor time of this process, in seconds."""
    return time.monotonic(), time.process_time()


def seconds_since(start: tuple[float, float]) -> float:
    """The lesser of the two since `start`: other programs lengthen the first, threads of a software
    driver the second.
    """
    return min(now - then for now, then in zip(clocks(), start, strict=True))
