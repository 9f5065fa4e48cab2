"""vksteer: why a steering vector works, on any Vulkan GPU.

Importing is cheap and needs no driver; a device is opened by `Model.from_pretrained`. Submodules
load when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .errors import DeviceError, ModelError

#: Where a public name lives; resolved on first access, so that `import vksteer` stays fast.
_LAZY = {
    "Model": "runtime.model",
    "Config": "loading.config",
    "Tokenizer": "loading.tokenizer",
    "devices": "runtime.device",
    "Device": "runtime.device",
    "Run": "runtime.run",
    "plan_run": "runtime.memory_plan",
    "RunPlan": "runtime.memory_plan",
    "Generation": "runtime.decoding",
    "Steer": "runtime.edits",
    "Ablate": "runtime.edits",
    "Set": "runtime.edits",
    "Add": "runtime.edits",
    "Scale": "runtime.edits",
    "DynamicScale": "runtime.edits",
    "MeanAblate": "runtime.edits",
    "SteeringVector": "inputs.vectors",
    "dose": "inputs.dosing",
    "LogitDiff": "runtime.gradients",
    "LogProb": "runtime.gradients",
    "KL": "runtime.gradients",
    "Gradients": "runtime.gradients",
}
_MODULES = (
    "circuits",
    "data",
    "freezing",
    "judge",
    "kv",
    "ov",
    "patching",
    "probes",
    "reliability",
    "sae",
    "scaling",
    "sparsify",
    "steering",
    "study",
)

if TYPE_CHECKING:
    from . import (
        circuits,
        data,
        freezing,
        judge,
        kv,
        ov,
        patching,
        probes,
        reliability,
        sae,
        scaling,
        sparsify,
        steering,
        study,
    )
    from .inputs.dosing import dose
    from .inputs.vectors import SteeringVector
    from .loading.config import Config
    from .loading.tokenizer import Tokenizer
    from .runtime.decoding import Generation
    from .runtime.device import Device, devices
    from .runtime.edits import Ablate, Add, DynamicScale, MeanAblate, Scale, Set, Steer
    from .runtime.gradients import KL, Gradients, LogitDiff, LogProb
    from .runtime.memory_plan import RunPlan, plan_run
    from .runtime.model import Model
    from .runtime.run import Run

__all__ = [
    "KL",
    "Ablate",
    "Add",
    "Config",
    "Device",
    "DeviceError",
    "DynamicScale",
    "Generation",
    "Gradients",
    "LogProb",
    "LogitDiff",
    "MeanAblate",
    "Model",
    "ModelError",
    "Run",
    "RunPlan",
    "Scale",
    "Set",
    "Steer",
    "SteeringVector",
    "Tokenizer",
    "circuits",
    "data",
    "devices",
    "dose",
    "freezing",
    "judge",
    "kv",
    "ov",
    "patching",
    "plan_run",
    "probes",
    "reliability",
    "sae",
    "scaling",
    "sparsify",
    "steering",
    "study",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module 'vksteer' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
