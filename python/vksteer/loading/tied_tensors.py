"""Tied embeddings in safetensors checkpoints: under which of the two names the tensor is stored,
and whether the two tensors of a file agree with the config's tie_word_embeddings.

The rule is that of transformers 5.24 (`PreTrainedModel.tie_weights`): with the flag set, either
name serves for both; where both are stored and differ, both are used as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..base.types import Float32Array
from ..errors import ModelError
from . import dtypes
from .config import Config
from .layouts import LAYOUTS, Layout, layout_of
from .stored_tensors import DTYPES, Stored

COMPARED_ELEMENTS = 1 << 20  # elements of the two tensors that are compared at a time

UNTIED_WITHOUT_UNEMBED = (
    ", and 'tie_word_embeddings' of the config is false; if the model's embeddings are tied, load"
    " it with config_overrides={'tie_word_embeddings': True}"
)

_said: set[str] = set()  # folders of which the difference has been said


def is_tied_name(name: str) -> bool:
    """Whether this is one of the names under which tied embeddings are stored."""
    return any(name in layout.unembed or name in _embeds(layout) for layout in LAYOUTS.values())


def _embeds(layout: Layout) -> list[str]:
    return [prefix + layout.embed for prefix in layout.prefixes]


def text_prefix(folder: Path, names: Collection[str], config: Config) -> str:
    """The prefix of the text model's tensors. Raises ModelError where there is none, or two."""
    layout = layout_of(config)
    found = [p for p in layout.prefixes if p + layout.embed in names]
    if len(found) == 1:
        return found[0]
    expected = ", ".join(map(repr, _embeds(layout)))
    near = [n for n in names if n.endswith(layout.embed)]
    listed = ", ".join(repr(n[:200]) for n in near) or "none of them is there"
    raise ModelError(f"{folder}: expected exactly one of {expected}; found: {listed}")


def unembed_name(names: Collection[str], config: Config) -> str:
    """The name of the unembedding's tensor."""
    known = layout_of(config).unembed
    return next((n for n in known if n in names), known[0])


def settle(
    config: Config, paths: list[Path], tensors: dict[str, Stored]
) -> tuple[Config, dict[str, Stored]]:
    """(config, tensors) after the rule of this module: an embedding that is stored as the
    unembedding gets its own name; a tied config becomes untied where the two tensors differ, which
    is said once with a warning.
    """
    unembed, layout = unembed_name(tensors, config), layout_of(config)
    if not config.tied or unembed not in tensors:
        return config, tensors
    embeds = _embeds(layout)
    if not any(name in tensors for name in embeds):
        first = layout.layers + "0."
        inside = (p for p in layout.prefixes if any(n.startswith(p + first) for n in tensors))
        renamed = {unembed: next(inside, layout.prefixes[0]) + layout.embed}
        return config, {renamed.get(name, name): stored for name, stored in tensors.items()}
    embed = next(name for name in embeds if name in tensors)
    if _equal(paths, tensors[embed], tensors[unembed]):
        return config, tensors
    folder = str(paths[0].parent)
    if folder not in _said:
        _said.add(folder)
        warnings.warn(
            f"{folder}: the config ties the unembedding to the embedding, but {unembed!r} differs"
            f" from {embed!r}; both are used, as transformers does. Say so with"
            " config_overrides={'tie_word_embeddings': False}",
            stacklevel=2,
        )
    return config.replace(tied=False), tensors


def _equal(paths: list[Path], a: Stored, b: Stored) -> bool:
    """Whether two tensors have the same shape and, as float32, the same values."""
    if a.shape != b.shape:
        return False
    if a.dtype not in DTYPES or b.dtype not in DTYPES:
        return a.dtype == b.dtype
    left = int(np.prod(a.shape))
    with open(paths[a.file], "rb") as first, open(paths[b.file], "rb") as second:
        first.seek(a.offset)
        second.seek(b.offset)
        while left:
            n = min(left, COMPARED_ELEMENTS)
            x, y = _read(first, a.dtype, n), _read(second, b.dtype, n)
            if not np.array_equal(x, y, equal_nan=True):
                return False
            left -= n
    return True


def _read(stream: BinaryIO, dtype: str, n: int) -> Float32Array:
    stored = DTYPES[dtype]
    kind = dtypes.STORAGE[stored]
    values = np.frombuffer(stream.read(n * kind.itemsize), kind)
    return dtypes.to_float32(values, stored)
