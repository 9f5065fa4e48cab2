"""Problems for the backward operations, as `verify` has them for the forward ones.

A gradient is linear in what comes from above, so its unit is what it would be without
cancellation, as for a product.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .attention import rotation_tables
from .problems import (
    ACTIVATIONS,
    NORM_BWD_FLAGS,
    ROPE_FLAGS,
    SCALARS,
    TILE,
    WEIGHT_TYPES,
    Packed,
    Problem,
    beside,
    label_of,
    matrix_arguments,
    nothing,
    numbers,
    padded,
    panels,
    row_stride,
    suffix,
)
from .scalars import logit_grad, pair_grad

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "linear_bwd": 1.5e-6,  # 3.0e-7
    "norm_bwd": 2e-6,  # 4.0e-7
    "rope_bwd": 2e-6,  # 5.0e-7
    "attn_softmax_bwd": 1e-6,  # 1.9e-7
    "attn_output_bwd": 4e-6,  # 9.8e-7, 257 queries
    "act_bwd": 3.5e-6,  # 8.6e-7
    "clip_bwd": 0.0,  # it only picks
}


def padded_to_16(n: int) -> int:
    """To the next multiple of 16, as matrices are padded."""
    return -(-n // 16) * 16


# -- matrices --------------------------------------------------------------------------------------


def linear_bwd(
    rng,
    rows,
    n,
    k,
    weight_type=0,
    add=False,
    first_n=0,
    n_sum=0,
    first_k=0,
    n_k=0,
    segment_rows=0,
    family=None,
    scale=0.0,
) -> Problem:
    """Dx = dy W. Columns of dy up to the next multiple of 16 are zero, those of dx become what the
    zeros of W's pad give.
    """
    words, weights = panels(numbers(rng, n, k), weight_type)
    outputs, inputs = n_sum or n, n_k or padded_to_16(k)
    y_stride, x_stride = padded_to_16(outputs) + 16, row_stride(inputs)
    dy = padded(numbers(rng, rows, outputs), y_stride)
    dy[:, outputs : padded_to_16(outputs)] = 0
    dx = nothing(rows, x_stride)
    part = np.zeros((outputs, inputs))
    there = weights[first_n : first_n + outputs, first_k : first_k + inputs]
    part[:, : there.shape[1]] = there
    units = np.abs(dy[:, :outputs].astype(np.float64)) @ np.abs(part) * (abs(scale) or 1.0)
    if add:
        dx[:, :inputs] = numbers(rng, rows, inputs)
        units += np.abs(dx[:, :inputs])
    arguments = {
        "dy": "dy",
        "dx": "dx",
        "n_rows": rows,
        "y_stride": y_stride,
        "x_stride": x_stride,
        "first_n": first_n,
        "n_sum": n_sum,
        "first_k": first_k,
        "n_k": n_k,
        "add": int(add),
        **matrix_arguments(n, k, weight_type, segment_rows, family, scale),
    }
    extras = suffix(
        ("added", add),
        ("scaled", scale),
        (f"n from {first_n}", n_sum),
        (f"k from {first_k}", n_k),
        ("segments", segment_rows),
        (f"family {family}", family),
    )
    return Problem(
        "linear_bwd",
        f"{rows} x {n} x {k} {WEIGHT_TYPES[weight_type]}{extras}",
        arguments,
        {"weights": words, "dy": dy, "dx": dx},
        {"dx": beside(units, dx)},
    )


# -- row by row ------------------------------------------------------------------------------------


def _norm_units(x, dn, eps, layer=False):
    """Of the gradient through x / sqrt(mean x^2 + eps), or (layer) through that of x - mean x, and
    of -(dn . n) / scale. x and dn [rows, groups, width]; the same, and [rows, groups].
    """
    x, dn = x.astype(np.float64), np.abs(dn.astype(np.float64))
    centred = x - x.mean(-1, keepdims=True) if layer else x
    scale = np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    x = np.abs(x) + np.abs(x).mean(-1, keepdims=True) if layer else np.abs(x)
    along = (dn * x).sum(-1, keepdims=True) / scale
    terms = dn + x / scale * along / x.shape[-1]
    if layer:
        terms += dn.mean(-1, keepdims=True)
    return terms / scale, (along / scale)[..., 0]


def norm_bwd(rng, rows, width, flags=(), scale=1.0, in_place=False, groups=1, mean=0.0) -> Problem:
    """`groups` and `mean` are as in forward.norm."""
    whole = groups * width
    stride, of, eps = row_stride(whole), set(flags), 1e-5
    sources = rows + 3 if "rows" in of else rows
    buffers = {
        "x": padded(numbers(rng, sources, whole, scale=scale) + np.float32(mean * scale), stride),
        "gain": numbers(rng, whole),
        "dy": padded(numbers(rng, rows, whole), stride),
        "dx": nothing(rows, stride),
        "dnormalized": nothing(rows, stride),
        "dscale": nothing(rows, groups),
    }
    if "add" in of:
        buffers["add"] = padded(numbers(rng, rows, whole), stride)
    if "rows" in of:
        buffers["rows"] = rng.integers(0, sources, rows).astype(np.uint32)
    arguments = {name: name for name in buffers} | {
        "width": width,
        "stride": stride,
        "n_rows": rows,
        "n_groups": groups if groups > 1 else 0,
        "eps": eps,
        "flags": sum(NORM_BWD_FLAGS[f] for f in of),
    }
    x, dy = buffers["x"][buffers.get("rows", slice(None)), :whole], buffers["dy"][:, :whole]
    dn = dy if "normalized" in of else dy * buffers["gain"]
    shape = (rows, groups, width)
    units, along = _norm_units(x.reshape(shape), dn.reshape(shape), eps, "layer" in of)
    units = units.reshape(rows, whole)
    if "add" in of:
        units = units + np.abs(buffers["add"][:, :whole])
    to = "dy" if in_place else "dx"
    arguments["dx"] = to
    extras = ("in place", in_place), (f"{groups} groups", groups > 1), (f"mean {mean}", mean)
    return Problem(
        "norm_bwd",
        f"{rows} x {width} {' '.join(sorted(of))}{suffix(*extras)}",
        arguments,
        buffers,
        {to: beside(units, buffers["dx"]), "dscale": along},
    )


def act_bwd(rng, n_tokens, width, kind=0, spread=4.0, gate=None, plain=False) -> Problem:
    """plain: there is no gate, and `gate` is what the activation is taken of."""
    columns = width if plain else 2 * width
    in_stride, out_stride = row_stride(columns), row_stride(width)
    gate_up, dpost = numbers(rng, n_tokens, columns), numbers(rng, n_tokens, width)
    gate_up[:, :width] = gate_up[:, :width] * spread if gate is None else gate
    d, dgate_up = np.abs(dpost.astype(np.float64)), nothing(n_tokens, in_stride)
    size = np.abs(gate_up[:, :width].astype(np.float64))
    tiny = np.finfo(np.float32).tiny  # squares below it are 0 on the device
    slope, value = (2 * size, size**2 + tiny) if ACTIVATIONS[kind] == "relu2" else (1, size)
    units = d * slope
    if not plain:
        units = np.concatenate([units * np.abs(gate_up[:, width:]), d * value], 1)
    return Problem(
        "act_bwd",
        f"{ACTIVATIONS[kind]} {n_tokens} x {width}{' plain' if plain else ''}",
        {
            "gate_up": "gate_up",
            "dpost": "dpost",
            "dgate_up": "dgate_up",
            "width": width,
            "in_stride": in_stride,
            "out_stride": out_stride,
            "act": kind,
            "plain": int(plain),
            "n_tokens": n_tokens,
        },
        {
            "gate_up": padded(gate_up, in_stride),
            "dpost": padded(dpost, out_stride),
            "dgate_up": dgate_up,
        },
        {"dgate_up": beside(units, dgate_up)},
    )


# -- attention -------------------------------------------------------------------------------------


def rope_bwd(
    rng,
    rows,
    n_heads,
    n_kv_heads,
    d_head,
    flags=("qk_norm", "rotate"),
    d_rot=None,
    long_rows=False,
) -> Problem:
    """d_rot: how many channels of a head are rotated; None: all."""
    packed, d_rot = Packed(rows), d_head if d_rot is None else d_rot
    n, turned, width = len(packed.tokens), n_heads + n_kv_heads, (n_heads + 2 * n_kv_heads) * d_head
    buffers = {
        "dqkv": padded(numbers(rng, n, width), row_stride(width)),
        "qkv": padded(numbers(rng, n, width), row_stride(width)),
        **rotation_tables(packed, d_rot, long_rows),
        "q_gain": numbers(rng, d_head),
        "k_gain": numbers(rng, d_head),
    }
    heads = lambda array: np.abs(array[:, : turned * d_head].astype(np.float64)).reshape(
        n, turned, d_head
    )
    d = heads(buffers["dqkv"])
    if "rotate" in flags:
        pair = d[..., :d_rot]
        if "interleaved" in flags:
            pair = pair.reshape(n, turned, d_rot // 2, 2)[..., ::-1].reshape(pair.shape)
        else:
            pair = np.roll(pair, d_rot // 2, -1)
        d[..., :d_rot] += pair
        d[:, :n_heads, :d_rot] *= 1.25
    if "qk_norm" in flags:
        gain = np.abs(
            np.concatenate(
                [
                    np.tile(buffers["q_gain"], (n_heads, 1)),
                    np.tile(buffers["k_gain"], (n_kv_heads, 1)),
                ]
            )
        )
        d, _ = _norm_units(heads(buffers["qkv"]), d * gain, 1e-6)
    return Problem(
        "rope_bwd",
        f"{label_of(rows, n_heads, n_kv_heads, d_head)} {' '.join(flags)} {d_rot}"
        f"{' long' if long_rows else ''}",
        {name: name for name in buffers}
        | {
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "d_rot": d_rot,
            "stride": row_stride(width),
            "eps": 1e-6,
            "flags": sum(ROPE_FLAGS[f] for f in flags),
            "n_tokens": n,
        },
        buffers,
        {"dqkv": beside(d.reshape(n, turned * d_head), buffers["dqkv"])},
    )


def clip_bwd(rng, rows, width, limit=0.7) -> Problem:
    stride = row_stride(width)
    x, d = numbers(rng, rows, width), numbers(rng, rows, width)
    x[:, ::3] = limit * np.sign(x[:, ::3])  # values at the limit keep their gradient
    return Problem(
        "clip_bwd",
        f"{rows} x {width}",
        {"x": "x", "d": "d", "width": width, "stride": stride, "limit": limit, "n_tokens": rows},
        {"x": padded(x, stride), "d": padded(d, stride)},
    )


def _patterns(rng, packed, first, n_heads, window) -> np.ndarray:
    """Random attention patterns, as the softmax kernel writes them: zeros before the window and
    for one tile of keys after each token's position; NaN beyond, which no kernel may read.
    """
    pos = packed.pos[first:]
    pattern = nothing(len(pos), n_heads, row_stride(packed.n_keys))
    for t, p in enumerate(pos):
        start = max(0, p + 1 - window) if window else 0
        pattern[t, :, : p + TILE] = 0
        pattern[t, :, start : p + 1] = rng.dirichlet(np.ones(p + 1 - start), n_heads)
    return pattern


def attn_softmax_bwd(rng, rows, n_heads, window=0, softcap=0.0, tile=0) -> Problem:
    packed = Packed(rows)
    first, _ = packed.from_tile(tile)
    pattern = _patterns(rng, packed, first, n_heads, window)
    dpattern, units = nothing(*pattern.shape), np.ones(pattern.shape)
    buffers = {"pattern": pattern, "dpattern": dpattern, "tokens": packed.tokens}
    if softcap:
        buffers["scores"] = nothing(*pattern.shape)
    scale = 0.125
    # keys before the window are scored, too, and zeroed only here
    for t, p in enumerate(packed.pos[first:]):
        seen = (t, slice(None), slice(0, p + 1))
        dpattern[seen] = numbers(rng, n_heads, p + 1)
        share, d = pattern[seen].astype(np.float64), np.abs(dpattern[seen])
        units[seen] = share * (d + (share * d).sum(-1, keepdims=True)) * scale
        if softcap:
            buffers["scores"][seen] = softcap * np.tanh(numbers(rng, n_heads, p + 1))
    units[units == 0] = 1
    return Problem(
        "attn_softmax_bwd",
        f"{label_of(rows, n_heads, n_heads, 0)} window {window}{' capped' if softcap else ''}",
        {name: name for name in buffers}
        | {
            "first_token": first,
            "n_heads": n_heads,
            "key_stride": pattern.shape[-1],
            "window": window,
            "scale": scale,
            "softcap": softcap,
            "n_tokens": len(pattern),
            "n_keys": packed.n_keys,
        },
        buffers,
        {"dpattern": units},
    )


def attn_output_bwd(rng, rows, n_heads, n_kv_heads, d_head, window=0, pieces=1, piece=0) -> Problem:
    """rows: tokens of each; every key of a row is among the tokens. pieces: the queries are cut
    into as many, and this is the piece'th of them.
    """
    packed = Packed([(0, n) for n in rows])
    n = len(packed.tokens)
    first, last = n * piece // pieces, n * (piece + 1) // pieces
    width, y_stride, out_stride = (
        n_kv_heads * d_head,
        row_stride(n_heads * d_head) + 16,
        row_stride(n_kv_heads * d_head) + 16,
    )
    a = _patterns(rng, packed, 0, n_heads, window)
    a *= np.where(rng.integers(0, 2, a.shape), 1, -1)
    y = padded(numbers(rng, n, n_heads * d_head), y_stride)
    sums = padded(numbers(rng, n, width), out_stride) if piece else nothing(n, out_stride)
    units = np.nan_to_num(np.abs(sums[:, :width])).reshape(n, n_kv_heads, d_head).astype(np.float64)
    for t in range(first, last):
        pos = int(packed.tokens[t, 1])
        shares, from_above = (
            np.abs(a[t, :, : pos + 1]).astype(np.float64),
            np.abs(y[t, : n_heads * d_head]).reshape(n_heads, d_head),
        )
        units[t - pos : t + 1] += np.einsum(
            "ghj,ghd->jgd",
            shares.reshape(n_kv_heads, -1, pos + 1),
            from_above.reshape(n_kv_heads, -1, d_head),
        )
    units[units == 0] = 1
    buffers = {
        "a": np.ascontiguousarray(a[first:last]),
        "y": y,
        "tokens": packed.tokens,
        "tiles": packed.tiles,
        "sums": sums,
    }
    return Problem(
        "attn_output_bwd",
        f"{label_of([(0, n) for n in rows], n_heads, n_kv_heads, d_head)} window"
        f" {window}{f' piece {piece + 1} of {pieces}' if pieces > 1 else ''}",
        {name: name for name in buffers}
        | {
            "first_token": first,
            "last_token": last,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "y_stride": y_stride,
            "out_stride": out_stride,
            "key_stride": a.shape[-1],
            "window": window,
            "add": int(piece > 0),
            "n_tiles": len(packed.tiles),
            "n_keys": packed.n_keys,
        },
        buffers,
        {"sums": beside(units.reshape(n, width), sums)},
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs of these."""
    for weight_type in range(3):
        for rows in (1, 3, 7, 9, 33):
            yield linear_bwd(
                rng, rows, 77, 53, weight_type, add=rows == 7, scale=0.22 * (rows == 9)
            )
        yield linear_bwd(rng, 3, 129, 257, weight_type, segment_rows=64)
        yield linear_bwd(rng, 5, 96, 80, weight_type, first_n=48, n_sum=32, first_k=32, n_k=48)
    for flags in (
        (),
        ("add", "rows"),
        ("write_scale", "write_normalized"),
        ("normalized", "add"),
        ("write_scale", "no_out"),
    ):
        yield norm_bwd(rng, 3, 257, flags)
        yield norm_bwd(rng, 3, 257, (*flags, "layer"), mean=3.0)
    yield norm_bwd(rng, 3, 80, ("layer", "add", "write_scale"), groups=5)
    for d_head in (2, 6, 64, 80, 128):
        yield rope_bwd(rng, [(0, 3), (5, 1)], 4, 2, d_head)
        yield rope_bwd(
            rng, [(0, 3), (5, 1)], 4, 2, d_head, ("rotate", "interleaved"), d_head // 4 * 2, True
        )
        yield attn_output_bwd(rng, (17, 1, 9), 4, 2, d_head, window=5 if d_head == 64 else 0)
    for window, softcap in ((0, 0.0), (1, 0.0), (5, 20.0)):
        yield attn_softmax_bwd(rng, [(0, 33), (0, 1), (0, 9)], 3, window, softcap)
    for kind in range(len(ACTIVATIONS)):
        yield act_bwd(rng, 3, 257, kind)
        yield act_bwd(rng, 3, 257, kind, plain=True)
    yield clip_bwd(rng, 3, 257)
    for softcap in (0.0, 5.0):
        yield pair_grad(rng, 3, 257, softcap)
        yield pair_grad(rng, 3, 257, softcap, bias=True)
        for kind in range(len(SCALARS)):
            yield logit_grad(rng, 3, 257, kind, softcap)
