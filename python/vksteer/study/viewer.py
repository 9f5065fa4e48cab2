"""The viewer of a circuit: what it draws, and the viewer alone in a notebook's cell."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..circuits import search
from ..circuits.curve import FaithfulnessCurve
from ..circuits.graph import INPUT_KINDS
from ..patching.edge_scores import EdgeScores

#: Edges that the viewer holds of one circuit, and of all; the numbers left out are stated.
MOST_EDGES, MOST_IN_ALL = 10_000, 60_000
#: The scripts of the page, in their order.
SCRIPTS = ("elements", "circuits", "drawing", "tables", "exports", "viewer")


def page_file(name: str) -> str:
    """A file of the report's page."""
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")


def script(*names: str) -> str:
    """Scripts of the page as one, which leaves no names behind."""
    parts = "\n".join(page_file(f"{name}.js") for name in names)
    return f'(() => {{\n"use strict";\n{parts}}})();'


@dataclass(frozen=True)
class Shown:
    """One circuit of the viewer. name: in the address of a view. label: for the reader. curve:
    {"edges", "faithfulness"}, the measured sizes. file: of the scores, from the page's folder.
    halves: whether faithfulness was measured on samples that did not choose the circuits.
    other_vector: whether the tokens of value vectors are those of another vector.
    """

    name: str
    label: str
    scores: EdgeScores
    curve: Mapping[str, Any] = field(default_factory=dict)
    file: str = ""
    halves: bool = False
    other_vector: bool = False


def drawn(circuits: Sequence[Shown], tokens: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the viewer draws: circuits of one graph, at least one.

    Of each circuit: edges, [upstream, downstream, score, entry] each, sorted by entry: the circuit
    of size n is the edges whose entry is at most that of the n-th. tokens: what the value vectors
    of heads promote.
    """
    graph = circuits[0].scores.graph
    most = min(MOST_EDGES, MOST_IN_ALL // len(circuits))
    return {
        "layer": graph.layer,
        "layers": graph.n_layers,
        "heads": graph.n_heads,
        "groups": graph.n_kv_heads,
        "nodes": list(graph.node_names),
        "inputs": list(graph.input_names),
        "kinds": [INPUT_KINDS[k] for k in graph.input_kind],
        "total": graph.n_edges,
        "circuits": [_circuit(one, most) for one in circuits],
        "tokens": dict(tokens),
    }


def _circuit(shown: Shown, most: int) -> dict[str, Any]:
    """What the viewer draws of one circuit, its first `most` edges."""
    scores, graph = shown.scores, shown.scores.graph
    entry = search.entry_ranks(graph, search.ranking(scores.edges))
    order = np.argsort(entry, kind="stable")[:most]
    ends = graph.upstream[order].tolist(), graph.downstream[order].tolist()
    values = (_short(scores.edges[e]) for e in order)
    points = zip(shown.curve.get("edges", []), shown.curve.get("faithfulness", []), strict=True)
    return {
        "name": shown.name,
        "label": shown.label,
        "file": shown.file,
        "edges": [list(row) for row in zip(*ends, values, entry[order].tolist(), strict=True)],
        "left_out": graph.n_edges - len(order),
        "halves": shown.halves,
        "other_vector": shown.other_vector,
        "curve": [[int(n), float(f)] for n, f in points if f is not None],
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
        held = len(self._data["circuits"][0]["edges"])
        return f"CircuitView({held} of {self._data['total']} edges)"

    def to_html(self) -> str:
        """A page that loads nothing from elsewhere."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Circuit</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{page_file('report.css')}</style></head><body>"
            '<main><h1 class="hidden">Circuit</h1><h2 class="hidden">Nodes and edges</h2>'
            '<div id="viewer" class="viewer"></div></main>'
            f'<script type="application/json" id="circuit-data">{embedded(self._data)}</script>'
            f"<script>{script(*SCRIPTS)}</script></body></html>"
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
    scores: EdgeScores,
    curve: FaithfulnessCurve | None = None,
    *,
    others: Mapping[str, EdgeScores] | None = None,
    height: int = 700,
) -> CircuitView:
    """The viewer of the circuits of all sizes of `scores`, for a notebook's cell.

    scores: of `vs.patching.attribute`; the 10,000 edges that enter the circuit first are drawn.
    curve: of `vs.circuits.faithfulness_curve`, whose measured faithfulness stands beside the slider
    of sizes. others: scores of the same graph by name, to compare with: which edges are in only one
    of two circuits, which in both. height: of the cell in pixels. Raises ValueError for a curve or
    scores of another graph, a name "scores" or "" and a height below 200.
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
    halves = curve is not None and bool(curve.setting.get("halves"))
    shown = [Shown("scores", "scores", scores, measured, halves=halves)]
    for name, other in (others or {}).items():
        if other.graph != scores.graph:
            raise ValueError(
                f"others[{name!r}] is of another graph: {other.graph!r}; the scores are of"
                f" {scores.graph!r}"
            )
        if name in ("", "scores"):
            raise ValueError(f"others: {name!r} is taken or empty; give the scores another name")
        shown.append(Shown(name, name, other))
    return CircuitView(drawn(shown, {}), height)
