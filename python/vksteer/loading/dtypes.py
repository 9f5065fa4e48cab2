"""The three dtypes in which weights are held, as NumPy arrays; bfloat16 is held as uint16 bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..base.types import Array, Float32Array

#: Name -> NumPy dtype of the array that holds it.
STORAGE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<f2"),
}


def to_float32(array: Array, dtype: str) -> Float32Array:
    """Exact: every bfloat16 and float16 is a float32."""
    if dtype == "float32":
        return array
    if dtype == "float16":
        return array.astype(np.float32)
    return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)


def from_float32(values: Float32Array, dtype: str) -> Array:
    """Rounds to the nearest, ties to even. Values too large for float16 become infinite, which
    callers check.
    """
    if dtype == "float32":
        return np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded >>= np.uint32(16)
    result = rounded.astype(np.uint16)
    nan = np.isnan(values)
    if nan.any():  # the addition above could carry a NaN into infinity
        result[nan] = 0x7FC0
    return result


def convert(array: Array, dtype: str, to: str) -> Array:
    """The values as a C-contiguous array of dtype `to`; the same array where nothing changes."""
    if dtype == to:
        return np.ascontiguousarray(array)
    return from_float32(to_float32(array, dtype), to)
