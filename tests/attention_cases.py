"""Attention's products on matrix units against float64, for matrix_cases.py."""

from __future__ import annotations

import numpy as np

from vksteer.verify import checking, forward, problems

#: rows of a batch as (keys in the cache, tokens): ragged tiles, one token, more than a partial sum
RAGGED = [(5, 1), (0, 17), (30, 9), (256, 1), (0, 8)]


def several(rng):
    """Ragged batches, head sizes and groups, windows, soft caps, frozen rows, parts of a chunk."""
    for d_head, heads in ((4, (6, 2)), (20, (5, 5)), (80, (4, 1)), (300, (3, 1))):
        yield forward.attn_scores(rng, RAGGED, *heads, d_head)
        yield forward.attn_output(rng, RAGGED, *heads, d_head)
    for window in (1, 40, 1000):
        yield forward.attn_output(rng, [(0, 300)], 2, 1, 8, window)
        yield forward.attn_output(rng, RAGGED, 2, 1, 8, window, tile=3)
    frozen = [row for row in RAGGED for _ in range(2)]
    yield forward.attn_scores(rng, frozen, 6, 2, 16, softcap=5.0, frozen=True)
    yield forward.attn_output(rng, frozen, 6, 2, 16, frozen=True)
    yield forward.attn_scores(rng, RAGGED, 4, 2, 16, tile=3)
    yield forward.attn_scores(rng, [], 4, 2, 16)
    yield forward.attn_output(rng, [], 4, 2, 16)


def attend(on, rng, rows, heads, d_head, window, softcap) -> float:
    """Scores, softmax and outputs against attention in NumPy in float64: the largest error, as a
    share of the largest output.
    """
    n_heads, n_kv_heads = heads
    packed = problems.Packed(rows)
    stride, key_stride = problems.row_stride(n_heads * d_head), problems.row_stride(packed.n_keys)
    n, kv = len(packed.tokens), (packed.n_slots, n_kv_heads * d_head)
    buffers = {
        "qkv": problems.padded(problems.numbers(rng, n, n_heads * d_head), stride),
        "k_cache": problems.numbers(rng, *kv),
        "v_cache": problems.numbers(rng, *kv),
        "tokens": packed.tokens,
        "tiles": packed.tiles,
        "scores": problems.nothing(n, n_heads, key_stride),
        "z": problems.nothing(n, stride),
    }
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "d_head": d_head, "window": window}
    sizes |= {"stride": stride, "z_stride": stride, "key_stride": key_stride, "n_tokens": n}
    sizes |= {"n_tiles": len(packed.tiles), "n_keys": packed.n_keys, "softcap": softcap}
    for op, names, of in (
        ("attn_scores", ("qkv", "k_cache", "tokens", "tiles", "scores"), {"scale": d_head**-0.5}),
        ("attn_softmax", ("scores", "tokens"), {}),
        ("attn_output", ("v_cache", "tokens", "tiles", "z"), {"pattern": "scores"}),
    ):
        fields = sizes | of | {name: name for name in names}
        taken = ARGUMENTS[op]
        buffers |= on.run(op, {k: v for k, v in fields.items() if k in taken}, buffers)[0]
    want = np.zeros((n, n_heads, d_head))
    keys, values = (
        buffers[name]
        .astype(np.float64)
        .reshape(-1, n_kv_heads, d_head)
        .repeat(n_heads // n_kv_heads, 1)
        for name in ("k_cache", "v_cache")
    )
    queries = buffers["qkv"][:, : n_heads * d_head].astype(np.float64).reshape(n, n_heads, d_head)
    for t, token in enumerate(packed.tokens.astype(int)):
        first = max(0, token[1] + 1 - window) if window else 0
        seen = slice(token[4] + first, token[4] + token[1] + 1)
        scores = np.einsum("hd,jhd->hj", queries[t], keys[seen]) * d_head**-0.5
        scores = softcap * np.tanh(scores / softcap) if softcap else scores
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        want[t] = np.einsum("hj,jhd->hd", weights, values[seen])
    got = buffers["z"][:, : n_heads * d_head].reshape(want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())


SIZES = {"n_heads", "key_stride", "n_keys", "tokens"}
TILED = SIZES | {"n_kv_heads", "d_head", "tiles", "n_tiles"}
ARGUMENTS = {
    "attn_scores": TILED | {"qkv", "k_cache", "scores", "stride", "scale", "softcap"},
    "attn_softmax": SIZES | {"scores", "window", "n_tokens"},
    "attn_output": TILED | {"pattern", "v_cache", "z", "z_stride", "window"},
}


def cut(problem, lengths):
    """The same tokens of one row in tiles of other lengths, as where chunks end elsewhere."""
    ends = np.cumsum(lengths)
    tiles = np.stack([ends - lengths, lengths], 1).astype(np.uint32)
    return problem.arguments | {"n_tiles": len(tiles)}, problem.buffers | {"tiles": tiles}


def seen_values(problem, device, tokens) -> np.ndarray:
    """What the given tokens have of a result: their outputs, or the scores of keys they see."""
    if problem.op == "attn_output":
        return device["z"][tokens].view(np.uint32)
    pos = problem.buffers["tokens"][tokens, 1].astype(int)
    return np.concatenate(
        [device["scores"][t, :, : p + 1].ravel().view(np.uint32) for t, p in zip(tokens, pos)]
    )


def bits(on, rng) -> int:
    """Queries have the same bits in any tiles, alone, and beside other rows; returns how many parts
    were compared.
    """
    n_parts = 0
    made = [
        forward.attn_scores(rng, [(230, 45)], 4, 2, 20, softcap=5.0),
        forward.attn_output(rng, [(230, 45)], 4, 2, 20),
        forward.attn_output(rng, [(230, 45)], 4, 2, 20, window=19),
        forward.attn_output(rng, [(230, 45)], 4, 2, 20, window=5),
    ]
    # growing, so that a key whose power of two came from a later one would lose bits
    values = made[-1].buffers["v_cache"]
    values *= np.ldexp(1.0, np.arange(len(values)) % 60 - 30)[:, None].astype(np.float32)
    for problem in made:
        whole = on.run(problem.op, problem.arguments, problem.buffers)[0]
        for lengths in ([5, 8, 8, 8, 8, 8], [1] * 45, [8, 1, 8, 3, 8, 8, 2, 7]):
            device = on.run(problem.op, *cut(problem, lengths))[0]
            tokens = np.arange(45)
            assert np.array_equal(
                seen_values(problem, device, tokens), seen_values(problem, whole, tokens)
            ), f"{problem.op}, {problem.label}: tiles of {lengths}"
            n_parts += 1
        for tile, count in ((0, 1), (3, 1), (5, 1), (1, 3)):
            arguments = problem.arguments | {"n_tiles": count}
            tiles = problem.buffers["tiles"][tile : tile + count].copy()
            device = on.run(problem.op, arguments, problem.buffers | {"tiles": tiles})[0]
            tokens = np.arange(int(tiles[0, 0]), int(tiles[-1].sum()))
            assert np.array_equal(
                seen_values(problem, device, tokens), seen_values(problem, whole, tokens)
            ), f"{problem.op}, {problem.label}: tiles {tile} to {tile + count - 1} alone"
            n_parts += 1
    return n_parts


def magnitudes(on, rng) -> dict:
    """The largest errors, as shares of sum |q| |k| and sum pattern |v|, where queries and keys lie
    100 powers of two apart, and values of the keys of a row 30.
    """
    scores = forward.attn_scores(rng, [(0, 40)], 2, 1, 20)
    powers = np.ldexp(1.0, rng.integers(-50, 50, (40, 1))).astype(np.float32)
    scores.buffers["qkv"] *= powers
    scores.units["scores"] *= powers[:, :, None]
    slots = np.ldexp(1.0, rng.integers(-50, 50, (len(scores.buffers["k_cache"]), 1)))
    scores.buffers["k_cache"] *= slots.astype(np.float32)
    first = int(scores.buffers["tokens"][0, 4])
    scores.units["scores"][..., :40] *= slots[first : first + 40, 0]
    output = forward.attn_output(rng, [(0, 40)], 2, 1, 20)
    powers = np.ldexp(1.0, rng.integers(-15, 15, (len(output.buffers["v_cache"]), 1)))
    output.buffers["v_cache"] *= powers.astype(np.float32)
    values = np.abs(output.buffers["v_cache"][first : first + 40].astype(np.float64))
    weights = np.where(np.isnan(p := output.buffers["pattern"]), 0, p)[..., :40]
    output.units["z"][:, :40] = np.einsum("thj,jd->thd", weights, values).reshape(40, -1)
    return {p.op: checking.check(on, p).error for p in (scores, output)}


def plain(on, rng, baseline, units) -> dict:
    """Whether the kernels have the bits of the baseline: for heads that are no multiple of 4, in
    decoding, and elsewhere.
    """
    found = {}
    for name, d_head, decode in (("heads of 6", 6, 0), ("decoding", 8, 1), ("prefill", 8, 0)):
        for problem in (
            forward.attn_scores(rng, [(0, 33)], 2, 1, d_head),
            forward.attn_output(rng, [(0, 33)], 2, 1, d_head),
        ):
            results = []
            for family in (baseline, units):
                on.use(family)
                device = on.run(problem.op, problem.arguments | {"decode": decode}, problem.buffers)
                results.append(seen_values(problem, device[0], np.arange(33)))
            found[f"{problem.op}, {name}"] = bool(np.array_equal(*results))
    return found
