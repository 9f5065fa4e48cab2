"""How circuits are found: from an order of the edges to the shortest prefix of it that still has n
edges after pruning (docs/method.md section 5).

Every method but plain "top" is an order of all edges. The circuit of size n is the shortest prefix
of this order of which at least n edges remain when it is pruned. `entry_ranks` computes for every
edge, in one pass over the graph, the first prefix in which it lies on a path from steer to logits:
the best path through an edge is the one whose latest edge comes earliest. With these numbers the
circuit of any size is one comparison per edge.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..base.checks import require_int
from ..base.types import IntArray
from .graph import Graph

METHODS = ("pruned", "top", "greedy_backward", "greedy_forward")


def check_size(graph: Graph, n: object, what: str = "n") -> int:
    """A number of edges as an int. Raises ValueError naming `what` unless it is a whole number from
    0 to the number of edges in the graph.
    """
    size = require_int(n, what, 0)
    if size > graph.n_edges:
        raise ValueError(f"{what}: {size} edges are more than the graph's {graph.n_edges}")
    return size


def ranking(scores: npt.ArrayLike) -> IntArray:
    """Edge numbers by descending |score|, ties in graph order: int64 [E]."""
    return np.argsort(-np.abs(np.asarray(scores, np.float64)), kind="stable")


def random_order(graph: Graph, seed: int | Sequence[int]) -> IntArray:
    """All edges shuffled: int64 [E], the same for the same seed (an int or a list of ints)."""
    return np.random.default_rng(seed).permutation(graph.n_edges)


def greedy_order(graph: Graph, order: IntArray, backward: bool) -> IntArray:
    """Edges in the order in which a circuit grows from logits (or from steer), int64 [at most E]:
    always the first of `order` that touches the circuit so far.

    Backward, an edge touches the circuit if it ends in an input of a node that is in it; forward,
    if it starts at one. A key or value input belongs to every query head of its group.
    """
    rank = np.empty(graph.n_edges, np.int64)
    rank[order] = np.arange(graph.n_edges)
    touching, reached_by = _backward(graph) if backward else _forward(graph)
    known = np.zeros(graph.n_downstream if backward else graph.n_upstream, bool)
    start = graph.n_downstream - 1 if backward else 0  # logits, or steer
    known[start] = True
    heap = sorted(rank[touching(start)].tolist())
    taken = []
    while heap:
        edge = int(order[heapq.heappop(heap)])
        taken.append(edge)
        for i in reached_by(edge):
            if not known[i]:
                known[i] = True
                for r in rank[touching(i)].tolist():
                    heapq.heappush(heap, r)
    return np.array(taken, np.int64)


#: (edges that touch the circuit once a node is in it, nodes that an edge brings in)
_Neighbours = tuple[Callable[[int], IntArray | slice], Callable[[int], list[int]]]


def _backward(graph: Graph) -> _Neighbours:
    """Growth from logits: nodes are downstream nodes, and the edges that end in them touch."""
    H, w = graph.n_heads, graph.width
    inputs = [np.flatnonzero(column).tolist() for column in graph._feeds(0).T]
    by_input = np.argsort(graph.downstream, kind="stable")
    counts = np.bincount(graph.downstream, minlength=graph.n_downstream)
    ends = np.concatenate([[0], np.cumsum(counts)])

    def reached_by(edge: int) -> list[int]:
        node = int(graph.upstream[edge]) - 1
        return [] if node < 0 else [node // (H + 1) * w + i for i in inputs[node % (H + 1)]]

    return lambda v: by_input[ends[v] : ends[v + 1]], reached_by


def _forward(graph: Graph) -> _Neighbours:
    """Growth from steer: nodes are upstream nodes, and the edges that start at them touch."""
    H, w = graph.n_heads, graph.width
    fed = [np.flatnonzero(row).tolist() for row in graph._feeds(0)]

    def touching(u: int) -> slice:
        first = int(graph.offset[u])
        return slice(first, first + graph.n_downstream - int(graph.start[u]))

    def reached_by(edge: int) -> list[int]:
        to = int(graph.downstream[edge])
        if to == graph.n_downstream - 1:
            return []
        return [1 + to // w * (H + 1) + i for i in fed[to % w]]

    return touching, reached_by


def entry_ranks(graph: Graph, order: IntArray) -> IntArray:
    """For each edge the first prefix of `order` in which it lies on a path from steer to logits,
    named by the rank of the prefix's last edge: int64 [E].

    An edge is on a path in the first k edges exactly if its entry is below k, which is what
    `graph.on_paths` says of that prefix. The entry is the latest rank on the best path through the
    edge. One forward and one backward pass over the layers find it, with (min, max) in place of
    (or, and).
    """
    E, H, w = graph.n_edges, graph.n_heads, graph.width
    rank = np.empty(E, np.int64)
    rank[order] = np.arange(E)
    matrix = np.full((graph.n_upstream, graph.n_downstream), E, np.int64)  # E: no edge
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
    entries: IntArray = np.maximum(
        rank, np.maximum(reached[graph.upstream], leads[graph.downstream])
    )
    return entries


class Growth:
    """The pruned circuits of one order of the edges, of any size."""

    def __init__(self, graph: Graph, order: IntArray) -> None:
        self.graph = graph
        self.entries = entry_ranks(graph, order)
        self._sorted = np.sort(self.entries)

    @classmethod
    def of(cls, graph: Graph, scores: npt.ArrayLike, method: str) -> Growth:
        """By a method that prunes: "pruned", "greedy_backward" or "greedy_forward". Raises
        ValueError for another.
        """
        if method not in METHODS or method == "top":
            raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
        order = ranking(scores)
        if method != "pruned":
            order = greedy_order(graph, order, method == "greedy_backward")
        return cls(graph, order)

    def edges(self, n: int) -> IntArray:
        """What pruning leaves of the shortest prefix of which it leaves at least n edges:
        ascending edge numbers, int64.
        """
        return np.flatnonzero(self.entries <= self._sorted[n - 1]) if n else np.empty(0, np.int64)
