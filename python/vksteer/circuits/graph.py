"""The graph that a circuit is a part of (method.md section 4), from a configuration alone.

Upstream nodes, in order: `steer` (the residual stream entering the steering layer), then layer by
layer every head `a{l}.h{i}` and the MLP `m{l}`. Downstream nodes, in order: layer by layer H query
inputs `a{l}.h{i}<q>`, G key inputs `<k>`, G value inputs `<v>`, the MLP's input; `logits` last. Key
and value inputs are counted per key/value head (GQA stays grouped). An upstream node reaches a
contiguous suffix of the downstream nodes, so edges need no objects: edge = offset[upstream] +
downstream - start[upstream], upstream-major, which is also the order that decides ties.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np


class Graph:
    """Nodes and edges above a steering layer. Equal if made from the same sizes.

    Raises ValueError for a layer outside the model.
    """

    def __init__(self, n_layers: int, n_heads: int, n_kv_heads: int, layer: int):
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
        self.depth = n_layers - layer  # layers that take part
        self.width = n_heads + 2 * n_kv_heads + 1  # downstream nodes a layer
        self.n_downstream = self.width * self.depth + 1
        self.n_upstream = 1 + self.depth * (n_heads + 1)
        starts = [0]
        for l in range(self.depth):
            starts += [l * self.width + self.width - 1] * n_heads + [(l + 1) * self.width]
        #: First downstream node that each upstream node reaches, and the number of its first
        #: edge. int64 [n_upstream].
        self.start = np.array(starts, np.int64)
        sizes = self.n_downstream - self.start
        self.offset = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.n_edges = int(sizes.sum())

    def __len__(self):
        return self.n_edges

    def _key(self):
        return self.n_layers, self.n_heads, self.n_kv_heads, self.layer

    def __eq__(self, other):
        return isinstance(other, Graph) and self._key() == other._key()

    def __hash__(self):
        return hash(self._key())

    def __repr__(self):
        return (
            f"Graph(layers {self.layer} to {self.n_layers - 1}, {self.n_upstream} upstream nodes,"
            f" {self.n_downstream} inputs, {self.n_edges} edges)"
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
    def upstream_kind(self) -> np.ndarray:
        """int8 [n_upstream]: 0 steer, 1 head, 2 MLP."""
        return np.array([0] + ([1] * self.n_heads + [2]) * self.depth, np.int8)

    @cached_property
    def input_kind(self) -> np.ndarray:
        """int8 [n_downstream]: index into INPUT_KINDS."""
        layer = [0] * self.n_heads + [1] * self.n_kv_heads + [2] * self.n_kv_heads + [3]
        return np.array(layer * self.depth + [4], np.int8)

    @cached_property
    def upstream(self) -> np.ndarray:
        """int32 [n_edges]: the upstream node of every edge."""
        return np.repeat(np.arange(self.n_upstream, dtype=np.int32), self.n_downstream - self.start)

    @cached_property
    def downstream(self) -> np.ndarray:
        """int32 [n_edges]: the input that every edge ends in."""
        return (
            np.arange(self.n_edges) - self.offset[self.upstream] + self.start[self.upstream]
        ).astype(np.int32)

    def edge(self, upstream, downstream):
        """Number of the edge between two nodes (by number, arrays allowed). ValueError
        where there is none.
        """
        upstream, downstream = np.asarray(upstream), np.asarray(downstream)
        if ((downstream < self.start[upstream]) | (downstream >= self.n_downstream)).any():
            raise ValueError(
                "an upstream node does not reach an input of its own or an earlier layer"
            )
        return self.offset[upstream] + downstream - self.start[upstream]

    def find(self, names) -> np.ndarray:
        """Edge names -> numbers, int64. KeyError names the first that is none."""
        table = self._numbers
        try:
            return np.array([table[n] for n in names], np.int64)
        except KeyError as error:
            raise KeyError(f"no edge {error.args[0]!r} in {self!r}") from None

    @cached_property
    def _numbers(self):
        return {name: i for i, name in enumerate(self.edge_names)}

    # -- paths -------------------------------------------------------------------------------------

    def _feeds(self, l: int):
        """What the inputs of layer l (counted from the steering layer) lead to: bool [w, H + 1]
        over its heads and MLP. A key or value input belongs to every query head of its group.
        """
        H, G = self.n_heads, self.n_kv_heads
        table = np.zeros((self.width, H + 1), bool)
        table[np.arange(H), np.arange(H)] = True
        group = np.arange(H) // (H // G)
        table[H + group, np.arange(H)] = True
        table[H + G + group, np.arange(H)] = True
        table[-1, H] = True
        return table

    def on_paths(self, kept) -> np.ndarray:
        """Bool [n_edges]: the edges of `kept` (bool [n_edges]) that lie on a path from steer
        to logits inside it.
        """
        kept = np.asarray(kept, bool)
        if kept.shape != (self.n_edges,):
            raise ValueError(f"a mask of {kept.shape} for a graph of {self.n_edges} edges")
        matrix = np.zeros((self.n_upstream, self.n_downstream), bool)
        matrix[self.upstream[kept], self.downstream[kept]] = True
        feeds, w, H = self._feeds(0), self.width, self.n_heads
        heads, mlp = feeds[:-1, :H], w - 1
        reached = np.zeros(self.n_upstream, bool)  # upstream nodes that steering reaches
        reached[0] = True
        inputs = matrix[0].copy()  # inputs that something reached leads to
        for l in range(self.depth):
            at, first = l * w, 1 + l * (H + 1)
            reached[first : first + H] = inputs[at : at + mlp] @ heads
            inputs |= reached[first : first + H] @ matrix[first : first + H]
            reached[first + H] = inputs[at + mlp]
            if reached[first + H]:
                inputs |= matrix[first + H]
        leads = np.zeros(self.n_downstream, bool)  # inputs from which logits can be reached
        leads[-1] = True
        for l in reversed(range(self.depth)):
            at, first = l * w, 1 + l * (H + 1)
            leads[at + mlp] = (matrix[first + H] & leads).any()
            useful = (matrix[first : first + H] & leads).any(axis=1)
            leads[at : at + mlp] = heads @ useful
        return kept & reached[self.upstream] & leads[self.downstream]


INPUT_KINDS = ("q", "k", "v", "mlp", "logits")


def graph(config_or_model, layer: int) -> Graph:
    """The graph of a model steered at `layer`; needs a Config (or anything with
    one) and no weights.
    """
    config = getattr(config_or_model, "config", config_or_model)
    return Graph(config.n_layers, config.n_heads, config.n_kv_heads, int(layer))
