"""Multi-token patching: graphs, samples, scores, exact patches (docs/method.md sections 4, 5)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..circuits.graph import Graph, graph

#: Where a public name lives; resolved on first access.
_LAZY = {
    "Sample": "..inputs.samples",
    "Samples": "..inputs.samples",
    "make_samples": "..inputs.samples",
    "EdgeScores": ".edge_scores",
    "attribute": ".attribution",
    "exact": ".exact_patching",
    "heatmap": ".activation_patching",
    "Heatmap": ".activation_patching",
    "path": ".path_patching",
    "plan": ".memory_plan",
    "Plan": ".memory_plan",
    "agreement": ".rank_agreement",
    "Agreement": ".rank_agreement",
}

if TYPE_CHECKING:
    from ..inputs.samples import Sample, Samples, make_samples
    from .activation_patching import Heatmap, heatmap
    from .attribution import attribute
    from .edge_scores import EdgeScores
    from .exact_patching import exact
    from .memory_plan import Plan, plan
    from .path_patching import path
    from .rank_agreement import Agreement, agreement

__all__ = [
    "Agreement",
    "EdgeScores",
    "Graph",
    "Heatmap",
    "Plan",
    "Sample",
    "Samples",
    "agreement",
    "attribute",
    "exact",
    "graph",
    "heatmap",
    "make_samples",
    "path",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vksteer.patching' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __package__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
