"""One batch for the engine: rows laid out, edits compiled, frozen pairs arranged. Shared by
`run` and `generate`.

Freezing (method.md section 6): a steered row and its base run are two rows of one group that
advance together on the same tokens; the engine then lets the steered row use the base row's
patterns, values or MLP outputs in the frozen layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .edit_compiler import EditCompiler, RowShape, add_all
from .edits import Steer

FREEZE = (None, "qk", "ov", "mlp")
ABLATE = (None, "svv", "mlp_direct")
CONTRADICTIONS = {
    ("ov", "svv"): "the frozen values hold no steering that could be subtracted",
    ("mlp", "mlp_direct"): "the frozen MLP output does not depend on its input",
}
LOGITS = {None: 0, "last": 1, "all": 2}


@dataclass(frozen=True)
class Treatment:
    """freeze and ablate, checked: which layers they act on. None where neither is asked for."""

    freeze: str | None
    ablate: str | None
    layers: tuple[int, ...] | None  # None: from the steering layer on


def check_treatment(freeze, ablate, freeze_layers, rows_edits, n_layers) -> Treatment | None:
    """Raises ValueError before any work: unknown words, contradictions, a row without exactly one
    Steer edit, layers out of range.
    """
    if freeze not in FREEZE:
        raise ValueError(f"freeze={freeze!r}: use None, 'qk', 'ov' or 'mlp'")
    if ablate not in ABLATE:
        raise ValueError(f"ablate={ablate!r}: use None, 'svv' or 'mlp_direct'")
    if (freeze, ablate) in CONTRADICTIONS:
        raise ValueError(
            f"freeze={freeze!r} and ablate={ablate!r} contradict each other:"
            f" {CONTRADICTIONS[freeze, ablate]}; choose one"
        )
    layers = None
    if freeze_layers is not None:
        if freeze is None and ablate is None:
            raise ValueError(
                "freeze_layers says where to freeze or ablate: give freeze= or ablate=, too"
            )
        layers = tuple(sorted({int(l) for l in freeze_layers}))
        bad = [l for l in layers if not 0 <= l < n_layers]
        if bad or not layers:
            raise ValueError(
                f"freeze_layers={list(freeze_layers)!r}: name layers from 0 to {n_layers - 1}"
            )
    if freeze is None and ablate is None:
        return None
    for b, edits in enumerate(rows_edits):
        n = sum(isinstance(e, Steer) for e in edits)
        if n != 1:
            raise ValueError(
                f"freeze and ablate compare a steered run with its base run: row {b} needs exactly"
                f" one Steer edit and has {n}"
            )
    if (
        freeze is not None
        and layers is None
        and len({_steer(e).vector.layer for e in rows_edits}) > 1
    ):
        raise ValueError(
            "freeze acts from the steering layer on, and the rows' Steer edits have different"
            " layers: run them apart, or name freeze_layers"
        )
    return Treatment(freeze, ablate, layers)


def _steer(edits) -> Steer:
    return next(e for e in edits if isinstance(e, Steer))


def steering_of(edits) -> tuple:
    """What rows that are decoded together under a circuit have in common: the direction's bytes
    and the coefficient.
    """
    steer = _steer(edits)
    return steer.vector.direction.tobytes(), float(steer.coefficient)


class Batch:
    """Rows of one engine batch. `n` user rows; with a treatment the engine sees 2n rows,
    (steered, base) in turn.
    """

    def __init__(
        self,
        model,
        prompt_lengths: Sequence[int],
        totals: Sequence[int | None],
        edits,
        treatment: Treatment | None,
    ):
        self.model, self.n, self.treatment = model, len(prompt_lengths), treatment
        rows_edits, shared = edits
        shapes = [RowShape(p, t) for p, t in zip(prompt_lengths, totals)]
        self.paired = treatment is not None
        if self.paired:
            shapes = [s for s in shapes for _ in range(2)]
            rows_edits = [
                e for row in rows_edits for e in (row, [x for x in row if not isinstance(x, Steer)])
            ]
            shared = False
        compiler = EditCompiler(model, shapes)
        if self.paired and treatment.ablate:
            self._add_ablations(compiler, rows_edits)
        add_all(compiler, rows_edits, shared)
        self.edits = compiler.build()
        self.frozen = self._frozen_layers(rows_edits) if self.paired else None

    def _layers(self, edits):
        chosen = self.treatment.layers
        first = _steer(edits).vector.layer
        return [
            l for l in range(first, self.model.config.n_layers) if chosen is None or l in chosen
        ]

    def _add_ablations(self, compiler, rows_edits):
        """SVV: subtract a * W_V (s * gain) / RMS from the values; MLP direct: a * s / RMS from the
        normalised input (method.md section 6). The scale is the ablated run's own; they act where
        the Steer acts, and come before the user's edits of the same site.
        """
        svv = self.treatment.ablate == "svv"
        site = "blocks.{}.attn.hook_v" if svv else "blocks.{}.ln2.hook_normalized"
        vectors = {}
        for b in range(0, len(rows_edits), 2):
            steer = _steer(rows_edits[b])
            for layer in self._layers(rows_edits[b]):
                key = (id(steer.vector), layer)
                if key not in vectors:
                    vectors[key] = (
                        self.model._value_direction(steer.vector.direction, layer)
                        if svv
                        else steer.vector.direction
                    )
                compiler._record(
                    self.model._sites.by_name[site.format(layer)],
                    b,
                    "add_scaled",
                    steer.positions,
                    None,
                    vectors[key],
                    -float(steer.coefficient),
                )

    def _frozen_layers(self, rows_edits):
        frozen = np.zeros(self.model.config.n_layers, np.uint8)
        # all rows steer the same layer, or the layers were named
        frozen[self._layers(rows_edits[0])] = 1
        return frozen

    def reserve(self, n_tokens: int, n_slots: int) -> None:
        """Nothing: the engine's own passes take their memory as they go; a batch under
        a circuit needs more.
        """

    def forward(
        self,
        cache,
        tokens,
        starts,
        slots,
        columns,
        n_columns,
        n_keys,
        capture,
        logits,
        active,
        key_columns=None,
        decode=False,
        **resumed,
    ):
        """One pass over new tokens of the rows `active` (user rows, in order); see csrc/run/run.h.

        tokens: one int sequence a row; starts: position of its first; slots: first cache slot of
        each engine row (pairs one behind the other);
        columns: output column of position 0; resumed: first_layer and inputs (float32 [all
        tokens, D]) to start above the embedding. Returns (logits or None, {(site, layer):
        array}), one row per active row.
        """
        n, double = len(active), 2 if self.paired else 1
        spread = lambda values, dtype: np.repeat(np.asarray(values, dtype), double)
        out_row = spread(np.arange(n), np.int32)
        own = np.arange(n * double, dtype=np.uint32)
        edit_row = (
            own
            if not self.paired
            else np.asarray([[2 * r, 2 * r + 1] for r in active], np.uint32).ravel()
        )
        freezing = {}
        if self.paired:
            out_row[1::2] = -1
            if self.treatment.freeze:
                base, which = own | np.uint32(1), self.treatment.freeze
                freezing = dict(
                    q_row=base if which == "qk" else own,
                    v_row=base if which == "ov" else own,
                    mlp_row=base if which == "mlp" else own,
                    frozen=self.frozen,
                )
        else:
            edit_row = np.asarray(active, np.uint32)
        flat = np.concatenate([np.asarray(t, np.uint32) for t in tokens for _ in range(double)])
        return self.model._engine.forward(
            cache,
            flat,
            spread([len(t) for t in tokens], np.uint32),
            spread(starts, np.uint32),
            np.asarray(slots, np.uint32),
            spread(np.arange(n), np.uint32),
            edit_row,
            out_row,
            spread(columns, np.int32),
            spread(columns if key_columns is None else key_columns, np.int32),
            n,
            n_columns,
            n_keys,
            list(capture),
            LOGITS[logits],
            int(decode),
            self.edits,
            **freezing,
            **resumed,
        )
