"""The command `vksteer`."""

from .commands import main

__all__ = ["main"]
