"""Scores and circuits for other tools: EAP-IG and networkx.

Both formats have no key/value heads, so an edge into one becomes an edge into each query head of
its group. A reader must not mix the two countings: `a5.h1<k>` names a key/value head here and a
query head there (docs/method.md section 10).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.types import Array, PathLike
from ..base.whole_files import write_whole
from .graph import INPUT_KINDS, Graph, graph_facts

if TYPE_CHECKING:
    from networkx import MultiDiGraph

    from ..patching.edge_scores import EdgeScores
    from .circuit import Circuit


def expanded(graph: Graph, edges: npt.ArrayLike) -> Iterator[tuple[int, str, str, str, float]]:
    """Edges with key and value heads expanded to the query heads that use them.

    edges: edge numbers. Yields (edge number, name of the upstream node, name of the node that the
    input belongs to, type of the input as in INPUT_KINDS, share); share is 1 over the number of
    query heads that the edge was expanded to. Names are those of `graph.node_names`, and "logits".
    """
    H, G, w = graph.n_heads, graph.n_kv_heads, graph.width
    group, names = H // G, graph.node_names
    for edge in np.asarray(edges).tolist():
        source, to = names[graph.upstream[edge]], int(graph.downstream[edge])
        kind = INPUT_KINDS[graph.input_kind[to]]
        layer, at = graph.layer + to // w, to % w
        if kind == "logits":
            yield edge, source, "logits", kind, 1.0
        elif kind == "mlp":
            yield edge, source, f"m{layer}", kind, 1.0
        elif kind == "q":
            yield edge, source, f"a{layer}.h{at}", kind, 1.0
        else:
            g = at - H - (G if kind == "v" else 0)
            for h in range(g * group, (g + 1) * group):
                yield edge, source, f"a{layer}.h{h}", kind, 1.0 / group


def eap_ig(
    scores: EdgeScores,
    circuit: Circuit | None = None,
    d_model: int | None = None,
    shared: str = "repeat",
) -> dict[str, Any]:
    """What `write_eap_ig` writes: {"cfg", "nodes", "edges", "vksteer"}."""
    graph, provenance = scores.graph, scores.provenance
    if shared not in ("repeat", "split"):
        raise ValueError(f"shared must be 'repeat' or 'split', not {shared!r}")
    if circuit is not None and circuit.graph != graph:
        raise ValueError(
            f"the circuit belongs to another graph: {circuit.graph!r}, the scores to {graph!r}"
        )
    d_model = (
        d_model
        or provenance.get("d_model")
        or (None if scores.dims is None else scores.dims.shape[1])
    )
    if d_model is None:
        raise ValueError(
            "the format needs the model's width, and these scores do not hold it: give d_model="
        )
    kept = set() if circuit is None else set(circuit.edges.tolist())
    config = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": graph.parallel,
        "d_model": int(d_model),
    }
    more = {
        "graph": graph_facts(graph),
        "settings": dict(scores.settings),
        "provenance": dict(provenance),
        "shared": shared,
        "input": (
            f"the residual stream entering layer {graph.layer}; nodes and edges below it were not"
            " scored"
        ),
    }
    return {
        "cfg": config,
        "nodes": _eap_ig_nodes(scores, kept),
        "edges": _eap_ig_edges(scores, kept, shared),
        "vksteer": more,
    }


def _renamed(name: str) -> str:
    """EAP-IG calls its source node "input"."""
    return "input" if name == "steer" else name


def _eap_ig_nodes(scores: EdgeScores, kept: set[int]) -> dict[str, dict[str, Any]]:
    graph = scores.graph
    marked: set[str] = set()
    if kept:
        marked = {"steer"} | {graph.node_names[i] for i in np.unique(graph.upstream[list(kept)])}
    nodes: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(graph.node_names):
        score = {} if scores.nodes is None else {"score": float(scores.nodes[i])}
        nodes[_renamed(name)] = {"in_graph": name in marked} | score
    nodes["logits"] = {"in_graph": True}
    return nodes


def _eap_ig_edges(scores: EdgeScores, kept: set[int], shared: str) -> dict[str, dict[str, Any]]:
    edges = {}
    for edge, source, to, kind, share in expanded(scores.graph, np.arange(scores.graph.n_edges)):
        name = f"{_renamed(source)}->{to}" + (f"<{kind}>" if kind in "qkv" else "")
        edges[name] = {
            "score": float(scores.edges[edge]) * (share if shared == "split" else 1.0),
            "in_graph": edge in kept,
        }
    return edges


def write_eap_ig(
    scores: EdgeScores,
    path: PathLike,
    circuit: Circuit | None = None,
    d_model: int | None = None,
    shared: str = "repeat",
) -> None:
    """Writes scores, and a circuit if one is given, as JSON that `Graph.from_json(path)` of
    hannamw/EAP-IG reads.

    Layers keep their numbers; `steer` becomes the node `input`, the only source. Nodes and edges
    below the steering layer are not in the file; EAP-IG then gives them score 0 and leaves them out
    of the circuit. `in_graph` is true for the circuit's edges and for the nodes that they start
    from. shared: what each query head of a group gets of the score of its key or value edge:
    "repeat" gives all of it, which keeps rankings; "split" gives an equal part, which keeps sums.
    d_model: the model's width, where the scores do not hold it. Raises ValueError for a circuit of
    another graph, an unknown `shared`, and a width that is not known.
    """
    write_whole(path, json.dumps(eap_ig(scores, circuit, d_model, shared)).encode())


def networkx_graph(graph: Graph, edges: npt.ArrayLike, scores: Array | None = None) -> MultiDiGraph:
    """A networkx.MultiDiGraph over "steer", heads, MLPs and "logits".

    edges: edge numbers. scores: float [E], or None. The key of an edge is the type of the input
    ("q", "k", "v", "mlp", "logits"); its attributes are `edge` (the number), `name` (ours) and
    `score`. Edges into a key or value head lead to every query head of its group, so that paths are
    those of the model; they share name and number. Nodes have `layer` and `kind` ("steer", "head",
    "mlp", "logits"). Only nodes that an edge touches, steer and logits are in the graph. Raises
    ImportError without networkx.
    """
    try:
        import networkx as nx
    except ImportError:
        raise ImportError("this needs networkx: pip install networkx") from None
    out = nx.MultiDiGraph(**graph_facts(graph))
    found = list(expanded(graph, edges))
    used = {"steer", "logits"} | {name for _, source, to, _, _ in found for name in (source, to)}
    for i, name in enumerate([*graph.node_names, "logits"]):
        if name in used:
            kind, layer = _kind_and_layer(graph, i)
            out.add_node(name, kind=kind, layer=layer)
    names = graph.edge_names
    for edge, source, to, kind, _ in found:
        more = {} if scores is None else {"score": float(scores[edge])}
        out.add_edge(source, to, key=kind, edge=edge, name=names[edge], **more)
    return out


def _kind_and_layer(graph: Graph, node: int) -> tuple[str, int]:
    """Of an upstream node by number; n_upstream stands for logits."""
    if node == 0:
        return "steer", graph.layer
    if node == graph.n_upstream:
        return "logits", graph.n_layers
    kind = "mlp" if node % (graph.n_heads + 1) == 0 else "head"
    return kind, graph.layer + (node - 1) // (graph.n_heads + 1)
