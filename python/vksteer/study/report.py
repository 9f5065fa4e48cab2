"""report.html: everything that a study has found, in one file that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.json_files import read_json
from ..base.types import PathLike
from ..base.whole_files import write_whole
from ..errors import ModelError
from ..patching.edge_scores import EdgeScores
from . import claims
from .inside import MAIN
from .sections import sections
from .settings import DATA_SETS
from .shown import TEXTS, TOKENS
from .steps import STEPS
from .viewer import SCRIPTS, Shown, drawn, embedded, page_file, script

LIMIT = 1 << 30
#: The files of texts that steps keep beside results.json.
TEXT_FILES = {"texts": TEXTS, "positions": TOKENS}


def write_report(folder: PathLike, *, texts: bool = True) -> Path:
    """Writes report.html, or report-no-texts.html, into a study's folder from its results.json,
    run.json and stored scores; returns its path.

    texts: whether it shows prompts, answers and tokens of samples, as they are needed to judge what
    the rates count. False leaves them out, for a report that is published where the answers must
    not be. Raises ModelError where results.json is missing or not of a study, or a file of texts is
    damaged.
    """
    place = Path(folder)
    results = read_json(place / "results.json", limit=LIMIT)
    if results.get("schema") != "vksteer.study.results":
        raise ModelError(f"{place / 'results.json'} is no study's results")
    run: dict[str, Any] = {"steps": {}}
    if (place / "run.json").exists():
        run = read_json(place / "run.json", limit=LIMIT)
    said = text_files(place, run) if texts else {}
    target = place / ("report.html" if texts else "report-no-texts.html")
    write_whole(target, page(results, run, viewer_data(place, results, run), said).encode())
    return target


def page(
    results: Mapping[str, Any],
    run: Mapping[str, Any],
    viewer: Mapping[str, Any] | None,
    texts: Mapping[str, Any] | None = None,
) -> str:
    """The report as HTML text. texts: {step: what its file of texts holds}."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(page_file),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    steps = results["steps"]
    return environment.get_template("report.html").render(
        css=page_file("report.css"),
        script=script("elements", "figures"),
        viewer_script=script(*SCRIPTS),
        results=results,
        shown=claims.shown,
        model=run.get("model") or results["model"]["architecture"],
        sections=sections(steps, texts),
        viewer=viewer,
        viewer_json="" if viewer is None else embedded(viewer),
        missing=[name for name in STEPS if name not in steps],
        devices=sorted({s["device"] for s in run["steps"].values()}),
        seconds=[(name, s["seconds"]) for name, s in run["steps"].items()],
        versions=sorted(
            {f"{name} {v}" for s in run["steps"].values() for name, v in s["versions"].items()}
        ),
    )


def step_file(folder: Path, run: Mapping[str, Any], step: str, name: str) -> Path | None:
    """A file of a finished step in the store, relative to the study's folder; None where there is
    none.
    """
    key = run["steps"].get(step, {}).get("folder")
    path = Path("steps") / step / str(key) / name
    return path if key is not None and (folder / path).exists() else None


def text_files(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """{step: what its file of texts holds}."""
    found = {step: step_file(folder, run, step, name) for step, name in TEXT_FILES.items()}
    return {
        step: read_json(folder / path, limit=LIMIT)
        for step, path in found.items()
        if path is not None
    }


def viewer_data(
    folder: Path, results: Mapping[str, Any], run: Mapping[str, Any]
) -> dict[str, Any] | None:
    """What the circuit's viewer draws; None where there are no edge scores."""
    circuits = results["steps"].get("circuits", {})
    shown = []
    learned = results["steps"].get("attribution_learned", {}).get("vectors", {})
    for step, names in (("attribution", DATA_SETS), ("attribution_learned", tuple(learned))):
        for name in names:
            path = step_file(folder, run, step, f"{name}.scores.safetensors")
            if path is not None:
                scores = EdgeScores.load(folder / path)
                points = _measured(circuits, name)
                learned_one = name not in DATA_SETS
                shown.append(
                    Shown(name, _label(name), scores, points, path.as_posix(), True, learned_one)
                )
    if not shown:
        return None
    return drawn(shown, results["steps"].get("values", {}).get("tokens", {}))


def _label(name: str) -> str:
    """A data set or a learned vector in words."""
    if name not in DATA_SETS:
        return f"vector {name}, {_label(MAIN)}"
    kind, responses = name.split(".")
    return f"{kind} prompts, {responses} responses"


def _measured(circuits: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The sizes of which faithfulness was measured: the curve, which there is of one data set, or
    the smallest faithful circuit.
    """
    curve = circuits.get("curve", {})
    if name == MAIN and "faithfulness" in curve:
        return {key: curve[key] for key in ("edges", "faithfulness")}
    found = circuits.get("smallest", {}).get(name, {})
    if "size" not in found:
        return {}
    return {"edges": [found["size"]], "faithfulness": [found["faithfulness"]]}
