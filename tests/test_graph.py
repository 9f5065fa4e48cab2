"""The circuit graph: the counts that the paper gives, names, order, and pruning against a
brute-force path search.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vksteer.circuits.graph import Graph, graph, graph_facts, graph_from_facts

GEMMA = SimpleNamespace(n_layers=26, n_heads=8, n_kv_heads=4)
LLAMA = SimpleNamespace(n_layers=28, n_heads=24, n_kv_heads=8)
PYTHIA = SimpleNamespace(n_layers=12, n_heads=12, n_kv_heads=12, parallel=True)
GPT2 = SimpleNamespace(n_layers=12, n_heads=12, n_kv_heads=12, parallel=False)
OLMO2 = SimpleNamespace(n_layers=16, n_heads=16, n_kv_heads=16, parallel=False)


@pytest.mark.parametrize(
    "config, layer, total, counts, incoming",
    [
        (
            GEMMA,
            15,
            8790,
            dict(steer=188, mlp=946, head=7656),
            dict(q=4048, k=2024, v=2024, mlp=594, logits=100),
        ),
        (
            LLAMA,
            12,
            124441,
            dict(steer=657, mlp=4936, head=118848),
            dict(q=72384, k=24128, v=24128, mlp=3400, logits=401),
        ),
        # Pythia-160m, GPT-2 small, OLMo 2 1B. By hand, with n layers of H heads: an input of layer
        # i (from 0) is the end of 1 + i (H + 1) edges, of H more at the MLP of a sequential layer.
        (
            PYTHIA,
            6,
            7516,
            dict(steer=223, mlp=561, head=6732),
            dict(q=2412, k=2412, v=2412, mlp=201, logits=79),
        ),
        (
            GPT2,
            6,
            7588,
            dict(steer=223, mlp=561, head=6804),
            dict(q=2412, k=2412, v=2412, mlp=273, logits=79),
        ),
        (
            OLMO2,
            8,
            23981,
            dict(steer=393, mlp=1380, head=22208),
            dict(q=7744, k=7744, v=7744, mlp=612, logits=137),
        ),
    ],
)
def test_exact_counts(config, layer, total, counts, incoming):
    g = graph(config, layer)
    assert len(g) == total == sum(counts.values()) == sum(incoming.values())
    assert g.counts == counts and g.incoming == incoming


def test_names_and_order():
    g = Graph(3, 4, 2, 1)
    names = g.edge_names
    assert len(names) == len(set(names)) == g.n_edges
    assert names[:4] == ("steer->a1.h0<q>", "steer->a1.h1<q>", "steer->a1.h2<q>", "steer->a1.h3<q>")
    assert names[4:9] == (
        "steer->a1.h0<k>",
        "steer->a1.h1<k>",
        "steer->a1.h0<v>",
        "steer->a1.h1<v>",
        "steer->m1",
    )
    assert (
        names[-1] == "m2->logits"
        and "a1.h0->m1" in names
        and "a1.h0->a1.h1<q>" not in names
        and "m1->m1" not in names
    )
    assert "m1->a2.h0<q>" in names and "a2.h3->m2" in names
    for i in (0, 7, 30, g.n_edges - 1):
        assert names[i] == f"{g.node_names[g.upstream[i]]}->{g.input_names[g.downstream[i]]}"
        assert g.edge(g.upstream[i], g.downstream[i]) == i and g.find([names[i]])[0] == i
    with pytest.raises(KeyError, match="a9"):
        g.find(["a9.h0->logits"])
    with pytest.raises(ValueError):
        g.edge(g.n_upstream - 1, 0)


def test_a_head_of_a_parallel_layer_does_not_reach_its_own_mlp():
    """All else is the sequential graph, in the same order."""
    sequential, parallel = Graph(3, 4, 2, 1), Graph(3, 4, 2, 1, parallel=True)
    own = {f"a{l}.h{h}->m{l}" for l in (1, 2) for h in range(4)}
    assert own < set(sequential.edge_names)
    assert list(parallel.edge_names) == [e for e in sequential.edge_names if e not in own]
    assert parallel.node_names == sequential.node_names
    assert parallel.input_names == sequential.input_names
    assert {"a1.h0->m2", "a1.h0->a2.h0<v>", "a2.h3->logits"} < set(parallel.edge_names)
    for i, name in enumerate(parallel.edge_names):
        up, down = parallel.upstream[i], parallel.downstream[i]
        assert parallel.edge(up, down) == i == parallel.find([name])[0]
    m1 = parallel.input_names.index("m1")
    with pytest.raises(ValueError, match="does not reach"):
        parallel.edge(parallel.node_names.index("a1.h0"), m1)
    with pytest.raises(KeyError, match=r"a1\.h0->m1"):
        parallel.find(["a1.h0->m1"])
    assert parallel != sequential and hash(parallel) != hash(sequential)
    assert "parallel" in repr(parallel) and "parallel" not in repr(sequential)


def test_facts_in_files():
    """Those of a sequential graph are the four sizes of earlier versions."""
    for g in (Graph(3, 4, 2, 1), Graph(3, 4, 2, 1, parallel=True)):
        assert graph_from_facts(graph_facts(g)) == g
    assert graph_facts(Graph(3, 4, 2, 1)) == dict(n_layers=3, n_heads=4, n_kv_heads=2, layer=1)
    sizes = graph_facts(Graph(3, 4, 2, 1))
    for change in ({"parallel": 1}, {"parallel": None}, {"layer": True}, {"n_heads": 10**9}):
        with pytest.raises(ValueError):
            graph_from_facts({**sizes, **change})
    with pytest.raises(KeyError, match="layer"):
        graph_from_facts({k: v for k, v in sizes.items() if k != "layer"})


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_outside_are_refused(layer):
    with pytest.raises(ValueError, match="steering layer"):
        Graph(3, 4, 2, layer)


def brute_force(g, kept):
    """The edges on paths by a search over names that shares no code with the implementation."""
    edges = [g.edge_names[i].split("->") for i in np.flatnonzero(kept)]

    def leads_to(name):  # upstream nodes that an input feeds
        if name.startswith("m") or name == "logits":
            return [name]
        layer, rest = name[1:].split(".h")
        head, kind = int(rest.split("<")[0]), rest.split("<")[1][0]
        size = g.n_heads // g.n_kv_heads
        return [
            f"a{layer}.h{h}"
            for h in ([head] if kind == "q" else range(head * size, (head + 1) * size))
        ]

    def reach(start, step):
        seen, stack = set(), [start]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += step(node)
        return seen

    forward = reach("steer", lambda n: [x for a, b in edges if a == n for x in leads_to(b)])
    backward = {"logits"}
    grown = True
    while grown:
        new = {a for a, b in edges if any(x in backward for x in leads_to(b))} - backward
        grown = bool(new)
        backward |= new
    return {
        f"{a}->{b}" for a, b in edges if a in forward and any(x in backward for x in leads_to(b))
    }


@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("shape", [(2, 2, 1, 0), (3, 4, 2, 1), (4, 3, 3, 0), (5, 6, 2, 2)])
def test_pruning_is_the_brute_force_search(shape, parallel):
    g = Graph(*shape, parallel)
    rng = np.random.default_rng(0)
    kept_some = 0
    for share in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        for _ in range(12):
            kept = rng.random(g.n_edges) < share
            got = {g.edge_names[i] for i in np.flatnonzero(g.on_paths(kept))}
            assert got == brute_force(g, kept)
            kept_some += bool(got)
    assert kept_some > 20
