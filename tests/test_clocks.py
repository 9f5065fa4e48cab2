"""The limit of a second that the tests of interrupts use. No device needed."""

from __future__ import annotations

import pytest

from clocks import clocks, within_a_second


@pytest.mark.parametrize(
    ("wall", "processor", "passes"),
    [
        (0.9, 0.9, True),
        (0.9, 0.0, True),
        (0.5, 1.6, True),  # several threads of a software driver
        (2.4, 0.9, True),  # another program had the processor
        (2.4, 1.1, False),
        (1.2, 0.0, False),  # a wait
        (2.4, 0.6, False),
        (11.0, 0.9, False),
    ],
)
def test_a_second_of_work_passes_and_a_wait_does_not(wall, processor, passes):
    assert within_a_second(wall, processor) == passes


def test_the_processor_clock_stands_still_in_a_wait():
    import time

    start = clocks()
    time.sleep(0.3)
    wall, processor = (now - then for now, then in zip(clocks(), start, strict=True))
    assert wall >= 0.3 and processor < 0.1 * wall
