"""Rotation of a part of a head, of neighbouring channels, with a second table for long rows and one
for queries: kernels, float64 references, and central differences.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import BATCHES, agree, few, same_bits, seeds
from test_backward_differences import matches, on_grid
from vksteer.verify import backward, forward

#: (channels of a head, how many of them are rotated)
PARTS = [(6, 2), (16, 16), (64, 16), (80, 20), (80, 32), (128, 64), (256, 254), (8, 0)]


@pytest.mark.parametrize("pairs", [(), ("interleaved",)], ids=["halves", "interleaved"])
@pytest.mark.parametrize("d_head, d_rot", PARTS)
def test_rope_of_a_part_of_the_head(on, rng, d_head, d_rot, pairs):
    for rows in BATCHES:
        for n_heads, n_kv_heads in ((4, 1), (6, 2)):
            for flags in (("rotate",), ("rotate", "store"), ("qk_norm", "rotate", "store")):
                for long_rows in (False, True):
                    agree(
                        on,
                        forward.rope(
                            rng,
                            rows,
                            n_heads,
                            n_kv_heads,
                            d_head,
                            (*flags, *pairs),
                            d_rot,
                            long_rows,
                        ),
                    )
            for flags in (("rotate",), ("qk_norm", "rotate")):
                agree(
                    on,
                    backward.rope_bwd(
                        rng, rows, n_heads, n_kv_heads, d_head, (*flags, *pairs), d_rot, True
                    ),
                )


def test_channels_that_are_not_rotated_stay_as_they_are(on, rng):
    problem = forward.rope(rng, [(0, 9), (5, 1)], 4, 2, 80, ("rotate", "store"), 20)
    device = on.run(problem.op, problem.arguments, problem.buffers)[0]
    before, after = (
        a[:, : 8 * 80].reshape(-1, 8, 80) for a in (problem.buffers["qkv"], device["qkv"])
    )
    assert same_bits(before[:, :6, 20:], after[:, :6, 20:]) and same_bits(
        before[:, 6:], after[:, 6:]
    )
    slots = problem.buffers["tokens"][:, 2]
    assert same_bits(device["k_cache"][slots].reshape(-1, 2, 80), after[:, 4:6])
    assert same_bits(device["v_cache"][slots].reshape(-1, 2, 80), after[:, 6:])


def test_interleaved_pairs_are_the_halves_in_another_order(on, rng):
    """Bit-identical, forward and backward."""
    order = np.arange(32).reshape(2, 16).T.reshape(-1)  # channel 2i is i of the first half
    for build, name in ((forward.rope, "qkv"), (backward.rope_bwd, "dqkv")):
        problem = build(rng, [(0, 9), (5, 1)], 4, 2, 80, ("rotate",), 32)
        halves = on.run(problem.op, problem.arguments, problem.buffers)[0][name]
        x = problem.buffers[name].copy()
        at = np.concatenate([np.arange(6)[:, None] * 80 + np.arange(32)]).reshape(6, 32)
        x[:, at] = x[:, at[:, order]]
        flags = problem.arguments["flags"] | 8
        turned = on.run(
            problem.op, problem.arguments | {"flags": flags}, problem.buffers | {name: x}
        )[0][name]
        assert same_bits(turned[:, at], halves[:, at[:, order]])


@pytest.mark.parametrize("flags", [("rotate",), ("qk_norm", "rotate")], ids="+".join)
@pytest.mark.parametrize("pairs", [(), ("interleaved",)], ids=["halves", "interleaved"])
def test_differences_of_a_rotated_part(on, rng, flags, pairs):
    rows, heads, flags = [(0, 3), (5, 2)], (4, 2, 10), (*flags, *pairs)
    back = backward.rope_bwd(rng, rows, *heads, flags, 4, True)
    back.buffers["qkv"][:, :80] = on_grid(rng, 5, 80)
    gradient = on.run(back.op, back.arguments, back.buffers)[1]["dqkv"]
    problem = forward.rope(rng, rows, *heads, flags, 4, True)
    names = ("qkv", "angles", "q_angles", "tokens", "q_gain", "k_gain")
    matches(
        on,
        rng,
        "rope",
        problem.arguments,
        problem.buffers | {name: back.buffers[name] for name in names},
        "qkv",
        {"qkv": np.nan_to_num(back.buffers["dqkv"]).astype(np.float64)},
        gradient,
    )


@few
@given(
    seed=seeds,
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=5),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    rotated=st.integers(0, 40),
    interleaved=st.booleans(),
    long_rows=st.booleans(),
)
def test_any_rotation(on, seed, rows, kv, group, half, rotated, interleaved, long_rows):
    rng, d_rot = np.random.default_rng(seed), 2 * min(half, rotated)
    flags = ("rotate", "store", *(("interleaved",) if interleaved else ()))
    agree(on, forward.rope(rng, rows, kv * group, kv, 2 * half, flags, d_rot, long_rows))
    flags = ("rotate", *(("interleaved",) if interleaved else ()))
    agree(on, backward.rope_bwd(rng, rows, kv * group, kv, 2 * half, flags, d_rot, long_rows))


@pytest.mark.parametrize("change", [{"d_rot": 3}, {"d_rot": 8}, {"d_head": 0}])
def test_parts_that_no_head_has_are_refused(on, rng, change):
    for problem in (
        forward.rope(rng, [(0, 9)], 4, 2, 6, ("rotate",)),
        backward.rope_bwd(rng, [(0, 9)], 4, 2, 6, ("rotate",)),
    ):
        with pytest.raises(ValueError, match="cannot be rotated"):
            on.run(problem.op, problem.arguments | change, problem.buffers)
