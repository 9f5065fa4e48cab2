"""The graph that a circuit is a part of (docs/method.md section 4), from a configuration alone.

Upstream nodes, in order: `steer` (the residual stream entering the steering layer), then layer by
layer every head `a{l}.h{i}` and the MLP `m{l}`. Downstream nodes, in order: layer by layer H query
inputs `a{l}.h{i}<q>`, G key inputs `<k>`, G value inputs `<v>`, the MLP's input; `logits` is last.
There is one key and one value input for each key/value head, as in GQA. In a sequential layer a
head reaches the layer's own MLP; in a parallel one, whose attention and MLP both read the layer's
input, heads and MLP reach from the next layer on. Either way an upstream node reaches a contiguous
suffix of the downstream nodes, so an edge is a number: offset[upstream] + downstream -
start[upstream]. This order of the edges, by upstream node first, also decides ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.types import BoolArray, IntArray

if TYPE_CHECKING:
    from ..loading.config import Config
    from ..runtime.model import Model

#: Types of downstream nodes, in the order of `Graph.input_kind`.
INPUT_KINDS = ("q", "k", "v", "mlp", "logits")


class Graph:
    """Nodes and edges from a steering layer on. Graphs of the same sizes and kind of layer are
    equal.

    len(graph) is the number of edges. parallel: attention and MLP of a layer both read the layer's
    input. Raises ValueError for a layer outside the model and for query heads that do not divide
    among the key/value heads.
    """

    def __init__(
        self, n_layers: int, n_heads: int, n_kv_heads: int, layer: int, parallel: bool = False
    ) -> None:
        if not 0 <= layer < n_layers:
            raise ValueError(f"the steering layer must be one of 0 to {n_layers - 1}, not {layer}")
        if n_heads % n_kv_heads:
            raise ValueError(
                f"{n_heads} query heads do not divide among {n_kv_heads} key/value heads"
            )
        self.n_layers, self.n_heads, self.n_kv_heads, self.layer = (
            n_layers,
            n_heads,
            n_kv_heads,
            layer,
        )
        self.parallel = parallel
        self.depth = n_layers - layer  # layers in the graph
        self.width = n_heads + 2 * n_kv_heads + 1  # downstream nodes of one layer
        self.n_downstream = self.width * self.depth + 1
        self.n_upstream = 1 + self.depth * (n_heads + 1)
        starts = [0]
        for l in range(self.depth):
            above = (l + 1) * self.width  # the first input of the next layer
            starts += [above if parallel else above - 1] * n_heads + [above]
        #: First downstream node that each upstream node reaches, and the number of its first
        #: edge. int64 [n_upstream].
        self.start = np.array(starts, np.int64)
        sizes = self.n_downstream - self.start
        self.offset = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.n_edges = int(sizes.sum())

    def __len__(self) -> int:
        return self.n_edges

    def _key(self) -> tuple[int, int, int, int, bool]:
        return self.n_layers, self.n_heads, self.n_kv_heads, self.layer, self.parallel

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return (
            f"Graph(layers {self.layer} to {self.n_layers - 1}, {self.n_upstream} upstream nodes,"
            f" {self.n_downstream} inputs, {self.n_edges} edges"
            f"{', parallel layers' if self.parallel else ''})"
        )

    # -- names -------------------------------------------------------------------------------------

    @cached_property
    def node_names(self) -> tuple[str, ...]:
        """Upstream nodes: "steer", "a3.h1", "m4"."""
        names = ["steer"]
        for l in range(self.layer, self.n_layers):
            names += [f"a{l}.h{h}" for h in range(self.n_heads)] + [f"m{l}"]
        return tuple(names)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """Downstream nodes: "a5.h0<q>", "a5.h1<k>" (a key/value head), "m5", "logits"."""
        names = []
        for l in range(self.layer, self.n_layers):
            names += [f"a{l}.h{h}<q>" for h in range(self.n_heads)]
            names += [f"a{l}.h{g}<{x}>" for x in "kv" for g in range(self.n_kv_heads)] + [f"m{l}"]
        return tuple(names + ["logits"])

    @cached_property
    def edge_names(self) -> tuple[str, ...]:
        """All edges in graph order: "steer->a5.h0<q>", "a3.h1->m4", "m4->logits"."""
        inputs = self.input_names
        return tuple(
            f"{name}->{to}"
            for name, start in zip(self.node_names, self.start)
            for to in inputs[start:]
        )

    @cached_property
    def counts(self) -> dict[str, int]:
        """Edges by the type of their upstream node: {"steer": ..., "mlp": ..., "head": ...}."""
        sizes = self.n_downstream - self.start
        kinds = self.upstream_kind
        return {
            "steer": int(sizes[0]),
            "mlp": int(sizes[kinds == 2].sum()),
            "head": int(sizes[kinds == 1].sum()),
        }

    @cached_property
    def incoming(self) -> dict[str, int]:
        """Edges by the type of the input they end in: {"q", "k", "v", "mlp", "logits"}."""
        types = self.input_kind[self.downstream]
        return {name: int((types == i).sum()) for i, name in enumerate(INPUT_KINDS)}

    # -- index arithmetic --------------------------------------------------------------------------

    @cached_property
    def upstream_kind(self) -> npt.NDArray[np.int8]:
        """int8 [n_upstream]: 0 steer, 1 head, 2 MLP."""
        return np.array([0] + ([1] * self.n_heads + [2]) * self.depth, np.int8)

    @cached_property
    def input_kind(self) -> npt.NDArray[np.int8]:
        """int8 [n_downstream]: index into INPUT_KINDS."""
        layer = [0] * self.n_heads + [1] * self.n_kv_heads + [2] * self.n_kv_heads + [3]
        return np.array(layer * self.depth + [4], np.int8)

    @cached_property
    def upstream(self) -> npt.NDArray[np.int32]:
        """int32 [n_edges]: the upstream node of every edge."""
        return np.repeat(np.arange(self.n_upstream, dtype=np.int32), self.n_downstream - self.start)

    @cached_property
    def downstream(self) -> npt.NDArray[np.int32]:
        """int32 [n_edges]: the input that every edge ends in."""
        first = self.offset[self.upstream] - self.start[self.upstream]
        return np.asarray(np.arange(self.n_edges) - first, np.int32)

    def edge(self, upstream: npt.ArrayLike, downstream: npt.ArrayLike) -> IntArray:
        """Numbers of the edges between upstream and downstream nodes, int64 [...].

        Both are node numbers, alone or as arrays that broadcast. Raises ValueError where there is
        no such edge.
        """
        upstream, downstream = np.asarray(upstream), np.asarray(downstream)
        if ((downstream < self.start[upstream]) | (downstream >= self.n_downstream)).any():
            raise ValueError(
                "an upstream node does not reach these inputs: they are not computed after it"
            )
        return np.asarray(self.offset[upstream] + downstream - self.start[upstream])

    def find(self, names: Iterable[str]) -> IntArray:
        """The numbers of edges given by name, int64 [n]. Raises KeyError with the first name that
        is no edge.
        """
        table = self._numbers
        try:
            return np.array([table[n] for n in names], np.int64)
        except KeyError as error:
            raise KeyError(f"no edge {error.args[0]!r} in {self!r}") from None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.edge_names)}

    # -- paths -------------------------------------------------------------------------------------

    def _feeds(self, l: int) -> BoolArray:
        """Which heads and MLP of layer l (counted from the steering layer) each of its inputs
        belongs to: bool [w, H + 1]. A key or value input belongs to every query head of its group.
        """
        H, G = self.n_heads, self.n_kv_heads
        table = np.zeros((self.width, H + 1), bool)
        table[np.arange(H), np.arange(H)] = True
        group = np.arange(H) // (H // G)
        table[H + group, np.arange(H)] = True
        table[H + G + group, np.arange(H)] = True
        table[-1, H] = True
        return table

    def on_paths(self, kept: npt.ArrayLike) -> BoolArray:
        """The edges of `kept` (bool [n_edges]) that lie on a path from steer to logits made of
        edges of `kept`: bool [n_edges]. Raises ValueError for a mask of another length.
        """
        kept = np.asarray(kept, bool)
        if kept.shape != (self.n_edges,):
            raise ValueError(f"a mask of {kept.shape} for a graph of {self.n_edges} edges")
        matrix = np.zeros((self.n_upstream, self.n_downstream), bool)
        matrix[self.upstream[kept], self.downstream[kept]] = True
        feeds, w, H = self._feeds(0), self.width, self.n_heads
        heads, mlp = feeds[:-1, :H], w - 1
        reached = np.zeros(self.n_upstream, bool)  # upstream nodes that a path from steer reaches
        reached[0] = True
        inputs = matrix[0].copy()  # inputs that an edge of a reached node ends in
        for l in range(self.depth):
            at, first = l * w, 1 + l * (H + 1)
            reached[first : first + H] = inputs[at : at + mlp] @ heads
            inputs |= reached[first : first + H] @ matrix[first : first + H]
            reached[first + H] = inputs[at + mlp]
            if reached[first + H]:
                inputs |= matrix[first + H]
        leads = np.zeros(self.n_downstream, bool)  # inputs from which a path leads to logits
        leads[-1] = True
        for l in reversed(range(self.depth)):
            at, first = l * w, 1 + l * (H + 1)
            leads[at + mlp] = (matrix[first + H] & leads).any()
            useful = (matrix[first : first + H] & leads).any(axis=1)
            leads[at : at + mlp] = heads @ useful
        on_path: BoolArray = kept & reached[self.upstream] & leads[self.downstream]
        return on_path


def graph(config_or_model: Config | Model, layer: int) -> Graph:
    """The graph of a model that is steered at `layer` (docs/method.md section 4).

    config_or_model: a Config, or anything with one as `.config`; no weights are needed. Raises
    ValueError for a layer outside the model.
    """
    # A Config has no `.config` of its own.
    config: Any = getattr(config_or_model, "config", config_or_model)
    parallel = getattr(config, "parallel", False)
    return Graph(config.n_layers, config.n_heads, config.n_kv_heads, int(layer), parallel)


# -- files -----------------------------------------------------------------------------------------

#: Names of a graph's sizes.
_SIZES = ("n_layers", "n_heads", "n_kv_heads", "layer")


def graph_facts(graph: Graph) -> dict[str, Any]:
    """What identifies a graph, for files: its sizes by name, and "parallel" where it is true."""
    sizes = dict(zip(_SIZES, graph._key(), strict=False))
    return {**sizes, "parallel": True} if graph.parallel else sizes


def graph_from_facts(facts: Mapping[str, Any]) -> Graph:
    """The graph that `graph_facts` describes. Raises KeyError for a missing size, ValueError for
    one that is no integer from 0 to 4096.
    """
    sizes, parallel = [facts[name] for name in _SIZES], facts.get("parallel", False)
    if not all(type(n) is int and 0 <= n <= 1 << 12 for n in sizes) or type(parallel) is not bool:
        raise ValueError(f"graph {dict(facts)}")
    n_layers, n_heads, n_kv_heads, layer = sizes
    return Graph(n_layers, n_heads, n_kv_heads, layer, parallel)
