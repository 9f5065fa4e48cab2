"""The ops of the OV circuit against their float64 references: heads' outputs, norms of rows,
the largest of many columns. See test_ops.py.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import SIZES, agree, few, seeds
from vksteer.verify import lens, problems

# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_head_out(on, families, rng, weight_type):
    for n_heads, n_kv_heads in ((1, 1), (4, 1), (6, 2), (5, 5)):
        # Heads that begin inside a cell, and heads of whole cells.
        for d_head in (2, 6, 14, 16, 64, 80):
            for family in families:
                agree(
                    on,
                    lens.head_out(
                        rng,
                        77,
                        n_heads,
                        n_kv_heads,
                        d_head,
                        weight_type,
                        gain=d_head % 4 == 0,
                        family=family,
                    ),
                )
    for n in SIZES:
        for segment_rows in (0, 32, 96):
            agree(on, lens.head_out(rng, n, 6, 2, 10, weight_type, segment_rows=segment_rows))


def test_head_out_is_bit_identical_by_every_family(on, families, rng):
    problem = lens.head_out(rng, 130, 6, 3, 20, 1)
    got = [
        on.run("head_out", problem.arguments | {"family_plus_1": f + 1}, problem.buffers)[0]["dst"][
            :, :130
        ]
        for f in families
    ]
    assert all(np.array_equal(got[0].view(np.uint32), other.view(np.uint32)) for other in got[1:])


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_row_norms(on, rng, weight_type):
    for n in SIZES:
        for k in SIZES:
            outcome = agree(on, lens.row_norms(rng, n, k, weight_type, segment_rows=32 * (n % 2)))
            assert outcome.device["dst"][n // 2] == 0  # a row of zeros


# -- the largest -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 5, 20, 33, 130, 512])
def test_topk(on, rng, k):
    for rows in (1, 3, 9):
        for columns in (*SIZES, 1000):
            agree(on, lens.topk(rng, rows, columns, k))
            agree(
                on,
                lens.topk(
                    rng,
                    rows,
                    columns,
                    k,
                    first=700,
                    held=700,
                    scaled=columns % 2 == 1,
                    ties=columns > 30,
                ),
            )
    agree(on, lens.topk(rng, 0, 7, k))
    # Fewer columns than the k entries of a list, before and after.
    agree(on, lens.topk(rng, 3, 7, k, first=3, held=3))


@pytest.mark.parametrize("order", ["rising", "falling", "equal", "all but one equal"])
def test_topk_of_awkward_orders(on, rng, order):
    problem = lens.topk(rng, 2, 1000, 20)
    line = np.linspace(-1, 1, 1000, dtype=np.float32)
    line = {
        "rising": line,
        "falling": line[::-1],
        "equal": 0 * line,
        "all but one equal": 1.0 * (np.arange(1000) == 777),
    }[order]
    problem.buffers["x"][:, :1000] = line
    got = agree(on, problem).device["indices"]
    np.testing.assert_array_equal(got, np.tile(np.argsort(-line, kind="stable")[:20], (2, 1)))


def test_topk_tile_by_tile_is_topk_of_the_whole(on, rng):
    """For several widths of a tile; ties go to the lower index."""
    for ties in (False, True):
        whole = lens.topk(rng, 5, 1000, 30, ties=ties)
        x = whole.buffers["x"][:, :1000]
        want = agree(on, whole).device
        order = np.argsort(-x, axis=1, kind="stable")[:, :30]
        np.testing.assert_array_equal(want["indices"], order)
        np.testing.assert_array_equal(want["values"], np.take_along_axis(x, order, 1))
        for width in (1, 7, 64, 129, 999):
            lists = {"values": problems.nothing(5, 30), "indices": problems.nothing(5, 30)}
            for first in range(0, 1000, width):
                part = np.ascontiguousarray(x[:, first : first + width])
                n = part.shape[1]
                lists = on.run(
                    "topk",
                    {
                        "x": "x",
                        "values": "values",
                        "indices": "indices",
                        "n_rows": 5,
                        "n_columns": n,
                        "x_stride": n,
                        "first": first,
                        "k": 30,
                        "flags": int(first == 0),
                    },
                    {"x": part} | {name: lists[name] for name in ("values", "indices")},
                )[0]
            np.testing.assert_array_equal(lists["indices"], order)


@pytest.mark.parametrize(
    "build, change",
    [
        (lambda rng: lens.topk(rng, 3, 33, 5), {"k": 0}),
        (lambda rng: lens.topk(rng, 3, 33, 5), {"k": 513}),
        (lambda rng: lens.topk(rng, 3, 33, 5), {"n_rows": 4}),
        (lambda rng: lens.topk(rng, 3, 33, 5), {"x_stride": 32}),
        (lambda rng: lens.topk(rng, 3, 33, 5), {"flags": 3}),
        (lambda rng: lens.head_out(rng, 33, 6, 2, 8), {"n_kv_heads": 4}),
        (lambda rng: lens.head_out(rng, 33, 6, 2, 8), {"n_kv_heads": 0}),
        (lambda rng: lens.head_out(rng, 33, 6, 2, 8), {"d_head": 9}),
        (lambda rng: lens.head_out(rng, 33, 6, 2, 8), {"family_plus_1": 9}),
        (lambda rng: lens.head_out(rng, 33, 6, 2, 8), {"dst_stride": 64}),
        (lambda rng: lens.row_norms(rng, 33, 8), {"n": 34 + 32}),
    ],
)
def test_senseless_sizes_are_refused(on, rng, build, change):
    problem = build(rng)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)
    agree(on, problem)


@few
@given(
    seed=seeds,
    rows=st.integers(1, 12),
    columns=st.integers(1, 300),
    k=st.integers(1, 60),
    held=st.one_of(st.none(), st.integers(0, 100)),
    scaled=st.booleans(),
    ties=st.booleans(),
    n=st.integers(1, 140),
    kv=st.integers(1, 3),
    group=st.integers(1, 4),
    d_head=st.integers(1, 40),
    weight_type=st.integers(0, 2),
)
def test_any_shape(
    on, seed, rows, columns, k, held, scaled, ties, n, kv, group, d_head, weight_type
):
    rng = np.random.default_rng(seed)
    agree(
        on, lens.topk(rng, rows, columns, k, first=held or 0, held=held, scaled=scaled, ties=ties)
    )
    agree(on, lens.head_out(rng, n, kv * group, kv, d_head, weight_type, gain=scaled))
    agree(on, lens.row_norms(rng, n, d_head, weight_type))
