"""Studies side by side, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..base.json_files import read_json
from ..base.types import PathLike
from ..base.whole_files import write_whole
from ..errors import ModelError
from .claims import shown
from .report import LIMIT

Results = Mapping[str, Any]


def read_results(folder: PathLike) -> dict[str, Any]:
    """The results of a study's folder. Raises ModelError where there are none."""
    path = Path(folder) / "results.json"
    results = read_json(path, limit=LIMIT)
    if results.get("schema") != "vksteer.study.results":
        raise ModelError(f"{path} is no study's results")
    return results


def compare(
    folders: Sequence[PathLike], out: PathLike | None = None, *, paper: bool = False
) -> str:
    """A table in Markdown with one column for each study: the vector, its strength, the attack
    success rates, Table 1, circuits and what they share, sparsity and the five claims.

    folders: of studies. out: a file to write the table to as well. paper: add the figures of the
    paper's two models (arXiv 2604.08524, Tables 1 and 2 and section 5; changes of single models are
    those of Table 1's cells), and compare even one study with them. Raises ValueError for fewer
    than two folders, or for none with paper=True; ModelError for a folder without results.
    """
    if len(folders) < (1 if paper else 2):
        raise ValueError(
            "compare takes at least two folders of studies, or one beside the paper's figures"
            " (paper=True, on the command line --paper)"
        )
    studies = [read_results(folder) for folder in folders]
    heads = [str(folder) for folder in folders] + (list(PAPER_MODELS) if paper else [])
    lines = ["| | " + " | ".join(heads) + " |", "|:---|" + ":---|" * len(heads)]
    for title, cell in ROWS:
        cells = [_cell(cell, s) for s in studies]
        cells += PAPER.get(title, ("–",) * len(PAPER_MODELS)) if paper else ()
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    for i, claim in enumerate(studies[0]["claims"]):
        cells = [_claim(s["claims"][i]) for s in studies]
        cells += [claim["paper"]] * len(PAPER_MODELS) if paper else ()
        lines.append(f"| {claim['claim']} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    if out is not None:
        write_whole(out, (text + "\n").encode())
    return text


def _cell(cell: Callable[[Results], str], results: Results) -> str:
    try:
        return cell(results)
    except (KeyError, TypeError, ValueError):  # the step has not run, or has no value
        return "–"


def _claim(claim: Mapping[str, Any]) -> str:
    return f"{shown(claim)} ({claim['verdict']})"


def _steps(results: Results, *path: str) -> Any:
    value: Any = results["steps"]
    for name in path:
        value = value[name]
    return value


def _asr(side: str) -> Callable[[Results], str]:
    def cell(results: Results) -> str:
        rate = _steps(results, "behaviour", "vectors", "dim", side)
        return f"{rate['asr']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"

    return cell


def _change(row: str) -> Callable[[Results], str]:
    return lambda r: f"{100 * _steps(r, 'table1', 'rows', row)['average_change']:.1f} %"


def _strength(results: Results) -> str:
    plus, minus = _steps(results, "strength", "coefficient")
    return f"+{plus:g} / -{minus:g}"


def _smallest(results: Results) -> str:
    found = _steps(results, "circuits", "smallest", "harmful.steered")
    return f"{found['size']} of {found['edges']} ({100 * found['share']:.1f} %)"


def _faithfulness(results: Results) -> str:
    found = _steps(results, "circuits", "smallest", "harmful.steered")
    return f"{found['faithfulness']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


TYPES = ("q", "k", "v", "mlp", "logits")


def _types(most: bool) -> Callable[[Results], str]:
    """Of the strongest tenth of the edges, or the strongest hundredth."""

    def cell(results: Results) -> str:
        shares = _steps(results, "attribution", "data_sets", "harmful.steered", "top_by_type")
        n = (max if most else min)(shares, key=int)
        kinds = ", ".join(f"{kind} {100 * shares[n][kind]:.0f} %" for kind in TYPES)
        return f"{kinds} (of {n})"

    return cell


def _methods(found: Mapping[str, Any]) -> list[float]:
    """The overlaps of the three methods' circuits, two at a time."""
    at = [found["names"].index(name) for name in ("harmful.steered", "ntp", "po")]
    return [found["values"][i][j] for i in at for j in at if i < j]


def _overlap(of: str) -> Callable[[Results], str]:
    """Of the circuits under this name in the results."""
    return lambda r: " ".join(f"{v:.2f}" for v in _methods(_steps(r, "circuits", of)))


def _sparsest(results: Results) -> str:
    """What the sparsest vector by gradient does, and whose dimensions it shares."""
    rows = [r for r in _steps(results, "sparsity", "rows") if r["method"] == "gradient"]
    row = max(rows, key=lambda r: float(r["sparsity"]))
    text = (
        f"{100 * row['sparsity']:.0f} % zeros: {row['harmless']['asr']:.2f} /"
        f" {row['harmful']['asr']:.2f}"
    )
    pairs = _steps(results, "sparsity", "overlaps").get(f"{row['tau']:g}", [])
    shared = " ".join(f"{pair[2]:.2f} (p = {pair[3]:.1g})" for pair in pairs)
    return f"{text}; IoU {shared}" if pairs else text


ROWS: tuple[tuple[str, Callable[[Results], str]], ...] = (
    ("model", lambda r: str(r["model"]["architecture"])),
    ("layer", lambda r: str(_steps(r, "candidates", "layer"))),
    ("strength", _strength),
    ("ASR harmless, +a", _asr("harmless")),
    ("ASR harmful, -a", _asr("harmful")),
    ("QK frozen: average change", _change("QK")),
    ("OV frozen: average change", _change("OV")),
    ("SVV ablated: average change", _change("SVV")),
    ("MLP direct ablated: average change", _change("MLP direct")),
    ("MLP frozen: average change", _change("MLP")),
    ("smallest faithful circuit", _smallest),
    ("its faithfulness on other samples", _faithfulness),
    ("types of the strongest hundredth of the edges", _types(most=False)),
    ("types of the strongest tenth of the edges", _types(most=True)),
    ("overlap of the smallest circuits: dim-ntp, dim-po, ntp-po", _overlap("overlap")),
    ("overlap of the tenths: dim-ntp, dim-po, ntp-po", _overlap("overlap_of_tenths")),
    ("sparsest vector: ASR harmless / harmful; shared dimensions", _sparsest),
    ("estimates and exact patches: Spearman", lambda r: f"{_steps(r, 'exact', 'spearman'):.2f}"),
)

#: The paper's figures under the titles of ROWS. Its types are those of its strongest 100 and 1000
#: edges, about a hundredth.
PAPER_MODELS = ("paper: Gemma 2 2B", "paper: Llama 3.2 3B")
PAPER: Mapping[str, tuple[str, str]] = {
    "model": ("gemma2", "llama"),
    "layer": ("15", "12"),
    "ASR harmless, +a": ("0.00", "0.03"),
    "ASR harmful, -a": ("0.80", "0.85"),
    "QK frozen: average change": ("4.5 %", "13.0 %"),
    "OV frozen: average change": ("65.5 %", "78.0 %"),
    "SVV ablated: average change": ("47.5 %", "62.0 %"),
    "MLP direct ablated: average change": ("26.0 %", "63.0 %"),
    "smallest faithful circuit": ("900 of 8790 (10.2 %)", "13500 of 124441 (10.8 %)"),
    "types of the strongest hundredth of the edges": (
        "q 0 %, k 0 %, v 16 %, mlp 50 %, logits 34 %",
        "q 6 %, k 2 %, v 32 %, mlp 53 %, logits 8 %",
    ),
    "overlap of the smallest circuits: dim-ntp, dim-po, ntp-po": ("0.9 or more", "0.9 or more"),
    "sparsest vector: ASR harmless / harmful; shared dimensions": (
        "95 % zeros: 0.07 / 0.60",
        "useful up to 99 % zeros",
    ),
}
