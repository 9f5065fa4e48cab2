"""How much of an interrupted step is done, where its items can be counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..base.json_files import read_json
from ..errors import ModelError
from .settings import DATA_SETS, Settings
from .store import LIMIT
from .vectors import BATCH
from .work import Shape


def counted(name: str, folder: Path, settings: Settings, shape: Shape) -> tuple[int, int] | None:
    """(Items that a step's folder holds, items of the whole step), or None where a step keeps none
    or their number is not known before it ends.
    """
    count = _COUNTS.get(name)
    if count is None:
        return None
    try:
        done, of = count(folder, settings, shape)
    except (ModelError, KeyError, TypeError, OSError):
        return None  # the step itself will refuse a damaged file
    return min(done, of), of


def _lines(path: Path) -> int:
    """Items of a file of JSON lines, whose first line is its head."""
    return max(0, path.read_bytes().count(b"\n") - 1) if path.exists() else 0


def _rows(path: Path, field: str) -> Any:
    return read_json(path, limit=LIMIT)[field] if path.exists() else {}


def _runs(
    n: Callable[[Settings, Shape], int],
) -> Callable[[Path, Settings, Shape], tuple[int, int]]:
    """Runs over all prompts, one line each; at least as many as are done."""

    def count(folder: Path, s: Settings, shape: Shape) -> tuple[int, int]:
        done = _lines(folder / "answers.jsonl")
        return done, max(done, n(s, shape))

    return count


def _table1(folder: Path, s: Settings, shape: Shape) -> tuple[int, int]:
    return len(_rows(folder / "answers.json", "rows")), 8 + s.controls


def _trained(folder: Path, s: Settings, shape: Shape) -> tuple[int, int]:
    examples = shape.known.examples or 0
    states = [_rows(path, "items").get("state", {}) for path in folder.glob("checkpoint.*.json")]
    done = max((int(state.get("steps", 0)) for state in states), default=0)
    return done, s.epochs * math.ceil(examples / BATCH)


def _attributed(names: tuple[str, ...]) -> Callable[[Path, Settings, Shape], tuple[int, int]]:
    def count(folder: Path, s: Settings, shape: Shape) -> tuple[int, int]:
        """Samples; those of a data set that is not made yet count as all asked for."""
        done = of = 0
        for name in names:
            asked = min(s.samples, shape.prompts["test"][0] // 2)
            path = folder / f"{name}.samples.json"
            n = len(_rows(path, "index")) if path.exists() else asked
            whole = (folder / f"{name}.scores.safetensors").exists()
            files = folder.glob(f"{name}.checkpoint.*.jsonl")
            done += n if whole else max(map(_lines, files), default=0)
            of += n
        return done, of

    return count


def _circuits(folder: Path, s: Settings, shape: Shape) -> tuple[int, int]:
    vectors = 3 if shape.known.vectors is None else shape.known.vectors
    # the curve, a smallest circuit for each data set and learned vector, and how they agree
    return _lines(folder / "items.jsonl"), len(DATA_SETS) + vectors + 1


_COUNTS: dict[str, Callable[[Path, Settings, Shape], tuple[int, int]]] = {
    "strength": _runs(lambda s, shape: len(s.coefficients) + 1),
    "behaviour": _runs(lambda s, shape: 2 + (shape.known.vectors or 3)),
    "sparsity": _runs(lambda s, shape: 3 + 2 * (len(s.taus) - 1)),
    "table1": _table1,
    "ntp": _trained,
    "po": _trained,
    "attribution": _attributed(DATA_SETS),
    "attribution_learned": _attributed(("ntp", "po")),
    "circuits": _circuits,
}
