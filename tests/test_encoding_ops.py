"""The ops of sparse autoencoders against their float64 references. See test_ops.py."""

from __future__ import annotations

import numpy as np
import pytest

from op_bench import SIZES, agree, same_bits
from vksteer.verify import encoding


@pytest.mark.parametrize("gate", [False, True], ids=["jump", "gate"])
def test_feature_act(on, rng, gate):
    for n_tokens in (0, 1, 3, 33):
        for width in (*SIZES, 256, 600):
            agree(on, encoding.feature_act(rng, n_tokens, width, gate))


def test_a_value_at_its_threshold_is_not_active(on):
    """Strictly above: u = threshold gives 0, 0 < u <= threshold gives 0, and a negative u above its
    threshold stays.
    """
    problem = encoding.feature_act(np.random.default_rng(0), 1, 4)
    problem.buffers["x"][0, :4] = [0.5, 0.25, -0.5, 0.75]
    problem.buffers["threshold"][:] = [0.5, 0.5, -1, 0.5]
    assert agree(on, problem).device["x"][0, :4].tolist() == [0, 0, -0.5, 0.75]


@pytest.mark.parametrize(
    "counts", [(), (1,), (1, 7, 33), (0, 3, 0), (257, 2)], ids=lambda c: str(list(c))
)
def test_feature_sums(on, rng, counts):
    for width in (1, 33, 257, 600):
        for first in (0, 5):
            agree(on, encoding.feature_sums(rng, counts, width, first))


def test_a_segment_in_parts_has_the_same_sum(on, rng):
    whole = encoding.feature_sums(rng, (40,), 300)
    expected = agree(on, whole).device["sums"]
    sums = whole.buffers["sums"]
    for first, count in ((0, 13), (13, 1), (14, 26)):
        part = dict(whole.buffers, sums=sums)
        part["segments"] = np.array([[first, count, 0]], np.uint32)
        sums = on.run(whole.op, whole.arguments, part)[0]["sums"]
    assert same_bits(sums[0, :300], expected[0, :300])
