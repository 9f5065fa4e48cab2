"""A model's files: `open_model` finds and checks them and returns a `ModelFiles`, which holds the
config, a table of tensors and the tokenizer.

The table says where each tensor's bytes are, or converts them on demand. Weights are not read here:
the engine maps the files. Large packages (huggingface_hub, tokenizers, gguf) are imported where
they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.json_files import read_json
from ..base.lfs import lfs_pointer
from ..base.types import Array, PathLike
from ..errors import ModelError
from . import dtypes, layouts
from .checkpoint_kinds import without_config
from .config import CONFIG_BYTES, Config, check_overrides
from .hf_config import token_ids
from .locate import MODEL_PATTERNS, is_gguf, locate, only_gguf
from .stored_tensors import DTYPES as STORED_DTYPES

if TYPE_CHECKING:
    from .gguf_file import GGUFFile
    from .gguf_tensors import Piece
    from .safetensors_files import Match
    from .tokenizer import Tokenizer

DTYPES = ("auto", *dtypes.STORAGE)


@dataclass(frozen=True)
class TensorEntry:
    """One tensor for the engine. Either bytes of a file (`file` is an index into ModelFiles.paths)
    or converted on demand (`file` is None).
    """

    name: str  # docs/architecture.md
    # "float32", "bfloat16" or "float16": what `array()` gives and what the file range holds
    dtype: str
    shape: tuple[int, ...]
    file: int | None = None
    offset: int = 0
    nbytes: int = 0
    _load: Callable[[], Array] | None = field(default=None, repr=False, compare=False)

    def array(self) -> Array:
        """The values, C-contiguous, `shape`, in `dtype` (bfloat16 as uint16 bits); a fresh array
        each time. ModelError if damaged.
        """
        assert self._load is not None
        return self._load()


@dataclass(frozen=True)
class ModelFiles:
    """An opened model. Iterate `tensors` once, front to back, and drop each array before asking for
    the next: memory stays small.
    """

    config: Config
    paths: tuple[str, ...]  # files that entries point into
    tensors: tuple[TensorEntry, ...]  # in the forward pass's order
    extra: tuple[str, ...]  # names of tensors in the files that the engine does not need
    folder: Path | None  # None for GGUF
    gguf: GGUFFile | None = None  # open
    generation_eos: tuple[int, ...] = ()  # end tokens of generation_config.json

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they will be handed down."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """End tokens of the config and of generation_config.json; a tokenizer may know more
        (`Tokenizer.eos_ids`).
        """
        return tuple(dict.fromkeys(self.generation_eos + self.config.eos_ids))

    def tokenizer(self, template_options: Mapping[str, Any] | None = None) -> Tokenizer | None:
        """A `tokenizer.Tokenizer`, or None for a folder without one. template_options: as in
        `Model.from_pretrained`.
        """
        from .tokenizer import Tokenizer

        if self.gguf is not None:
            return Tokenizer.from_gguf(
                self.gguf, d_vocab=self.config.d_vocab, template_options=template_options
            )
        assert self.folder is not None  # there is a folder or a GGUF file
        return Tokenizer.from_folder(
            self.folder,
            eos_ids=self.eos_ids,
            bos_id=self.config.bos_id,
            template_options=template_options,
        )

    def close(self) -> None:
        """Releases the mapped GGUF file, if any."""
        if self.gguf is not None:
            self.gguf.close()


def open_model(
    source: PathLike,
    *,
    dtype: str = "auto",
    revision: str | None = None,
    config_overrides: Mapping[str, Any] | None = None,
) -> ModelFiles:
    """Finds and checks a model's files.

    config_overrides: keys of config.json to replace (`Model.from_pretrained`).

    dtype: "auto" keeps what is stored and makes bfloat16 of quantised matrices; "float32",
    "bfloat16", "float16" convert matrices on the way (vectors, that is gains and biases, stay as
    stored). Raises ModelError for files, ValueError for a dtype, TypeError for a source.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    path = locate(source, revision=revision, patterns=MODEL_PATTERNS)
    if path.is_dir() and not (path / "config.json").exists():
        only = only_gguf(path)
        if only is None:
            raise ModelError(without_config(path))
        path = only
    if path.is_file() and is_gguf(path):
        check_overrides(config_overrides, path)
        return _open_gguf(path, dtype)
    if not path.is_dir():
        raise ModelError(
            f"{path} is a configuration alone, without weights; Config.from_pretrained reads it, or"
            " name its folder"
        )
    return _open_folder(path, dtype, config_overrides)


def _open_folder(
    folder: Path, dtype: str, config_overrides: Mapping[str, Any] | None = None
) -> ModelFiles:
    from . import safetensors_files as st
    from . import tied_tensors

    config = Config.from_json(folder / "config.json", config_overrides=config_overrides)
    paths, stored = st.read_checkpoint(folder)
    config, stored = tied_tensors.settle(config, paths, stored)
    matched, extra = st.match(config, paths, stored)
    entries = [_entry(name, m, paths, config, dtype) for name, m in matched.items()]
    generation = folder / "generation_config.json"
    eos = (
        token_ids(read_json(generation, limit=CONFIG_BYTES), "eos_token_id")
        if generation.exists()
        else ()
    )
    return ModelFiles(
        config, tuple(str(p) for p in paths), tuple(entries), extra, folder, generation_eos=eos
    )


def _entry(name: str, match: Match, paths: list[Path], config: Config, dtype: str) -> TensorEntry:
    """A tensor of a safetensors checkpoint: bytes of a file where they are stored as the engine
    takes them, else an array.
    """
    part, shape = match.part, match.shape
    if not match.stored:  # a norm without parameters
        return _ones(name, shape)
    first = match.stored[0]
    stored = STORED_DTYPES[first.dtype]
    ranges = layouts.row_ranges(part, shape, config)
    row = first.nbytes // first.shape[0] if part.how != "flat" else first.nbytes // shape[0]
    path = paths[first.file]
    if ranges is not None and len(ranges) == 1:
        ((begin, rows),) = ranges
        offset = first.offset + begin * row
        return _mapped_entry(name, stored, shape, path, first.file, offset, rows * row, dtype)

    def turned() -> Array:
        if ranges is not None:
            spans = [(first.offset + begin * row, rows * row) for begin, rows in ranges]
            return _read(name, stored, shape, path, spans)
        whole = [
            _read(name, stored, t.shape, paths[t.file], [(t.offset, t.nbytes)])
            for t in match.stored
        ]
        return layouts.cut(part, whole, shape, config)

    if dtype in ("auto", stored) or len(shape) < 2:
        nbytes = int(np.prod(shape)) * dtypes.STORAGE[stored].itemsize
        return TensorEntry(name, stored, shape, nbytes=nbytes, _load=turned)
    return _converted(name, stored, shape, path, dtype, turned)


def _mapped_entry(
    name: str,
    stored: str,
    shape: tuple[int, ...],
    path: Path,
    file: int,
    offset: int,
    nbytes: int,
    dtype: str,
) -> TensorEntry:
    """A tensor as the bytes of a file, or converted where another dtype is asked for."""

    def read() -> Array:
        return _read(name, stored, shape, path, [(offset, nbytes)])

    if dtype in ("auto", stored) or len(shape) < 2:
        return TensorEntry(name, stored, shape, file, offset, nbytes, read)
    return _converted(name, stored, shape, path, dtype, read)


def _read(
    name: str, stored: str, shape: tuple[int, ...], path: Path, spans: list[tuple[int, int]]
) -> Array:
    """A tensor from the bytes of a file; spans: (offset, bytes), one after another."""
    data = bytearray(sum(nbytes for _, nbytes in spans))
    view, at = memoryview(data), 0
    with open(path, "rb") as stream:
        for offset, nbytes in spans:
            stream.seek(offset)
            if stream.readinto(view[at : at + nbytes]) != nbytes:
                raise ModelError(
                    f"{path}: tensor {name!r} ends outside the file; it was changed while it was"
                    " read"
                )
            at += nbytes
    return np.frombuffer(data, dtype=dtypes.STORAGE[stored]).reshape(shape)


def _converted(
    name: str,
    stored: str,
    shape: tuple[int, ...],
    path: Path,
    dtype: str,
    read: Callable[[], Array],
) -> TensorEntry:
    """A tensor in another dtype than the stored one."""

    def converted() -> Array:
        values = dtypes.convert(read(), stored, dtype)
        if dtype == "float16" and not np.isfinite(values).all():
            raise ModelError(
                f"{path}: tensor {name!r} has values that float16 cannot hold; use bfloat16 or"
                " float32"
            )
        return values

    nbytes = int(np.prod(shape)) * dtypes.STORAGE[dtype].itemsize
    return TensorEntry(name, dtype, shape, nbytes=nbytes, _load=converted)


def _open_gguf(path: Path, dtype: str) -> ModelFiles:
    from .gguf_parts import open_gguf
    from .gguf_tensors import match

    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)
    file = open_gguf(path)
    try:
        config = Config.from_gguf(file)
        pieces, extra = match(file, config)
        entries = [_gguf_entry(file, name, piece, dtype) for name, piece in pieces.items()]
    except BaseException:
        file.close()
        raise
    paths = tuple(str(part.path) for part in file.parts)
    return ModelFiles(config, paths, tuple(entries), extra, None, gguf=file)


def _gguf_entry(file: GGUFFile, name: str, piece: Piece, dtype: str) -> TensorEntry:
    """A tensor of a GGUF file: bytes of the file where they are stored as the engine takes them,
    else an array.
    """
    from .gguf_file import PLAIN

    tensor, shape = piece.tensor, piece.shape
    if tensor is None:
        return _ones(name, shape)
    plain, elements = PLAIN.get(tensor.type), int(np.prod(shape))
    if plain and not piece.heads and (len(shape) < 2 or dtype in ("auto", plain)):
        size = dtypes.STORAGE[plain].itemsize
        offset = tensor.offset + piece.first * int(np.prod(shape[1:])) * size
        path = file.parts[tensor.part].path
        return _mapped_entry(name, plain, shape, path, tensor.part, offset, elements * size, "auto")
    if dtype == "auto" or len(shape) < 2:
        target = plain or ("bfloat16" if len(shape) >= 2 else "float32")
    else:
        target = dtype

    def read() -> Array:
        part = elements != int(np.prod(tensor.shape))
        rows = (piece.first, shape[0]) if part else None
        values = file.array(tensor.name, target, permuted_heads=piece.heads, rows=rows)
        return values.reshape(shape)

    nbytes = elements * dtypes.STORAGE[target].itemsize
    return TensorEntry(name, target, shape, nbytes=nbytes, _load=read)


def _ones(name: str, shape: tuple[int, ...]) -> TensorEntry:
    """The gains of a norm without parameters."""
    ones = np.ones(shape, dtype=np.float32)
    return TensorEntry(name, "float32", shape, nbytes=ones.nbytes, _load=ones.copy)
