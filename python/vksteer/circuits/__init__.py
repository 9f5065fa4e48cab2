"""Circuits: sets of edges, how they are found, and how much of steering's effect they carry
(method.md section 5).
"""

from .circuit import METRICS, Circuit, evaluate, overlaps, random
from .faithfulness import FaithfulnessCurve, faithfulness_curve, minimum_faithful

__all__ = [
    "METRICS",
    "Circuit",
    "FaithfulnessCurve",
    "evaluate",
    "faithfulness_curve",
    "minimum_faithful",
    "overlaps",
    "random",
]
