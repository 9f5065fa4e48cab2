"""Prompts: the bundled toy world, files, and data sets of the hub. The tree carries no data set of
the study; they are read from where they lie.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
#: Columns that hold the prompt in common data sets; used where exactly one of them is
#: there and none is named.
PROMPT_COLUMNS = ("prompt", "instruction", "goal", "question", "forbidden_prompt", "query", "text")
#: The study's data sets (method.md section 1): short name -> (hub name and file, column). The hub
#: cannot be reached from the build machines, so these three addresses are from memory; a file that
#: is not there is reported with the files that are.
STUDY = {
    "jailbreakbench": ("JailbreakBench/JBB-Behaviors:data/harmful-behaviors.csv", "Goal"),
    "alpaca": ("tatsu-lab/alpaca:data/train-*.parquet", "instruction"),
    "strongreject": ("walledai/StrongREJECT:data/train-*.parquet", "prompt"),
}


def tiny(split: str, *args, **kwargs) -> list:
    """Requests of the bundled toy world, harmful and harmless in turn (`vksteer.data.world.tiny`):
    "train", "validation" or "test".
    """
    from . import world

    return world.tiny(split, *args, **kwargs)


def tiny_pair(split: str, n: int | None = None, seed: int = 0) -> tuple[list[str], list[str]]:
    """The same as two lists of texts: (harmful prompts, harmless prompts), n of each (default:
    the split's own size).
    """
    requests = tiny(split, n, n, seed)
    return [r.prompt for r in requests if r.harmful], [r.prompt for r in requests if not r.harmful]


def load(
    path_or_name, column: str | None = None, *, keep=None, limit: int | None = None
) -> list[str]:
    """Prompts from a file or a data set, in the file's order.

    path_or_name: a .csv, .tsv, .json (a list of texts, a list of objects, or an object of columns),
      .jsonl, .parquet (needs pyarrow) or .txt file (one prompt a line); "owner/name" or
      "owner/name:path/of/file.csv" on the hub (the path may hold *); or one of STUDY
      ("jailbreakbench", "alpaca", "strongreject").
    column: which one holds the prompts; without it a file's only text column, or the only
    one with a usual name.
    keep: a function of a row (a dict) that says whether to take it, for example `lambda row: not
    row["input"]` for Alpaca.
    limit: at most so many prompts.
    Raises ValueError for what cannot be read as asked, with the columns or files that there are;
    FileNotFoundError for a file that does not exist.
    """
    name = str(path_or_name)
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be None or a whole number from 1 on, not {limit!r}")
    path = Path(name).expanduser()
    if not path.exists():
        if name.lower() in STUDY:
            name, usual = STUDY[name.lower()]
            column = column or usual
        elif path.suffix.lower() in ENDINGS and ":" not in name:
            raise FileNotFoundError(f"there is no file {path}")
        path = _from_hub(name)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder: name one file of {', '.join(ENDINGS)}")
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    column = _column(path, rows, column)
    prompts = []
    for i, row in enumerate(rows):
        if keep is not None and not keep(row):
            continue
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{path}, row {i}: column {column!r} holds {value!r}, not a prompt; drop such rows"
                " with keep="
            )
        prompts.append(value)
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"{path}: keep= left none of {len(rows)} rows")
    return prompts


def _column(path, rows: list[dict], column: str | None) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if column is not None:
        if column not in columns:
            alike = [c for c in columns if c.lower() == column.lower()]
            hint = f"; did you mean {alike[0]!r}?" if alike else "."
            raise ValueError(
                f"{path} has no column {column!r}{hint} It has: {', '.join(map(repr, columns))}"
            )
        return column
    texts = [c for c in columns if all(isinstance(row.get(c), str) for row in rows)]
    usual = [c for c in texts if c.lower() in PROMPT_COLUMNS]
    found = texts if len(texts) == 1 else usual
    if len(found) != 1:
        raise ValueError(
            f"{path}: which column holds the prompts? Name one with column=; it has:"
            f" {', '.join(map(repr, columns))}"
        )
    return found[0]


# -- one reader per format; each returns a list of rows, a row is {column: value} ------------------


def _rows(path: Path) -> list[dict[str, Any]]:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"{path.name}: prompts are read from {', '.join(ENDINGS)}, not"
            f" {path.suffix or 'a file without an ending'}"
        )
    if ending == ".parquet":
        return _parquet(path)
    try:
        # utf-8-sig: spreadsheets put a byte order mark before the first column's name.
        text = path.read_text(encoding="utf-8-sig")
        return {
            ".csv": lambda: _csv(path, text, ","),
            ".tsv": lambda: _csv(path, text, "\t"),
            ".json": lambda: _json(path, json.loads(text)),
            ".jsonl": lambda: _jsonl(path, text),
            ".txt": lambda: [{"text": line} for line in text.splitlines() if line.strip()],
        }[ending]()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _csv(path, text, delimiter) -> list[dict]:
    import csv
    import io

    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {i} has another number of fields than the header"
                f" ({len(reader.fieldnames)}): is a text with a comma unquoted?"
            )
    return rows


def _json(path, content) -> list[dict]:
    if isinstance(content, dict):
        columns = {k: v for k, v in content.items() if isinstance(v, list)}
        if len(columns) != len(content) or len({len(v) for v in columns.values()}) > 1:
            raise ValueError(
                f"{path}: an object must hold columns of one length (lists); it has:"
                f" {', '.join(map(repr, content))}"
            )
        return [dict(zip(columns, values)) for values in zip(*columns.values())]
    if not isinstance(content, list):
        raise ValueError(
            f"{path} holds {type(content).__name__}, not a list of prompts or of objects"
        )
    return [_row(path, i, item) for i, item in enumerate(content)]


def _jsonl(path, text) -> list[dict]:
    rows = []
    # not splitlines: JSON texts may hold U+2028
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_row(path, number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None
    return rows


def _row(path, where, item) -> dict:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, dict):
        return item
    raise ValueError(f"{path}, entry {where}: {item!r} is neither a text nor an object")


def _parquet(path) -> list[dict]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet files need pyarrow: pip install pyarrow, or convert the file to csv"
            " or jsonl"
        ) from None
    try:
        return parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


# -- the hub ---------------------------------------------------------------------------------------


def _choose_file(name: str, files: Iterable[str], wanted: str) -> str:
    """The one data file of a hub data set that `wanted` (a path, a pattern, or "") names."""
    data = [
        f
        for f in files
        if Path(f).suffix.lower() in ENDINGS
        and Path(f).name.lower() not in ("license.txt", "requirements.txt", "dataset_infos.json")
    ]
    found = [f for f in data if fnmatch.fnmatchcase(f, wanted)] if wanted else data
    if len(found) != 1:
        raise ValueError(
            f"{name}: {'no' if not found else 'more than one'} file matches; name one as"
            f" {name.split(':', maxsplit=1)[0]}:PATH. It has:"
            f" {', '.join(data) or 'no file of ' + ', '.join(ENDINGS)}"
        )
    return found[0]


def _from_hub(name: str) -> Path:
    """A hub data set's file in huggingface_hub's cache, downloaded if need be."""
    repository, _, wanted = name.partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(
            f"{name!r} is no file here, and no data set of the hub (owner/name or owner/name:PATH);"
            f" short names are {', '.join(STUDY)}"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise ValueError(
            f"{name!r} is no file here, and fetching it from the hub needs huggingface_hub: pip"
            " install huggingface_hub"
        ) from None
    files = _asked(
        name, lambda: huggingface_hub.HfApi().list_repo_files(repository, repo_type="dataset")
    )
    file = _choose_file(name, files, wanted)
    return Path(
        _asked(name, lambda: huggingface_hub.hf_hub_download(repository, file, repo_type="dataset"))
    )


def _asked(name: str, call):
    """The answer of a call to the hub; ValueError with the reason where there is none."""
    try:
        return call()
    except Exception as error:
        # huggingface_hub's errors are OSErrors or ValueErrors; its HTTP client's own (which library
        # that is has changed between releases) are neither.
        client = type(error).__module__.split(".")[0] in (
            "httpx",
            "httpx2",
            "httpcore",
            "httpcore2",
            "requests",
            "urllib3",
            "huggingface_hub",
        )
        if not client and not isinstance(error, (OSError, ValueError)):
            raise
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ValueError(
            f"{name!r} is no file here, and the hub did not give it: {type(error).__name__}:"
            f" {reason}"
        ) from error


def prompts_of(text: str) -> list[str]:
    """FILE or FILE:COLUMN; a colon that belongs to an existing file's or a hub data
    set's name is left alone.
    """
    name, colon, column = text.rpartition(":")
    if colon and not Path(text).exists() and Path(name).exists():
        return load(name, column)
    return load(text)


def split(prompts: list[str], name: str) -> tuple[list[str], list[str], list[str]]:
    """First half, next quarter, last quarter."""
    if len(prompts) < 8:
        raise ValueError(
            f"--{name}: {len(prompts)} prompts are too few to train (half), choose (a quarter) and"
            " test (a quarter); give at least 8, or --vector"
        )
    a, b = len(prompts) // 2, 3 * len(prompts) // 4
    return prompts[:a], prompts[a:b], prompts[b:]
