"""A lock between the processes of one test run, for what is made once and read by all of them."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

#: Path -> how many blocks of this process hold its lock; one thread runs the tests.
_held: dict[Path, int] = {}


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Held by one process at a time; the process that holds it may enter again. The file stays."""
    path = Path(path).absolute()
    if path in _held:
        _held[path] += 1
        try:
            yield
        finally:
            _held[path] -= 1
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # closing the file releases it
        _held[path] = 1
        try:
            yield
        finally:
            del _held[path]
