"""Will a steering vector work? Predictors from the activations alone, before anything is steered,
and curves of what it does (docs/reliability.md).
"""

from .choices import Choice, steerability
from .curves import BiasShares, Curves, Transfer
from .screening import Screen, ScreenRow, screen
from .separation import predictors

__all__ = [
    "BiasShares",
    "Choice",
    "Curves",
    "Screen",
    "ScreenRow",
    "Transfer",
    "predictors",
    "screen",
    "steerability",
]
