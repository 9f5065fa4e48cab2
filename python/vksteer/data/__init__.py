"""Prompts: the bundled toy world, files, and data sets of the hub."""

from .prompt_files import ENDINGS, PROMPT_COLUMNS, STUDY, load, tiny, tiny_pair

__all__ = ["ENDINGS", "PROMPT_COLUMNS", "STUDY", "load", "tiny", "tiny_pair"]
