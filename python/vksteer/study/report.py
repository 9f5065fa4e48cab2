"""report.html: everything that a study has found, in one file that loads nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..base.json_files import read_json
from ..base.types import IntArray, PathLike
from ..base.whole_files import write_whole
from ..circuits import search
from ..circuits.graph import INPUT_KINDS
from ..errors import ModelError
from ..patching.edge_scores import EdgeScores
from .inside import MAIN
from .sections import sections
from .steps import STEPS

#: Edges in the circuit's viewer; the number left out is stated.
MOST_EDGES = 10_000
LIMIT = 1 << 30


def write_report(folder: PathLike) -> Path:
    """Writes report.html into a study's folder from its results.json, run.json and stored scores;
    returns its path.

    Raises ModelError where results.json is missing or not of a study.
    """
    place = Path(folder)
    results = read_json(place / "results.json", limit=LIMIT)
    if results.get("schema") != "vksteer.study.results":
        raise ModelError(f"{place / 'results.json'} is no study's results")
    run: dict[str, Any] = {"steps": {}}
    if (place / "run.json").exists():
        run = read_json(place / "run.json", limit=LIMIT)
    target = place / "report.html"
    write_whole(target, page(results, run, viewer_data(place, results, run)).encode())
    return target


def page(results: dict[str, Any], run: dict[str, Any], viewer: dict[str, Any] | None) -> str:
    """The report as HTML text."""
    from jinja2 import Environment, StrictUndefined

    files = resources.files(__package__) / "page"
    text = {name: (files / name).read_text(encoding="utf-8") for name in FILES}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    steps = results["steps"]
    devices = sorted({s["device"] for s in run["steps"].values()})
    return environment.from_string(text["report.html"]).render(
        css=text["report.css"],
        script=text["viewer.js"],
        results=results,
        sections=sections(steps),
        viewer=viewer,
        viewer_json="" if viewer is None else _embedded(viewer),
        missing=[name for name in STEPS if name not in steps],
        devices=devices,
        seconds=sum(s["seconds"] for s in run["steps"].values()),
        run=run,
    )


FILES = ("report.html", "report.css", "viewer.js")


def _embedded(content: dict[str, Any]) -> str:
    """JSON that may stand inside a script element."""
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def viewer_data(
    folder: Path, results: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any] | None:
    """What the circuit's viewer draws: nodes, inputs, and edges in the order in which they enter
    the circuit; None where there are no edge scores.

    edges: [upstream, downstream, score, entry] each, sorted by entry: the circuit of size n is the
    edges whose entry is at most that of the n-th.
    """
    path = scores_path(folder, run)
    if path is None:
        return None
    scores = EdgeScores.load(path)
    entry = search.entry_ranks(scores.graph, search.ranking(scores.edges))
    order = np.argsort(entry, kind="stable")[:MOST_EDGES]
    curve = results["steps"].get("circuits", {}).get("curve", {})
    values = results["steps"].get("values", {})
    places = zip(values.get("largest", []), values.get("heads", []), strict=True)
    tokens = {f"a{layer}.h{head}": text for (layer, head), text in places}
    return drawn(scores, order, entry, curve, tokens)


def drawn(
    scores: EdgeScores,
    order: IntArray,
    entry: IntArray,
    curve: Mapping[str, Any],
    tokens: dict[str, list[str]],
) -> dict[str, Any]:
    """The viewer's data: the edges of `order`, the curve's measured sizes, tokens of heads."""
    graph = scores.graph
    measured = zip(curve.get("edges", []), curve.get("faithfulness", []), strict=True)
    return {
        "layer": graph.layer,
        "layers": graph.n_layers,
        "heads": graph.n_heads,
        "groups": graph.n_kv_heads,
        "nodes": list(graph.node_names),
        "inputs": list(graph.input_names),
        "kinds": [INPUT_KINDS[k] for k in graph.input_kind],
        "edges": [
            [
                int(graph.upstream[e]),
                int(graph.downstream[e]),
                _short(scores.edges[e]),
                int(entry[e]),
            ]
            for e in order
        ],
        "total": graph.n_edges,
        "left_out": graph.n_edges - len(order),
        "curve": [[n, f] for n, f in measured if f is not None],
        "tokens": tokens,
    }


def _short(value: float) -> float:
    """Four digits are enough to draw and to read."""
    return float(f"{value:.4g}")


def scores_path(folder: Path, run: dict[str, Any]) -> Path | None:
    """The file of the main data set's scores in the store; None where there is none."""
    key = run["steps"].get("attribution", {}).get("folder")
    if key is None:
        return None
    path = folder / "steps" / "attribution" / key / f"{MAIN}.scores.safetensors"
    return path if path.exists() else None
