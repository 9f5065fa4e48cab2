"""Scores of edges, nodes and dimensions: what `vs.patching.attribute` returns
(docs/method.md section 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.checks import require_int
from ..base.display import html_of_markdown
from ..base.provenance import digest, fingerprint, kernel_names, provenance
from ..base.types import Array, Float64Array, PathLike
from ..circuits import search as circuit_search
from ..circuits.graph import INPUT_KINDS, Graph
from ..circuits.graph import graph as graph_of
from ..errors import ModelError
from . import edge_score_files
from .score_tables import (
    TopEdge,
    TopEdges,
    checked_array,
    checked_counts,
    checked_mapping,
    checked_positions,
    combine,
)

if TYPE_CHECKING:
    from networkx import MultiDiGraph

    from ..circuits.circuit import Circuit
    from ..inputs.vectors import SteeringVector
    from ..loading.config import Config
    from ..runtime.model import Model


class EdgeScores:
    """Scores of the edges, nodes and dimensions of a graph (docs/method.md section 5), positive
    where the clean value raises the metric.

    edges: float64 [E]. nodes: of upstream nodes, float64 [N], or None. dims: float32 [1, D] of
    steer or [N, D] of all upstream nodes, or None. These are sums over positions, with samples
    averaged by their metric positions.
    weights: metric positions of each sample, int64 [n_samples], 0 where the sample was left out.
    n_positions: their sum. positions: [E, S] of each sample, float32 or float64, or None.
    sample_edges, sample_nodes: float64 [n_samples, E] and [n_samples, N], or None. settings: steps,
    rule, metric, threshold, at, clean, capped, ... provenance: of model and vector
    (`score_provenance`). Both must fit into JSON. Arrays are read-only. Raises ValueError for wrong
    shapes and for numbers that are not finite.
    """

    def __init__(
        self,
        graph: Graph,
        edges: npt.ArrayLike,
        nodes: npt.ArrayLike | None = None,
        *,
        n_positions: int | None = None,
        weights: npt.ArrayLike | None = None,
        dims: npt.ArrayLike | None = None,
        positions: Sequence[npt.ArrayLike] | None = None,
        sample_edges: npt.ArrayLike | None = None,
        sample_nodes: npt.ArrayLike | None = None,
        settings: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        E, N = graph.n_edges, graph.n_upstream
        self.graph = graph
        self.edges = checked_array(edges, "edges", (E,))
        self.nodes = None if nodes is None else checked_array(nodes, "nodes", (N,))
        self.weights = None if weights is None else checked_counts(weights)
        n = None if self.weights is None else self.weights.size
        if n is None and (sample_edges is not None or sample_nodes is not None):
            raise ValueError("scores of each sample need their weights (metric positions), too")
        self.dims = None
        if dims is not None:
            shape = np.shape(dims)
            if len(shape) != 2 or shape[0] not in (1, N) or not shape[1]:
                raise ValueError(f"dims must be [1, D] or [{N}, D], not {list(shape)}")
            self.dims = checked_array(dims, "dims", shape, np.float32)
        self.sample_edges = (
            None if sample_edges is None else checked_array(sample_edges, "sample_edges", (n, E))
        )
        self.sample_nodes = (
            None if sample_nodes is None else checked_array(sample_nodes, "sample_nodes", (n, N))
        )
        self.positions = (
            None
            if positions is None
            else tuple(checked_positions(p, i, E) for i, p in enumerate(positions))
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
            checked_mapping(settings, "settings"),
            checked_mapping(provenance, "provenance"),
        )
        self._growths: dict[str, circuit_search.Growth] = {}

    def __repr__(self) -> str:
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

    def _repr_html_(self) -> str:
        return html_of_markdown(f"{self!r}\n{self.top(10)!r}")

    # -- names -------------------------------------------------------------------------------------

    @property
    def edge_names(self) -> tuple[str, ...]:
        """Names of the edges in graph order: "steer->a5.h0<q>", "a3.h1->m4", "m4->logits"."""
        return self.graph.edge_names

    @property
    def node_names(self) -> tuple[str, ...]:
        """Names of the upstream nodes: "steer", "a3.h1", "m4"."""
        return self.graph.node_names

    def __getitem__(self, name: str) -> float:
        """The score of one edge or upstream node by name. Raises KeyError for another name."""
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
        """The k edges of largest |score|, ties in graph order."""
        return self._top(self.edges, self.edge_names, k)

    def top_nodes(self, k: int = 20) -> TopEdges:
        """The k upstream nodes of largest |score|. Raises ValueError without scores of nodes."""
        if self.nodes is None:
            raise ValueError("these scores hold no nodes")
        return self._top(self.nodes, self.node_names, k)

    @staticmethod
    def _top(scores: Float64Array, names: Sequence[str], k: int) -> TopEdges:
        k, total = require_int(k, "k", 0), float(np.abs(scores).sum())
        return TopEdges(
            TopEdge(
                rank, names[i], float(scores[i]), abs(float(scores[i])) / total if total else 0.0
            )
            for rank, i in enumerate(circuit_search.ranking(scores)[:k], 1)
        )

    def distribution(self, n: int, method: str = "top") -> dict[str, float]:
        """Shares of the edges of `circuit(n, method)` by the type of the input they end in: {"q",
        "k", "v", "mlp", "logits"}.
        """
        return self.circuit(n, method).distribution()

    def matrix(self) -> Float64Array:
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

    def circuit(self, n: int, method: str = "pruned") -> Circuit:
        """A circuit of about n edges (docs/method.md section 5); ties in graph order.

        method: "pruned" takes the shortest prefix of the ranking by |score| of which at least n
        edges lie on a path from steer to logits, and keeps these edges. "top" takes the first n
        edges of the ranking without pruning. "greedy_backward" ("greedy_forward") grows from
        logits (from steer), always by the edge of largest |score| that touches the circuit so far,
        until pruning leaves at least n edges.
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
        """The scores of some of the samples, combined in the order of `indices`.

        Raises ValueError without scores of each sample (per_sample=True in `attribute`), for
        indices outside, and where none of the samples has a metric position.
        """
        if self.sample_edges is None or self.weights is None:
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
        by_node = None if self.sample_nodes is None else self.sample_nodes[indices]
        return EdgeScores(
            self.graph,
            combine(self.sample_edges[indices], weights),
            None if by_node is None else combine(by_node, weights),
            weights=weights,
            sample_edges=self.sample_edges[indices],
            sample_nodes=by_node,
            positions=None if self.positions is None else [self.positions[i] for i in indices],
            settings={
                name: value for name, value in self.settings.items() if name != "samples_hash"
            },
            provenance=self.provenance,
        )

    @classmethod
    def merge(cls, parts: Sequence[EdgeScores]) -> EdgeScores:
        """Scores of different samples as one, averaged by metric positions in list order.

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
        edges, nodes, dims, own, by_edge, by_node = (
            [getattr(p, name) for p in parts]
            for name in ("edges", "nodes", "dims", "weights", "sample_edges", "sample_nodes")
        )

        def mean(tables: list[Array | None]) -> Array | None:
            found = [t for t in tables if t is not None]
            return combine(found, weights) if len(found) == len(tables) else None

        def joined(tables: list[Array | None]) -> Array | None:
            found = [t for t in tables if t is not None]
            return np.concatenate(found) if len(found) == len(tables) else None

        apart = joined(own) is not None  # every part knows its samples
        positions = [x for p in parts for x in p.positions or ()]
        return cls(
            parts[0].graph,
            combine(edges, weights),
            mean(nodes),
            n_positions=int(weights.sum()),
            weights=joined(own),
            dims=mean(dims) if len({np.shape(d) for d in dims}) == 1 else None,
            positions=positions if apart and all(p.positions is not None for p in parts) else None,
            sample_edges=joined(by_edge) if apart else None,
            sample_nodes=joined(by_node) if apart else None,
            settings={
                name: value for name, value in parts[0].settings.items() if name not in _OF_SAMPLES
            },
            provenance=parts[0].provenance,
        )

    def check_same(self, other: EdgeScores) -> None:
        """Raises ValueError naming the first difference where two scores cannot be combined: graph,
        model, vector, coefficient or settings.
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

    def check(
        self, model: Model | Config, layer: int | None = None, vector: SteeringVector | None = None
    ) -> None:
        """Raises ValueError where the scores are not those of `model` (a Model or Config) steered
        at `layer` (default: the graph's), or not those of `vector` where one is given.
        """
        layer = self.graph.layer if layer is None else layer
        needed = graph_of(model, layer)
        if self.graph != needed:
            raise ValueError(
                f"the scores belong to another graph: {self.graph!r}; this model steered at layer"
                f" {layer} has {needed!r}"
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

    def save(self, path: PathLike) -> None:
        """Writes one safetensors file with settings, provenance and a checksum over everything; an
        existing file is replaced in one step.
        """
        edge_score_files.save(self, path)

    @classmethod
    def load(cls, path: PathLike, model: Model | Config | None = None) -> EdgeScores:
        """Reads what `save` wrote. model: a Model or Config that the scores must belong to.

        Raises ModelError for a file that was cut short or edited or holds no scores, ValueError for
        scores of another model, OSError.
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
        self,
        path: PathLike,
        circuit: Circuit | None = None,
        *,
        d_model: int | None = None,
        shared: str = "repeat",
    ) -> None:
        """Writes the file that `Graph.from_json` of hannamw/EAP-IG reads; see `write_eap_ig` in
        circuits/exports.py.

        circuit: its edges and nodes are marked `in_graph`. d_model: the model's width, where
        neither provenance nor dims hold it. shared: "repeat" or "split".
        """
        from ..circuits.exports import write_eap_ig

        write_eap_ig(self, path, circuit, d_model, shared)

    def to_networkx(self) -> MultiDiGraph:
        """A networkx MultiDiGraph of all edges with their scores; see `networkx_graph` in
        circuits/exports.py. Raises ImportError without networkx.
        """
        from ..circuits.exports import networkx_graph

        return networkx_graph(self.graph, np.arange(self.graph.n_edges), self.edges)


#: Of provenance: what must agree for scores to be combined, and what a circuit keeps.
_IDENTITY = (
    "model",
    "architecture",
    "model_hash",
    "config_overrides",
    "template_options",
    "vector_hash",
    "layer",
    "coefficient",
)
#: Settings that belong to the samples.
_OF_SAMPLES = {"samples_hash", "n_samples", "dropped", "left_out"}


def score_provenance(model: Model, vector: SteeringVector, coefficient: float) -> dict[str, Any]:
    """Where scores come from: model and its hash, kernels, versions, device, vector, layer,
    coefficient and width.
    """
    return provenance(
        model,
        kernels=kernel_names(model),
        device=str(getattr(getattr(model, "device", None), "name", "") or "") or None,
        d_model=model.config.d_model,
        vector_hash=digest(vector.direction),
        vector_method=vector.method,
        vector_norm=vector.norm,
        layer=vector.layer,
        coefficient=float(coefficient),
    )
