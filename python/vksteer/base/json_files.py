"""JSON files: read with limits and without surprises; saved with a format, a
version and a checksum.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import ModelError
from .provenance import digest
from .whole_files import write_whole


def read_json(path, *, limit) -> dict:
    """A JSON object from a file of at most `limit` bytes; ModelError naming the file otherwise.
    Duplicate keys are refused.
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
    return parse_json(text, str(path))


def parse_json(text: bytes, what: str) -> dict:
    """JSON bytes -> dict, refusing duplicate keys, anything that is not an object, and nesting that
    would exhaust the stack.
    """

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            seen = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))
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
    path, content: dict, *, format: str, version: int = 1, indent: int | None = None
) -> None:
    """`content` with its format, version and a checksum over everything; an existing
    file is replaced whole.

    content: what JSON can hold, without the keys "format", "version" and "checksum".
    """
    plain = json.loads(json.dumps({"format": format, "version": version, **content}))
    text = json.dumps({**plain, "checksum": digest(plain)}, indent=indent, ensure_ascii=False)
    write_whole(path, (text + "\n").encode())


def load_json(path, *, format: str, what: str, limit: int, version: int = 1) -> dict:
    """The content that `save_json` wrote, "format" and "version" included.

    what: the thing's name in messages, for example "circuit". limit: most bytes that the file may
    have. Raises ModelError for a file that cannot be read, is of another format or a newer version,
    or was cut short or edited.
    """
    content = read_json(path, limit=limit)
    if content.get("format") != format:
        raise ModelError(
            f"{path}: no {what} of vksteer (its format is {content.get('format')!r}, wanted"
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
