"""Sparse autoencoders in files: the params.npz of Gemma Scope and the folders of SAELens.

A file is untrusted: nothing is unpickled, and every shape is checked against the file's bytes
before anything is allocated.
"""

from __future__ import annotations

import io
import math
import re
import struct
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ..base.checks import is_number
from ..base.json_files import read_json
from ..base.lfs import lfs_pointer
from ..base.types import Array, PathLike
from ..errors import ModelError
from ..loading.dtypes import STORAGE, convert
from ..loading.safetensors_files import read_header
from ..loading.stored_tensors import DTYPES
from .autoencoder import SAE
from .saelens import arguments

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_DAMAGED = (
    *(zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError),
    *(struct.error, zlib.error, SyntaxError, MemoryError, tokenize.TokenError),
)
_GEMMA_SCOPE = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def load(path: PathLike, *, site: str | None = None, scale: float | None = None) -> SAE:
    """A sparse autoencoder from a file of Gemma Scope or a folder of SAELens.

    path: a .npz file with W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D] and threshold [F] (kind
    "jumprelu"), or a folder with it as params.npz; a folder with cfg.json and
    sae_weights.safetensors; or the name of a bundled model, for the autoencoder that comes with
    it ("tiny-llama-chat"). site: what it encodes, where the file does not say, for example
    "blocks.20.hook_resid_post". A path of Gemma Scope's residual autoencoders says it: "layer_20"
    in it is the output of block 20. scale: the factor on activations that an autoencoder of
    SAELens with normalize_activations "expected_average_only_in" was trained with.

    Keys of cfg.json that change the numbers are followed (architecture, k, apply_b_dec_to_input,
    activation_fn, rescale_acts_by_decoder_norm, normalize_activations, hook_name) or refused by
    name; unknown keys are named in a warning.

    Returns an SAE. Raises ModelError, naming the file, for files that are missing, damaged or of
    another kind; ValueError for arrays that do not fit together, architectures that are not known,
    and a site that contradicts the file's own.
    """
    if scale is not None and (not is_number(scale) or scale <= 0):
        raise ValueError(f"scale must be a positive number, not {scale!r}")
    found = _located(path)
    if found.is_dir() and (found / CONFIG).exists():
        return _from_saelens(found, site, scale)
    if found.is_dir():
        found = found / "params.npz"
    if not found.exists():
        raise ModelError(
            f"{path}: there is no autoencoder: a .npz file of Gemma Scope, or a folder with"
            f" {CONFIG} and {WEIGHTS}, is expected"
        )
    if found.suffix != ".npz":
        raise ModelError(f"{found}: neither a .npz file nor a folder with {CONFIG}")
    if scale is not None:
        raise ValueError("scale is for folders of SAELens: this is a .npz file")
    return _from_npz(found, site)


def _located(path: PathLike) -> Path:
    bundled = Path(__file__).parents[1] / "models" / str(path) / "sae"
    if re.fullmatch(r"[\w-]+", str(path)) and not Path(path).exists() and bundled.exists():
        return bundled
    return Path(path).expanduser()


# -- Gemma Scope -----------------------------------------------------------------------------------


def _from_npz(path: Path, site: str | None) -> SAE:
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)
    members = _members(path)
    missing = [name for name in _GEMMA_SCOPE if name not in members]
    if missing:
        raise ModelError(
            f"{path}: {', '.join(missing)} missing: found {sorted(members)}, and an autoencoder of"
            f" Gemma Scope has {', '.join(_GEMMA_SCOPE)}"
        )
    unknown = sorted(set(members) - set(_GEMMA_SCOPE))
    if unknown:
        raise ModelError(f"{path}: {', '.join(unknown)} would be ignored: what kind is this?")
    meta = {"read_from": f"Gemma Scope: {path.name}"}
    W_enc, b_enc, W_dec, b_dec, threshold = (members[name] for name in _GEMMA_SCOPE)
    site = _agreed(path, site, _site_of_path(path))
    return SAE(W_enc, b_enc, W_dec, b_dec, threshold, site=site, meta=meta)


def _site_of_path(path: Path) -> str | None:
    """blocks.20.hook_resid_post of .../layer_20/width_16k/average_l0_71/params.npz, unless another
    part of the path says that it encodes another site.
    """
    text = "/".join(path.resolve().parts[-6:])
    found = re.findall(r"(?:^|/)layer_(\d{1,5})(?=/)", text)
    other = re.search(r"gemma-scope[^/]*-(att|mlp|transcoders?)(?:/|-|$)|/embedding/", text)
    return f"blocks.{int(found[-1])}.hook_resid_post" if found and not other else None


def _agreed(path: Path, given: str | None, own: str | None) -> str | None:
    if given is not None and own is not None and given != own:
        raise ValueError(f"{path} says that it encodes {own}, not {given}: leave site out")
    return given if own is None else own


def _members(path: Path) -> dict[str, Array]:
    """{name: array} of an npz file; np.load would allocate what a member's header says, here the
    header must agree with the bytes.
    """
    arrays: dict[str, Array] = {}
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise ValueError(f"member {name!r} occurs twice")
                if entry.file_size > 8 * size + (1 << 20):
                    raise ValueError(f"member {name!r} claims {entry.file_size:,} bytes")
                arrays[name] = _npy(name, archive.read(entry))
    except _DAMAGED as error:
        raise ModelError(f"{path}: damaged npz file: {error}") from None
    return arrays


def _npy(name: str, data: bytes) -> Array:
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the npy format")
    header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = header(stream)
    rest = memoryview(data)[stream.tell() :]
    if dtype.kind != "f" or len(shape) > 2:
        raise ValueError(f"member {name!r} holds {dtype} {shape}, not a matrix or row of numbers")
    if math.prod(shape) * dtype.itemsize != len(rest):
        raise ValueError(f"member {name!r} says {dtype} {shape} but has {len(rest)} bytes")
    return np.frombuffer(rest, dtype=dtype).reshape(shape, order="F" if fortran else "C")


# -- SAELens ---------------------------------------------------------------------------------------


def _from_saelens(folder: Path, site: str | None, scale: float | None) -> SAE:
    config = read_json(folder / CONFIG, limit=1 << 24)
    if not (folder / WEIGHTS).exists():
        raise ModelError(f"{folder}: {WEIGHTS} is missing")
    tensors = _tensors(folder / WEIGHTS)
    made, noted = arguments(str(folder), config, tensors, scale)
    for text in noted:
        warnings.warn(f"{folder / CONFIG}: {text}", stacklevel=4)
    own = made.pop("site")
    return SAE(**made, site=_agreed(folder, site, own))


def _tensors(path: Path) -> dict[str, Any]:
    """All tensors of a safetensors file as float32."""
    arrays = {}
    with open(path, "rb") as stream:
        for name, stored in read_header(path).items():
            if stored.dtype not in DTYPES:
                raise ModelError(f"{path}: {name!r} is {stored.dtype}, not F32, F16 or BF16")
            stream.seek(stored.offset)
            dtype = DTYPES[stored.dtype]
            flat = np.frombuffer(stream.read(stored.nbytes), STORAGE[dtype])
            arrays[name] = convert(flat, dtype, "float32").reshape(stored.shape)
    return arrays
