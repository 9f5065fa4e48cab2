"""The folder of a study: one folder for each finished or begun step, and a lock.

    DIR/.lock                       flock, held while a study runs; freed by the system at its death
    DIR/steps/NAME/KEY/             one step, made from what KEY is the SHA-256 of
        ...                         files of unfinished work, which the step's calls go on from
        result.json                 what the step says in results.json
        *.safetensors, *.npy, ...   vectors, scores, circuits, arrays
        done.json                   written last: the SHA-256 of every file above that counts

A step is finished where done.json is there and every file it names has the hash that it gives.
Hashes are of contents; times of modification never count, so the folder can be copied.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..base.json_files import parse_json, read_json
from ..base.provenance import digest
from ..base.whole_files import remove_halves, write_whole
from ..errors import ModelError

DONE = "done.json"
FORCED = ".forced"  # in the folder of a step that was begun anew and has not finished
RESULT = "result.json"
LIMIT = 1 << 30  # bytes of a JSON file of the store


@dataclass(frozen=True)
class Finished:
    """A finished step. result: what it says in results.json. hash: of everything it made; steps
    that build on it have this hash in their key. folder: its files.
    """

    name: str
    folder: Path
    result: dict[str, Any]
    hash: str

    def file(self, name: str) -> Path:
        """The path of one of its files. Raises KeyError for a name that the step did not make."""
        path = self.folder / name
        if not path.exists():
            raise KeyError(f"step {self.name} made no file {name!r}")
        return path

    def array(self, name: str) -> np.ndarray:
        """The array that the step stored as NAME.npy."""
        return np.asarray(np.load(self.file(f"{name}.npy"), allow_pickle=False))


class Lock:
    """A flock, which the system frees when its holder dies. Raises ValueError, with the process id
    of the holder, where another process has it; wait: waits for it instead.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        self._path, self._wait = path, wait
        self._file: int | None = None

    def __enter__(self) -> Self:
        file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if self._wait else fcntl.LOCK_NB))
        except OSError as error:
            holder = os.read(file, 32).decode(errors="replace").strip()
            os.close(file)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise ValueError(
                f"{self._path.parent}: process {holder or 'of unknown number'} runs a study in this"
                " folder: wait for it, or name another folder"
            ) from None
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class StudyStore:
    """The steps of a study in a folder, which is made where it does not exist.

    Raises ValueError where the folder cannot be made or written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: (hash, stat) of files that this object has read: a call looks at a step several times.
        self._hashes: dict[Path, tuple[str, tuple[int, ...]]] = {}
        try:
            (folder / "steps").mkdir(parents=True, exist_ok=True)
            lock = folder / ".lock"
            with open(lock, "ab"):
                pass
        except OSError as error:
            raise ValueError(
                f"cannot write to the study's folder {folder}: {error.strerror}; name another one"
            ) from error

    def lock(self) -> Lock:
        """A context manager that holds the folder for this process."""
        return Lock(self.folder / ".lock")

    def lock_step(self, name: str, key: str) -> Lock:
        """A context manager that holds one step, which waits for another worker's."""
        folder = self.folder / "steps" / name
        folder.mkdir(exist_ok=True)
        return Lock(folder / f".{key[:20]}.lock", wait=True)

    def place(self, name: str, key: str) -> Path:
        """The folder of a step, which may not exist."""
        return self.folder / "steps" / name / key[:20]

    def find(self, name: str, key: str) -> Finished | str:
        """The finished step, or why it is not finished: "new", "partial", "input changed", or what
        is wrong with its files.
        """
        folder = self.place(name, key)
        if not folder.is_dir():
            others = self.folder / "steps" / name
            made = others.is_dir() and any(path.is_dir() for path in others.iterdir())
            return "input changed" if made else "new"
        if not (folder / DONE).exists():
            return "partial" if any(folder.iterdir()) else "new"
        try:
            done = read_json(folder / DONE, limit=LIMIT)
            files: dict[str, str] = done["files"]
            for file, expected in files.items():
                if not (folder / file).exists():
                    return f"{file} is missing"
                if self._hash(folder / file) != expected:
                    return f"{file} was changed"
            result = read_json(folder / RESULT, limit=LIMIT)
        except (ModelError, KeyError, AttributeError, TypeError, OSError):
            return f"{DONE} is damaged"
        return Finished(name, folder, result, digest(sorted(files.items())))

    def begin(self, name: str, key: str, anew: bool) -> Path:
        """The step's folder, made or emptied; what unfinished work left there stays unless `anew`,
        and also then what a call that began it anew has left. Of a finished step that lost a file,
        the files that are as they were and the unfinished work beside them stay.
        """
        folder = self.place(name, key)
        folder.mkdir(parents=True, exist_ok=True)
        forced = folder / FORCED
        if anew and not forced.exists():
            (folder / DONE).unlink(missing_ok=True)
            for path in folder.iterdir():
                if path.is_file():
                    path.unlink()
            forced.touch()
        elif (folder / DONE).exists():
            self._remove_changed(folder)
        remove_halves(folder)
        return folder

    def _remove_changed(self, folder: Path) -> None:
        """Removes the files of a finished step that are not what they were, and last done.json."""
        try:
            files: dict[str, str] = dict(read_json(folder / DONE, limit=LIMIT)["files"])
        except (ModelError, KeyError, TypeError, ValueError, OSError):
            files = dict.fromkeys((path.name for path in folder.iterdir() if path.is_file()), "")
        for path in folder.iterdir():  # whatever names a damaged done.json holds
            listed = path.name in files and path.name != DONE and path.is_file()
            if listed and self._hash(path) != files[path.name]:
                path.unlink()
        (folder / DONE).unlink()

    def finish(
        self, name: str, folder: Path, result: Mapping[str, Any], files: Iterable[str]
    ) -> Finished:
        """Writes result.json, then done.json; the step is finished when the call returns."""
        text = json.dumps(plain(result), indent=1, sort_keys=True, ensure_ascii=False)
        write_whole(folder / RESULT, (text + "\n").encode())
        hashes = {file: self._hash(folder / file) for file in sorted({RESULT, *files})}
        (folder / FORCED).unlink(missing_ok=True)
        write_whole(folder / DONE, (json.dumps({"files": hashes}, indent=1) + "\n").encode())
        found = read_json(folder / RESULT, limit=LIMIT)
        return Finished(name, folder, found, digest(sorted(hashes.items())))

    def _hash(self, path: Path) -> str | None:
        """The hash of a file, None where a header is no JSON any more. A file that has not changed
        since this object read it is not read again; what other processes found never counts.
        """
        stat = path.stat()
        facts = stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
        known, then = self._hashes.get(path, ("", ()))
        if facts == then:
            return known
        try:
            known = file_hash(path)
        except ModelError:
            return None
        self._hashes[path] = known, facts
        return known


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's content; of a .safetensors file, whose writer orders the header at
    random, of the header's sorted JSON and the data.
    """
    with open(path, "rb") as file:
        if path.suffix != ".safetensors":
            return hashlib.file_digest(file, "sha256").hexdigest()
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size - 8:
            raise ModelError(f"{path}: the header would be longer than the file")
        header = parse_json(file.read(size).rstrip(), str(path))
        sha = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NumPy numbers and arrays become numbers and lists, NaN and
    infinities null.
    """
    if isinstance(value, Mapping):
        return {str(name): plain(x) for name, x in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    if isinstance(value, (set, frozenset)):
        return [plain(x) for x in sorted(value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
