"""What follows a product before it is written, and its backward: a matrix's factor, a clamp, and
the bias of the unembedding in single logits.
"""

from __future__ import annotations

import numpy as np
import pytest

from op_bench import SIZES, agree, same_bits
from test_backward_differences import matches, on_grid
from vksteer.verify import backward, circuit, forward, lens, problems


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("n, k", [(1, 1), (31, 16), (77, 53), (65, 257)])
def test_a_scaled_or_clamped_product(on, families, rng, n, k, weight_type):
    for i, rows in enumerate((1, 2, 3, 8, 17, 33)):
        for family in families:
            for decode in (0, 1):
                more = {"family": family, "decode": decode, "segment_rows": 32 * (i % 2)}
                agree(
                    on,
                    forward.linear(
                        rng, rows, n, k, weight_type, i % 2 == 0, i % 3 == 0, scale=0.22, **more
                    ),
                )
                agree(
                    on, forward.linear(rng, rows, n, k, weight_type, i % 2 == 0, clip=4.0, **more)
                )
            agree(
                on,
                backward.linear_bwd(
                    rng, rows, n, k, weight_type, segment_rows=32 * (i % 2), family=family, scale=-3
                ),
            )


def test_a_factor_of_one_changes_no_bit(on, families, rng):
    for problem in (
        forward.linear(rng, 9, 77, 53, bias=True, add=True, softcap=5.0),
        backward.linear_bwd(rng, 9, 77, 53),
        lens.head_out(rng, 77, 6, 2, 10, gain=True),
    ):
        name = "dx" if problem.op == "linear_bwd" else "dst"
        for family in families:
            arguments = problem.arguments | {"family_plus_1": family + 1}
            plain, scaled = (
                on.run(problem.op, arguments | {"matrix_scale": s}, problem.buffers)[0][name]
                for s in (0.0, 1.0)
            )
            assert same_bits(plain, scaled)


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_a_scaled_product_is_bit_identical_by_every_family(on, rng, weight_type):
    """Also where the matrix has segments, and where many rows take it in strips. Matrix units are
    left out: they add whole tiles, and a backward product segment by segment (3.8e-6 apart here).
    """
    families = [number for number, name in on.families() if name != "matrix"]
    for forth in (True, False):
        build = forward.linear if forth else backward.linear_bwd
        problem = build(rng, 37, 2100, 33, weight_type, scale=0.22)
        name = "dst" if forth else "dx"
        got = [
            on.run(
                problem.op,
                problem.arguments | {"family_plus_1": f + 1, "segment_rows": rows},
                problem.buffers,
            )[0][name]
            for f in families
            for rows in (0, 1024)
        ]
        assert all(same_bits(got[0], other) for other in got[1:])


def test_scaled_slices(on, families, rng):
    """A head's part of W_O, forward and backward."""
    for family in families:
        agree(on, forward.linear(rng, 9, 45, 96, first_k=16, n_k=48, family=family, scale=0.22))
        for first_n, n_sum in ((16, 48), (112, 18)):
            agree(
                on,
                backward.linear_bwd(
                    rng,
                    5,
                    130,
                    96,
                    first_n=first_n,
                    n_sum=n_sum,
                    first_k=32,
                    n_k=32,
                    family=family,
                    scale=0.22,
                ),
            )
        for gain in (False, True):
            agree(on, lens.head_out(rng, 77, 6, 2, 10, gain=gain, family=family, scale=0.22))


def test_a_scaled_product_is_not_added_to_a_sum(on, rng):
    problem = backward.linear_bwd(rng, 5, 130, 33, add=True)
    with pytest.raises(ValueError, match="scaled"):
        on.run(problem.op, problem.arguments | {"matrix_scale": 0.5}, problem.buffers)


def test_a_scaled_matrix_is_not_fused(on, families, rng):
    problem = forward.linear_pairs(rng, 2, 53, "gate", width=77)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | {"matrix_scale": 0.5}, problem.buffers)


@pytest.mark.parametrize("width", [*SIZES, 576, 1024])
def test_clip(on, rng, width):
    for rows in (0, 1, 3, 33):
        agree(on, forward.clip(rng, rows, width))


@pytest.mark.parametrize("width", [*SIZES, 576, 1024])
def test_clip_bwd(on, rng, width):
    for rows in (0, 1, 3, 33):
        agree(on, backward.clip_bwd(rng, rows, width))


def test_differences_of_a_scaled_and_clamped_product(on, rng):
    """The clamp's limit lies in the widest gap between the products, so that no difference
    crosses it.
    """
    back = backward.linear_bwd(rng, 3, 45, 33, scale=0.22)
    problem = forward.linear(rng, 3, 45, 33, scale=0.22)
    buffers = problem.buffers | {
        "weights": back.buffers["weights"],
        "x": problems.padded(on_grid(rng, 3, 33), 48, 0.0),
    }
    product = on.run("linear", problem.arguments, buffers)[1]["dst"]
    sizes = np.sort(np.abs(product[:, :45]).ravel())
    sizes = sizes[len(sizes) // 4 : -len(sizes) // 4]
    at = np.diff(sizes).argmax()
    limit = float(sizes[at : at + 2].mean())
    dy = back.buffers["dy"].copy()
    mask = {"x": "x", "d": "d", "width": 45, "stride": dy.shape[1], "limit": limit, "n_tokens": 3}
    raw = problems.padded(product[:, :45].astype(np.float32), dy.shape[1])
    masked = on.run("clip_bwd", mask, {"x": raw, "d": dy})[1]["d"].astype(np.float32)
    assert 20 < (masked[:, :45] == 0).sum() < 115
    dx = on.run("linear_bwd", back.arguments, back.buffers | {"dy": masked})[1]["dx"][:, :33]
    matches(
        on,
        rng,
        "linear",
        problem.arguments | {"clip": limit},
        buffers,
        "x",
        {"dst": np.nan_to_num(dy[:, : problem.arguments["dst_stride"]]).astype(np.float64)},
        np.pad(dx, ((0, 0), (0, 15))),
    )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_pairs_of_logits_with_a_bias(on, rng, softcap):
    for rows in (1, 3, 33):
        for width in (*SIZES, 576):
            agree(on, backward.pair_grad(rng, rows, width, softcap, bias=True))
            agree(on, circuit.pair_logits(rng, 3, rows, width, softcap, bias=True))


def test_differences_of_a_pair_of_logits_with_a_bias(on, rng):
    problem = backward.pair_grad(rng, 3, 33, 5.0, bias=True)
    problem.buffers["normed"][:, :33] = on_grid(rng, 3, 33)
    gradient = on.run(problem.op, problem.arguments, problem.buffers)[1]["dnormed"]
    weights = problem.buffers["weights"].astype(np.float64)[:, None] * (1, -1)
    arguments, buffers = problem.arguments, problem.buffers
    matches(on, rng, problem.op, arguments, buffers, "normed", {"logits": weights}, gradient)
