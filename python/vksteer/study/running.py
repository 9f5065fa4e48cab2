"""`vs.study.run`: every experiment of docs/method.md on one model, resumable at any moment."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..base.json_files import read_json
from ..base.provenance import loaded_with
from ..base.types import PathLike, ProgressLike
from ..base.whole_files import remove_halves, write_whole
from . import inside, shown, vectors  # noqa: F401  registers the steps
from .claims import claims
from .planning import (
    Counts,
    PlanText,
    check_prompts,
    finished_steps,
    plan_table,
    planned_with_costs,
)
from .prompts import Given, Prompts
from .report import write_report
from .settings import Settings
from .steps import STEPS, PlannedStep, chosen, named, run_step
from .store import Finished, Lock, StudyStore, plain

if TYPE_CHECKING:
    from ..runtime.model import Model

SCHEMA = "vksteer.study.results"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Study:
    """A study. results: what results.json holds, as far as steps have finished. folder: its files.
    planned: the steps as they were planned when the call began, with reasons and what they were
    predicted to cost. budget: the counts that a budget chose, in words.
    """

    folder: Path
    results: dict[str, Any]
    planned: tuple[PlannedStep, ...]
    budget: str | None = None

    @property
    def complete(self) -> bool:
        """Whether every step has finished."""
        return set(self.results["steps"]) == set(STEPS)

    @property
    def report(self) -> Path:
        """The path of report.html."""
        return self.folder / "report.html"

    def file(self, step: str, name: str) -> Path:
        """The path of a file that a finished step made, such as file("candidates",
        "dim.safetensors"). Raises KeyError for a step that has not finished and for a name that it
        did not make.
        """
        steps = read_json(self.folder / "run.json", limit=1 << 30)["steps"]
        if step not in steps:
            raise KeyError(f"step {step!r} has not finished; finished: {', '.join(steps)}")
        place = self.folder / "steps" / step / str(steps[step]["folder"])
        if not (place / name).is_file():
            made = sorted(path.name for path in place.iterdir())
            raise KeyError(f"step {step} made no file {name!r}; there are: {', '.join(made)}")
        return place / name

    def plan(self) -> PlanText:
        """The plan as a table in Markdown, below the counts that a budget chose."""
        table = plan_table(self.planned)
        return PlanText(table if self.budget is None else f"{self.budget}\n\n{table}")

    def __repr__(self) -> str:
        done = len(self.results["steps"])
        return f"Study({str(self.folder)!r}: {done} of {len(STEPS)} steps finished)"


def run(
    model: Model | str,
    harmful: Given | None = None,
    harmless: Given | None = None,
    out: PathLike = "study",
    *,
    size: str | None = None,
    budget: str | float | None = None,
    seed: int = 0,
    only: Iterable[str] | None = None,
    skip: Iterable[str] | None = None,
    force: Iterable[str] | None = None,
    plan_only: bool = False,
    predict: bool = True,
    scheduler: str | None = None,
    progress: ProgressLike = True,
) -> Study:
    """Runs the study of docs/method.md on a model and writes its results into a folder.

    model: an open Model, or what `Model.from_pretrained` takes. harmful, harmless: prompts as
    texts, each one list that is cut into training, validation and test, or {"train", "test": lists}
    with or without "validation"; both None takes the toy world's, for the bundled models. out: the
    folder, which is made;
    what a study before left there with the same model, prompts and settings is taken from it, so a
    call that was killed is simply made again. size: "tiny", "demo", "small" (default) or "full"
    sample counts. budget: instead, a time ("90s", "30m", "1h30m", or seconds) that the steps of
    this call may take on this device where nothing else runs; the largest counts whose predicted
    time is within it are chosen once and kept in DIR/budget.json, and later calls without size take
    them (docs/study.md). seed: of splits, training and random controls. only: these steps and what
    they need. skip: not these steps, nor those that need them. force: run these again. plan_only:
    report what would run, why, and what it is predicted to take, without running it. predict: False
    leaves out predictions whose rates would have to be measured. scheduler: address of a
    dask.distributed cluster whose workers run the steps, each on its own device, in the same
    folder. progress: True, False or callable(done, total), within a step.

    Returns a Study. Writes DIR/results.json (byte-identical for equal settings on one device) and
    DIR/run.json (times, device, versions). Ctrl-C and a killed process lose at most the work since
    the last item of the step under way. These files and the report hold every step that finished
    with these settings, also where this call left it out or a later step failed.
    Raises ValueError before any work for unknown names, prompts that are too few, a budget that is
    no time, is given beside a size, differs from the folder's or is too small (naming the least),
    and a folder that cannot be written to or that another process holds; ImportError for a cluster
    without dask.distributed; DeviceError; ModelError.
    """
    names, forced = _names(only, skip, force)
    check_prompts(model, harmful, harmless)
    say = _quiet if progress is False else _say
    counts = Counts(size, budget, seed, harmful, harmless)
    store, measure = StudyStore(Path(out)), plan_only and predict
    with store.lock(), _opened(model) as opened:
        remove_halves(store.folder)
        settings, data, line = counts.settle(opened, store.folder, names, plan_only, say)
        belongs, steps = counts.belongs(opened), (names, forced)
        planned = planned_with_costs(opened, store, settings, data, steps, belongs, measure, say)
        if plan_only:
            return Study(store.folder, _results(opened, settings, {}), planned, line)
        _run(store, opened, data, settings, names, forced, scheduler, progress)
        results = _write(store, opened, settings)
    return Study(store.folder, results, planned, line)


def check(
    harmful: Given | None,
    harmless: Given | None,
    out: PathLike,
    *,
    size: str | None,
    budget: str | float | None,
    seed: int,
    only: Iterable[str] | None,
    skip: Iterable[str] | None,
    force: Iterable[str] | None,
) -> None:
    """Raises the ValueErrors of `run` that need no model, that of a folder in use included."""
    _names(only, skip, force)
    Counts(size, budget, seed, harmful, harmless)
    if (lock := Path(out) / ".lock").exists():
        with Lock(lock):
            pass


def _names(
    only: Iterable[str] | None, skip: Iterable[str] | None, force: Iterable[str] | None
) -> tuple[list[str], list[str]]:
    """(Steps to run in order, those of them that run again.)"""
    names, forced = chosen(only, skip), named(force or ())
    if idle := [name for name in forced if name not in names]:
        raise ValueError(f"force names {idle[0]!r}, which this call leaves out: see only and skip")
    return names, forced


def _say(text: str) -> None:
    print(f"vksteer: {text}", file=sys.stderr)


def _quiet(text: str) -> None:
    pass


def _opened(model: Model | str) -> AbstractContextManager[Model]:
    """The model itself, left open, or the one loaded from a source, closed at the end."""
    from ..runtime.model import Model

    if isinstance(model, Model):
        return nullcontext(model)
    return Model.from_pretrained(model, progress=False)


def _run(
    store: StudyStore,
    model: Model,
    data: Prompts,
    settings: Settings,
    names: Sequence[str],
    forced: Sequence[str],
    scheduler: str | None,
    progress: ProgressLike,
) -> None:
    """Runs the steps that are not finished, here or on a cluster."""
    try:
        if scheduler is None:
            _run_all(store, model, data, settings, names, forced, progress)
        else:
            from .cluster import Source, run_on

            source = Source.of(model)
            run_on(scheduler, store, source, data, settings, names, forced, progress is True)
    except Exception:
        with suppress(OSError):  # what has finished is drawn; the error is what counts
            _write(store, model, settings)
        raise


def _run_all(
    store: StudyStore,
    model: Model,
    data: Prompts,
    settings: Settings,
    names: Sequence[str],
    forced: Sequence[str],
    progress: ProgressLike,
) -> None:
    """Runs the steps that are not finished."""
    finished: dict[str, Finished] = {}
    for number, name in enumerate(names, 1):
        one = STEPS[name]
        if progress is True:
            print(f"[{number}/{len(names)}] {name}: {one.title}", file=sys.stderr)
        finished[name], _ = run_step(
            name, store, model, data, settings, finished, force=name in forced, progress=progress
        )


def _write(store: StudyStore, model: Model, settings: Settings) -> dict[str, Any]:
    """Writes results.json, run.json and report.html of all steps that have finished with these
    settings, those of earlier calls included; returns the results.
    """
    finished = finished_steps(store, model, settings)
    results = _results(model, settings, finished)
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False)
    write_whole(store.folder / "results.json", (text + "\n").encode())
    runs = {}
    for name, done in finished.items():
        if (done.folder / "run.json").exists():
            runs[name] = read_json(done.folder / "run.json", limit=1 << 20)
    text = json.dumps({"model": _last_part(model.name), "steps": runs}, indent=1, sort_keys=True)
    write_whole(store.folder / "run.json", (text + "\n").encode())
    write_report(store.folder)
    return results


def _last_part(name: str) -> str:
    """The name of a model from the hub, or the file's or folder's without the path to it."""
    return Path(name).resolve().name if Path(name).exists() else name


def _results(model: Model, settings: Settings, finished: dict[str, Finished]) -> dict[str, Any]:
    """What results.json holds."""
    steps = {name: one.result for name, one in finished.items()}
    config = model.config
    content = {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "vksteer": __version__,
        "model": {
            "hash": model.fingerprint,
            "architecture": config.architecture,
            "n_layers": config.n_layers,
            "d_model": config.d_model,
            "n_heads": config.n_heads,
            "n_kv_heads": config.n_kv_heads,
            **loaded_with(model),
        },
        "settings": settings.to_dict(),
        "steps": steps,
        "claims": claims(steps),
    }
    found: dict[str, Any] = plain(content)
    return found
