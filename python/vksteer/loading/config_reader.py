"""Typed reads of a config.json's dictionary; errors name the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import ModelError
from .checkpoint_kinds import QUANTISATION_KEYS, quantised
from .families import ACTIVATIONS, ROPE_KEYS
from .family_type import Family
from .harmless_keys import HARMLESS
from .ignored_keys import IGNORED, IGNORED_IN_ALL, say_disputed


class Reader:
    """Typed reads of a config's dictionary. Keys are the usual ones, which the family may call
    otherwise; defaults are from the family's row.
    """

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.family, self.defaults = family, family.defaults
        self.config = _without_aliases(config, family)

    def name(self, key: str) -> str:
        """What the family calls the key."""
        return self.family.aliases.get(key) or self.family.keys.get(key, key)

    def raw(self, key: str) -> Any:
        # a key that the family does not have is ignored, even where another family reads it
        key = self.name(key)
        return self.config.get(key, self.defaults[key]) if key in self.defaults else None

    def optional_integer(self, key: str, limit: int) -> int | None:
        value = self.raw(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ModelError(
                f"config key {self.name(key)!r} = {short(value)} must be an integer from 1 to"
                f" {limit}"
            )
        return value

    def integer(self, key: str, limit: int) -> int:
        value = self.optional_integer(key, limit)
        if value is None:
            raise ModelError(
                f"config key {self.name(key)!r} must be an integer from 1 to {limit}, not null"
            )
        return value

    def number(self, key: str, low: float) -> float:
        value = self.raw(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < 1e9:
            raise ModelError(
                f"config key {self.name(key)!r} = {short(value)} must be a number above {low}"
            )
        return float(value)

    def optional_number(self, key: str, otherwise: float) -> float:
        """A positive number; `otherwise` where it is null or the family does not have the key."""
        return otherwise if self.raw(key) is None else self.number(key, low=0.0)

    def flag(self, key: str) -> bool:
        value = self.raw(key)
        if value not in (None, True, False):
            raise ModelError(
                f"config key {self.name(key)!r} = {short(value)} must be true or false"
            )
        return bool(value)

    def fact(self, fact: str | bool) -> bool:
        """A fact of a family's row that may be the name of a key."""
        return self.flag(fact) if isinstance(fact, str) else fact

    def activation(self, key: str) -> str:
        value = self.raw(key) or self.defaults[key]
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise ModelError(
                f"config key {key!r} = {short(value)} is not a supported activation; supported:"
                f" {', '.join(ACTIVATIONS)}"
            )
        return self.family.activations.get(value, ACTIVATIONS[value])

    def refuse_unknown(self) -> None:
        """ModelError for a key that is neither read nor known to have no influence, and for a value
        that the family's row does not support.
        """
        allowed = frozenset(self.defaults)
        if self.family.positions == "rotary" and "rotary_dim" not in allowed:
            allowed |= ROPE_KEYS
        refuse_unknown(self.config, self.family, allowed)


def _without_aliases(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The config with the family's own names of keys."""
    found = dict(config)
    for alias, key in family.aliases.items():
        if alias not in found:
            continue
        value = found.pop(alias)
        if found.setdefault(key, value) != value:
            raise ModelError(
                f"config keys {alias!r} = {short(value)} and {key!r} = {short(found[key])} are two"
                " names of the same number"
            )
    return found


def refuse_unknown(config: Mapping[str, Any], family: Family, allowed: frozenset[str]) -> None:
    """Raises ModelError for a key that would change the numbers and is not read."""
    ignored = IGNORED_IN_ALL | IGNORED.get(family.model_type, frozenset())
    for key, value in config.items():
        if key in family.only:
            _refuse_unsupported(key, value, family)
            continue
        neutral = value is None or value is False
        if key == "is_causal":
            neutral = value in (None, True)
        if key == "partial_rotary_factor" and family.partial is None:
            neutral = value in (None, 1)
            allowed = allowed - {key}
        if neutral or key in allowed or key in HARMLESS:
            continue
        if key in ignored:
            say_disputed(key)
            continue
        if key in QUANTISATION_KEYS:
            raise ModelError(f"config key {key!r}: {quantised(key, value)}")
        raise ModelError(
            f"config key {key!r} = {short(value)} would change the numbers and is not understood"
            f" for {family.model_type}; if it has no influence, leave it out with"
            f" config_overrides={{{key!r}: None}}"
        )


def _refuse_unsupported(key: str, value: Any, family: Family) -> None:
    supported, missing = family.only[key]
    if isinstance(supported, bool) and value not in (None, True, False):
        raise ModelError(f"config key {key!r} = {short(value)} must be true or false")
    if (bool(value) if isinstance(supported, bool) else value) != supported:
        raise ModelError(
            f"config key {key!r} = {short(value)} would change the numbers and is not understood"
            f" for {family.model_type}: {missing} is not supported"
        )


def short(value: Any) -> str:
    """A value as text for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
