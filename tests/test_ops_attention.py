"""Rotation and attention against their float64 reference implementations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import BATCHES, D_HEADS, HEADS, agree, few, same_bits, seeds
from vksteer.verify import forward


@pytest.mark.parametrize("d_head", D_HEADS)
def test_rope(on, rng, d_head):
    for rows in BATCHES:
        for n_heads, n_kv_heads in HEADS[1:3]:
            for flags in (
                (),
                ("rotate",),
                ("store",),
                ("qk_norm", "rotate"),
                ("rotate", "store"),
                ("qk_norm", "rotate", "store"),
            ):
                agree(on, forward.rope(rng, rows, n_heads, n_kv_heads, d_head, flags))


def test_rope_in_steps_has_the_fused_bits(on, rng):
    problem = forward.rope(rng, [(0, 17), (5, 1)], 6, 2, 80)
    fused = on.run("rope", problem.arguments, problem.buffers)[0]
    buffers = dict(problem.buffers)
    for flags in (3, 4):
        buffers |= on.run("rope", problem.arguments | {"flags": flags}, buffers)[0]
    assert all(same_bits(buffers[name], fused[name]) for name in ("qkv", "k_cache", "v_cache"))


@pytest.mark.parametrize("d_head", D_HEADS)
def test_attention_over_head_sizes(on, rng, d_head):
    for rows in BATCHES:
        agree(on, forward.attn_scores(rng, rows, 4, 2, d_head))
        agree(on, forward.attn_output(rng, rows, 4, 2, d_head))
    agree(on, forward.attn_decode(rng, [0, 7, 36, 129], 4, 2, d_head))


@pytest.mark.parametrize("n_heads, n_kv_heads", HEADS)
def test_attention_over_head_groups(on, rng, n_heads, n_kv_heads):
    for alone in ([(0, 33)], [(5, 1), (0, 17), (30, 9)]):
        for frozen in (False, True):
            rows = [row for row in alone for _ in range(2)] if frozen else alone
            agree(
                on,
                forward.attn_scores(
                    rng, rows, n_heads, n_kv_heads, 16, softcap=5.0 * frozen, frozen=frozen
                ),
            )
            agree(on, forward.attn_output(rng, rows, n_heads, n_kv_heads, 16, frozen=frozen))
            agree(
                on,
                forward.attn_decode(
                    rng,
                    [9, 9, 31, 31],
                    n_heads,
                    n_kv_heads,
                    16,
                    softcap=5.0 * frozen,
                    frozen=frozen,
                ),
            )


@pytest.mark.parametrize("window", [0, 1, 5, 8, 1000])
def test_attention_windows(on, rng, window):
    for rows in BATCHES + [[(0, 257)]]:
        agree(on, forward.attn_softmax(rng, rows, 3, window))
        agree(on, forward.attn_output(rng, rows, 2, 1, 6, window))
    agree(on, forward.attn_decode(rng, [0, 3, 4, 5, 36, 256], 2, 1, 6, window))


def test_attention_on_a_part_of_the_chunk(on, rng):
    """Later tiles alone: what runs when the scores of all tokens would not fit."""
    rows = [(0, 17), (5, 1), (30, 9)]
    for tile in (1, 3, 5):
        agree(on, forward.attn_scores(rng, rows, 4, 2, 16, tile=tile))
        agree(on, forward.attn_softmax(rng, rows, 4, tile=tile))
        agree(on, forward.attn_output(rng, rows, 4, 2, 16, window=5, tile=tile))
    agree(on, forward.attn_decode(rng, [5, 1, 30], 4, 2, 16, first=1))


def test_softmax_of_large_scores(on, rng):
    for spread in (0.0, 30.0, 1e4):
        outcome = agree(on, forward.attn_softmax(rng, [(0, 33), (250, 1)], 2, spread=spread))
        pattern = np.nan_to_num(outcome.device["scores"].astype(np.float64))
        np.testing.assert_allclose(pattern.sum(-1), 1.0, rtol=2e-6)


@pytest.mark.parametrize("window, softcap", [(0, 0.0), (5, 0.0), (0, 3.0)])
@pytest.mark.parametrize("d_head", [6, 64, 80])
def test_decode_in_one_step_has_the_bits_of_three(on, rng, d_head, window, softcap):
    one = forward.attn_decode(rng, [0, 9, 36, 129], 4, 2, d_head, window, softcap)
    fused = on.run(one.op, one.arguments, one.buffers)[0]
    names = lambda *fields: {f: one.arguments[f] for f in fields}
    tiles = np.array([(t, 1) for t in range(4)], np.uint32)
    shared, sizes = (
        {"tokens": "tokens", "tiles": "tiles", "scores": "scores"},
        names("n_heads", "n_kv_heads", "d_head", "key_stride", "n_keys") | {"n_tiles": 4},
    )
    buffers = dict(one.buffers) | {"tiles": tiles}
    buffers |= on.run(
        "attn_scores",
        shared | sizes | names("stride", "scale", "softcap") | {"qkv": "qkv", "k_cache": "k_cache"},
        buffers,
    )[0]
    buffers |= on.run(
        "attn_softmax",
        {"scores": "scores", "tokens": "tokens", "n_tokens": 4}
        | names("n_heads", "key_stride", "window", "n_keys"),
        buffers,
    )[0]
    assert same_bits(buffers["scores"], fused["scores"])
    buffers |= on.run(
        "attn_output",
        {"pattern": "scores", "v_cache": "v_cache", "tokens": "tokens", "tiles": "tiles", "z": "z"}
        | sizes
        | names("z_stride", "window"),
        buffers,
    )[0]
    assert same_bits(buffers["z"], fused["z"])


@few
@given(
    seed=seeds,
    rows=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=5),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    window=st.sampled_from([0, 1, 3, 9]),
)
def test_any_attention(on, seed, rows, kv, group, half, window):
    rng = np.random.default_rng(seed)
    agree(on, forward.rope(rng, rows, kv * group, kv, 2 * half))
    agree(on, forward.attn_scores(rng, rows, kv * group, kv, 2 * half))
    agree(on, forward.attn_softmax(rng, rows, kv * group, window))
    agree(on, forward.attn_output(rng, rows, kv * group, kv, 2 * half, window))
    agree(
        on,
        forward.attn_decode(rng, [cached for cached, _ in rows], kv * group, kv, 2 * half, window),
    )
