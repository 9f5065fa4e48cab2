"""Problems for the operations of the OV circuit, as `verify` has them for the forward ones. Units:
sums without cancellation; the largest are picked.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .problems import (
    TOPK_FLAGS,
    WEIGHT_TYPES,
    Problem,
    matrix_arguments,
    nothing,
    numbers,
    padded,
    panels,
    row_stride,
)

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "head_out": 1.2e-6,  # 2.6e-7, of sum |x w gain|
    "row_norms": 1.5e-6,  # 3.6e-7
    "topk": 0.0,  # it only picks
}


def head_out(
    rng,
    n,
    n_heads,
    n_kv_heads,
    d_head,
    weight_type=0,
    gain=False,
    segment_rows=0,
    family=None,
    scale=0.0,
) -> Problem:
    words, weights = panels(numbers(rng, n, n_heads * d_head), weight_type)
    x, stride = numbers(rng, n_kv_heads, d_head), row_stride(n)
    buffers = {"weights": words, "x": x, "dst": nothing(n_heads, stride)}
    unit = np.einsum(
        "hi,nhi->hn",
        np.abs(x.astype(np.float64)).repeat(n_heads // n_kv_heads, 0),
        np.abs(weights).reshape(n, n_heads, d_head),
    )
    if gain:
        buffers["gain"] = numbers(rng, n)
        unit *= np.abs(buffers["gain"])
    unit *= abs(scale) or 1.0
    arguments = {
        **{name: name for name in buffers},
        **matrix_arguments(n, n_heads * d_head, weight_type, segment_rows, family, scale),
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
        "dst_stride": stride,
    }
    return Problem(
        "head_out",
        f"{n_heads}/{n_kv_heads} heads of {d_head} to {n}"
        f" {WEIGHT_TYPES[weight_type]}{' gain' if gain else ''}",
        arguments,
        buffers,
        {"dst": np.pad(unit, ((0, 0), (0, stride - n)))},
    )


def row_norms(rng, n, k, weight_type=0, segment_rows=0) -> Problem:
    weights = numbers(rng, n, k)
    weights[n // 2] = 0
    words, _ = panels(weights, weight_type)
    return Problem(
        "row_norms",
        f"{n} x {k} {WEIGHT_TYPES[weight_type]}",
        {"dst": "dst", **matrix_arguments(n, k, weight_type, segment_rows)},
        {"weights": words, "dst": nothing(n)},
    )


def topk(rng, rows, columns, k, first=0, held=None, scaled=False, ties=False) -> Problem:
    """held: how many columns went by before, whose largest are in the lists (None: the lists are
    empty and hold anything).
    """
    stride = row_stride(columns)
    draw = lambda n: np.round(numbers(rng, rows, n) * 4) / 4 if ties else numbers(rng, rows, n)
    buffers = {
        "x": padded(draw(columns), stride),
        "values": nothing(rows, k),
        "indices": nothing(rows, k),
    }
    if held is not None:
        before = draw(held)
        order = np.argsort(-before, axis=1, kind="stable")[:, :k]
        at = slice(0, order.shape[1])
        buffers["values"][:], buffers["indices"][:] = np.finfo(np.float32).min, 0
        buffers["values"][:, at], buffers["indices"][:, at] = (
            np.take_along_axis(before, order, 1),
            order,
        )
    if scaled:  # powers of two: the product has one value in both precisions
        buffers["factor"] = (2.0 ** rng.integers(-3, 4, columns)).astype(np.float32)
    return Problem(
        "topk",
        f"{k} of {rows} x {columns} from"
        f" {first}{'' if held is None else f', {held} before'}{' scaled' if scaled else ''}"
        f"{' ties' if ties else ''}",
        {name: name for name in buffers}
        | {
            "n_rows": rows,
            "n_columns": columns,
            "x_stride": stride,
            "first": first,
            "k": k,
            "flags": TOPK_FLAGS["begin"] * (held is None) + TOPK_FLAGS["scaled"] * scaled,
        },
        buffers,
        {"values": 1.0, "indices": 1.0},
    )


def problems(rng) -> Iterator[Problem]:
    """What `vksteer verify` runs."""
    for weight_type in range(3):
        yield head_out(
            rng,
            77,
            6,
            2,
            (6, 16, 80)[weight_type],
            weight_type,
            gain=weight_type != 1,
            segment_rows=32,
        )
        yield row_norms(rng, 77, 53, weight_type, segment_rows=32)
    for k in (1, 20, 130):
        yield topk(rng, 7, 257, k, ties=k == 20)
        yield topk(rng, 7, 257, k, first=300, held=300, scaled=k != 1)
