"""Edge scores: what is refused, tables, merging."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from made_scores import SMALL, WEIGHTS, E, N, make, same
from vksteer.circuits.graph import Graph
from vksteer.inputs.vectors import SteeringVector
from vksteer.patching.edge_scores import EdgeScores, score_provenance

# -- the object ------------------------------------------------------------------------------------


def test_fields(rng):
    s = make(rng)
    assert (
        s.edges.dtype == np.float64 == s.nodes.dtype
        and s.dims.dtype == np.float32
        and s.n_positions == 8
        and len(s.positions) == 3
    )
    assert (
        s.edge_names == SMALL.edge_names
        and s.node_names == SMALL.node_names
        and len(s.edge_names) == E
        and len(s.node_names) == N
    )
    assert (
        s["a1.h3->m2"] == s.edges[SMALL.find(["a1.h3->m2"])[0]]
        and s["m1"] == s.nodes[s.node_names.index("m1")]
    )
    with pytest.raises(KeyError, match="m7"):
        s["m7"]
    with pytest.raises(ValueError):
        s.edges[0] = 1
    text = repr(s)
    assert (
        "\n" not in text
        and "2 samples" in text
        and "8 metric positions" in text
        and "metric=logit_diff" in text
    )
    assert EdgeScores(SMALL, np.zeros(E), n_positions=0).top(0) == []


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(edges=np.zeros(E - 1)), "edges"),
        (dict(edges=np.full(E, np.nan)), r"edges.*finite.*\(0,\)"),
        (dict(nodes=np.zeros(N + 1)), "nodes"),
        (dict(dims=np.zeros((2, 6))), "dims"),
        (dict(dims=np.zeros(6)), "dims"),
        (dict(weights=[1, -1, 8]), "weights"),
        (dict(weights=[1.5]), "weights"),
        (dict(n_positions=7), "8.*7"),
        (dict(n_positions=-1, weights=None), "n_positions"),
        (dict(sample_edges=np.zeros((2, E))), "sample_edges"),
        (dict(sample_nodes=np.zeros((3, N - 1))), "sample_nodes"),
        (dict(positions=[np.zeros((E, 2))]), "1 samples.*3"),
        (dict(positions=[np.zeros(E)] * 3), "positions"),
        (dict(positions=[np.full((E, 2), np.inf)] * 3), "finite"),
        (dict(settings={"f": print}), "JSON"),
        (dict(provenance=3), "JSON"),
    ],
)
def test_bad_contents_are_refused(change, says):
    arguments = dict(graph=SMALL, edges=np.zeros(E), nodes=np.zeros(N), weights=WEIGHTS) | change
    with pytest.raises(ValueError, match=says):
        EdgeScores(**arguments)


def test_needs_a_number_of_positions():
    with pytest.raises(ValueError, match="n_positions"):
        EdgeScores(SMALL, np.zeros(E))
    with pytest.raises(ValueError, match="weights"):
        EdgeScores(SMALL, np.zeros(E), n_positions=3, sample_edges=np.zeros((2, E)))


def test_tables(rng):
    s = make(rng)
    order = sorted(range(E), key=lambda i: (-abs(s.edges[i]), i))
    top = s.top(5)
    assert [(e.rank, e.name, e.score) for e in top] == [
        (r, SMALL.edge_names[i], s.edges[i]) for r, i in enumerate(order[:5], 1)
    ]
    assert (
        sum(e.share for e in s.top(E)) == pytest.approx(1)
        and repr(top).count("\n") == 6
        and top[0].name in repr(top)
    )
    assert s.top_nodes(1)[0].name == s.node_names[int(np.abs(s.nodes).argmax())]
    kinds = [n.split("->")[1] for n in (SMALL.edge_names[i] for i in order[:20])]
    kind = lambda n: n[-2] if n.endswith(">") else "mlp" if n.startswith("m") else "logits"
    assert s.distribution(20) == {
        k: [kind(n) for n in kinds].count(k) / 20 for k in ("q", "k", "v", "mlp", "logits")
    }
    assert sum(s.by_type().values()) == pytest.approx(np.abs(s.edges).sum())
    table = s.matrix()
    assert (
        np.isfinite(table).sum() == E
        and table[0, -1] == s["steer->logits"]
        and np.isnan(table[-1, 0])
    )
    with pytest.raises(ValueError, match="nodes"):
        EdgeScores(SMALL, s.edges, n_positions=1).top_nodes()


def test_circuit_knows_where_it_comes_from(rng):
    c = make(rng).circuit(12)
    assert (
        c.meta["method"] == "pruned"
        and c.meta["n"] == 12
        and c.meta["model_hash"] == "ab"
        and c.meta["coefficient"] == -1
        and c.meta["metric"] == "logit_diff"
    )


# -- together and apart ----------------------------------------------------------------------------


def test_of_samples(rng):
    s = make(rng, weights=[3, 1, 5, 2])
    part = s.of_samples([2, 0])
    np.testing.assert_allclose(part.edges, (5 * s.sample_edges[2] + 3 * s.sample_edges[0]) / 8)
    np.testing.assert_allclose(part.nodes, (5 * s.sample_nodes[2] + 3 * s.sample_nodes[0]) / 8)
    assert (
        part.weights.tolist() == [5, 3]
        and part.n_positions == 8
        and part.positions[0] is not None
        and part.dims is None
        and "samples_hash" not in part.settings
    )
    same(s.of_samples(range(4)), make_like(s))
    for bad, says in (([], "samples"), ([4], "0 to 3"), ([-1], "-1"), ([0.5], "0.5")):
        with pytest.raises(ValueError, match=says):
            s.of_samples(bad)
    with pytest.raises(ValueError, match="metric position"):
        make(rng).of_samples([1])
    with pytest.raises(ValueError, match="per_sample"):
        EdgeScores(SMALL, s.edges, n_positions=1).of_samples([0])


def make_like(s):
    """The same scores without what of_samples drops."""
    settings = {k: v for k, v in s.settings.items() if k != "samples_hash"}
    return EdgeScores(
        s.graph,
        s.edges,
        s.nodes,
        weights=s.weights,
        sample_edges=s.sample_edges,
        sample_nodes=s.sample_nodes,
        positions=s.positions,
        settings=settings,
        provenance=s.provenance,
    )


def test_merge_is_the_whole(rng):
    s = make(rng, weights=[3, 1, 5, 2], dims=None)
    parts = [s.of_samples([0, 1]), s.of_samples([2, 3])]
    whole = EdgeScores.merge(parts)
    np.testing.assert_allclose(whole.edges, s.edges, atol=1e-15)
    np.testing.assert_array_equal(whole.sample_edges, s.sample_edges)
    assert (
        whole.n_positions == 11
        and whole.weights.tolist() == [3, 1, 5, 2]
        and len(whole.positions) == 4
    )
    without = EdgeScores.merge(
        [
            parts[0],
            EdgeScores(
                SMALL,
                parts[1].edges,
                n_positions=7,
                settings=parts[1].settings,
                provenance=parts[1].provenance,
            ),
        ]
    )
    np.testing.assert_allclose(without.edges, s.edges, atol=1e-15)
    assert (
        without.sample_edges is None
        and without.nodes is None
        and without.weights is None
        and without.n_positions == 11
    )
    with pytest.raises(ValueError, match="empty"):
        EdgeScores.merge([])


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(provenance={"model_hash": "cd"}), "model_hash is ab"),
        (dict(provenance={"vector_hash": "w"}), "vector_hash"),
        (dict(provenance={"coefficient": 1.0}), "coefficient"),
        (dict(settings={"steps": 5}), "steps is 10"),
        (dict(settings={"metric": "kl"}), "metric"),
        (dict(graph=Graph(3, 4, 4, 1)), "different graphs"),
    ],
)
def test_scores_of_something_else_are_not_merged(rng, change, says):
    a = make(rng)
    settings, provenance, graph = (
        {**a.settings, **change.get("settings", {})},
        {**a.provenance, **change.get("provenance", {})},
        change.get("graph", SMALL),
    )
    b = EdgeScores(
        graph, np.zeros(graph.n_edges), n_positions=4, settings=settings, provenance=provenance
    )
    with pytest.raises(ValueError, match=says):
        EdgeScores.merge([a, b])
    EdgeScores.merge([a, make(rng, settings={**a.settings, "samples_hash": "other"})])


def test_check(rng):
    s, config = make(rng), SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=2)
    s.check(config)
    s.check(SimpleNamespace(config=config, fingerprint="ab"), layer=1)
    with pytest.raises(ValueError, match=r"another model.*m, ab"):
        s.check(SimpleNamespace(config=config, fingerprint="cd"))
    with pytest.raises(ValueError, match="another graph"):
        s.check(config, layer=2)
    with pytest.raises(ValueError, match="another graph"):
        s.check(SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=4))
    with pytest.raises(ValueError, match="another steering vector"):
        s.check(config, vector=SteeringVector(np.ones(6), 1))


def test_provenance_names_model_and_vector():
    model = SimpleNamespace(
        config=SimpleNamespace(d_model=6, model_type="llama"),
        name="m",
        fingerprint="ab",
        kernels="tiled",
        device=SimpleNamespace(name="GPU"),
    )
    v = SteeringVector(np.ones(6), 2, method="dim")
    p = score_provenance(model, v, np.float32(-1.5))
    assert (
        p["model_hash"] == "ab"
        and p["kernels"] == "tiled"
        and p["layer"] == 2
        and p["coefficient"] == -1.5
        and p["d_model"] == 6
        and p["device"] == "GPU"
        and p["versions"]["vksteer"]
    )
    json.dumps(p)
