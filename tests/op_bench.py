"""What the tests of single ops share: shapes, settings of Hypothesis, and the comparison of a
kernel with its float64 reference. The fixtures `on` and `families` are in conftest.py.

The builders of problems, what is compared and the bounds (measured, with the measurement beside
them) are those of vksteer.verify; the tests choose the shapes. NaN fills all memory that an op
must neither read nor write, so reading a pad or writing one fails a test by itself.
"""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from vksteer.verify import checking as verify

SIZES = (1, 3, 7, 33, 257)
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 33)
#: Rows of a packed batch as (first position, tokens): none, one token, ragged tiles, cached tokens.
BATCHES = [[], [(0, 1)], [(0, 3), (0, 7)], [(0, 33)], [(5, 1), (0, 17), (30, 9), (256, 1), (0, 8)]]
#: (query heads, key/value heads)
HEADS = [(1, 1), (4, 1), (6, 2), (5, 5), (9, 3), (4, 2), (14, 2)]
D_HEADS = (2, 6, 16, 64, 80, 128, 256)

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
seeds = st.integers(0, 2**32 - 1)

#: op -> the largest error met so far and the problem it was met at
WORST: dict[str, tuple[float, str]] = {}


def agree(on, problem):
    """Runs the kernel and its reference on a problem and compares them; returns the outcome."""
    outcome = verify.check(on, problem)
    WORST[problem.op] = max(WORST.get(problem.op, (0.0, "")), (outcome.error, problem.label))
    assert outcome.error <= verify.BOUNDS[problem.op], (
        f"{problem.op}, {problem.label}: error {outcome.error:.2e} at {outcome.where}"
    )
    return outcome


def same_bits(a, b):
    return np.array_equal(
        np.ascontiguousarray(a).view(np.uint32), np.ascontiguousarray(b).view(np.uint32)
    )
