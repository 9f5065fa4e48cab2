"""vksteer: why a steering vector works, on any Vulkan GPU.

Importing is cheap and needs no driver; a device is opened by `Model.from_pretrained`. Submodules load when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import DeviceError, ModelError

__version__ = "0.1.0"

#: Where a public name lives; resolved on first access, so that `import vksteer` stays fast.
_LAZY = {
    "Model": "model", "Config": "config", "devices": "device", "Device": "device", "Run": "run", "Generation": "generation",
    "Steer": "edits", "Ablate": "edits", "Set": "edits", "Add": "edits", "Scale": "edits", "MeanAblate": "edits",
    "SteeringVector": "vectors", "LogitDiff": "gradients", "LogProb": "gradients", "KL": "gradients", "Gradients": "gradients",
}
_MODULES = ("circuits", "data", "freezing", "judge", "ov", "patching", "sparsify", "steering")

if TYPE_CHECKING:
    from . import circuits, data, freezing, judge, ov, patching, sparsify, steering
    from .config import Config
    from .device import Device, devices
    from .edits import Ablate, Add, MeanAblate, Scale, Set, Steer
    from .generation import Generation
    from .gradients import KL, Gradients, LogitDiff, LogProb
    from .model import Model
    from .run import Run
    from .vectors import SteeringVector

__all__ = ["DeviceError", "ModelError", *_LAZY, *_MODULES]


def __getattr__(name):
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'vksteer' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
