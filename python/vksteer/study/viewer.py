"""The viewer of a circuit: what it draws, and the viewer alone in a notebook's cell."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..circuits import search
from ..circuits.curve import FaithfulnessCurve
from ..circuits.graph import INPUT_KINDS
from ..patching.edge_scores import EdgeScores

#: Edges that the viewer holds; the number left out is stated.
MOST_EDGES = 10_000


def page_file(name: str) -> str:
    """A file of the report's page."""
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def drawn(
    scores: EdgeScores,
    curve: Mapping[str, Any],
    tokens: Mapping[str, list[str]],
    data: str = "",
) -> dict[str, Any]:
    """What the viewer draws.

    edges: [upstream, downstream, score, entry] each, sorted by entry, at most MOST_EDGES: the
    circuit of size n is the edges whose entry is at most that of the n-th. curve: {"edges",
    "faithfulness"}, the measured sizes. tokens: what the value vectors of heads promote.
    """
    graph = scores.graph
    entry = search.entry_ranks(graph, search.ranking(scores.edges))
    order = np.argsort(entry, kind="stable")[:MOST_EDGES]
    measured = zip(curve.get("edges", []), curve.get("faithfulness", []), strict=True)
    return {
        "layer": graph.layer,
        "layers": graph.n_layers,
        "heads": graph.n_heads,
        "groups": graph.n_kv_heads,
        "nodes": list(graph.node_names),
        "inputs": list(graph.input_names),
        "kinds": [INPUT_KINDS[k] for k in graph.input_kind],
        "edges": [
            [
                int(graph.upstream[e]),
                int(graph.downstream[e]),
                _short(scores.edges[e]),
                int(entry[e]),
            ]
            for e in order
        ],
        "total": graph.n_edges,
        "left_out": graph.n_edges - len(order),
        "curve": [[int(n), float(f)] for n, f in measured if f is not None],
        "tokens": dict(tokens),
        "data": data,
    }


def _short(value: float) -> float:
    """Four digits are enough to draw and to read."""
    return float(f"{value:.4g}")


def embedded(content: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


class CircuitView:
    """The viewer of a circuit; a notebook shows it in the cell, `save` writes it as a page."""

    def __init__(self, data: Mapping[str, Any], height: int) -> None:
        self._data, self.height = data, height

    def __repr__(self) -> str:
        return f"CircuitView({len(self._data['edges'])} of {self._data['total']} edges)"

    def to_html(self) -> str:
        """A page that loads nothing from elsewhere."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Circuit</title>'
            f"<style>{page_file('report.css')}</style></head><body>"
            '<main><div id="viewer" class="viewer"></div></main>'
            f'<script type="application/json" id="circuit-data">{embedded(self._data)}</script>'
            f"<script>{page_file('viewer.js')}</script></body></html>"
        )

    def save(self, path: Any) -> None:
        """Writes the page to a file."""
        from ..base.whole_files import write_whole

        write_whole(path, self.to_html().encode())

    def _repr_html_(self) -> str:
        page = escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="circuit" width="100%" height="{self.height}"'
            ' style="border:0"></iframe>'
        )


def view(
    scores: EdgeScores, curve: FaithfulnessCurve | None = None, *, height: int = 700
) -> CircuitView:
    """The viewer of the circuits of all sizes of `scores`, for a notebook's cell.

    scores: of `vs.patching.attribute`; the 10,000 edges that enter the circuit first are drawn.
    curve: of `vs.circuits.faithfulness_curve`, whose measured faithfulness stands beside the slider
    of sizes. height: of the cell in pixels. Raises ValueError for a curve of another graph and a
    height below 200.
    """
    require_int(height, "height", 200)
    measured: dict[str, Any] = {}
    if curve is not None:
        if curve.n_edges != scores.graph.n_edges:
            raise ValueError(
                f"the curve is of a graph of {curve.n_edges} edges, the scores are of"
                f" {scores.graph.n_edges}"
            )
        measured = {"edges": curve.edges.tolist(), "faithfulness": curve.faithfulness.tolist()}
    return CircuitView(drawn(scores, measured, {}), height)
