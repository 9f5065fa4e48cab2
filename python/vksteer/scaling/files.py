"""Scalings in files: safetensors and npz without pickle, one row for each site and layer."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..base.json_files import parse_json
from ..base.types import Array, Float64Array, PathLike
from ..base.whole_files import write_whole
from ..errors import ModelError
from ..inputs.vector_files import _stored_row, check_size, npy_array, npz_members
from ..loading.safetensors_files import read_header

FORMAT = "vksteer.scaling"
ENDINGS = (".safetensors", ".npz")
_NEEDED = (
    "sites",
    "dynamic",
    "first",
    "losses",
    "effectiveness",
    "differences",
    "faithfulness",
    "tokens",
    "meta",
)


def save(path: PathLike, rows: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
    """Writes rows (float32) and facts (JSON-able). ValueError for another ending."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ValueError(f"{path}: a scaling is saved as {' or '.join(ENDINGS)}")
    texts = {"format": FORMAT, "facts": json.dumps(facts)}
    if path.suffix == ".safetensors":
        from safetensors.numpy import save as serialize

        data = serialize(dict(rows), metadata=texts)
    else:
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {name: np.array(text) for name, text in texts.items()}
        np.savez(buffer, **(arrays | dict(rows)))
        data = buffer.getvalue()
    write_whole(path, data)


def load(path: PathLike) -> tuple[Float64Array, dict[str, Any]]:
    """(parameters [sites, L, n], facts). ModelError for a file that does not fit."""
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise ModelError(f"{path}: a scaling ends in {' or '.join(ENDINGS)}")
    check_size(path)
    rows, texts = (_from_safetensors if path.suffix == ".safetensors" else _from_npz)(path)
    if texts.get("format") != FORMAT:
        raise ModelError(f"{path}: no scaling: its format is {texts.get('format')!r}")
    facts = parse_json(str(texts.get("facts", "")).encode(), str(path))
    missing = [name for name in _NEEDED if name not in facts]
    if missing or not isinstance(facts["sites"], list) or not facts["sites"]:
        raise ModelError(f"{path}: damaged: {', '.join(missing) or 'sites'} missing")
    try:
        count = len(rows) // len(facts["sites"])
        stacked = np.array(
            [[rows[f"scale.{site}.{l}"] for l in range(count)] for site in facts["sites"]],
            np.float64,
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path}: damaged: {error}") from None
    if stacked.ndim != 3 or stacked.shape[0] * stacked.shape[1] != len(rows):
        raise ModelError(f"{path}: damaged: {len(rows)} rows for sites {facts['sites']}")
    if not np.isfinite(stacked).all():
        raise ModelError(f"{path}: factors that are not finite")
    return stacked, facts


def _from_safetensors(path: Path) -> tuple[dict[str, Array], Mapping[str, Any]]:
    tensors = read_header(path)
    rows: dict[str, Array] = {n: _stored_row(path, n, t) for n, t in tensors.items()}
    data = path.read_bytes()
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], str(path))
    return rows, header.get("__metadata__") or {}


def _from_npz(path: Path) -> tuple[dict[str, Array], Mapping[str, Any]]:
    arrays = {name: npy_array(path, name, member) for name, member in npz_members(path).items()}
    texts = {name: str(x) for name, x in arrays.items() if x.dtype.kind == "U" and not x.ndim}
    return {name: x for name, x in arrays.items() if name not in texts}, texts
