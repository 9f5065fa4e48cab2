"""Reading GGUF files: a bounded parser for the header, and tensors dequantised one by one.

The header is parsed here rather than by the `gguf` package: every count, length, offset and shape
is checked before it is used (the known vulnerabilities of parsers of this format were numbers used
unchecked), and token lists of 262,144 strings are read in a tenth of the package's time. The
package's `gguf.quants` dequantises.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ..base.types import Array, Float32Array, PathLike
from ..errors import ModelError
from .dtypes import STORAGE, from_float32

MAX_TENSORS = 1 << 17
MAX_KEYS = 1 << 16
MAX_ARRAY = 1 << 24  # items in one metadata array; the largest vocabularies have 2**18
MAX_KEY_BYTES = 1 << 16
MAX_ALIGNMENT = 1 << 20
# elements dequantised at a time: they fit the processor's cache, and are one thread's unit of work
DEQUANTISE_ELEMENTS = 1 << 20

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9

#: ggml type id -> (name, elements a block, bytes a block); a test compares it with the
#: gguf package's table
TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
#: types that need no dequantisation -> the engine's dtype
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class GGUFTensor(NamedTuple):
    """A tensor as the header describes it, checked against the file."""

    name: str
    type: str  # "Q4_1", "F32", ...
    shape: tuple[int, ...]  # NumPy's order: slowest axis first
    offset: int  # bytes from the start of the file
    nbytes: int
    part: int = 0  # which file of a model in several, an index into GGUFFile.parts


class GGUFFile:
    """An open GGUF file: `.metadata` {key: value} (arrays of numbers as NumPy arrays, of strings as
    lists of str), `.tensors` {name: GGUFTensor}. `.parts` holds the files of a model that is split
    over several, this one first (`gguf_parts.open_gguf` joins them).

    Raises ModelError naming the file, the entry and the reason for anything that
    is not exactly right.
    """

    def __init__(self, path: PathLike) -> None:
        self.path = Path(path)
        self._others: list[GGUFFile] = []
        try:
            with open(self.path, "rb") as stream:
                self.size = os.fstat(stream.fileno()).st_size
                if self.size < 24:
                    raise self._error(f"{self.size} bytes is too short for a GGUF file")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmaps the file. Arrays that were handed out stay valid: they are copies."""
        for part in self.parts:
            with contextlib.suppress(BufferError):  # a view of the map is alive and keeps it open
                part._map.close()

    @property
    def parts(self) -> tuple[GGUFFile, ...]:
        """The files that hold the model's tensors, this one first."""
        return (self, *self._others)

    def join(self, other: GGUFFile) -> None:
        """Takes over the tensors of another part of the model, which is closed with this one.

        Raises ModelError where a tensor is in a part that was joined before.
        """
        self._others.append(other)
        for name, tensor in other.tensors.items():
            if name in self.tensors:
                raise other._error(f"tensor {name[:100]!r} is in another part, too")
            self.tensors[name] = tensor._replace(part=len(self._others))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _error(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: {what}")

    # ---- header ----

    def _parse(self) -> None:
        self._at, self._what = 0, "header"
        if self._map[:4] != b"GGUF":
            raise self._error(f"does not begin with 'GGUF' but {bytes(self._map[:4])!r}")
        self._at = 4
        version = self._scalar("<I")
        if version not in (2, 3):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            raise self._error(
                f"GGUF version {version} is not supported (2 and 3 are)"
                if swapped not in (2, 3)
                else "big-endian GGUF is not supported"
            )
        n_tensors, n_keys = self._scalar("<Q"), self._scalar("<Q")
        if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
            raise self._error(
                f"claims {n_tensors:,} tensors and {n_keys:,} metadata entries (limits"
                f" {MAX_TENSORS:,} and {MAX_KEYS:,})"
            )
        self.metadata: dict[str, Any] = {}
        for i in range(n_keys):
            self._what = f"metadata entry {i}"
            key = self._string(MAX_KEY_BYTES)
            self._what = f"metadata {key[:100]!r}"
            if key in self.metadata:
                raise self._error(f"{self._what} appears twice")
            self.metadata[key] = self._value(self._scalar("<I"))
        described = []
        for i in range(n_tensors):
            self._what = f"tensor entry {i}"
            described.append(self._tensor())
        self._place(described)

    def _take(self, count: int) -> int:
        """The offset of the next `count` bytes, which must be in the file; moves past them."""
        if count > self.size - self._at:
            raise self._error(
                f"{self._what}: needs {count:,} bytes at {self._at:,}, but the file has"
                f" {self.size:,}; truncated or damaged"
            )
        self._at += count
        return self._at - count

    def _scalar(self, code: str) -> Any:
        return struct.unpack_from(code, self._map, self._take(struct.calcsize(code)))[0]

    def _bytes(self, limit: int) -> bytes:
        length = self._scalar("<Q")
        if length > limit:
            raise self._error(f"{self._what}: a string of {length:,} bytes (limit {limit:,})")
        at = self._take(length)
        return self._map[at : at + length]

    def _string(self, limit: int) -> str:
        try:
            return self._bytes(limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{self._what}: a name is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            value = self._scalar(_SCALARS[kind])
            # 1e-5 was stored as float32: its shortest decimal is what the config said
            return float(str(np.float32(value))) if kind == 6 else value
        if kind == _STRING:
            return self._bytes(self.size).decode("utf-8", "replace")
        if kind != _ARRAY:
            raise self._error(f"{self._what}: unknown value type {kind}")
        item, count = self._scalar("<I"), self._scalar("<Q")
        if count > MAX_ARRAY:
            raise self._error(f"{self._what}: an array of {count:,} items (limit {MAX_ARRAY:,})")
        if item in _SCALARS:
            dtype = np.dtype(_SCALARS[item])
            at = self._take(count * dtype.itemsize)
            return np.frombuffer(
                self._map[at : at + count * dtype.itemsize], dtype=np.uint8 if item == 7 else dtype
            )
        if item != _STRING:
            raise self._error(f"{self._what}: an array of value type {item} is not supported")
        return self._strings(count)

    def _strings(self, count: int) -> list[str]:
        # Most of the time of opening a file goes here (262,144 tokens), hence one bounds check for
        # each string and local names only.
        data, at, size, unpack = self._map, self._at, self.size, struct.Struct("<Q").unpack_from
        if count * 8 > size - at:
            raise self._error(
                f"{self._what}: {count:,} strings do not fit the file; truncated or damaged"
            )
        result: list[bytes] = []
        append = result.append
        for _ in range(count):
            if at + 8 > size:
                break
            length = unpack(data, at)[0]
            at += 8
            if length > size - at:
                break
            append(data[at : at + length])
            at += length
        if len(result) != count:
            raise self._error(
                f"{self._what}: string {len(result):,} of {count:,} ends outside the file;"
                " truncated or damaged"
            )
        self._at = at
        return [s.decode("utf-8", "replace") for s in result]

    def _tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """(name, type, shape, offset in the data, bytes) of the next tensor entry."""
        name = self._string(MAX_KEY_BYTES)
        self._what = f"tensor {name[:100]!r}"
        n_dims = self._scalar("<I")
        if not 1 <= n_dims <= 4:
            raise self._error(f"{self._what}: {n_dims} dimensions (1 to 4 are legal)")
        shape = [self._scalar("<Q") for _ in range(n_dims)]
        type_id, offset = self._scalar("<I"), self._scalar("<Q")
        if type_id not in TYPES:
            raise self._error(f"{self._what}: unknown tensor type {type_id}")
        kind, block, block_bytes = TYPES[type_id]
        if any(not 1 <= n < 1 << 40 for n in shape) or shape[0] % block:
            raise self._error(
                f"{self._what}: shape {shape} is not positive in whole blocks of {block} ({kind})"
            )
        elements = 1
        for n in shape:
            elements *= n
        return name, kind, tuple(reversed(shape)), offset, elements // block * block_bytes

    def _place(self, described: list[tuple[str, str, tuple[int, ...], int, int]]) -> None:
        """Fills `tensors`. They must follow one another in the data, each padded to the alignment,
        without overlap or gap, and nothing may follow the last.
        """
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= MAX_ALIGNMENT
            or alignment & (alignment - 1)
        ):
            raise self._error(
                f"metadata 'general.alignment' = {alignment!r} is not a power of two up to"
                f" {MAX_ALIGNMENT:,}"
            )
        start = _round_up(self._at, alignment)
        self.tensors: dict[str, GGUFTensor] = {}
        for name, kind, shape, offset, nbytes in described:
            if name in self.tensors:
                raise self._error(f"tensor {name[:100]!r} appears twice")
            if start + offset + nbytes > self.size:
                raise self._error(
                    f"tensor {name[:100]!r}: bytes {offset:,}+{nbytes:,} of the data lie outside"
                    f" the file ({self.size:,} bytes); truncated or damaged"
                )
            self.tensors[name] = GGUFTensor(name, kind, shape, start + offset, nbytes)
        at = start
        for t in sorted(self.tensors.values(), key=lambda t: t.offset):
            if t.offset != at:
                raise self._error(
                    f"tensor {t.name[:100]!r} begins at byte {t.offset:,}, expected {at:,}: tensors"
                    f" {'overlap' if t.offset < at else 'leave a gap'}"
                )
            end = t.offset + t.nbytes
            at = _round_up(end, alignment)
        if self.tensors and not end <= self.size <= at:
            raise self._error(f"{self.size - end:,} bytes after the last tensor belong to nothing")

    # ---- tensors ----

    def raw(self, tensor: GGUFTensor) -> Array:
        """The tensor's bytes, uint8 [rows, bytes a row]: a view of the mapped file. The elements of
        a vector that is not quantised are rows.
        """
        rows = 1
        for n in tensor.shape if _by_element(tensor) else tensor.shape[:-1]:
            rows *= n
        return np.frombuffer(
            self.parts[tensor.part]._map,
            dtype=np.uint8,
            count=tensor.nbytes,
            offset=tensor.offset,
        ).reshape(rows, -1)

    def array(
        self,
        name: str,
        dtype: str,
        permuted_heads: int = 0,
        rows: tuple[int, int] | None = None,
    ) -> Array:
        """The tensor as a C-contiguous array of `dtype` ("float32", "bfloat16" as uint16 bits,
        "float16"), rounded to nearest even.

        permuted_heads: the number of heads whose rows were interleaved for rotation (llama's q and
        k): their order is undone. rows: (first, count), of a matrix that holds several tensors or
        of the elements of a vector.
        """
        tensor = self.tensors[name]
        raw = self.raw(tensor)
        shape = tensor.shape
        if rows is not None:
            if len(shape) == 1 and not _by_element(tensor):
                raise self._error(f"tensor {name!r} is a quantised vector of several parts")
            raw, shape = raw[rows[0] : rows[0] + rows[1]], (rows[1], *shape[1:])
        # rows are whole blocks, so bytes can be moved before anything is dequantised
        if permuted_heads:
            raw = raw.reshape(permuted_heads, -1, 2, raw.shape[1]).swapaxes(1, 2).reshape(raw.shape)
        count, row = raw.shape[0], 1 if _by_element(tensor) else shape[-1]
        out = np.empty((count, row), dtype=STORAGE[dtype])
        dequantize = _dequantizer(self, tensor)
        step = max(1, DEQUANTISE_ELEMENTS // row)

        def work(begin: int) -> None:
            out[begin : begin + step] = from_float32(
                dequantize(raw[begin : begin + step]).reshape(-1, row), dtype
            )

        # Damaged blocks hold any bits as scales: infinities and NaN are found below,
        # not warned about here.
        if count <= step:
            with np.errstate(all="ignore"):
                work(0)
        else:
            list(_threads().map(work, range(0, count, step)))
        if not _all_finite(out, dtype):
            raise self._error(
                f"tensor {name!r} holds values that are not finite"
                + (" in float16" if dtype == "float16" else "")
            )
        return out.reshape(shape)


def _by_element(tensor: GGUFTensor) -> bool:
    """Whether this is a vector whose elements can be told apart in the file."""
    return len(tensor.shape) == 1 and tensor.type in PLAIN


def _all_finite(out: Array, dtype: str) -> bool:
    if dtype == "bfloat16":  # held as bits: all ones in the exponent are infinity or NaN
        return not bool(((out & np.uint16(0x7F80)) == np.uint16(0x7F80)).any())
    return bool(np.isfinite(out).all())


def _round_up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


@cache
def _threads() -> ThreadPoolExecutor:
    """A few threads, made on first use: NumPy releases the GIL while it dequantises."""
    return ThreadPoolExecutor(
        max_workers=max(1, min(8, len(os.sched_getaffinity(0)))),
        thread_name_prefix="vksteer-gguf",
        initializer=lambda: np.seterr(all="ignore"),
    )


# Threads do not survive a fork.
os.register_at_fork(after_in_child=_threads.cache_clear)


def _dequantizer(file: GGUFFile, tensor: GGUFTensor) -> Callable[[Array], Float32Array]:
    """A function from raw uint8 [rows, bytes a row] to float32 [rows, row]."""
    if tensor.type == "F32":
        return lambda raw: np.ascontiguousarray(raw).view("<f4")
    if tensor.type == "F16":
        return lambda raw: np.ascontiguousarray(raw).view("<f2").astype(np.float32)
    if tensor.type == "BF16":
        return lambda raw: (
            np.ascontiguousarray(raw).view("<u2").astype(np.uint32) << np.uint32(16)
        ).view(np.float32)
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"{file.path}: reading quantised tensors ({tensor.type}) needs the gguf package: pip"
            " install 'vksteer[gguf]'"
        ) from error
    kind = gguf.GGMLQuantizationType.__members__.get(tensor.type)

    def dequantize(raw: Array) -> Float32Array:
        try:
            if kind is None:
                raise NotImplementedError
            return gguf.quants.dequantize(np.ascontiguousarray(raw), kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{file.path}: tensor {tensor.name!r}: the installed gguf package cannot dequantise"
                f" {tensor.type}"
            ) from error

    return dequantize


def end_tokens(md: Mapping[str, Any]) -> list[int]:
    """All end-of-text and end-of-turn ids that the file names."""
    keys = (
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.eom_token_id",
    )
    ids = [md[k] for k in keys if isinstance(md.get(k), int)]
    more = md.get("tokenizer.ggml.eos_token_ids")  # as Ollama writes several
    if isinstance(more, np.ndarray) and more.dtype.kind in "iu":
        ids += more.tolist()
    return list(dict.fromkeys(ids))
