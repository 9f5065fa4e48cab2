"""The command line program `vksteer`."""

from .commands import main

__all__ = ["main"]
