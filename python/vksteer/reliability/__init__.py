"""Will a steering vector work? Predictors from the activations alone, before anything is steered,
and curves of what it does (docs/reliability.md).
"""

from .choices import Choice, steerability
from .curves import BiasShares, Curves, Transfer
from .letters import LetterBias, LetterChoices, letter_choices
from .screening import Screen, ScreenRow, screen
from .separation import predictors
from .similarity import Cosines, cosines, cosines_of_prompts

__all__ = [
    "BiasShares",
    "Choice",
    "Cosines",
    "Curves",
    "LetterBias",
    "LetterChoices",
    "Screen",
    "ScreenRow",
    "Transfer",
    "cosines",
    "cosines_of_prompts",
    "letter_choices",
    "predictors",
    "screen",
    "steerability",
]
