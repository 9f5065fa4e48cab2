"""Prompts from the bundled toy world, from files, and from data sets of the Hugging Face hub."""

from .prompt_files import STUDY, load, tiny, tiny_pair

__all__ = ["STUDY", "load", "tiny", "tiny_pair"]
