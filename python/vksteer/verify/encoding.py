"""Problems for the operations of sparse autoencoders, as `verify` has them for the forward ones.
Units: sums without cancellation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .problems import Problem, beside, flags, nothing, numbers, padded, row_stride

FEATURES = flags("FEATURE", "jump", "gate")

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "feature_act": 4e-7,  # 9.2e-8; jump only picks
    "feature_sums": 8e-7,  # 1.8e-7
}


def feature_act(rng, n_tokens, width, gate=False) -> Problem:
    """Some thresholds are met exactly, some are infinite."""
    x = numbers(rng, n_tokens, width)
    buffers = {"x": padded(x, row_stride(width))}
    units = np.abs(x).astype(np.float64)
    if gate:
        buffers |= {name: numbers(rng, width) for name in ("gate", "scale", "bias")}
        units = np.abs(x.astype(np.float64) * buffers["scale"]) + np.abs(buffers["bias"])
    else:
        threshold = numbers(rng, width)
        if n_tokens:
            threshold[::3] = x[0, ::3]
        threshold[1::5], threshold[2::7] = -np.inf, np.inf
        buffers["threshold"] = threshold
    return Problem(
        "feature_act",
        f"{n_tokens} x {width} {'gate' if gate else 'jump'}",
        {name: name for name in buffers}
        | {
            "n_tokens": n_tokens,
            "width": width,
            "stride": row_stride(width),
            "kind": FEATURES["gate" if gate else "jump"],
        },
        buffers,
        {"x": beside(units, buffers["x"])},
    )


def feature_sums(rng, counts, width, first=0) -> Problem:
    """Segments of these many tokens behind one another, from token `first` on; every second row of
    the sums is one of them, in reversed order.
    """
    n, total = len(counts), first + sum(counts)
    x = numbers(rng, total, width)
    stride = row_stride(width)
    starts = first + np.cumsum([0, *counts])[:-1]
    at = 2 * np.arange(n)[::-1]
    sums = nothing(2 * n, stride)
    sums[at, :width] = numbers(rng, n, width)
    units = np.ones(sums.shape)
    for start, count, row in zip(starts, counts, at):
        units[row, :width] = np.abs(sums[row, :width])
        units[row, :width] += np.abs(x[start : start + count].astype(np.float64)).sum(0)
    segments = np.stack([starts, np.array(counts), at], 1).astype(np.uint32).reshape(n, 3)
    buffers = {"x": padded(x, stride), "segments": segments, "sums": sums}
    return Problem(
        "feature_sums",
        f"{list(counts)} x {width}",
        {name: name for name in buffers}
        | {
            "n_segments": n,
            "n_tokens": total,
            "width": width,
            "x_stride": stride,
            "out_stride": stride,
        },
        buffers,
        {"sums": units},
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs."""
    for width in (7, 257, 300):
        yield feature_act(rng, 5, width)
        yield feature_act(rng, 5, width, gate=True)
        yield feature_sums(rng, (1, 7, 33), width, first=width % 3)
