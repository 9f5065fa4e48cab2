"""report.html: everything that a study has found, in one file that loads nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.json_files import read_json
from ..base.types import PathLike
from ..base.whole_files import write_whole
from ..errors import ModelError
from ..patching.edge_scores import EdgeScores
from .inside import MAIN
from .sections import sections
from .steps import STEPS
from .viewer import drawn, embedded, page_file

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

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    steps = results["steps"]
    devices = sorted({s["device"] for s in run["steps"].values()})
    return environment.from_string(page_file("report.html")).render(
        css=page_file("report.css"),
        script=page_file("viewer.js"),
        results=results,
        sections=sections(steps),
        viewer=viewer,
        viewer_json="" if viewer is None else embedded(viewer),
        missing=[name for name in STEPS if name not in steps],
        devices=devices,
        seconds=sum(s["seconds"] for s in run["steps"].values()),
        run=run,
    )


def viewer_data(
    folder: Path, results: dict[str, Any], run: dict[str, Any]
) -> dict[str, Any] | None:
    """What the circuit's viewer draws; None where there are no edge scores."""
    path = scores_path(folder, run)
    if path is None:
        return None
    scores = EdgeScores.load(path)
    curve = results["steps"].get("circuits", {}).get("curve", {})
    values = results["steps"].get("values", {})
    places = zip(values.get("largest", []), values.get("heads", []), strict=True)
    tokens = {f"a{layer}.h{head}": text for (layer, head), text in places}
    return drawn(scores, curve, tokens, MAIN)


def scores_path(folder: Path, run: dict[str, Any]) -> Path | None:
    """The file of the main data set's scores in the store; None where there is none."""
    key = run["steps"].get("attribution", {}).get("folder")
    if key is None:
        return None
    path = folder / "steps" / "attribution" / key / f"{MAIN}.scores.safetensors"
    return path if path.exists() else None
