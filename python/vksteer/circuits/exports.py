"""Scores and circuits for other tools. Both formats know no key/value heads: an edge into one
becomes an edge into each query head of its group.

A reader must not mix the two ways of counting: `a5.h1<k>` is a key/value head here
and a query head there.
"""

from __future__ import annotations

import json

import numpy as np

from ..base.whole_files import write_whole
from .graph import INPUT_KINDS, Graph


def expanded(graph: Graph, edges):
    """(edge number, upstream node's name, downstream node's name, "q" | "k" | "v" | "mlp" |
    "logits", share) for every edge, key and value heads expanded to the query heads that use
    them; share is 1 over the heads that the edge was expanded to. Names as in
    `graph.node_names`, and "logits".
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


def eap_ig(scores, circuit=None, d_model: int | None = None, shared: str = "repeat") -> dict:
    """What EAP-IG's `Graph.from_json` reads: {"cfg", "nodes", "edges"}; see `write_eap_ig`."""
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
    rename = lambda name: "input" if name == "steer" else name
    marked = (
        {"steer"} | {graph.node_names[i] for i in np.unique(graph.upstream[list(kept)])}
        if kept
        else set()
    )
    nodes = {}
    for i, name in enumerate(graph.node_names):
        nodes[rename(name)] = {"in_graph": name in marked} | (
            {} if scores.nodes is None else {"score": float(scores.nodes[i])}
        )
    nodes["logits"] = {"in_graph": True}
    edges = {}
    for edge, source, to, kind, share in expanded(graph, np.arange(graph.n_edges)):
        name = f"{rename(source)}->{to}" + (f"<{kind}>" if kind in "qkv" else "")
        edges[name] = {
            "score": float(scores.edges[edge]) * (share if shared == "split" else 1.0),
            "in_graph": edge in kept,
        }
    config = {
        "n_layers": graph.n_layers,
        "n_heads": graph.n_heads,
        "parallel_attn_mlp": False,
        "d_model": int(d_model),
    }
    more = {
        "graph": dict(zip(("n_layers", "n_heads", "n_kv_heads", "layer"), graph._key())),
        "settings": dict(scores.settings),
        "provenance": dict(provenance),
        "shared": shared,
        "input": (
            f"the residual stream entering layer {graph.layer}; nodes and edges below it were not"
            " scored"
        ),
    }
    return {"cfg": config, "nodes": nodes, "edges": edges, "vksteer": more}


def write_eap_ig(
    scores, path, circuit=None, d_model: int | None = None, shared: str = "repeat"
) -> None:
    """Scores (and a circuit) as the JSON of hannamw/EAP-IG's Graph:
    `Graph.from_json(path)` reads it.

    Layers keep their numbers; `steer` becomes their `input`, which is their only source. Nodes and
    edges below the steering layer are not in the file (theirs have score 0 and are outside then).
    `in_graph` is true for the circuit's edges and for the nodes that they start from. shared: what
    each query head of a group gets of the score of its key or value edge: "repeat" all of it, so
    that rankings stay, "split" an equal part, so that sums stay.
    Raises ValueError for a circuit of another graph, and where the model's width is not known.
    """
    write_whole(path, json.dumps(eap_ig(scores, circuit, d_model, shared)).encode())


def networkx_graph(graph: Graph, edges, scores=None):
    """A networkx.MultiDiGraph over "steer", heads, MLPs and "logits".

    An edge's key is the type of the input ("q", "k", "v", "mlp", "logits"); its attributes are
    `edge` (the number), `name` (ours), and `score`. Edges into a key or value head lead to every
    query head of its group, so that paths are those of the model; they share name and number. Nodes
    have `layer` and `kind` ("steer", "head", "mlp", "logits"). Only nodes that an edge touches,
    steer and logits are in it.
    """
    try:
        import networkx
    except ImportError:
        raise ImportError("this needs networkx: pip install networkx") from None
    out = networkx.MultiDiGraph(
        **dict(zip(("n_layers", "n_heads", "n_kv_heads", "layer"), graph._key()))
    )
    used = {"steer", "logits"}
    found = list(expanded(graph, edges))
    for _, source, to, _, _ in found:
        used |= {source, to}
    H = graph.n_heads
    for i, name in enumerate([*graph.node_names, "logits"]):
        if name in used:
            kind = (
                "steer"
                if i == 0
                else "logits"
                if i == graph.n_upstream
                else "mlp"
                if i % (H + 1) == 0
                else "head"
            )
            out.add_node(
                name,
                kind=kind,
                layer=(
                    graph.n_layers
                    if kind == "logits"
                    else graph.layer
                    if kind == "steer"
                    else graph.layer + (i - 1) // (H + 1)
                ),
            )
    names = graph.edge_names
    for edge, source, to, kind, _ in found:
        more = {} if scores is None else {"score": float(scores[edge])}
        out.add_edge(source, to, key=kind, edge=edge, name=names[edge], **more)
    return out
