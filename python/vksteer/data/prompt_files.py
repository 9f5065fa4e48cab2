"""Prompts from the bundled toy world, from files, and from data sets of the Hugging Face hub. The
package contains none of the study's data sets; they are read from files or from the hub.
"""

from __future__ import annotations

import fnmatch
import json
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from ..base.lfs import lfs_pointer

if TYPE_CHECKING:
    from ..base.types import PathLike
    from .world import Request

_FIELD_LIMIT = threading.Lock()

T = TypeVar("T")
#: A row of a file: {column: value}.
Row: TypeAlias = dict[str, Any]

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
#: Names of the column that holds the prompts in common data sets. If no column is named and exactly
#: one of these is there, it is used.
PROMPT_COLUMNS = ("prompt", "instruction", "goal", "question", "forbidden_prompt", "query", "text")
#: The study's data sets (docs/method.md section 1): short name -> (hub name and file, column). No
#: test has tried these addresses against the hub; a file that is not there is reported with the
#: files that are.
STUDY = {
    "jailbreakbench": ("JailbreakBench/JBB-Behaviors:data/harmful-behaviors.csv", "Goal"),
    "alpaca": ("tatsu-lab/alpaca:data/train-*.parquet", "instruction"),
    "strongreject": ("walledai/StrongREJECT:data/train-*.parquet", "prompt"),
}


def tiny(
    split: str, n_harmful: int | None = None, n_harmless: int | None = None, seed: int = 0
) -> list[Request]:
    """Requests of the bundled toy world, alternately harmful and harmless, the same for the same
    arguments.

    split: "train", "validation" or "test". n_harmful, n_harmless: numbers of requests (default:
    128, 32 and 100 of each, by split). seed: another one draws another list from the same split.
    Returns a list of Request with .prompt (text) and .harmful (bool), among others. Raises
    ValueError for an unknown split and for numbers out of range.
    """
    from . import world

    return world.tiny(split, n_harmful, n_harmless, seed)


def tiny_pair(split: str, n: int | None = None, seed: int = 0) -> tuple[list[str], list[str]]:
    """(harmful prompts, harmless prompts) of the bundled toy world, two lists of texts.

    split, seed: as in `tiny`. n: prompts of each list (default: the split's own size). Raises
    ValueError for an unknown split and for n out of range.
    """
    requests = tiny(split, n, n, seed)
    return [r.prompt for r in requests if r.harmful], [r.prompt for r in requests if not r.harmful]


def load(
    path_or_name: PathLike,
    column: str | None = None,
    *,
    keep: Callable[[Row], object] | None = None,
    limit: int | None = None,
) -> list[str]:
    """Prompts from a file or a data set, in the file's order.

    path_or_name: a .csv, .tsv, .json (a list of texts, a list of objects, or an object of columns),
      .jsonl, .parquet (needs pyarrow) or .txt file (one prompt per line), where JSON and JSON Lines
      are told apart by the content; "owner/name" or "owner/name:path/of/file.csv" on the hub (the
      path may contain *); or one of STUDY ("jailbreakbench", "alpaca", "strongreject").
    column: the column that holds the prompts. Default: the only text column, or the only one with
      a common name.
    keep: a function of a row (a dict) that returns whether to take it, for example `lambda row: not
      row["input"]` for Alpaca.
    limit: the largest number of prompts.
    Raises ValueError where the file or the column cannot be read or is not clear, naming the
    columns or files that there are, and FileNotFoundError for a file that does not exist.
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
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ValueError(pointer)
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


def _column(path: Path, rows: list[Row], column: str | None) -> str:
    """The name of the column that holds the prompts."""
    columns: list[str] = list(dict.fromkeys(key for row in rows for key in row))
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


def _rows(path: Path) -> list[Row]:
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
        if ending in (".csv", ".tsv"):
            return _csv(path, text, "," if ending == ".csv" else "\t")
        if ending in (".json", ".jsonl"):
            return _json_or_lines(path, text, lines=ending == ".jsonl")
        return [{"text": line} for line in text.splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def _csv(path: Path, text: str, delimiter: str) -> list[Row]:
    import csv
    import io

    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    with _FIELD_LIMIT:  # the limit belongs to the module csv, for all threads
        before = csv.field_size_limit(max(len(text), csv.field_size_limit()))
        try:
            rows = list(reader)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
        finally:
            csv.field_size_limit(before)
    for i, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, row {i} has another number of fields than the header"
                f" ({len(reader.fieldnames or ())}): is a text with a comma unquoted?"
            )
    return rows


def _json_or_lines(path: Path, text: str, *, lines: bool) -> list[Row]:
    """The rows of a JSON or JSON Lines text, told apart by the content: several JSON values in
    lines are JSON Lines, one list or object over several lines is JSON. lines: what the name says,
    which decides about a single object in one line.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data" and "\n" in text[: error.pos]
        if lines or several:
            return _jsonl(path, text)
        raise
    columns = isinstance(content, dict) and all(isinstance(v, list) for v in content.values())
    if lines and not isinstance(content, list) and not columns:
        return [_row(path, 1, content)]
    values = list(content.values()) if isinstance(content, dict) else []
    flat = any(isinstance(v, str) for v in values) and not any(
        isinstance(v, (list, dict)) for v in values
    )
    if flat and "\n" not in text.strip():
        return [_row(path, 1, content)]
    return _json(path, content)


def _json(path: Path, content: Any) -> list[Row]:
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


def _jsonl(path: Path, text: str) -> list[Row]:
    rows = []
    # Not splitlines: a JSON text may contain U+2028, where splitlines would divide it.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_row(path, number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from None
    return rows


def _row(path: Path, where: int, item: Any) -> Row:
    if isinstance(item, str):
        return {"text": item}
    if isinstance(item, dict):
        return item
    raise ValueError(f"{path}, entry {where}: {item!r} is neither a text nor an object")


def _parquet(path: Path) -> list[Row]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ValueError(
            f"{path}: parquet files need pyarrow: pip install pyarrow, or convert the file to csv"
            " or jsonl"
        ) from None
    try:
        rows: list[Row] = parquet.ParquetFile(path).read().to_pylist()
        return rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from None


# -- the hub ---------------------------------------------------------------------------------------


def _choose_file(name: str, files: Iterable[str], wanted: str) -> str:
    """The data file of a hub data set that matches `wanted`: a path, a pattern, or "" for the only
    one.
    """
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
    """The path of a hub data set's file in huggingface_hub's cache, downloaded where needed."""
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
    files = _from_client(
        name, lambda: huggingface_hub.HfApi().list_repo_files(repository, repo_type="dataset")
    )
    file = _choose_file(name, files, wanted)
    return Path(
        _from_client(
            name, lambda: huggingface_hub.hf_hub_download(repository, file, repo_type="dataset")
        )
    )


def _from_client(name: str, call: Callable[[], T]) -> T:
    """What a call to the hub returns. Raises ValueError with the reason where it fails."""
    try:
        return call()
    except Exception as error:
        # The errors of huggingface_hub are OSErrors or ValueErrors. Those of its HTTP client are
        # neither, and its releases use different clients.
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
    """The prompts of FILE or FILE:COLUMN. A colon in the name of an existing file or of a hub data
    set is not taken as the separator.
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
