"""Which matrix kernels a model uses: the choice is measured once for each device, stored and
reused, so that two runs never differ because of it.

The stored choice is keyed by device UUID, driver, engine version, the kernels themselves and weight
type. VKSTEER_KERNELS pins it by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import _engine as extension
from .._version import __version__
from ..base.whole_files import write_whole
from .device import cache_folder

if TYPE_CHECKING:
    from .device import Device

#: The engine's numbers of the types of stored weights.
WEIGHT_TYPES = {
    "float32": extension.constants["WEIGHT_F32"],
    "bfloat16": extension.constants["WEIGHT_BF16"],
    "float16": extension.constants["WEIGHT_F16"],
}


PRECISIONS = ("float32", "fast")
_said: set[str] = set()  # what was said of a precision, each once in a process


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r}: use one of {', '.join(PRECISIONS)}")


def say_fast(family: str, device: Device) -> None:
    """Says once what precision="fast" means with this kernel family."""
    text = (
        "products are rounded to float16 (by 2^-11); precision='float32' keeps float32's accuracy"
        if family == "matrix"
        else f"it changes nothing: the kernels {family!r} on {device.name} use no matrix units"
    )
    if text not in _said:
        _said.add(text)
        warnings.warn(f"precision='fast': {text}", stacklevel=4)


@cache
def _kernels_mark() -> str:
    """A checksum of all kernels: measurements of other kernels are not reused."""
    from .device import _engine

    mark = 0
    for _, spirv, _ in _engine().kernels():
        mark = zlib.crc32(spirv, mark)
    return f"{mark:08x}"


def _key(device: Device, weight_type: str, fast: bool) -> str:
    return " | ".join(
        [
            device.uuid,
            device.driver,
            device.name,
            f"vksteer {__version__} {_kernels_mark()}",
            weight_type + (" fast" if fast else ""),
        ]
    )


def _stored(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    except (OSError, ValueError):  # absent, unreadable or cut short: measure again
        return {}


def is_chosen(device: Device, weight_type: str, fast: bool = False) -> bool:
    """Whether `choose` needs no measurement."""
    return bool(os.environ.get("VKSTEER_KERNELS")) or "choice" in _stored(
        cache_folder() / "kernels.json"
    ).get(_key(device, weight_type, fast), {})


def _trusted(
    engine_device: extension.Device, device: Device, weight_type: str, fast: bool
) -> list[str]:
    """The baseline kernel family, and every other one that passes its self-test on this device at
    first use, because drivers have had bugs: bit-identical to the baseline, or close to it where a
    kernel family sums in an order of its own. fast: the kernels that this precision uses are the
    ones tested.
    """
    from .device import _engine

    bench = _engine().Bench(engine_device)
    (number, baseline), *others = bench.families()
    bench.use(number, fast)
    trusted = [baseline]
    for number, family in others:
        # on software devices shared memory makes them ten times slower, so they are not compiled
        if device.type == "software" and family in ("tiled", "matrix"):
            continue
        reason = _crash(device, number, weight_type) if device.type == "software" else None
        try:
            if reason is None:
                bench.self_test(number, WEIGHT_TYPES[weight_type])
        except ValueError as error:
            reason = str(error)
        if reason is None:
            trusted.append(family)
        else:
            warnings.warn(
                f"{device.name}: the matrix kernels {family!r} failed their self-test and are not"
                f" used ({reason}); please report driver {device.driver}",
                stacklevel=4,
            )
    return trusted


def _crash(device: Device, number: int, weight_type: str) -> str | None:
    """Probe in a subprocess, because software drivers run kernels inside the process and a driver's
    bug would end it. None on success, else what happened.
    """
    if not sys.executable:
        return "no Python executable to try them in"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys; from vksteer.runtime import device; e = device._engine(); "
                "e.Bench(e.Device(int(sys.argv[1]))).self_test(int(sys.argv[2]), int(sys.argv[3]))"
            ),
            str(device.index),
            str(number),
            str(WEIGHT_TYPES[weight_type]),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    return (
        f"the trial process ended with {done.returncode}:"
        f" {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'}"
    )


def choose(
    engine: extension.Model,
    engine_device: extension.Device,
    device: Device,
    weight_type: str,
    fast: bool = False,
) -> str:
    """Sets the engine model's matrix kernels and returns their name. fast: products on matrix units
    are one product in float16. Raises ValueError for an unknown VKSTEER_KERNELS.
    """
    engine.fast = fast
    pinned = os.environ.get("VKSTEER_KERNELS")
    if pinned:
        if pinned not in engine.families:
            raise ValueError(
                f"VKSTEER_KERNELS={pinned!r}: this device offers {', '.join(engine.families)}"
            )
        engine.kernels = pinned
        return pinned
    path, key = cache_folder() / "kernels.json", _key(device, weight_type, fast)
    found: Any = _stored(path).get(key, {}).get("choice")
    if isinstance(found, str) and found in engine.families:
        engine.kernels = found
        return found
    # a GPU needs more work than a software device before its rate shows
    shape = (64, 512, 512) if device.type == "software" else (512, 2048, 2048)
    rates = {}
    for family in _trusted(engine_device, device, weight_type, fast):
        engine.kernels = family
        rates[family] = engine.measure_linear(*shape)[0]
    choice = max(rates, key=rates.__getitem__)
    engine.kernels = choice
    _store(
        path, key, {"choice": choice, "gflops": {k: round(v / 1e9, 2) for k, v in rates.items()}}
    )
    return choice


def _store(path: Path, key: str, entry: dict[str, Any]) -> None:
    # A folder that cannot be written to only costs a measurement at the next load.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        content = _stored(path) | {key: entry}
        write_whole(path, json.dumps(content, indent=1).encode())
