"""The steps of a study on the workers of a dask.distributed cluster.

Every worker opens the model on its own device and works in the same folder, which all of them must
reach. Steps that do not need each other run side by side. A step of a worker that dies is given to
another one, which goes on from the items that the first one kept; results are bit-identical to
those of one machine where the devices are alike.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.provenance import identity
from ..errors import DeviceError, ModelError
from .prompts import Prompts
from .settings import Settings
from .steps import STEPS, run_step
from .store import Finished, StudyStore

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Times that a worker opens its model anew where its device fails. A step whose worker died is
#: given to another one by dask itself (distributed.scheduler.allowed-failures).
RETRIES = 3


@dataclass(frozen=True)
class Source:
    """How a worker opens the model, and the hash that it must have."""

    name: str
    hash: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Model) -> Source:
        options: dict[str, Any] = {"dtype": model.dtype}
        if model.config_overrides:
            options["config_overrides"] = dict(model.config_overrides)
        if model.template_options:
            options["template_options"] = dict(model.template_options)
        if model.precision == "fast":
            options["precision"] = "fast"
        # Workers run in folders of their own.
        name = str(Path(model.name).resolve()) if Path(model.name).exists() else model.name
        return cls(name, identity(model), options)


def run_on(
    scheduler: str,
    store: StudyStore,
    source: Source,
    data: Prompts,
    settings: Settings,
    names: Sequence[str],
    forced: Sequence[str],
    progress: bool,
) -> dict[str, Finished]:
    """Runs the steps on the cluster at `scheduler`, an address such as "tcp://host:8786"; returns
    {name: finished step}. Ctrl-C cancels what has not begun.

    Raises ImportError without dask.distributed, OSError where no scheduler answers, and the error
    of a step.
    """
    try:
        import distributed
    except ImportError:
        raise ImportError(
            "a study on a cluster needs dask.distributed: pip install 'vksteer[cluster]'"
        ) from None
    folder = str(store.folder.resolve())
    library: Any = distributed  # its calls have no types
    with library.Client(scheduler, timeout="20s") as client:
        futures: dict[str, Any] = {}
        for name in names:
            needed = [futures[n] for n in STEPS[name].needs]
            futures[name] = client.submit(
                work, name, folder, source, data, settings, name in forced, *needed,
                pure=False,
            )  # fmt: skip
        try:
            for future in library.as_completed(futures.values()):
                finished = future.result()
                if progress:
                    print(f"{finished.name}: done", file=sys.stderr)
            return {name: future.result() for name, future in futures.items()}
        finally:
            client.cancel(list(futures.values()))


_models: dict[tuple[str, str], Model] = {}
_opening = threading.Lock()


def work(
    name: str,
    folder: str,
    source: Source,
    data: Prompts,
    settings: Settings,
    force: bool,
    *needed: Finished,
) -> Finished:
    """One step on a worker. Steps of one worker that run at the same time share its model."""
    store = StudyStore(Path(folder))
    inputs = {one.name: one for one in needed}
    for left in reversed(range(RETRIES)):
        model = opened(source)
        try:
            return run_step(
                name, store, model, data, settings, inputs, force=force, progress=False
            )[0]
        except DeviceError:
            if not left:
                raise
            _forget(source, model)  # the step goes on from its items
    raise AssertionError("a step ends or raises")


def _forget(source: Source, model: Model) -> None:
    """Makes the next call open the model anew. Other steps may still hold this one, which is freed
    with the last of them.
    """
    with _opening:
        if _models.get((source.name, source.hash)) is model:
            del _models[source.name, source.hash]


def opened(source: Source) -> Model:
    """The worker's model, opened once. Raises ModelError where it is not the study's."""
    from ..runtime.model import Model

    key = source.name, source.hash
    with _opening:
        model = _models.get(key)
        if model is None:
            model = Model.from_pretrained(source.name, progress=False, **source.options)
            if identity(model) != source.hash:
                model.close()
                raise ModelError(
                    f"{source.name} on this worker is another model than the study's: its weights,"
                    " tokenizer or way of loading (such as dtype) differ"
                )
            _models[key] = model
    return model
