"""Activation scaling: learned factors of single activations that turn the model from one answer to
another and back (docs/activation-scaling.md).
"""

from .objective import first_order, loss
from .scalings import Scaling
from .training import train

__all__ = ["Scaling", "first_order", "loss", "train"]
