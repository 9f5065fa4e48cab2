"""What results show in a notebook: HTML that parses, is escaped, and loads nothing."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest

import vksteer as vs
from vksteer.base.display import Table, html_of_markdown, html_table
from vksteer.circuits.graph import Graph
from vksteer.patching.edge_scores import EdgeScores


class Reader(HTMLParser):
    """Checks that tags close in order; collects cells and attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.cells, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1] += data


def shown(result):
    """The cells of what a notebook shows of a result."""
    reader = Reader(result._repr_html_())
    assert not [value for name, value in reader.attributes if name in ("src", "href")]
    return reader.cells


def graph_and_scores():
    graph = Graph(4, 4, 2, 1)
    edges = np.random.default_rng(0).standard_normal(graph.n_edges)
    return graph, EdgeScores(graph, edges, n_positions=3, settings={}, provenance={})


def test_tables():
    assert Reader(html_table(("a", "b"), [(1, "<b>&")])).cells == ["a", "b", "1", "<b>&"]
    text = "Layer 3 & <more>.\n\n| x | y |\n|:--|--:|\n| 1 | a \\| b |\n\nEnd"
    assert html_of_markdown(text).startswith("<p>Layer 3 &amp; &lt;more&gt;.</p><table>")
    assert Reader(html_of_markdown(text)).cells == ["x", "y", "1", "a | b"]
    assert html_of_markdown(text).endswith("<p>End</p>")


def test_every_table_shows_itself():
    """Every result with a table in Markdown is a Table or has a display of its own."""
    for module in (vs.freezing, vs.steering, vs.sparsify, vs.circuits, vs.ov, vs.reliability):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and hasattr(value, "to_markdown"):
                assert hasattr(value, "_repr_html_"), name
    with pytest.raises(NotImplementedError):
        Table()._repr_html_()


def test_vectors_scores_circuits_and_plans():
    vector = vs.SteeringVector(np.ones(8), 3, method="dim", meta={"model": "<evil>"})
    cells = shown(vector)
    assert "<evil>" in cells and f"{np.sqrt(8):.4g}" in cells
    _, scores = graph_and_scores()
    best = scores.top(1)[0]
    assert best.name in shown(scores) and best.name in shown(scores.top(3))
    circuit = scores.circuit(5)
    cells = shown(circuit)
    assert cells[:6] == ["edges that end in", "q", "k", "v", "mlp", "logits"]
    total = sum(float(cell.split()[0]) for cell in cells[7:])
    assert total == pytest.approx(100, abs=0.3)  # each is rounded to a tenth
    config = vs.Config.from_pretrained("tiny-llama-chat")
    assert Reader(vs.patching.plan(config, 5, 40)._repr_html_()).open == []


def test_generations():
    made = vs.Generation("a <b> c", np.arange(3, dtype=np.int32), "stop", np.arange(5))
    assert shown(made) == ["5 prompt tokens, 3 new ones, ended by itself", "a <b> c"]


def test_the_viewer_in_a_cell(tmp_path):
    graph, scores = graph_and_scores()
    view = vs.study.view(scores, height=500)
    html = view._repr_html_()
    reader = Reader(html)
    attributes = dict(reader.attributes)
    assert attributes["height"] == "500" and attributes["srcdoc"] == view.to_html()
    assert "src=" not in view.to_html() and "http://www.w3.org/2000/svg" in view.to_html()
    view.save(tmp_path / "circuit.html")
    assert (tmp_path / "circuit.html").read_text() == view.to_html()
    assert repr(view) == f"CircuitView({graph.n_edges} of {graph.n_edges} edges)"
    with pytest.raises(ValueError, match="height"):
        vs.study.view(scores, height=10)
