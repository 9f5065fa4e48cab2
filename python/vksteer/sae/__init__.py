"""Sparse autoencoders (SAEs): reading them, the features of a text, and steering by target atoms
(docs/target-atoms.md).
"""

from .atoms import Selection, select, target_atoms
from .autoencoder import SAE
from .files import load
from .strongest import Features, features

__all__ = ["SAE", "Features", "Selection", "features", "load", "select", "target_atoms"]
