"""Is this device right? Every operation of the engine on small awkward problems against its float64 twin on the CPU.

A problem is an op's name, its arguments, and arrays. The engine runs it on copies of the arrays, on the device and on the twin, and returns both.
Memory that an op must not touch holds NaN before and must hold it afterwards; memory that it must not read holds NaN, too.

`vksteer verify` runs `problems()`; tests/test_ops.py runs many more shapes through the same builders. BOUNDS are the errors that either accepts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterator

import numpy as np

from ..runtime.device import _engine, open_device

WEIGHT_TYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
EDITS = ("set", "add", "scale", "ablate", "add_scaled")
NORM_FLAGS = {"write_normalized": 1, "write_scale": 2, "add": 4, "read_scale": 8, "read_normalized": 16, "rows": 32, "no_out": 64}
ROPE_FLAGS = {"qk_norm": 1, "rotate": 2, "store": 4}
TILE = 8

# The largest error an op may make, in its problem's units (see Problem). Beside each the worst that tests/test_ops.py met on lavapipe 25.0.7 with
# subgroups of 4, 8 and 16. About four times that, and more where Vulkan leaves the precision of exp or tanh to the driver.
BOUNDS = {
    "embed": 2e-7,  # 0.4e-7
    "linear": 1.5e-6,  # 2.9e-7, of sum |x w| + |bias| + |add|, K up to 257
    "linear_pairs": 1.2e-6,  # 2.8e-7, of sum |x gain w| + |bias|
    "norm": 2e-6,  # 4.5e-7, width 1024
    "rope": 1e-6,  # 2.2e-7
    "attn_scores": 1.5e-6,  # 2.6e-7, of sum |q k|
    "attn_softmax": 2e-6,  # 3.2e-7
    "attn_mix": 1.5e-6,  # 2.7e-7, of sum pattern |v|
    "attn_decode": 3e-6,  # 4.6e-7
    "act": 2e-6,  # 2.9e-7, of |gate up|
    "edit": 1e-6,  # 1.9e-7
    "copy": 4e-7,  # 1.1e-7
    "sum_heads": 6e-7,  # 1.5e-7, of sum |x|
    # Backward (verify_backward.py), of what each gradient would be without cancellation.
    "linear_bwd": 1.5e-6,  # 3.0e-7
    "norm_bwd": 2e-6,  # 4.0e-7
    "rope_bwd": 2e-6,  # 5.0e-7
    "attn_softmax_bwd": 1e-6,  # 1.9e-7
    "attn_mix_bwd": 4e-6,  # 9.8e-7, 257 queries
    "act_bwd": 3.5e-6,  # 8.4e-7
    "pair_grad": 1e-6,  # 1.9e-7
    "logit_grad": 3.5e-6,  # 8.3e-7
    # Attribution (verify_attribution.py), of sums without cancellation.
    "difference": 1.2e-6,  # 2.9e-7
    "accumulate": 1.2e-6,  # 3.0e-7, 10 sources
    "head_inputs": 1.5e-6,  # 3.8e-7
    "head_gradients": 1e-6,  # 2.2e-7, 10 steps
    "dots": 1e-6,  # 2.0e-7, of sum |a b|, K up to 18944
    "node_dims": 1.2e-6,  # 2.8e-7, 32 slots
    # Circuits (verify_circuit.py), of sums without cancellation.
    "circuit_inputs": 1.5e-6,  # 1.7e-7
    "circuit_place": 2e-6,  # 1.7e-7
    "circuit_heads": 1e-6,  # 1.0e-7
    "circuit_outputs": 1.5e-6,  # 2.9e-7
    "pair_logits": 1e-6,  # 1.0e-7
    "logit_metrics": 3e-6,  # 2.6e-7, of the largest logit
    # The OV circuit (verify_lens.py).
    "head_out": 1.2e-6,  # 2.6e-7, of sum |x w gain|
    "row_norms": 1.5e-6,  # 3.6e-7
    "topk": 0.0,  # it only picks
}


@dataclass
class Problem:
    """`units`: for a buffer, what an error in it is measured in, for all or element by element: what a sum would be without cancellation. Other
    buffers are measured in their own largest value, before or after."""

    op: str
    label: str
    arguments: dict[str, Any]
    buffers: dict[str, np.ndarray]
    units: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """error: the largest, in the problem's units; inf where NaN is where it should not be or the other way round."""

    problem: Problem
    error: float
    where: str
    device: dict[str, np.ndarray]
    twin: dict[str, np.ndarray]


def row_stride(width: int) -> int:
    """Floats from row to row of an activation, as in csrc/ops/ops.h."""
    stride = -(-width // 16) * 16
    return stride if stride % 1024 else stride + 16


def numbers(rng, *shape, scale=1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def nothing(*shape) -> np.ndarray:
    return np.full(shape, np.nan, np.float32)


def padded(values: np.ndarray, stride: int, pad=np.nan) -> np.ndarray:
    """[T, width] -> [T, stride]."""
    out = np.full((len(values), stride), pad, np.float32)
    out[:, : values.shape[1]] = values
    return out


# -- matrices --------------------------------------------------------------------------------------------------------------------------------------


def panels(weights: np.ndarray, weight_type: int) -> tuple[np.ndarray, np.ndarray]:
    """W [N, K] -> (words as they lie on the device, W as stored, float64)."""
    n, k = weights.shape
    whole = np.zeros((-(-n // 32) * 32, -(-k // 16) * 16), np.float32)
    whole[:n, :k] = weights
    if weight_type == 1:  # cut to bfloat16
        whole = (whole.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        items = (whole.view(np.uint32) >> 16).astype(np.uint16)
    elif weight_type == 2:
        items = whole.astype(np.float16)
        whole = items.astype(np.float32)
    else:
        items = whole
    inputs = 16 // items.itemsize  # a cell holds 16 bytes of one row
    items = np.ascontiguousarray(items.reshape(len(whole) // 32, 32, whole.shape[1] // inputs, inputs).transpose(0, 2, 1, 3))
    return items.reshape(-1).view(np.uint32), whole[:n, :k].astype(np.float64)


def linear(rng, rows, n, k, weight_type=0, bias=False, add=False, softcap=0.0, first_k=0, n_k=0, chunk_rows=0, family=None, decode=0) -> Problem:
    words, weights = panels(numbers(rng, n, k), weight_type)
    inputs = n_k or k
    x_stride, dst_stride = row_stride(inputs), row_stride(n)
    buffers = {"weights": words, "x": padded(numbers(rng, rows, inputs), x_stride, 0.0), "dst": nothing(rows, dst_stride)}
    part = weights[:, first_k : first_k + inputs]
    unit = np.abs(buffers["x"][:, : part.shape[1]].astype(np.float64)) @ np.abs(part).T
    arguments = {"x": "x", "dst": "dst", "weights": "weights", "weight_type": weight_type, "n": n, "k": k, "chunk_rows": chunk_rows, "n_rows": rows,
                 "x_stride": x_stride, "dst_stride": dst_stride, "first_k": first_k, "n_k": n_k, "softcap": softcap, "decode": decode}
    if bias:
        buffers["bias"] = numbers(rng, n)
        unit += np.abs(buffers["bias"])
    if add:
        buffers["add"] = padded(numbers(rng, rows, n), dst_stride)
        unit += np.abs(buffers["add"][:, :n])
    arguments |= {name: name for name in ("bias", "add") if name in buffers}
    unit += abs(softcap)  # drivers' tanh is good to a rounding of 1, not of a small result
    if family is not None:
        arguments["family_plus_1"] = family + 1
    extras = "".join(f" {name}" for name, there in (("bias", bias), ("add", add), ("softcap", softcap), (f"k from {first_k}", n_k), ("chunks", chunk_rows), (f"family {family}", family), ("decode", decode)) if there)
    return Problem("linear", f"{rows} x {n} x {k} {WEIGHT_TYPES[weight_type]}{extras}", arguments, buffers, {"dst": np.pad(unit, ((0, 0), (0, dst_stride - n)))})


def linear_pairs(rng, rows, k, kind, weight_type=0, width=0, heads=(0, 0, 0), act=0, bias=False, family=None) -> Problem:
    """kind: "gate" (width outputs twice) or "rotate" (heads: query heads, key/value heads, head size)."""
    n_heads, n_kv_heads, d_head = heads
    n = 2 * width if kind == "gate" else (n_heads + 2 * n_kv_heads) * d_head
    words, weights = panels(numbers(rng, n, k), weight_type)
    columns = width if kind == "gate" else n_heads * d_head
    x_stride, dst_stride = row_stride(k), row_stride(columns)
    packed = Packed([(3, 1)] * rows)
    angle = np.arange(packed.n_keys + 1)[:, None] * 10000.0 ** (-np.arange(d_head // 2) / max(d_head / 2, 1))[None]
    buffers = {"weights": words, "x": padded(numbers(rng, rows, k), x_stride, 0.0), "gain": padded(numbers(rng, 1, k), x_stride, 0.0)[0], "dst": nothing(rows, dst_stride)}
    if bias:
        buffers["bias"] = numbers(rng, n)
    if kind == "rotate":
        buffers |= {"angles": np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32), "tokens": packed.tokens,
                    "k_cache": nothing(packed.n_slots, n_kv_heads * d_head), "v_cache": nothing(packed.n_slots, n_kv_heads * d_head)}
    x = buffers["x"][:, :k].astype(np.float64)
    terms = np.abs(x / np.sqrt((x**2).mean(1, keepdims=True)) * buffers["gain"][:k]) @ np.abs(weights).T + (np.abs(buffers["bias"]) if bias else 0)
    units = {name: terms.max() for name in ("dst", "k_cache", "v_cache")}
    if kind == "gate":  # an error of either is as large as the other makes it
        units = {"dst": np.pad(terms[:, :width] * terms[:, width:], ((0, 0), (0, dst_stride - width)), constant_values=1)}
    arguments = {name: name for name in buffers} | {
        "weight_type": weight_type, "n": n, "k": k, "chunk_rows": 0, "n_rows": rows, "x_stride": x_stride, "dst_stride": dst_stride,
        "kind": ("gate", "rotate").index(kind), "act": act, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "eps": 1e-5}
    if family is not None:
        arguments["family_plus_1"] = family + 1
    return Problem("linear_pairs", f"{kind} {rows} x {n} x {k} {WEIGHT_TYPES[weight_type]}{' bias' if bias else ''}{'' if family is None else f' family {family}'}",
                   arguments, buffers, units)


def embed(rng, n_tokens, vocabulary, width, weight_type=0, scale=1.0, chunk_rows=0) -> Problem:
    words, _ = panels(numbers(rng, vocabulary, width), weight_type)
    tokens = np.zeros((n_tokens, 8), np.uint32)
    tokens[:, 0] = rng.integers(0, vocabulary, n_tokens)
    tokens[:2, 0] = (0, vocabulary - 1)[:n_tokens]
    stride = row_stride(width)
    arguments = {"tokens": "tokens", "dst": "dst", "n_tokens": n_tokens, "stride": stride, "scale": scale, "weights": "weights",
                 "weight_type": weight_type, "n": vocabulary, "k": width, "chunk_rows": chunk_rows}
    return Problem("embed", f"{n_tokens} of {vocabulary} x {width} {WEIGHT_TYPES[weight_type]}", arguments,
                   {"tokens": tokens, "weights": words, "dst": nothing(n_tokens, stride)})


# -- row by row ------------------------------------------------------------------------------------------------------------------------------------


def norm(rng, rows, width, flags=(), scale=1.0, in_place=False) -> Problem:
    stride, of = row_stride(width), set(flags)
    sources = rows + 3 if "rows" in of else rows
    buffers = {"x": padded(numbers(rng, sources, width, scale=scale), stride), "gain": numbers(rng, width), "dst": nothing(rows, stride),
               "normalized": nothing(rows, stride), "scale": np.abs(numbers(rng, rows)) + 0.5 if "read_scale" in of else nothing(rows)}
    arguments = {name: name for name in buffers} | {"width": width, "stride": stride, "n_rows": rows, "eps": 1e-5, "flags": sum(NORM_FLAGS[f] for f in of)}
    units = {}
    if "add" in of:
        buffers["add"] = padded(numbers(rng, rows, width), stride)
        arguments["add"] = "add"
        units["dst"] = np.nanmax(np.abs(buffers["add"]), initial=1.0)
    if "rows" in of:
        buffers["rows"] = rng.integers(0, sources, rows).astype(np.uint32)
        arguments["rows"] = "rows"
    if in_place:
        arguments["dst"] = "x"
    return Problem("norm", f"{rows} x {width} {' '.join(sorted(of))}{' in place' if in_place else ''}", arguments, buffers, units)


def act(rng, n_tokens, width, kind=0, spread=4.0, gate=None) -> Problem:
    in_stride, out_stride = row_stride(2 * width), row_stride(width)
    gate_up = numbers(rng, n_tokens, 2 * width)
    gate_up[:, :width] = gate_up[:, :width] * spread if gate is None else gate
    unit = np.pad(np.abs(gate_up[:, :width].astype(np.float64) * gate_up[:, width:]), ((0, 0), (0, out_stride - width)))
    return Problem("act", f"{ACTIVATIONS[kind]} {n_tokens} x {width}",
                   {"gate_up": "gate_up", "dst": "dst", "width": width, "in_stride": in_stride, "out_stride": out_stride, "act": kind, "n_tokens": n_tokens},
                   {"gate_up": padded(gate_up, in_stride), "dst": nothing(n_tokens, out_stride)}, {"dst": unit})


def edit(rng, kind, n_tokens, n_heads, width, n_edited=None, step=1, keys=False, window=0) -> Problem:
    """keys: a site over keys, where token t has position t + 2 (and width, the most keys there are, is n_tokens + 2)."""
    if keys:
        width = n_tokens + 2
    head_stride = row_stride(width)
    heads = rng.permutation(n_heads)[: max(1, n_heads - 1)].astype(np.uint32)
    edited = rng.permutation(n_tokens)[: n_tokens if n_edited is None else n_edited]
    operand = numbers(rng, 5 + (len(heads) + 3) * width)
    if kind == 3:
        operand /= np.float32(np.sqrt(width))  # about unit length, wherever it begins
    entries = np.zeros((len(edited), 4), np.uint32)
    entries[:, 0] = edited
    entries[:, 1] = rng.integers(0, 5, len(edited))
    entries[:, 2] = numbers(rng, len(edited)).view(np.uint32)
    tokens = np.zeros((n_tokens, 8), np.uint32)
    tokens[:, 1] = np.arange(n_tokens) + 2
    x = nothing(n_tokens, n_heads, head_stride)
    x[:, :, :width] = numbers(rng, n_tokens, n_heads, width)
    if window and kind == 3:  # before the window patterns hold zeros; the device relies on it
        seen = np.arange(width)[None] > tokens[:, 1][:, None] - window
        x[:, :, :width] *= seen[:, None]
    return Problem("edit", f"{EDITS[kind]} {len(edited)} of {n_tokens} x {n_heads} x {width}{' keys' if keys else ''}{f' window {window}' if window else ''}",
                   {"x": "x", "entries": "entries", "operand": "operand", "heads": "heads", "scale": "scale", "tokens": "tokens", "token_stride": n_heads * head_stride,
                    "head_stride": head_stride, "width": width, "head_step": width if step else 1, "step": step, "kind": kind, "flags": int(keys), "window": window,
                    "n_entries": len(edited), "n_edit_heads": len(heads)},
                   {"x": x, "entries": entries, "operand": operand, "heads": heads, "scale": np.abs(numbers(rng, n_tokens)) + 0.5, "tokens": tokens})


def copy(rng, rows, width, pick=False, add=False) -> Problem:
    sources, x_stride, out_stride = rows + 2, row_stride(width), width + 3
    buffers = {"x": padded(numbers(rng, sources, width), x_stride), "dst": nothing(rows, out_stride)}
    if pick:
        buffers["rows"] = rng.integers(0, sources, rows).astype(np.uint32)
    units = {}
    if add:
        buffers["add"] = padded(numbers(rng, rows, width), out_stride)
        units["dst"] = np.nanmax(np.abs(buffers["add"]), initial=1.0)
    return Problem("copy", f"{rows} x {width}{' picked' if pick else ''}{' added' if add else ''}",
                   {name: name for name in buffers} | {"n_rows": rows, "width": width, "x_stride": x_stride, "out_stride": out_stride, "flags": pick + 2 * add}, buffers, units)


def sum_heads(rng, n_tokens, n_heads, width, bias=False) -> Problem:
    stride = row_stride(width)
    x, addend = numbers(rng, n_tokens * n_heads, width), numbers(rng, width)
    unit = np.abs(x).reshape(n_tokens, n_heads, width).sum(1, dtype=np.float64) + np.abs(addend)
    return Problem("sum_heads", f"{n_tokens} x {n_heads} x {width}{' bias' if bias else ''}",
                   {"x": "x", "dst": "dst", "bias": "bias", "n_heads": n_heads, "width": width, "head_stride": stride, "out_stride": stride, "has_bias": int(bias),
                    "n_tokens": n_tokens},
                   {"x": padded(x, stride), "dst": nothing(n_tokens, stride), "bias": addend}, {"dst": np.pad(unit, ((0, 0), (0, stride - width)))})


# -- attention -------------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Packed:
    """Rows of a batch as the kernels see them. rows: (keys already in the cache, tokens now)."""

    tokens: np.ndarray  # [T, 8]: id, pos, slot, q_token, k_slot, v_slot, row, row_end
    tiles: np.ndarray  # [n, 2]: first token, count
    n_slots: int
    n_keys: int

    def __init__(self, rows, frozen=False):
        tokens, tiles, slot, n_keys = [], [], 2, 0  # a few cache slots belong to nobody
        for r, (cached, n) in enumerate(rows):
            first = len(tokens)
            source = tokens[first - n] if frozen and r % 2 else None  # an odd row uses queries, keys and values of the row before it
            for i in range(n):
                k_slot = slot if source is None else source[4]
                tokens.append((0, cached + i, slot + cached + i, first + i - (0 if source is None else n), k_slot, k_slot, r, first + n))
            tiles += [(first + i, min(TILE, n - i)) for i in range(0, n, TILE)]
            slot += cached + n + 1
            n_keys = max(n_keys, cached + n)
        self.tokens = np.array(tokens, np.uint32).reshape(-1, 8)
        self.tiles = np.array(tiles, np.uint32).reshape(-1, 2)
        self.n_slots, self.n_keys = slot, n_keys

    @property
    def pos(self):
        return self.tokens[:, 1].astype(int)

    def from_tile(self, tile):
        """(first token, tiles from there): a pass that works on a part of the chunk."""
        return (int(self.tiles[tile, 0]) if len(self.tiles) else 0), np.ascontiguousarray(self.tiles[tile:])


def _name(rows, n_heads, n_kv_heads, d_head):
    return f"{'+'.join(f'{n}' if not cached else f'{cached}|{n}' for cached, n in rows)} tokens, {n_heads}/{n_kv_heads} heads of {d_head}"


def rope(rng, rows, n_heads, n_kv_heads, d_head, flags=("qk_norm", "rotate", "store")) -> Problem:
    packed = Packed(rows)
    width, kv_width, n = (n_heads + 2 * n_kv_heads) * d_head, n_kv_heads * d_head, len(packed.tokens)
    angle = np.arange(packed.n_keys + 1)[:, None] * 10000.0 ** (-np.arange(d_head // 2) / (d_head / 2))[None]
    buffers = {"qkv": padded(numbers(rng, n, width), row_stride(width)), "angles": np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32),
               "tokens": packed.tokens, "q_gain": numbers(rng, d_head), "k_gain": numbers(rng, d_head), "k_cache": nothing(packed.n_slots, kv_width),
               "v_cache": nothing(packed.n_slots, kv_width)}
    return Problem("rope", f"{_name(rows, n_heads, n_kv_heads, d_head)} {' '.join(flags)}",
                   {name: name for name in buffers} | {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "stride": row_stride(width), "eps": 1e-6,
                                                       "flags": sum(ROPE_FLAGS[f] for f in flags), "n_tokens": n}, buffers)


def _score_units(packed, first, qkv, k_cache, n_heads, n_kv_heads, d_head, key_stride, softcap):
    """Of scores[t, h, j]: sum_d |q k| / sqrt(d_head)."""
    keys = np.abs(k_cache).reshape(-1, n_kv_heads, d_head).repeat(n_heads // n_kv_heads, 1)
    units = np.zeros((len(packed.tokens) - first, n_heads, key_stride))
    for t, token in enumerate(packed.tokens[first:]):
        seen = keys[token[4] :][: int(token[1]) + TILE]  # the tile's later keys, too
        q = np.abs(qkv[token[3], : n_heads * d_head]).reshape(n_heads, d_head)
        units[t, :, : len(seen)] = np.einsum("hd,jhd->hj", q, seen)[:, :key_stride]
    return units * d_head**-0.5 + softcap


def attn_scores(rng, rows, n_heads, n_kv_heads, d_head, softcap=0.0, frozen=False, tile=0) -> Problem:
    packed = Packed(rows, frozen)
    first, tiles = packed.from_tile(tile)
    stride, key_stride = row_stride((n_heads + 2 * n_kv_heads) * d_head), row_stride(packed.n_keys)
    buffers = {"qkv": padded(numbers(rng, len(packed.tokens), n_heads * d_head), stride), "k_cache": numbers(rng, packed.n_slots, n_kv_heads * d_head),
               "tokens": packed.tokens, "tiles": tiles, "scores": nothing(len(packed.tokens) - first, n_heads, key_stride)}
    return Problem("attn_scores", f"{_name(rows, n_heads, n_kv_heads, d_head)}{' capped' if softcap else ''}{' frozen' if frozen else ''}",
                   {name: name for name in buffers} | {"first_token": first, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "stride": stride,
                                                       "key_stride": key_stride, "scale": d_head**-0.5, "softcap": softcap, "n_tiles": len(tiles), "n_keys": packed.n_keys}, buffers,
                   {"scores": _score_units(packed, first, buffers["qkv"], buffers["k_cache"], n_heads, n_kv_heads, d_head, key_stride, softcap)})


def attn_softmax(rng, rows, n_heads, window=0, spread=4.0, tile=0) -> Problem:
    packed = Packed(rows)
    first, _ = packed.from_tile(tile)
    key_stride, pos = row_stride(packed.n_keys), packed.pos[first:]
    scores = nothing(len(pos), n_heads, key_stride)
    for t, p in enumerate(pos):
        scores[t, :, : p + 1] = numbers(rng, n_heads, p + 1, scale=spread)
    return Problem("attn_softmax", f"{_name(rows, n_heads, n_heads, 0)} window {window}",
                   {"scores": "scores", "tokens": "tokens", "first_token": first, "n_heads": n_heads, "key_stride": key_stride, "window": window, "n_tokens": len(pos),
                    "n_keys": packed.n_keys}, {"scores": scores, "tokens": packed.tokens}, {"scores": 1.0})


def attn_mix(rng, rows, n_heads, n_kv_heads, d_head, window=0, frozen=False, tile=0) -> Problem:
    packed = Packed(rows, frozen)
    first, tiles = packed.from_tile(tile)
    key_stride, z_stride, pos = row_stride(packed.n_keys), row_stride(n_heads * d_head), packed.pos[first:]
    pattern = nothing(len(pos), n_heads, key_stride)
    for t, p in enumerate(pos):  # as the softmax leaves it: zeros before the window and for a tile's worth of keys after pos
        start = max(0, p + 1 - window) if window else 0
        pattern[t, :, : p + TILE] = 0
        pattern[t, :, start : p + 1] = rng.dirichlet(np.ones(p + 1 - start), n_heads)
    v_cache = numbers(rng, packed.n_slots, n_kv_heads * d_head)
    values = np.abs(v_cache).reshape(-1, n_kv_heads, d_head).repeat(n_heads // n_kv_heads, 1)
    units = np.zeros((len(packed.tokens), z_stride))
    for t, token in enumerate(packed.tokens[first:]):
        seen = values[token[5] :][: int(token[1]) + 1]
        units[first + t, : n_heads * d_head] = np.einsum("hj,jhd->hd", pattern[t, :, : len(seen)], seen).reshape(-1)
    buffers = {"pattern": pattern, "v_cache": v_cache, "tokens": packed.tokens, "tiles": tiles,
               "z": nothing(len(packed.tokens), z_stride)}
    return Problem("attn_mix", f"{_name(rows, n_heads, n_kv_heads, d_head)} window {window}{' frozen' if frozen else ''}",
                   {name: name for name in buffers} | {"first_token": first, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "z_stride": z_stride,
                                                       "key_stride": key_stride, "window": window, "n_tiles": len(tiles), "n_keys": packed.n_keys}, buffers, {"z": units})


def attn_decode(rng, cached, n_heads, n_kv_heads, d_head, window=0, softcap=0.0, frozen=False, first=0) -> Problem:
    """One new token a row; `cached`: how many keys each row has already."""
    rows = [(c, 1) for c in cached]
    packed = Packed(rows, frozen)
    stride, key_stride, n = row_stride((n_heads + 2 * n_kv_heads) * d_head), row_stride(packed.n_keys), len(rows)
    buffers = {"qkv": padded(numbers(rng, n, n_heads * d_head), stride), "k_cache": numbers(rng, packed.n_slots, n_kv_heads * d_head),
               "v_cache": numbers(rng, packed.n_slots, n_kv_heads * d_head), "tokens": packed.tokens, "scores": nothing(n - first, n_heads, key_stride),
               "z": nothing(n, row_stride(n_heads * d_head))}
    return Problem("attn_decode", f"{_name(rows, n_heads, n_kv_heads, d_head)} window {window}{' capped' if softcap else ''}{' frozen' if frozen else ''}",
                   {name: name for name in buffers} | {"first_token": first, "n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "stride": stride,
                                                       "z_stride": row_stride(n_heads * d_head), "key_stride": key_stride, "window": window, "scale": d_head**-0.5,
                                                       "softcap": softcap, "n_tokens": n - first, "n_keys": packed.n_keys}, buffers,
                   {"z": np.abs(buffers["v_cache"]).max()})


# -- running -----------------------------------------------------------------------------------------------------------------------------------------


def bench(device=None):
    """(engine bench, Device) on the device that `device` means, as in Model.from_pretrained."""
    engine, chosen = open_device(device)
    return _engine().Bench(engine), chosen


def check(on, problem: Problem) -> Outcome:
    """Runs a problem on the engine bench `on` and measures."""
    device, twin = on.run(problem.op, problem.arguments, problem.buffers)
    worst, where = 0.0, "nowhere"
    for name, want in twin.items():
        got = device[name].astype(np.float64)
        known = ~np.isnan(want)
        if not np.array_equal(known, ~np.isnan(got)):
            at = tuple(int(i) for i in np.argwhere(known == np.isnan(got))[0])
            return Outcome(problem, float("inf"), f"{name}{list(at)}: device {got[at]}, twin {want[at]}", device, twin)
        if not known.any():
            continue
        largest = np.nanmax([np.abs(want[known]).max(), np.nanmax(np.abs(problem.buffers[name]), initial=0.0)])
        unit = problem.units.get(name, largest or 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.where(known & (got != want), np.abs(got - want) / unit, 0.0)
        at = np.unravel_index(error.argmax(), error.shape)
        if error[at] > worst:
            worst, where = float(error[at]), f"{name}{[int(i) for i in at]}: device {got[at]:.9g}, twin {want[at]:.9g}"
    return Outcome(problem, worst, where, device, twin)


def problems(seed=0) -> Iterator[Problem]:
    """What `vksteer verify` runs: each op over a few awkward shapes."""
    rng = np.random.default_rng(seed)
    for weight_type in range(3):
        yield embed(rng, 7, 77, 33, weight_type, scale=3.5, chunk_rows=32)
        for rows in (1, 2, 3, 7, 9, 33):
            yield linear(rng, rows, 77, 53, weight_type, bias=True, add=True)
        yield linear(rng, 3, 129, 257, weight_type, softcap=5.0, chunk_rows=64)
        yield linear(rng, 5, 33, 80, weight_type, first_k=32, n_k=48)
        for rows in (1, 2, 3, 8, 9):
            yield linear_pairs(rng, rows, 53, "gate", weight_type, width=77, act=rows % 3, bias=rows == 3)
            yield linear_pairs(rng, rows, 80, "rotate", weight_type, heads=(4, 2, 10 if rows == 2 else 64), bias=rows != 8)
    for flags in ((), ("add",), ("rows",), ("write_scale", "write_normalized"), ("read_scale", "write_normalized", "no_out"), ("read_normalized", "add")):
        yield norm(rng, 3, 257, flags)
    for d_head in (2, 6, 64, 80, 128):
        yield rope(rng, [(0, 3), (5, 1)], 4, 2, d_head)
        yield attn_scores(rng, [(0, 17), (4, 1), (30, 9)], 4, 2, d_head, softcap=20.0 if d_head == 64 else 0.0)
        yield attn_mix(rng, [(0, 17), (4, 1), (30, 9)], 4, 2, d_head, window=5 if d_head == 64 else 0)
        yield attn_decode(rng, [0, 37, 6, 129], 4, 2, d_head, window=5 if d_head == 64 else 0)
    for group in (1, 3, 4, 7):  # query heads that share keys and values: a kernel each, the last in two turns
        yield attn_decode(rng, [0, 37, 6, 129], 2 * group, 2, 64, softcap=20.0 if group == 3 else 0.0)
    for window in (0, 1, 5):
        yield attn_softmax(rng, [(0, 33), (7, 1), (250, 9)], 3, window)
    for kind in range(len(ACTIVATIONS)):
        yield act(rng, 3, 257, kind)
    for kind in range(len(EDITS)):
        yield edit(rng, kind, 7, 3, 33)
        if EDITS[kind] != "add_scaled":
            yield edit(rng, kind, 7, 3, 0, keys=True, window=4)
    yield copy(rng, 7, 33, pick=True, add=True)
    yield sum_heads(rng, 3, 5, 33, bias=True)
    from . import attribution as verify_attribution, backward as verify_backward, circuit as verify_circuit, lens as verify_lens  # which are made of this module's parts

    for module in (verify_backward, verify_attribution, verify_circuit, verify_lens):
        yield from module.problems(rng)


@dataclass(frozen=True)
class Row:
    """One line of the table: an op over all its problems, or a family of matrix kernels against the baseline's bits."""

    op: str
    n_problems: int
    error: float
    bound: float
    worst: str

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that is none is null."""
        return {"op": self.op, "problems": self.n_problems, "error": self.error if np.isfinite(self.error) else None, "bound": self.bound, "ok": self.ok, "worst": self.worst}


def verify(device=None, seed=0) -> tuple[list[Row], Any]:
    """(a Row for every op, the Device). An op that fails outright counts as an infinite error with the reason."""
    on, chosen = bench(device)
    found: dict[str, list[tuple[float, str]]] = {}
    for problem in problems(seed):
        try:
            outcome = check(on, problem)
            found.setdefault(problem.op, []).append((outcome.error, f"{problem.label}: {outcome.where}"))
        except (RuntimeError, ValueError) as error:
            found.setdefault(problem.op, []).append((float("inf"), f"{problem.label}: {error}"))
    rows = [Row(op, len(all), *max(all)[:1], BOUNDS[op], max(all)[1]) for op, all in found.items()]
    for family, name in on.families():
        try:
            on.self_test(family)
            rows.append(Row(f"linear kernels: {name}", 1, 0.0, 0.0, ""))
        except (RuntimeError, ValueError) as error:
            rows.append(Row(f"linear kernels: {name}", 1, float("inf"), 0.0, str(error)))
    return rows, chosen


def table(rows: list[Row]) -> str:
    width = max(len(row.op) for row in rows)
    lines = [f"{'op':{width}}  problems  worst error  bound    ok"]
    for row in rows:
        lines.append(f"{row.op:{width}}  {row.n_problems:8d}  {row.error:11.1e}  {row.bound:7.1e}  {'yes' if row.ok else 'NO'}")
        if not row.ok:
            lines.append(f"    {row.worst}")
    return "\n".join(lines)


