"""Steering vectors in files: safetensors, npz without pickle, and GGUF control vectors.

A file is untrusted: every count, length and offset is checked against the file's bytes before
anything is read or allocated, and what does not fit is a ModelError that names the file and the
reason. An interrupted save never leaves half a file.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import require_int
from ..base.json_files import parse_json
from ..base.lfs import lfs_pointer
from ..base.types import Array, Float32Array, PathLike
from ..base.whole_files import write_whole
from ..errors import ModelError
from ..loading.dtypes import STORAGE, convert
from ..loading.gguf_file import GGUFFile
from ..loading.safetensors_files import read_header
from ..loading.stored_tensors import DTYPES, Stored

if TYPE_CHECKING:
    from .vectors import SteeringVector

ENDINGS = (".safetensors", ".npz", ".gguf")
FORMAT = "vksteer.steering_vector"
#: No steering vector needs more: a million numbers, or a few thousand layers of a wide model.
MAX_BYTES = 1 << 30

#: direction [D], layer, position, method, meta.
Fields: TypeAlias = tuple[Float32Array, int, int | None, str, dict[str, Any]]


def save(vector: SteeringVector, path: PathLike) -> None:
    """See `SteeringVector.save`."""
    path = Path(path)
    ending = _ending(path)
    if vector.norm == 0:
        raise ValueError("a zero vector steers nothing and is not saved")
    data = {".safetensors": _to_safetensors, ".npz": _to_npz, ".gguf": _to_gguf}[ending](vector)
    write_whole(path, data)


def load(path: PathLike, layer: int | None = None) -> Fields:
    """(direction, layer, position, method, meta) of a file, as `SteeringVector` takes them."""
    path = Path(path)
    ending = _ending(path)
    if layer is not None:
        layer = require_int(layer, "layer")
    check_size(path)
    readers = {".safetensors": _from_safetensors, ".npz": _from_npz, ".gguf": _from_gguf}
    return readers[ending](path, layer)


def layers(path: PathLike) -> list[int]:
    """See `SteeringVector.list`."""
    path = Path(path)
    ending = _ending(path)
    check_size(path)
    if ending == ".gguf":
        with GGUFFile(path) as file:
            return sorted(_gguf_layers(path, file))
    found: Iterable[str] = read_header(path) if ending == ".safetensors" else npz_members(path)
    several = _numbered(found)
    return sorted(several) if several else [load(path)[1]]


def check_size(path: Path) -> None:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ModelError(
            f"{path}: {size} bytes are too many for a steering vector (at most {MAX_BYTES})"
        )
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)


def _ending(path: Path) -> str:
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"a steering vector is saved as one of {', '.join(ENDINGS)}, not"
            f" {path.suffix or 'without an ending'!r} ({path.name})"
        )
    return ending


# -- what all three write about a vector, as texts -------------------------------------------------


def _facts(vector: SteeringVector) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": "1",
        "layer": str(vector.layer),
        "position": "" if vector.position is None else str(vector.position),
        "method": vector.method,
        "operation": "add",
        "meta": json.dumps(dict(vector.meta), sort_keys=True),
    }


def _read_facts(
    path: Path, facts: Mapping[str, str], asked: int | None
) -> tuple[int, int | None, str, dict[str, Any]]:
    """layer, position, method, meta from the texts of `_facts`; none of them is trusted."""
    if facts.get("format") != FORMAT:
        raise ModelError(
            f"{path}: no steering vector of vksteer (its format is {facts.get('format')!r}, not"
            f" {FORMAT!r})"
        )
    if facts.get("version") != "1":
        raise ModelError(
            f"{path}: version {facts.get('version')!r} of the vector format is not understood: a"
            " newer vksteer wrote it"
        )
    try:
        layer = int(facts["layer"])
        position = int(facts["position"]) if facts.get("position") else None
        meta = json.loads(facts.get("meta") or "{}")
    except (KeyError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: layer, position or meta cannot be read: {error!r}") from None
    if not isinstance(meta, dict):
        raise ModelError(f"{path}: meta must be a JSON object, not {type(meta).__name__}")
    if asked is not None and asked != layer:
        raise ValueError(
            f"{path} holds a vector for layer {layer}, not {asked}: leave layer out, or name"
            " that one"
        )
    return layer, position, facts.get("method", ""), meta


# -- one direction for each layer, as other programs write them ------------------------------------
#
# repeng keeps {N: direction}, where direction N is added to the output of block N: the input of
# layer N + 1. Its own files are GGUF; in npz and safetensors the entries are called N or
# direction.N.

_NUMBERED = re.compile(r"(?:direction\.)?(0|[1-9][0-9]{0,8})", re.ASCII)


def _numbered(names: Iterable[str]) -> dict[int, str]:
    """{layer: name} where all names are of that kind; {} otherwise."""
    matches = [(_NUMBERED.fullmatch(name), name) for name in names]
    if not all(match for match, _ in matches):
        return {}
    return {int(match[1]) + 1: name for match, name in matches if match}


def _choose(path: Path, several: Mapping[int, str], asked: int | None) -> int:
    """The layer that was asked for, or the only one. ValueError where it is not there."""
    if asked is None and len(several) > 1:
        raise ValueError(
            f"{path} holds directions for layers {sorted(several)} (as resid_pre; direction.N is"
            " layer N + 1): name one with layer="
        )
    layer = min(several) if asked is None else asked
    if layer not in several:
        raise ValueError(
            f"{path} holds no direction for layer {layer}: it has {sorted(several)} (as"
            " resid_pre; direction.N is layer N + 1)"
        )
    return layer


# -- safetensors -----------------------------------------------------------------------------------


def _to_safetensors(vector: SteeringVector) -> bytes:
    from safetensors.numpy import save as serialize

    return serialize({"direction": np.array(vector.direction)}, metadata=_facts(vector))


def _from_safetensors(path: Path, asked: int | None) -> Fields:
    tensors = read_header(path)
    several = _numbered(tensors)
    if several:
        layer = _choose(path, several, asked)
        return (
            _stored_row(path, several[layer], tensors[several[layer]]),
            layer,
            None,
            "",
            _foreign("safetensors"),
        )
    data = path.read_bytes()
    header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], str(path))
    facts = _read_facts(path, header.get("__metadata__") or {}, asked)
    if set(tensors) != {"direction"}:
        raise ModelError(f"{path}: expected one tensor named 'direction', found {sorted(tensors)}")
    tensor = tensors["direction"]
    return _stored_row(path, "direction", tensor), *facts


def _stored_row(path: Path, name: str, tensor: Stored) -> Float32Array:
    """One tensor of a safetensors file as float32 [D]."""
    if tensor.dtype not in DTYPES or len(tensor.shape) != 1:
        raise ModelError(
            f"{path}: {name!r} must be one row [D] of F32, F16 or BF16, not {tensor.dtype}"
            f" {list(tensor.shape)}"
        )
    stored = DTYPES[tensor.dtype]
    with open(path, "rb") as stream:
        stream.seek(tensor.offset)
        data = stream.read(tensor.nbytes)
    row: Float32Array = convert(np.frombuffer(data, STORAGE[stored]), stored, "float32")
    return row


def _foreign(kind: str) -> dict[str, Any]:
    return {"read_from": f"{kind} with one direction for each layer"}


# -- npz: a zip of .npy members --------------------------------------------------------------------
#
# np.load would allocate what a member's header says; here the header must agree with the bytes.


def _to_npz(vector: SteeringVector) -> bytes:
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {name: np.array(text) for name, text in _facts(vector).items()}
    np.savez(buffer, direction=vector.direction, **arrays)
    return buffer.getvalue()


def npy_array(path: Path, name: str, data: bytes, axes: int = 1) -> Array:
    """Numbers or a text of one member; at most so many axes."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of the npy format")
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, by_columns, dtype = read(stream)
    # tokenize.TokenError is raised from Python 3.12 on
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError) as error:
        raise ModelError(f"{path}: member {name!r} is damaged: {error}") from None
    rest = data[stream.tell() :]
    if dtype.kind not in "fU" or len(shape) > axes or (by_columns and len(shape) > 1):
        raise ModelError(
            f"{path}: member {name!r} holds {dtype} {shape}, neither"
            f" {'a row of numbers' if axes == 1 else 'numbers by rows'} nor a text"
        )
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ModelError(f"{path}: member {name!r} says {dtype} {shape} but has {len(rest)} bytes")
    return np.frombuffer(rest, dtype=dtype).reshape(shape)


def npz_members(path: Path) -> dict[str, bytes]:
    """{name: .npy file} of an npz file."""
    data = path.read_bytes()
    members: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in members:
                    raise ModelError(f"{path}: member {name!r} occurs twice")
                # vksteer stores members or deflates them once; a larger ratio is a bomb.
                if entry.file_size > 4 * len(data) + (1 << 20):
                    raise ModelError(
                        f"{path}: member {name!r} claims {entry.file_size} bytes in a file of"
                        f" {len(data)}"
                    )
                members[name] = archive.read(entry)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        EOFError,
        OSError,
        struct.error,
        zlib.error,
    ) as error:
        raise ModelError(f"{path}: damaged npz file: {error}") from None
    return members


def _from_npz(path: Path, asked: int | None) -> Fields:
    members = npz_members(path)
    several = _numbered(members)
    if several:
        layer = _choose(path, several, asked)
        row = npy_array(path, several[layer], members[several[layer]])
        if row.dtype.kind != "f" or row.ndim != 1:
            raise ModelError(
                f"{path}: {several[layer]!r} must be one row [D] of numbers, not {row.dtype}"
                f" {list(row.shape)}"
            )
        with np.errstate(over="ignore"):  # SteeringVector refuses what is not finite
            return row.astype(np.float32), layer, None, "", _foreign("npz")
    arrays = {name: npy_array(path, name, member) for name, member in members.items()}
    if "direction" not in arrays:
        raise ModelError(f"{path}: expected a member 'direction', found {sorted(arrays)}")
    direction = arrays.pop("direction")
    if direction.dtype.kind != "f":
        raise ModelError(f"{path}: 'direction' must be numbers, not {direction.dtype}")
    texts = {}
    for name, value in arrays.items():
        if value.dtype.kind != "U" or value.ndim:
            raise ModelError(
                f"{path}: member {name!r} must be one text, not {value.dtype} {value.shape}"
            )
        try:
            texts[name] = str(value)
        except ValueError as error:  # code points that Unicode does not have
            raise ModelError(f"{path}: member {name!r} is no text: {error}") from None
    return direction, *_read_facts(path, texts, asked)


# -- GGUF control vectors --------------------------------------------------------------------------
#
# general.architecture is "controlvector", and there is one tensor direction.N [D] for each layer.
# llama.cpp adds direction.N to the output of block N, N >= 1. The input of layer l is the output of
# block l - 1, so N = l - 1 and l >= 2. The format does not say what is done with a direction;
# vksteer writes `vksteer.operation = add` and the rest of the provenance beside it.

ALIGNMENT = 32
_I32, _STRING = 5, 8  # value types
_F32 = 0  # tensor type


def _gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _to_gguf(vector: SteeringVector) -> bytes:
    if vector.layer < 2:
        raise ValueError(
            f"a GGUF control vector cannot hold layer {vector.layer}: direction.N (N >= 1) is added"
            " to the output of block N, so layers from 2 on can be written; save as .safetensors"
            " or .npz instead"
        )
    texts = {
        "general.architecture": "controlvector",
        "controlvector.model_hint": (
            str(vector.meta.get("architecture") or "unknown").removesuffix("_text")
        ),
    }
    texts |= {f"vksteer.{name}": text for name, text in _facts(vector).items()}
    fields = b"".join(
        _gguf_string(key) + struct.pack("<I", _STRING) + _gguf_string(text)
        for key, text in texts.items()
    )
    fields += _gguf_string("controlvector.layer_count") + struct.pack("<Ii", _I32, 1)
    header = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(texts) + 1) + fields
    header += _gguf_string(f"direction.{vector.layer - 1}") + struct.pack(
        "<IQIQ", 1, vector.width, _F32, 0
    )
    return _padded(_padded(header) + vector.direction.astype("<f4").tobytes())


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % ALIGNMENT)


def _gguf_layers(path: Path, file: GGUFFile) -> dict[int, str]:
    """{layer: name of its tensor}."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "controlvector":
        raise ModelError(
            f"{path}: the file's architecture is {architecture!r}, not 'controlvector': it is no"
            " control vector"
        )
    layers = {}
    for name, tensor in file.tensors.items():
        number = name.removeprefix("direction.")
        if (
            number == name
            or not (number.isascii() and number.isdigit())
            or number != str(int(number[:9]))
            or number == "0"
        ):
            raise ModelError(
                f"{path}: tensor {name!r} in a control vector: expected direction.N, N from 1 on"
            )
        if len(tensor.shape) != 1:
            raise ModelError(f"{path}: {name} must be one row [D], not {list(tensor.shape)}")
        layers[int(number) + 1] = name
    if not layers:
        raise ModelError(f"{path}: the file holds no direction")
    return layers


def _from_gguf(path: Path, asked: int | None) -> Fields:
    with GGUFFile(path) as file:
        fields = file.metadata
        several = _gguf_layers(path, file)
        layer = _choose(path, several, asked)
        direction = file.array(several[layer], "float32")
    ours = {
        key.removeprefix("vksteer."): text
        for key, text in fields.items()
        if key.startswith("vksteer.") and isinstance(text, str)
    }
    if not ours:
        hint = str(fields.get("controlvector.model_hint", ""))
        meta = {"architecture": hint, "read_from": "gguf control vector"}
        return direction, layer, None, "", meta
    stated, position, method, meta = _read_facts(path, ours, None)
    if stated != layer:
        raise ModelError(
            f"{path}: says layer {stated}, but its tensor is direction.{layer - 1}, which is"
            f" resid_pre of layer {layer}"
        )
    return direction, layer, position, method, meta
