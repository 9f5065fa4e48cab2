"""Problems for the operations of the forward pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .attention import attn_decode, attn_output, attn_scores, attn_softmax, rope, rotation_tables
from .problems import (
    ACTIVATIONS,
    COPY_FLAGS,
    EDIT_KEYS,
    EDITS,
    EPS,
    NORM_FLAGS,
    PAIRS,
    TOKEN_WORDS,
    WEIGHT_TYPES,
    Packed,
    Problem,
    beside,
    matrix_arguments,
    nothing,
    numbers,
    padded,
    panels,
    row_stride,
    suffix,
)

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "embed": 2e-7,  # 0.6e-7
    "linear": 1.5e-6,  # 2.9e-7, of sum |x w| + |bias| + |add|, K up to 257
    "linear_pairs": 1.2e-6,  # 2.8e-7, of sum |x gain w| + |bias|
    "norm": 2e-6,  # RMS 4.5e-7, width 1024; LayerNorm 7.1e-7, width 3 and a mean of 2
    "act": 2e-6,  # 3.1e-7, of |gate up|
    "edit": 1e-6,  # 1.9e-7
    "copy": 4e-7,  # 1.1e-7
    "sum_heads": 6e-7,  # 1.5e-7, of sum |x|
    "clip": 0.0,  # it only picks
}


def _product_units(buffers, weights, scale, softcap) -> np.ndarray:
    """Of every output of a product with weights [N, K]: sum |x w|, with bias and residual."""
    n, k = weights.shape
    x = np.abs(buffers["x"][:, :k].astype(np.float64))
    units: np.ndarray = x @ np.abs(weights).T * (abs(scale) or 1.0)
    if "bias" in buffers:
        units += np.abs(buffers["bias"])
    if "add" in buffers:
        units += np.abs(buffers["add"][:, :n])
    units += abs(softcap)  # drivers' tanh is good to a rounding of 1, not of a small result
    return units


def linear(
    rng,
    rows,
    n,
    k,
    weight_type=0,
    bias=False,
    add=False,
    softcap=0.0,
    first_k=0,
    n_k=0,
    segment_rows=0,
    family=None,
    decode=0,
    scale=0.0,
    clip=0.0,
) -> Problem:
    words, weights = panels(numbers(rng, n, k), weight_type)
    inputs, dst_stride = n_k or k, row_stride(n)
    x_stride = row_stride(inputs)
    buffers = {
        "weights": words,
        "x": padded(numbers(rng, rows, inputs), x_stride, 0.0),
        "dst": nothing(rows, dst_stride),
    }
    if bias:
        buffers["bias"] = numbers(rng, n)
    if add:
        buffers["add"] = padded(numbers(rng, rows, n), dst_stride)
    unit = _product_units(buffers, weights[:, first_k : first_k + inputs], scale, softcap)
    arguments = {
        **{name: name for name in buffers},
        **matrix_arguments(n, k, weight_type, segment_rows, family, scale),
        "n_rows": rows,
        "x_stride": x_stride,
        "dst_stride": dst_stride,
        "first_k": first_k,
        "n_k": n_k,
        "softcap": softcap,
        "clip": clip,
        "decode": decode,
    }
    extras = suffix(
        ("bias", bias),
        ("add", add),
        ("softcap", softcap),
        ("scaled", scale),
        ("clipped", clip),
        (f"k from {first_k}", n_k),
        ("segments", segment_rows),
        (f"family {family}", family),
        ("decode", decode),
    )
    return Problem(
        "linear",
        f"{rows} x {n} x {k} {WEIGHT_TYPES[weight_type]}{extras}",
        arguments,
        buffers,
        {"dst": np.pad(unit, ((0, 0), (0, dst_stride - n)))},
    )


def linear_pairs(
    rng, rows, k, kind, weight_type=0, width=0, heads=(0, 0, 0), act=0, bias=False, family=None
) -> Problem:
    """kind: "gate" (width outputs twice) or "rotate" (heads: query heads,
    key/value heads, head size).
    """
    n_heads, n_kv_heads, d_head = heads
    n = 2 * width if kind == "gate" else (n_heads + 2 * n_kv_heads) * d_head
    words, weights = panels(numbers(rng, n, k), weight_type)
    columns = width if kind == "gate" else n_heads * d_head
    x_stride, dst_stride = row_stride(k), row_stride(columns)
    packed = Packed([(3, 1)] * rows)
    buffers = {
        "weights": words,
        "x": padded(numbers(rng, rows, k), x_stride, 0.0),
        "gain": padded(numbers(rng, 1, k), x_stride, 0.0)[0],
        "dst": nothing(rows, dst_stride),
    }
    if bias:
        buffers["bias"] = numbers(rng, n)
    if kind == "rotate":
        buffers |= {
            "angles": rotation_tables(packed, d_head, long_rows=True)["angles"],
            "tokens": packed.tokens,
            "k_cache": nothing(packed.n_slots, n_kv_heads * d_head),
            "v_cache": nothing(packed.n_slots, n_kv_heads * d_head),
        }
    x = buffers["x"][:, :k].astype(np.float64)
    terms = np.abs(x / np.sqrt((x**2).mean(1, keepdims=True)) * buffers["gain"][:k]) @ np.abs(
        weights
    ).T + (np.abs(buffers["bias"]) if bias else 0)
    units = {name: terms.max() for name in ("dst", "k_cache", "v_cache")}
    if kind == "gate":  # an error of either is as large as the other makes it
        units = {"dst": beside(terms[:, :width] * terms[:, width:], buffers["dst"])}
    arguments = {
        **{name: name for name in buffers},
        **matrix_arguments(n, k, weight_type, family=family),
        "n_rows": rows,
        "x_stride": x_stride,
        "dst_stride": dst_stride,
        "kind": PAIRS[kind],
        "act": act,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "eps": EPS,
    }
    extras = suffix(("bias", bias), (f"family {family}", family is not None))
    return Problem(
        "linear_pairs",
        f"{kind} {rows} x {n} x {k} {WEIGHT_TYPES[weight_type]}{extras}",
        arguments,
        buffers,
        units,
    )


def embed(
    rng,
    n_tokens,
    vocabulary,
    width,
    weight_type=0,
    scale=1.0,
    segment_rows=0,
    positions=False,
    add=False,
) -> Problem:
    """positions: the rows are those of the tokens' positions; add: they are added to others."""
    words, weights = panels(numbers(rng, vocabulary, width), weight_type)
    tokens = np.zeros((n_tokens, TOKEN_WORDS), np.uint32)
    column = int(positions)  # of a token: id, pos
    tokens[:, column] = rng.integers(0, vocabulary, n_tokens)
    tokens[:2, column] = (0, vocabulary - 1)[:n_tokens]
    tokens[:, 1 - column] = vocabulary  # no such row
    stride = row_stride(width)
    buffers = {"tokens": tokens, "weights": words, "dst": nothing(n_tokens, stride)}
    units = {}
    if add:
        buffers["add"] = padded(numbers(rng, n_tokens, width), stride)
        size = np.abs(buffers["add"][:, :width]) + np.abs(scale * weights[tokens[:, column]])
        units["dst"] = beside(size, buffers["dst"])
    arguments = {
        **{name: name for name in buffers if name != "weights"},
        "n_tokens": n_tokens,
        "stride": stride,
        "positions": int(positions),
        "scale": scale,
        **matrix_arguments(vocabulary, width, weight_type, segment_rows),
    }
    return Problem(
        "embed",
        f"{n_tokens} of {vocabulary} x {width} {WEIGHT_TYPES[weight_type]}"
        f"{suffix(('positions', positions), ('add', add))}",
        arguments,
        buffers,
        units,
    )


def norm(rng, rows, width, flags=(), scale=1.0, in_place=False, groups=1, mean=0.0) -> Problem:
    """groups: parts of a row, `width` wide, each with a norm of its own. mean: of x, in units of
    its scale.
    """
    whole = groups * width
    stride, of = row_stride(whole), set(flags)
    sources = rows + 3 if "rows" in of else rows
    scales = (rows, groups)
    buffers = {
        "x": padded(numbers(rng, sources, whole, scale=scale) + np.float32(mean * scale), stride),
        "gain": numbers(rng, whole),
        "dst": nothing(rows, stride),
        "normalized": nothing(rows, stride),
        "scale": np.abs(numbers(rng, *scales)) + 0.5 if "read_scale" in of else nothing(*scales),
    }
    arguments = {name: name for name in buffers} | {
        "width": width,
        "stride": stride,
        "n_rows": rows,
        "n_groups": groups if groups > 1 else 0,
        "eps": 1e-5,
        "flags": sum(NORM_FLAGS[f] for f in of),
    }
    units = {}
    if "bias" in of:
        buffers["bias"] = numbers(rng, whole)
        arguments["bias"] = "bias"
    if "add" in of:
        buffers["add"] = padded(numbers(rng, rows, whole), stride)
        arguments["add"] = "add"
        units["dst"] = np.nanmax(np.abs(buffers["add"]), initial=1.0)
    if "rows" in of:
        buffers["rows"] = rng.integers(0, sources, rows).astype(np.uint32)
        arguments["rows"] = "rows"
    if in_place:
        arguments["dst"] = "x"
    extras = ("in place", in_place), (f"{groups} groups", groups > 1), (f"mean {mean}", mean)
    return Problem(
        "norm",
        f"{rows} x {width} {' '.join(sorted(of))}{suffix(*extras)}",
        arguments,
        buffers,
        units,
    )


def act(rng, n_tokens, width, kind=0, spread=4.0, gate=None, plain=False) -> Problem:
    """plain: there is no gate, and `gate` is what the activation is taken of."""
    columns = width if plain else 2 * width
    in_stride, out_stride = row_stride(columns), row_stride(width)
    gate_up = numbers(rng, n_tokens, columns)
    gate_up[:, :width] = gate_up[:, :width] * spread if gate is None else gate
    unit = np.abs(gate_up[:, :width].astype(np.float64))
    if ACTIVATIONS[kind] == "relu2":
        unit = unit**2 + np.finfo(np.float32).tiny  # squares below it are 0 on the device
    if not plain:
        unit *= np.abs(gate_up[:, width:])
    unit = np.pad(unit, ((0, 0), (0, out_stride - width)))
    return Problem(
        "act",
        f"{ACTIVATIONS[kind]} {n_tokens} x {width}{' plain' if plain else ''}",
        {
            "gate_up": "gate_up",
            "dst": "dst",
            "width": width,
            "in_stride": in_stride,
            "out_stride": out_stride,
            "act": kind,
            "plain": int(plain),
            "n_tokens": n_tokens,
        },
        {"gate_up": padded(gate_up, in_stride), "dst": nothing(n_tokens, out_stride)},
        {"dst": unit},
    )


def edit(
    rng, kind, n_tokens, n_heads, width, n_edited=None, step=1, keys=False, window=0
) -> Problem:
    """keys: a site over keys, where token t has position t + 2 (and width, the most keys there
    are, is n_tokens + 2).
    """
    if keys:
        width = n_tokens + 2
    head_stride = row_stride(width)
    heads = rng.permutation(n_heads)[: max(1, n_heads - 1)].astype(np.uint32)
    edited = rng.permutation(n_tokens)[: n_tokens if n_edited is None else n_edited]
    operand = numbers(rng, 5 + (len(heads) + 3) * width)
    if EDITS[kind] == "ablate":
        operand /= np.float32(np.sqrt(width))  # about unit length, wherever it begins
    entries = np.zeros((len(edited), 4), np.uint32)
    entries[:, 0] = edited
    entries[:, 1] = rng.integers(0, 5, len(edited))
    entries[:, 2] = numbers(rng, len(edited)).view(np.uint32)
    tokens = np.zeros((n_tokens, TOKEN_WORDS), np.uint32)
    tokens[:, 1] = np.arange(n_tokens) + 2
    x = nothing(n_tokens, n_heads, head_stride)
    x[:, :, :width] = numbers(rng, n_tokens, n_heads, width)
    if (
        window and EDITS[kind] == "ablate"
    ):  # before the window patterns hold zeros; the device relies on it
        seen = np.arange(width)[None] > tokens[:, 1][:, None] - window
        x[:, :, :width] *= seen[:, None]
    return Problem(
        "edit",
        f"{EDITS[kind]} {len(edited)} of {n_tokens} x {n_heads} x"
        f" {width}{' keys' if keys else ''}{f' window {window}' if window else ''}",
        {
            "x": "x",
            "entries": "entries",
            "operand": "operand",
            "heads": "heads",
            "scale": "scale",
            "tokens": "tokens",
            "token_stride": n_heads * head_stride,
            "head_stride": head_stride,
            "width": width,
            "head_step": width if step else 1,
            "step": step,
            "kind": kind,
            "flags": EDIT_KEYS * keys,
            "window": window,
            "n_entries": len(edited),
            "n_edit_heads": len(heads),
        },
        {
            "x": x,
            "entries": entries,
            "operand": operand,
            "heads": heads,
            "scale": np.abs(numbers(rng, n_tokens)) + 0.5,
            "tokens": tokens,
        },
    )


def copy(rng, rows, width, pick=False, add=False) -> Problem:
    sources, x_stride, out_stride = rows + 2, row_stride(width), width + 3
    buffers = {
        "x": padded(numbers(rng, sources, width), x_stride),
        "dst": nothing(rows, out_stride),
    }
    if pick:
        buffers["rows"] = rng.integers(0, sources, rows).astype(np.uint32)
    units = {}
    if add:
        buffers["add"] = padded(numbers(rng, rows, width), out_stride)
        units["dst"] = np.nanmax(np.abs(buffers["add"]), initial=1.0)
    return Problem(
        "copy",
        f"{rows} x {width}{' picked' if pick else ''}{' added' if add else ''}",
        {name: name for name in buffers}
        | {
            "n_rows": rows,
            "width": width,
            "x_stride": x_stride,
            "out_stride": out_stride,
            "flags": COPY_FLAGS["rows"] * pick + COPY_FLAGS["add"] * add,
        },
        buffers,
        units,
    )


def sum_heads(rng, n_tokens, n_heads, width, bias=False) -> Problem:
    stride = row_stride(width)
    x, addend = numbers(rng, n_tokens * n_heads, width), numbers(rng, width)
    unit = np.abs(x).reshape(n_tokens, n_heads, width).sum(1, dtype=np.float64) + np.abs(addend)
    return Problem(
        "sum_heads",
        f"{n_tokens} x {n_heads} x {width}{' bias' if bias else ''}",
        {
            "x": "x",
            "dst": "dst",
            "bias": "bias",
            "n_heads": n_heads,
            "width": width,
            "head_stride": stride,
            "out_stride": stride,
            "has_bias": int(bias),
            "n_tokens": n_tokens,
        },
        {"x": padded(x, stride), "dst": nothing(n_tokens, stride), "bias": addend},
        {"dst": np.pad(unit, ((0, 0), (0, stride - width)))},
    )


def clip(rng, rows, width, limit=0.7) -> Problem:
    stride = row_stride(width)
    x = numbers(rng, rows, width)
    return Problem(
        "clip",
        f"{rows} x {width}",
        {"x": "x", "width": width, "stride": stride, "limit": limit, "n_tokens": rows},
        {"x": padded(x, stride)},
    )


def _attention_problems(rng) -> Iterator[Problem]:
    for d_head in (2, 6, 64, 80, 128):
        yield rope(rng, [(0, 3), (5, 1)], 4, 2, d_head)
        yield rope(
            rng,
            [(0, 3), (5, 1)],
            4,
            2,
            d_head,
            ("rotate", "store", "interleaved"),
            d_head // 4 * 2,
            True,
        )
        yield attn_scores(
            rng, [(0, 17), (4, 1), (30, 9)], 4, 2, d_head, softcap=20.0 if d_head == 64 else 0.0
        )
        yield attn_output(
            rng, [(0, 17), (4, 1), (30, 9)], 4, 2, d_head, window=5 if d_head == 64 else 0
        )
        yield attn_decode(rng, [0, 37, 6, 129], 4, 2, d_head, window=5 if d_head == 64 else 0)
    # query heads that share keys and values: a kernel each, the last in two turns
    for group in (1, 3, 4, 7):
        yield attn_decode(
            rng, [0, 37, 6, 129], 2 * group, 2, 64, softcap=20.0 if group == 3 else 0.0
        )
    for window in (0, 1, 5):
        yield attn_softmax(rng, [(0, 33), (7, 1), (250, 9)], 3, window)


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs of these."""
    for weight_type in range(3):
        yield embed(rng, 7, 77, 33, weight_type, scale=3.5, segment_rows=32)
        yield embed(rng, 7, 77, 33, weight_type, segment_rows=64, positions=True, add=True)
        for rows in (1, 2, 3, 7, 9, 33):
            yield linear(rng, rows, 77, 53, weight_type, bias=True, add=True)
        for rows in (1, 9):
            yield linear(rng, rows, 77, 53, weight_type, bias=True, add=True, scale=0.22)
            yield linear(rng, rows, 77, 53, weight_type, bias=True, clip=6.0)
        yield linear(rng, 3, 129, 257, weight_type, softcap=5.0, segment_rows=64)
        yield linear(rng, 5, 33, 80, weight_type, first_k=32, n_k=48)
        for rows in (1, 2, 3, 8, 9):
            yield linear_pairs(
                rng, rows, 53, "gate", weight_type, width=77, act=rows % 4, bias=rows == 3
            )
            yield linear_pairs(
                rng,
                rows,
                80,
                "rotate",
                weight_type,
                heads=(4, 2, 10 if rows == 2 else 64),
                bias=rows != 8,
            )
    for flags in (
        (),
        ("add",),
        ("rows",),
        ("write_scale", "write_normalized"),
        ("read_scale", "write_normalized", "no_out"),
        ("read_normalized", "add"),
    ):
        yield norm(rng, 3, 257, flags)
        yield norm(rng, 3, 257, (*flags, "layer", "bias"), mean=3.0)
    yield norm(rng, 3, 80, ("layer", "bias", "write_scale"), groups=5)
    yield from _attention_problems(rng)
    for kind in range(len(ACTIVATIONS)):
        yield act(rng, 3, 257, kind)
        yield act(rng, 3, 257, kind, plain=True)
    for kind in range(len(EDITS)):
        yield edit(rng, kind, 7, 3, 33)
        if EDITS[kind] != "add_scaled":
            yield edit(rng, kind, 7, 3, 0, keys=True, window=4)
    yield copy(rng, 7, 33, pick=True, add=True)
    yield sum_heads(rng, 3, 5, 33, bias=True)
    yield clip(rng, 3, 257)
