"""Git-LFS pointers: the small text files that a clone without git-lfs has in place of content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .types import PathLike

_FIRST_LINE = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # the format's own limit


def lfs_pointer(path: PathLike) -> str | None:
    """The reason why a file cannot be read and what to do, where it is a git-lfs pointer; else
    None, also where the file cannot be opened.
    """
    path = Path(path)
    try:
        if path.stat().st_size > POINTER_BYTES:
            return None
        with open(path, "rb") as stream:
            text = stream.read(POINTER_BYTES)
    except OSError:
        return None
    if not text.startswith(_FIRST_LINE):
        return None
    sizes = [line[5:] for line in text.splitlines() if line.startswith(b"size ")]
    size = f" of {int(sizes[0]):,} bytes" if sizes and sizes[0].isdigit() else ""
    return (
        f"{path} is a git-lfs pointer to a file{size}, not the file itself: run `git lfs pull` in"
        " its folder, or download it again"
    )
