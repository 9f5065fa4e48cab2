"""The file from which a training goes on: optimiser state, curve and the vectors of finished
epochs, in one .npz, there whole or not at all.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..base.whole_files import write_whole

FORMAT = "vksteer.training"
_NUMBERS = ("step", "epoch", "lr", "loss", "gradient", "norm")


@dataclass
class State:
    steps: int
    vector: np.ndarray
    first: np.ndarray
    second: np.ndarray
    curve: list[dict[str, float]]
    vectors: list[np.ndarray]
    validation: list[dict[str, Any]]


class Checkpoint:
    """path: the file, in a folder that exists. key: everything that must be the same for a training
    to go on (settings, hashes), JSON-able.
    """

    def __init__(self, path, key: Mapping[str, Any]):
        self.path, self.key = Path(path), json.loads(json.dumps(dict(key)))
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint: there is no folder {self.path.parent}")

    def write(self, adam, curve, vectors, validation) -> None:
        width = adam.vector.size
        content = {"format": FORMAT, "key": self.key, "steps": adam.steps, "validation": validation}
        buffer = io.BytesIO()
        np.savez(
            buffer,
            content=np.frombuffer(json.dumps(content).encode(), np.uint8),
            vector=adam.vector,
            first=adam.first,
            second=adam.second,
            curve=np.array([[c[name] for name in _NUMBERS] for c in curve], np.float64).reshape(
                -1, len(_NUMBERS)
            ),
            vectors=np.array(vectors, np.float64).reshape(-1, width),
        )
        write_whole(self.path, buffer.getvalue())

    def read(self, width: int) -> State | None:
        """None where there is no file. ValueError for one that is damaged, or that belongs to
        another training (the differing settings named).
        """
        if not self.path.exists():
            return None
        try:
            with np.load(self.path, allow_pickle=False) as file:
                content = json.loads(bytes(file["content"]))
                arrays = {
                    name: file[name] for name in ("vector", "first", "second", "curve", "vectors")
                }
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            stored, steps, validation = (
                dict(content["key"]),
                int(content["steps"]),
                list(content["validation"]),
            )
            shapes = [a.shape for a in arrays.values()]
            if (
                (shapes[:3] != [(width,)] * 3 and stored == self.key)
                or shapes[3] != (steps, len(_NUMBERS))
                or arrays["vectors"].ndim != 2
            ):
                raise ValueError(f"arrays of {shapes}")
        except Exception as error:
            raise ValueError(
                f"checkpoint: {self.path} exists and is no checkpoint of a training ({error}); name"
                " another file or remove it"
            ) from None
        if stored != self.key:
            names = [name for name in self.key if stored.get(name) != self.key[name]]
            differ = ", ".join(
                f"{n} ({stored.get(n)!r} there, {self.key[n]!r} here)" for n in names
            )
            raise ValueError(
                f"checkpoint: {self.path} belongs to another training: {differ}; name another file,"
                " or remove it to begin anew"
            )
        whole_numbers = lambda row: {
            name: int(x) if name in ("step", "epoch") else float(x)
            for name, x in zip(_NUMBERS, row)
        }
        return State(
            steps,
            arrays["vector"],
            arrays["first"],
            arrays["second"],
            [whole_numbers(row) for row in arrays["curve"]],
            list(arrays["vectors"]),
            validation,
        )
