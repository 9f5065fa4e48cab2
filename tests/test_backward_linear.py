"""The backward pass through weight matrices (linear_bwd) against its float64 reference, and its
bits, which depend neither on the rows beside a row nor on how the matrix is cut.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from op_bench import ROWS, agree, few, same_bits, seeds
from vksteer.verify import backward, problems

# -- matrices --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize(
    "n, k", [(1, 1), (3, 7), (33, 33), (31, 16), (77, 53), (257, 129), (65, 257)]
)
def test_linear_bwd(on, families, rng, n, k, weight_type):
    for i, rows in enumerate((0, *ROWS, 65)):
        for family in families:
            agree(
                on, backward.linear_bwd(rng, rows, n, k, weight_type, add=i % 2 == 0, family=family)
            )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_bwd_gives_a_row_the_same_bits_whatever_is_beside_it(on, families, rng, weight_type):
    """For many numbers of rows, at several places among them, by every kernel family."""
    whole = backward.linear_bwd(rng, 33, 77, 100, weight_type, add=True)
    want = on.run(whole.op, whole.arguments, whole.buffers)[0]["dx"]
    for family in families:
        for rows in (*ROWS, 4, 5, 12, 13, 24, 25, 32):
            for first in {0, 33 - rows, (33 - rows) // 2}:
                part = {
                    name: array if name == "weights" else array[first : first + rows].copy()
                    for name, array in whole.buffers.items()
                }
                got = on.run(
                    whole.op, whole.arguments | {"n_rows": rows, "family_plus_1": family + 1}, part
                )[0]["dx"]
                assert same_bits(got, want[first : first + rows]), (
                    f"{rows} rows from {first}, family {family}"
                )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
@pytest.mark.parametrize("n, k", [(1, 1), (77, 100), (257, 129), (130, 33), (2100, 17)])
def test_linear_bwd_of_many_rows_keeps_the_bits(on, families, rng, weight_type, n, k):
    """A row is bit-identical among few and many rows, also with segments, slices, and the strips
    that many rows are taken in.
    """
    whole = backward.linear_bwd(rng, 70, n, k, weight_type)
    n_k = (k + 15) // 16 * 16
    for family in families:
        for more in (
            {},
            {"segment_rows": 96 if n < 1000 else 1024},
            {"first_k": n_k - 16, "n_k": 16},
            *([{"first_n": 16, "n_sum": 48}] if n > 64 else []),
        ):
            arguments = whole.arguments | {"family_plus_1": family + 1} | more
            want = on.run(whole.op, arguments, whole.buffers)[0]["dx"]
            for first, rows in ((0, 5), (60, 10), (22, 48), (3, 16)):
                part = {
                    name: array if name == "weights" else array[first : first + rows].copy()
                    for name, array in whole.buffers.items()
                }
                got = on.run(whole.op, arguments | {"n_rows": rows}, part)[0]["dx"]
                assert same_bits(got, want[first : first + rows]), (
                    f"rows {first} to {first + rows}, family {family}, {more}"
                )


@pytest.mark.parametrize("weight_type", range(3), ids=problems.WEIGHT_TYPES)
def test_linear_bwd_slices_and_chunks(on, families, rng, weight_type):
    for family in families:
        for first_k, n_k in ((0, 16), (16, 48), (64, 16), (80, 16), (32, 64)):
            agree(
                on,
                backward.linear_bwd(
                    rng,
                    9,
                    45,
                    90,
                    weight_type,
                    first_k=first_k,
                    n_k=n_k,
                    family=family,
                    add=first_k == 16,
                ),
            )
        for first_n, n_sum in ((0, 16), (16, 48), (64, 32), (112, 18), (32, 98), (96, 34)):
            for segment_rows in (0, 32, 96):
                agree(
                    on,
                    backward.linear_bwd(
                        rng,
                        5,
                        130,
                        33,
                        weight_type,
                        first_n=first_n,
                        n_sum=n_sum,
                        family=family,
                        segment_rows=segment_rows,
                        add=first_n == 16,
                    ),
                )
        for rows in (1, 5, 33):
            for segment_rows in (32, 64, 96):
                agree(
                    on,
                    backward.linear_bwd(
                        rng,
                        rows,
                        130,
                        33,
                        weight_type,
                        add=rows == 5,
                        segment_rows=segment_rows,
                        family=family,
                    ),
                )


def test_linear_bwd_in_pieces_has_the_whole_bits(on, families, rng):
    """Segments of the matrix, a sum over rows in two calls, some of the columns."""
    problem = backward.linear_bwd(rng, 5, 130, 100)
    for family in families:
        arguments = problem.arguments | {"family_plus_1": family + 1}
        want = on.run("linear_bwd", arguments, problem.buffers)[0]["dx"]
        for rows in (32, 64, 128, 160):
            assert same_bits(
                on.run("linear_bwd", arguments | {"segment_rows": rows}, problem.buffers)[0]["dx"],
                want,
            )
        for cut in (16, 48, 128):
            buffers = on.run("linear_bwd", arguments | {"n_sum": cut}, problem.buffers)[0]
            buffers = problem.buffers | {"dx": buffers["dx"]}
            got = on.run(
                "linear_bwd",
                arguments | {"first_n": cut, "n_sum": 130 - cut, "dy": ("dy", cut), "add": 1},
                _cut(problem, cut, buffers),
            )[0]["dx"]
            assert same_bits(got, want), f"cut at {cut}, family {family}"
        for first_k, n_k in ((0, 16), (48, 64)):
            got = on.run(
                "linear_bwd", arguments | {"first_k": first_k, "n_k": n_k}, problem.buffers
            )[0]["dx"]
            assert same_bits(got[:, :n_k], want[:, first_k : first_k + n_k])


def _cut(problem, cut, buffers):
    """The buffers with one more row of dy, so that reading from column `cut` on stays inside."""
    return buffers | {
        "dy": np.concatenate(
            [buffers["dy"], np.full((1, buffers["dy"].shape[1]), np.nan, np.float32)]
        )
    }


def test_linear_bwd_of_extreme_weights(on, rng):
    """One-hot rows of dy give the weights themselves, for random finite halves."""
    for weight_type in (1, 2):
        bits = rng.integers(0, 1 << 16, (40, 64)).astype(np.uint16)
        values = (
            (bits.astype(np.uint32) << 16).view(np.float32)
            if weight_type == 1
            else bits.view(np.float16).astype(np.float32)
        )
        if weight_type == 1:  # a device may flush float32 subnormals to zero
            values = np.where(np.abs(values) < np.finfo(np.float32).tiny, np.float32(0), values)
        values = np.where(np.isfinite(values), values, np.float32(1))
        problem = backward.linear_bwd(rng, 40, 40, 64, weight_type)
        problem.buffers["weights"], _ = problems.panels(values, weight_type)
        problem.buffers["dy"] = problems.padded(
            np.eye(40, dtype=np.float32), problem.arguments["y_stride"], 0.0
        )
        for result in on.run(problem.op, problem.arguments, problem.buffers):
            np.testing.assert_array_equal(result["dx"][:, :64], values)


@few
@given(
    seed=seeds,
    rows=st.integers(0, 40),
    n=st.integers(1, 140),
    k=st.integers(1, 140),
    weight_type=st.integers(0, 2),
    add=st.booleans(),
    segment_rows=st.sampled_from([0, 32, 64]),
    family=st.integers(0, 2),
)
def test_any_linear_bwd(on, families, seed, rows, n, k, weight_type, add, segment_rows, family):
    agree(
        on,
        backward.linear_bwd(
            np.random.default_rng(seed),
            rows,
            n,
            k,
            weight_type,
            add,
            segment_rows=segment_rows,
            family=families[family % len(families)],
        ),
    )
