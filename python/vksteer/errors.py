"""The package's own exceptions. Wrong arguments raise ValueError, TypeError or KeyError as usual.

The C engine imports these two classes by name, so that both halves of the package
raise the same types.
"""

from __future__ import annotations


class VksteerError(RuntimeError):
    """Base of the package's own errors."""


class DeviceError(VksteerError):
    """No Vulkan driver, no such device, a lost device, or out of device memory."""


class ModelError(VksteerError):
    """A model's files are damaged, incomplete, or describe a model that this
    engine does not know.
    """
