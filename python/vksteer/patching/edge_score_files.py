"""Scores in one safetensors file with a checksum; a file that was cut short or edited is refused.

Arrays are stored under their names; graph, settings and provenance are texts in the header's
metadata. The checksum covers both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.json_files import parse_json
from ..base.types import Array, PathLike
from ..base.whole_files import write_whole
from ..circuits.graph import graph_facts, graph_from_facts
from ..errors import ModelError
from ..loading.safetensors_files import HEADER_BYTES, read_header
from ..loading.stored_tensors import Stored

if TYPE_CHECKING:
    from .edge_scores import EdgeScores

FORMAT = "vksteer.edge_scores"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
}
_ARRAYS = {
    "edges": "F64",
    "nodes": "F64",
    "dims": "F32",
    "weights": "I64",
    "sample_edges": "F64",
    "sample_nodes": "F64",
}


def save(scores: EdgeScores, path: PathLike) -> None:
    """Writes the file; an existing one is replaced in one step."""
    from safetensors.numpy import save as serialize

    arrays = {name: getattr(scores, name) for name in _ARRAYS if getattr(scores, name) is not None}
    arrays |= {f"positions.{i}": p for i, p in enumerate(scores.positions or ())}
    facts = {
        "format": FORMAT,
        "version": "1",
        "graph": json.dumps(graph_facts(scores.graph)),
        "n_positions": str(scores.n_positions),
        "has_positions": str(int(scores.positions is not None)),
        "settings": json.dumps(dict(scores.settings), sort_keys=True),
        "provenance": json.dumps(dict(scores.provenance), sort_keys=True),
    }
    facts["checksum"] = _checksum(facts, arrays)
    write_whole(path, serialize({name: np.array(a) for name, a in arrays.items()}, metadata=facts))


def _checksum(facts: dict[str, str], arrays: Mapping[str, Array]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of everything but the checksum itself."""
    out = hashlib.sha256(
        json.dumps({k: v for k, v in facts.items() if k != "checksum"}, sort_keys=True).encode()
    )
    for name in sorted(arrays):
        array = arrays[name]
        out.update(json.dumps([name, array.dtype.str.lstrip("<="), list(array.shape)]).encode())
        out.update(np.ascontiguousarray(array).data)
    return out.hexdigest()


def load(path: PathLike) -> dict[str, Any]:
    """A file's fields, as EdgeScores takes them by name. Raises ModelError for a file that was cut
    short or edited or holds no scores, OSError.
    """
    path = Path(path)
    stored = read_header(path)
    facts = _facts(path)
    arrays = {name: _read(path, name, entry) for name, entry in stored.items()}
    if facts.get("checksum") != _checksum(facts, arrays):
        raise ModelError(
            f"{path}: the content does not match its checksum: the file was edited or damaged"
        )
    try:
        n = sum(name.startswith("positions.") for name in arrays)
        positions = [arrays[f"positions.{i}"] for i in range(n)]
        return {
            "graph": graph_from_facts(json.loads(facts["graph"])),
            "n_positions": int(facts["n_positions"]),
            "settings": json.loads(facts["settings"]),
            "provenance": json.loads(facts["provenance"]),
            "positions": positions if facts["has_positions"] == "1" else None,
            "edges": None,
            **{name: arrays[name] for name in _ARRAYS if name in arrays},
        }
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path}: no scores of vksteer: {error.args[0] if error.args else error!r}"
        ) from None


def _facts(path: Path) -> dict[str, str]:
    """The metadata of the header."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(min(length, HEADER_BYTES)), f"{path}: header")
    facts = header.get("__metadata__") or {}
    if not all(isinstance(v, str) for v in facts.values()) or facts.get("format") != FORMAT:
        raise ModelError(
            f"{path}: no scores of vksteer (its format is {facts.get('format')!r}, not {FORMAT!r})"
        )
    if facts.get("version") != "1":
        raise ModelError(
            f"{path}: version {facts.get('version')!r} of the score format is not understood: a"
            " newer vksteer wrote it"
        )
    return dict(facts)


def _read(path: Path, name: str, entry: Stored) -> Array:
    expected = _ARRAYS.get(name)
    fits = entry.dtype == expected if expected else name.startswith("positions.")
    if entry.dtype not in _DTYPES or not fits:
        raise ModelError(f"{path}: {name[:200]!r} ({entry.dtype}) is no part of scores")
    dtype = _DTYPES[entry.dtype]
    array = np.fromfile(path, dtype, entry.nbytes // dtype.itemsize, offset=entry.offset)
    if array.nbytes != entry.nbytes:
        raise ModelError(
            f"{path}: {name!r} ends outside the file; it was changed while it was read"
        )
    return array.reshape(entry.shape)
