"""How circuits are found: from an order of the edges to the smallest beginning of it that still has
n edges once it is pruned (method.md section 5).

Every method but plain "top" is an order of all edges, of which the shortest prefix is taken whose
pruned rest has at least n edges. Which prefix first has an edge on a path from steer to logits
follows from one pass over the graph (`entry_ranks`): the best path through an edge is the one whose
latest edge comes earliest. With these numbers the circuit of any size is a comparison.
"""

from __future__ import annotations

import heapq

import numpy as np

from ..base.checks import require_int
from .graph import Graph

METHODS = ("pruned", "top", "greedy_backward", "greedy_forward")


def check_size(graph: Graph, n, what: str = "n") -> int:
    """N as an int from 0 to the number of edges; ValueError naming `what` otherwise."""
    n = require_int(n, what, 0)
    if n > graph.n_edges:
        raise ValueError(f"{what}: {n} edges are more than the graph's {graph.n_edges}")
    return n


def ranking(scores) -> np.ndarray:
    """Edges by falling |score|, ties by graph order: int64 [E]."""
    return np.argsort(-np.abs(np.asarray(scores, np.float64)), kind="stable")


def random_order(graph: Graph, seed) -> np.ndarray:
    """All edges shuffled: int64 [E], the same for the same seed (an int or a list of ints)."""
    return np.random.default_rng(seed).permutation(graph.n_edges)


def greedy_order(graph: Graph, order, backward: bool) -> np.ndarray:
    """Edges in the order in which a circuit grows from logits (or from steer): always the first of
    `order` that touches what is there. int64 [E].

    Backward, an edge touches the circuit if it ends in an input of a node that is in it; forward,
    if it starts at one. A key or value input belongs to every query head of its group.
    """
    rank = np.empty(graph.n_edges, np.int64)
    rank[order] = np.arange(graph.n_edges)
    H, w = graph.n_heads, graph.width
    feeds = graph._feeds(0)  # bool [w, H + 1], the same in every layer
    fed = [np.flatnonzero(row).tolist() for row in feeds]
    inputs = [np.flatnonzero(column).tolist() for column in feeds.T]
    upstream, downstream = graph.upstream, graph.downstream
    if backward:
        by_input = np.argsort(downstream, kind="stable")
        ends = np.concatenate(
            [[0], np.cumsum(np.bincount(downstream, minlength=graph.n_downstream))]
        )
        heap, known = (
            sorted(rank[by_input[ends[-2] :]].tolist()),
            np.zeros(graph.n_downstream, bool),
        )
    else:
        heap, known = sorted(rank[: graph.n_downstream].tolist()), np.zeros(graph.n_upstream, bool)
        known[0] = True
    taken = []
    while heap:
        edge = order[heapq.heappop(heap)]
        taken.append(edge)
        if backward:
            node = int(upstream[edge]) - 1
            new = [] if node < 0 else [node // (H + 1) * w + i for i in inputs[node % (H + 1)]]
        else:
            to = int(downstream[edge])
            new = (
                []
                if to == graph.n_downstream - 1
                else [1 + to // w * (H + 1) + i for i in fed[to % w]]
            )
        for i in new:
            if not known[i]:
                known[i] = True
                more = (
                    by_input[ends[i] : ends[i + 1]]
                    if backward
                    else slice(
                        graph.offset[i], graph.offset[i] + graph.n_downstream - graph.start[i]
                    )
                )
                for r in rank[more].tolist():
                    heapq.heappush(heap, r)
    return np.array(taken, np.int64)


def entry_ranks(graph: Graph, order) -> np.ndarray:
    """int64 [E]: the first prefix of `order` (by the place of its last edge) in which each edge
    lies on a path from steer to logits.

    Equal to asking `graph.on_paths` of every prefix: an edge is on a path in the first k edges
    exactly where its entry is below k. It is the latest place on the best path through the edge,
    found by one forward and one backward pass over the layers with (min, max) for (or, and).
    """
    E, H, w = graph.n_edges, graph.n_heads, graph.width
    rank = np.empty(E, np.int64)
    rank[order] = np.arange(E)
    matrix = np.full((graph.n_upstream, graph.n_downstream), E, np.int64)  # E: never
    matrix[graph.upstream, graph.downstream] = rank
    heads, mlp = graph._feeds(0)[:-1, :H], w - 1
    reached = np.full(graph.n_upstream, E, np.int64)
    reached[0] = -1
    inputs = matrix[0].copy()
    for l in range(graph.depth):
        at, first = l * w, 1 + l * (H + 1)
        reached[first : first + H] = np.where(heads, inputs[at : at + mlp, None], E).min(axis=0)
        inputs = np.minimum(
            inputs,
            np.maximum(reached[first : first + H, None], matrix[first : first + H]).min(axis=0),
        )
        reached[first + H] = inputs[at + mlp]
        inputs = np.minimum(inputs, np.maximum(reached[first + H], matrix[first + H]))
    leads = np.full(graph.n_downstream, E, np.int64)
    leads[-1] = -1
    for l in reversed(range(graph.depth)):
        at, first = l * w, 1 + l * (H + 1)
        leads[at + mlp] = np.maximum(matrix[first + H], leads).min()
        useful = np.maximum(matrix[first : first + H], leads).min(axis=1)
        leads[at : at + mlp] = np.where(heads, useful, E).min(axis=1)
    return np.maximum(rank, np.maximum(reached[graph.upstream], leads[graph.downstream]))


class Growth:
    """The pruned circuits of one order of the edges, of all sizes; the order is looked at once."""

    def __init__(self, graph: Graph, order):
        self.graph = graph
        self.entries = entry_ranks(graph, order)
        self._sorted = np.sort(self.entries)

    @classmethod
    def of(cls, graph: Graph, scores, method: str) -> Growth:
        """For one of the methods that prune; ValueError for another name."""
        if method not in METHODS or method == "top":
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        order = ranking(scores)
        return cls(
            graph,
            (
                order
                if method == "pruned"
                else greedy_order(graph, order, method == "greedy_backward")
            ),
        )

    def edges(self, n: int) -> np.ndarray:
        """The pruned rest of the shortest prefix that has at least n edges: ascending int64."""
        return np.flatnonzero(self.entries <= self._sorted[n - 1]) if n else np.empty(0, np.int64)
