"""Every op against its float64 reference over awkward shapes: 1, 3, 7, 33, 257, ragged tiles,
empty lists, every flag.

op_bench.py has the comparison and the shapes that these tests share with those of other ops.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from child import tool
from op_bench import BATCHES, D_HEADS, HEADS, ROWS, SIZES, agree, few, same_bits, seeds
from vksteer import _engine
from vksteer.cli import commands as cli
from vksteer.errors import DeviceError
from vksteer.runtime.device import choose
from vksteer.verify import checking as verify
from vksteer.verify import forward, problems

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def fusing():
    """For tests of kernels that normalise their own input: their order of sums is norm.comp's only
    where a workgroup is one subgroup.
    """
    if choose(None).type != "software":
        pytest.skip(
            "only software devices fuse: a GPU's workgroup is not one subgroup, and it is refused"
            " there"
        )


# -- the table of calls ----------------------------------------------------------------------------


def test_every_op_can_be_called_and_has_a_reference():
    header = (ROOT / "csrc/ops/ops.h").read_text()
    declared = set(re.findall(r"^int op_(\w+)\(struct ops \*ops, const struct", header, re.M))
    assert {name for name, _, _ in _engine.ops()} == declared
    assert (
        set(
            re.findall(
                r"^void reference_(\w+)\(", (ROOT / "csrc/reference/reference.h").read_text(), re.M
            )
        )
        == declared
    )
    assert set(verify.BOUNDS) == declared == {problem.op for problem in verify.problems()}


@pytest.mark.parametrize("op", _engine.ops(), ids=lambda op: op[0])
def test_no_field_is_forgotten(op):
    """The fields of an argument block fill it without gap or overlap, but
    for padding at its end.
    """
    _, params_bytes, fields = op
    at = 0
    for _, kind, offset in sorted(fields, key=lambda f: f[2]):
        if params_bytes and offset < params_bytes:
            assert offset == at
            at += 8 if kind == "address" else 4
    assert at in (params_bytes, params_bytes - 4)


# -- matrices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize(
    "n, k", [(1, 1), (3, 7), (33, 33), (31, 16), (77, 53), (257, 129), (65, 257)]
)
def test_linear(on, families, rng, n, k, weight_type):
    for i, rows in enumerate(ROWS):
        for family in families:
            for decode in (0, 1):
                agree(
                    on,
                    forward.linear(
                        rng,
                        rows,
                        n,
                        k,
                        weight_type,
                        bias=i % 2 == 0,
                        add=i % 3 == 0,
                        softcap=3.0 * (i % 4 == 0),
                        family=family,
                        decode=decode,
                    ),
                )


PAIRS = [
    ("gate", {"width": 1}),
    ("gate", {"width": 77, "act": 1}),
    ("gate", {"width": 160, "act": 2}),
    ("rotate", {"heads": (1, 1, 2)}),
    ("rotate", {"heads": (4, 2, 10)}),
    ("rotate", {"heads": (3, 1, 64)}),
    ("rotate", {"heads": (6, 2, 80)}),
]


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("kind, shape", PAIRS, ids=str)
def test_linear_pairs(on, families, rng, kind, shape, weight_type):
    for rows in (1, 2, 3, 5, 8, 17):
        for family in families:
            agree(
                on,
                forward.linear_pairs(
                    rng, rows, 53, kind, weight_type, bias=rows % 2 == 0, family=family, **shape
                ),
            )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("kind, shape", PAIRS, ids=str)
def test_linear_pairs_have_the_bits_of_the_steps_that_they_replace(
    on, fusing, families, rng, kind, shape, weight_type
):
    """Norm, product, and act or rope, each by its own kernel: what a run does where somebody
    looks at what lies between. (Only devices whose workgroups are one subgroup fuse, which
    software devices are.)
    """
    for rows in (1, 2, 4, 7):
        problem = forward.linear_pairs(rng, rows, 53, kind, weight_type, bias=True, **shape)
        a, b = problem.arguments, problem.buffers
        x_stride, n = a["x_stride"], a["n"]
        normed = on.run(
            "norm",
            {
                "x": "x",
                "gain": "gain",
                "dst": "dst",
                "width": 53,
                "stride": x_stride,
                "n_rows": rows,
                "eps": a["eps"],
                "flags": 0,
            },
            {"x": b["x"], "gain": b["gain"], "dst": np.zeros((rows, x_stride), np.float32)},
        )[0]["dst"]
        stride = problems.row_stride(n)
        out = on.run(
            "linear",
            {
                "x": "x",
                "dst": "dst",
                "weights": "weights",
                "bias": "bias",
                "weight_type": weight_type,
                "n": n,
                "k": 53,
                "n_rows": rows,
                "x_stride": x_stride,
                "dst_stride": stride,
            },
            {
                "x": normed,
                "weights": b["weights"],
                "bias": b["bias"],
                "dst": np.zeros((rows, stride), np.float32),
            },
        )[0]["dst"]
        if kind == "gate":
            width = n // 2
            want = {
                "dst": on.run(
                    "act",
                    {
                        "gate_up": "x",
                        "dst": "dst",
                        "width": width,
                        "in_stride": stride,
                        "out_stride": a["dst_stride"],
                        "act": a["act"],
                        "n_tokens": rows,
                    },
                    {"x": out, "dst": b["dst"]},
                )[0]["dst"]
            }
        else:
            turned = on.run(
                "rope",
                {
                    "qkv": "x",
                    "n_heads": a["n_heads"],
                    "n_kv_heads": a["n_kv_heads"],
                    "d_head": a["d_head"],
                    "stride": stride,
                    "eps": 1e-6,
                    "flags": 6,
                    "n_tokens": rows,
                }
                | {name: name for name in ("angles", "tokens", "k_cache", "v_cache")},
                {"x": out} | {name: b[name] for name in ("angles", "tokens", "k_cache", "v_cache")},
            )[0]
            width = a["n_heads"] * a["d_head"]
            want = {"dst": turned["x"], "k_cache": turned["k_cache"], "v_cache": turned["v_cache"]}
        for family in [f for f in families if f < 2]:
            got = on.run("linear_pairs", a | {"family_plus_1": family + 1}, b)[0]
            for name, array in want.items():
                columns = slice(None, width) if name == "dst" else slice(None)
                assert same_bits(got[name][:, columns], array[:, columns]), (
                    f"{name}, {rows} rows, family {family}"
                )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_gives_a_row_the_same_bits_whatever_is_beside_it(on, families, rng, weight_type):
    """In each phase: for every number of rows, every place among them, and in prefill for
    every family of kernels.
    """
    whole = forward.linear(rng, 33, 77, 100, weight_type, bias=True, add=True, softcap=4.0)
    prefill = on.run(whole.op, whole.arguments, whole.buffers)[0]["dst"]
    for family in families:
        for decode in (0, 1):
            want = on.run(
                whole.op,
                whole.arguments | {"family_plus_1": family + 1, "decode": decode},
                whole.buffers,
            )[0]["dst"]
            assert decode or same_bits(want, prefill), f"family {family}"
            for rows in ROWS:
                for first in {0, 33 - rows, (33 - rows) // 2}:
                    part = {
                        name: (
                            array[first : first + rows].copy()
                            if name in ("x", "add", "dst")
                            else array
                        )
                        for name, array in whole.buffers.items()
                    }
                    got = on.run(
                        whole.op,
                        whole.arguments
                        | {
                            "n_rows": rows,
                            "family_plus_1": family + 1,
                            "decode": decode,
                        },
                        part,
                    )[0]["dst"]
                    assert same_bits(got, want[first : first + rows]), (
                        f"{rows} rows from {first}, family {family}, decode {decode}"
                    )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_slices_and_chunks(on, families, rng, weight_type):
    for family in families:
        for first_k, n_k in ((0, 16), (16, 48), (64, 16), (32, 64)):
            agree(
                on,
                forward.linear(
                    rng, 9, 45, 96, weight_type, first_k=first_k, n_k=n_k, family=family
                ),
            )
        # reaches into the pad
        agree(on, forward.linear(rng, 3, 45, 90, weight_type, first_k=80, n_k=16, family=family))
        for rows in (1, 5, 33):
            for chunk_rows in (32, 64, 96):
                agree(
                    on,
                    forward.linear(
                        rng,
                        rows,
                        130,
                        33,
                        weight_type,
                        bias=True,
                        add=True,
                        chunk_rows=chunk_rows,
                        family=family,
                    ),
                )


def test_linear_chunks_change_no_bit(on, rng):
    problem = forward.linear(rng, 5, 130, 33)
    dst = [
        on.run("linear", problem.arguments | {"chunk_rows": rows}, problem.buffers)[0]["dst"]
        for rows in (0, 32, 64, 128, 160)
    ]
    assert all(same_bits(dst[0], other) for other in dst[1:])


def test_linear_of_extreme_weights(on, rng):
    """Every finite half: subnormals, the smallest, the largest. Products with one-hot rows must be
    the weights themselves.
    """
    for weight_type in (1, 2):
        bits = rng.integers(0, 1 << 16, (40, 64)).astype(np.uint16)
        values = (
            (bits.astype(np.uint32) << 16).view(np.float32)
            if weight_type == 1
            else bits.view(np.float16).astype(np.float32)
        )
        if weight_type == 1:  # a float32 subnormal may be flushed to zero by a device
            values = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
        values = np.where(np.isfinite(values), values, np.float32(1))
        problem = forward.linear(rng, 64, 40, 64, weight_type)
        problem.buffers["weights"], _ = problems.panels(values, weight_type)
        problem.buffers["x"] = problems.padded(
            np.eye(64, dtype=np.float32), problems.row_stride(64), 0.0
        )
        device, reference = on.run(problem.op, problem.arguments, problem.buffers)
        np.testing.assert_array_equal(device["dst"][:, :40], values.T)
        np.testing.assert_array_equal(reference["dst"][:, :40], values.T)


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_embed(on, rng, weight_type):
    for n_tokens in (0, *SIZES):
        agree(on, forward.embed(rng, n_tokens, 77, 33, weight_type, scale=5.5))
    for width in SIZES:
        agree(on, forward.embed(rng, 3, 257, width, weight_type, chunk_rows=96))


def test_embed_of_an_unknown_token_writes_nothing(on, rng):
    problem = forward.embed(rng, 3, 33, 7)
    problem.buffers["tokens"][1, 0] = 33
    outcome = agree(on, problem)
    assert (
        np.isnan(outcome.device["dst"][1]).all()
        and not np.isnan(outcome.device["dst"][2, :7]).any()
    )


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
        ("read_scale",),
        ("read_scale", "write_normalized", "no_out"),
        ("read_normalized",),
        ("read_normalized", "add"),
        ("read_normalized", "read_scale"),
    ],
    ids="+".join,
)
def test_norm(on, rng, flags):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, forward.norm(rng, rows, width, flags))
    if "rows" not in flags:
        agree(on, forward.norm(rng, 7, 33, flags, in_place=True))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_norm_of_small_and_large_values(on, rng, scale):
    agree(on, forward.norm(rng, 3, 257, ("write_scale", "write_normalized"), scale=scale))


def test_norm_in_steps_has_the_fused_bits(on, rng):
    """Scale, then normalised value, then gain: what an edited or captured norm runs."""
    for width in (7, 33, 257, 576):
        problem = forward.norm(rng, 5, width, ("add",))
        fused = on.run("norm", problem.arguments, problem.buffers)[0]
        flag, buffers, arguments = (
            problems.NORM_FLAGS,
            dict(problem.buffers),
            dict(problem.arguments),
        )
        for flags, source in (
            ("write_scale no_out", "x"),
            ("read_scale write_normalized no_out", "x"),
            ("read_normalized add", "normalized"),
        ):
            buffers |= on.run(
                "norm",
                arguments | {"flags": sum(flag[f] for f in flags.split()), "x": source},
                buffers,
            )[0]
        assert same_bits(buffers["dst"], fused["dst"])


@pytest.mark.parametrize("kind", range(3), ids=problems.ACTIVATIONS)
def test_act(on, rng, kind):
    for n_tokens in (0, 1, 3, 33):
        for width in SIZES:
            agree(on, forward.act(rng, n_tokens, width, kind))


@pytest.mark.parametrize("kind", range(3), ids=problems.ACTIVATIONS)
def test_act_everywhere(on, rng, kind):
    """Over the whole line, beside |gate up|: nothing overflows, and an act near zero is
    as good as near ten.
    """
    gate = np.concatenate(
        [
            np.linspace(-12, 12, 193),
            [0.0, -0.0, 1e-30, -1e-30, 88, -88, 104, -104, 1e4, -1e4, 1e10, -1e10],
        ]
    ).astype(np.float32)
    problem = forward.act(rng, 1, len(gate), kind, gate=gate[None])
    assert np.isfinite(agree(on, problem).device["dst"][0, : len(gate)]).all()


@pytest.mark.parametrize("kind", range(5), ids=problems.EDITS)
def test_edit(on, rng, kind):
    for n_tokens, n_heads, width in ((1, 1, 1), (3, 1, 257), (7, 3, 33), (33, 5, 7), (4, 2, 576)):
        for n_edited in {0, 1, n_tokens // 2, n_tokens}:
            for step in (0, 1):
                agree(on, forward.edit(rng, kind, n_tokens, n_heads, width, n_edited, step))


@pytest.mark.parametrize("kind", range(4), ids=problems.EDITS[:4])
@pytest.mark.parametrize("window", [0, 1, 5, 100])
def test_edit_over_keys(on, rng, kind, window):
    for n_tokens in (1, 9, 33):
        outcome = agree(on, forward.edit(rng, kind, n_tokens, 3, 0, keys=True, window=window))
        before, after, problem = outcome.problem.buffers["x"], outcome.device["x"], outcome.problem
        for t in range(n_tokens):  # neither the future nor what lies before the window is opened
            start = max(0, t + 3 - window) if window else 0
            hidden = np.r_[0:start, t + 3 : problem.arguments["width"]]
            np.testing.assert_array_equal(after[t][:, hidden], before[t][:, hidden])


def test_copy(on, rng):
    for rows in (0, *SIZES):
        for width in SIZES:
            for pick in (False, True):
                for add in (False, True):
                    agree(on, forward.copy(rng, rows, width, pick, add))


def test_copy_of_more_rows_than_a_grid_holds(on, rng):
    for rows in (32768, 32769, 70000):
        agree(on, forward.copy(rng, rows, 2, pick=True))


def test_sum_heads(on, rng):
    for n_tokens in (0, 1, 3, 33):
        for n_heads in (1, 3, 9):
            for width in SIZES:
                agree(on, forward.sum_heads(rng, n_tokens, n_heads, width, bias=width % 2 == 1))


# -- attention -------------------------------------------------------------------------------------


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
    for rows in ([(0, 33)], [(5, 1), (0, 17), (30, 9)]):
        for frozen in (False, True):
            if frozen:
                rows = [row for row in rows for _ in range(2)]
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


# -- any shape -------------------------------------------------------------------------------------


@few
@given(
    seed=seeds,
    rows=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 140),
    weight_type=st.integers(0, 2),
    bias=st.booleans(),
    add=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    chunk_rows=st.sampled_from([0, 32, 64]),
)
def test_any_linear(on, seed, rows, n, k, weight_type, bias, add, softcap, chunk_rows):
    agree(
        on,
        forward.linear(
            np.random.default_rng(seed),
            rows,
            n,
            k,
            weight_type,
            bias,
            add,
            softcap,
            chunk_rows=chunk_rows,
        ),
    )


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


@few
@given(
    seed=seeds,
    n_tokens=st.integers(1, 20),
    n_heads=st.integers(1, 5),
    width=st.integers(1, 300),
    kind=st.integers(0, 4),
    step=st.integers(0, 1),
)
def test_any_row_op(on, seed, n_tokens, n_heads, width, kind, step):
    rng = np.random.default_rng(seed)
    agree(on, forward.edit(rng, kind, n_tokens, n_heads, width, step=step))
    agree(
        on,
        forward.norm(
            rng,
            n_tokens,
            width,
            [f for f in ("add", "rows", "write_scale", "write_normalized") if rng.integers(2)],
        ),
    )
    agree(on, forward.act(rng, n_tokens, width, kind % 3))
    agree(on, forward.copy(rng, n_tokens, width, bool(rng.integers(2)), bool(rng.integers(2))))
    agree(on, forward.sum_heads(rng, n_tokens, n_heads, width, bool(rng.integers(2))))


# -- the bench itself ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error",
    [
        ({"n_rows": 4}, ValueError),
        ({"width": 1 << 20}, ValueError),
        ({"width": 1 << 21}, ValueError),
        ({"width": -1}, ValueError),
        ({"width": 2.5}, ValueError),
        ({"stride": float("nan")}, ValueError),
        ({"width": "x"}, TypeError),
        ({"x": "nowhere"}, ValueError),
        ({"x": ("x", 10**9)}, ValueError),
        ({"x": ("x", 40)}, ValueError),
        ({"x": None}, ValueError),
        ({"x": 5}, ValueError),
        ({"flags": 32, "rows": "x"}, ValueError),
        ({"flags": 32}, ValueError),
        ({"no_such_field": 1}, KeyError),
    ],
)
def test_wrong_arguments_never_reach_the_device(on, rng, change, error):
    problem = forward.norm(rng, 3, 33)
    with pytest.raises(error):
        on.run("norm", problem.arguments | change, problem.buffers)
    agree(on, problem)


@pytest.mark.parametrize(
    "build, change",
    [
        (lambda rng: forward.linear(rng, 3, 7, 33), {"k": 1 << 20}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"n": 0}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"weight_type": 3}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"first_k": 8, "n_k": 16}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"x_stride": 32}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"weights": ("weights", 1)}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"chunk_rows": 5}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"family_plus_1": 99}),
        (lambda rng: forward.linear(rng, 3, 7, 33), {"x": ("x", 1)}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"n_kv_heads": 0}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"n_kv_heads": 3}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"n_tiles": 9}),
        (lambda rng: forward.attn_scores(rng, [(0, 9)], 4, 2, 6), {"key_stride": 8}),
        (lambda rng: forward.attn_output(rng, [(0, 9)], 4, 2, 6), {"first_token": 3}),
        (lambda rng: forward.attn_softmax(rng, [(0, 9)], 4), {"key_stride": 4}),
        (lambda rng: forward.rope(rng, [(0, 9)], 4, 2, 6), {"d_head": 5}),
        (lambda rng: forward.act(rng, 3, 7), {"act": 3}),
        (lambda rng: forward.edit(rng, 0, 3, 2, 7), {"kind": 5}),
        (lambda rng: forward.edit(rng, 0, 3, 2, 7), {"n_entries": 1000}),
    ],
)
def test_senseless_sizes_are_refused(on, rng, build, change):
    problem = build(rng)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)
    agree(on, problem)


def test_wrong_buffers(on, rng):
    problem = forward.norm(rng, 3, 33)
    with pytest.raises(KeyError):
        on.run("no_such_op", {}, {})
    for array in (np.zeros(3), np.zeros((4, 4), np.float32).T[:, :2], [1.0], None):
        with pytest.raises(TypeError):
            on.run("norm", problem.arguments, problem.buffers | {"x": array})
    with pytest.raises(TypeError):
        on.run("norm", problem.arguments, {5: problem.buffers["x"]})
    with pytest.raises(ValueError):
        on.run("norm", {}, {f"b{i}": np.zeros(1, np.float32) for i in range(17)})
    with pytest.raises(TypeError):
        _engine.Bench("device")


def test_a_tile_that_mixes_rows_is_refused(on, rng):
    problem = forward.attn_scores(rng, [(0, 3), (0, 3)], 2, 1, 6)
    problem.buffers["tiles"] = np.array([(0, 4), (4, 2)], np.uint32)
    with pytest.raises(ValueError, match="not of the tile's row"):
        on.run(problem.op, problem.arguments, problem.buffers)


def test_inputs_stay_as_they_were_and_nothing_is_kept(on, rng):
    problem = forward.rope(rng, [(0, 9)], 4, 2, 6)
    before = {name: array.copy() for name, array in problem.buffers.items()}
    counts = {name: sys.getrefcount(array) for name, array in problem.buffers.items()}
    for _ in range(3):
        device, reference = on.run(problem.op, problem.arguments, problem.buffers)
    assert all(same_bits(problem.buffers[name], before[name]) for name in before)
    assert {name: sys.getrefcount(array) for name, array in problem.buffers.items()} == counts
    assert all(a.flags.owndata and a.dtype == np.float32 for a in device.values()) and all(
        a.flags.owndata and a.dtype == np.float64 for a in reference.values()
    )


def test_a_bench_gives_its_memory_back():
    from vksteer.runtime.device import open_device

    engine, _ = open_device(None)
    held = engine.allocated_bytes
    for _ in range(3):
        bench = _engine.Bench(engine)
        bench.run("copy", {}, {"x": np.zeros(1 << 18, np.float32)})
        assert engine.allocated_bytes > held
        del bench
        assert engine.allocated_bytes == held


def test_threads_take_turns(on):
    problems = [forward.linear(np.random.default_rng(i), 9, 77, 53) for i in range(4)]
    want = [on.run(p.op, p.arguments, p.buffers)[0]["dst"] for p in problems]
    failures, done = [], []

    def work(i):
        try:
            for _ in range(10):
                if not same_bits(
                    on.run(problems[i].op, problems[i].arguments, problems[i].buffers)[0]["dst"],
                    want[i],
                ):
                    failures.append(i)
                done.append(i)
        except BaseException as error:  # or it would end in the thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(done) == 40


# -- vksteer verify --------------------------------------------------------------------------------


class Broken:
    """A bench whose device is slightly wrong in one op."""

    def __init__(self, bench, op, harm):
        self.bench, self.op, self.harm = bench, op, harm

    def run(self, op, arguments, buffers):
        device, reference = self.bench.run(op, arguments, buffers)
        if op == self.op:
            self.harm(device)
        return device, reference

    def __getattr__(self, name):
        return getattr(self.bench, name)


def test_verify_command(on, capsys):
    assert cli.main(["verify"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in verify.BOUNDS) and "NO" not in text
    assert cli.main(["verify", "--device", "no such device"]) == 2


@pytest.mark.parametrize(
    "op, harm",
    [
        ("linear", lambda d: d["dst"].__imul__(np.float32(1 + 1e-4))),
        ("norm", lambda d: d["dst"].__setitem__((0, 0), np.nan)),
        ("copy", lambda d: d["x"].__iadd__(np.float32(1e-3))),
        ("attn_output", lambda d: d["z"].__setitem__((0, -1), 0.0)),
    ],
)
def test_verify_notices_a_wrong_device(on, monkeypatch, capsys, op, harm):
    monkeypatch.setattr(
        verify, "bench", lambda device=None: (Broken(on, op, harm), "a broken device")
    )
    assert cli.main(["verify"]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if " NO" in line]
    assert len(lines) == 1 and lines[0].startswith(op)


def test_verify_survives_a_failing_op(on, monkeypatch):
    def fail(device):
        raise DeviceError("lost")

    monkeypatch.setattr(
        verify, "bench", lambda device=None: (Broken(on, "act", fail), "a broken device")
    )
    rows, _ = verify.verify()
    assert [row.op for row in rows if not row.ok] == ["act"] and "lost" in verify.table(rows)


@pytest.mark.long
@pytest.mark.parametrize("width", ["128", "256", "512", "swiftshader"])
def test_verify_on_other_devices(width):
    """Lavapipe with subgroups of 4, 8 and 16, and SwiftShader: four devices for the
    price of two drivers.
    """
    driver = tool("swiftshader_icd" if width == "swiftshader" else "lavapipe_icd")
    env = (
        os.environ
        | {"VK_DRIVER_FILES": driver}
        | ({} if width == "swiftshader" else {"LP_NATIVE_VECTOR_WIDTH": width})
    )
    done = subprocess.run(
        [sys.executable, "-m", "vksteer", "verify", "--json"],
        env=env,
        capture_output=True,
        text=True,
    )
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["ok"], [row for row in result["ops"] if not row["ok"]]


def test_families_pass_their_self_test(on):
    assert [name for _, name in on.families()][0] == "broadcast"
    for family, _ in on.families():
        on.self_test(family)
        on.self_test(family, 1)
    with pytest.raises(ValueError):
        on.self_test(99)


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("n, k", [(33, 16), (77, 53), (130, 257)])
def test_a_norm_inside_the_product_is_the_norm_before_it(
    on, fusing, families, rng, n, k, weight_type
):
    """The same bits, for every number of rows that may be fused; more rows, and devices with larger
    workgroups, are refused.
    """
    for rows in (1, 2, 3, 7, 8):
        problem = forward.linear(rng, rows, n, k, weight_type, bias=True)
        gain = problems.padded(
            rng.standard_normal((1, k)).astype(np.float32), problems.row_stride(k), 0.0
        )
        stride = problems.row_stride(k)
        normed = {
            "x": problem.buffers["x"],
            "gain": gain,
            "dst": np.zeros((rows, stride), np.float32),
        }
        before = on.run(
            "norm",
            {
                "x": "x",
                "gain": "gain",
                "dst": "dst",
                "width": k,
                "stride": stride,
                "n_rows": rows,
                "eps": 1e-5,
            },
            normed,
        )[0]["dst"]
        for family in [f for f in families if f < 2]:
            apart = on.run(
                "linear",
                problem.arguments | {"family_plus_1": family + 1},
                problem.buffers | {"x": before},
            )[0]["dst"]
            device, reference = on.run(
                "linear",
                problem.arguments | {"family_plus_1": family + 1, "gain": "gain", "eps": 1e-5},
                problem.buffers | {"gain": gain},
            )
            assert same_bits(device["dst"], apart), f"{rows} rows, family {family}"
            np.testing.assert_allclose(
                device["dst"][:, :n],
                reference["dst"][:, :n],
                atol=2e-5 * np.abs(reference["dst"][:, :n]).max(),
            )
    problem = forward.linear(rng, 9, n, k, weight_type)
    with pytest.raises(ValueError, match="9 rows"):
        on.run(
            "linear",
            problem.arguments | {"gain": "gain", "eps": 1e-5, "family_plus_1": 1},
            problem.buffers | {"gain": gain},
        )
