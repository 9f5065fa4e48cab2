"""One file of finished items, from which long work goes on after an interruption.

A store names what its items belong to: the format of the file and a key, which is everything that
must be the same for the items to be used again (model, vector, prompts, settings). Everything in
the file stands under a checksum, and arrays are kept bit-identical, with dtype and shape.

Most stores are one JSON object, which is replaced as a whole. A store of large items is appended to
instead: a file of JSON lines, the format and the key on the first, one item on every other. A last
line without its end (the process was killed) is dropped on reading; the first line and the first
item are written together.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import ModelError
from .json_files import parse_json
from .provenance import digest
from .types import PathLike
from .whole_files import write_whole

_ARRAY = {"dtype", "shape", "base64"}
#: Members of the .npz files of trainings and attributions that version 0.1.0 wrote.
_OLD_MEMBERS = (
    {"content.npy", "vector.npy", "first.npy", "second.npy", "curve.npy", "vectors.npy"},
    {"key.npy", "samples.npy", "weights.npy"},
)


class Store:
    """Items by name, read from `path` where the file exists.

    path: None keeps the items in memory only; otherwise a file in a folder that exists. format:
    first field of the file. key: JSON-able; a mapping makes the message name the entries that
    differ. argument: name of the argument that gave the path, for messages. what: the kind of file,
    for example "checkpoint of a training". other: what a file with another key belongs to, for
    example "another training". about: more facts for the first line, which are not compared.
    remedy: what to do about a file that is refused, for messages. An empty file of JSON lines holds
    no items, as one that does not exist.

    Items are what JSON can hold, and arrays of numbers or booleans at any depth; tuples come back
    as lists. Raises ValueError for a folder that does not exist, a file that is damaged, of another
    format or of version 0.1.0, and one with another key.
    """

    def __init__(
        self,
        path: PathLike | None,
        *,
        format: str,
        key: Any,
        argument: str,
        what: str,
        other: str,
        field: str | None = "items",
        about: Mapping[str, Any] | None = None,
        remedy: str = "name another one, or remove it to begin anew",
    ) -> None:
        self.path = None if path is None else Path(path)
        self.key = json.loads(json.dumps(key))
        self._head = {"format": format, "key": self.key, **(about or {})}
        self._argument, self._what, self._other, self._field = argument, what, other, field
        self._remedy = remedy
        self._items: dict[str, Any] = {}
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise ValueError(f"{argument}: there is no folder {self.path.parent}")
        if self.path.exists():
            self._read(self.path)

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __getitem__(self, name: str) -> Any:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def put(self, name: str, item: Any) -> None:
        """Keeps an item; it is on the disk when the call returns. An item of this name is
        superseded.
        """
        if self._field is not None or not self._items:
            self.replace({**self._items, name: item})
            return
        if self.path is not None:
            line = _line(_item_record(name, item))
            with open(self.path, "ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._items[name] = item

    def replace(self, items: Mapping[str, Any]) -> None:
        """Keeps these items, at least one, instead of all others."""
        if self.path is not None:
            if self._field is not None:
                records = [{**self._head, self._field: _encoded(dict(items))}]
            else:
                records = [self._head, *(_item_record(name, items[name]) for name in items)]
            write_whole(self.path, b"".join(map(_line, records)))
        self._items = dict(items)

    def refuse(self, reason: object) -> NoReturn:
        """Raises the ValueError of a file whose content cannot be used."""
        raise ValueError(
            f"{self._argument}: {self.path} is damaged or no {self._what} ({reason});"
            f" {self._remedy}"
        ) from None

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        if not data and self._field is None:
            return
        end = len(data) if self._field is not None else data.rfind(b"\n") + 1
        try:
            key = self._parse(data[:end])
        except (ModelError, ValueError, KeyError, TypeError, AttributeError) as error:
            if _is_of_first_version(data):
                raise ValueError(
                    f"{self._argument}: {path} has the format of version 0.1.0, which cannot be"
                    f" resumed; {self._remedy}"
                ) from None
            self.refuse(error if data else "it is empty")
        if key != self.key:
            raise ValueError(
                f"{self._argument}: {path} belongs to {self._other}{_differences(key, self.key)};"
                f" {self._remedy}"
            )
        if end < len(data):  # the process was killed while it appended
            os.truncate(path, end)

    def _parse(self, data: bytes) -> Any:
        """Fills the items; the key in the file."""
        head, *lines = [_record(x) for x in ([data] if self._field else data.splitlines())]
        if head["format"] != self._head["format"]:
            raise ValueError(f"its format is {head['format']!r}")
        if self._field is not None:
            items = head[self._field].items()
        else:
            items = [(line["item"], line["value"]) for line in lines]
        if not items:
            raise ValueError("it has no complete item")
        self._items = {str(name): _decoded(value) for name, value in items}
        return head["key"]


def _is_of_first_version(data: bytes) -> bool:
    """Whether a file has one of the five layouts of version 0.1.0, which had no checksum: .npz
    files of trainings and attributions, {"key", "rows"} of ablation tables, JSON lines of sparsity
    sweeps, and {file name: digest} of `vksteer circuit`.
    """
    if data.startswith(b"PK"):
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                members = set(file.namelist())
        except (zipfile.BadZipFile, ValueError, NotImplementedError):
            return False
        return any(members >= old for old in _OLD_MEMBERS)
    for text in (data, data.partition(b"\n")[0]):
        try:
            head = parse_json(text, "its content")
        except (ModelError, ValueError):
            continue
        if set(head) in ({"key", "rows"}, {"format", "key", "kernels"}):
            return True
        return bool(head) and all(
            isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
            for value in head.values()
        )
    return False


def _differences(there: Any, here: Any) -> str:
    if not isinstance(there, dict) or not isinstance(here, dict):
        return ""
    names = [name for name in here if there.get(name) != here[name]]
    return ": " + ", ".join(f"{n} ({there.get(n)!r} there, {here[n]!r} here)" for n in names)


def _item_record(name: str, item: Any) -> dict[str, Any]:
    return {"item": name, "value": _encoded(item)}


def _line(record: Mapping[str, Any]) -> bytes:
    plain = json.loads(json.dumps(record))  # the checksum is of what a reader finds
    return (json.dumps({**plain, "checksum": digest(plain)}, ensure_ascii=False) + "\n").encode()


def _record(line: bytes) -> dict[str, Any]:
    record = parse_json(line, "its content")
    if record.pop("checksum", None) != digest(record):
        raise ValueError("its content does not match its checksum")
    return record


def _encoded(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiub":
            raise TypeError(f"an array of {value.dtype} cannot be kept")
        text = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
        return {"dtype": value.dtype.str, "shape": list(value.shape), "base64": text}
    if isinstance(value, dict):
        return {name: _encoded(x) for name, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(x) for x in value]
    return value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == _ARRAY:
            array = np.frombuffer(base64.b64decode(value["base64"]), np.dtype(value["dtype"]))
            return array.reshape(value["shape"]).copy()
        return {name: _decoded(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_decoded(x) for x in value]
    return value
