"""Edge scores in files (cut short, edited, hostile), and their export to EAP-IG against a reader
written from its schema.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_scores import SMALL, E, N, make, same
from vksteer import patching
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.graph import Graph
from vksteer.errors import ModelError
from vksteer.inputs.vectors import SteeringVector
from vksteer.patching.edge_scores import EdgeScores

# -- files -----------------------------------------------------------------------------------------


def test_round_trip(tmp_path, rng):
    path = tmp_path / "scores.safetensors"
    bare = EdgeScores(SMALL, rng.standard_normal(E), n_positions=3)
    one = make(
        rng, dims=rng.standard_normal((1, 6)), positions=None, sample_edges=None, sample_nodes=None
    )
    parallel = make(rng, Graph(3, 4, 2, 1, parallel=True))
    empty = make(rng, positions=[rng.standard_normal((E, 0))] * 3)
    for s in (parallel, make(rng), bare, one, empty):
        s.save(path)
        same(EdgeScores.load(str(path)), s)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="another graph"):
        EdgeScores.load(path, SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=4))
    from safetensors.numpy import load_file  # another reader of the format

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


GRAPH = '{"n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "layer": 1}'
FACTS = {
    "format": "vksteer.edge_scores",
    "version": "1",
    "graph": GRAPH,
    "n_positions": "3",
    "has_positions": "0",
    "settings": "{}",
    "provenance": "{}",
}


@st.composite
def contents(draw):
    """(facts, arrays) of a file, in which anything may be wrong."""
    arrays = {"edges": np.zeros(draw(st.sampled_from([E, E - 1, 0])))}
    if draw(st.booleans()):
        names = ["nodes", "weights", "dims", "positions.1", "sample_edges"]
        others = [np.zeros(3), np.zeros((2, E)), np.zeros(3, np.int64), np.full(N, np.nan)]
        others.append(np.zeros((1, 4), np.float32))
        arrays[draw(st.sampled_from(names))] = draw(st.sampled_from(others))
    graphs = [GRAPH, "[]", GRAPH.replace('"n_kv_heads": 2', '"n_kv_heads": 0'), "{"]
    changes = {
        "graph": draw(st.sampled_from(graphs)),
        "n_positions": draw(st.sampled_from(["3", "x", "-1"])),
        "has_positions": draw(st.sampled_from(["0", "1"])),
        "settings": draw(st.sampled_from(["{}", "3", "nul"])),
    }
    return FACTS | changes, arrays


def write_with_checksum(path, facts, arrays):
    from safetensors.numpy import save

    from vksteer.patching.edge_score_files import _checksum

    path.write_bytes(save(arrays, metadata={**facts, "checksum": _checksum(facts, arrays)}))


@settings(max_examples=40, deadline=None)
@given(contents())
def test_right_checksum_wrong_content(tmp_path_factory, content):
    """A file made by somebody who knows the checksum is still checked against the graph."""
    facts, arrays = content
    path = tmp_path_factory.mktemp("hostile") / "s"
    write_with_checksum(path, facts, arrays)
    plain = {**facts, "has_positions": "0"} == FACTS and len(arrays["edges"]) == E
    if not plain:
        with pytest.raises(ModelError):
            EdgeScores.load(path)
        return
    if len(arrays) == 1 and facts["has_positions"] == "0":
        s = EdgeScores.load(path)
        assert s.graph == SMALL and s.n_positions == 3
        return
    try:  # the other array or the missing positions decide
        s = EdgeScores.load(path)
    except ModelError:
        return
    given = [x for x in (s.edges, s.nodes, s.dims, s.sample_edges) if x is not None]
    assert s.graph == SMALL and s.n_positions == 3 and all(np.isfinite(x).all() for x in given)


def test_right_checksum_right_content(tmp_path):
    """The same writer with nothing wrong: the refusals above have the reason they state."""
    arrays = {"edges": np.arange(E, dtype=np.float64)}
    write_with_checksum(tmp_path / "s", FACTS, arrays)
    s = EdgeScores.load(tmp_path / "s")
    assert s.graph == SMALL and s.n_positions == 3 and np.array_equal(s.edges, arrays["edges"])


# -- EAP-IG ----------------------------------------------------------------------------------------


def eap_ig_edges(cfg):
    """(edge names, node names) of EAP-IG's graph, from its schema: a source reaches q, k and v of
    every later head, later MLPs and logits. With `parallel_attn_mlp` the heads of a layer come
    after its MLP's input.
    """
    names, stream = [], ["input"]
    for l in range(cfg["n_layers"]):
        heads = [f"a{l}.h{h}" for h in range(cfg["n_heads"])]
        names += [f"{s}->{h}<{x}>" for s in stream for h in heads for x in "qkv"]
        after_heads = stream + heads
        names += [f"{s}->m{l}" for s in (stream if cfg["parallel_attn_mlp"] else after_heads)]
        stream = after_heads + [f"m{l}"]
    return set(names + [f"{s}->logits" for s in stream]), set(stream + ["logits"])


@pytest.mark.parametrize(
    "shape",
    [
        (3, 4, 2, 1),
        (3, 4, 2, 0),
        (2, 3, 3, 0),
        (2, 4, 1, 1),
        (3, 4, 2, 0, True),
        (2, 3, 3, 1, True),
    ],
)
def test_export_round_trip(tmp_path, rng, shape):
    g = Graph(*shape)
    s = make(rng, g)
    c = s.circuit(g.n_edges // 3)
    s.to_eap_ig_json(tmp_path / "g.json", c)
    content = json.loads((tmp_path / "g.json").read_text())
    assert content["cfg"] == {
        "n_layers": shape[0],
        "n_heads": shape[1],
        "parallel_attn_mlp": len(shape) > 4,
        "d_model": 6,
    }
    edges, nodes = eap_ig_edges(content["cfg"])
    assert set(content["edges"]) <= edges and set(content["nodes"]) <= nodes
    if shape[3] == 0:
        assert set(content["edges"]) == edges and set(content["nodes"]) == nodes
    size = g.n_heads // g.n_kv_heads

    def ours(name):  # the edge of Graph that EAP-IG calls `name`
        source, to = name.replace("input", "steer").split("->")
        if "<" in to and to[-2] in "kv":
            layer, head = to[1:].split("<")[0].split(".h")
            to = f"a{layer}.h{int(head) // size}<{to[-2]}>"
        return f"{source}->{to}"

    found = {}
    for name, edge in content["edges"].items():
        assert set(edge) == {"score", "in_graph"}
        assert found.setdefault(ours(name), edge) == edge  # equal for all heads of a group
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
    # Split into equal parts, the scores keep their sum.
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
        _ = patching.nothing
