"""Circuits: sets of edges of a graph, their algebra, files and pictures, and how much of the effect
of steering they carry (docs/method.md section 5).

circuits/search.py finds them, circuits/faithfulness.py judges them by size, circuits/runs.py runs
the model under them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..base.display import html_of_markdown, html_table
from ..base.json_files import load_json, save_json
from ..base.types import Array, BoolArray, IntArray, PathLike, ProgressLike
from ..errors import ModelError
from ..inputs.samples import check_samples
from . import runs as circuit_runs
from . import search as circuit_search
from .curve import FaithfulnessCurve
from .decoding import CircuitBatch, RowsEdits, check_rows
from .graph import INPUT_KINDS, Graph, graph_facts, graph_from_facts
from .graph import graph as graph_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from networkx import MultiDiGraph

    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..loading.config import Config
    from ..patching.edge_scores import EdgeScores
    from ..runtime.model import Model

#: What `evaluate` can measure (docs/method.md section 5).
METRICS = ("logit_diff", "logit_diff_per_sample", "kl", "directional_kl", "match", "logprob")
FORMAT = "vksteer.circuit"
#: Most bytes of a circuit's file; a million edges take about 30 MB.
MAX_BYTES = 1 << 28

#: Edges by number or name, or a mask of them.
Edges: TypeAlias = "Array | Iterable[int] | Iterable[str]"


class Circuit:
    """An immutable set of edges of a Graph; see the operators &, |, -, ^, <= and >=.

    edges: edge numbers, names ("steer->m5"), or a bool mask [E]; the attribute holds ascending
    numbers, int64, read-only. meta: where the circuit came from, a mapping that JSON can hold.
    curve: the FaithfulnessCurve that it was chosen from, or None. Raises ValueError for numbers
    outside the graph and for masks of another length, KeyError for names that are no edge.
    """

    def __init__(
        self,
        graph: Graph,
        edges: Edges = (),
        *,
        meta: Mapping[str, Any] | None = None,
        curve: FaithfulnessCurve | None = None,
    ) -> None:
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

    def __repr__(self) -> str:
        share = 100 * len(self) / self.graph.n_edges
        how = f", {self.meta['method']}" if self.meta.get("method") else ""
        return (
            f"Circuit({len(self)} of {self.graph.n_edges} edges, {share:.3g} %{how}, layers"
            f" {self.graph.layer} to {self.graph.n_layers - 1})"
        )

    def _repr_html_(self) -> str:
        shares = [f"{100 * share:.1f} %" for share in self.distribution().values()]
        inputs = html_table(("edges that end in", *self.distribution()), [("share", *shares)])
        return html_of_markdown(repr(self)) + inputs

    # -- a set -------------------------------------------------------------------------------------

    @property
    def edge_names(self) -> frozenset[str]:
        """The edges by name: "steer->a5.h0<q>", "m4->logits"."""
        return frozenset(self)

    @property
    def mask(self) -> BoolArray:
        """The edges as a mask: bool [E], a new array."""
        mask = np.zeros(self.graph.n_edges, bool)
        mask[self.edges] = True
        return mask

    def __len__(self) -> int:
        return self.edges.size

    def __iter__(self) -> Iterator[str]:
        """Names in graph order."""
        names = self.graph.edge_names
        return (names[i] for i in self.edges)

    def contains(self, edge: str | int | Circuit) -> bool:
        """Whether an edge (name or number), or every edge of another circuit, is in it. Raises
        KeyError for a name that is no edge.
        """
        if isinstance(edge, Circuit):
            return edge <= self
        number = int(self.graph.find([edge])[0]) if isinstance(edge, str) else int(edge)
        at = np.searchsorted(self.edges, number)
        return bool(at < self.edges.size and self.edges[at] == number)

    def __contains__(self, edge: object) -> bool:
        return self.contains(edge)  # type: ignore[arg-type]  # `in` takes any object

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Circuit)
            and self.graph == other.graph
            and np.array_equal(self.edges, other.edges)
        )

    def __hash__(self) -> int:
        return hash((self.graph, self.edges.tobytes()))

    def _theirs(self, other: Circuit) -> IntArray:
        if self.graph != other.graph:
            raise ValueError(
                f"two circuits of different graphs: {self.graph!r} and {other.graph!r}"
            )
        return other.edges

    def _with(
        self, other: Circuit, operation: Callable[[IntArray, IntArray], IntArray], sign: str
    ) -> Circuit:
        if not isinstance(other, Circuit):
            return NotImplemented
        mine, theirs = (c.meta.get("method", "set") for c in (self, other))
        return Circuit(
            self.graph,
            operation(self.edges, self._theirs(other)),
            meta={"method": f"{mine} {sign} {theirs}"},
        )

    def __and__(self, other: Circuit) -> Circuit:
        return self._with(other, np.intersect1d, "&")

    def __or__(self, other: Circuit) -> Circuit:
        return self._with(other, np.union1d, "|")

    def __sub__(self, other: Circuit) -> Circuit:
        return self._with(other, np.setdiff1d, "-")

    def __xor__(self, other: Circuit) -> Circuit:
        return self._with(other, np.setxor1d, "^")

    def __le__(self, other: Circuit) -> bool:
        if not isinstance(other, Circuit):
            return NotImplemented
        return bool(np.isin(self.edges, self._theirs(other)).all())

    def __ge__(self, other: Circuit) -> bool:
        return other <= self if isinstance(other, Circuit) else NotImplemented

    def complement(self) -> Circuit:
        """All other edges of the graph."""
        return Circuit(
            self.graph,
            ~self.mask,
            meta={**self.meta, "method": f"complement of {self.meta.get('method', 'set')}"},
        )

    def pruned(self) -> Circuit:
        """The circuit of its edges that lie on a path from steer to logits made of its edges."""
        return Circuit(self.graph, self.graph.on_paths(self.mask), meta=self.meta)

    def overlap(self, other: Circuit) -> float:
        """|C1 n C2| / min(|C1|, |C2|), from 0 to 1 (docs/method.md section 5). Raises ValueError
        for circuits of different graphs and for an empty one.
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
        """`counts` as shares that sum to 1; all are 0 for an empty circuit."""
        return {name: n / max(len(self), 1) for name, n in self.counts().items()}

    @property
    def node_names(self) -> tuple[str, ...]:
        """The upstream nodes from which its edges start, in graph order."""
        names = self.graph.node_names
        return tuple(names[i] for i in np.unique(self.graph.upstream[self.edges]))

    # -- files, pictures, other tools --------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Writes JSON with the graph's sizes, the edges by name, meta, the curve if there is one,
        and a checksum; an existing file is replaced in one step.
        """
        g = self.graph
        content = {
            "graph": graph_facts(g),
            "n_edges": g.n_edges,
            "meta": dict(self.meta),
            "curve": None if self.curve is None else self.curve.to_dict(),
            "edges": list(self),
        }
        save_json(path, content, format=FORMAT, indent=1)

    @classmethod
    def load(cls, path: PathLike, graph: Graph | None = None) -> Circuit:
        """Reads what `save` wrote. graph: the graph that the circuit must belong to, for example
        vs.patching.graph(model, layer).

        Raises ModelError for a file that cannot be read, was cut short or edited, or holds no
        circuit; ValueError for a circuit of another graph.
        """
        content = load_json(path, format=FORMAT, what="circuit", limit=MAX_BYTES)
        try:
            mine = graph_from_facts(content["graph"])
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
            raise ValueError(f"{path} holds a circuit of another graph: {mine!r}, not {graph!r}")
        return circuit

    def plot(
        self,
        path: PathLike | None = None,
        *,
        scores: EdgeScores | npt.ArrayLike | None = None,
        title: str | None = None,
    ) -> Figure:
        """Layers downward, heads across, MLPs at the right, edges coloured by the input they end
        in: a matplotlib Figure, saved to `path` if one is given.

        scores: an EdgeScores, or float [E]; lines are then the wider, the larger |score|. Raises
        ImportError without matplotlib, ValueError for scores of another graph.
        """
        from .plot import draw

        return draw(self, path, scores=scores, title=title)

    def to_networkx(self) -> MultiDiGraph:
        """A networkx MultiDiGraph over steer, heads, MLPs and logits; circuits/exports.py describes
        its attributes. Raises ImportError without networkx.
        """
        from .exports import networkx_graph

        return networkx_graph(self.graph, self.edges)

    # -- under the model ---------------------------------------------------------------------------

    def check(self, model: Model | Config, layer: int) -> None:
        """Raises ValueError where the circuit does not belong to the graph of `model` (a Model or
        Config) steered at `layer`.
        """
        needed = graph_of(model, layer)
        if self.graph != needed:
            raise ValueError(
                f"the circuit belongs to another graph: {self.graph!r}; this model steered at layer"
                f" {layer} has {needed!r}"
            )

    def _check_rows(
        self,
        model: Model,
        rows_edits: RowsEdits,
        freeze: str | None,
        ablate: str | None,
        sites: Sequence[str],
    ) -> None:
        """Raises ValueError where rows with these edits cannot be decoded under this circuit."""
        check_rows(self, model, rows_edits, freeze, ablate, sites)

    def _decoding_batch(
        self, model: Model, prompt_lengths: Sequence[int], edits: tuple[RowsEdits, bool]
    ) -> CircuitBatch:
        """The batch with which rows are decoded under this circuit, with the interface of Batch."""
        return CircuitBatch(self, model, prompt_lengths, edits)

    def evaluate(
        self,
        model: Model,
        samples: Sequence[Sample],
        vector: SteeringVector,
        coefficient: float,
        metrics: str | Sequence[str] = ("logit_diff",),
        *,
        progress: ProgressLike = True,
        **options: Any,
    ) -> dict[str, Any]:
        """How much of the effect of steering remains when only the edges of this circuit carry it
        (docs/method.md section 5). `vs.circuits.evaluate` measures many circuits over one base
        pass.

        samples: Samples. vector: a SteeringVector of the graph's layer, not necessarily the one
        that the circuit was found with. coefficient: what the vector is multiplied by. metrics: one
        or several of "logit_diff" (default), "logit_diff_per_sample", "kl", "directional_kl",
        "match" and "logprob". progress: True, False or callable(done, total). options: clean
        ("steered" or "base": the run that kl and match compare with, and the sign of logit_diff;
        default "steered"), threshold (of directional_kl, in nats; default 0), capped (logits after
        the final softcap; default True) and max_memory (bytes of device memory; default a share of
        what is free).
        Returns {metric: result} with the floats .faithfulness = (value - empty) / (full - empty),
        .value, .full and .empty, and .per_sample {"value", "full", "empty", "weight"}, float64
        [n_samples] each.
        Raises ValueError before any work for another model's graph, samples that do not fit,
        unknown metrics, a vector of another width or layer, and a max_memory that is too small.
        """
        return evaluate(
            [self], model, samples, vector, coefficient, metrics, progress=progress, **options
        )[0]


def _numbers(graph: Graph, edges: Edges) -> IntArray:
    """Ascending edge numbers without repetition, int64, a new array."""
    if isinstance(edges, Circuit):
        raise ValueError("a circuit is made of edges, not of a circuit: take its .edges")
    if isinstance(edges, str) or not isinstance(edges, (Iterable, np.ndarray)):
        raise ValueError(f"edges must be numbers, names or a mask of edges, not {edges!r}")
    listed: Any = edges if isinstance(edges, np.ndarray) else list(edges)
    if len(listed) and all(isinstance(e, str) for e in listed):
        return np.unique(graph.find(listed))
    array = np.asarray(listed)
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
    """A random circuit: the shortest prefix of the shuffled edges of which at least n edges remain
    after pruning. The same seed gives the same circuit.

    Raises ValueError for n outside 0 to the number of edges.
    """
    if not isinstance(graph, Graph):
        raise ValueError(f"random takes a Graph (vs.patching.graph(model, layer)), not {graph!r}")
    n = circuit_search.check_size(graph, n)
    growth = circuit_search.Growth(graph, circuit_search.random_order(graph, seed))
    return Circuit(graph, growth.edges(n), meta={"method": "random", "n": n, "seed": seed})


def evaluate(
    circuits: Circuit | Sequence[Circuit],
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    metrics: str | Sequence[str] = ("logit_diff",),
    *,
    progress: ProgressLike = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """How much of the effect of steering remains when only the edges of a circuit carry it, for
    many circuits over one base pass (docs/method.md section 5).

    circuits: circuits of the graph of `model` at the vector's layer; the vector need not be the one
    they were found with. samples: list of Sample. metrics: of METRICS. options: clean, threshold,
    capped and max_memory, see circuits/runs.py.
    Returns one dict for each circuit: {metric: result} with .faithfulness = (value - empty) /
    (full - empty), .value m(C), .full m(M), .empty m(0), and .per_sample {"value", "full", "empty",
    "weight"}, float64 [n_samples] each.
    Raises ValueError before any work for circuits of another graph, samples that do not fit,
    unknown metrics, and a vector of another width or layer.
    """
    circuits = [circuits] if isinstance(circuits, Circuit) else list(circuits)
    vector.check(model, output=False)
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
    """Pairwise overlaps of named circuits as a Markdown table, with their sizes; "-" where two
    circuits belong to different graphs or one is empty.
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
