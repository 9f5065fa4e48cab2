"""Multi-token patching (method.md sections 4 and 5): the front door of graphs, samples,
scores and exact patches.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..circuits.graph import Graph, graph

#: Where a public name lives; resolved on first access.
_LAZY = {
    "Sample": "..inputs.samples",
    "Samples": "..inputs.samples",
    "make_samples": "..inputs.samples",
    "EdgeScores": ".edge_scores",
    "attribute": ".attribution",
    "exact": ".exact_patching",
    "plan": ".memory_plan",
    "Plan": ".memory_plan",
    "agreement": ".rank_agreement",
    "Agreement": ".rank_agreement",
}

if TYPE_CHECKING:
    from ..inputs.samples import Sample, Samples, make_samples
    from .attribution import attribute
    from .edge_scores import EdgeScores
    from .exact_patching import exact
    from .memory_plan import Plan, plan
    from .rank_agreement import Agreement, agreement

__all__ = ["Graph", "graph", *_LAZY]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module 'vksteer.patching' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __package__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
