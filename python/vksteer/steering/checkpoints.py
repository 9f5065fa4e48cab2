"""The file from which a training goes on: optimiser state, curve and the vectors of finished
epochs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..base.store import Store
from ..base.types import Float64Array, PathLike


@dataclass
class State:
    """A training after `steps` steps; D is the width of the model."""

    steps: int
    vector: Float64Array  # [D]
    first: Float64Array  # [D], Adam's running mean of gradients
    second: Float64Array  # [D], and of their squares
    curve: list[dict[str, float]]  # one entry a step
    vectors: list[Float64Array]  # [D] of each finished epoch
    validation: list[dict[str, Any]]  # of each finished epoch, where there is validation
    weighed: Float64Array | None = None  # [D], under which tokens were weighted; None: reference


class Checkpoint:
    """path: the file, in a folder that exists. key: everything that must be the same for a training
    to go on (settings, hashes), JSON-able. The whole state is replaced at every `write`.

    Raises ValueError for a file that is damaged, or that belongs to another training (the settings
    that differ are named).
    """

    def __init__(self, path: PathLike, key: Mapping[str, Any]) -> None:
        self._store = Store(
            path,
            format="vksteer.training",
            key=dict(key),
            argument="checkpoint",
            what="checkpoint of a training",
            other="another training",
        )

    def write(self, state: State) -> None:
        self._store.replace({"state": {f: getattr(state, f) for f in State.__dataclass_fields__}})

    def read(self, width: int) -> State | None:
        """None where nothing has been written. ValueError where the arrays do not fit a model of
        this width.
        """
        if not len(self._store):
            return None
        try:
            state = State(**self._store["state"])
            arrays = [state.vector, state.first, state.second, *state.vectors]
            arrays += [] if state.weighed is None else [state.weighed]
            if any(a.shape != (width,) for a in arrays) or len(state.curve) != state.steps:
                raise ValueError(f"arrays of {[a.shape for a in arrays]}, {state.steps} steps")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self._store.refuse(error)
        return state
