"""Models whose GGUF is split over several files, as llama.cpp's gguf-split writes them:
NAME-00001-of-00003.gguf and so on. The first part has all metadata; each part has some tensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..base.types import PathLike
from ..errors import ModelError
from .gguf_file import GGUFFile

#: More parts than this are a damaged file.
MAX_PARTS = 4096

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def first_part(paths: Sequence[Path]) -> Path | None:
    """The first of the files, in the order of their names, if they are all of one split model."""
    named = [_NAME.fullmatch(p.name) for p in paths]
    models = {(m["stem"], m["count"]) if m else None for m in named}
    return min(paths) if len(models) == 1 and None not in models else None


def open_gguf(path: PathLike) -> GGUFFile:
    """An open GGUF file; for the first part of a split model, with the tensors of all parts.

    Raises ModelError for any other part, for parts that are missing, and for parts that do not
    belong together.
    """
    file = GGUFFile(path)
    try:
        count = _number(file, "split.count", 1)
        if count > 1:
            _join(file, count)
    except BaseException:
        file.close()
        raise
    return file


def _number(file: GGUFFile, key: str, default: int) -> int:
    value = file.metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 1 << 31:
        raise ModelError(f"{file.path}: metadata {key!r} = {str(value)[:80]} is not a count")
    return value


def _join(file: GGUFFile, count: int) -> None:
    number = _number(file, "split.no", 0)
    if count > MAX_PARTS or number >= count:
        raise ModelError(
            f"{file.path}: metadata say part {number + 1:,} of {count:,} parts (at most"
            f" {MAX_PARTS:,})"
        )
    name = _NAME.fullmatch(file.path.name)
    if name is None or int(name["number"]) != number + 1 or int(name["count"]) != count:
        raise ModelError(
            f"{file.path}: is part {number + 1} of {count} parts, which are found by their names:"
            f" it must be called NAME-{number + 1:05}-of-{count:05}.gguf"
        )
    paths = [
        file.path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf")
        for i in range(1, count + 1)
    ]
    if number != 0:
        raise ModelError(
            f"{file.path}: is part {number + 1} of {count} parts: name the first, {paths[0].name}"
            + ("" if paths[0].is_file() else ", which is missing beside it")
        )
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise ModelError(
            f"{file.path}: {len(missing)} of {count} parts are missing beside it:"
            f" {', '.join(missing[:5])}"
        )
    for i, path in enumerate(paths[1:], 1):
        part = GGUFFile(path)
        try:
            if (_number(part, "split.no", 0), _number(part, "split.count", 1)) != (i, count):
                raise ModelError(
                    f"{path}: metadata say part {part.metadata.get('split.no', 0) + 1} of"
                    f" {part.metadata.get('split.count', 1)}, its name says {i + 1} of {count}"
                )
        except BaseException:
            part.close()
            raise
        file.join(part)
    stated = _number(file, "split.tensors.count", len(file.tensors))
    if stated != len(file.tensors):
        raise ModelError(
            f"{file.path}: metadata 'split.tensors.count' = {stated:,}, but the parts hold"
            f" {len(file.tensors):,} tensors: they are not of one model"
        )
