"""The tables that scores are made of: checked read-only arrays, means over samples, and the list of
the strongest edges.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..base.arrays import as_numpy
from ..base.display import html_of_markdown
from ..base.types import Array, Float64Array, IntArray


class TopEdge(NamedTuple):
    rank: int  # from 1 on
    name: str
    score: float
    share: float  # of the sum of all |score|


class TopEdges(list[TopEdge]):
    """The edges (or nodes) of largest |score|; its repr is a Markdown table."""

    def __repr__(self) -> str:
        lines = ["| rank | edge | score | share of all |", "|---:|:---|---:|---:|"]
        return "\n".join(
            lines
            + [f"| {e.rank} | {e.name} | {e.score:+.4g} | {100 * e.share:.2f} % |" for e in self]
        )

    def _repr_html_(self) -> str:
        return html_of_markdown(repr(self))


def combine(tables: Sequence[Array] | Array, weights: npt.ArrayLike) -> Float64Array:
    """The mean over samples weighted by metric positions, float64 [...]. tables: [n, ...], summed
    one after the other in float64, so that the order alone decides rounding. weights: int [n].
    """
    total = np.zeros(np.shape(tables[0]), np.float64)
    counts = np.asarray(weights)
    for row, w in zip(tables, counts):
        if w:
            total += float(w) * np.asarray(row, np.float64)
    mean: Float64Array = total / float(np.sum(counts))
    return mean


def checked_array(
    values: npt.ArrayLike, what: str, shape: Sequence[int | None], dtype: npt.DTypeLike = np.float64
) -> Array:
    array = np.array(as_numpy(values), dtype=dtype, order="C")
    if array.shape != tuple(shape):
        raise ValueError(f"{what} must have the shape {list(shape)}, not {list(array.shape)}")
    bad = np.argwhere(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{what} must be finite: entry {tuple(map(int, bad[0]))} is {array[tuple(bad[0])]}"
            f" ({len(bad)} of {array.size} are not)"
        )
    array.flags.writeable = False
    return array


def checked_positions(values: npt.ArrayLike, i: int, n_edges: int) -> Array:
    """Scores of sample i by position, [E, S], float32 where they are given so and float64
    otherwise; a read-only copy.
    """
    dtype = np.asarray(values).dtype
    shape = np.shape(values)
    if len(shape) != 2:
        raise ValueError(f"positions[{i}] must be [{n_edges}, S], not {list(shape)}")
    return checked_array(
        values,
        f"positions[{i}]",
        (n_edges, shape[1]),
        np.float32 if dtype == np.float32 else np.float64,
    )


def checked_counts(values: npt.ArrayLike) -> IntArray:
    """Numbers of metric positions, int64 [n], a read-only copy. Raises ValueError for others."""
    array = np.array(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(
            f"weights must be whole numbers from 0 on, one per sample, not {array.dtype}"
            f" {list(array.shape)}"
        )
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array


def checked_mapping(mapping: Mapping[str, Any] | None, what: str) -> Mapping[str, Any]:
    """A read-only copy. Raises ValueError for what JSON cannot hold."""
    try:
        return MappingProxyType(json.loads(json.dumps(dict(mapping or {}))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a mapping that JSON can hold: {error}") from None
