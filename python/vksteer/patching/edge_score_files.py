"""Scores in one safetensors file, with a checksum: what was cut short or edited is refused on load.

The arrays lie under their names, the texts (graph, settings, provenance) in the header's metadata;
the checksum covers both.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from ..base.json_files import parse_json
from ..base.whole_files import write_whole
from ..circuits.graph import Graph
from ..errors import ModelError
from ..loading.safetensors_files import HEADER_BYTES, read_header

FORMAT = "vksteer.edge_scores"
_DTYPES = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "I64": np.dtype("<i8")}
_SIZES = ("n_layers", "n_heads", "n_kv_heads", "layer")
_ARRAYS = {
    "edges": "F64",
    "nodes": "F64",
    "dims": "F32",
    "weights": "I64",
    "sample_edges": "F64",
    "sample_nodes": "F64",
}


def save(scores, path) -> None:
    from safetensors.numpy import save as serialize

    arrays = {name: getattr(scores, name) for name in _ARRAYS if getattr(scores, name) is not None}
    arrays |= {f"positions.{i}": p for i, p in enumerate(scores.positions or ())}
    facts = {
        "format": FORMAT,
        "version": "1",
        "graph": json.dumps(dict(zip(_SIZES, scores.graph._key()))),
        "n_positions": str(scores.n_positions),
        "has_positions": str(int(scores.positions is not None)),
        "settings": json.dumps(dict(scores.settings), sort_keys=True),
        "provenance": json.dumps(dict(scores.provenance), sort_keys=True),
    }
    facts["checksum"] = _checksum(facts, arrays)
    write_whole(path, serialize({name: np.array(a) for name, a in arrays.items()}, metadata=facts))


def _checksum(facts: dict[str, str], arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of everything but the checksum itself."""
    out = hashlib.sha256(
        json.dumps({k: v for k, v in facts.items() if k != "checksum"}, sort_keys=True).encode()
    )
    for name in sorted(arrays):
        array = arrays[name]
        out.update(json.dumps([name, array.dtype.str.lstrip("<="), list(array.shape)]).encode())
        out.update(np.ascontiguousarray(array).data)
    return out.hexdigest()


def load(path) -> dict:
    """A file's fields, as `EdgeScores` takes them by name."""
    path = Path(path)
    stored = read_header(path)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        facts = (
            parse_json(stream.read(min(length, HEADER_BYTES)), f"{path}: header").get(
                "__metadata__"
            )
            or {}
        )
    if not all(isinstance(v, str) for v in facts.values()) or facts.get("format") != FORMAT:
        raise ModelError(
            f"{path}: no scores of vksteer (its format is {facts.get('format')!r}, wanted"
            f" {FORMAT!r})"
        )
    if facts.get("version") != "1":
        raise ModelError(
            f"{path}: version {facts.get('version')!r} of the score format is not understood: a"
            " newer vksteer wrote it"
        )
    arrays = {}
    for name, entry in stored.items():
        wanted = _ARRAYS.get(name)
        if entry.dtype not in _DTYPES or (
            entry.dtype != wanted if wanted else not name.startswith("positions.")
        ):
            raise ModelError(f"{path}: {name[:200]!r} ({entry.dtype}) is no part of scores")
        array = np.fromfile(
            path,
            _DTYPES[entry.dtype],
            entry.nbytes // _DTYPES[entry.dtype].itemsize,
            offset=entry.offset,
        )
        if array.nbytes != entry.nbytes:
            raise ModelError(
                f"{path}: {name!r} ends outside the file; it was changed while it was read"
            )
        arrays[name] = array.reshape(entry.shape)
    if facts.get("checksum") != _checksum(facts, arrays):
        raise ModelError(
            f"{path}: the content does not match its checksum: the file was edited or damaged"
        )
    try:
        sizes = json.loads(facts["graph"])
        graph = Graph(*(sizes[name] for name in _SIZES))
        n = sum(name.startswith("positions.") for name in arrays)
        positions = (
            [arrays[f"positions.{i}"] for i in range(n)] if facts["has_positions"] == "1" else None
        )
        return {
            "graph": graph,
            "n_positions": int(facts["n_positions"]),
            "settings": json.loads(facts["settings"]),
            "provenance": json.loads(facts["provenance"]),
            "positions": positions,
            "edges": None,
            **{name: arrays[name] for name in _ARRAYS if name in arrays},
        }
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{path}: no scores of vksteer: {error.args[0] if error.args else error!r}"
        ) from None
