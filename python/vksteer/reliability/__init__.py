"""Will a steering vector work? Predictors from the activations alone, before anything is steered
(docs/reliability.md).
"""

from .screening import Screen, ScreenRow, screen
from .separation import predictors

__all__ = ["Screen", "ScreenRow", "predictors", "screen"]
