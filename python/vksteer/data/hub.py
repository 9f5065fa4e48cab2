"""Files of data sets on the Hugging Face hub, through the cache of huggingface_hub."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from ..base.hub_errors import is_of_client

T = TypeVar("T")

#: Endings of files that prompts are read from.
ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
_NO_DATA = ("license.txt", "requirements.txt", "dataset_infos.json")
#: A part of a file that is cut into several: prefix, number, count; some have a hash behind it.
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})(-[0-9a-f]+)?(\.\w+)")


def files_of(
    repository: str, wanted: str = "", split: str | None = None, instead: str = ""
) -> list[Path]:
    """The local paths of a data set's files, downloaded where the cache has not got them.

    repository: owner/name. wanted: a path or a pattern; "" takes the only data file, or that of
    `split`, whose name stands in the path. A file in parts counts as one. instead: what to do
    without the hub, for the messages.
    Raises ValueError where the hub or its client is out of reach, for a data set whose conditions
    have to be accepted first, and where no file or more than one fits, naming the files.
    """
    go_on = f"; or {instead}" if instead else ""
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"fetching {repository} from the hub needs huggingface_hub: pip install"
            f" huggingface_hub{go_on}"
        ) from None
    api, fetch = huggingface_hub.HfApi(), huggingface_hub.hf_hub_download
    listing = partial(api.list_repo_files, repository, repo_type="dataset")
    files = _answer(repository, go_on, listing)
    found = []
    for file in _chosen(repository, files, wanted, split):
        download = partial(fetch, repository, file, repo_type="dataset")
        found.append(Path(_answer(repository, go_on, download)))
    return found


def _chosen(repository: str, files: Sequence[str], wanted: str, split: str | None) -> list[str]:
    """The one file that is meant, or all its parts in their order."""
    data = [
        f
        for f in files
        if Path(f).suffix.lower() in ENDINGS and Path(f).name.lower() not in _NO_DATA
    ]
    found = [f for f in data if fnmatch.fnmatchcase(f, wanted)] if wanted else data
    if split is not None:
        word = re.compile(rf"(^|[^a-zA-Z0-9]){re.escape(split)}([^a-zA-Z0-9]|$)")
        found = [f for f in found if word.search(f.rpartition(".")[0])]
    parts = sorted(found)
    if len(found) != 1 and not _are_parts(parts):
        asked = wanted or (f"split {split!r}" if split else "")
        raise ValueError(
            f"{repository}: {'no' if not found else 'more than one'} file matches {asked}".rstrip()
            + f"; name one as {repository}:PATH. It has:"
            f" {', '.join(data) or 'no file of ' + ', '.join(ENDINGS)}"
        )
    return parts


def _are_parts(files: Sequence[str]) -> bool:
    """Whether sorted files are all parts of one."""
    found = [_PART.fullmatch(f) for f in files]
    if not files or not all(found):
        return False
    parts = [m.groups() for m in found if m]
    same = {(prefix, count, ending) for prefix, _, count, _, ending in parts}
    numbers = [int(number) for _, number, _, _, _ in parts]
    return len(same) == 1 and numbers == list(range(int(parts[0][2])))


def _answer(repository: str, go_on: str, call: Callable[[], T]) -> T:
    """What a call to the hub returns. Raises ValueError with the reason where it fails."""
    from huggingface_hub.errors import GatedRepoError

    try:
        return call()
    except GatedRepoError as error:
        raise ValueError(
            f"{repository} is gated on the hub: accept its conditions at"
            f" https://huggingface.co/datasets/{repository} and log in, or set HF_TOKEN{go_on}"
        ) from error
    except Exception as error:
        if not is_of_client(error) and not isinstance(error, (OSError, ValueError)):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"{repository!r} is no file here, and the hub did not give it: {type(error).__name__}:"
            f" {reason}{go_on}"
        ) from error
