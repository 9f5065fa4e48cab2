"""Rotation tables: the inverse frequencies of every rope scaling that released checkpoints of the
supported families use.

The formulas are those of transformers' `modeling_rope_utils.py`, in float64: transformers computes
them in float32, the engine rounds once at the end. Which two channels are
a pair is another fact (`rope_interleaved`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..base.types import Array, Float64Array
from ..errors import ModelError
from .ignored_keys import IGNORED_IN_ROPE, say_disputed, say_ignored


class RopeTable(NamedTuple):
    """One rotation table. A plain tuple to C."""

    # float64 [d_rot/2]: angle of channel pair i at position p is p * inv_freq[i]
    inv_freq: Float64Array
    attention_factor: float  # multiplies cos and sin (yarn and longrope; 1.0 otherwise)


#: rope type -> keys that it reads. A key that is set and not read would mean that the file and the
#: formula disagree: refused by name.
UNDERSTOOD: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "short_factor",
        "long_factor",
    ),
}

#: What other rope types read; transformers ignores it where the type does not.
UNREAD_FACTORS = frozenset(
    key for kind, keys in UNDERSTOOD.items() if kind != "longrope" for key in keys
)

REFUSED = {
    "su": "it is the older name of longrope",
    "mrope": "it rotates by image coordinates",
    "proportional": "no supported family uses it",
}


def rope_type(parameters: Mapping[str, Any]) -> Any:
    """The scaling's name, a str in a valid file; `type` is the older spelling of `rope_type`."""
    return parameters.get("rope_type") or parameters.get("type") or "default"


def table(
    parameters: Mapping[str, Any], *, d_rot: int, max_positions: int, default_theta: float
) -> RopeTable:
    """The table that a config's rope dictionary describes; of longrope, that of short texts.

    parameters: `rope_parameters` or `rope_scaling` with `rope_theta` merged in; d_rot: channels of
    a head that are rotated (an odd number counts as the next even one); max_positions:
    max_position_embeddings. Raises ModelError for a scaling that is not understood, a key without
    meaning for it, or a number out of range.
    """
    kind = rope_type(parameters)
    if not isinstance(kind, str) or kind not in UNDERSTOOD:
        why = f" ({REFUSED[kind]})" if isinstance(kind, str) and kind in REFUSED else ""
        raise ModelError(
            f"rope type {kind!r} is not supported{why}; supported: {', '.join(UNDERSTOOD)}"
        )
    _refuse_unread(kind, parameters)

    base = _number(parameters, "rope_theta", default_theta, low=1.0, strict=True)
    inv_freq = base ** -(np.arange(0, d_rot, 2, dtype=np.float64) / d_rot)
    if kind in ("default", "dynamic"):
        # dynamic: up to max_position_embeddings the base is scaled by exactly 1; Config limits
        # n_ctx to that length.
        return _frozen(inv_freq, 1.0)
    if kind == "yarn":
        return _yarn(parameters, inv_freq, base, d_rot, max_positions)
    if kind == "longrope":
        return _longrope(parameters, "short_factor", inv_freq, max_positions)
    factor = _number(parameters, "factor", None, low=0.0, strict=True)
    if kind == "linear":
        return _frozen(inv_freq / factor, 1.0)
    return _frozen(_llama3(parameters, inv_freq, factor, max_positions), 1.0)


def long_table(
    parameters: Mapping[str, Any], *, d_rot: int, max_positions: int, default_theta: float
) -> tuple[RopeTable, int]:
    """(the table of longrope for long texts, the longest text in tokens that it is not for).
    Arguments as in `table`, which has checked them.
    """
    base = _number(parameters, "rope_theta", default_theta, low=1.0, strict=True)
    inv_freq = base ** -(np.arange(0, d_rot, 2, dtype=np.float64) / d_rot)
    original = _number(parameters, "original_max_position_embeddings", max_positions, low=1.0)
    return _longrope(parameters, "long_factor", inv_freq, max_positions), int(original)


def context(parameters: Mapping[str, Any], max_positions: int) -> int:
    """The longest context in tokens: `max_positions` (max_position_embeddings), or the scaling's
    factor times the original length where that is longer.

    Recipes that add a scaling to a config.json leave max_position_embeddings at the original
    length, which is what transformers takes for the original length where none is written. The
    other types keep max_positions: "dynamic" changes every rotation beyond it.
    """
    kind = rope_type(parameters)
    if kind == "longrope" and parameters.get("factor") is None:
        return max_positions
    if kind not in ("linear", "yarn", "llama3", "longrope"):
        return max_positions
    original = _number(parameters, "original_max_position_embeddings", max_positions, low=1.0)
    factor = _number(parameters, "factor", max_positions / original, low=0.0, strict=True)
    return max(max_positions, int(min(factor * original, 1e12)))


def divided(rope: RopeTable, factors: Array) -> RopeTable:
    """GGUF's `rope_freqs.weight` (float32 [d_head/2]): each frequency is divided by its factor."""
    factors = np.asarray(factors, dtype=np.float64).reshape(-1)
    if (
        factors.shape != rope.inv_freq.shape
        or not np.isfinite(factors).all()
        or (factors <= 0).any()
    ):
        raise ModelError(
            f"tensor 'rope_freqs.weight': expected {rope.inv_freq.size} positive factors, got shape"
            f" {factors.shape} with smallest value {factors.min(initial=np.inf)}"
        )
    return _frozen(rope.inv_freq / factors, rope.attention_factor)


def _llama3(
    parameters: Mapping[str, Any], inv_freq: Float64Array, factor: float, max_positions: int
) -> Float64Array:
    low = _number(parameters, "low_freq_factor", None, low=0.0, strict=True)
    high = _number(parameters, "high_freq_factor", None, low=0.0, strict=True)
    original = _number(parameters, "original_max_position_embeddings", max_positions, low=1.0)
    if high <= low:
        raise ModelError(
            f"rope key 'high_freq_factor' = {high} must be larger than 'low_freq_factor' = {low}"
        )
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    return np.where(
        wavelength > original / low,
        inv_freq / factor,
        np.where(wavelength < original / high, inv_freq, between),
    )


def _yarn(
    parameters: Mapping[str, Any],
    inv_freq: Float64Array,
    base: float,
    d_rot: int,
    max_positions: int,
) -> RopeTable:
    original = _number(parameters, "original_max_position_embeddings", max_positions, low=1.0)
    factor = _number(parameters, "factor", max_positions / original, low=0.0, strict=True)
    beta_fast = _number(parameters, "beta_fast", 32.0, low=0.0) or 32.0
    beta_slow = _number(parameters, "beta_slow", 1.0, low=0.0) or 1.0
    mscale = _number(parameters, "mscale", 0.0)
    mscale_all = _number(parameters, "mscale_all_dim", 0.0)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    inferred = (
        magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    )
    attention_factor = _number(parameters, "attention_factor", inferred, low=0.0, strict=True)

    def correction(rotations: float) -> float:
        # the channel pair that makes this many turns within the original length
        return d_rot * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = correction(beta_fast), correction(beta_slow)
    truncate = parameters.get("truncate")
    if truncate is None or truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d_rot - 1)
    if low == high:
        high += 0.001  # transformers' guard against division by zero
    keep = 1 - np.clip((np.arange(inv_freq.size, dtype=np.float64) - low) / (high - low), 0, 1)
    return _frozen(inv_freq / factor * (1 - keep) + inv_freq * keep, attention_factor)


def _longrope(
    parameters: Mapping[str, Any], key: str, inv_freq: Float64Array, max_positions: int
) -> RopeTable:
    """Frequencies divided by a factor each, the list `key`."""
    original = _number(parameters, "original_max_position_embeddings", max_positions, low=1.0)
    factor = _number(parameters, "factor", max_positions / original, low=0.0, strict=True)
    inferred = 1.0
    if factor > 1.0 and original > 1.0:
        inferred = math.sqrt(1 + math.log(factor) / math.log(original))
    attention_factor = _number(parameters, "attention_factor", inferred, low=0.0, strict=True)
    factors = parameters.get(key)
    if (
        not isinstance(factors, list)
        or len(factors) != inv_freq.size
        or not all(_is_positive(v) for v in factors)
    ):
        got = f"a list of {len(factors)}" if isinstance(factors, list) else repr(factors)[:80]
        raise ModelError(
            f"rope key {key!r} must list {inv_freq.size} positive numbers, one for each rotated"
            f" pair of channels, got {got}"
        )
    return _frozen(inv_freq / np.asarray(factors, dtype=np.float64), attention_factor)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def _refuse_unread(kind: str, parameters: Mapping[str, Any]) -> None:
    read = (*UNDERSTOOD[kind], "rope_theta", "rope_type", "type")
    for key, value in parameters.items():
        if key in IGNORED_IN_ROPE or (key in UNREAD_FACTORS and key not in read):
            if value is not None:
                say_disputed(key)
            if key == "factor" and value not in (None, 1):
                say_ignored(key, f"rope type {kind!r}")
            continue
        neutral = value is None or value is False
        if key not in read and not neutral:
            raise ModelError(
                f"rope key {key!r} = {value!r} would change the numbers and is not understood for"
                f" rope type {kind!r}; give the entry that is meant with config_overrides="
                "{'rope_scaling': {...}}"
            )


def _number(
    parameters: Mapping[str, Any],
    key: str,
    default: float | None,
    *,
    low: float = -math.inf,
    strict: bool = False,
) -> float:
    """parameters[key] as a finite float above `low`; `default` where it is absent or null
    (None: it must be there).
    """
    value = parameters.get(key)
    if value is None:
        if default is None:
            raise ModelError(f"rope type {rope_type(parameters)!r} needs the key {key!r}")
        value = default
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not abs(value) <= 1e30  # also NaN, and integers that no float can hold
    ):
        raise ModelError(f"rope key {key!r} = {value!r} is not a finite number")
    if value < low or (strict and value <= low):
        raise ModelError(
            f"rope key {key!r} = {value!r} must be {'above' if strict else 'at least'} {low}"
        )
    return float(value)


def _frozen(inv_freq: Array, attention_factor: float) -> RopeTable:
    inv_freq = np.ascontiguousarray(inv_freq, dtype=np.float64)
    if not np.isfinite(inv_freq).all():
        raise ModelError("the rope parameters give frequencies that are not finite")
    inv_freq.flags.writeable = False
    return RopeTable(inv_freq, float(attention_factor))
