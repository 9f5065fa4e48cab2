"""The ops of circuits against their float64 references, and the properties on which circuits rest:
exact zeros of equal states, rows whose bits do not depend on other rows.
"""

from __future__ import annotations

import numpy as np
import pytest

from op_bench import SIZES, agree, same_bits
from vksteer.verify import circuit


@pytest.mark.parametrize("width", [*SIZES, 576, 1024])
def test_circuit_inputs(on, rng, width):
    for n_entries, n_chunk in ((0, 3), (1, 1), (3, 9), (33, 7)):
        for picked in (None, 0, 1, n_chunk):
            for kind, bias in (("rms", False), ("layer", False), ("layer", True), ("none", False)):
                problem = circuit.circuit_inputs(
                    rng, n_entries, n_chunk, width, kind, bias, picked=picked
                )
                agree(on, problem)


def test_the_mean_of_large_inputs_is_subtracted_first(on, rng):
    """A variance is that of the differences from the mean: with rows of mean 1000 and standard
    deviation 1 it keeps its digits, as a mean of squares minus a square would not.
    """
    problem = circuit.circuit_inputs(rng, 3, 5, 257, "layer", most=0)
    problem.buffers["x"][:, :257] += np.float32(1000)
    got, want = on.run(problem.op, problem.arguments, problem.buffers)
    error = np.abs(got["dst"][:, :257] - want["dst"][:, :257]).max()
    # 6e-4 met over eight seeds: numbers near 1000 are 6e-5 apart, and so are their sums' parts.
    assert error <= 2e-3, error


def test_an_entry_has_the_same_bits_alone_and_at_a_picked_token(on, rng):
    problem = circuit.circuit_inputs(rng, 9, 8, 257)
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]["dst"].reshape(9, 8, -1)
    first, refs = problem.buffers["first"], problem.buffers["refs"]
    for e in (0, 4, 8):
        mine = refs[first[e] : first[e + 1]]
        for t in (0, 7):
            alone = problem.buffers | {
                "first": np.array([0, len(mine)], np.uint32),
                "refs": np.append(mine, np.uint32(0)),
                "tokens": np.array([t], np.uint32),
                "dst": problem.buffers["dst"][:1].copy(),
            }
            arguments = problem.arguments | {
                "all_tokens": 0,
                "n_tokens": 1,
                "n_entries": 1,
                "n_refs": len(mine),
            }
            assert same_bits(on.run(problem.op, arguments, alone)[0]["dst"][0], whole[e, t])


@pytest.mark.parametrize("d_head", [2, 6, 16, 64, 80, 128, 256])
def test_rotation_of_a_part_and_of_neighbours(on, rng, d_head):
    for n_tokens in (1, 3, 33):
        for norm in (False, True):
            for interleaved in (False, True):
                for d_rot in sorted({0, 2, d_head // 4 * 2, d_head}):
                    problem = circuit.circuit_place(rng, n_tokens, d_head, norm, d_rot, interleaved)
                    agree(on, problem)


@pytest.mark.parametrize("d_head", [2, 6, 16, 64, 80, 128, 256])
def test_heads(on, rng, d_head):
    for n_tokens in (1, 3, 33):
        for norm in (False, True):
            agree(on, circuit.circuit_place(rng, n_tokens, d_head, norm))
            for difference in (False, True):
                agree(on, circuit.circuit_heads(rng, n_tokens, d_head, difference, scaled=norm))
                agree(
                    on,
                    circuit.circuit_heads(
                        rng, n_tokens, d_head, difference, scaled=norm, column=True
                    ),
                )
                agree(
                    on,
                    circuit.circuit_heads(
                        rng, n_tokens, d_head, difference, scaled=norm, column=True, zero=True
                    ),
                )
        agree(on, circuit.circuit_heads(rng, n_tokens, d_head, False, column=True, offset=True))


def test_equal_states_differ_by_exactly_nothing(on, rng):
    problem = circuit.circuit_heads(rng, 9, 80, scaled=True)
    buffers = problem.buffers
    buffers["z"][:, :80] = np.tile(buffers["base"][:, :80], (4, 1))
    buffers["entries"][:, 1] = 0
    buffers["scale"][:] = buffers["base_scale"]
    assert not np.any(on.run(problem.op, problem.arguments, buffers)[0]["dst"][:, :80])
    problem = circuit.circuit_outputs(rng, 9, 9, 257)
    problem.buffers["x"][:] = problem.buffers["base"]
    assert not np.any(on.run(problem.op, problem.arguments, problem.buffers)[0]["dst"][:, :257])


@pytest.mark.parametrize("width", [*SIZES, 576, 1024])
def test_circuit_outputs_and_pair_logits(on, rng, width):
    for n_rows, n_tokens, first in ((1, 1, 0), (7, 3, 2), (33, 33, 5)):
        for normed in (False, True):
            for in_place in (False, True):
                agree(
                    on,
                    circuit.circuit_outputs(rng, n_rows, n_tokens, width, normed, first, in_place),
                )
    for n_entries, n in ((1, 1), (3, 7), (9, 33)):
        for softcap in (0.0, 3.0):
            agree(on, circuit.pair_logits(rng, n_entries, n, width, softcap))


@pytest.mark.parametrize("width", [2, 3, 7, 33, 257, 1024, 2050])
def test_logit_metrics(on, rng, width):
    for n_rows, n, first in ((1, 1, 0), (7, 3, 2), (33, 33, 5)):
        for softcap in (0.0, 8.0):
            agree(on, circuit.logit_metrics(rng, n_rows, n, width, softcap, first))
    # Large logits lose no more digits than their size explains.
    agree(on, circuit.logit_metrics(rng, 3, 3, width, spread=0.1, shift=1000.0))
    agree(on, circuit.logit_metrics(rng, 3, 3, width, spread=60.0))


def test_the_first_of_equal_logits_is_the_greedy_token(on, rng):
    problem = circuit.logit_metrics(rng, 4, 2, 257)
    problem.buffers["logits"][:, [33, 77, 256]] = 99.0
    assert (on.run(problem.op, problem.arguments, problem.buffers)[0]["values"][:, 3] == 33).all()
