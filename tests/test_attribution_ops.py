"""The ops of attribution against their float64 references, and the properties on which scores rest:
exact zeros of equal runs, bits that do not depend on how tokens are cut into calls, and the
gradient before a norm from sums over heads.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from op_bench import SIZES, agree, few, same_bits, seeds
from vksteer.verify import attribution, backward, problems


@pytest.mark.parametrize("raw_width", [0, *SIZES, 576])
def test_difference(on, rng, raw_width):
    for n_sample_tokens in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, attribution.difference(rng, n_sample_tokens, 9, width, raw_width))


@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e6, 1e15])
def test_difference_of_small_and_large_values(on, rng, scale):
    agree(on, attribution.difference(rng, 7, 5, 257, 33, scale))


@pytest.mark.parametrize("raw_width", [0, 33, 257])
def test_equal_runs_differ_by_exactly_nothing(on, rng, raw_width):
    """Two tokens with equal values, also on a device that fuses multiply and add."""
    problem = attribution.difference(rng, 8, 16, 257, raw_width)
    for name in ("x", "raw"):
        if name in problem.buffers:
            problem.buffers[name][8:] = problem.buffers[name][:8]
    problem.buffers["pairs"] = np.stack([np.arange(8), np.arange(8) + 8], 1).astype(np.uint32)
    assert not np.any(on.run(problem.op, problem.arguments, problem.buffers)[0]["dst"][:, :257])


@pytest.mark.parametrize("n_sources", [0, 1, 3, 10])
def test_accumulate(on, rng, n_sources):
    for n_sample_tokens in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            for gaps in (False, True):
                agree(on, attribution.accumulate(rng, n_sample_tokens, 9, width, n_sources, gaps))


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("d_head", [2, 6, 64, 80, 128, 256])
def test_head_inputs_over_head_sizes(on, rng, d_head, layer):
    for width in (*SIZES, 576):
        for bias in (False, True):
            more = {"bias": bias, "layer": layer}
            agree(on, attribution.head_inputs(rng, 5, 9, 5, d_head, width, 2, **more))
    agree(on, attribution.head_inputs(rng, 5, 9, 5, d_head, 33, 2, normed=True))


@pytest.mark.parametrize("n_inputs", [3, 8, 15, 48])
def test_head_inputs_over_heads_and_steps(on, rng, n_inputs):
    for n_sample_tokens in (0, 1, 33):
        for n_sources, first, n_steps in (
            (1, 0, 1),
            (3, 0, 10),
            (3, 7, 10),
            (10, 0, 10),
            (0, 4, 5),
        ):
            for gaps in (False, True):
                agree(
                    on,
                    attribution.head_inputs(
                        rng,
                        n_sample_tokens,
                        9,
                        n_inputs,
                        16,
                        33,
                        n_sources,
                        first,
                        n_steps,
                        gaps=gaps,
                        bias=gaps,
                        layer=n_inputs == 8,
                    ),
                )
                agree(
                    on,
                    attribution.head_inputs(
                        rng,
                        n_sample_tokens,
                        9,
                        n_inputs,
                        16,
                        33,
                        n_sources,
                        first,
                        n_steps,
                        gaps=gaps,
                        normed=True,
                    ),
                )


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("n_inputs", [1, 3, 8, 9, 15, 48])
def test_head_gradients(on, rng, n_inputs, layer):
    for n_sample_tokens in (0, 1, 7, 32):
        for n_steps in (0, 1, 10):
            sizes = n_inputs, n_sample_tokens, n_steps, 33
            agree(on, attribution.head_gradients(rng, *sizes, layer))
    for width in (*SIZES, 576, 1024):
        agree(on, attribution.head_gradients(rng, n_inputs, 3, 2, width, layer))


@pytest.mark.parametrize("n_k", [0, 1, 3, 16, 33, 257, 32 * 592])
def test_dots(on, rng, n_k):
    for n_a in (0, 1, 7, 8, 9, 33):
        for n_b in (0, 1, 8, 63, 64, 65, 257):
            if n_k < 1000 or n_a * n_b < 600:
                agree(on, attribution.dots(rng, n_a, n_b, n_k))


@pytest.mark.parametrize("n_sample_tokens", [0, 1, 3, 32])
def test_node_dims(on, rng, n_sample_tokens):
    for n_nodes in (0, 1, 3, 33):
        for width in (*SIZES, 576, 1024):
            agree(on, attribution.node_dims(rng, n_nodes, 3, n_sample_tokens, width))


# -- properties on which scores rest ---------------------------------------------------------------


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_steps_in_several_calls_have_the_bits_of_one(on, rng, layer):
    """However many steps one pass takes, and whatever the order of their tokens in it."""
    whole = attribution.head_inputs(rng, 7, 70, 8, 16, 33, 10, bias=True, layer=layer)
    whole.buffers["sources"] = rng.permutation(70).astype(np.uint32).reshape(7, 10)
    plain = attribution.accumulate(rng, 7, 70, 33, 10)
    plain.buffers["sources"] = whole.buffers["sources"]
    outputs = {"head_inputs": ("heads", "steps", "xs"), "accumulate": ("dst",)}
    want = {p.op: on.run(p.op, p.arguments, p.buffers)[0] for p in (whole, plain)}
    for cuts in ((5,), (1, 4, 9), range(1, 10)):
        for problem in (whole, plain):
            buffers = dict(problem.buffers)
            for first, end in zip((0, *cuts), (*cuts, 10)):
                more = {"first_step": first} if problem is whole else {}
                part = buffers | {"sources": problem.buffers["sources"][:, first:end].copy()}
                result = on.run(
                    problem.op, problem.arguments | more | {"n_sources": end - first}, part
                )[0]
                buffers |= {name: result[name] for name in outputs[problem.op]}
            for name in outputs[problem.op]:
                assert same_bits(buffers[name], want[problem.op][name]), (
                    f"{problem.op}, {name}, cut at {list(cuts)}"
                )


@pytest.mark.parametrize(
    "build",
    [
        lambda rng: attribution.difference(rng, 33, 9, 257, 33),
        lambda rng: attribution.accumulate(rng, 33, 9, 257, 3),
        lambda rng: attribution.head_inputs(rng, 33, 9, 5, 16, 33, 3),
        lambda rng: attribution.head_inputs(rng, 33, 9, 5, 16, 33, 3, layer=True),
    ],
    ids=["difference", "accumulate", "head_inputs", "head_inputs LayerNorm"],
)
def test_a_slot_alone_has_the_bits_of_a_slot_in_company(on, rng, build):
    problem = build(rng)
    per_slot = [
        name
        for name in ("pairs", "sources", "dst", "heads", "steps", "xs")
        if name in problem.buffers
    ]
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]
    for s in (0, 7, 32):
        cut = {
            name: array[s : s + 1].copy() if name in per_slot else array
            for name, array in problem.buffers.items()
        }
        alone = on.run(problem.op, problem.arguments | {"n_sample_tokens": 1}, cut)[0]
        for name in per_slot:
            if name in alone:
                assert same_bits(alone[name], whole[name][s : s + 1]), name


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
def test_head_gradients_do_not_depend_on_the_inputs_beside(on, rng, layer):
    """The kernel takes eight inputs at a time."""
    problem = attribution.head_gradients(rng, 19, 3, 4, 33, layer)
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]["g"]
    for v, n in ((0, 8), (8, 8), (16, 3), (5, 1), (7, 9)):
        part = problem.buffers | {
            "g": problem.buffers["g"][3 * v : 3 * (v + n)].copy(),
            "steps": problem.buffers["steps"][:, :, v : v + n].copy(),
        }
        got = on.run(problem.op, problem.arguments | {"n_inputs": n}, part)[0]["g"]
        assert same_bits(got, whole[3 * v : 3 * (v + n)]), f"inputs {v} to {v + n}"


def test_dots_do_not_depend_on_the_rows_beside(on, rng):
    problem = attribution.dots(rng, 17, 70, 300)
    whole = on.run(problem.op, problem.arguments, problem.buffers)[0]["dst"]
    for i, n, j, m in ((0, 1, 0, 1), (5, 9, 3, 40), (16, 1, 69, 1), (8, 8, 64, 6)):
        part = problem.buffers | {
            "a": problem.buffers["a"][i : i + n].copy(),
            "b": problem.buffers["b"][j : j + m].copy(),
            "dst": problems.nothing(n, m),
        }
        assert same_bits(
            on.run("dots", problem.arguments | {"n_a": n, "n_b": m}, part)[0]["dst"],
            whole[i : i + n, j : j + m],
        )


def before_norm(on, rng, kept, gain, weights, shape):
    """[inputs, slots, width]: the gradient before the norm, by the reference of norm_bwd for every
    step and every input alone, averaged over steps.
    """
    n_sample_tokens, n_steps, d_head, width = shape
    x, dqkv = kept.buffers["x"], kept.buffers["dqkv"]
    found = []
    for v in range(len(weights) // d_head):
        rows = slice(v * d_head, (v + 1) * d_head)
        norm = backward.norm_bwd(rng, n_sample_tokens * n_steps, width)
        dy = (dqkv[:, rows].astype(np.float64) @ weights[rows]).astype(np.float32)
        norm.buffers |= {"x": x, "gain": gain, "dy": problems.padded(dy, x.shape[1])}
        arguments = norm.arguments | {"eps": attribution.EPS}
        dx = on.run("norm_bwd", arguments, norm.buffers)[1]["dx"][:, :width]
        found.append(dx.reshape(n_sample_tokens, n_steps, width).mean(1))
    return np.stack(found)


def before_layer_norm(kept, gain, bias, weights, shape):
    """The same of a LayerNorm, by autograd in float64."""
    n_sample_tokens, n_steps, d_head, width = shape
    x = torch.tensor(kept.buffers["x"][:, :width], dtype=torch.float64)
    dqkv = torch.tensor(kept.buffers["dqkv"][:, : len(weights)], dtype=torch.float64)
    gain, bias, weights = (torch.tensor(t, dtype=torch.float64) for t in (gain, bias, weights))
    found = []
    for v in range(len(weights) // d_head):
        rows = slice(v * d_head, (v + 1) * d_head)
        leaf = x.clone().requires_grad_()
        normed = torch.nn.functional.layer_norm(leaf, (width,), gain, bias, attribution.EPS)
        (normed @ weights[rows].T * dqkv[:, rows]).sum().backward()
        found.append(leaf.grad.reshape(n_sample_tokens, n_steps, width).mean(1).numpy())
    return np.stack(found)


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("n_steps", [1, 4])
def test_kept_small_is_the_gradient_before_the_norm(on, rng, n_steps, layer):
    """head_inputs, the product with W^T and head_gradients, by their references and on the device,
    against the reference of the norm's backward pass (LayerNorm: against autograd), step by step
    and for every input alone.
    """
    n_sample_tokens, n_inputs, d_head, width = 3, 5, 16, 33
    n_tokens = n_sample_tokens * n_steps
    sizes = n_sample_tokens, n_tokens, n_inputs, d_head, width, n_steps
    kept = attribution.head_inputs(rng, *sizes, bias=layer, layer=layer)
    kept.buffers["sources"] = np.arange(n_tokens, dtype=np.uint32).reshape(n_sample_tokens, n_steps)
    kept.buffers["heads"][:, : n_inputs * d_head] = 0
    kept.arguments["weight"] = 1 / n_steps
    gain = problems.numbers(rng, width)
    weights = problems.numbers(rng, n_inputs * d_head, width, scale=width**-0.5)
    shape = n_sample_tokens, n_steps, d_head, width
    x = kept.buffers["x"]
    centred = x[:, :width].astype(np.float64)
    if layer:
        centred -= centred.mean(-1, keepdims=True)
        bias = problems.numbers(rng, width)
        kept.buffers["bias"] = (weights @ bias).astype(np.float32)
        want = before_layer_norm(kept, gain, bias, weights, shape)
    else:
        want = before_norm(on, rng, kept, gain, weights, shape)
    rms = np.sqrt((centred**2).mean(-1, keepdims=True) + attribution.EPS)
    # the projection of the normed stream, from which the op reads the statistic of the norm
    own = (centred / rms * gain) @ weights.T.astype(np.float64)
    kept.buffers["qkv"][:, : n_inputs * d_head] = own + kept.buffers["bias"] if layer else own
    # The references, then the device; the largest errors met are 6.1e-8 and 1.9e-7.
    for which, bound in ((1, 2e-6), (0, 5e-6)):
        sums = on.run("head_inputs", kept.arguments, kept.buffers)[which]
        heads = sums["heads"][:, : n_inputs * d_head].astype(np.float64)
        g = np.einsum(
            "svd,vdw->vsw",
            heads.reshape(n_sample_tokens, n_inputs, d_head),
            weights.reshape(n_inputs, d_head, width),
        )
        end = attribution.head_gradients(rng, n_inputs, n_sample_tokens, n_steps, width, layer)
        end.buffers |= {
            "g": problems.padded(g.reshape(-1, width).astype(np.float32), x.shape[1]),
            "gain": gain,
            "steps": sums["steps"].astype(np.float32),
            "xs": sums["xs"].astype(np.float32).reshape(end.buffers["xs"].shape),
        }
        got = on.run("head_gradients", end.arguments, end.buffers)[which]["g"][:, :width]
        error = np.abs(got.reshape(want.shape) - want).max()
        assert error <= bound * np.abs(want).max()


# -- any shape -------------------------------------------------------------------------------------


@few
@given(
    seed=seeds,
    n_sample_tokens=st.integers(0, 40),
    n_tokens=st.integers(1, 20),
    width=st.integers(1, 300),
    raw_width=st.integers(0, 300),
    n_sources=st.integers(0, 12),
    gaps=st.booleans(),
)
def test_any_sums(on, seed, n_sample_tokens, n_tokens, width, raw_width, n_sources, gaps):
    rng = np.random.default_rng(seed)
    agree(on, attribution.difference(rng, n_sample_tokens, n_tokens, width, raw_width))
    agree(on, attribution.accumulate(rng, n_sample_tokens, n_tokens, width, n_sources, gaps))


@few
@given(
    seed=seeds,
    n_sample_tokens=st.integers(1, 20),
    n_inputs=st.integers(1, 20),
    half=st.integers(1, 40),
    width=st.integers(1, 300),
    first=st.integers(0, 3),
    n_sources=st.integers(1, 5),
    rest=st.integers(0, 3),
    normed=st.booleans(),
    bias=st.booleans(),
    gaps=st.booleans(),
    layer=st.booleans(),
)
def test_any_head_inputs(
    on,
    seed,
    n_sample_tokens,
    n_inputs,
    half,
    width,
    first,
    n_sources,
    rest,
    normed,
    bias,
    gaps,
    layer,
):
    rng = np.random.default_rng(seed)
    agree(
        on,
        attribution.head_inputs(
            rng,
            n_sample_tokens,
            9,
            n_inputs,
            2 * half,
            width,
            n_sources,
            first,
            first + n_sources + rest,
            normed,
            bias and not normed,
            gaps,
            layer,
        ),
    )
    agree(on, attribution.head_gradients(rng, n_inputs, n_sample_tokens, n_sources, width, layer))


@few
@given(
    seed=seeds,
    n_a=st.integers(1, 40),
    n_b=st.integers(1, 100),
    n_k=st.integers(1, 600),
    n_sample_tokens=st.integers(1, 32),
    width=st.integers(1, 200),
)
def test_any_contraction(on, seed, n_a, n_b, n_k, n_sample_tokens, width):
    rng = np.random.default_rng(seed)
    agree(on, attribution.dots(rng, n_a, n_b, n_k))
    agree(on, attribution.node_dims(rng, n_b, 1 + n_a, n_sample_tokens, width))


# -- the bench -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, change",
    [
        (lambda rng: attribution.difference(rng, 3, 5, 33), {"n_sample_tokens": 4}),
        (lambda rng: attribution.difference(rng, 3, 5, 33), {"raw_width": 5}),
        (lambda rng: attribution.accumulate(rng, 3, 5, 33, 2), {"n_sources": 3}),
        (lambda rng: attribution.accumulate(rng, 3, 5, 33, 2), {"stride": 4800}),
        (lambda rng: attribution.head_inputs(rng, 3, 5, 4, 6, 33, 2), {"first_step": 1}),
        (lambda rng: attribution.head_inputs(rng, 3, 5, 4, 6, 33, 2), {"n_inputs": 9}),
        (lambda rng: attribution.head_inputs(rng, 3, 5, 4, 6, 33, 2), {"has_bias": 1}),
        (lambda rng: attribution.head_inputs(rng, 3, 5, 4, 6, 33, 2, normed=True), {"flags": 0}),
        (lambda rng: attribution.head_gradients(rng, 4, 3, 2, 33), {"n_steps": 3}),
        (lambda rng: attribution.dots(rng, 3, 4, 5), {"n_k": 6}),
        (lambda rng: attribution.node_dims(rng, 3, 2, 5, 33), {"n_nodes": 4}),
        (lambda rng: attribution.node_dims(rng, 3, 2, 5, 33), {"n_sample_tokens": 6}),
    ],
)
def test_senseless_sizes_are_refused(on, rng, build, change):
    problem = build(rng)
    with pytest.raises(ValueError):
        on.run(problem.op, problem.arguments | change, problem.buffers)
    agree(on, problem)
