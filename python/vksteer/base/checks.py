"""Checks of arguments that every module makes in the same words."""

from __future__ import annotations

import numpy as np


def require_int(value, what: str, least: int | None = None) -> int:
    """`value` as an int.

    Raises ValueError naming `what` for booleans, texts, numbers with a fraction, and
    numbers below `least`.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, (bool, np.bool_))
    if whole and (least is None or value >= least):
        return int(value)
    bound = "" if least is None else f" from {least} on"
    raise ValueError(f"{what} must be a whole number{bound}, not {value!r}")
