"""Sample counts that a time budget chose: picked once from predictions, kept in budget.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.json_files import load_json, save_json
from ..errors import ModelError
from .ladder import rungs, said
from .settings import SIZES, Settings

FILE, FORMAT = "budget.json", "vksteer.study_budget"


@dataclass(frozen=True)
class Stored:
    """budget: seconds. counts: as in SIZES. belongs: hash of the model and the prompts. steps:
    names of those that the budget was for.
    """

    budget: float
    counts: dict[str, Any]
    belongs: str
    steps: tuple[str, ...]

    def settings(self, seed: int) -> Settings:
        return Settings.of_counts("budget", self.counts, seed)


def load(folder: Path) -> Stored | None:
    """What a budget chose for this folder, or None. Raises ValueError for a damaged file."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        content = load_json(path, format=FORMAT, what="budget of a study", limit=1 << 20)
        counts = {
            name: tuple(content["counts"][name]) if isinstance(like, tuple) else
            type(like)(content["counts"][name])
            for name, like in SIZES["tiny"].items()
        }  # fmt: skip
        return Stored(
            float(content["budget"]), counts, str(content["belongs"]), tuple(content["steps"])
        )
    except (ModelError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error}): remove it and give the budget again, which chooses new"
            " counts"
        ) from None


def save(folder: Path, stored: Stored) -> None:
    counts = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in stored.counts.items()
    }
    content = {
        "budget": stored.budget,
        "counts": counts,
        "belongs": stored.belongs,
        "steps": list(stored.steps),
    }
    save_json(folder / FILE, content, format=FORMAT, indent=1)


def check(
    stored: Stored, budget: float | None, belongs: str, steps: Iterable[str], folder: Path
) -> None:
    """Raises ValueError where the stored counts are not those that a call means."""
    remedy = f"name another folder, or remove {folder / FILE} to choose new counts"
    if budget is not None and budget != stored.budget:
        raise ValueError(
            f"the sample counts of {folder} were chosen for a budget of {stored.budget:.10g}s, not"
            f" {budget:.10g}s: give that one or none to go on, {remedy}"
        )
    if budget is not None and (other := set(steps) ^ set(stored.steps)):
        raise ValueError(
            f"the sample counts of {folder} were chosen for other steps ({', '.join(sorted(other))}"
            f" differ): give no budget to use them, {remedy}"
        )
    if belongs != stored.belongs:
        raise ValueError(
            f"the budget of {folder} was that of another model or other prompts: give a size,"
            f" {remedy}"
        )


def choose(
    budget: float,
    belongs: str,
    steps: Sequence[str],
    seed: int,
    seconds: Callable[[Settings], float],
) -> tuple[Stored, float]:
    """(The largest counts of the ladder whose predicted seconds are within the budget, the
    prediction.)

    Raises ValueError, naming the least budget, where not even the tiny size's are.
    """
    ladder = rungs(seed)
    least = seconds(ladder[0])
    if least > budget:
        raise ValueError(
            f"a budget of {said(budget)} is too small: the smallest study of this model on this"
            f" device takes {said(least)}; give at least that, or fewer steps with only"
        )
    low, high = 0, len(ladder)  # costs do not fall from one rung to the next
    found = least
    while high - low > 1:
        middle = (low + high) // 2
        cost = seconds(ladder[middle])
        if cost <= budget:
            low, found = middle, cost
        else:
            high = middle
    return Stored(budget, ladder[low].counts, belongs, tuple(steps)), found


def line(stored: Stored, predicted: float | None) -> str:
    """The chosen counts in one line."""
    c: Mapping[str, Any] = stored.counts
    expected = "" if predicted is None else f" (predicted {said(predicted)})"
    return (
        f"budget {said(stored.budget)}{expected}: {c['train']} + {c['train']} prompts to train,"
        f" {c['validation']} to validate, {c['test']} to test, {c['samples']} samples, answers of"
        f" {c['new_tokens']} tokens, {c['steps']} steps of attribution, {c['epochs']} epochs,"
        f" {len(c['coefficients'])} coefficients, {c['controls']} random directions,"
        f" {c['patches']} exact patches, {len(c['shares'])} sizes of circuits and a grid of"
        f" {c['grid']:g}, {len(c['taus'])} thresholds"
    )
