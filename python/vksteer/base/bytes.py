"""Numbers of bytes as texts, both ways."""

from __future__ import annotations

import re

from .checks import require_int

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}


def memory_bytes(value: object, what: str = "max_memory") -> int | None:
    """A number of bytes from a number or a text such as "6GiB", "500 MB" or "1.5G"; None stays
    None. Raises ValueError naming `what` for anything else, and for 0.
    """
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
        if not match or match[2].lower() not in _UNITS:
            raise ValueError(
                f"{what}={value!r}: use a number of bytes, or a text such as '6GiB' or '500MB'"
            )
        value = int(float(match[1]) * _UNITS[match[2].lower()])
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return require_int(value, what, 1)


def size_text(n: float) -> str:
    """Bytes with a unit and one decimal: "1.5 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.1f} {name}"
    return f"{n:.0f} B"
