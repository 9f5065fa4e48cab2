"""The ops of activation scaling against their float64 references, and the gradients among them
against central differences of the references.
"""

from __future__ import annotations

import numpy as np
import pytest

from op_bench import SIZES, agree, same_bits
from vksteer.verify import scaling

WIDTHS = (*SIZES, 576, 1024)


def test_dynamic_scale(on, rng):
    for n_tokens, n_edited in ((1, 1), (9, 4), (33, 33), (3, 0)):
        for width in WIDTHS:
            agree(on, scaling.scale_dynamic(rng, n_tokens, width, n_edited))
            agree(on, scaling.scale_dynamic_bwd(rng, n_tokens, width, n_edited))


def test_a_weight_of_zero_changes_nothing(on, rng):
    for build in (scaling.scale_dynamic, scaling.scale_dynamic_bwd):
        problem = build(rng, 9, 257)
        problem.buffers["operand"][:] = 0
        name = "x" if build is scaling.scale_dynamic else "d"
        before = problem.buffers[name].copy()
        device, _ = on.run(problem.op, problem.arguments, problem.buffers)
        assert same_bits(device[name], before)


def test_rows(on, rng):
    for width in WIDTHS:
        for rows in (0, 1, 33):
            agree(on, scaling.row_dots(rng, rows, width))
        agree(on, scaling.row_sums(rng, (1, 0, 17, 64), width))


@pytest.mark.parametrize("softcap, other", [(0.0, 0.0), (5.0, 5.0), (30.0, 0.0), (0.0, 5.0)])
def test_choice_grad(on, rng, softcap, other):
    for width in (3, 33, 257, 5000):
        for rows in (1, 9):
            agree(on, scaling.choice_grad(rng, rows, width, softcap, reference_softcap=other))
    for spread in (0.0, 50.0):
        agree(on, scaling.choice_grad(rng, 3, 257, softcap, spread, reference_softcap=other))


def test_only_the_two_tokens_move(on, rng):
    """Another distribution over the two tokens alone has a divergence of exactly zero."""
    problem = scaling.choice_grad(rng, 5, 1000)
    problem.buffers["reference"] = problem.buffers["logits"].copy()
    rows = np.arange(5)
    for token in ("a", "b"):
        problem.buffers["logits"][rows, problem.buffers[token]] += 3.0
    device, _ = on.run(problem.op, problem.arguments, problem.buffers)
    assert np.array_equal(device["values"][:, 1], np.zeros(5, np.float32))
    rest = np.ones((5, 1000), bool)
    for token in ("a", "b"):
        rest[rows, problem.buffers[token]] = False
    assert not device["logits"][:, :1000][rest].any()


@pytest.mark.parametrize(
    "build",
    [
        lambda rng: scaling.scale_dynamic(rng, 33, 257),
        lambda rng: scaling.scale_dynamic_bwd(rng, 33, 257),
        lambda rng: scaling.row_dots(rng, 33, 257),
        lambda rng: scaling.choice_grad(rng, 33, 257, 5.0),
    ],
    ids=["scale_dynamic", "scale_dynamic_bwd", "row_dots", "choice_grad"],
)
def test_a_row_alone_has_the_bits_of_a_row_in_company(on, rng, build):
    problem = build(rng)
    entries = problem.buffers.get("entries")
    if entries is not None:
        entries[:, 0] = np.arange(33)
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]
    count = "n_rows" if entries is None else "n_entries"
    for r in (0, 7, 32):
        cut = {
            name: array if name == "operand" else array[r : r + 1].copy()
            for name, array in problem.buffers.items()
        }
        if entries is not None:
            cut["entries"][:, 0] = 0
        alone = on.run(problem.op, problem.arguments | {count: 1}, cut)[0]
        for name in alone:
            if name != "operand":
                assert same_bits(alone[name], whole[name][r : r + 1]), name


def reference(on, problem, **buffers):
    return on.run(problem.op, problem.arguments, problem.buffers | buffers)[1]


def test_differences_of_a_dynamic_scale(on, rng):
    """d(sum g . y) / dx of y = x (1 + c w . x)."""
    problem = scaling.scale_dynamic_bwd(rng, 3, 33)
    forward = scaling.scale_dynamic(rng, 3, 33)
    d, x = (problem.buffers[n][:, :33].astype(np.float64) for n in ("d", "x"))
    forward.buffers.update(entries=problem.buffers["entries"], operand=problem.buffers["operand"])
    step = 2.0**-10

    def value(at):
        forward.buffers["x"][:, :33] = at
        return (reference(on, forward)["x"][:, :33] * d).sum(1)

    grid = np.round(x * 1024) / 1024  # exact in float32, with its neighbours
    problem.buffers["x"][:, :33] = grid
    want = reference(on, problem)["d"][:, :33]
    for i in (0, 7, 32):
        move = np.zeros((3, 33))
        move[:, i] = step
        slope = (value(grid + move) - value(grid - move)) / (2 * step)  # quadratic: no error
        assert np.abs(slope - want[:, i]).max() <= 1e-9 * np.abs(want).max()


@pytest.mark.parametrize("softcap, other", [(0.0, 0.0), (5.0, 0.0)])
def test_differences_of_a_choice(on, rng, softcap, other):
    """The gradient, and the two scalars against their definitions."""
    problem = scaling.choice_grad(rng, 4, 9, softcap, 2.0, other, faith=0.75, margin=0.25)
    b = problem.buffers
    for name in ("logits", "reference"):
        b[name][:, :9] = np.round(b[name][:, :9] * 1024) / 1024
    rows = np.arange(4)

    def parts(logits):
        cap = lambda x, c: c * np.tanh(x / c) if c else x
        x, y = cap(logits, softcap), cap(b["reference"][:, :9].astype(np.float64), other)
        difference = x[rows, b["a"]] - x[rows, b["b"]]
        keep = np.ones((4, 9), bool)
        keep[rows, b["a"]] = keep[rows, b["b"]] = False
        log_p, log_r = (
            z[keep].reshape(4, 7) - np.log(np.exp(z[keep].reshape(4, 7)).sum(1, keepdims=True))
            for z in (x, y)
        )
        return difference, (np.exp(log_r) * (log_r - log_p)).sum(1)

    def value(logits):
        difference, divergence = parts(logits)
        return np.maximum(0, 0.25 - b["signs"] * difference) + 0.75 * divergence

    at = b["logits"][:, :9].astype(np.float64)
    found = reference(on, problem)
    assert np.allclose(found["values"], np.stack(parts(at), 1), rtol=0, atol=1e-12)
    for i in range(9):
        move = np.zeros((4, 9))
        move[:, i] = 1e-5
        slope = (value(at + move) - value(at - move)) / 2e-5
        assert np.abs(slope - found["logits"][:, i]).max() <= 1e-8
