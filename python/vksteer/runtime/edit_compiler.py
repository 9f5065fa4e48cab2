"""Compiles edits to the flat records that the engine reads. Every edit is checked here, before any
work starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _engine as extension
from ..base.arrays import as_float32
from ..base.checks import is_int, require_int
from ..base.types import Array, Float32Array, IntArray
from .edits import ABLATION_SITES, Ablate, Add, DynamicScale, MeanAblate, Scale, Set, Steer

if TYPE_CHECKING:
    from .edits import Edit
    from .model import Model
    from .sites import Site

#: The engine's numbers of the kinds of edits.
KINDS = {
    kind: extension.constants[f"EDIT_{kind.upper()}"]
    for kind in ("set", "add", "scale", "ablate", "add_scaled", "dynamic")
}
OPEN = 2**31 - 1  # the end of a slice that includes decoded tokens
SLICE = 0xFFFFFFFF
EDIT_TYPES = (Steer, Ablate, Set, Add, Scale, DynamicScale, MeanAblate)


@dataclass(frozen=True)
class RowShape:
    """The lengths that positions count against: tokens of the prompt, and of prompt and response
    (None while decoding, when the end is open).
    """

    prompt: int
    total: int | None


@dataclass(frozen=True)
class Selection:
    """Resolved positions: a slice [start, stop) with a step, or a list in the user's order."""

    start: int = 0
    stop: int = OPEN
    step: int = 1
    listed: tuple[int, ...] | None = None

    def count(self, total: int | None) -> int | None:
        """Number of selected tokens of a row of `total` tokens; None if open. For lists: entries,
        also those beyond the row.
        """
        if self.listed is not None:
            return len(self.listed)
        if self.stop == OPEN and total is None:
            return None
        stop = self.stop if total is None else min(self.stop, total)
        return max(0, math.ceil((stop - self.start) / self.step))

    def touched(self, total: int) -> int:
        """Number of different tokens that are selected in a row of `total` tokens."""
        if self.listed is not None:
            return len({p for p in self.listed if p < total})
        return self.count(total) or 0


def resolve(positions: Any, row: RowShape) -> Selection:
    """The positions of an edit (edits.py) in one row. ValueError, TypeError for anything else."""
    if positions is None:
        return Selection()
    if isinstance(positions, str):
        if positions == "prompt":
            return Selection(stop=row.prompt)
        if positions == "response":
            return Selection(start=row.prompt)
        raise ValueError(
            f"positions={positions!r}: use None, 'prompt', 'response', a list of ints or a slice"
        )
    if isinstance(positions, slice):
        step = 1 if positions.step is None else _int(positions.step, "the step of a slice")
        if step < 1:
            raise ValueError(f"positions={positions}: the step must be at least 1")
        start = (
            0
            if positions.start is None
            else _from_end(_int(positions.start, "a slice's start"), row)
        )
        stop = (
            OPEN
            if positions.stop is None
            else _from_end(_int(positions.stop, "a slice's stop"), row)
        )
        return Selection(start, max(start, stop), step)
    if is_int(positions):
        raise TypeError(f"positions={positions}: use a list, [{positions}], for a single position")
    try:
        items = list(positions)
    except TypeError:
        raise TypeError(
            f"positions={positions!r}: use None, 'prompt', 'response', a list of ints or a slice"
        ) from None
    listed = []
    for item in items:
        position = _int(item, "a position")
        if position < 0:
            position += row.prompt
        # before this row's first token: shorter rows of a ragged batch simply have no such token
        if position < 0:
            position = OPEN
        listed.append(position)
    return Selection(listed=tuple(listed))


def _int(value: Any, what: str) -> int:
    return require_int(value, what, error=TypeError)


def _from_end(position: int, row: RowShape) -> int:
    return position if position >= 0 else max(0, position + row.prompt)


def per_row(
    edits: Any, n_rows: int, *, kinds: tuple[type, ...] = EDIT_TYPES, what: str = "edits"
) -> tuple[list[list[Any]], bool]:
    """Edits as one list a row, and whether the user gave one list for all. kinds: what an edit may
    be. what: the argument's name.
    """
    names = ", ".join(kind.__name__ for kind in kinds)
    if isinstance(edits, kinds):
        edits = [edits]
    if isinstance(edits, (str, bytes, dict)):
        raise TypeError(f"{what} must be a list of edits ({names}), not {edits!r}")
    try:
        edits = list(edits)
    except TypeError:
        raise TypeError(f"{what} must be a list of edits ({names}), not {edits!r}") from None
    nested = [isinstance(e, (list, tuple)) for e in edits]
    if edits and all(nested):
        if len(edits) != n_rows:
            raise ValueError(
                f"{len(edits)} lists of {what} for {n_rows} rows: give one list for all rows, or"
                " one list per row"
            )
        rows, shared = [list(e) for e in edits], False
    elif any(nested):
        raise TypeError(
            f"{what} mixes edits and lists: give one list for all rows, or one list per row"
        )
    else:
        rows, shared = [edits] * n_rows, True
    for edit in (e for row in rows for e in row):
        if not isinstance(edit, kinds):
            raise TypeError(f"{what}: {edit!r} is no edit: use one of {names}")
    return rows, shared


class EditCompiler:
    """Collects records for one batch; `build` hands them to the engine."""

    def __init__(self, model: Model, rows: Sequence[RowShape]) -> None:
        self.model, self.rows = model, rows
        self.records: list[list[int]] = []
        self.coefficients: list[float] = []
        self.positions: list[int] = []
        self.heads: list[int] = []
        self.operands: list[Array] = []
        self._n_positions = self._n_heads = self._n_operands = 0
        self._operand_at: dict[Any, int] = {}

    # -- a user's edit -----------------------------------------------------------------------------

    def add(self, edit: Edit, row: int | None) -> None:
        """One edit of one row, or of all rows alike (None: only for edits whose positions are None
        and whose values do not depend on the row).
        """
        if isinstance(edit, Steer):
            vector = self._vector(edit.vector, "Steer")
            layer, n_layers = int(edit.vector.layer), self.model.config.n_layers
            if not 0 <= layer <= n_layers:
                raise ValueError(
                    f"Steer: layer {layer} is not one of the model's {n_layers} (0 to"
                    f" {n_layers - 1}; {n_layers} is the output of the last block)"
                )
            # No layer reads the last block's output, so it is a site of that block; the final norm
            # reads it after the edit.
            site = self.model._sites.by_name[
                f"blocks.{layer}.hook_resid_pre"
                if layer < n_layers
                else f"blocks.{n_layers - 1}.hook_resid_post"
            ]
            self._record(
                site,
                row,
                "add",
                edit.positions,
                None,
                vector,
                self._number(edit.coefficient, "Steer: coefficient"),
            )
        elif isinstance(edit, Ablate):
            self._ablate(edit, row)
        elif isinstance(edit, DynamicScale):
            self._dynamic(edit, row)
        elif isinstance(edit, Scale):
            self._valued(edit, row, "scale", edit.factor)
        elif isinstance(edit, Add):
            self._valued(edit, row, "add", edit.values)
        else:
            self._valued(edit, row, "set", edit.values if isinstance(edit, Set) else edit.mean)

    def _ablate(self, edit: Ablate, row: int | None) -> None:
        vector = self._vector(edit.vector, "Ablate").astype(np.float64)
        norm = np.linalg.norm(vector)
        if norm == 0:
            raise ValueError("Ablate: the direction is zero; there is nothing to project out")
        for site in self.model._sites.find_all(
            ABLATION_SITES if edit.sites is None else edit.sites
        ):
            if site.kind != "width":
                raise ValueError(
                    f"Ablate: {site.name} is not of the model's width {self.model.config.d_model}:"
                    " name sites of the residual stream"
                )
            self._record(
                site, row, "ablate", edit.positions, None, (vector / norm).astype(np.float32), 1.0
            )

    def _dynamic(self, edit: DynamicScale, row: int | None) -> None:
        w = self._vector(edit.w, f"DynamicScale at {edit.site}")
        factor = self._number(edit.factor, f"DynamicScale at {edit.site}: factor")
        for site in self.model._sites.find_all(edit.site):
            if site.kind != "width":
                raise ValueError(
                    f"DynamicScale: {site.name} is not of the model's width"
                    f" {self.model.config.d_model}: name sites of the residual stream, of"
                    " hook_attn_out or hook_mlp_out"
                )
            self._record(site, row, "dynamic", edit.positions, None, w, factor / math.sqrt(len(w)))

    def _valued(
        self, edit: Set | Add | Scale | MeanAblate, row: int | None, kind: str, values: Any
    ) -> None:
        name = type(edit).__name__
        try:
            values = as_float32(values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} at {edit.site}: values must be numbers: {error}") from None
        if not np.isfinite(values).all():
            raise ValueError(f"{name} at {edit.site}: values must be finite")
        for site in self.model._sites.find_all(edit.site):
            self._record(site, row, kind, edit.positions, edit.heads, values, 1.0)

    def _vector(self, vector: Any, what: str) -> Float32Array:
        direction = as_float32(getattr(vector, "direction", vector))
        width = self.model.config.d_model
        if what == "Steer" and not hasattr(vector, "layer"):
            raise TypeError(
                f"Steer needs a SteeringVector (it knows its layer), not {type(vector).__name__}"
            )
        if direction.shape != (width,):
            raise ValueError(
                f"{what}: a vector of shape {list(direction.shape)} for a model of width {width}"
            )
        if not np.isfinite(direction).all():
            raise ValueError(f"{what}: the vector has entries that are not finite")
        return direction

    @staticmethod
    def _number(value: Any, what: str) -> float:
        number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{what} must be finite, not {value!r}")
        return number

    # -- records -----------------------------------------------------------------------------------

    def _heads_of(self, site: Site, heads: Any) -> list[int]:
        if heads is None:
            return list(range(site.n_heads))
        if not site.has_heads:
            raise ValueError(f"{site.name} has no heads axis: leave heads out")
        items = [heads] if isinstance(heads, (int, np.integer)) else list(heads)
        out = [_int(h, "a head") for h in items]
        for h in out:
            if not -site.n_heads <= h < site.n_heads:
                raise ValueError(
                    f"head {h} of {site.name}, which has {site.n_heads} (0 to {site.n_heads - 1})"
                )
        if not out:
            raise ValueError(f"heads=[] at {site.name} selects nothing: leave the edit out")
        return [h % site.n_heads for h in out]

    def _record(
        self,
        site: Site,
        row: int | None,
        kind: str,
        positions: Any,
        heads: Any,
        values: Float32Array,
        coefficient: float,
    ) -> None:
        heads = self._heads_of(site, heads)
        shape = self.rows[0 if row is None else row]
        selection = Selection() if row is None else resolve(positions, shape)
        count = selection.count(shape.total)
        if count == 0:
            return
        operand, pos_step, head_step, step = self._operand(site, values, count, len(heads), shape)
        first_position, n_positions = self._n_positions, SLICE
        if selection.listed is not None:
            self.positions += selection.listed
            self._n_positions += len(selection.listed)
            n_positions = len(selection.listed)
        self.heads += heads
        self.records.append(
            [
                site.number,
                site.layer,
                -1 if row is None else row,
                KINDS[kind],
                selection.start,
                selection.stop,
                selection.step,
                first_position,
                n_positions,
                self._n_heads,
                len(heads),
                operand,
                pos_step,
                head_step,
                step,
            ]
        )
        self._n_heads += len(heads)
        self.coefficients.append(coefficient)

    def _operand(
        self, site: Site, values: Float32Array, count: int | None, n_heads: int, shape: RowShape
    ) -> tuple[int, int, int, int]:
        """(first float, steps) of `values` broadcast against one row's selected slice; broadcast
        axes get step 0 and are stored once.
        """
        target: tuple[int, ...]
        axes: tuple[int | None, int | None, int]
        keys = shape.total if shape.total is not None else 1
        if site.over_keys:
            target, axes = (n_heads, 1 if count is None else count, keys), (1, 0, 2)
        elif site.has_heads:
            target, axes = (1 if count is None else count, n_heads, site.width), (0, 1, 2)
        else:
            target, axes = (1 if count is None else count, site.width), (0, None, 1)
        try:
            full = np.broadcast_to(values, target)
        except ValueError:
            hint = ""
            if count is None:
                hint = (
                    "; it also covers decoded tokens, so its values cannot differ from token to"
                    " token (or from key to key)"
                )
            names = (
                "heads, positions, keys"
                if site.over_keys
                else "positions, heads, width"
                if site.has_heads
                else "positions, width"
            )
            raise ValueError(
                f"values of shape {list(values.shape)} do not broadcast against the selected slice"
                f" {list(target)} ({names}) of {site.name}{hint}"
            ) from None
        stored = full
        for axis, (stride, size) in enumerate(zip(full.strides, full.shape)):
            if stride == 0 or size == 1:
                stored = stored.take([0], axis=axis)
        order = [a for a in axes if a is not None]
        stored = np.ascontiguousarray(stored.transpose(order))
        dims = dict(
            zip(
                [("pos", "head", "last")[i] for i, a in enumerate(axes) if a is not None],
                stored.shape,
            )
        )
        last, head = dims["last"], dims.get("head", 1)
        return (
            self._store(stored),
            head * last if dims["pos"] > 1 else 0,
            last if head > 1 else 0,
            1 if last > 1 else 0,
        )

    def _store(self, array: Array) -> int:
        # Equal values are stored once, so rows with one edit share them.
        small = array.size <= 1 << 16
        key: Any = (array.shape, array.tobytes()) if small else id(array)
        if key in self._operand_at:
            return self._operand_at[key]
        at = self._n_operands
        self.operands.append(array.ravel())
        self._n_operands += array.size
        self._operand_at[key] = at
        return at

    def build(self) -> extension.Edits | None:
        """The engine's edits, or None if there are none."""
        if not self.records:
            return None
        from .device import _engine

        edits: extension.Edits = _engine().Edits(
            self.model._engine,
            np.array(self.records, np.int64),
            np.array(self.coefficients, np.float32),
            np.array(self.positions, np.uint32),
            np.array(self.heads, np.uint32),
            np.concatenate(self.operands).astype(np.float32),
            len(self.rows),
        )
        return edits


def add_all(compiler: EditCompiler, rows_edits: Sequence[Sequence[Edit]], shared: bool) -> None:
    """Adds every row's edits, the i-th edits of all rows one after the other: the engine merges
    such neighbours into one dispatch.
    """
    for i in range(max((len(r) for r in rows_edits), default=0)):
        if shared and _same_for_all_rows(compiler.model, rows_edits[0][i]):
            compiler.add(rows_edits[0][i], None)
            continue
        for b, edits in enumerate(rows_edits):
            if i < len(edits):
                compiler.add(edits[i], b)


def _same_for_all_rows(model: Model, edit: Edit) -> bool:
    """Whether one record serves every row: neither positions nor values depend on its length."""
    if edit.positions is not None:
        return False
    if isinstance(edit, (Steer, Ablate, DynamicScale)):
        return True
    values = (
        edit.values
        if isinstance(edit, (Set, Add))
        else edit.factor
        if isinstance(edit, Scale)
        else edit.mean
    )
    return np.ndim(values) == 0 or (
        np.ndim(values) == 1
        and not any(site.over_keys for site in model._sites.find_all(edit.site))
    )


def touched(rows_edits: Sequence[Sequence[Edit]], rows: Sequence[RowShape]) -> IntArray:
    """int64 [n_edits, B]: how many tokens of each row the i-th edit of its list changes."""
    n = max((len(r) for r in rows_edits), default=0)
    counts = np.zeros((n, len(rows)), np.int64)
    for b, (edits, row) in enumerate(zip(rows_edits, rows)):
        for i, edit in enumerate(edits):
            assert row.total is not None  # rows that are run, not decoded
            counts[i, b] = resolve(edit.positions, row).touched(row.total)
    return counts
