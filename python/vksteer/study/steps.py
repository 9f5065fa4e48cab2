"""Steps of a study: what each depends on, its key in the store, and the plan.

A step is a function of a Context that returns an Outcome. Its key is the SHA-256 of its name, its
version (raised by hand when the code's results change), the settings that it uses, the model's
identity, and the hashes of the steps that it needs. A changed setting therefore runs only those
steps again that depend on it, and a step whose results come out the same as before stops the
change.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.idle_clock import IdleClock
from ..base.provenance import digest, identity, kernel_names, provenance
from ..base.store import Store
from ..base.types import Array, ProgressLike
from ..base.whole_files import write_whole
from .prompts import Prompts
from .settings import Settings
from .store import Finished, StudyStore, plain

if TYPE_CHECKING:
    from ..runtime.model import Model


@dataclass
class Outcome:
    """What a step made. result: its part of results.json. files: names of files in the step's
    folder that count. arrays: stored as NAME.npy.
    """

    result: dict[str, Any]
    files: list[str] = field(default_factory=list)
    arrays: dict[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a step works with. folder: its own, where unfinished work may lie. inputs: the finished
    steps that it needs, by name. items: what the step has kept of its unfinished work.
    """

    model: Model
    data: Prompts
    settings: Settings
    folder: Path
    inputs: Mapping[str, Finished]
    progress: ProgressLike
    items: Store

    def once(self, name: str, function: Callable[[], Any], file: str | None = None) -> Any:
        """The item of this name, computed unless an earlier call of this step has kept it. Items
        are what JSON can hold, and arrays; tuples come back as lists. file: what the function
        writes into the folder beside it; an item whose file was lost is computed again, unless it
        says "why" there is none.
        """
        kept = name in self.items
        if kept and file is not None and not (self.folder / file).exists():
            kept = "why" in self.items[name]
        if not kept:
            self.items.put(name, plain(function()))
        return self.items[name]

    def checkpoint(self, name: str) -> Path:
        """A file of unfinished work that must go on with the same kernels: one name for each set of
        kernels, so that a step that goes on on another device begins a file of its own.
        """
        path = self.folder / name
        return path.with_suffix(f".{digest(kernel_names(self.model))[:8]}{path.suffix}")

    def result(self, step: str) -> dict[str, Any]:
        """What a needed step says in results.json."""
        return self.inputs[step].result


Function: TypeAlias = Callable[[Context], Outcome]


@dataclass(frozen=True)
class Step:
    """One step. needs: names of steps. uses: names of the settings that its results depend on;
    steps that need the prompts name the hash of those that they read, data_hash or chosen_by.
    title: what it finds, in a few words.
    """

    name: str
    title: str
    function: Function
    version: int
    needs: tuple[str, ...]
    uses: tuple[str, ...]

    def key(self, model_hash: str, settings: Settings, inputs: Mapping[str, Finished]) -> str:
        return digest(
            "vksteer.study",
            self.name,
            self.version,
            {name: getattr(settings, name) for name in self.uses},
            model_hash,
            {name: inputs[name].hash for name in self.needs if name != "prompts"},
        )


STEPS: dict[str, Step] = {}


def step(
    name: str, title: str, *, needs: Iterable[str] = (), uses: Iterable[str] = (), version: int = 1
) -> Callable[[Function], Function]:
    """Registers a function as a step, after those that it needs."""

    def register(function: Function) -> Function:
        missing = [n for n in needs if n not in STEPS]
        assert name not in STEPS and not missing, f"step {name}: {missing or 'twice'}"
        STEPS[name] = Step(name, title, function, version, tuple(needs), tuple(uses))
        return function

    return register


@dataclass(frozen=True)
class Cost:
    """seconds: on an idle machine; processor: seconds of processor time (base/idle_clock.py).
    memory: the most device memory in bytes, the model's weights included.
    """

    seconds: float
    processor: float
    memory: int


@dataclass(frozen=True)
class PlannedStep:
    """A step in the plan. reason: "done", "new", "partial" ("partial 317 of 500" where its items
    can be counted), "input changed", "forced", "waits for NAME" where the key follows from a step
    that has not run, or what is wrong with its files. cost: what is left of it is predicted to
    take; None where nothing was predicted.
    """

    name: str
    title: str
    reason: str
    cost: Cost | None = None

    @property
    def runs(self) -> bool:
        return self.reason not in ("done", "skipped")


def chosen(only: Iterable[str] | None, skip: Iterable[str] | None) -> list[str]:
    """The steps to run in order: those of `only` with all that they need, without those of `skip`
    and all that need them. Raises ValueError for an unknown name, and for a step of `only` that
    `skip` leaves out.
    """
    asked, left_out = (None if some is None else named(some) for some in (only, skip))
    if asked == []:
        raise ValueError(f"only names no step; there are: {', '.join(STEPS)}")
    wanted = set(STEPS if asked is None else asked)
    for name in reversed(STEPS):
        if name in wanted:
            wanted |= set(STEPS[name].needs)
    why: dict[str, str] = {name: name for name in left_out or ()}  # name: what was to be skipped
    for name, one in STEPS.items():
        for needed in one.needs:
            if needed in why:
                why.setdefault(name, why[needed])
    for name in asked or ():
        if name in why:
            raise ValueError(
                f"only names {name!r}, which skip={why[name]!r} leaves out: it "
                + ("is the same step" if why[name] == name else "needs that step")
            )
    return [name for name in STEPS if name in wanted and name not in why]


def named(names: Iterable[str]) -> list[str]:
    """The names of steps, once each. Raises ValueError for one that does not exist."""
    given = [names] if isinstance(names, str) else list(names)
    for name in given:
        if name not in STEPS:
            raise ValueError(f"there is no step {name!r}; there are: {', '.join(STEPS)}")
    return list(dict.fromkeys(given))


def plan(
    store: StudyStore,
    model_hash: str,
    settings: Settings,
    names: Iterable[str],
    force: Iterable[str] = (),
) -> list[PlannedStep]:
    """What would run, and why; nothing is run."""
    found: dict[str, Finished] = {}
    planned = []
    forced = set(force)
    for name in names:
        one = STEPS[name]
        missing = [n for n in one.needs if n not in found]
        if missing:
            reason = f"waits for {missing[0]}"
        else:
            state = store.find(name, one.key(model_hash, settings, found))
            if name in forced:
                reason = "forced"
            elif isinstance(state, Finished):
                found[name], reason = state, "done"
            else:
                reason = state
        planned.append(PlannedStep(name, one.title, reason))
    return planned


def run_step(
    name: str,
    store: StudyStore,
    model: Model,
    data: Prompts,
    settings: Settings,
    inputs: Mapping[str, Finished],
    *,
    force: bool,
    progress: ProgressLike,
) -> tuple[Finished, bool]:
    """(The finished step, whether it had to run)."""
    one = STEPS[name]
    needed = {n: inputs[n] for n in one.needs}
    key = one.key(identity(model), settings, needed)
    state = store.find(name, key)
    if isinstance(state, Finished) and not force:
        return state, False
    with store.lock_step(name, key):
        state = store.find(name, key)  # another worker may have finished it meanwhile
        if isinstance(state, Finished) and not force:
            return state, False
        return _run(one, key, store, model, data, settings, needed, force, progress), True


def _run(
    one: Step,
    key: str,
    store: StudyStore,
    model: Model,
    data: Prompts,
    settings: Settings,
    needed: Mapping[str, Finished],
    force: bool,
    progress: ProgressLike,
) -> Finished:
    device = model._engine_device
    device.peak_bytes(True)
    folder = store.begin(one.name, key, anew=force)
    items = Store(
        folder / "items.jsonl",
        format="vksteer.study_items",
        key=key,
        argument="out",
        what="file of a step's items",
        other="another step",
        field=None,
        remedy="remove the step's folder to begin it anew",
    )
    context = Context(model, data, settings, folder, needed, progress, items)
    start = time.perf_counter()
    with IdleClock(model.device.type == "software") as clock:
        outcome = one.function(context)
    files = list(outcome.files)
    for array, values in outcome.arrays.items():
        np.save(folder / f"{array}.npy", np.ascontiguousarray(values), allow_pickle=False)
        files.append(f"{array}.npy")
    used = {
        "seconds": round(time.perf_counter() - start, 3),
        "idle_seconds": round(clock.seconds, 3),
        "processor_seconds": round(clock.processor, 3),
        "device_bytes": device.peak_bytes(),
    }
    _record(model, folder, used)  # before done.json: a finished step always has it
    return store.finish(one.name, folder, outcome.result, files)


def _record(model: Model, folder: Path, used: Mapping[str, Any]) -> None:
    """Writes what varies between runs beside the step's results: times and device memory (see
    base/idle_clock.py), device, versions.
    """
    content = {
        **used,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "device": str(model.device),
        "kernels": list(model.kernels),
        "folder": folder.name,
        **provenance(model),
    }
    write_whole(folder / "run.json", json.dumps(content, indent=1).encode())
