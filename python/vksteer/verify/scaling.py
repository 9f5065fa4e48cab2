"""Problems for the operations of activation scaling."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .problems import Problem, beside, nothing, numbers, padded, row_stride

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "scale_dynamic": 5e-7,  # 1.2e-7, of |x| (1 + |coefficient| sum |w x|)
    "scale_dynamic_bwd": 6e-7,  # 1.5e-7
    "row_dots": 4e-7,  # 8.5e-8, of sum |x y|
    "row_sums": 1e-6,  # 2.6e-7, of sum |weight x|
    "choice_grad": 3.5e-6,  # 8.5e-7
}


def _entries(rng, n_tokens, n_edited) -> np.ndarray:
    edited = rng.permutation(n_tokens)[: n_tokens if n_edited is None else n_edited]
    entries = np.zeros((len(edited), 4), np.uint32)
    entries[:, 0] = edited
    entries[:, 1] = rng.integers(0, 5, len(edited))
    entries[:, 2] = numbers(rng, len(edited)).view(np.uint32)
    return entries


def _sizes(x: np.ndarray, entries, operand) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each entry: |coefficient|, its part of |operand|, sum |w x| over its columns."""
    width = x.shape[1]
    w = np.abs(operand.astype(np.float64))[entries[:, 1][:, None] + np.arange(width)]
    along = (np.abs(x[entries[:, 0]].astype(np.float64)) * w).sum(1)
    return np.abs(entries[:, 2].view(np.float32).astype(np.float64)), w, along


def scale_dynamic(rng, n_tokens, width, n_edited=None) -> Problem:
    stride = row_stride(width)
    x = numbers(rng, n_tokens, width)
    entries = _entries(rng, n_tokens, n_edited)
    operand = numbers(rng, 5 + width, scale=max(width, 1) ** -0.5)
    size, _, along = _sizes(x, entries, operand)
    units = np.abs(x.astype(np.float64))
    units[entries[:, 0]] *= (1 + size * along)[:, None]
    x = padded(x, stride)
    return Problem(
        "scale_dynamic",
        f"{len(entries)} of {n_tokens} x {width}",
        {"x": "x", "entries": "entries", "operand": "operand"}
        | {"width": width, "stride": stride, "n_entries": len(entries)},
        {"x": x, "entries": entries, "operand": operand},
        {"x": beside(np.maximum(units, 1e-30), x)},
    )


def scale_dynamic_bwd(rng, n_tokens, width, n_edited=None) -> Problem:
    stride = row_stride(width)
    x, d = numbers(rng, n_tokens, width), numbers(rng, n_tokens, width)
    entries = _entries(rng, n_tokens, n_edited)
    operand = numbers(rng, 5 + width, scale=max(width, 1) ** -0.5)
    size, w, along = _sizes(x, entries, operand)
    rows = entries[:, 0]
    across = np.abs(x[rows].astype(np.float64) * d[rows]).sum(1)
    units = np.abs(d.astype(np.float64))
    units[rows] = units[rows] * (1 + size * along)[:, None] + (size * across)[:, None] * w
    d = padded(d, stride)
    return Problem(
        "scale_dynamic_bwd",
        f"{len(entries)} of {n_tokens} x {width}",
        {"d": "d", "x": "x", "entries": "entries", "operand": "operand"}
        | {"width": width, "stride": stride, "x_stride": width + 3, "n_entries": len(entries)},
        {"d": d, "x": padded(x, width + 3), "entries": entries, "operand": operand},
        {"d": beside(np.maximum(units, 1e-30), d)},
    )


def row_dots(rng, rows, width) -> Problem:
    x, y = numbers(rng, rows, width), numbers(rng, rows, width)
    return Problem(
        "row_dots",
        f"{rows} x {width}",
        {"x": "x", "y": "y", "dst": "dst", "width": width}
        | {"x_stride": row_stride(width), "y_stride": width + 3, "n_rows": rows},
        {"x": padded(x, row_stride(width)), "y": padded(y, width + 3), "dst": nothing(rows)},
        {"dst": np.abs(x.astype(np.float64) * y).sum(1)},
    )


def row_sums(rng, lengths, width) -> Problem:
    """lengths: rows of x in each range; one row between two ranges belongs to none."""
    ends = np.cumsum([n + 1 for n in lengths])
    ranges = np.array([(e - n - 1, e - 1) for n, e in zip(lengths, ends)], np.uint32)
    n_tokens = int(ends[-1])
    x, weights = numbers(rng, n_tokens, width), numbers(rng, n_tokens)
    sizes = np.abs(x.astype(np.float64)) * np.abs(weights)[:, None]
    units = np.array([sizes[a:b].sum(0) for a, b in ranges]).reshape(len(lengths), width)
    return Problem(
        "row_sums",
        f"{'+'.join(map(str, lengths))} x {width}",
        {"x": "x", "weights": "weights", "ranges": "ranges", "dst": "dst"}
        | {"width": width, "stride": row_stride(width), "n_ranges": len(lengths)},
        {
            "x": padded(x, row_stride(width)),
            "weights": weights,
            "ranges": ranges,
            "dst": nothing(len(lengths), width),
        },
        {"dst": np.maximum(units, 1e-30)},
    )


def choice_grad(
    rng, rows, width, softcap=0.0, spread=3.0, reference_softcap=None, faith=0.7, margin=1.0
) -> Problem:
    """reference_softcap: of the reference; the logits' own without it. Units: of a gradient, 1 (the
    hinge's slope); of a scalar, the largest logarithm in it.
    """
    stride = row_stride(width)
    draw = lambda: padded(numbers(rng, rows, width, scale=spread), stride)
    pairs = np.array([rng.permutation(width)[:2] for _ in range(rows)], np.uint32).reshape(rows, 2)
    buffers = {
        "logits": draw(),
        "reference": draw(),
        "a": np.ascontiguousarray(pairs[:, 0]),
        "b": np.ascontiguousarray(pairs[:, 1]),
        "signs": np.where(rng.integers(0, 2, rows), 1, -1).astype(np.float32),
        "values": nothing(rows, 2),
    }
    largest = max(np.abs(buffers[n][:, :width]).max(initial=0) for n in ("logits", "reference"))
    return Problem(
        "choice_grad",
        f"{rows} x {width}{' capped' if softcap else ''}",
        {name: name for name in buffers}
        | {
            "width": width,
            "stride": stride,
            "margin": margin,
            "faith": faith,
            "softcap": softcap,
            "reference_softcap": softcap if reference_softcap is None else reference_softcap,
            "n_rows": rows,
        },
        buffers,
        {
            "logits": np.broadcast_to(np.float64(max(1.0, faith)), (rows, stride)),
            "values": np.log(width) + 2 * largest + 1,
        },
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs of these."""
    yield scale_dynamic(rng, 7, 257, 5)
    yield scale_dynamic_bwd(rng, 7, 257, 5)
    yield row_dots(rng, 7, 257)
    yield row_sums(rng, (3, 0, 9), 257)
    for softcap in (0.0, 5.0):
        yield choice_grad(rng, 3, 257, softcap)
