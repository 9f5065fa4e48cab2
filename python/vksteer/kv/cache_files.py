"""Cache vectors in files: safetensors, and npz without pickle. A file is untrusted, as in
`vksteer.inputs.vector_files`, whose readers these are.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.json_files import parse_json
from ..base.types import Array, Float32Array, PathLike
from ..base.whole_files import write_whole
from ..errors import ModelError
from ..inputs.vector_files import check_size, npy_array, npz_members
from ..loading.dtypes import STORAGE, convert
from ..loading.safetensors_files import read_header
from ..loading.stored_tensors import DTYPES

if TYPE_CHECKING:
    from .cache_vectors import CacheVector

ENDINGS = (".safetensors", ".npz")
FORMAT = "vksteer.cache_vector"
MAX_LAYERS = 4096


def save(vector: CacheVector, path: PathLike) -> None:
    """See `CacheVector.save`."""
    path = Path(path)
    ending = _ending(path)
    facts = {
        "format": FORMAT,
        "version": "1",
        "rotate": vector.rotate,
        "position": "" if vector.position is None else str(vector.position),
        "meta": json.dumps(dict(vector.meta), sort_keys=True),
    }
    arrays = {f"kv.key.{l}": np.array(x) for l, x in enumerate(vector.keys)}
    arrays |= {f"kv.value.{l}": np.array(x) for l, x in enumerate(vector.values)}
    if ending == ".npz":
        buffer = io.BytesIO()
        members: dict[str, Any] = {**arrays, **{k: np.array(text) for k, text in facts.items()}}
        np.savez(buffer, **members)
        data = buffer.getvalue()
    else:
        from safetensors.numpy import save as serialize

        data = serialize(arrays, metadata=facts)
    write_whole(path, data)


def load(path: PathLike) -> tuple[Float32Array, Float32Array, dict[str, Any]]:
    """(keys, values, the other arguments of a CacheVector) of a file."""
    path = Path(path)
    ending = _ending(path)
    check_size(path)
    arrays, texts = _from_npz(path) if ending == ".npz" else _from_safetensors(path)
    facts = _facts(path, texts)
    n = len(arrays) // 2
    names = {f"kv.{part}.{l}" for part in ("key", "value") for l in range(n)}
    shapes = {array.shape for array in arrays.values()}
    if not 0 < n <= MAX_LAYERS or set(arrays) != names or len(shapes) != 1:
        raise ModelError(
            f"{path}: expected kv.key.l and kv.value.l of one shape for every layer l, found"
            f" {sorted(arrays)[:6]} of shapes {sorted(shapes)[:3]}"
        )
    with np.errstate(over="ignore"):  # CacheVector refuses what is not finite
        keys, values = (
            np.stack([arrays[f"kv.{part}.{l}"] for l in range(n)]).astype(np.float32)
            for part in ("key", "value")
        )
    return keys, values, facts


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"a cache vector is saved as .safetensors or .npz, not"
            f" {path.suffix or 'without an ending'!r} ({path.name})"
        )
    return ending


def _facts(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    if texts.get("format") != FORMAT or texts.get("version") != "1":
        raise ModelError(
            f"{path}: no cache vector of this version of vksteer (format {texts.get('format')!r},"
            f" version {texts.get('version')!r})"
        )
    try:
        position = int(texts["position"]) if texts.get("position") else None
        meta = json.loads(texts.get("meta") or "{}")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: position or meta cannot be read: {error!r}") from None
    if not isinstance(meta, dict):
        raise ModelError(f"{path}: meta must be a JSON object, not {type(meta).__name__}")
    return {"rotate": texts.get("rotate", ""), "position": position, "meta": meta}


def _from_safetensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    tensors = read_header(path)
    data = path.read_bytes()
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], str(path))
    arrays: dict[str, Array] = {}
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or len(tensor.shape) != 2:
            raise ModelError(
                f"{path}: {name!r} must be [heads, d_head] of F32, F16 or BF16, not {tensor.dtype}"
                f" {list(tensor.shape)}"
            )
        stored = DTYPES[tensor.dtype]
        part = data[tensor.offset : tensor.offset + tensor.nbytes]
        numbers = convert(np.frombuffer(part, STORAGE[stored]), stored, "float32")
        arrays[name] = numbers.reshape(tensor.shape)
    return arrays, header.get("__metadata__") or {}


def _from_npz(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    arrays: dict[str, Array] = {}
    texts: dict[str, str] = {}
    for name, member in npz_members(path).items():
        array = npy_array(path, name, member, axes=2)
        if name.startswith("kv."):
            if array.ndim != 2 or array.dtype.kind != "f":
                raise ModelError(
                    f"{path}: {name!r} must be numbers [heads, d_head], not {array.dtype}"
                    f" {list(array.shape)}"
                )
            arrays[name] = array
        elif array.ndim or array.dtype.kind != "U":
            raise ModelError(f"{path}: member {name!r} must be one text")
        else:
            try:
                texts[name] = str(array)
            except ValueError as error:  # code points that Unicode does not have
                raise ModelError(f"{path}: member {name!r} is no text: {error}") from None
    return arrays, texts
