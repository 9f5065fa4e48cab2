"""Scores: what is refused, tables, files (cut short, edited, hostile), merging, and the export to
EAP-IG against a reader written from its schema.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vksteer import patching
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.graph import Graph
from vksteer.errors import ModelError
from vksteer.inputs.vectors import SteeringVector
from vksteer.patching.edge_scores import EdgeScores, combine, score_provenance

SMALL = Graph(3, 4, 2, 1)
E, N = SMALL.n_edges, SMALL.n_upstream
WEIGHTS = [3, 0, 5]


def make(rng, graph=SMALL, weights=WEIGHTS, **more):
    """Scores with everything in them."""
    n, e = len(weights), graph.n_edges
    sample_edges, sample_nodes = (
        rng.standard_normal((n, e)),
        rng.standard_normal((n, graph.n_upstream)),
    )
    options = dict(
        weights=weights,
        dims=rng.standard_normal((graph.n_upstream, 6)),
        sample_edges=sample_edges,
        sample_nodes=sample_nodes,
        positions=[rng.standard_normal((e, s)).astype(np.float32) for s in range(4, 4 + n)],
        settings={"metric": "logit_diff", "steps": 10, "at": "pre_norm", "samples_hash": "s"},
        provenance={
            "model": "m",
            "model_hash": "ab",
            "vector_hash": "v",
            "layer": 1,
            "coefficient": -1.0,
            "d_model": 6,
        },
    )
    return EdgeScores(
        graph, combine(sample_edges, weights), combine(sample_nodes, weights), **{**options, **more}
    )


def same(a, b):
    assert (
        a.graph == b.graph
        and a.n_positions == b.n_positions
        and dict(a.settings) == dict(b.settings)
        and dict(a.provenance) == dict(b.provenance)
    )
    for name in ("edges", "nodes", "dims", "weights", "sample_edges", "sample_nodes"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert (a.positions is None) == (b.positions is None)
    for x, y in zip(a.positions or (), b.positions or ()):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


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
    """The same scores without what of_samples cannot know."""
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
    with pytest.raises(ValueError, match="another model.*m, ab"):
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


# -- files -----------------------------------------------------------------------------------------


def test_round_trip(tmp_path, rng):
    path = tmp_path / "scores.safetensors"
    bare = EdgeScores(SMALL, rng.standard_normal(E), n_positions=3)
    one = make(
        rng, dims=rng.standard_normal((1, 6)), positions=None, sample_edges=None, sample_nodes=None
    )
    for s in (make(rng), bare, one, make(rng, positions=[rng.standard_normal((E, 0))] * 3)):
        s.save(path)
        same(EdgeScores.load(str(path)), s)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="another graph"):
        EdgeScores.load(path, SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=4))
    from safetensors.numpy import load_file  # others read it, too

    np.testing.assert_array_equal(load_file(path)["edges"], make_edges(path))


def make_edges(path):
    return EdgeScores.load(path).edges


def test_a_file_cut_short_is_refused(tmp_path, rng):
    path = tmp_path / "s"
    make(rng).save(path)
    data = path.read_bytes()
    for cut in [*range(0, 200, 7), *rng.integers(200, len(data), 60).tolist(), len(data) - 1]:
        path.write_bytes(data[:cut])
        with pytest.raises(ModelError):
            EdgeScores.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ModelError):
        EdgeScores.load(path)
    path.write_bytes(data)
    EdgeScores.load(path)


def test_an_edited_file_is_refused(tmp_path, rng):
    path = tmp_path / "s"
    make(rng).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    changed = 0
    for at in [*range(8, 8 + length, 11), *rng.integers(8 + length, len(data), 80).tolist()]:
        edited = bytearray(data)
        edited[at] ^= 1 << int(rng.integers(0, 7))
        path.write_bytes(edited)
        with pytest.raises(ModelError):
            EdgeScores.load(path)
        changed += 1
    assert changed > 100
    for old, new in (
        (b"-1.0", b"-2.0"),
        (b"pre_norm", b"pre_nurm"),
        (b'"n_positions":"8"', b'"n_positions":"9"'),
    ):
        assert old in data
        path.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ModelError, match="checksum"):
            EdgeScores.load(path)


def test_files_of_others_are_refused(tmp_path, rng):
    from safetensors.numpy import save

    path = tmp_path / "s"
    SteeringVector(np.ones(6), 1).save(tmp_path / "v.safetensors")
    for data in (
        (tmp_path / "v.safetensors").read_bytes(),
        save({"edges": np.zeros(3)}),
        b"PK\3\4" + b"\0" * 50,
        b"",
    ):
        path.write_bytes(data)
        with pytest.raises(ModelError):
            EdgeScores.load(path)
    with pytest.raises(ModelError):
        EdgeScores.load(tmp_path / "none")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_right_checksum_wrong_content(tmp_path_factory, data):
    """A file made by somebody who knows the checksum: still checked against the graph."""
    from safetensors.numpy import save

    from vksteer.patching.edge_score_files import _checksum

    arrays = {"edges": np.zeros(data.draw(st.sampled_from([E, E - 1, 0])))}
    if data.draw(st.booleans()):
        arrays[
            data.draw(st.sampled_from(["nodes", "weights", "dims", "positions.1", "sample_edges"]))
        ] = data.draw(
            st.sampled_from(
                [
                    np.zeros(3),
                    np.zeros((2, E)),
                    np.zeros(3, np.int64),
                    np.full(N, np.nan),
                    np.zeros((1, 4), np.float32),
                ]
            )
        )
    facts = {
        "format": "vksteer.edge_scores",
        "version": "1",
        "graph": data.draw(
            st.sampled_from(
                [
                    '{"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "layer": 1}',
                    "[]",
                    '{"n_layers": 3, "n_heads": 4, "n_kv_heads": 0, "layer": 1}',
                    "{",
                ]
            )
        ),
        "n_positions": data.draw(st.sampled_from(["3", "x", "-1"])),
        "has_positions": data.draw(st.sampled_from(["0", "1"])),
        "settings": data.draw(st.sampled_from(["{}", "3", "nul"])),
        "provenance": "{}",
    }
    facts["checksum"] = _checksum(facts, arrays)
    path = tmp_path_factory.mktemp("hostile") / "s"
    path.write_bytes(save(arrays, metadata=facts))
    plain = (
        len(arrays["edges"]) == E
        and "n_heads" in facts["graph"]
        and '"n_kv_heads": 2' in facts["graph"]
        and facts["n_positions"] == "3"
        and facts["settings"] == "{}"
    )
    if not plain:
        with pytest.raises(ModelError):
            EdgeScores.load(path)
        return
    if len(arrays) == 1 and facts["has_positions"] == "0":
        s = EdgeScores.load(path)
        assert s.graph == SMALL and s.n_positions == 3
        return
    try:  # what the other array is decides
        s = EdgeScores.load(path)
    except ModelError:
        return
    assert (
        s.graph == SMALL
        and s.n_positions == 3
        and all(
            np.isfinite(x).all()
            for x in (s.edges, s.nodes, s.dims, s.sample_edges)
            if x is not None
        )
    )


def test_right_checksum_right_content(tmp_path):
    """The same way of writing, with nothing wrong: it is what is wrong above that is refused."""
    from safetensors.numpy import save

    from vksteer.patching.edge_score_files import _checksum

    facts = {
        "format": "vksteer.edge_scores",
        "version": "1",
        "graph": '{"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "layer": 1}',
        "n_positions": "3",
        "has_positions": "0",
        "settings": "{}",
        "provenance": "{}",
    }
    arrays = {"edges": np.arange(E, dtype=np.float64)}
    (tmp_path / "s").write_bytes(
        save(arrays, metadata={**facts, "checksum": _checksum(facts, arrays)})
    )
    s = EdgeScores.load(tmp_path / "s")
    assert s.graph == SMALL and s.n_positions == 3 and np.array_equal(s.edges, arrays["edges"])


# -- EAP-IG ----------------------------------------------------------------------------------------


def eap_ig_edges(cfg):
    """All edge names of EAP-IG's graph of a sequential model, from its schema: a source reaches q,
    k and v of every later head, MLPs and logits.
    """
    names, stream = [], ["input"]
    for l in range(cfg["n_layers"]):
        heads = [f"a{l}.h{h}" for h in range(cfg["n_heads"])]
        names += [f"{s}->{h}<{x}>" for s in stream for h in heads for x in "qkv"]
        stream = stream + heads
        names += [f"{s}->m{l}" for s in stream]
        stream = stream + [f"m{l}"]
    return set(names + [f"{s}->logits" for s in stream]), set(stream + ["logits"])


@pytest.mark.parametrize("shape", [(3, 4, 2, 1), (3, 4, 2, 0), (2, 3, 3, 0), (2, 4, 1, 1)])
def test_export_round_trip(tmp_path, rng, shape):
    g = Graph(*shape)
    s = make(rng, g)
    c = s.circuit(g.n_edges // 3)
    s.to_eap_ig_json(tmp_path / "g.json", c)
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["cfg"] == {
        "n_layers": shape[0],
        "n_heads": shape[1],
        "parallel_attn_mlp": False,
        "d_model": 6,
    }
    edges, nodes = eap_ig_edges(content["cfg"])
    assert set(content["edges"]) <= edges and set(content["nodes"]) <= nodes
    if shape[3] == 0:
        assert set(content["edges"]) == edges and set(content["nodes"]) == nodes
    size = g.n_heads // g.n_kv_heads

    def ours(name):  # back to our edge
        source, to = name.replace("input", "steer").split("->")
        if "<" in to and to[-2] in "kv":
            layer, head = to[1:].split("<")[0].split(".h")
            to = f"a{layer}.h{int(head) // size}<{to[-2]}>"
        return f"{source}->{to}"

    found = {}
    for name, edge in content["edges"].items():
        assert set(edge) == {"score", "in_graph"}
        assert found.setdefault(ours(name), edge) == edge  # all heads of a group say the same
    assert {name: edge["score"] for name, edge in found.items()} == dict(zip(g.edge_names, s.edges))
    assert {name for name, edge in found.items() if edge["in_graph"]} == c.edge_names
    assert all(
        content["nodes"][name.replace("steer", "input")]["score"] == x
        for name, x in zip(g.node_names, s.nodes)
    )
    assert {name for name, node in content["nodes"].items() if node["in_graph"]} == {
        "input",
        "logits",
    } | {n for n in c.node_names if n != "steer"}
    assert content["vksteer"]["graph"]["n_kv_heads"] == shape[2]
    # Equal parts keep the sum.
    s.to_eap_ig_json(tmp_path / "g.json", shared="split")
    content = json.loads((tmp_path / "g.json").read_text())
    assert sum(e["score"] for e in content["edges"].values()) == pytest.approx(
        s.edges.sum()
    ) and not any(e["in_graph"] for e in content["edges"].values())


def test_export_refuses(tmp_path, rng):
    s = make(rng)
    for options, says in (
        (dict(circuit=Circuit(Graph(3, 4, 4, 1))), "another graph"),
        (dict(shared="both"), "shared"),
    ):
        with pytest.raises(ValueError, match=says):
            s.to_eap_ig_json(tmp_path / "g.json", **options)
    bare = EdgeScores(SMALL, s.edges, n_positions=1)
    with pytest.raises(ValueError, match="d_model"):
        bare.to_eap_ig_json(tmp_path / "g.json")
    bare.to_eap_ig_json(tmp_path / "g.json", d_model=8)
    assert json.loads((tmp_path / "g.json").read_text())["cfg"]["d_model"] == 8


def test_networkx(rng):
    s = make(rng)
    out = s.to_networkx()
    assert {data["name"]: data["score"] for *_, data in out.edges(data=True)} == dict(
        zip(s.edge_names, s.edges)
    ) and out.number_of_nodes() == N + 1


def test_front_door():
    assert patching.EdgeScores is EdgeScores and {
        "attribute",
        "exact",
        "plan",
        "agreement",
        "make_samples",
        "Sample",
    } <= set(dir(patching))
    with pytest.raises(AttributeError, match="nothing"):
        patching.nothing
