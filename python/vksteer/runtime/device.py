"""Vulkan devices: which ones there are, and which one a model gets.

Order of choice: discrete, integrated, virtual; a software device only when there is no other, with
one warning. `device=` or the environment variable VKSTEER_DEVICE picks by index, by UUID, or
by a part of the name.
"""

from __future__ import annotations

import atexit
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..base.bytes import memory_bytes
from ..errors import DeviceError

if TYPE_CHECKING:
    from .. import _engine as extension

_ORDER = {"discrete": 0, "integrated": 1, "virtual": 2, "software": 3}
INSTALL = (
    "install a Vulkan driver: Debian/Ubuntu `apt install libvulkan1 mesa-vulkan-drivers` (AMD,"
    " Intel, and a software device for any machine), NVIDIA's proprietary driver for NVIDIA; or"
    " point VK_DRIVER_FILES at a driver's ICD file"
)


@dataclass(frozen=True)
class Device:
    """A Vulkan device as the driver describes it.

    type: "discrete", "integrated", "virtual" or "software". memory_bytes: the largest
    device-local heap. features: optional features that it offers. suitable: it offers the baseline
    (Vulkan 1.2, buffer addresses, scalar layout, timeline semaphores, subgroup operations); if
    not, `missing` says what.
    """

    index: int
    name: str
    vendor: str
    type: str
    driver: str
    uuid: str
    memory_bytes: int
    features: Mapping[str, Any]
    suitable: bool
    missing: str

    def __str__(self) -> str:
        return (
            f"[{self.index}] {self.name} ({self.type}, {self.driver},"
            f" {self.memory_bytes / 1e9:.1f} GB)"
        )


def _prepare_environment() -> None:
    """Hints for drivers, before the first one is loaded; a user's own setting always wins."""
    # Lavapipe computes 8 lanes at a time unless told otherwise; 16 are 1.2-1.4 times faster where
    # the CPU has AVX-512 (docs/decisions.md).
    if "LP_NATIVE_VECTOR_WIDTH" not in os.environ and sys.platform == "linux":
        try:
            with open("/proc/cpuinfo") as file:
                flags = next((line for line in file if line.startswith("flags")), "")
        except OSError:
            flags = ""
        if " avx512f " in flags and " avx512bw " in flags and " avx512vl " in flags:
            os.environ["LP_NATIVE_VECTOR_WIDTH"] = "512"
    # Mesa's cache on disk finds lavapipe's compiled texel fetches by their format and not by the
    # width of vectors (Mesa 25.0): an entry from a process of another width gives wrong values or
    # crashes. So each width has a folder of its own.
    inherited = Path(os.environ.get("MESA_SHADER_CACHE_DIR") or cache_folder() / "mesa")
    width = (
        "".join(c for c in os.environ.get("LP_NATIVE_VECTOR_WIDTH", "") if c.isalnum()) or "default"
    )
    folder = (
        inherited.parent if inherited.name.startswith("vectors-") else inherited
    ) / f"vectors-{width}"
    os.environ["MESA_SHADER_CACHE_DIR"] = str(folder)


@cache
def _engine() -> ModuleType:
    """The C extension, with the environment prepared that its first use of a driver reads."""
    _prepare_environment()
    from .. import _engine

    return _engine


def _from_info(info: dict[str, Any]) -> Device:
    names = (
        "index",
        "name",
        "vendor",
        "type",
        "driver",
        "uuid",
        "memory_bytes",
        "suitable",
        "missing",
    )
    return Device(
        **{n: info[n] for n in names},
        features={k: v for k, v in info.items() if k not in names and k != "available_bytes"},
    )


def devices() -> list[Device]:
    """All Vulkan devices of this machine; [] where there is no loader, no driver or no device."""
    try:
        return [_from_info(info) for info in _engine().devices()]
    except DeviceError:
        return []


def choose(device: int | str | Device | None = None) -> Device:
    """The device that `device` names: an index, a UUID, a part of a name, a Device, or None for the
    default. Raises DeviceError listing the devices where there is no such one.
    """
    try:
        found = [_from_info(info) for info in _engine().devices()]
    except DeviceError as error:
        raise DeviceError(str(error)) from None
    if not found:
        raise DeviceError(f"no Vulkan device: {INSTALL}")
    named, origin = device, "device="
    if named is None and os.environ.get("VKSTEER_DEVICE"):
        named, origin = os.environ["VKSTEER_DEVICE"], "VKSTEER_DEVICE="
    if isinstance(named, Device):
        named = named.index
    listing = "; ".join(str(d) for d in found)
    if named is not None:
        text = str(named).strip().lower()
        if text.isdigit() and len(text) < 8:
            matches = [d for d in found if d.index == int(text)]
        else:
            matches = [d for d in found if d.uuid == text.replace("-", "")] or [
                d for d in found if text and text in d.name.lower()
            ]
        if not matches:
            raise DeviceError(f"{origin}{named!r} matches no device; there are {listing}")
        chosen = matches[0]
        if not chosen.suitable:
            raise DeviceError(f"{chosen} does not offer {chosen.missing}, which the kernels need")
        return chosen
    able = [d for d in found if d.suitable]
    if not able:
        raise DeviceError(
            "no Vulkan device offers what the kernels need: "
            + "; ".join(f"{d} lacks {d.missing}" for d in found)
            + f"; {INSTALL}"
        )
    return min(able, key=lambda d: (_ORDER[d.type], d.index))


def cache_folder() -> Path:
    """Where pipelines and measured choices are kept: $VKSTEER_CACHE, else the user's cache
    folder. Not created here.
    """
    if os.environ.get("VKSTEER_CACHE"):
        return Path(os.environ["VKSTEER_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vksteer"


_open: dict[tuple[int, int], extension.Device] = {}
_warned_of: set[str] = set()  # types of devices


@atexit.register
def _close_all() -> None:
    # Registered before any model's clean-up and hence run after it, while the interpreter can still
    # call the driver.
    _open.clear()


def hold_all() -> None:
    """Makes other threads wait at their next use of a device, because the interpreter ends. Threads
    that are not daemons have ended before.
    """
    for engine in list(_open.values()):
        engine.hold()


def open_device(device: int | str | Device | None = None) -> tuple[extension.Device, Device]:
    """(engine device, Device): one engine device per process and index, shared by models, closed
    when the interpreter ends.
    """
    chosen = choose(device)
    if (
        chosen.type == "software"
        and device is None
        and not os.environ.get("VKSTEER_DEVICE")
        and chosen.type not in _warned_of
    ):
        _warned_of.add(chosen.type)
        warnings.warn(
            f"no GPU found: running on the software device {chosen.name}, many times slower than a"
            " GPU (choose with device= or VKSTEER_DEVICE to silence this)",
            stacklevel=3,
        )
    key = (os.getpid(), chosen.index)
    engine = _open.get(key)
    if engine is None or not engine.usable:  # a lost device is opened anew
        folder = cache_folder()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:  # a read-only home costs compile time only
            folder = Path("")
        limit = memory_bytes(os.environ.get("VKSTEER_MEMORY") or None, "VKSTEER_MEMORY") or 0
        engine = _engine().Device(chosen.index, str(folder) if str(folder) != "." else "", limit)
        _open[key] = engine
    return engine, chosen
