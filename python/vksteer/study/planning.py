"""What a call of `vs.study.run` is about to do: with which sample counts, which steps, and what
they are predicted to take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.provenance import digest, identity
from ..loading.locate import is_bundled
from ..steering.examples import PREFIX
from . import budget as budgets
from .costs import Costs
from .ladder import rungs, said, seconds_of
from .prompts import Given, Prompts, of_lists, of_world, plain_prompts
from .rates import Rates, kept_rates, rates_of
from .settings import Settings
from .steps import STEPS, Cost, PlannedStep, plan
from .store import Finished, StudyStore
from .unfinished import counted
from .vectors import BASELINE

if TYPE_CHECKING:
    from ..runtime.model import Model

Say = Callable[[str], object]


class PlanText(str):
    """A plan as Markdown, which notebooks draw as a table."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)


def check_prompts(model: Model | str, harmful: Given | None, harmless: Given | None) -> None:
    """Raises ValueError for one list alone, and for no list with a model that brings none."""
    if (harmful is None) != (harmless is None):
        raise ValueError("harmful and harmless belong together: give both lists of prompts")
    name = model if isinstance(model, str) else getattr(model, "name", "")
    if harmful is None and not is_bundled(name):
        raise ValueError(
            "give harmful= and harmless=, two lists of prompts: only the bundled tiny models bring"
            " their own"
        )


@dataclass
class Counts:
    """The size or the budget of a call, and its prompts. Raises ValueError for both at once, an
    unknown size, a budget that is no time, and prompts that are too few.
    """

    size: str | None
    budget: str | float | None
    seed: int
    harmful: Given | None
    harmless: Given | None

    def __post_init__(self) -> None:
        if self.size is not None and self.budget is not None:
            raise ValueError(
                f"size={self.size!r} and budget={self.budget!r} both say how many samples: give one"
            )
        self.seconds = None if self.budget is None else seconds_of(self.budget)
        # Without a size the folder may hold counts that a budget chose, down to the smallest.
        self.prompts(Settings.of("tiny" if self.size is None else self.size, self.seed))

    def prompts(self, settings: Settings) -> Prompts:
        """The prompts, cut by these settings."""
        if self.harmful is None or self.harmless is None:
            return of_world(settings)
        return of_lists(self.harmful, self.harmless, settings)

    def belongs(self, model: Model) -> str:
        """A hash of the model and of the prompts as they were given."""
        given = None
        if self.harmful is not None:
            given = [plain_prompts(self.harmful), plain_prompts(self.harmless or ())]
        return digest(identity(model), given)

    def settle(
        self, model: Model, folder: Path, names: Sequence[str], plan_only: bool, say: Say
    ) -> tuple[Settings, Prompts, str | None]:
        """(Settings, prompts, the line that says what a budget chose). What it chose is written
        into the folder unless this call only plans.
        """
        settings, line, chosen = Settings.of(self.size or "small", self.seed), None, None
        if self.size is None:
            belongs = self.belongs(model)
            stored, predicted = budgets.load(folder), None
            if stored is not None:
                budgets.check(stored, self.seconds, belongs, names, folder)
            elif self.seconds is not None:
                stored, predicted = self._choose(model, folder, names, belongs, say)
                chosen = stored
            if stored is not None:
                settings, line = stored.settings(self.seed), budgets.line(stored, predicted)
                say(line)
        data = self.prompts(settings)
        settings = replace(settings, data_hash=data.hash, chosen_by=data.chosen_by)
        check_lengths(model, data, settings)
        if chosen is not None and not plan_only:  # a call that is refused leaves no counts
            budgets.save(folder, chosen)
        return settings, data, line

    def _choose(
        self, model: Model, folder: Path, names: Sequence[str], belongs: str, say: Say
    ) -> tuple[budgets.Stored, float]:
        assert self.seconds is not None
        rates = rates_of(model, self.prompts(rungs(self.seed)[0]), belongs, folder, say)
        costs = Costs(model, rates)

        def seconds(settings: Settings) -> float:
            try:
                data = self.prompts(settings)
            except ValueError:  # the lists are too short for these counts
                return math.inf
            shape = costs.shape(data, {})
            return sum(both[0] for both in costs.seconds(names, settings, shape).values())

        return budgets.choose(self.seconds, belongs, names, self.seed, seconds)


def check_lengths(model: Model, data: Prompts, settings: Settings) -> None:
    """Raises ValueError for a prompt that is too long for the context together with its answer and
    the longest instruction that a step puts before it.
    """
    before = max((*BASELINE, PREFIX), key=len)
    for kind, splits in (("harmful", data.harmful), ("harmless", data.harmless)):
        texts = [text for part in splits.values() for text in part]
        rows = model.chat_tokens([f"{before} {text}" for text in texts])
        n, text = max((len(row), text) for row, text in zip(rows, texts, strict=True))
        if n + settings.new_tokens > model.config.n_ctx:
            raise ValueError(
                f"the {kind} prompt that begins with {text[:40]!r} has {n} tokens with the longest"
                f" instruction that a step puts before it; with an answer of {settings.new_tokens}"
                f" that is more than the model's context of {model.config.n_ctx}: shorten it"
            )


def finished_steps(store: StudyStore, model: Model, settings: Settings) -> dict[str, Finished]:
    """All steps that have finished with these settings."""
    finished: dict[str, Finished] = {}
    for name, one in STEPS.items():
        if all(n in finished for n in one.needs):
            state = store.find(name, one.key(identity(model), settings, finished))
            if isinstance(state, Finished):
                finished[name] = state
    return finished


def planned_with_costs(
    model: Model,
    store: StudyStore,
    settings: Settings,
    data: Prompts,
    steps: tuple[Sequence[str], Sequence[str]],
    belongs: str,
    measure: bool,
    say: Say,
) -> tuple[PlannedStep, ...]:
    """The plan, with predictions where something is to run and rates are known. steps: names of
    those to run and of those that run again. measure: whether rates may be measured for it.
    """
    planned = plan(store, identity(model), settings, *steps)
    if not any(step.runs for step in planned):
        return tuple(planned)
    rates = rates_of(model, data, belongs, store.folder, say) if measure else kept_rates(
        model, belongs, store.folder
    )  # fmt: skip
    return (
        tuple(planned) if rates is None else _costed(model, store, settings, data, planned, rates)
    )


def _costed(
    model: Model,
    store: StudyStore,
    settings: Settings,
    data: Prompts,
    planned: Sequence[PlannedStep],
    rates: Rates,
) -> tuple[PlannedStep, ...]:
    found, costs = finished_steps(store, model, settings), Costs(model, rates)
    shape = costs.shape(data, found)
    whole = costs.predict([step.name for step in planned if step.runs], settings, shape)
    out = []
    for step in planned:
        if not step.runs:
            out.append(step)
        else:
            cost, reason = whole[step.name], step.reason
            if reason == "partial":
                key = STEPS[step.name].key(identity(model), settings, found)
                counts = counted(step.name, store.place(step.name, key), settings, shape)
                if counts is not None:
                    done, of = counts
                    left = 1 - done / of if of else 1.0
                    reason = f"partial {done} of {of}"
                    cost = Cost(left * cost.seconds, left * cost.processor, cost.memory)
            out.append(replace(step, reason=reason, cost=cost))
    return tuple(out)


def plan_table(planned: Iterable[PlannedStep]) -> str:
    """A Markdown table: step, what it finds, whether it runs with the reason, and where they were
    predicted the seconds and the device memory of what runs, with their sum and maximum.
    """
    planned = list(planned)
    costs = [step.cost for step in planned if step.cost is not None]
    head, line = "| step | finds | runs |", "|:---|:---|:---|"
    if costs:
        head, line = head + " predicted time | device memory |", line + "---:|---:|"
    rows = []
    for step in planned:
        row = f"| {step.name} | {step.title} | {step.reason if step.runs else 'no: done'} |"
        if costs:
            row += f" {_cost(step.cost)} |"
        rows.append(row)
    if costs:
        total = Cost(
            sum(c.seconds for c in costs), sum(c.processor for c in costs),
            max(c.memory for c in costs),
        )  # fmt: skip
        rows.append(f"| all | | | {_cost(total)} |")
    return "\n".join([head, line, *rows])


def _cost(cost: Cost | None) -> str:
    """Two cells."""
    if cost is None:
        return "- | -"
    time = f"{cost.seconds:.1f} s" if cost.seconds < 10 else said(cost.seconds)
    return f"{time} | {cost.memory / 1e6:.0f} MB"
