"""Files that are written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from .types import PathLike


def write_whole(path: PathLike, data: bytes) -> None:
    """Writes `data` under a temporary name beside `path` and renames it.

    An interrupted save never leaves half a file: an existing file is replaced completely or stays
    as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_halves(folder: Path) -> None:
    """Removes what `write_whole` has left in a folder where its process was killed. The caller
    makes sure that no other process writes there.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
