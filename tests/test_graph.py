"""The circuit graph: the counts that the paper gives, names, order, and pruning against a
brute-force path search.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from vksteer.circuits.graph import Graph, graph

GEMMA = SimpleNamespace(n_layers=26, n_heads=8, n_kv_heads=4)
LLAMA = SimpleNamespace(n_layers=28, n_heads=24, n_kv_heads=8)


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


@pytest.mark.parametrize("shape", [(2, 2, 1, 0), (3, 4, 2, 1), (4, 3, 3, 0), (5, 6, 2, 2)])
def test_pruning_is_the_brute_force_search(shape):
    g = Graph(*shape)
    rng = np.random.default_rng(0)
    kept_some = 0
    for share in (0.02, 0.05, 0.1, 0.2, 0.5, 1.0):
        for _ in range(12):
            kept = rng.random(g.n_edges) < share
            got = {g.edge_names[i] for i in np.flatnonzero(g.on_paths(kept))}
            assert got == brute_force(g, kept)
            kept_some += bool(got)
    assert kept_some > 20
