"""Prompts: the bundled toy world, files, and data sets of the hub."""

from .prompt_files import STUDY, load, tiny, tiny_pair

__all__ = ["STUDY", "load", "tiny", "tiny_pair"]
