"""Problems for the operations of decoding on GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from .attention import rotation_tables
from .forward import embed
from .problems import (
    ACTIVATIONS,
    EPS,
    NORM_KINDS,
    WEIGHT_TYPES,
    Packed,
    Problem,
    flags,
    inverse_rms,
    label_of,
    matrix_arguments,
    nothing,
    numbers,
    padded,
    panels,
    row_stride,
    suffix,
)

FINISHES = flags("FINISH", "plain", "act", "gate")
STEP_FLAGS = flags(
    "STEP",
    "rotate",
    "interleaved",
    "store",
    "norm_head",
    "norm_wide",
    "norm_layer",
    "norm_bias",
    "pattern",
)
TILED = 2  # the first kernel family whose decoding uses these ops

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "linear_decode": 8e-7,  # 1.5e-7, of sum |norm(x) w| + |bias| + |add|, K up to 257
    "attn_step": 2e-6,  # 4.2e-7, of the largest value
    "pick": 0.0,  # it only picks
}


def _units(buffers, weights, norm, finish, act, scale, softcap, outputs) -> np.ndarray:
    """Of every output: what the sums would be without cancellation. weights: the rows of W in use,
    [N, K].
    """
    k = weights.shape[1]
    x = buffers["x"][:, :k].astype(np.float64)
    if norm != "none":
        mean = x.mean(1, keepdims=True) if norm == "layer" else 0.0
        size = np.abs(x) + np.abs(mean)
        x = size / np.sqrt(((x - mean) ** 2).mean(1, keepdims=True) + EPS)
        x = x * np.abs(buffers["gain"][:k])
    if "norm_bias" in buffers:
        x = x + np.abs(buffers["norm_bias"][:k])
    terms = np.abs(x) @ np.abs(weights).T * (scale or 1.0) + softcap
    if "bias" in buffers:
        terms += np.abs(buffers["bias"])
    units: np.ndarray = terms[:, :outputs]
    if finish != "plain":  # the slope of an activation is at most about 1.13, but for squares
        units = units**2 + 1 if ACTIVATIONS[act] == "relu2" else 1.2 * units + 1
    if finish == "gate":
        units = units * (terms[:, outputs:] + 1)
    if "add" in buffers:
        units = units + np.abs(buffers["add"][:, :outputs])
    return units


def _after_post_norm(rng, buffers, k) -> dict[str, np.ndarray]:
    """Adds a sublayer's output and the gain of its post-norm; returns the buffers with the x that
    they make, without its pads.
    """
    rows, stride = buffers["x"].shape
    sub, gain = numbers(rng, rows, k), numbers(rng, k)
    buffers["sub"] = padded(sub, stride, 0.0)
    buffers["post_gain"] = padded(gain[None], stride, 0.0)[0]
    buffers["mid"] = nothing(rows, stride)
    made: dict[str, np.ndarray] = buffers | {
        "x": buffers["x"][:, :k] + sub * inverse_rms(sub) * gain
    }
    return made


def linear_decode(
    rng,
    rows,
    n,
    k,
    weight_type=0,
    norm="none",
    finish="plain",
    act=0,
    bias=False,
    add=False,
    norm_bias=False,
    softcap=0.0,
    clip=0.0,
    scale=0.0,
    first_k=0,
    n_k=0,
    segment_rows=0,
    post=False,
) -> Problem:
    """n: rows of W; with finish "gate" half as many outputs. post: x comes out of a post-norm."""
    words, weights = panels(numbers(rng, n, k), weight_type)
    inputs, outputs = n_k or k, n // 2 if finish == "gate" else n
    x_stride, dst_stride = row_stride(inputs), row_stride(outputs)
    buffers = {
        "weights": words,
        "x": padded(numbers(rng, rows, inputs), x_stride, 0.0),
        "dst": nothing(rows, dst_stride),
    }
    for name in ["gain"] * (norm != "none") + ["norm_bias"] * norm_bias:
        buffers[name] = padded(numbers(rng, 1, k), x_stride, 0.0)[0]
    if bias:
        buffers["bias"] = numbers(rng, n)
    if add:
        buffers["add"] = padded(numbers(rng, rows, outputs), dst_stride)
    used = weights[:, first_k : first_k + inputs]
    of = _after_post_norm(rng, buffers, k) if post else buffers
    units = _units(of, used, norm, finish, act, scale, softcap, outputs)
    arguments = {name: name for name in buffers} | {
        **matrix_arguments(n, k, weight_type, segment_rows, TILED, scale),
        "n_rows": rows,
        "x_stride": x_stride,
        "dst_stride": dst_stride,
        "first_k": first_k,
        "n_k": n_k,
        "norm": NORM_KINDS[norm],
        "finish": FINISHES[finish],
        "act": act,
        "softcap": softcap,
        "clip": clip,
        "eps": EPS,
    }
    extras = suffix(("bias", bias), ("add", add), ("scaled", scale), ("sliced", n_k))
    return Problem(
        "linear_decode",
        f"{'post ' * post}{norm} {finish} {rows} x {n} x {k} {WEIGHT_TYPES[weight_type]}{extras}",
        arguments,
        buffers,
        {"dst": np.pad(units, ((0, 0), (0, dst_stride - outputs)), constant_values=1.0)},
    )


def attn_step(
    rng,
    cached,
    n_heads,
    n_kv_heads,
    d_head,
    d_rot=None,
    flags=("rotate", "store"),
    window=0,
    softcap=0.0,
    frozen=False,
) -> Problem:
    """One new token a row; `cached`: how many keys each row has already. d_rot: None: all channels
    of a head are rotated. With the flag "pattern", `scores` holds one.
    """
    rows, d_rot = [(c, 1) for c in cached], d_head if d_rot is None else d_rot
    packed, n, of = Packed(rows, frozen), len(rows), set(flags)
    width, kv_width = (n_heads + 2 * n_kv_heads) * d_head, n_kv_heads * d_head
    key_stride = row_stride(packed.n_keys)
    wide, parts = bool(of & {"norm_wide", "norm_layer"}), 2 if "norm_bias" in of else 1
    buffers = {
        "qkv": padded(numbers(rng, n, width), row_stride(width)),
        **rotation_tables(packed, d_rot, long_rows=True),
        "q_gain": numbers(rng, parts * (n_heads * d_head if wide else d_head)),
        "k_gain": numbers(rng, parts * (kv_width if wide else d_head)),
        "k_cache": numbers(rng, packed.n_slots, kv_width),
        "v_cache": numbers(rng, packed.n_slots, kv_width),
        "scores": nothing(n, n_heads, key_stride),
        "z": nothing(n, row_stride(n_heads * d_head)),
    }
    if "pattern" in of:
        for t, token in enumerate(packed.tokens):
            seen = int(token[1]) + 1
            buffers["scores"][t, :, :seen] = rng.dirichlet(np.ones(seen), n_heads)
    return Problem(
        "attn_step",
        f"{label_of(rows, n_heads, n_kv_heads, d_head)} {' '.join(flags)} {d_rot} window"
        f" {window}{' capped' if softcap else ''}{' frozen' if frozen else ''}",
        {name: name for name in buffers}
        | {
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "d_rot": d_rot,
            "stride": row_stride(width),
            "z_stride": row_stride(n_heads * d_head),
            "key_stride": key_stride,
            "window": window,
            "flags": sum(STEP_FLAGS[f] for f in of),
            "scale": d_head**-0.5,
            "softcap": softcap,
            "eps": EPS,
            "n_tokens": n,
            "n_keys": packed.n_keys,
        },
        buffers,
        {"z": np.abs(buffers["v_cache"]).max(), "scores": 1.0},
    )


def pick(rng, rows, width, ties=False, bad=None, empty=None) -> Problem:
    """bad: a value of the second row; empty: (value, tolerance) near which the first column of a
    row must not lie, as it does in the first row.
    """
    stride = row_stride(width)
    x = numbers(rng, rows, width)
    if ties:
        x = np.round(x * 2) / 2
    if bad is not None:
        x[1, width // 2] = bad
    value, near = (1e9, 0.0) if empty is None else empty
    if empty is not None:
        x[:, 0] = value + 3 * near + 1
        x[0, 0] = value + near / 2
    return Problem(
        "pick",
        f"{rows} x {width}{' ties' if ties else ''}{'' if bad is None else f' {bad}'}"
        f"{'' if empty is None else f' but {value} +- {near}'}",
        {"x": "x", "dst": "dst", "n_rows": rows, "width": width}
        | {"x_stride": stride, "empty": value, "near": near},
        {"x": padded(x, stride), "dst": nothing(rows)},
        {"dst": 1.0},
    )


def embed_picked(rng, n_tokens, vocabulary, width, weight_type=0, share=1) -> Problem:
    """Ids from a list, in which the first of `share` tokens counts; the last of these is -1."""
    problem = embed(rng, n_tokens, vocabulary, width, weight_type, scale=3.5, segment_rows=32)
    tokens = problem.buffers["tokens"]
    picked = tokens[:, 0].astype(np.float32)
    picked[(n_tokens - 1) // share * share :] = -1
    tokens[:] = vocabulary  # no such row
    return replace(
        problem,
        label=f"{problem.label} picked for {share}",
        arguments=problem.arguments | {"picked": "picked", "share": share},
        buffers=problem.buffers | {"picked": picked},
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs of these."""
    for weight_type in range(3):
        for rows in (1, 2, 3, 9):
            for norm in NORM_KINDS:
                yield linear_decode(
                    rng, rows, 77, 53, weight_type, norm, bias=True, add=True, clip=6.0
                )
                yield linear_decode(
                    rng, rows, 78, 257, weight_type, norm, "gate", rows % 5, bias=rows == 2
                )
            for norm in ("rms", "none"):
                yield linear_decode(
                    rng, rows, 78, 257, weight_type, norm, "gate", rows % 5, post=True
                )
            yield linear_decode(
                rng, rows, 33, 80, weight_type, "layer", "act", rows % 5, norm_bias=True
            )
        yield linear_decode(rng, 3, 129, 257, weight_type, softcap=5.0, segment_rows=64, scale=0.2)
        yield linear_decode(rng, 5, 33, 80, weight_type, first_k=32, n_k=48)
    yield linear_decode(rng, 2, 16390, 16)  # 32 columns at once
    for d_head in (4, 20, 64, 256):
        yield attn_step(rng, [0, 37, 6, 259], 4, 2, d_head)
        yield attn_step(
            rng, [0, 37, 6, 259], 6, 2, d_head, d_head // 4 * 2, ("rotate", "interleaved", "store")
        )
    for name in ("norm_head", "norm_wide", "norm_layer"):
        yield attn_step(rng, [0, 37], 4, 2, 64, flags=("rotate", "store", name), softcap=20.0)
    biased = ("rotate", "store", "norm_layer", "norm_bias")
    yield attn_step(rng, [0, 37], 6, 2, 20, flags=biased)
    for group in (1, 4, 7):
        yield attn_step(rng, [0, 37, 129], 2 * group, 2, 16, flags=("store",), window=5)
    yield attn_step(rng, [9, 9, 37, 37], 4, 2, 16, flags=(), frozen=True)
    yield attn_step(rng, [0, 37, 600], 4, 2, 16, flags=("pattern",))
    yield pick(rng, 5, 1003, ties=True)
    yield pick(rng, 5, 257, bad=np.nan, empty=(0.0, 0.0))
    for weight_type in range(3):
        yield embed_picked(rng, 7, 77, 33, weight_type, share=1 + weight_type)
