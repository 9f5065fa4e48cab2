"""Scores of edges, nodes and dimensions: what `vs.patching.attribute` returns
(method.md section 5).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from ..base.checks import require_int
from ..base.provenance import digest, fingerprint, provenance
from ..circuits import search as circuit_search
from ..circuits.graph import INPUT_KINDS, Graph
from ..circuits.graph import graph as graph_of
from ..errors import ModelError
from . import edge_score_files


class TopEdge(NamedTuple):
    rank: int  # from 1 on
    name: str
    score: float
    share: float  # of the sum of all |score|


class TopEdges(list):
    """The strongest edges (or nodes), TopEdge each; shows itself as a table."""

    def __repr__(self):
        lines = ["| rank | edge | score | share of all |", "|---:|:---|---:|---:|"]
        return "\n".join(
            lines
            + [f"| {e.rank} | {e.name} | {e.score:+.4g} | {100 * e.share:.2f} % |" for e in self]
        )


class EdgeScores:
    """Effects of edges and nodes of a graph on the metric, positive where the
    clean value raises it.

    graph: the Graph. edges: float64 [E]; nodes: float64 [N] (upstream nodes) or None; dims:
    float32 [1, D] (of steer) or [N, D], or None; both sums over positions, samples averaged by
    their metric positions.
    weights: int64 [n_samples], metric positions of each sample (0: it was left out). n_positions:
    all together (their sum, where they are given). positions: one float32 or float64 [E, S] per
    sample, or None. sample_edges, sample_nodes: float64 [n_samples, E] and [n_samples, N], or None.
    settings: steps, rule, metric, threshold, at, clean, capped, ... provenance: model and vector,
    see `score_provenance`. Both must fit into JSON. Arrays are read-only. Raises ValueError for
    wrong shapes and for numbers that are not finite.
    """

    def __init__(
        self,
        graph: Graph,
        edges,
        nodes=None,
        *,
        n_positions: int | None = None,
        weights=None,
        dims=None,
        positions=None,
        sample_edges=None,
        sample_nodes=None,
        settings: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ):
        E, N = graph.n_edges, graph.n_upstream
        self.graph = graph
        self.edges = _array(edges, "edges", (E,))
        self.nodes = None if nodes is None else _array(nodes, "nodes", (N,))
        self.weights = None if weights is None else _counts(weights)
        n = None if self.weights is None else self.weights.size
        if n is None and (sample_edges is not None or sample_nodes is not None):
            raise ValueError("scores of each sample need their weights (metric positions), too")
        self.dims = None
        if dims is not None:
            shape = np.shape(dims)
            if len(shape) != 2 or shape[0] not in (1, N) or not shape[1]:
                raise ValueError(f"dims must be [1, D] or [{N}, D], not {list(shape)}")
            self.dims = _array(dims, "dims", shape, np.float32)
        self.sample_edges = (
            None if sample_edges is None else _array(sample_edges, "sample_edges", (n, E))
        )
        self.sample_nodes = (
            None if sample_nodes is None else _array(sample_nodes, "sample_nodes", (n, N))
        )
        self.positions = (
            None
            if positions is None
            else tuple(_positions(p, i, E) for i, p in enumerate(positions))
        )
        if n_positions is None:
            if self.weights is None:
                raise ValueError(
                    "n_positions (metric positions in all) is needed, or the weights of the samples"
                )
            n_positions = int(self.weights.sum())
        self.n_positions = require_int(n_positions, "n_positions", 0)
        if self.weights is not None and int(self.weights.sum()) != self.n_positions:
            raise ValueError(
                f"the weights sum to {int(self.weights.sum())}, n_positions is {self.n_positions}"
            )
        if self.positions is not None and n is not None and len(self.positions) != n:
            raise ValueError(f"positions of {len(self.positions)} samples, weights of {n}")
        self.settings, self.provenance = (
            _plain(settings, "settings"),
            _plain(provenance, "provenance"),
        )
        self._growths: dict[str, circuit_search.Growth] = {}

    def __repr__(self):
        s = self.settings
        how = ", ".join(
            f"{name}={s[name]}" for name in ("metric", "steps", "rule", "at", "clean") if name in s
        )
        best = self.top(1)
        strongest = f", strongest {best[0].name} {best[0].score:+.3g}" if best else ""
        samples = "" if self.weights is None else f"{int((self.weights > 0).sum())} samples, "
        return (
            f"EdgeScores({self.graph.n_edges} edges, {self.graph.n_upstream} nodes,"
            f" {samples}{self.n_positions} metric positions{', ' + how if how else ''}{strongest})"
        )

    # -- names -------------------------------------------------------------------------------------

    @property
    def edge_names(self) -> tuple[str, ...]:
        """[E], graph order: "steer->a5.h0<q>", "a3.h1->m4", "m4->logits"."""
        return self.graph.edge_names

    @property
    def node_names(self) -> tuple[str, ...]:
        """[N]: "steer", "a3.h1", "m4"."""
        return self.graph.node_names

    def __getitem__(self, name: str) -> float:
        """The score of one edge, or upstream node, by name. KeyError for another."""
        if "->" in name:
            return float(self.edges[self.graph.find([name])[0]])
        if self.nodes is None or name not in self.node_names:
            raise KeyError(
                f"no node {name!r} in {self.graph!r}"
                if self.nodes is not None
                else "these scores hold no nodes"
            )
        return float(self.nodes[self.node_names.index(name)])

    # -- reading -----------------------------------------------------------------------------------

    def top(self, k: int = 20) -> TopEdges:
        """The k edges of largest |score|, ties by graph order."""
        return self._top(self.edges, self.edge_names, k)

    def top_nodes(self, k: int = 20) -> TopEdges:
        """The k upstream nodes of largest |score|. ValueError where the scores hold no nodes."""
        if self.nodes is None:
            raise ValueError("these scores hold no nodes")
        return self._top(self.nodes, self.node_names, k)

    @staticmethod
    def _top(scores, names, k):
        k, total = require_int(k, "k", 0), float(np.abs(scores).sum())
        return TopEdges(
            TopEdge(
                rank, names[i], float(scores[i]), abs(float(scores[i])) / total if total else 0.0
            )
            for rank, i in enumerate(circuit_search.ranking(scores)[:k], 1)
        )

    def distribution(self, n: int, method: str = "top") -> dict[str, float]:
        """Shares of the n strongest edges by the type of the input they end in: {"q", "k",
        "v", "mlp", "logits"}.
        """
        return self.circuit(n, method).distribution()

    def matrix(self) -> np.ndarray:
        """float64 [N, inputs]: the edges as a table of upstream nodes by inputs
        (`graph.node_names`, `graph.input_names`), NaN where there is no edge.
        """
        table = np.full((self.graph.n_upstream, self.graph.n_downstream), np.nan)
        table[self.graph.upstream, self.graph.downstream] = self.edges
        return table

    def by_type(self) -> dict[str, float]:
        """Sum of |score| by the type of the input."""
        kinds = np.bincount(
            self.graph.input_kind[self.graph.downstream], np.abs(self.edges), len(INPUT_KINDS)
        )
        return dict(zip(INPUT_KINDS, map(float, kinds)))

    # -- circuits ----------------------------------------------------------------------------------

    def circuit(self, n: int, method: str = "pruned"):
        """A Circuit of about n edges (method.md section 5); ties by graph order.

        method: "pruned": the shortest prefix of the ranking by |score| of which at least n edges
        lie on a path from steer to logits; these edges.
          "top": the first n edges of the ranking, as they are. "greedy_backward"
          ("greedy_forward"): grown from logits (from steer), always by the edge of largest
          |score| that touches what is there; the smallest such circuit whose pruned rest
          has at least n edges.
        Raises ValueError for another method and for n outside 0 to the number of edges.
        """
        from ..circuits.circuit import Circuit

        if method not in circuit_search.METHODS:
            raise ValueError(
                f"method must be one of {', '.join(circuit_search.METHODS)}, not {method!r}"
            )
        n = circuit_search.check_size(self.graph, n)
        if method == "top":
            edges = circuit_search.ranking(self.edges)[:n]
        else:
            if method not in self._growths:
                self._growths[method] = circuit_search.Growth.of(self.graph, self.edges, method)
            edges = self._growths[method].edges(n)
        meta = {
            "method": method,
            "n": n,
            **{name: self.provenance[name] for name in _IDENTITY if name in self.provenance},
            "metric": self.settings.get("metric"),
        }
        return Circuit(self.graph, edges, meta=meta)

    # -- samples together and apart ----------------------------------------------------------------

    def of_samples(self, indices: Sequence[int]) -> EdgeScores:
        """The scores of some samples alone, combined in the order given. Needs
        per_sample=True in attribute.

        Raises ValueError without scores of each sample, for indices outside and for samples without
        any metric position.
        """
        if self.sample_edges is None:
            raise ValueError(
                "these scores do not hold each sample's own: make them with attribute(...,"
                " per_sample=True)"
            )
        indices = [require_int(i, "a sample's index", 0) for i in indices]
        if not indices or max(indices) >= self.weights.size:
            raise ValueError(
                f"samples {indices} cannot be taken: there are 0 to {self.weights.size - 1}"
            )
        weights = self.weights[indices]
        if not weights.sum():
            raise ValueError("none of these samples has a metric position")
        rows = lambda table: None if table is None else table[indices]
        combined = lambda table: None if table is None else combine(table[indices], weights)
        return EdgeScores(
            self.graph,
            combined(self.sample_edges),
            combined(self.sample_nodes),
            weights=weights,
            sample_edges=rows(self.sample_edges),
            sample_nodes=rows(self.sample_nodes),
            positions=None if self.positions is None else [self.positions[i] for i in indices],
            settings={
                name: value for name, value in self.settings.items() if name != "samples_hash"
            },
            provenance=self.provenance,
        )

    @classmethod
    def merge(cls, parts: Sequence[EdgeScores]) -> EdgeScores:
        """Scores of different samples as one: averaged by metric positions, in list order.

        Raises ValueError naming the difference where the parts differ in graph, model, vector,
        coefficient or settings.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("there is nothing to merge: parts is empty")
        for part in parts[1:]:
            parts[0].check_same(part)
        weights = np.array([p.n_positions for p in parts], np.int64)
        if not weights.sum():
            raise ValueError("none of the parts has a metric position")
        table = lambda name: (
            combine([getattr(p, name) for p in parts], weights)
            if all(getattr(p, name) is not None for p in parts)
            else None
        )
        joined = lambda name: (
            np.concatenate([getattr(p, name) for p in parts])
            if all(getattr(p, name) is not None for p in parts)
            else None
        )
        own = joined("weights")
        dims = (
            table("dims")
            if len({None if p.dims is None else p.dims.shape for p in parts}) == 1
            else None
        )
        positions = (
            [x for p in parts for x in p.positions]
            if own is not None and all(p.positions is not None for p in parts)
            else None
        )
        return cls(
            parts[0].graph,
            table("edges"),
            table("nodes"),
            n_positions=int(weights.sum()),
            weights=own,
            dims=dims,
            positions=positions,
            sample_edges=joined("sample_edges") if own is not None else None,
            sample_nodes=joined("sample_nodes") if own is not None else None,
            settings={
                name: value for name, value in parts[0].settings.items() if name not in _OF_SAMPLES
            },
            provenance=parts[0].provenance,
        )

    def check_same(self, other: EdgeScores) -> None:
        """ValueError naming the first difference where two scores cannot be combined: graph, model,
        vector, coefficient, settings.
        """
        if self.graph != other.graph:
            raise ValueError(
                f"scores of different graphs cannot be combined: {self.graph!r} and {other.graph!r}"
            )
        for name in _IDENTITY:
            mine, theirs = self.provenance.get(name), other.provenance.get(name)
            if name not in ("model", "architecture") and mine != theirs:
                raise ValueError(
                    f"scores cannot be combined: {name} is {mine} in one and {theirs} in the other"
                )
        for name in sorted({*self.settings, *other.settings} - _OF_SAMPLES):
            if self.settings.get(name) != other.settings.get(name):
                raise ValueError(
                    f"scores cannot be combined: {name} is {self.settings.get(name)!r} in one and"
                    f" {other.settings.get(name)!r} in the other"
                )

    def check(self, model, layer: int | None = None, vector=None) -> None:
        """ValueError where the scores are not of `model` (a Model or Config) steered at `layer`, or
        not of `vector`, if one is given.
        """
        layer = self.graph.layer if layer is None else layer
        wanted = graph_of(model, layer)
        if self.graph != wanted:
            raise ValueError(
                f"the scores belong to another graph: {self.graph!r}; this model steered at layer"
                f" {layer} has {wanted!r}"
            )
        made_with, mine = self.provenance.get("model_hash"), fingerprint(model)
        if made_with and mine and made_with != mine:
            raise ValueError(
                "the scores were made with another model"
                f" ({self.provenance.get('model') or 'unnamed'}, {made_with[:12]}; this one is"
                f" {mine[:12]})"
            )
        if vector is not None and self.provenance.get("vector_hash") not in (
            None,
            digest(vector.direction),
        ):
            raise ValueError("the scores were made with another steering vector")

    # -- files, other tools ------------------------------------------------------------------------

    def save(self, path) -> None:
        """One safetensors file with settings, provenance and a checksum over everything; an
        existing file is replaced whole.
        """
        edge_score_files.save(self, path)

    @classmethod
    def load(cls, path, model=None) -> EdgeScores:
        """Read what `save` wrote. model: a Model or Config that they must belong to.

        Raises ModelError for a file that was cut short or edited or is none, ValueError for scores
        of another model, OSError.
        """
        fields = edge_score_files.load(path)
        try:
            scores = cls(**fields)
        except (ValueError, TypeError) as error:
            raise ModelError(f"{path}: no scores of vksteer: {error}") from None
        if model is not None:
            scores.check(model)
        return scores

    def to_eap_ig_json(
        self, path, circuit=None, *, d_model: int | None = None, shared: str = "repeat"
    ) -> None:
        """The file that EAP-IG's `Graph.from_json` reads; see `circuit_exports.write_eap_ig`.

        circuit: a Circuit; its edges and nodes are marked `in_graph`. d_model: width of the model,
        where neither provenance nor dims know it.
        """
        from ..circuits.exports import write_eap_ig

        write_eap_ig(self, path, circuit, d_model, shared)

    def to_networkx(self):
        """A networkx MultiDiGraph of all edges with their scores
        (`circuit_exports.networkx_graph`). Needs networkx.
        """
        from ..circuits.exports import networkx_graph

        return networkx_graph(self.graph, np.arange(self.graph.n_edges), self.edges)


#: Of provenance: what must agree for scores to be combined, and what a circuit keeps.
_IDENTITY = ("model", "architecture", "model_hash", "vector_hash", "layer", "coefficient")
#: Settings that belong to the samples.
_OF_SAMPLES = {"samples_hash", "n_samples", "dropped", "left_out"}


def combine(tables, weights) -> np.ndarray:
    """Mean over samples weighted by metric positions, summed one after the other in float64:
    tables [n, ...] -> [...].
    """
    total = np.zeros(np.shape(tables[0]), np.float64)
    for row, w in zip(tables, weights):
        if w:
            total += float(w) * np.asarray(row, np.float64)
    return total / float(np.sum(weights))


def score_provenance(model, vector, coefficient: float) -> dict[str, Any]:
    """What scores say about where they come from: model and its hash, kernels, versions, device,
    vector, layer, coefficient, width.
    """
    return provenance(
        model,
        kernels=getattr(model, "kernels", None),
        device=str(getattr(getattr(model, "device", None), "name", "") or "") or None,
        d_model=model.config.d_model,
        vector_hash=digest(vector.direction),
        vector_method=vector.method,
        vector_norm=vector.norm,
        layer=vector.layer,
        coefficient=float(coefficient),
    )


def _array(values, what: str, shape, dtype=np.float64) -> np.ndarray:
    array = np.array(values, dtype=dtype, order="C")
    if array.shape != tuple(shape):
        raise ValueError(f"{what} must have the shape {list(shape)}, not {list(array.shape)}")
    bad = np.argwhere(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{what} must be finite: entry {tuple(map(int, bad[0]))} is {array[tuple(bad[0])]}"
            f" ({len(bad)} of {array.size} are not)"
        )
    array.flags.writeable = False
    return array


def _positions(values, i: int, n_edges: int) -> np.ndarray:
    dtype = np.asarray(values).dtype
    shape = np.shape(values)
    if len(shape) != 2:
        raise ValueError(f"positions[{i}] must be [{n_edges}, S], not {list(shape)}")
    return _array(
        values,
        f"positions[{i}]",
        (n_edges, shape[1]),
        np.float32 if dtype == np.float32 else np.float64,
    )


def _counts(values) -> np.ndarray:
    array = np.array(values)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array < 0).any():
        raise ValueError(
            f"weights must be whole numbers from 0 on, one per sample, not {array.dtype}"
            f" {list(array.shape)}"
        )
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array


def _plain(mapping, what: str) -> Mapping[str, Any]:
    try:
        return MappingProxyType(json.loads(json.dumps(dict(mapping or {}))))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} must be a mapping that JSON can hold: {error}") from None
