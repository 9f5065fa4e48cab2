"""Circuits: sets of edges of a graph, their algebra, files and pictures, and how much of steering's
effect they carry (method.md section 5).

`circuit_search.py` finds them, `faithfulness.py` judges them by size, `circuit_runs.py` runs
the model under them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from ..base.json_files import load_json, save_json
from ..errors import ModelError
from ..inputs.samples import check_samples
from . import runs as circuit_runs
from . import search as circuit_search
from .curve import FaithfulnessCurve
from .decoding import CircuitBatch, check_rows
from .graph import INPUT_KINDS, Graph
from .graph import graph as graph_of

#: What `evaluate` can measure (method.md section 5).
METRICS = ("logit_diff", "logit_diff_per_sample", "kl", "directional_kl", "match", "logprob")
FORMAT = "vksteer.circuit"
#: A circuit of a million edges has about 30 MB.
MAX_BYTES = 1 << 28


class Circuit:
    """A set of edges of a Graph; does not change once it is made.

    edges: numbers, names ("steer->m5"), or a bool mask [E] on the way in; as an attribute ascending
    int64, read-only. meta: where it came from, a mapping that JSON can hold. curve: the
    FaithfulnessCurve that it was chosen from, or None. Raises ValueError for numbers outside the
    graph and masks of another length, KeyError for names that are no edge.
    """

    def __init__(
        self, graph: Graph, edges=(), *, meta: Mapping[str, Any] | None = None, curve=None
    ):
        if not isinstance(graph, Graph):
            raise ValueError(
                f"a circuit belongs to a Graph (vs.patching.graph(model, layer)), not to {graph!r}"
            )
        self.graph = graph
        self.edges = _numbers(graph, edges)
        self.edges.flags.writeable = False
        try:
            self.meta = MappingProxyType(json.loads(json.dumps(dict(meta or {}))))
        except (TypeError, ValueError) as error:
            raise ValueError(f"meta must be a mapping that JSON can hold: {error}") from None
        self.curve: FaithfulnessCurve | None = curve

    def __repr__(self):
        share = 100 * len(self) / self.graph.n_edges
        how = f", {self.meta['method']}" if self.meta.get("method") else ""
        return (
            f"Circuit({len(self)} of {self.graph.n_edges} edges, {share:.3g} %{how}, layers"
            f" {self.graph.layer} to {self.graph.n_layers - 1})"
        )

    # -- a set -------------------------------------------------------------------------------------

    @property
    def edge_names(self) -> frozenset[str]:
        """The edges by name: "steer->a5.h0<q>", "m4->logits"."""
        return frozenset(self)

    @property
    def mask(self) -> np.ndarray:
        """Bool [E], a new array."""
        mask = np.zeros(self.graph.n_edges, bool)
        mask[self.edges] = True
        return mask

    def __len__(self):
        return self.edges.size

    def __iter__(self) -> Iterator[str]:
        """Names in graph order."""
        names = self.graph.edge_names
        return (names[i] for i in self.edges)

    def contains(self, edge) -> bool:
        """Is an edge (name or number) in it, or every edge of another circuit? KeyError for a
        name that is no edge.
        """
        if isinstance(edge, Circuit):
            return edge <= self
        number = int(self.graph.find([edge])[0]) if isinstance(edge, str) else int(edge)
        at = np.searchsorted(self.edges, number)
        return bool(at < self.edges.size and self.edges[at] == number)

    __contains__ = contains

    def __eq__(self, other):
        return (
            isinstance(other, Circuit)
            and self.graph == other.graph
            and np.array_equal(self.edges, other.edges)
        )

    def __hash__(self):
        return hash((self.graph, self.edges.tobytes()))

    def _theirs(self, other) -> np.ndarray:
        if self.graph != other.graph:
            raise ValueError(
                f"two circuits of different graphs: {self.graph!r} and {other.graph!r}"
            )
        return other.edges

    def _with(self, other, operation, sign):
        if not isinstance(other, Circuit):
            return NotImplemented
        return Circuit(
            self.graph,
            operation(self.edges, self._theirs(other)),
            meta={
                "method": (
                    f"{self.meta.get('method', 'set')} {sign} {other.meta.get('method', 'set')}"
                )
            },
        )

    def __and__(self, other):
        return self._with(other, np.intersect1d, "&")

    def __or__(self, other):
        return self._with(other, np.union1d, "|")

    def __sub__(self, other):
        return self._with(other, np.setdiff1d, "-")

    def __xor__(self, other):
        return self._with(other, np.setxor1d, "^")

    def __le__(self, other):
        return (
            bool(np.isin(self.edges, self._theirs(other)).all())
            if isinstance(other, Circuit)
            else NotImplemented
        )

    def __ge__(self, other):
        return other <= self if isinstance(other, Circuit) else NotImplemented

    def complement(self) -> Circuit:
        """All other edges of the graph."""
        return Circuit(
            self.graph,
            ~self.mask,
            meta={**self.meta, "method": f"complement of {self.meta.get('method', 'set')}"},
        )

    def pruned(self) -> Circuit:
        """Its edges that lie on a path from steer to logits inside it."""
        return Circuit(self.graph, self.graph.on_paths(self.mask), meta=self.meta)

    def overlap(self, other: Circuit) -> float:
        """|both| / the smaller one's size, from 0 to 1. ValueError for circuits of different
        graphs, or an empty one.
        """
        theirs = self._theirs(other)
        if not len(self) or not theirs.size:
            raise ValueError("the overlap with an empty circuit is undefined")
        return float(
            np.intersect1d(self.edges, theirs, assume_unique=True).size
            / min(len(self), theirs.size)
        )

    def counts(self) -> dict[str, int]:
        """Edges by the type of the input they end in: {"q", "k", "v", "mlp", "logits"}."""
        kinds = np.bincount(
            self.graph.input_kind[self.graph.downstream[self.edges]], minlength=len(INPUT_KINDS)
        )
        return {name: int(n) for name, n in zip(INPUT_KINDS, kinds)}

    def distribution(self) -> dict[str, float]:
        """The same as shares that sum to 1 (all 0 for an empty circuit)."""
        return {name: n / max(len(self), 1) for name, n in self.counts().items()}

    @property
    def node_names(self) -> tuple[str, ...]:
        """Upstream nodes from which an edge of it starts, in graph order."""
        names = self.graph.node_names
        return tuple(names[i] for i in np.unique(self.graph.upstream[self.edges]))

    # -- files, pictures, other tools --------------------------------------------------------------

    def save(self, path) -> None:
        """JSON with the graph's identity, the edges by name, meta, the curve if there is one, and a
        checksum; an existing file is replaced whole.
        """
        g = self.graph
        content = {
            "graph": dict(zip(_SIZES, g._key())),
            "n_edges": g.n_edges,
            "meta": dict(self.meta),
            "curve": None if self.curve is None else self.curve.to_dict(),
            "edges": list(self),
        }
        save_json(path, content, format=FORMAT, indent=1)

    @classmethod
    def load(cls, path, graph: Graph | None = None) -> Circuit:
        """Read what `save` wrote. graph: the one it must belong to, for example
        vs.patching.graph(model, layer).

        Raises ModelError for a file that cannot be read, was cut short or edited, or is no circuit;
        ValueError for one of another graph.
        """
        content = load_json(path, format=FORMAT, what="circuit", limit=MAX_BYTES)
        try:
            sizes = [content["graph"][name] for name in _SIZES]
            if not all(type(n) is int and 0 <= n <= 1 << 12 for n in sizes):
                raise ValueError(f"graph sizes {sizes}")
            mine = Graph(*sizes)
            if len(set(content["edges"])) != len(content["edges"]):
                raise ValueError("an edge occurs twice")
            curve = content["curve"]
            circuit = cls(
                mine,
                mine.find(content["edges"]),
                meta=content["meta"],
                curve=None if curve is None else FaithfulnessCurve.from_dict(curve),
            )
        except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
            raise ModelError(
                f"{path}: no circuit of vksteer: {error.args[0] if error.args else error!r}"
            ) from None
        if graph is not None and graph != mine:
            raise ValueError(f"{path} holds a circuit of another graph: {mine!r}, wanted {graph!r}")
        return circuit

    def plot(self, path=None, *, scores=None, title: str | None = None):
        """Layers down, heads across, MLPs at the right; edges coloured by the input they end in: a
        matplotlib Figure, saved to `path` if one is given.

        scores: an EdgeScores or float [E]; lines are then as strong as |score|. Needs matplotlib.
        """
        from .plot import draw

        return draw(self, path, scores=scores, title=title)

    def to_networkx(self):
        """A networkx MultiDiGraph over steer, heads, MLPs and logits
        (`circuit_exports.networkx_graph`). Needs networkx.
        """
        from .exports import networkx_graph

        return networkx_graph(self.graph, self.edges)

    # -- under the model ---------------------------------------------------------------------------

    def check(self, model, layer: int) -> None:
        """ValueError where it does not belong to the graph of `model` (a Model or
        Config) steered at `layer`.
        """
        wanted = graph_of(model, layer)
        if self.graph != wanted:
            raise ValueError(
                f"the circuit belongs to another graph: {self.graph!r}; this model steered at layer"
                f" {layer} has {wanted!r}"
            )

    def check_rows(self, model, rows_edits, freeze, ablate, sites) -> None:
        """ValueError, before any work, where rows with these edits cannot be
        decoded under this circuit.
        """
        check_rows(self, model, rows_edits, freeze, ablate, sites)

    def decoding_batch(self, model, prompt_lengths, edits) -> CircuitBatch:
        """What takes a Batch's place while rows are decoded under this circuit."""
        return CircuitBatch(self, model, prompt_lengths, edits)

    def evaluate(
        self,
        model,
        samples,
        vector,
        coefficient,
        metrics=("logit_diff",),
        *,
        progress=True,
        **options,
    ) -> dict[str, Any]:
        """Metric -> result with .faithfulness .value .full .empty; see `vs.circuits.evaluate`,
        which takes many circuits at once.
        """
        return evaluate(
            [self], model, samples, vector, coefficient, metrics, progress=progress, **options
        )[0]


_SIZES = ("n_layers", "n_heads", "n_kv_heads", "layer")


def _numbers(graph: Graph, edges) -> np.ndarray:
    """Ascending int64 without repetition, a new array."""
    if isinstance(edges, Circuit):
        raise ValueError("a circuit is made of edges, not of a circuit: take its .edges")
    if isinstance(edges, str) or not isinstance(edges, (Iterable, np.ndarray)):
        raise ValueError(f"edges must be numbers, names or a mask of edges, not {edges!r}")
    edges = edges if isinstance(edges, np.ndarray) else list(edges)
    if len(edges) and all(isinstance(e, str) for e in edges):
        return np.unique(graph.find(edges))
    array = np.asarray(edges)
    if array.size == 0 and array.dtype != bool:
        return np.empty(0, np.int64)
    if array.dtype == bool:
        if array.shape != (graph.n_edges,):
            raise ValueError(f"a mask of {array.shape} for a graph of {graph.n_edges} edges")
        return np.flatnonzero(array)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"edges must be numbers, names or a mask of edges, not {array.dtype} {array.shape}"
        )
    outside = array[(array < 0) | (array >= graph.n_edges)]
    if outside.size:
        raise ValueError(f"edge {outside[0]} is not one of 0 to {graph.n_edges - 1}")
    return np.unique(array.astype(np.int64))


# -- functions -------------------------------------------------------------------------------------


def random(graph: Graph, n: int, seed: int = 0) -> Circuit:
    """A random circuit: shuffled edges until at least n survive pruning; the
    same for the same seed.

    Raises ValueError for n outside 0 to the number of edges.
    """
    if not isinstance(graph, Graph):
        raise ValueError(f"random takes a Graph (vs.patching.graph(model, layer)), not {graph!r}")
    n = circuit_search.check_size(graph, n)
    growth = circuit_search.Growth(graph, circuit_search.random_order(graph, seed))
    return Circuit(graph, growth.edges(n), meta={"method": "random", "n": n, "seed": seed})


def evaluate(
    circuits,
    model,
    samples,
    vector,
    coefficient,
    metrics=("logit_diff",),
    *,
    progress=True,
    **options,
) -> list[dict[str, Any]]:
    """Many circuits over one base pass: how much of what steering does is left when only a
    circuit's edges carry it (method.md section 5).

    circuits: a list of Circuit of the graph of `model` at the vector's layer (the vector need not
    be the one they were found with). samples: list of Sample. metrics: of METRICS. options: what
    `circuit_runs.evaluate` takes besides.
    Returns one dict per circuit: metric -> result with .faithfulness = (value - empty) / (full -
    empty), .value m(C), .full m(M), .empty m(0), and .per_sample {"value", "full", "empty",
    "weight"}, float64 [n_samples] each.
    Raises ValueError before any work for circuits of another graph, samples that do not fit,
    unknown metrics, a vector of another width or layer.
    """
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    vector.check(model)
    for i, circuit in enumerate(circuits):
        if not isinstance(circuit, Circuit):
            raise ValueError(f"circuits[{i}] is {circuit!r}, not a Circuit")
        circuit.check(model, vector.layer)
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    for metric in metrics:
        if metric not in METRICS:
            raise ValueError(f"metric {metric!r} is not one of {', '.join(METRICS)}")
    samples = check_samples(model, samples)
    if not circuits:
        return []
    return circuit_runs.evaluate(
        circuits, model, samples, vector, coefficient, metrics=metrics, progress=progress, **options
    )


def overlaps(circuits: Mapping[str, Circuit]) -> str:
    """Pairwise overlaps of named circuits as a Markdown table, sizes beside them; "-" where two
    belong to different graphs or one is empty.
    """
    names = list(circuits)
    lines = [
        "| circuit | edges | " + " | ".join(names) + " |",
        "|:---|---:|" + "---:|" * len(names),
    ]
    for a in names:
        cells = []
        for b in names:
            comparable = (
                circuits[a].graph == circuits[b].graph and len(circuits[a]) and len(circuits[b])
            )
            cells.append(f"{circuits[a].overlap(circuits[b]):.2f}" if comparable else "-")
        lines.append(f"| {a} | {len(circuits[a])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
