"""Log-probabilities from logits in float64, row by row: bit-identical for any number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .types import Float64Array


def logsumexp(x: Float64Array) -> float:
    """log(sum(exp(x))) of one row, accurate in both tails."""
    top = x.max()
    return float(top + np.log(np.exp(x - top).sum()))


def rowwise(
    function: Callable[..., Any], width_out: tuple[int, ...], *tables: npt.ArrayLike
) -> Float64Array:
    """`function` of each row by itself. NumPy's order of summation depends on how many rows an
    array holds; this way every row is summed in one order.
    """
    arrays = [np.asarray(table) for table in tables]
    lead = arrays[-1].shape[:-1]
    flat = [
        np.ascontiguousarray(array.reshape(-1, array.shape[-1]), dtype=np.float64)
        for array in arrays
    ]
    out = np.empty((len(flat[-1]), *width_out), dtype=np.float64)
    for i, rows in enumerate(zip(*flat)):
        out[i] = function(*rows)
    return out.reshape(*lead, *width_out)


def log_softmax(logits: npt.ArrayLike) -> Float64Array:
    """Log-probabilities over the last axis, float64 [..., V]."""
    return rowwise(lambda x: x - logsumexp(x), (np.shape(logits)[-1],), logits)
