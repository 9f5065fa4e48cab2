"""Circuits: how they are found, against searches that follow the definition word by word, and
their algebra as sets of edges.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_circuits import SHAPES, SMALL, scored
from test_graph import LLAMA, brute_force
from vksteer import circuits
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.graph import Graph, graph
from vksteer.circuits.search import (
    METHODS,
    Growth,
    entry_ranks,
    greedy_order,
    random_order,
    ranking,
)
from vksteer.patching.edge_scores import EdgeScores


def by_definition(g, order, n):
    """The shortest prefix of `order` that has at least n edges after pruning, pruned by a path
    search over names.
    """
    kept = np.zeros(g.n_edges, bool)
    for edge in [None, *order]:
        if edge is not None:
            kept[edge] = True
        rest = brute_force(g, kept)
        if len(rest) >= n:
            return rest
    raise AssertionError(f"no prefix leaves {n} edges on paths")


def greedy_by_definition(g, scores, backward):
    """All edges in the order in which they are added: of those that touch the circuit, the one of
    largest |score|, ties by graph order.
    """

    def feeds(name):
        if "<" not in name:
            return {name}
        layer, rest = name[1:].split(".h")
        i, kind, size = int(rest.split("<")[0]), rest.split("<")[1][0], g.n_heads // g.n_kv_heads
        return {f"a{layer}.h{h}" for h in ([i] if kind == "q" else range(i * size, (i + 1) * size))}

    ends = [name.split("->") for name in g.edge_names]
    nodes, left, order = {"logits" if backward else "steer"}, set(range(g.n_edges)), []
    while left:
        touching = [
            i for i in left if (feeds(ends[i][1]) & nodes if backward else ends[i][0] in nodes)
        ]
        best = min(touching, key=lambda i: (-abs(scores[i]), i))
        left.remove(best)
        order.append(best)
        nodes |= {ends[best][0]} if backward else feeds(ends[best][1])
    return order


# -- search ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(scored())
def test_entries_say_which_prefix_has_an_edge_on_a_path(case):
    g, scores = case
    order = ranking(scores)
    entries = entry_ranks(g, order)
    kept = np.zeros(g.n_edges, bool)
    for k, edge in enumerate(order):
        kept[edge] = True
        np.testing.assert_array_equal(g.on_paths(kept), entries <= k)


@settings(max_examples=25, deadline=None)
@given(scored(SHAPES[:4]), st.floats(0, 1))
def test_pruned_circuit_is_the_shortest_prefix(case, share):
    g, scores = case
    n = round(share * g.n_edges)
    found = EdgeScores(g, scores, n_positions=1).circuit(n)
    assert found.edge_names == by_definition(
        g, sorted(range(g.n_edges), key=lambda i: (-abs(scores[i]), i)), n
    )
    assert len(found) >= n and found.pruned() == found


@settings(max_examples=25, deadline=None)
@given(scored(SHAPES[:5]), st.booleans(), st.floats(0, 1))
def test_greedy_circuits_follow_the_definition(case, backward, share):
    g, scores = case
    order = greedy_by_definition(g, scores, backward)
    np.testing.assert_array_equal(greedy_order(g, ranking(scores), backward), order)
    n = round(share * g.n_edges)
    found = EdgeScores(g, scores, n_positions=1).circuit(
        n, "greedy_backward" if backward else "greedy_forward"
    )
    kept = np.zeros(g.n_edges, bool)
    for k in range(g.n_edges + 1):
        kept[order[:k]] = True
        if g.on_paths(kept).sum() >= n:
            break
    np.testing.assert_array_equal(found.edges, np.flatnonzero(g.on_paths(kept)))


def test_ties_go_by_graph_order():
    scores = EdgeScores(SMALL, np.ones(SMALL.n_edges), n_positions=1)
    assert scores.circuit(7, "top").edges.tolist() == list(range(7))
    signs = EdgeScores(SMALL, np.tile([1.0, -1.0], SMALL.n_edges // 2), n_positions=1)
    assert signs.circuit(7, "top").edges.tolist() == list(range(7)) and signs.circuit(
        9
    ) == scores.circuit(9)
    # The order of the graph puts steer->logits last among the edges of steer.
    last = int(SMALL.find(["steer->logits"])[0])
    assert scores.circuit(1).edges.tolist() == [last]


@pytest.mark.parametrize("method", METHODS)
def test_sizes_at_the_ends(method):
    scores = EdgeScores(SMALL, np.arange(SMALL.n_edges), n_positions=1)
    assert (
        len(scores.circuit(0, method)) == 0
        and len(scores.circuit(SMALL.n_edges, method)) == SMALL.n_edges
    )
    for n, says in ((SMALL.n_edges + 1, "more than"), (-1, "-1"), (2.5, "2.5"), (True, "True")):
        with pytest.raises(ValueError, match=says):
            scores.circuit(n, method)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"greedy_backward.*'best'"):
        EdgeScores(SMALL, np.zeros(SMALL.n_edges), n_positions=1).circuit(3, "best")


@pytest.mark.parametrize("n", [0, 1, 20, 60])
def test_random_circuits(n):
    c = circuits.random(SMALL, n, 5)
    assert c == circuits.random(SMALL, n, 5) and (n == 0 or c != circuits.random(SMALL, n, 6))
    assert c.edge_names == by_definition(SMALL, random_order(SMALL, 5), n) and len(c) >= n
    assert Growth(SMALL, random_order(SMALL, 5)).edges(n).tolist() == c.edges.tolist()
    with pytest.raises(ValueError, match="more than"):
        circuits.random(SMALL, SMALL.n_edges + 1, 0)


def test_large_graphs_are_fast():
    """Circuits of the graph of Llama 3.2 3B (124,441 edges). Measured: 0.05 s for the first pruned
    circuit, 0.2 s for a greedy one; bound for all twelve: 10 s.
    """
    g = graph(LLAMA, 12)
    scores = EdgeScores(g, np.random.default_rng(0).standard_normal(g.n_edges), n_positions=1)
    start = time.perf_counter()
    sizes = [len(scores.circuit(n, method)) for method in METHODS for n in (1000, 13500, 60000)]
    assert time.perf_counter() - start < 10 and all(
        size >= n for size, n in zip(sizes, [1000, 13500, 60000] * 4)
    )


# -- a circuit as a set ----------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, SMALL.n_edges - 1)), st.sets(st.integers(0, SMALL.n_edges - 1)))
def test_algebra_is_that_of_sets(a, b):
    x, y = Circuit(SMALL, a), Circuit(SMALL, b)
    names = lambda some: {SMALL.edge_names[i] for i in some}
    assert (
        x.edge_names == names(a)
        and len(x) == len(a)
        and list(x) == [SMALL.edge_names[i] for i in sorted(a)]
    )
    for mine, theirs in (
        (x & y, a & b),
        (x | y, a | b),
        (x - y, a - b),
        (x ^ y, a ^ b),
        (x.complement(), set(range(SMALL.n_edges)) - a),
    ):
        assert mine.edge_names == names(theirs) and mine.mask.sum() == len(theirs)
    assert (
        (x == y) == (a == b)
        and (x <= y) == (a <= b)
        and (x >= y) == (a >= b)
        and (hash(x) == hash(y) or a != b)
    )
    assert all(
        (i in x) == (i in a) and x.contains(SMALL.edge_names[i]) == (i in a)
        for i in range(SMALL.n_edges)
    ) and x.contains(x & y)
    if a and b:
        assert x.overlap(y) == y.overlap(x) == len(a & b) / min(len(a), len(b))


def test_made_from_names_numbers_or_a_mask():
    names = {"steer->a1.h3<q>", "a1.h3->m2", "m2->logits"}
    c = Circuit(SMALL, names)
    assert (
        c
        == Circuit(SMALL, c.edges[::-1])
        == Circuit(SMALL, c.mask)
        == Circuit(SMALL, [*names, *names])
        and c.edge_names == names
    )
    assert (
        c.node_names == ("steer", "a1.h3", "m2")
        and Circuit(SMALL).edges.dtype == np.int64
        and "3 of" in repr(c)
    )
    with pytest.raises(ValueError):
        c.edges[0] = 5
    assert c.counts() == dict(q=1, k=0, v=0, mlp=1, logits=1) and sum(
        c.distribution().values()
    ) == pytest.approx(1)
    assert not any(Circuit(SMALL).distribution().values())
    whole = Circuit(SMALL, np.ones(SMALL.n_edges, bool))
    assert whole.counts() == SMALL.incoming and len(whole.complement()) == 0


@pytest.mark.parametrize(
    "edges, error, says",
    [
        (["a9.h0->logits"], KeyError, "a9.h0"),
        ([SMALL.n_edges], ValueError, str(SMALL.n_edges)),
        ([-1], ValueError, "-1"),
        ([0.5], ValueError, "float64"),
        (np.ones(3, bool), ValueError, "mask"),
        ("steer->logits", ValueError, "steer->logits"),
        (7, ValueError, "7"),
        (Circuit(SMALL), ValueError, "circuit"),
    ],
)
def test_bad_edges_are_refused(edges, error, says):
    with pytest.raises(error, match=says):
        Circuit(SMALL, edges)


def test_another_graph_is_refused():
    a, b = Circuit(SMALL, [0]), Circuit(Graph(3, 4, 2, 0), [0])
    for operation in (
        lambda: a & b,
        lambda: a | b,
        lambda: a - b,
        lambda: a ^ b,
        lambda: a <= b,
        lambda: a.overlap(b),
    ):
        with pytest.raises(ValueError, match="different graphs"):
            operation()
    assert a != b
    with pytest.raises(ValueError, match="empty"):
        a.overlap(Circuit(SMALL))
    with pytest.raises(TypeError):
        a | {0}
    assert "| a | 1 | 1.00 | - |" in circuits.overlaps({"a": a, "b": b})
