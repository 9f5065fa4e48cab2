"""Circuits: sets of edges, how they are found, and how much of the effect of steering they carry
(docs/method.md section 5).
"""

from .circuit import METRICS, Circuit, evaluate, overlaps, random
from .curve import FaithfulnessCurve
from .faithfulness import faithfulness_curve, minimum_faithful

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
