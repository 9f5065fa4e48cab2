"""Every op against its float64 reference over awkward shapes: 1, 3, 7, 33, 257, ragged tiles,
empty lists, every flag.

op_bench.py has the comparison and the shapes that these tests share with those of other ops.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import SIZES, agree, few, same_bits, seeds
from vksteer import _engine
from vksteer.verify import checking as verify
from vksteer.verify import forward, problems

ROOT = Path(__file__).resolve().parent.parent


# -- the table of calls ----------------------------------------------------------------------------


def test_every_op_can_be_called_and_has_a_reference():
    header = (ROOT / "csrc/ops/ops.h").read_text()
    table = (ROOT / "csrc/ops/kernels.def").read_text()
    of_table = set(re.findall(r"^OP(?:_GRID)?\((\w+),", table, re.M))
    assert len(of_table) > 20
    matrix = set(re.findall(r"^int op_(\w+)\(struct ops \*ops, const struct", header, re.M))
    declared = matrix | of_table
    assert {name for name, _, _ in _engine.ops()} == declared
    reference = (ROOT / "csrc/reference/reference.h").read_text()
    assert set(re.findall(r"^void reference_(\w+)\(", reference, re.M)) == matrix
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
def test_embed(on, rng, weight_type):
    for n_tokens in (0, *SIZES):
        agree(on, forward.embed(rng, n_tokens, 77, 33, weight_type, scale=5.5))
    for width in SIZES:
        agree(on, forward.embed(rng, 3, 257, width, weight_type, segment_rows=96))


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_embed_of_positions(on, rng, weight_type):
    for n_tokens in (0, *SIZES):
        for add in (False, True):
            agree(on, forward.embed(rng, n_tokens, 77, 33, weight_type, positions=True, add=add))
    for width in SIZES:
        problem = forward.embed(
            rng, 3, 257, width, weight_type, segment_rows=96, positions=True, add=True
        )
        sum_ = agree(on, problem).device["dst"]
        without = {name: v for name, v in problem.arguments.items() if name != "add"}
        alone = on.run(problem.op, without, problem.buffers)[0]["dst"]
        assert same_bits(sum_[:, :width], problem.buffers["add"][:, :width] + alone[:, :width])


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


@pytest.mark.parametrize(
    "flags",
    [
        ("layer",),
        ("layer", "bias"),
        ("layer", "bias", "add", "rows"),
        ("layer", "bias", "write_scale", "no_out"),
        ("layer", "write_scale", "write_normalized", "add"),
        ("layer", "bias", "read_scale"),
        ("layer", "read_scale", "write_normalized", "no_out"),
        ("layer", "bias", "read_normalized", "add"),
    ],
    ids="+".join,
)
def test_layer_norm(on, rng, flags):
    for rows in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, forward.norm(rng, rows, width, flags, mean=rows % 3))
    for groups, width in ((1, 33), (2, 3), (5, 80), (32, 128)):
        agree(on, forward.norm(rng, 7, width, flags, groups=groups, mean=-1.0))
        if "rows" not in flags:
            agree(on, forward.norm(rng, 7, width, flags, groups=groups, in_place=True))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_layer_norm_of_small_and_large_values(on, rng, scale):
    flags = ("layer", "bias", "write_scale", "write_normalized")
    agree(on, forward.norm(rng, 3, 257, flags, scale=scale, mean=2.0))


def test_layer_norm_of_a_large_mean(on, rng):
    """The mean is subtracted before squaring, so what is lost is what x itself has lost: a rounding
    of the mean, 2^-24 of 1e4 beside deviations of about 1.
    """
    problem = forward.norm(rng, 3, 257, ("layer", "write_scale", "write_normalized"), mean=1e4)
    outcome = verify.check(on, problem)
    assert outcome.error <= 1e4 * 2.0**-22, outcome.where


def test_a_constant_row_is_its_layer_norm_s_bias(on, rng):
    problem = forward.norm(rng, 3, 256, ("layer", "bias", "write_normalized", "write_scale"))
    problem.buffers["x"][:] = 0.5
    device = agree(on, problem).device
    assert same_bits(device["dst"][:, :256], np.broadcast_to(problem.buffers["bias"], (3, 256)))


@pytest.mark.parametrize(
    "more, groups",
    [(("add",), 1), (("layer", "add"), 1), (("layer", "bias", "add"), 1), (("layer", "bias"), 3)],
    ids=["rms", "layer", "layer bias", "layer groups"],
)
def test_norm_in_steps_has_the_fused_bits(on, rng, more, groups):
    """Scale, then normalised value, then gain: what an edited or captured norm runs."""
    always = " ".join(f for f in more if f == "layer")
    for width in (7, 33, 257, 576):
        problem = forward.norm(rng, 5, width, more, groups=groups, mean=1.5)
        fused = on.run("norm", problem.arguments, problem.buffers)[0]
        flag, buffers, arguments = (
            problems.NORM_FLAGS,
            dict(problem.buffers),
            dict(problem.arguments),
        )
        for flags, source in (
            ("write_scale no_out", "x"),
            ("read_scale write_normalized no_out", "x"),
            (f"read_normalized {' '.join(more)}", "normalized"),
        ):
            wanted = {*flags.split(), *always.split()}
            buffers |= on.run(
                "norm",
                arguments | {"flags": sum(flag[f] for f in wanted), "x": source},
                buffers,
            )[0]
        assert same_bits(buffers["dst"], fused["dst"])


@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
def test_act(on, rng, kind):
    for n_tokens in (0, 1, 3, 33):
        for width in SIZES:
            for plain in (False, True):
                agree(on, forward.act(rng, n_tokens, width, kind, plain=plain))


@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
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
    for plain in (False, True):
        problem = forward.act(rng, 1, len(gate), kind, gate=gate[None], plain=plain)
        assert np.isfinite(agree(on, problem).device["dst"][0, : len(gate)]).all()


@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
def test_act_keeps_nan(on, rng, kind):
    problem = forward.act(rng, 1, 33, kind, plain=True)
    problem.buffers["gate_up"][0, 7] = np.nan
    found = np.isnan(agree(on, problem).device["dst"][0, :33])
    assert found[7] and found.sum() == 1


@pytest.mark.parametrize("kind", range(5), ids=problems.ACTIVATIONS)
def test_a_plain_act_is_that_of_a_gate_of_ones(on, rng, kind):
    problem = forward.act(rng, 3, 33, kind)
    problem.buffers["gate_up"][:, 33:66] = 1
    gated, plain = (
        on.run("act", problem.arguments | {"plain": p}, problem.buffers)[0]["dst"] for p in (0, 1)
    )
    assert same_bits(gated, plain)


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


# -- any shape -------------------------------------------------------------------------------------


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
    agree(on, forward.act(rng, n_tokens, width, kind, plain=bool(rng.integers(2))))
    agree(on, forward.copy(rng, n_tokens, width, bool(rng.integers(2)), bool(rng.integers(2))))
    agree(on, forward.sum_heads(rng, n_tokens, n_heads, width, bool(rng.integers(2))))
