"""Problems for rotation and for the steps of attention."""

from __future__ import annotations

import numpy as np

from .problems import (
    ROPE_FLAGS,
    TILE,
    Packed,
    Problem,
    label_of,
    nothing,
    numbers,
    padded,
    rotation_angles,
    row_stride,
)

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "rope": 1e-6,  # 2.2e-7
    "attn_scores": 1.5e-6,  # 2.6e-7, of sum |q k|
    "attn_softmax": 2e-6,  # 3.2e-7
    "attn_output": 1.5e-6,  # 2.7e-7, of sum pattern |v|
    "attn_decode": 3e-6,  # 4.6e-7
}


def rotation_tables(packed, d_rot, long_rows=False) -> dict[str, np.ndarray]:
    """The tables of keys and of queries. long_rows: the tokens of odd rows use a second table,
    which lies behind the first in the same array.
    """
    n = packed.n_keys + 1
    keys = rotation_angles(n, d_rot)
    if long_rows:
        keys = np.concatenate([keys, rotation_angles(7 * n, d_rot)[::7] * np.float32(0.75)])
        packed.tokens[:, 8] += packed.tokens[:, 6] % 2 * n
    return {"angles": keys, "q_angles": keys * np.float32(1.25), "tokens": packed.tokens}


def rope(
    rng,
    rows,
    n_heads,
    n_kv_heads,
    d_head,
    flags=("qk_norm", "rotate", "store"),
    d_rot=None,
    long_rows=False,
) -> Problem:
    """d_rot: how many channels of a head are rotated; None: all."""
    packed, d_rot = Packed(rows), d_head if d_rot is None else d_rot
    width, kv_width, n = (
        (n_heads + 2 * n_kv_heads) * d_head,
        n_kv_heads * d_head,
        len(packed.tokens),
    )
    buffers = {
        "qkv": padded(numbers(rng, n, width), row_stride(width)),
        **rotation_tables(packed, d_rot, long_rows),
        "q_gain": numbers(rng, d_head),
        "k_gain": numbers(rng, d_head),
        "k_cache": nothing(packed.n_slots, kv_width),
        "v_cache": nothing(packed.n_slots, kv_width),
    }
    return Problem(
        "rope",
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
    )


def _score_units(packed, first, qkv, k_cache, n_heads, n_kv_heads, d_head, key_stride, softcap):
    """Of scores[t, h, j]: sum_d |q k| / sqrt(d_head)."""
    keys = np.abs(k_cache).reshape(-1, n_kv_heads, d_head).repeat(n_heads // n_kv_heads, 1)
    units = np.zeros((len(packed.tokens) - first, n_heads, key_stride))
    for t, token in enumerate(packed.tokens[first:]):
        seen = keys[token[4] :][: int(token[1]) + TILE]  # the tile's later keys, too
        q = np.abs(qkv[token[3], : n_heads * d_head]).reshape(n_heads, d_head)
        units[t, :, : len(seen)] = np.einsum("hd,jhd->hj", q, seen)[:, :key_stride]
    return units * d_head**-0.5 + softcap


def attn_scores(
    rng, rows, n_heads, n_kv_heads, d_head, softcap=0.0, frozen=False, tile=0
) -> Problem:
    packed = Packed(rows, frozen)
    first, tiles = packed.from_tile(tile)
    stride, key_stride = row_stride((n_heads + 2 * n_kv_heads) * d_head), row_stride(packed.n_keys)
    buffers = {
        "qkv": padded(numbers(rng, len(packed.tokens), n_heads * d_head), stride),
        "k_cache": numbers(rng, packed.n_slots, n_kv_heads * d_head),
        "tokens": packed.tokens,
        "tiles": tiles,
        "scores": nothing(len(packed.tokens) - first, n_heads, key_stride),
    }
    return Problem(
        "attn_scores",
        f"{label_of(rows, n_heads, n_kv_heads, d_head)}{' capped' if softcap else ''}"
        f"{' frozen' if frozen else ''}",
        {name: name for name in buffers}
        | {
            "first_token": first,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "stride": stride,
            "key_stride": key_stride,
            "scale": d_head**-0.5,
            "softcap": softcap,
            "n_tiles": len(tiles),
            "n_keys": packed.n_keys,
        },
        buffers,
        {
            "scores": _score_units(
                packed,
                first,
                buffers["qkv"],
                buffers["k_cache"],
                n_heads,
                n_kv_heads,
                d_head,
                key_stride,
                softcap,
            )
        },
    )


def attn_softmax(rng, rows, n_heads, window=0, spread=4.0, tile=0) -> Problem:
    packed = Packed(rows)
    first, _ = packed.from_tile(tile)
    key_stride, pos = row_stride(packed.n_keys), packed.pos[first:]
    scores = nothing(len(pos), n_heads, key_stride)
    for t, p in enumerate(pos):
        scores[t, :, : p + 1] = numbers(rng, n_heads, p + 1, scale=spread)
    return Problem(
        "attn_softmax",
        f"{label_of(rows, n_heads, n_heads, 0)} window {window}",
        {
            "scores": "scores",
            "tokens": "tokens",
            "first_token": first,
            "n_heads": n_heads,
            "key_stride": key_stride,
            "window": window,
            "n_tokens": len(pos),
            "n_keys": packed.n_keys,
        },
        {"scores": scores, "tokens": packed.tokens},
        {"scores": 1.0},
    )


def attn_output(rng, rows, n_heads, n_kv_heads, d_head, window=0, frozen=False, tile=0) -> Problem:
    packed = Packed(rows, frozen)
    first, tiles = packed.from_tile(tile)
    key_stride, z_stride, pos = (
        row_stride(packed.n_keys),
        row_stride(n_heads * d_head),
        packed.pos[first:],
    )
    pattern = nothing(len(pos), n_heads, key_stride)
    # as the softmax leaves it: zeros before the window and for a tile's worth of keys after pos
    for t, p in enumerate(pos):
        start = max(0, p + 1 - window) if window else 0
        pattern[t, :, : p + TILE] = 0
        pattern[t, :, start : p + 1] = rng.dirichlet(np.ones(p + 1 - start), n_heads)
    v_cache = numbers(rng, packed.n_slots, n_kv_heads * d_head)
    values = np.abs(v_cache).reshape(-1, n_kv_heads, d_head).repeat(n_heads // n_kv_heads, 1)
    units = np.zeros((len(packed.tokens), z_stride))
    for t, token in enumerate(packed.tokens[first:]):
        seen = values[token[5] :][: int(token[1]) + 1]
        units[first + t, : n_heads * d_head] = np.einsum(
            "hj,jhd->hd", pattern[t, :, : len(seen)], seen
        ).reshape(-1)
    buffers = {
        "pattern": pattern,
        "v_cache": v_cache,
        "tokens": packed.tokens,
        "tiles": tiles,
        "z": nothing(len(packed.tokens), z_stride),
    }
    return Problem(
        "attn_output",
        f"{label_of(rows, n_heads, n_kv_heads, d_head)} window"
        f" {window}{' frozen' if frozen else ''}",
        {name: name for name in buffers}
        | {
            "first_token": first,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "z_stride": z_stride,
            "key_stride": key_stride,
            "window": window,
            "n_tiles": len(tiles),
            "n_keys": packed.n_keys,
        },
        buffers,
        {"z": units},
    )


def attn_decode(
    rng, cached, n_heads, n_kv_heads, d_head, window=0, softcap=0.0, frozen=False, first=0
) -> Problem:
    """One new token a row; `cached`: how many keys each row has already."""
    rows = [(c, 1) for c in cached]
    packed = Packed(rows, frozen)
    stride, key_stride, n = (
        row_stride((n_heads + 2 * n_kv_heads) * d_head),
        row_stride(packed.n_keys),
        len(rows),
    )
    buffers = {
        "qkv": padded(numbers(rng, n, n_heads * d_head), stride),
        "k_cache": numbers(rng, packed.n_slots, n_kv_heads * d_head),
        "v_cache": numbers(rng, packed.n_slots, n_kv_heads * d_head),
        "tokens": packed.tokens,
        "scores": nothing(n - first, n_heads, key_stride),
        "z": nothing(n, row_stride(n_heads * d_head)),
    }
    return Problem(
        "attn_decode",
        f"{label_of(rows, n_heads, n_kv_heads, d_head)} window"
        f" {window}{' capped' if softcap else ''}{' frozen' if frozen else ''}",
        {name: name for name in buffers}
        | {
            "first_token": first,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "d_head": d_head,
            "stride": stride,
            "z_stride": row_stride(n_heads * d_head),
            "key_stride": key_stride,
            "window": window,
            "scale": d_head**-0.5,
            "softcap": softcap,
            "n_tokens": n - first,
            "n_keys": packed.n_keys,
        },
        buffers,
        {"z": np.abs(buffers["v_cache"]).max()},
    )
