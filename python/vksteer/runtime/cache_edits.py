"""`model.generate(cache_edits=...)`: what is added to the keys and values of a prompt's entry in
the cache, once, between the prompt and the tokens after it (docs/cache-steering.md).

The kinds of cache edits live above (`vksteer.kv`); here are what generation needs of them and the
additions of a micro-batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.types import Float32Array, Float64Array, UInt32Array
from .edit_compiler import per_row

if TYPE_CHECKING:
    from .. import _engine as extension
    from .model import Model


class CacheEdit:
    """What `cache_edits` takes: `vs.kv.CacheSteer` is one. L layers, G key/value heads."""

    def _check(self, model: Model) -> None:
        """Raises ValueError where this edit cannot act on the model's cache."""
        raise NotImplementedError

    def _appended(self, model: Model) -> list[int]:
        """Tokens that follow the prompt before new ones are drawn."""
        raise NotImplementedError

    def _position(self, n_tokens: int, row: int) -> int:
        """Which entry of a prompt of n_tokens is edited. Raises ValueError naming the row."""
        raise NotImplementedError

    def _layers(self, model: Model) -> list[int]:
        """Layers whose keys or values it changes, ascending."""
        raise NotImplementedError

    def _largest(self) -> float:
        """No number of an addition is larger than this, apart from the factor of a rotation."""
        raise NotImplementedError

    def _at_one_position(self) -> bool:
        """Whether an addition depends on the position (keys that are rotated to it)."""
        raise NotImplementedError

    def _addition(self, model: Model, position: int, long: bool) -> Float64Array:
        """float64 [2 (keys, values), L, G, d_head]. long: keys are rotated by the tables of texts
        beyond `rope_switch`.
        """
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """What the provenance says of it."""
        raise NotImplementedError


@dataclass(frozen=True)
class RowCacheEdits:
    """The cache edits of one row, checked.

    n_prompt: tokens before what they append. positions: the entry of each edit.
    """

    edits: tuple[CacheEdit, ...]
    n_prompt: int
    positions: tuple[int, ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        return [edit.to_dict() for edit in self.edits]


def row_cache_edits(
    model: Model, cache_edits: Any, rows: list[list[int]], max_new_tokens: int
) -> list[RowCacheEdits | None]:
    """The cache edits of each row; appended tokens are put at the ends of `rows`. None for rows
    without one.

    Raises ValueError and TypeError for everything that does not fit, before any work. Warns where
    the edited entry leaves a sliding window before the last new token.
    """
    given, _ = per_row(cache_edits, len(rows), kinds=(CacheEdit,), what="cache_edits")
    for edit in {id(e): e for row in given for e in row}.values():
        edit._check(model)
    found: list[RowCacheEdits | None] = []
    ends: dict[int, int] = {}  # layer: how many new tokens see the entry, the fewest of a row
    for i, (edits, row) in enumerate(zip(given, rows, strict=True)):
        if not edits:
            found.append(None)
            continue
        n = len(row)
        row.extend(_appended(model, edits, i))
        positions = tuple(edit._position(n, i) for edit in edits)
        _check_size(model, edits, i)
        for edit, position in zip(edits, positions, strict=True):
            for layer, seeing in _hidden(model, edit, position, n, len(row), max_new_tokens, i):
                ends[layer] = min(ends.get(layer, seeing), seeing)
        found.append(RowCacheEdits(tuple(edits), n, positions))
    if ends:
        warnings.warn(
            f"the edited entry of the cache leaves the sliding window of layers {sorted(ends)}: new"
            f" tokens after the first {min(ends.values())} do not see it there. Generate fewer"
            " tokens, or name other layers",
            stacklevel=4,
        )
    return found


def _appended(model: Model, edits: Sequence[CacheEdit], row: int) -> list[int]:
    found = [edit._appended(model) for edit in edits]
    if any(tokens != found[0] for tokens in found):
        raise ValueError(
            f"row {row}: its cache edits append different tokens ({found}): give all of them the"
            " same append"
        )
    return found[0]


def _check_size(model: Model, edits: Sequence[CacheEdit], row: int) -> None:
    """Raises ValueError where the additions of a row may leave float32."""
    tables = (*model.config.rope, *model.config.rope_long)
    factor = 2 * max((abs(t.attention_factor) for t in tables), default=1.0)
    largest = factor * sum(edit._largest() for edit in edits)
    if not largest < float(np.finfo(np.float32).max):
        raise ValueError(
            f"row {row}: what is added to the cache reaches {largest:.3g}, more than float32 holds:"
            " lower the coefficients"
        )


def _hidden(
    model: Model, edit: CacheEdit, position: int, n: int, total: int, new: int, row: int
) -> list[tuple[int, int]]:
    """(layer, how many new tokens see the entry), for layers where the last ones do not.

    n: tokens of the prompt; total: with what is appended. A query at position q sees the entry
    where q - position < window. Raises ValueError where no query after the prompt sees it.
    """
    windows = [(l, model.config.window[l]) for l in edit._layers(model) if model.config.window[l]]
    never = [l for l, w in windows if n - position >= w]
    if never:
        raise ValueError(
            f"row {row}: position {position} lies outside the sliding window of every token after"
            f" the prompt of {n} tokens in layers {never}: steer a later position, or leave these"
            " layers out with layers="
        )
    return [(l, max(0, position + w - total)) for l, w in windows if total + new > position + w]


def add_to_cache(
    model: Model,
    cache: extension.Cache,
    rows: Sequence[RowCacheEdits],
    slots: Sequence[UInt32Array],
    long: Sequence[bool],
) -> None:
    """Applies the rows' edits to a cache. slots: first slots of the engine rows of each row (two
    where a base run goes along). long: whether its keys are rotated by the tables of long texts.
    """
    values: list[Float32Array] = []
    known: dict[Any, int] = {}
    at: list[int] = []
    which: list[int] = []
    for row, first, is_long in zip(rows, slots, long, strict=True):
        for position in sorted(set(row.positions)):
            edits = [e for e, p in zip(row.edits, row.positions, strict=True) if p == position]
            turned = any(e._at_one_position() for e in edits)
            key = (tuple(map(id, edits)), (position, is_long) if turned else None)
            if key not in known:
                known[key] = len(values)
                added = sum(e._addition(model, position, is_long) for e in edits)
                values.append(np.asarray(added, np.float32))
            at += [int(slot) + position for slot in first]
            which += [known[key]] * len(first)
    cache.add(np.array(at, np.uint32), np.array(which, np.uint32), np.stack(values))
