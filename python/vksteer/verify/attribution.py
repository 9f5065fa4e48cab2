"""Problems for the operations that attribution is made of, as `verify` has them for the forward
ones. Units: sums without cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .problems import (
    EPS,
    HEAD_FLAGS,
    NO_SOURCE,
    Problem,
    beside,
    inverse_rms,
    nothing,
    numbers,
    padded,
    row_stride,
)

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "difference": 1.2e-6,  # 2.9e-7
    "accumulate": 1.2e-6,  # 3.0e-7, 10 sources
    "head_inputs": 1.5e-6,  # 3.8e-7
    "head_gradients": 1e-6,  # 3.2e-7, 10 steps
    "dots": 1e-6,  # 2.0e-7, of sum |a b|, K up to 18944
    "node_dims": 1.2e-6,  # 2.8e-7, 32 slots
}


def _sources(
    rng: np.random.Generator, n_sample_tokens: int, n_sources: int, n_tokens: int, gaps: bool
) -> np.ndarray:
    """[n_sample_tokens, n_sources] tokens; with gaps some are missing."""
    out = rng.integers(0, n_tokens, (n_sample_tokens, n_sources)).astype(np.uint32)
    if gaps:
        out[rng.random(out.shape) < 0.3] = NO_SOURCE
    return out


def difference(rng, n_sample_tokens, n_tokens, width, raw_width=0, scale=1.0) -> Problem:
    """raw_width: each run's row is divided by the rms of its row of `raw` first."""
    stride, raw_stride = row_stride(width), row_stride(raw_width)
    buffers = {
        "x": padded(numbers(rng, n_tokens, width, scale=scale), stride),
        "pairs": rng.integers(0, n_tokens, (n_sample_tokens, 2)).astype(np.uint32),
        "dst": nothing(n_sample_tokens, stride),
    }
    sizes = np.abs(buffers["x"][:, :width].astype(np.float64))
    if raw_width:
        buffers["raw"] = padded(numbers(rng, n_tokens, raw_width, scale=scale), raw_stride)
        sizes *= inverse_rms(buffers["raw"][:, :raw_width])
    return Problem(
        "difference",
        f"{n_sample_tokens} of {n_tokens} x {width}"
        f"{f' over rms of {raw_width}' if raw_width else ''}",
        {name: name for name in buffers}
        | {
            "width": width,
            "stride": stride,
            "raw_width": raw_width,
            "raw_stride": raw_stride,
            "eps": EPS,
            "n_sample_tokens": n_sample_tokens,
        },
        buffers,
        {"dst": beside(sizes[buffers["pairs"]].sum(1), buffers["dst"])},
    )


def accumulate(rng, n_sample_tokens, n_tokens, width, n_sources, gaps=True) -> Problem:
    stride, weight = row_stride(width), np.float32(1 / 7)
    buffers = {
        "src": padded(numbers(rng, n_tokens, width), stride),
        "sources": _sources(rng, n_sample_tokens, n_sources, n_tokens, gaps),
        "dst": padded(numbers(rng, n_sample_tokens, width), stride),
    }
    units = np.abs(buffers["dst"][:, :width].astype(np.float64))
    for s, tokens in enumerate(buffers["sources"]):
        units[s] += weight * np.abs(buffers["src"][tokens[tokens != NO_SOURCE], :width]).sum(0)
    return Problem(
        "accumulate",
        f"{n_sample_tokens} of {n_tokens} x {width}, {n_sources} sources"
        f"{' with gaps' if gaps else ''}",
        {name: name for name in buffers}
        | {
            "width": width,
            "stride": stride,
            "n_sources": n_sources,
            "weight": float(weight),
            "n_sample_tokens": n_sample_tokens,
        },
        buffers,
        {"dst": beside(units, buffers["dst"])},
    )


def head_inputs(
    rng,
    n_sample_tokens,
    n_tokens,
    n_inputs,
    d_head,
    width,
    n_sources=1,
    first_step=0,
    n_steps=None,
    normed=False,
    bias=False,
    gaps=False,
    layer=False,
) -> Problem:
    """Steps outside [first_step, first_step + n_sources) and missing sources stay as they were.
    normed: nothing but dqkv may be read. layer: the norm is a LayerNorm.
    """
    n, weight = n_inputs * d_head, np.float32(1 / 7)
    stride, d_stride, n_steps = row_stride(n), row_stride(width), n_steps or first_step + n_sources
    buffers = {
        "dqkv": padded(numbers(rng, n_tokens, n), stride),
        "sources": _sources(rng, n_sample_tokens, n_sources, n_tokens, gaps),
        "heads": padded(numbers(rng, n_sample_tokens, n), stride),
    }
    arguments = {
        "n_inputs": n_inputs,
        "d_head": d_head,
        "stride": stride,
        "width": width,
        "d_stride": d_stride,
        "n_sources": n_sources,
        "first_step": first_step,
        "n_steps": n_steps,
        "flags": HEAD_FLAGS["inputs_normed"] * normed + HEAD_FLAGS["inputs_layer"] * layer,
        "has_bias": int(bias),
        "eps": EPS,
        "weight": float(weight),
        "n_sample_tokens": n_sample_tokens,
    }
    if not normed:
        buffers |= {
            "qkv": padded(numbers(rng, n_tokens, n), stride),
            "x": padded(numbers(rng, n_tokens, width), d_stride),
            "steps": nothing(n_sample_tokens, n_steps, n_inputs),
            "xs": nothing(n_sample_tokens, n_steps, d_stride),
        }
        if bias:
            buffers["bias"] = numbers(rng, n)
    return Problem(
        "head_inputs",
        f"{n_sample_tokens} of {n_tokens} tokens, {n_inputs} inputs of {d_head}, width {width},"
        f" steps {first_step} + {n_sources} of {n_steps}"
        f"{' LayerNorm' if layer else ''}"
        f"{' normed' if normed else ''}{' bias' if bias else ''}{' with gaps' if gaps else ''}",
        {name: name for name in buffers} | arguments,
        buffers,
        _head_inputs_units(buffers, n_inputs, d_head, width, first_step, weight, layer),
    )


def _head_inputs_units(
    buffers: dict[str, np.ndarray],
    n_inputs: int,
    d_head: int,
    width: int,
    first_step: int,
    weight: np.float32,
    layer: bool,
) -> dict[str, np.ndarray]:
    """Of "heads", and of "steps" where the gradients do not end at the norm's result."""
    n = n_inputs * d_head
    dqkv = np.abs(buffers["dqkv"][:, :n])
    n_tokens, units = len(dqkv), {}
    inverse = along = np.ones((n_tokens, 1))
    if "steps" in buffers:
        sizes = np.abs(buffers["qkv"][:, :n].astype(np.float64))
        if "bias" in buffers:
            sizes += np.abs(buffers["bias"])
        x = buffers["x"][:, :width].astype(np.float64)
        inverse = inverse_rms(x - x.mean(-1, keepdims=True) if layer else x)
        products = (sizes * dqkv).reshape(n_tokens, n_inputs, d_head).sum(-1)
        along = weight * inverse**2 / width * products
        units["steps"] = np.ones(buffers["steps"].shape)
    heads = np.abs(buffers["heads"][:, :n].astype(np.float64))
    for s, tokens in enumerate(buffers["sources"]):
        for k, t in enumerate(tokens):
            if t == NO_SOURCE:
                continue
            heads[s] += weight * inverse[t] * dqkv[t]
            if "steps" in units:
                units["steps"][s, first_step + k] = along[t]
    return units | {"heads": beside(heads, buffers["heads"])}


def head_gradients(rng, n_inputs, n_sample_tokens, n_steps, width, layer=False) -> Problem:
    """layer: the norm is a LayerNorm."""
    d_stride = row_stride(width)
    buffers = {
        "g": padded(numbers(rng, n_inputs * n_sample_tokens, width), d_stride),
        "gain": numbers(rng, width),
        "steps": numbers(rng, n_sample_tokens, n_steps, n_inputs),
        "xs": padded(numbers(rng, n_sample_tokens * n_steps, width), d_stride),
    }
    steps, xs = (
        np.abs(buffers["steps"].astype(np.float64)),
        np.abs(buffers["xs"][:, :width]).reshape(n_sample_tokens, n_steps, width),
    )
    units = np.abs(buffers["g"][:, :width].astype(np.float64) * buffers["gain"])
    if layer:
        units += units.mean(-1, keepdims=True)
    units += np.einsum("tkv,tkd->vtd", steps, xs).reshape(-1, width)
    return Problem(
        "head_gradients",
        f"{n_inputs} inputs x {n_sample_tokens} sample tokens x {width}, {n_steps} steps"
        f"{', LayerNorm' if layer else ''}",
        {name: name for name in buffers}
        | {
            "n_inputs": n_inputs,
            "n_sample_tokens": n_sample_tokens,
            "n_steps": n_steps,
            "width": width,
            "d_stride": d_stride,
            "flags": HEAD_FLAGS["gradients_layer"] * layer,
        },
        buffers,
        {"g": beside(units, buffers["g"])},
    )


def dots(rng, n_a, n_b, n_k) -> Problem:
    a, b = numbers(rng, n_a, n_k), numbers(rng, n_b, n_k)
    return Problem(
        "dots",
        f"{n_a} x {n_b} over {n_k}",
        {"a": "a", "b": "b", "dst": "dst", "n_a": n_a, "n_b": n_b, "n_k": n_k},
        {"a": a, "b": b, "dst": nothing(n_a, n_b)},
        {"dst": np.abs(a.astype(np.float64)) @ np.abs(b).T},
    )


def node_dims(rng, n_nodes, n_groups, n_sample_tokens, width) -> Problem:
    d_stride = row_stride(width)
    groups = rng.integers(0, n_groups, n_nodes).astype(np.uint32)
    buffers = {
        "du": padded(numbers(rng, n_nodes * n_sample_tokens, width), d_stride),
        "g": padded(numbers(rng, n_groups * n_sample_tokens, width), d_stride),
        "groups": groups,
        "dims": nothing(n_nodes, width),
    }
    rows = lambda name, n: np.abs(buffers[name][:, :width].astype(np.float64)).reshape(
        n, n_sample_tokens, width
    )
    return Problem(
        "node_dims",
        f"{n_nodes} nodes of {n_groups} groups x {n_sample_tokens} sample tokens x {width}",
        {name: name for name in buffers}
        | {
            "n_sample_tokens": n_sample_tokens,
            "width": width,
            "d_stride": d_stride,
            "n_nodes": n_nodes,
        },
        buffers,
        {"dims": (rows("du", n_nodes) * rows("g", n_groups)[groups]).sum(1)},
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs of these."""
    for raw_width in (0, 33, 257):
        yield difference(rng, 7, 5, 33, raw_width)
    for n_sources in (1, 3):
        yield accumulate(rng, 7, 5, 257, n_sources)
    for layer in (False, True):
        for d_head in (6, 64, 80):
            more = {"bias": d_head == 6, "gaps": True, "layer": layer}
            yield head_inputs(rng, 7, 5, 8, d_head, 257, 3, first_step=2, n_steps=7, **more)
        yield head_gradients(rng, 9, 7, 5, 257, layer)
    yield head_inputs(rng, 7, 5, 8, 16, 33, 3, normed=True)
    for n_k in (16, 33 * 272):
        yield dots(rng, 17, 33, n_k)
    yield node_dims(rng, 7, 3, 32, 257)
