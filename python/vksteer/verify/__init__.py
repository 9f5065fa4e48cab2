"""`vksteer verify`: every operation of the engine against its float64 reference implementation."""

from .checking import table, verify

__all__ = ["table", "verify"]
