"""How long a call took, for tests that must hold on an idle and on a loaded machine."""

import time


def clocks() -> tuple[float, float]:
    """Wall time and the processor time of this process, in seconds."""
    return time.monotonic(), time.process_time()


def within_a_second(wall: float, processor: float) -> bool:
    """Whether a call answered within a second, or would have without the machine's other programs.

    More than a second of wall time passes only where the process computed for much of it: a call
    that merely waits, for a device, a lock or a sleep, uses no processor time and is never excused.
    """
    return wall < 1.0 or (wall < 10.0 and 0.3 * wall < processor < 1.0)


def assert_within_a_second(start: tuple[float, float]) -> None:
    """start: clocks() at the beginning of the call."""
    wall, processor = (now - then for now, then in zip(clocks(), start, strict=True))
    assert within_a_second(wall, processor), (
        f"{wall:.2f} s, of which {processor:.2f} s of processor time"
    )
