"""JSON files: read with a limit on their size, saved with format, version and checksum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError
from .checks import first_repeated
from .lfs import lfs_pointer
from .provenance import digest
from .types import PathLike
from .whole_files import write_whole


def read_json(path: PathLike, *, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes.

    Raises ModelError naming the file where it cannot be read, is larger, or is not what
    `parse_json` accepts.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(
                f"{path}: {size:,} bytes is too large for this kind of file (limit {limit:,})"
            )
        text = path.read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)
    return parse_json(text, str(path))


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object in UTF-8 bytes.

    Raises ModelError naming `what` for duplicate keys, for anything that is not an object, and for
    nesting that would exhaust the stack.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = first_repeated(k for k, _ in pairs)
            raise ModelError(f"{what}: the key {twice!r} appears twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise ModelError(f"{what}: not UTF-8 text at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def save_json(
    path: PathLike,
    content: dict[str, Any],
    *,
    format: str,
    version: int = 1,
    indent: int | None = None,
) -> None:
    """Writes `content` with its format, version and a checksum over everything, as `write_whole`.

    content: what JSON can hold, without the keys "format", "version" and "checksum".
    """
    plain = json.loads(json.dumps({"format": format, "version": version, **content}))
    text = json.dumps({**plain, "checksum": digest(plain)}, indent=indent, ensure_ascii=False)
    write_whole(path, (text + "\n").encode())


def load_json(
    path: PathLike, *, format: str, what: str, limit: int, version: int = 1
) -> dict[str, Any]:
    """The content that `save_json` wrote, "format" and "version" included.

    what: the thing's name in messages, for example "circuit". limit: most bytes that the file may
    have. Raises ModelError for a file that cannot be read, is of another format or a newer version,
    or was cut short or edited.
    """
    content = read_json(path, limit=limit)
    if content.get("format") != format:
        raise ModelError(
            f"{path}: no {what} of vksteer (its format is {content.get('format')!r}, not"
            f" {format!r})"
        )
    if content.get("version") != version:
        raise ModelError(
            f"{path}: version {content.get('version')!r} of the {what} format is not understood: a"
            " newer vksteer wrote it"
        )
    if content.pop("checksum", None) != digest(content):
        raise ModelError(
            f"{path}: the content does not match its checksum: the file was edited or damaged"
        )
    return content
