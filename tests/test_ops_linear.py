"""Matrix products against their float64 reference, bit-identical by kernel, tile and batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import ROWS, agree, few, same_bits, seeds
from vksteer.verify import forward, problems


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


CACHES = ("angles", "tokens", "k_cache", "v_cache")


def norm_then_product(on, problem, rows):
    """What linear_pairs computes before it finishes its pairs, by a kernel for each step."""
    a, b = problem.arguments, problem.buffers
    normed = on.run(
        "norm",
        {
            "x": "x",
            "gain": "gain",
            "dst": "dst",
            "width": 53,
            "stride": a["x_stride"],
            "n_rows": rows,
            "eps": a["eps"],
            "flags": 0,
        },
        {"x": b["x"], "gain": b["gain"], "dst": np.zeros((rows, a["x_stride"]), np.float32)},
    )[0]["dst"]
    stride = problems.row_stride(a["n"])
    return on.run(
        "linear",
        {
            "x": "x",
            "dst": "dst",
            "weights": "weights",
            "bias": "bias",
            "weight_type": a["weight_type"],
            "n": a["n"],
            "k": 53,
            "n_rows": rows,
            "x_stride": a["x_stride"],
            "dst_stride": stride,
        },
        {
            "x": normed,
            "weights": b["weights"],
            "bias": b["bias"],
            "dst": np.zeros((rows, stride), np.float32),
        },
    )[0]["dst"]


def gated(on, problem, rows, product):
    a, stride = problem.arguments, problems.row_stride(problem.arguments["n"])
    arguments = {
        "gate_up": "x",
        "dst": "dst",
        "width": a["n"] // 2,
        "in_stride": stride,
        "out_stride": a["dst_stride"],
        "act": a["act"],
        "n_tokens": rows,
    }
    return {
        "dst": on.run("act", arguments, {"x": product, "dst": problem.buffers["dst"]})[0]["dst"]
    }


def rotated(on, problem, rows, product):
    a, b = problem.arguments, problem.buffers
    arguments = {
        "qkv": "x",
        "n_heads": a["n_heads"],
        "n_kv_heads": a["n_kv_heads"],
        "d_head": a["d_head"],
        "d_rot": a["d_head"],
        "q_angles": "angles",
        "stride": problems.row_stride(a["n"]),
        "eps": 1e-6,
        "flags": 6,
        "n_tokens": rows,
    }
    buffers = {"x": product} | {name: b[name] for name in CACHES}
    turned = on.run("rope", arguments | {name: name for name in CACHES}, buffers)[0]
    return {"dst": turned["x"], "k_cache": turned["k_cache"], "v_cache": turned["v_cache"]}


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("kind, shape", PAIRS, ids=str)
def test_linear_pairs_have_the_bits_of_the_steps_that_they_replace(
    on, fusing, families, rng, kind, shape, weight_type
):
    """Norm, product, and act or rope, each by its own kernel: what a run does where a hook, edit or
    tape needs the intermediates. Only devices whose workgroups are one subgroup fuse, which
    software devices are.
    """
    for rows in (1, 2, 4, 7):
        problem = forward.linear_pairs(rng, rows, 53, kind, weight_type, bias=True, **shape)
        a = problem.arguments
        product = norm_then_product(on, problem, rows)
        finish = gated if kind == "gate" else rotated
        want = finish(on, problem, rows, product)
        width = a["n"] // 2 if kind == "gate" else a["n_heads"] * a["d_head"]
        for family in [f for f in families if f < 2]:
            got = on.run("linear_pairs", a | {"family_plus_1": family + 1}, problem.buffers)[0]
            for name, array in want.items():
                columns = slice(None, width) if name == "dst" else slice(None)
                assert same_bits(got[name][:, columns], array[:, columns]), (
                    f"{name}, {rows} rows, family {family}"
                )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_gives_a_row_the_same_bits_whatever_is_beside_it(on, families, rng, weight_type):
    """In each phase: for every number of rows, every place among them, and in prefill for
    every family of kernels. Only matrix units have bits of their own there.
    """
    one_chain = {number for number, name in on.families() if name != "matrix"}
    whole = forward.linear(rng, 33, 77, 100, weight_type, bias=True, add=True, softcap=4.0)
    prefill = on.run(whole.op, whole.arguments, whole.buffers)[0]["dst"]
    for family in families:
        for decode in (0, 1):
            want = on.run(
                whole.op,
                whole.arguments | {"family_plus_1": family + 1, "decode": decode},
                whole.buffers,
            )[0]["dst"]
            assert decode or family not in one_chain or same_bits(want, prefill), f"family {family}"
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
            for segment_rows in (32, 64, 96):
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
                        segment_rows=segment_rows,
                        family=family,
                    ),
                )


def test_linear_chunks_change_no_bit(on, rng):
    problem = forward.linear(rng, 5, 130, 33)
    dst = [
        on.run("linear", problem.arguments | {"segment_rows": rows}, problem.buffers)[0]["dst"]
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
    segment_rows=st.sampled_from([0, 32, 64]),
)
def test_any_linear(on, seed, rows, n, k, weight_type, bias, add, softcap, segment_rows):
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
            segment_rows=segment_rows,
        ),
    )


def test_families_pass_their_self_test(on):
    assert next(name for _, name in on.families()) == "broadcast"
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
