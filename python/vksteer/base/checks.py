"""Checks of arguments, with one message for each."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeGuard

import numpy as np


def is_int(value: Any) -> TypeGuard[int]:
    """Whether `value` is an int or a NumPy integer; booleans are not."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite real number of Python or NumPy; booleans are not."""
    kinds = (int, float, np.integer, np.floating)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, kinds):
        return False
    # also False for NaN, and for integers that no float can hold
    size: Any = abs(value)
    return bool(size <= sys.float_info.max)


def require_int(
    value: Any, what: str, least: int | None = None, *, error: type[Exception] = ValueError
) -> int:
    """`value` as an int.

    Raises `error` naming `what` for booleans, texts, numbers with a fraction, and
    numbers below `least`.
    """
    if is_int(value) and (least is None or value >= least):
        return int(value)
    bound = "" if least is None else f" from {least} on"
    raise error(f"{what} must be a whole number{bound}, not {value!r}")


def layer_list(layers: Any, n_layers: int) -> list[int]:
    """Layers of a call, ascending and without repetition: one, several, or None for all.

    Raises ValueError for none at all and for one that a model of n_layers does not have.
    """
    if layers is None:
        return list(range(n_layers))
    given = [layers] if is_int(layers) else list(layers)
    for l in given:
        if not is_int(l) or not 0 <= l < n_layers:
            raise ValueError(f"layers: {l!r} is no layer of this model (0 to {n_layers - 1})")
    if not given:
        raise ValueError("layers is empty: name at least one, or None for all")
    return sorted({int(l) for l in given})


def first_repeated(names: Iterable[str]) -> str | None:
    """The first name that has occurred before; None where all are different."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
