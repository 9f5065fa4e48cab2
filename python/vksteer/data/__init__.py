"""Prompts from the bundled toy world, from files, and from data sets of the Hugging Face hub."""

from .prompt_files import load, tiny, tiny_pair
from .prompt_sets import STUDY, PromptSet

__all__ = ["STUDY", "PromptSet", "load", "tiny", "tiny_pair"]
