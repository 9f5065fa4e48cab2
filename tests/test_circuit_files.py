"""Circuits in files, in pictures and as networkx graphs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_circuits import SMALL, scored
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.graph import Graph
from vksteer.errors import ModelError
from vksteer.patching.edge_scores import EdgeScores

# -- files, pictures, other tools ------------------------------------------------------------------


def test_round_trip(tmp_path):
    c = Circuit(
        SMALL, range(0, SMALL.n_edges, 3), meta={"method": "pruned", "n": 12, "note": "Größe"}
    )
    for again in (Circuit(Graph(3, 4, 2, 1, parallel=True), range(9)), c, Circuit(SMALL)):
        again.save(tmp_path / "c.json")
        d = Circuit.load(tmp_path / "c.json", again.graph)
        assert d == again and d.meta == again.meta and d.curve is None
    assert [p.name for p in tmp_path.iterdir()] == ["c.json"]
    with pytest.raises(ValueError, match="another graph"):
        Circuit.load(tmp_path / "c.json", Graph(3, 4, 2, 0))
    with pytest.raises(ValueError, match="another graph"):
        Circuit.load(tmp_path / "c.json", Graph(3, 4, 2, 1, parallel=True))


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "c.json"
    Circuit(SMALL, range(9), meta={"method": "top"}).save(path)
    whole = path.read_text()
    for cut in range(0, len(whole) - 2, 37):
        path.write_text(whole[:cut])
        with pytest.raises(ModelError):
            Circuit.load(path)
    content = json.loads(whole)
    for change in (
        {"edges": content["edges"][:-1]},
        {"edges": content["edges"] * 2},
        {"graph": {**content["graph"], "n_heads": 2}},
        {"meta": {}},
        {"version": 2},
        {"format": "x"},
        {"checksum": "0" * 64},
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ModelError, match=r"checksum|version|format"):
            Circuit.load(path)
    # The checksum is right, but the content is invalid.
    from vksteer.base.provenance import digest

    for change in (
        {"edges": ["nothing"]},
        {"edges": ["steer->logits"] * 2},
        {"graph": {}},
        {"graph": {**content["graph"], "n_heads": 10**9}},
        {"graph": {**content["graph"], "n_kv_heads": 0}},
        {"graph": {**content["graph"], "parallel": "yes"}},
        {"graph": [3, 4, 2, 1]},
        {"curve": {"sizes": [1]}},
        {"meta": 3},
    ):
        made = {k: v for k, v in {**content, **change}.items() if k != "checksum"}
        path.write_text(json.dumps({**made, "checksum": digest(made)}))
        with pytest.raises(ModelError):
            Circuit.load(path)
    path.write_text(json.dumps(content))  # other white space is the same content
    assert len(Circuit.load(path)) == 9
    with pytest.raises(ModelError):
        Circuit.load(tmp_path / "none.json")


@settings(max_examples=30, deadline=None)
@given(scored(), st.floats(0.05, 0.6))
def test_networkx_has_the_paths_of_the_model(case, share):
    import networkx as nx

    g, scores = case
    kept = Circuit(g, np.abs(scores) >= np.quantile(np.abs(scores), 1 - share))
    out = kept.to_networkx()
    assert {data["name"] for *_, data in out.edges(data=True)} == kept.edge_names
    after, before = (
        {"steer", *nx.descendants(out, "steer")},
        {"logits", *nx.ancestors(out, "logits")},
    )
    on = {data["name"] for a, b, data in out.edges(data=True) if a in after and b in before}
    assert on == kept.pruned().edge_names
    if g.n_heads == g.n_kv_heads:
        assert out.number_of_edges() == len(kept)
    assert out.nodes["logits"]["kind"] == "logits" and all(
        d["kind"] in ("steer", "head", "mlp", "logits") for _, d in out.nodes(data=True)
    )


def test_networkx_expands_groups():
    out = Circuit(SMALL, ["m1->a2.h1<k>", "m1->a2.h1<q>", "a1.h0->m1"]).to_networkx()
    assert {(a, b, k) for a, b, k in out.edges(keys=True)} == {
        ("m1", "a2.h2", "k"),
        ("m1", "a2.h3", "k"),
        ("m1", "a2.h1", "q"),
        ("a1.h0", "m1", "mlp"),
    }
    assert (
        out.nodes["a2.h3"] == {"kind": "head", "layer": 2}
        and out.nodes["m1"]["layer"] == 1
        and out.graph["n_kv_heads"] == 2
    )


@pytest.mark.parametrize(
    "shape, n", [((3, 4, 2, 1), 30), ((1, 1, 1, 0), 2), ((28, 24, 8, 12), 700), ((3, 4, 2, 1), 0)]
)
def test_picture(tmp_path, rng, shape, n):
    scores = EdgeScores(Graph(*shape), rng.standard_normal(Graph(*shape).n_edges), n_positions=1)
    c = scores.circuit(n)
    figure = c.plot(tmp_path / "c.png", scores=scores)
    assert (tmp_path / "c.png").stat().st_size > 2000 and str(len(c)) in figure.axes[0].get_title()
    assert sum(
        len(x.get_segments()) for x in figure.axes[0].collections if x.get_zorder() == 1
    ) == len(c)
    c.plot(scores=np.zeros(scores.graph.n_edges))
    with pytest.raises(ValueError, match="graph"):
        c.plot(
            scores=EdgeScores(Graph(2, 2, 2, 0), np.zeros(Graph(2, 2, 2, 0).n_edges), n_positions=1)
        )
