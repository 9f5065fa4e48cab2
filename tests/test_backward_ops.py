"""The backward ops against their float64 references: row by row, attention, scalars of the logits.

test_backward_linear.py has the weight matrices, test_backward_differences.py compares the
references with central differences of the forward ops.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import BATCHES, HEADS, SIZES, agree, few, same_bits, seeds
from vksteer.verify import backward, problems

# -- row by row ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("add",),
        ("rows",),
        ("rows", "add"),
        ("write_scale",),
        ("write_scale", "no_out"),
        ("write_normalized",),
        ("write_scale", "write_normalized", "add"),
        ("normalized",),
        ("normalized", "write_normalized", "add"),
        ("normalized", "write_scale", "no_out"),
    ],
    ids="+".join,
)
def test_norm_bwd(on, rng, flags):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, backward.norm_bwd(rng, rows, width, flags))
    agree(on, backward.norm_bwd(rng, 7, 33, flags, in_place=True))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_norm_bwd_of_small_and_large_values(on, rng, scale):
    agree(on, backward.norm_bwd(rng, 3, 257, ("write_scale", "write_normalized"), scale=scale))


@pytest.mark.parametrize(
    "flags",
    [
        ("layer",),
        ("layer", "add", "rows"),
        ("layer", "write_scale", "write_normalized", "add"),
        ("layer", "write_scale", "no_out"),
        ("layer", "normalized", "write_normalized", "add"),
    ],
    ids="+".join,
)
def test_layer_norm_bwd(on, rng, flags):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, backward.norm_bwd(rng, rows, width, flags, mean=rows % 3))
    for groups, width in ((1, 33), (2, 3), (5, 80), (32, 128)):
        agree(on, backward.norm_bwd(rng, 7, width, flags, groups=groups, mean=-1.0))
        agree(on, backward.norm_bwd(rng, 7, width, flags, groups=groups, in_place=True))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_layer_norm_bwd_of_small_and_large_values(on, rng, scale):
    flags = ("layer", "write_scale", "write_normalized")
    agree(on, backward.norm_bwd(rng, 3, 257, flags, scale=scale, mean=2.0))


@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
def test_act_bwd(on, rng, kind):
    for n_tokens in (0, 1, 3, 33):
        for width in SIZES:
            for plain in (False, True):
                agree(on, backward.act_bwd(rng, n_tokens, width, kind, plain=plain))


@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
def test_act_bwd_everywhere(on, rng, kind):
    gate = np.concatenate(
        [
            np.linspace(-12, 12, 193),
            [0.0, -0.0, 1e-30, -1e-30, 88, -88, 104, -104, 1e4, -1e4, 1e10, -1e10],
        ]
    ).astype(np.float32)
    for plain in (False, True):
        problem = backward.act_bwd(rng, 1, len(gate), kind, gate=gate[None], plain=plain)
        columns = len(gate) if plain else 2 * len(gate)
        assert np.isfinite(agree(on, problem).device["dgate_up"][0, :columns]).all()


# -- attention -------------------------------------------------------------------------------------


@pytest.mark.parametrize("d_head", [2, 6, 16, 64, 80, 128, 256])
def test_rope_bwd(on, rng, d_head):
    for rows in BATCHES:
        for n_heads, n_kv_heads in HEADS[1:3]:
            for flags in ((), ("rotate",), ("qk_norm",), ("qk_norm", "rotate")):
                agree(on, backward.rope_bwd(rng, rows, n_heads, n_kv_heads, d_head, flags))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 1000])
def test_attn_softmax_bwd(on, rng, window, softcap):
    for rows in BATCHES + [[(0, 257)]]:
        agree(on, backward.attn_softmax_bwd(rng, rows, 3, window, softcap))
    for tile in (1, 3, 5):
        agree(
            on, backward.attn_softmax_bwd(rng, [(0, 17), (0, 1), (0, 19)], 4, window, softcap, tile)
        )


LENGTHS = [(), (1,), (3, 7), (33,), (1, 17, 9, 70, 8)]


@pytest.mark.parametrize("d_head", [2, 6, 16, 64, 80, 128, 256])
def test_attn_output_bwd_over_head_sizes(on, rng, d_head):
    for rows in LENGTHS:
        agree(on, backward.attn_output_bwd(rng, rows, 4, 2, d_head))


@pytest.mark.parametrize("n_heads, n_kv_heads", HEADS)
def test_attn_output_bwd_over_head_groups(on, rng, n_heads, n_kv_heads):
    for rows in LENGTHS:
        for window in (0, 4):
            agree(on, backward.attn_output_bwd(rng, rows, n_heads, n_kv_heads, 16, window))


@pytest.mark.parametrize("window", [0, 1, 5, 8, 1000])
def test_attn_output_bwd_windows_and_pieces(on, rng, window):
    for rows in LENGTHS + [(257,)]:
        for pieces in (1, 2, 3):
            for piece in range(pieces):
                agree(on, backward.attn_output_bwd(rng, rows, 2, 1, 6, window, pieces, piece))


@pytest.mark.parametrize("window", [0, 5])
def test_attn_output_bwd_in_pieces_has_the_whole_bits(on, rng, window):
    problem = backward.attn_output_bwd(rng, (17, 1, 33), 6, 2, 80, window)
    n, buffers, arguments = 51, problem.buffers, problem.arguments
    want = on.run("attn_output_bwd", arguments, buffers)[0]["sums"]
    for cuts in ((25,), (1, 17, 18), (8, 16, 24, 50)):
        sums = buffers["sums"]
        for first, last in zip((0, *cuts), (*cuts, n)):
            sums = on.run(
                "attn_output_bwd",
                arguments | {"first_token": first, "last_token": last, "add": int(first > 0)},
                buffers | {"a": buffers["a"][first:last].copy(), "sums": sums},
            )[0]["sums"]
        assert same_bits(sums, want), f"cut at {cuts}"
    for skip in (1, 2, 4):  # from a later tile of keys on
        later = buffers["tiles"][skip:].copy()
        got = on.run(
            "attn_output_bwd", arguments | {"n_tiles": len(later)}, buffers | {"tiles": later}
        )[0]["sums"]
        assert (
            same_bits(got[later[0, 0] :], want[later[0, 0] :])
            and np.isnan(got[: later[0, 0]]).all()
        )
    rows = [slice(0, 17), slice(17, 18), slice(18, 51)]
    for r, tokens in enumerate(rows):  # a row alone
        packed = problems.Packed([(0, (17, 1, 33)[r])])
        alone = buffers | {
            "a": buffers["a"][tokens].copy(),
            "y": buffers["y"][tokens].copy(),
            "sums": buffers["sums"][tokens].copy(),
            "tokens": packed.tokens,
            "tiles": packed.tiles,
        }
        got = on.run(
            "attn_output_bwd",
            arguments
            | {
                "first_token": 0,
                "last_token": len(packed.tokens),
                "n_tiles": len(packed.tiles),
            },
            alone,
        )[0]["sums"]
        assert same_bits(got, want[tokens])


# -- scalars of the logits -------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_pair_grad(on, rng, softcap):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, backward.pair_grad(rng, rows, width, softcap))


@pytest.mark.parametrize("softcap", [0.0, 5.0, 30.0])
@pytest.mark.parametrize("kind", range(3), ids=backward.SCALARS)
def test_logit_grad(on, rng, kind, softcap):
    for rows in (0, 1, 3, 9):
        for width in (*SIZES, 1024, 5000):
            agree(on, backward.logit_grad(rng, rows, width, kind, softcap))
    for spread in (0.0, 1e-3, 50.0):
        agree(on, backward.logit_grad(rng, 3, 257, kind, softcap, spread))
        agree(
            on,
            backward.logit_grad(
                rng,
                3,
                257,
                kind,
                softcap,
                spread,
                reference_softcap=5.0 - softcap if softcap <= 5.0 else 7.0,
            ),
        )


def test_a_divergence_from_itself_is_nothing(on, rng):
    problem = backward.logit_grad(rng, 3, 1000, 1)
    problem.buffers["reference"] = problem.buffers["logits"].copy()
    device, _ = on.run(problem.op, problem.arguments, problem.buffers)
    assert np.array_equal(device["values"], np.zeros(3)) and np.array_equal(
        device["logits"], np.zeros_like(device["logits"])
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda rng: backward.norm_bwd(rng, 33, 257, ("add", "write_scale", "write_normalized")),
        lambda rng: backward.act_bwd(rng, 33, 257, 1),
        lambda rng: backward.pair_grad(rng, 33, 257, 5.0),
        lambda rng: backward.logit_grad(rng, 33, 257, 2, 5.0),
    ],
    ids=["norm_bwd", "act_bwd", "pair_grad", "logit_grad"],
)
def test_a_row_alone_has_the_bits_of_a_row_in_company(on, rng, build):
    problem = build(rng)
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]
    count = "n_tokens" if "n_tokens" in problem.arguments else "n_rows"
    for r in (0, 7, 32):
        cut = {
            name: (
                array
                if name == "gain"
                else array[2 * r : 2 * r + 2].copy()
                if name == "rows"
                else array[r : r + 1].copy()
            )
            for name, array in problem.buffers.items()
        }
        alone = on.run(problem.op, problem.arguments | {count: 1}, cut)[0]
        for name in alone:
            if name not in ("gain", "rows"):
                assert same_bits(alone[name], whole[name][r : r + 1]), name


# -- any shape -------------------------------------------------------------------------------------


@few
@given(
    seed=seeds,
    rows=st.lists(st.integers(1, 30), max_size=5),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 40),
    window=st.sampled_from([0, 1, 3, 9]),
    pieces=st.integers(1, 3),
)
def test_any_attention_bwd(on, seed, rows, kv, group, half, window, pieces):
    rng = np.random.default_rng(seed)
    agree(on, backward.rope_bwd(rng, [(0, n) for n in rows], kv * group, kv, 2 * half))
    agree(on, backward.attn_softmax_bwd(rng, [(0, n) for n in rows], kv * group, window))
    for piece in range(pieces):
        agree(
            on, backward.attn_output_bwd(rng, rows, kv * group, kv, 2 * half, window, pieces, piece)
        )


@few
@given(
    seed=seeds,
    n_tokens=st.integers(1, 20),
    width=st.integers(1, 300),
    kind=st.integers(0, 4),
    softcap=st.sampled_from([0.0, 3.0]),
)
def test_any_row_op_bwd(on, seed, n_tokens, width, kind, softcap):
    rng = np.random.default_rng(seed)
    agree(
        on,
        backward.norm_bwd(
            rng,
            n_tokens,
            width,
            [
                f
                for f in ("add", "rows", "normalized", "write_scale", "write_normalized")
                if rng.integers(2)
            ],
        ),
    )
    agree(on, backward.act_bwd(rng, n_tokens, width, kind, plain=bool(rng.integers(2))))
    agree(on, backward.pair_grad(rng, n_tokens, width, softcap))
    agree(on, backward.logit_grad(rng, n_tokens, width, kind % 3, softcap))


# -- the bench -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, change",
    [
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"first_n": 8}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"n_sum": 17}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"first_k": 16, "n_k": 48}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"x_stride": 32}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"y_stride": 32}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"dy": ("dy", 1)}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"n": 300}),
        (lambda rng: backward.linear_bwd(rng, 3, 45, 33), {"family_plus_1": 99}),
        (lambda rng: backward.attn_output_bwd(rng, (9,), 4, 2, 6), {"n_kv_heads": 3}),
        (lambda rng: backward.attn_output_bwd(rng, (9,), 4, 2, 6), {"key_stride": 8}),
        (lambda rng: backward.attn_output_bwd(rng, (9,), 4, 2, 6), {"n_tiles": 9}),
        (lambda rng: backward.attn_softmax_bwd(rng, [(0, 9)], 4), {"key_stride": 4}),
        (lambda rng: backward.rope_bwd(rng, [(0, 9)], 4, 2, 6), {"d_head": 5}),
        (lambda rng: backward.act_bwd(rng, 3, 7), {"act": 5}),
        (lambda rng: backward.logit_grad(rng, 3, 7), {"kind": 3}),
        (lambda rng: backward.norm_bwd(rng, 3, 7), {"flags": 32}),
    ],
)
def test_senseless_sizes_are_refused(on, rng, build, change):
    problem = build(rng)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)
    agree(on, problem)
