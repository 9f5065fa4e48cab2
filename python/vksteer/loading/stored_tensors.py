"""A tensor of a safetensors file, as its header describes it."""

from __future__ import annotations

from typing import NamedTuple

#: dtypes that the engine holds
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class Stored(NamedTuple):
    """A tensor as a file's header describes it, checked against the file."""

    file: int  # index into the list of paths
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    nbytes: int
