"""Prompts from the bundled toy world, from files, and from data sets of the Hugging Face hub. The
package contains none of the study's data sets; they are read from files or from the hub.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..base.lfs import lfs_pointer
from .hub import ENDINGS, files_of
from .prompt_sets import STUDY

if TYPE_CHECKING:
    from ..base.types import PathLike
    from .world import Request

_FIELD_LIMIT = threading.Lock()

#: A row of a file: {column: value}.
Row: TypeAlias = dict[str, Any]

#: Names of the column that holds the prompts in common data sets. If no column is named and exactly
#: one of these is there, it is used.
PROMPT_COLUMNS = ("prompt", "instruction", "goal", "question", "forbidden_prompt", "query", "text")


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
    split: str | None = None,
    n: int | None = None,
    seed: int = 0,
    keep: Callable[[Row], object] | None = None,
    limit: int | None = None,
) -> list[str]:
    """Prompts from a file or a data set.

    path_or_name: a .csv, .tsv, .json (a list of texts, a list of objects, or an object of columns),
      .jsonl, .parquet (needs pyarrow) or .txt file (one prompt per line), where JSON and JSON Lines
      are told apart by the content; "file.csv:column"; "owner/name" or
      "owner/name:path/of/file.csv" on the hub (the path may contain *); or one of STUDY, the
      study's prompt sets ("advbench", "alpaca", ..., docs/prompt-sets.md), also as "name:split".
    column: the column that holds the prompts. Default: the set's, or the only text column, or the
      only one with a common name.
    split: of a data set on the hub. Default: the set's first one, or the only file.
    n: draws this many without replacement by `seed`, so that a larger n begins with the prompts of
      a smaller one. Default: all, in the file's order.
    keep: a function of a row (a dict) that returns whether to take it.
    limit: the largest number of prompts, the first in the file's order.
    Raises ValueError where the file or the column cannot be read or is not clear, naming the
    columns or files that there are, for a data set that is gated or out of reach, saying which
    file to fetch by hand, for fewer than n prompts, and FileNotFoundError for a file that does not
    exist.
    """
    from ..base.checks import require_int  # it imports NumPy, which `--help` does without

    if limit is not None:
        require_int(limit, "limit", 1)
    if n is not None:
        require_int(n, "n", 1)
        if limit is not None:
            raise ValueError("n draws prompts and limit takes the first ones: give one of them")
    require_int(seed, "seed")
    where, rows, column = _found(str(path_or_name), column, split)
    column = _column(where, rows, column)
    prompts = []
    for i, row in enumerate(rows):
        if keep is not None and not keep(row):
            continue
        value = row.get(column)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{where}, row {i}: column {column!r} holds {value!r}, not a prompt; drop such rows"
                " with keep="
            )
        prompts.append(value)
        if len(prompts) == limit:
            break
    if not prompts:
        raise ValueError(f"{where}: keep= left none of {len(rows)} rows")
    return prompts if n is None else _drawn(where, prompts, n, seed)


def _drawn(where: str, prompts: list[str], n: int, seed: int) -> list[str]:
    if n > len(prompts):
        raise ValueError(f"{where} holds {len(prompts)} prompts, n={n} asks for more")
    random.Random(f"load {seed}").shuffle(prompts)
    return prompts[:n]


def _found(name: str, column: str | None, split: str | None) -> tuple[str, list[Row], str | None]:
    """(where it was found, for messages; all rows; the column as far as it is known)."""
    before, colon, after = name.rpartition(":")
    is_column = bool(colon) and not Path(name).expanduser().exists()
    if is_column and Path(before).suffix.lower() in ENDINGS:
        if column is not None:
            raise ValueError(f"{name!r} names a column, and column={column!r} another one")
        name, column = before, after
    path = Path(name).expanduser()
    if path.is_dir() and name.lower() not in STUDY:
        raise ValueError(f"{path} is a folder: name one file of {', '.join(ENDINGS)}")
    if path.exists() and not path.is_dir():
        if split is not None:
            raise ValueError(f"{path} is a file, which has no splits: leave split={split!r} out")
        return str(path), _content(path), column
    short, _, own_split = name.partition(":")
    if short.lower() in STUDY:
        return _of_study(short.lower(), column, split or own_split or None)
    if path.suffix.lower() in ENDINGS and ":" not in name:
        raise FileNotFoundError(f"there is no file {path}")
    if short.count("/") != 1 or not all(short.split("/")):
        raise ValueError(
            f"{name!r} is no file here, and no data set of the hub (owner/name or owner/name:PATH);"
            f" short names are {', '.join(STUDY)}"
        )
    if own_split and split is not None:
        raise ValueError(f"{name!r} names a file: leave split={split!r} out")
    return name, _rows_of(files_of(short, own_split, split)), column


def _of_study(
    name: str, column: str | None, split: str | None
) -> tuple[str, list[Row], str | None]:
    """The same of one of STUDY. Rows whose prompt needs another column are left out."""
    known = STUDY[name]
    split = known.split(split)
    files = files_of(known.repository, known.splits[split], instead=known.instead(split))
    rows = _rows_of(files)
    if known.empty is not None:
        rows = [row for row in rows if not (row.get(known.empty) or "").strip()]
    return f"{name} ({known.repository})", rows, column or known.column


def _rows_of(files: list[Path]) -> list[Row]:
    return [row for file in files for row in _content(file)]


def _content(path: Path) -> list[Row]:
    """All rows of a file. Raises ValueError where there are none."""
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ValueError(pointer)
    rows = _rows(path)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _column(where: str, rows: list[Row], column: str | None) -> str:
    """The name of the column that holds the prompts."""
    columns: list[str] = list(dict.fromkeys(key for row in rows for key in row))
    if column is not None:
        if column not in columns:
            alike = [c for c in columns if c.lower() == column.lower()]
            hint = f"; did you mean {alike[0]!r}?" if alike else "."
            raise ValueError(
                f"{where} has no column {column!r}{hint} It has: {', '.join(map(repr, columns))}"
            )
        return column
    texts = [c for c in columns if all(isinstance(row.get(c), str) for row in rows)]
    usual = [c for c in texts if c.lower() in PROMPT_COLUMNS]
    found = texts if len(texts) == 1 else usual
    if len(found) != 1:
        raise ValueError(
            f"{where}: which column holds the prompts? Name one with column=; it has:"
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


def prompts_of(text: str) -> list[str]:
    """The prompts of an argument of the command line: FILE, FILE:COLUMN, NAME or NAME:SPLIT."""
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
