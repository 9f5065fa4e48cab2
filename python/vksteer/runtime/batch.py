"""One batch for the engine: its rows are packed, its edits compiled, and for freezing every
steered row is paired with its base run. Shared by `run`, `generate` and everything above them.

Freezing (docs/method.md section 6): a steered row and its base run are two rows of one group that
advance together on the same tokens; in the frozen layers the engine lets the steered row take the
attention patterns, values or MLP outputs of the base row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from .. import _engine as extension
from ..base.types import Array, Float32Array, Int32Array, IntArray
from .directions import ablations
from .edit_compiler import EditCompiler, RowShape, add_all
from .edits import Steer

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site

FREEZE = (None, "qk", "ov", "mlp")
ABLATE = (None, "svv", "mlp_direct")
CONTRADICTIONS = {
    ("ov", "svv"): "the frozen values hold no steering that could be subtracted",
    ("mlp", "mlp_direct"): "the frozen MLP output does not depend on its input",
}
#: The engine's numbers of what is returned of the logits.
LOGITS = {
    None: extension.constants["RUN_LOGITS_NONE"],
    "last": extension.constants["RUN_LOGITS_LAST"],
    "all": extension.constants["RUN_LOGITS_ALL"],
}

#: One list of edits for each row.
RowsEdits: TypeAlias = Sequence[Sequence[Any]]
#: (site, layer), as the engine numbers sites.
Key: TypeAlias = tuple[int, int]


def first_tokens(lengths: Iterable[int]) -> IntArray:
    """Index of each row's first token in a packed batch of rows of these lengths, int64 [rows]."""
    ends = np.cumsum(np.fromiter(lengths, np.int64))
    return np.concatenate([[0], ends[:-1]]).astype(np.int64)


def packed_rows(
    tokens: Sequence[Sequence[int]],
    *,
    start: Sequence[int] | None = None,
    slot: Sequence[int] | Array | None = None,
    group: Sequence[int] | None = None,
    edit_row: Sequence[int] | None = None,
    out_row: Sequence[int] | None = None,
    column: Sequence[int] | None = None,
    key_column: Sequence[int] | None = None,
    inputs: Sequence[Array] | Array | None = None,
    frozen: Mapping[str, Array] | None = None,
    **scalars: Any,
) -> extension.PackedRows:
    """Rows packed for one call of the engine; fields and shapes as in _engine.pyi.

    By default every row begins at position 0, owns consecutive cache slots, is a group of its own,
    has the edits of the row of its number, and returns nothing (out_row -1). inputs: float32 [all
    tokens, D], or one array for each row. frozen: q_row, v_row, mlp_row and frozen. scalars:
    n_out_rows, n_columns, n_keys, edits, first_layer, stop_layer, decode.
    """
    from .device import _engine as engine

    n = len(tokens)
    own = range(n)

    def words(values: Any) -> npt.NDArray[np.uint32]:
        return np.ascontiguousarray(values, np.uint32)

    def ints(values: Any) -> npt.NDArray[np.int32]:
        return np.ascontiguousarray(values, np.int32)

    column = [0] * n if column is None else column
    if inputs is not None and not isinstance(inputs, np.ndarray):
        inputs = np.concatenate(inputs)
    rows: extension.PackedRows = engine().PackedRows(
        tokens=np.concatenate([words(t) for t in tokens]),
        n_tokens=words([len(t) for t in tokens]),
        start=words([0] * n if start is None else start),
        slot=words(first_tokens(map(len, tokens)) if slot is None else slot),
        group=words(own if group is None else group),
        edit_row=words(own if edit_row is None else edit_row),
        out_row=ints([-1] * n if out_row is None else out_row),
        column=ints(column),
        key_column=ints(column if key_column is None else key_column),
        inputs=None if inputs is None else np.ascontiguousarray(inputs, np.float32),
        **(frozen or {}),
        **scalars,
    )
    return rows


@dataclass(frozen=True)
class FreezeSpec:
    """freeze and ablate, checked: what is frozen or ablated, and in which layers."""

    freeze: str | None
    ablate: str | None
    layers: tuple[int, ...] | None  # None: from the steering layer on


def check_freeze_spec(
    freeze: str | None,
    ablate: str | None,
    freeze_layers: Iterable[int] | None,
    rows_edits: RowsEdits,
    n_layers: int,
) -> FreezeSpec | None:
    """None where neither is given. Raises ValueError before any work: unknown words,
    contradictions, a row without exactly one Steer edit, layers out of range.
    """
    if freeze not in FREEZE:
        raise ValueError(f"freeze={freeze!r}: use None, 'qk', 'ov' or 'mlp'")
    if ablate not in ABLATE:
        raise ValueError(f"ablate={ablate!r}: use None, 'svv' or 'mlp_direct'")
    if freeze is not None and ablate is not None and (freeze, ablate) in CONTRADICTIONS:
        raise ValueError(
            f"freeze={freeze!r} and ablate={ablate!r} contradict each other:"
            f" {CONTRADICTIONS[freeze, ablate]}; choose one"
        )
    nothing = freeze is None and ablate is None
    if freeze_layers is not None and nothing:
        raise ValueError(
            "freeze_layers says where to freeze or ablate: give freeze= or ablate=, too"
        )
    layers = None if freeze_layers is None else _layers(freeze_layers, n_layers)
    if nothing:
        return None
    _check_steers(rows_edits, freeze is not None and layers is None, n_layers)
    return FreezeSpec(freeze, ablate, layers)


def _layers(freeze_layers: Iterable[int], n_layers: int) -> tuple[int, ...]:
    named = list(freeze_layers)
    layers = tuple(sorted({int(l) for l in named}))
    if not layers or not all(0 <= l < n_layers for l in layers):
        raise ValueError(f"freeze_layers={named!r}: name layers from 0 to {n_layers - 1}")
    return layers


def _check_steers(rows_edits: RowsEdits, one_layer: bool, n_layers: int) -> None:
    """Every row has exactly one Steer edit, which a layer follows; one_layer: all of them at the
    same layer.
    """
    for b, edits in enumerate(rows_edits):
        n = sum(isinstance(e, Steer) for e in edits)
        if n != 1:
            raise ValueError(
                f"freeze and ablate compare a steered run with its base run: row {b} needs exactly"
                f" one Steer edit and has {n}"
            )
        if _steer(edits).vector.layer >= n_layers:
            raise ValueError(
                f"row {b} steers the output of the last block (layer {n_layers}): no layer follows"
                " whose parts could be frozen or ablated"
            )
    if one_layer and len({_steer(e).vector.layer for e in rows_edits}) > 1:
        raise ValueError(
            "freeze acts from the steering layer on, and the rows' Steer edits have different"
            " layers: run them apart, or name freeze_layers"
        )


def _steer(edits: Sequence[Any]) -> Steer:
    return next(e for e in edits if isinstance(e, Steer))


def steering_of(edits: Sequence[Any]) -> tuple[bytes, float]:
    """What rows that are decoded together under a circuit have in common: the direction's bytes
    and the coefficient.
    """
    steer = _steer(edits)
    return steer.vector.direction.tobytes(), float(steer.coefficient)


class Batch:
    """The edits and the freeze spec of `n` user rows, and passes over their tokens.

    prompt_lengths, totals: tokens of each row's prompt, and of the row (None while decoding).
    edits: (one list for each row, whether all rows share the same list). With a freeze spec the
    engine sees 2n rows: each steered row, followed by its base run.
    """

    def __init__(
        self,
        model: Model,
        prompt_lengths: Sequence[int],
        totals: Sequence[int | None],
        edits: tuple[RowsEdits, bool],
        freeze_spec: FreezeSpec | None,
    ) -> None:
        self.model, self.n, self.freeze_spec = model, len(prompt_lengths), freeze_spec
        rows_edits, shared = edits
        shapes = [RowShape(p, t) for p, t in zip(prompt_lengths, totals)]
        self.paired = freeze_spec is not None
        if self.paired:
            shapes = [s for s in shapes for _ in range(2)]
            rows_edits = [
                e for row in rows_edits for e in (row, [x for x in row if not isinstance(x, Steer)])
            ]
            shared = False
        compiler = EditCompiler(model, shapes)
        if freeze_spec is not None and freeze_spec.ablate:
            self._add_ablations(compiler, rows_edits, freeze_spec)
        add_all(compiler, rows_edits, shared)
        self.edits = compiler.build()
        self.frozen = np.zeros(model.config.n_layers, np.uint8)
        if freeze_spec is not None:
            # all rows steer the same layer, or the layers were named
            self.frozen[self._affected_layers(rows_edits[0], freeze_spec)] = 1

    def _affected_layers(self, edits: Sequence[Any], spec: FreezeSpec) -> list[int]:
        first, n_layers = _steer(edits).vector.layer, self.model.config.n_layers
        return [l for l in range(first, n_layers) if spec.layers is None or l in spec.layers]

    def _add_ablations(
        self, compiler: EditCompiler, rows_edits: RowsEdits, spec: FreezeSpec
    ) -> None:
        """SVV ablation takes a * s out of the input of the values, MLP direct ablation out of the
        input of the MLP, both as they are after the norm of the ablated run itself
        (docs/method.md section 6). They act where the Steer edit acts, before the user's edits of
        the same site.
        """
        assert spec.ablate is not None
        parts: dict[tuple[int, int], list[tuple[Site, str, Float32Array]]] = {}
        for b in range(0, len(rows_edits), 2):
            steer = _steer(rows_edits[b])
            for layer in self._affected_layers(rows_edits[b], spec):
                key = (id(steer.vector), layer)
                if key not in parts:
                    direction = steer.vector.direction
                    parts[key] = list(ablations(self.model, spec.ablate, direction, layer))
                for site, kind, operand in parts[key]:
                    factor = -float(steer.coefficient)
                    compiler._record(site, b, kind, steer.positions, None, operand, factor)

    def reserve(self, n_tokens: int, n_slots: int) -> None:
        """Does nothing: only a batch under a circuit reserves memory before its passes."""

    def forward(
        self,
        cache: extension.Cache,
        tokens: Sequence[Sequence[int]],
        *,
        slots: Sequence[int] | Array,
        columns: Sequence[int],
        n_columns: int,
        n_keys: int | None = None,
        starts: Sequence[int] | None = None,
        key_columns: Sequence[int] | None = None,
        active: Sequence[int] | None = None,
        capture: Iterable[Key] = (),
        logits: str | None = None,
        decode: bool = False,
        first_layer: int = 0,
        inputs: Sequence[Array] | Array | None = None,
        stop_layer: int = 0,
    ) -> tuple[Float32Array | None, dict[Key, Float32Array]]:
        """One pass over new tokens of the rows `active` (in order; default: all).

        tokens: one sequence for each active row, whose first token is at position starts[i]
        (default 0). slots: first cache slot of each engine row. columns, key_columns: output
        column of position 0, for queries and keys. first_layer, inputs: start there, from these
        residual streams. stop_layer: leave out the layers from it on. Returns (logits or None,
        {(site, layer): array}), one row for each active row.
        """
        rows = range(self.n) if active is None else active
        n, double = len(rows), 2 if self.paired else 1

        def twice(values: Iterable[Any]) -> list[Any]:
            return [v for v in values for _ in range(double)]

        packed = packed_rows(
            twice(tokens),
            start=None if starts is None else twice(starts),
            slot=slots,
            group=twice(range(n)),
            edit_row=[double * r + i for r in rows for i in range(double)],
            out_row=[r if i == 0 else -1 for r in range(n) for i in range(double)],
            column=twice(columns),
            key_column=None if key_columns is None else twice(key_columns),
            inputs=inputs,
            frozen=self._frozen_rows(n * double),
            n_out_rows=n,
            n_columns=n_columns,
            n_keys=n_columns if n_keys is None else n_keys,
            edits=self.edits,
            first_layer=first_layer,
            stop_layer=stop_layer,
            decode=decode,
        )
        found: tuple[Float32Array | None, dict[Key, Float32Array]] = self.model._engine.forward(
            cache, packed, list(capture), LOGITS[logits]
        )
        return found

    def decode_block(
        self,
        cache: extension.Cache,
        newest: Sequence[int],
        n_steps: int,
        *,
        starts: Sequence[int],
        slots: Sequence[int] | Array,
        active: Sequence[int],
        empty: tuple[float, float],
    ) -> Int32Array:
        """n_steps steps of greedy decoding in one call: the tokens that the rows `active` pick,
        int32 [n_steps, rows]. newest: the last token of each, at position starts[i].

        The tokens are those of as many calls of `forward`. -1: the row's logits are not finite, or
        the first one is empty[0] within +-empty[1], so that the caller must examine them; what
        follows in that row means nothing.
        """
        n, double = len(active), 2 if self.paired else 1
        every = range(n * double)
        packed = packed_rows(
            [[newest[i // double]] for i in every],
            start=[starts[i // double] for i in every],
            slot=slots,
            group=[i // double for i in every],
            edit_row=[double * r + i for r in active for i in range(double)],
            frozen=self._frozen_rows(n * double),
            n_columns=max(starts) + 1,
            n_keys=max(starts) + 1,
            edits=self.edits,
            decode=True,
        )
        picked = self.model._engine.decode_block(cache, packed, n_steps, double, *empty)
        return picked[:, ::double].astype(np.int32)

    def _frozen_rows(self, n: int) -> dict[str, Array]:
        """Whose patterns, values and MLP outputs each of n engine rows takes: the base run's for
        what is frozen, its own for the rest.
        """
        spec = self.freeze_spec
        if spec is None or spec.freeze is None:
            return {}
        own = np.arange(n, dtype=np.uint32)
        base = own | np.uint32(1)
        taken = {"q_row": "qk", "v_row": "ov", "mlp_row": "mlp"}
        rows = {name: base if what == spec.freeze else own for name, what in taken.items()}
        return {**rows, "frozen": self.frozen}
