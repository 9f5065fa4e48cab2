"""Arrays of other packages as NumPy arrays: torch tensors of any dtype and device, and the bfloat16
of ml_dtypes.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from .types import Array


def as_numpy(values: Any) -> Any:
    """`values` with every torch tensor in it as a NumPy array; anything else as it is.

    NumPy knows no bfloat16 and no float8: such tensors become float32, which holds their values
    exactly. A list or tuple is looked through one level deep.
    """
    torch: Any = sys.modules.get("torch")  # without it nothing can be a tensor
    if torch is None:
        return values
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        if tensor.is_floating_point() and tensor.dtype not in (torch.float64, torch.float32):
            tensor = tensor.to(torch.float32)
        return tensor.numpy()
    if isinstance(values, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in values):
        return [as_numpy(v) for v in values]
    return values


def as_float32(values: Any) -> Array:
    """`values` as a float32 array, a copy where they are another dtype. Raises TypeError or
    ValueError for what is not numbers.
    """
    with np.errstate(over="ignore"):  # callers check for infinity and name the entry
        return np.asarray(as_numpy(values), dtype=np.float32)
