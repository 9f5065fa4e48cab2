"""Problems for the operations that circuits are run with, as `verify` has them for the forward
ones. Units: sums without cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .problems import (
    EPS,
    HEADS_FLAGS,
    INPUTS_BIAS,
    NO_DIFFERENCE,
    NORM_KINDS,
    OUTPUTS_NORM,
    PLACE_FLAGS,
    PLACES,
    TOKEN_WORDS,
    Problem,
    beside,
    inverse_rms,
    logit_biases,
    nothing,
    numbers,
    padded,
    row_stride,
)

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "circuit_inputs": 1.5e-6,  # 1.7e-7
    "circuit_place": 2e-6,  # 1.9e-7
    "circuit_heads": 1e-6,  # 1.0e-7
    "circuit_outputs": 1.5e-6,  # 2.9e-7
    "pair_logits": 1e-6,  # 1.0e-7
    "logit_metrics": 3e-6,  # 2.6e-7, of the largest logit
}


QUERY, KEY, VALUE, BASE = (PLACES[name] for name in ("q", "k", "v", "base"))


def _named(buffers, **more) -> dict:
    return {name: name for name in buffers} | more


def _sizes(x: np.ndarray, width: int) -> np.ndarray:
    return np.abs(x[..., :width].astype(np.float64))


def _tokens(rng, n, n_slots) -> np.ndarray:
    """[n, TOKEN_WORDS] of which angles and slots count; every slot once."""
    tokens = np.zeros((n, TOKEN_WORDS), np.uint32)
    tokens[:, 2] = rng.permutation(n_slots)[:n]
    tokens[:, 8] = rng.integers(0, 50, n)
    return tokens


def _input_units(buffers, tokens, kind) -> list[np.ndarray]:
    """Of each entry's rows of these tokens, float64 [n, width]: what a sum would be without
    cancellation, normalised.
    """
    refs, first = buffers["refs"], buffers["first"]
    n_chunk, width = len(buffers["x"]), len(buffers["gain"])
    x = buffers["x"][:, :width].astype(np.float64)[tokens]
    d = buffers["d"][:, :width].astype(np.float64).reshape(-1, n_chunk, width)[:, tokens]
    units = []
    for e in range(len(first) - 1):
        mine = d[refs[first[e] : first[e + 1]]]
        total = x + mine.sum(0)
        if kind == "layer":
            total -= total.mean(-1, keepdims=True)
        unit = (np.abs(x) + np.abs(mine).sum(0)).max(-1, keepdims=True) * np.ones(width)
        if kind != "none":
            unit *= inverse_rms(total) * np.abs(buffers["gain"]).max()
        units.append(unit + np.abs(np.nan_to_num(buffers["bias"])))
    return units


def circuit_inputs(
    rng, n_entries, n_chunk, width, kind="rms", bias=False, n_differences=5, most=4, picked=None
) -> Problem:
    """kind: a name of NORM_KINDS. picked: so many of the tokens; None: all."""
    stride = row_stride(width)
    lengths = rng.integers(0, most + 1, n_entries)
    first = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    refs = rng.integers(0, n_differences, int(first[-1])).astype(np.uint32)
    chosen = (
        np.arange(n_chunk, dtype=np.uint32)
        if picked is None
        else rng.integers(0, n_chunk, picked).astype(np.uint32)
    )
    n = len(chosen)
    buffers = {
        "x": padded(numbers(rng, n_chunk, width), stride),
        "d": padded(numbers(rng, n_differences * n_chunk, width), stride),
        "refs": refs,
        "first": first,
        "tokens": chosen,
        "gain": nothing(width) if kind == "none" else numbers(rng, width),
        "bias": numbers(rng, width) if bias else nothing(width),
        "dst": nothing(n_entries * n, stride),
    }
    units = _input_units(buffers, chosen, kind)
    unit = np.concatenate(units) if units and n else np.ones((n_entries * n, width))
    return Problem(
        "circuit_inputs",
        f"{n_entries} entries x {n} of {n_chunk} x {width}, {len(refs)} differences, {kind}"
        f"{' with bias' if bias else ''}",
        _named(
            buffers,
            kind=NORM_KINDS[kind],
            flags=INPUTS_BIAS * bias,
            all_tokens=int(picked is None),
            n_tokens=n,
            n_chunk=n_chunk,
            width=width,
            stride=stride,
            eps=EPS,
            n_entries=n_entries,
            n_refs=len(refs),
        ),
        buffers,
        {"dst": beside(unit, buffers["dst"])},
    )


def circuit_place(
    rng, n_tokens, d_head, qk_norm=False, d_rot=None, interleaved=False, n_slots=None, n_heads=3
) -> Problem:
    """Two queries, keys and values from products, at odd columns, and one of each from the base
    run. d_rot: channels that are rotated; None: all.
    """
    n_slots, d_rot = n_slots or n_tokens + 3, d_head if d_rot is None else d_rot
    x_stride, base_stride, q_stride = (
        row_stride(d_head + 32),
        row_stride(n_heads * d_head),
        row_stride(d_head),
    )
    entries = [[kind, 2 * kind + i, 10 * i, i] for kind in (QUERY, KEY, VALUE) for i in range(2)]
    entries += [[kind | BASE, 7, kind * d_head, 2] for kind in (QUERY, KEY, VALUE)]
    buffers = {
        "x": padded(numbers(rng, 6 * n_tokens, d_head + 32), x_stride),
        "base": padded(numbers(rng, n_tokens, n_heads * d_head), base_stride),
        "entries": np.array(entries, np.uint32),
        "tokens": _tokens(rng, n_tokens, n_slots),
        "angles": numbers(rng, 50, d_rot),
        "q_angles": numbers(rng, 50, d_rot),
        "q_gain": numbers(rng, d_head),
        "k_gain": numbers(rng, d_head),
        "q": nothing(3 * n_tokens, q_stride),
        "k_cache": nothing(3 * n_slots, d_head),
        "v_cache": nothing(3 * n_slots, d_head),
    }
    return Problem(
        "circuit_place",
        f"{n_tokens} tokens, heads of {d_head}{' normed' if qk_norm else ''}, {d_rot}"
        f" channels{' in neighbouring pairs' if interleaved else ''}",
        _named(
            buffers,
            n_tokens=n_tokens,
            d_head=d_head,
            d_rot=d_rot,
            x_stride=x_stride,
            base_stride=base_stride,
            q_stride=q_stride,
            n_slots=n_slots,
            flags=PLACE_FLAGS["qk_norm"] * qk_norm + PLACE_FLAGS["interleaved"] * interleaved,
            eps=EPS,
            n_entries=len(entries),
        ),
        buffers,
    )


def circuit_heads(
    rng,
    n_tokens,
    d_head,
    difference=True,
    scaled=False,
    column=False,
    zero=False,
    offset=False,
    n_heads=3,
    n_states=4,
) -> Problem:
    """The base run's state among the others; without `column` rows hold one head, with it one row
    has all of them or zeros beside one. offset: states begin anywhere in the first 32 columns of
    their rows.
    """
    z_stride, base_stride = row_stride(d_head + 32 * offset), row_stride(n_heads * d_head)
    out_stride = base_stride if column else z_stride
    rows = n_heads if zero or not column else 1
    entries = [
        [
            NO_DIFFERENCE if h == 1 else rng.integers(0, n_states),
            h,
            h if rows > 1 else 0,
            rng.integers(0, 33) if offset else rng.integers(0, 2),
        ]
        for h in range(n_heads)
    ]
    buffers = {
        "z": padded(numbers(rng, n_states * n_tokens, d_head + 32 * offset), z_stride),
        "base": padded(numbers(rng, n_tokens, n_heads * d_head), base_stride),
        "entries": np.array(entries, np.uint32),
        "scale": np.abs(numbers(rng, 2, n_tokens)) + 0.5,
        "base_scale": np.abs(numbers(rng, n_tokens)) + 0.5,
        "dst": nothing(rows * n_tokens, out_stride),
    }
    chosen = dict(difference=difference, scaled=scaled, column=column, zero=zero, offset=offset)
    flags = sum(HEADS_FLAGS[name] for name, on in chosen.items() if on)
    largest = max(np.nanmax(np.abs(buffers[name]), initial=1.0) for name in ("z", "base")) * (
        2 if scaled else 1
    )
    return Problem(
        "circuit_heads",
        f"{n_tokens} tokens, heads of {d_head}, flags {flags}",
        _named(
            buffers,
            n_tokens=n_tokens,
            d_head=d_head,
            z_stride=z_stride,
            base_stride=base_stride,
            out_stride=out_stride,
            flags=flags,
            n_entries=n_heads,
        ),
        buffers,
        {"dst": float(largest)},
    )


def circuit_outputs(rng, n_rows, n_tokens, width, normed=False, first=0, in_place=False) -> Problem:
    stride = row_stride(width)
    buffers = {
        "x": padded(numbers(rng, n_rows, width), stride),
        "base": padded(numbers(rng, n_tokens, width), stride),
        "gain": numbers(rng, width),
        "dst": nothing(n_rows, stride),
    }
    sizes = _sizes(buffers["x"], width) * (
        inverse_rms(buffers["x"][:, :width]) * np.abs(buffers["gain"]) if normed else 1
    )
    sizes += _sizes(buffers["base"], width)[(first + np.arange(n_rows)) % n_tokens]
    arguments = _named(
        buffers,
        first=first,
        n_tokens=n_tokens,
        width=width,
        stride=stride,
        flags=OUTPUTS_NORM * normed,
        eps=EPS,
        n_rows=n_rows,
    )
    if in_place:
        arguments["dst"] = "x"
    return Problem(
        "circuit_outputs",
        f"{n_rows} rows of {n_tokens} tokens from {first} x"
        f" {width}{' normed' if normed else ''}{' in place' if in_place else ''}",
        arguments,
        buffers,
        {"x" if in_place else "dst": beside(sizes, buffers["dst"])},
    )


def pair_logits(rng, n_entries, n, width, softcap=0.0, bias=False) -> Problem:
    stride = row_stride(width)
    buffers = {
        "normed": padded(numbers(rng, n_entries * n, width), stride),
        "rows": padded(numbers(rng, 2 * n, width), stride),
        "logits": nothing(n_entries, n, 2),
    }
    units = (
        np.einsum(
            "end,nkd->enk",
            _sizes(buffers["normed"], width).reshape(n_entries, n, width),
            _sizes(buffers["rows"], width).reshape(n, 2, width),
        )
        + softcap
    )
    if bias:
        more, sizes = logit_biases(rng, n)
        buffers |= more
        units += sizes
    return Problem(
        "pair_logits",
        f"{n_entries} x {n} x {width}{' capped' if softcap else ''}{' bias' if bias else ''}",
        _named(
            buffers,
            n=n,
            width=width,
            stride=stride,
            softcap=softcap,
            has_bias=int(bias),
            n_entries=n_entries,
        ),
        buffers,
        {"logits": units},
    )


def logit_metrics(rng, n_rows, n, width, softcap=0.0, first=0, spread=3.0, shift=0.0) -> Problem:
    """spread, shift: of the logits. Each row has one clearly greatest logit, so that the greedy
    token is no matter of rounding.
    """
    stride = row_stride(width)
    rows = lambda k: (numbers(rng, k, width, scale=spread) + np.float32(shift)).astype(np.float32)
    logits = rows(n_rows)
    logits[np.arange(n_rows), rng.integers(0, width, n_rows)] += np.float32(4 * spread)
    buffers = {
        "logits": padded(logits, stride),
        "reference": padded(rows(n), stride),
        "other": padded(rows(n), stride),
        "targets": rng.integers(0, width, n).astype(np.uint32),
        "values": nothing(n_rows, 4),
    }
    size = (
        max(
            np.nanmax(np.abs(buffers[name]), initial=1.0)
            for name in ("logits", "reference", "other")
        )
        + np.log(width)
        + 1
    )
    return Problem(
        "logit_metrics",
        f"{n_rows} rows of {n} x {width}{' capped' if softcap else ''}, spread {spread:g}, shift"
        f" {shift:g}",
        _named(
            buffers, first=first, n=n, width=width, stride=stride, softcap=softcap, n_rows=n_rows
        ),
        buffers,
        {"values": float(size)},
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs of these."""
    for picked in (None, 3):
        for kind in NORM_KINDS:
            yield circuit_inputs(rng, 7, 5, 257, kind, picked=picked)
        yield circuit_inputs(rng, 7, 5, 257, "layer", bias=True, picked=picked)
    for d_head in (2, 6, 64, 80):
        yield circuit_place(rng, 5, d_head, qk_norm=d_head != 64)
        for d_rot in (0, d_head // 4 * 2):
            yield circuit_place(rng, 5, d_head, qk_norm=d_head == 64, d_rot=d_rot)
        yield circuit_place(rng, 5, d_head, interleaved=True)
        yield circuit_heads(rng, 5, d_head)
        yield circuit_heads(rng, 5, d_head, scaled=True, column=True, zero=True)
    yield circuit_heads(rng, 5, 6, difference=False, column=True)
    yield circuit_heads(rng, 5, 6, difference=False, column=True, offset=True)
    for normed in (False, True):
        yield circuit_outputs(rng, 7, 3, 257, normed, first=2, in_place=normed)
    for softcap in (0.0, 5.0):
        yield pair_logits(rng, 3, 5, 257, softcap)
        yield logit_metrics(rng, 7, 3, 257, softcap, first=2)
