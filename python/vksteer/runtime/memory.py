"""Whether a model's weights fit a device, before any of them is read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..errors import DeviceError
from ..loading import dtypes
from ..loading.tensor_names import engine_tensors
from .device import devices

if TYPE_CHECKING:
    from .. import _engine as extension
    from ..loading.config import Config
    from .device import Device


def weight_bytes(config: Config, dtype: str) -> int:
    """Bytes of a model's weights on a device: matrices in `dtype`, vectors in float32. The engine
    pads matrices to whole panels, which adds less than a hundredth.
    """
    wide = dtypes.STORAGE[dtype].itemsize
    return sum(
        math.prod(t.shape) * (wide if len(t.shape) > 1 else 4) for t in engine_tensors(config)
    )


def available_bytes(engine_device: extension.Device) -> int:
    """Device memory that is free now."""
    return int(engine_device.available_bytes)


def check_fits(
    engine_device: extension.Device, device: Device, config: Config, dtype: str, name: str
) -> None:
    """Raises DeviceError where the weights alone are larger than the free device memory, saying
    which other dtype or device would hold them.
    """
    need, free = weight_bytes(config, dtype), available_bytes(engine_device)
    if need <= free:
        return
    options = [
        f"dtype={other!r} ({weight_bytes(config, other) / 1e9:.2f} GB)"
        for other in dtypes.STORAGE
        if weight_bytes(config, other) <= free
    ]
    options += [
        f"device={other.index} ({other.name}, {other.memory_bytes / 1e9:.2f} GB)"
        for other in devices()
        if other.suitable and other.index != device.index and other.memory_bytes >= need
    ]
    smallest = min(weight_bytes(config, other) for other in dtypes.STORAGE)
    remedy = (
        f"these would fit: {'; '.join(options)}"
        if options
        else f"no dtype (at least {smallest / 1e9:.2f} GB) and no other device of this machine"
        " would fit: use a smaller model or a device with more memory"
    )
    raise DeviceError(
        f"{name}: the weights take {need / 1e9:.2f} GB as {dtype}, and {device.name} has"
        f" {free / 1e9:.2f} GB free; {remedy}"
    )
