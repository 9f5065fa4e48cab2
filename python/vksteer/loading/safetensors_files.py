"""Reading the *index* of safetensors checkpoints: which bytes of which file are which tensor. No
weight is read here.

A header is untrusted: every number is checked against the file's size before it is used. The data
must be covered exactly once, from its first byte to the file's last, and a tensor's bytes must be
its shape times its dtype.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..base.json_files import parse_json, read_json
from ..base.lfs import lfs_pointer
from ..base.types import PathLike
from ..errors import ModelError
from .checkpoint_kinds import missing_shards, refuse_tensors, without_weights
from .config import Config
from .layouts import Part, layout_of, place, stored_shape
from .stored_tensors import DTYPES, Stored
from .tensor_names import HARMLESS_LAYER_TENSOR, engine_tensors
from .tied_tensors import UNTIED_WITHOUT_UNEMBED, is_tied_name, text_prefix, unembed_name

HEADER_BYTES = 100 << 20  # the format's own limit
INDEX_BYTES = 100 << 20
# commas and brackets in a header: 100,000 tensors have 600,000; more would only exhaust memory
MAX_SEPARATORS = 5_000_000
MAX_DIMENSIONS = 8
MAX_SHARDS = 10_000

#: safetensors dtype -> bits an element
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


def read_header(path: PathLike, file: int = 0) -> dict[str, Stored]:
    """All tensors of one safetensors file. Raises ModelError naming file, tensor and reason for
    anything that is not exactly right.
    """
    path = Path(path)
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size < 8:
                raise ModelError(f"{path}: {size} bytes is too short for a safetensors file")
            length = int.from_bytes(stream.read(8), "little")
            if length > HEADER_BYTES or length > size - 8:
                raise ModelError(
                    f"{path}: the header claims {length:,} bytes, but the file has {size:,} (limit"
                    f" {HEADER_BYTES:,}); the file is truncated or not safetensors"
                )
            text = stream.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    if len(text) != length:
        raise ModelError(f"{path}: the header ends after {len(text):,} of {length:,} bytes")
    if sum(text.count(c) for c in (b",", b"[", b"{", b":")) > MAX_SEPARATORS:
        raise ModelError(f"{path}: the header lists more entries than any model has")
    header = parse_json(text, f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if metadata is not None and not isinstance(metadata, dict):
        raise ModelError(f"{path}: '__metadata__' must be an object")
    start = 8 + length
    tensors = {name: _entry(path, name, value, file, start, size) for name, value in header.items()}
    _check_cover(path, tensors, start, size)
    return tensors


def _entry(path: Path, name: str, value: Any, file: int, start: int, size: int) -> Stored:
    where = f"{path}: tensor {name[:200]!r}"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise ModelError(f"{where}: dtype must be a string")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_count(n) for n in shape)
    ):
        raise ModelError(
            f"{where}: shape {str(shape)[:100]} is not a list of at most {MAX_DIMENSIONS}"
            " non-negative integers"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise ModelError(
            f"{where}: data_offsets {str(offsets)[:100]} is not a pair of non-negative integers"
        )
    begin, end = offsets
    if begin > end or end > size - start:
        raise ModelError(
            f"{where}: bytes {begin}..{end} lie outside the file's {size - start:,} bytes of data; "
            "the file is truncated or its header lies"
        )
    if dtype in BITS:  # an unknown dtype is refused only where the engine needs the tensor
        elements = 1
        for n in shape:
            elements *= n
        if elements * BITS[dtype] != (end - begin) * 8:
            raise ModelError(
                f"{where}: shape {shape} of {dtype} does not take {end - begin:,} bytes"
            )
    return Stored(file, dtype, tuple(shape), start + begin, end - begin)


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62


def _check_cover(path: Path, tensors: Mapping[str, Stored], start: int, size: int) -> None:
    """The tensors cover the data exactly once: no overlap, no gap, no trailing bytes."""
    at, before = start, ""
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if t.offset < at:
            raise ModelError(f"{path}: tensor {name[:200]!r} overlaps {before[:200]!r}")
        if t.offset > at:
            raise ModelError(
                f"{path}: tensor {name[:200]!r} leaves a gap of {t.offset - at:,} bytes before it"
            )
        at, before = t.offset + t.nbytes, name
    if at != size:
        raise ModelError(f"{path}: {size - at:,} bytes after the last tensor belong to nothing")


def read_checkpoint(folder: PathLike) -> tuple[list[Path], dict[str, Stored]]:
    """(paths, tensors) of a folder's checkpoint: model.safetensors, or the shards of
    model.safetensors.index.json.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single], read_header(single)
    if index.exists():
        return _read_shards(folder, index)
    raise ModelError(without_weights(folder))


def _read_shards(folder: Path, index: Path) -> tuple[list[Path], dict[str, Stored]]:
    content = read_json(index, limit=INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: 'weight_map' must be an object that names each tensor's file")
    for tensor, name in weight_map.items():
        if (
            not isinstance(name, str)
            or not re.fullmatch(r"[\w.+=-]+\.safetensors", name)
            or name.startswith(".")
        ):
            raise ModelError(
                f"{index}: tensor {tensor[:200]!r} is said to lie in {str(name)[:200]!r}, which is"
                " not the plain name of a .safetensors file in this folder"
            )
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise ModelError(f"{index}: {len(names):,} shards are more than any model has")
    missing = missing_shards(index, names)
    if missing is not None:
        raise ModelError(missing)
    paths: list[Path] = []
    tensors: dict[str, Stored] = {}
    for i, name in enumerate(names):
        path = folder / name
        for tensor, stored in read_header(path, i).items():
            if tensor in tensors:
                raise ModelError(
                    f"{path}: tensor {tensor[:200]!r} is also in {names[tensors[tensor].file]!r}"
                )
            tensors[tensor] = stored
        paths.append(path)
    for tensor, name in weight_map.items():
        if tensor not in tensors and is_tied_name(tensor):
            continue  # tied tensors may be stored under one of their two names: `tied_tensors`
        if tensor not in tensors:
            raise ModelError(
                f"{index}: tensor {tensor[:200]!r} is not in {name!r}, nor in any shard"
            )
        if names[tensors[tensor].file] != name:
            raise ModelError(
                f"{index}: tensor {tensor[:200]!r} is said to lie in {name!r}, but lies in"
                f" {names[tensors[tensor].file]!r}"
            )
    return paths, tensors


class Match(NamedTuple):
    """Where an engine tensor lies in a checkpoint."""

    shape: tuple[int, ...]  # of the engine's tensor
    part: Part
    stored: tuple[Stored, ...]  # what it is cut from: none for a norm without parameters


def match(
    config: Config, paths: list[Path], tensors: dict[str, Stored]
) -> tuple[dict[str, Match], tuple[str, ...]]:
    """(engine name -> where it lies, names of tensors that are not needed). Raises ModelError for a
    missing tensor, a shape that contradicts the config, a dtype that the engine does not hold, and
    weights inside the layers that this architecture does not have.
    """
    folder = paths[0].parent
    refuse_tensors(str(folder), tensors)
    prefix, unembed = text_prefix(folder, tensors, config), unembed_name(tensors, config)
    result: dict[str, Match] = {}
    used: set[str] = set()
    for name, shape in engine_tensors(config):
        part, names = place(name, shape, config, prefix, unembed)
        for hf in names:
            if hf not in tensors:
                hint = UNTIED_WITHOUT_UNEMBED if name == "unembed" else ""
                raise ModelError(f"{folder}: tensor {hf!r} is missing{hint}")
            where = f"{paths[tensors[hf].file]}: tensor {hf!r}"
            _check_stored(where, tensors[hf], stored_shape(part, shape, config))
        found = tuple(tensors[hf] for hf in names)
        if len({stored.dtype for stored in found}) > 1:
            raise ModelError(
                f"{folder}: tensor {names[0]!r} and those of the other heads have different dtypes"
            )
        result[name] = Match(shape, part, found)
        used.update(names)
    extra = tuple(n for n in tensors if n not in used)
    inside = prefix + layout_of(config).layers
    stray = next(
        (n for n in extra if n.startswith(inside) and not HARMLESS_LAYER_TENSOR.search(n)),
        None,
    )
    if stray is not None:
        raise ModelError(
            f"{paths[tensors[stray].file]}: tensor {stray[:200]!r} belongs to no part of a"
            f" {config.architecture} with this config; ignoring it would change the numbers"
        )
    return result, extra


def _check_stored(where: str, stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.dtype not in DTYPES:
        raise ModelError(
            f"{where}: dtype {stored.dtype[:40]!r} is not supported; supported: {', '.join(DTYPES)}"
        )
    if stored.shape != shape:
        turned = len(shape) == 2 and stored.shape == shape[::-1]
        raise ModelError(
            f"{where}: shape {list(stored.shape)} contradicts the config, which asks for"
            f" {list(shape)}{'; it is transposed' if turned else ''}"
        )
