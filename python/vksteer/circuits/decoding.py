"""`model.generate(circuit=...)`: decoding in which only a circuit's edges carry the effect of
steering (docs/method.md section 5). The base run and the circuit's run see the same tokens, each
with its own keys and values (csrc/analysis/circuit.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.types import Array, Float32Array
from ..runtime.batch import Batch, packed_rows
from ..runtime.edits import Ablate, Steer
from .final_rows import request
from .plan import Rows, compile_circuits, kept_matrix
from .runs import BUFFER_MOST, CHUNK_TOKENS, LEAST_TOKENS, MEMORY_SHARE

if TYPE_CHECKING:
    from .. import _engine
    from ..runtime.model import Model
    from .circuit import Circuit

#: The edits of every row.
RowsEdits: TypeAlias = Sequence[Sequence[Any]]


def check_rows(
    circuit: Circuit,
    model: Model,
    rows_edits: RowsEdits,
    freeze: str | None,
    ablate: str | None,
    sites: Sequence[str],
) -> None:
    """Raises ValueError where rows with these edits cannot be decoded under the circuit: a circuit
    of another graph, rows without exactly one Steer edit at every position, other edits from the
    steering layer on, freezing, ablation and captures.
    """
    if freeze is not None or ablate is not None:
        raise ValueError(
            "a circuit says which contributions of the base run are kept: freeze and ablate do not"
            " combine with it"
        )
    if sites:
        raise ValueError(
            "under a circuit every input reads a residual stream of its own: there are no captures"
        )
    for b, edits in enumerate(rows_edits):
        steers = [e for e in edits if isinstance(e, Steer)]
        if len(steers) != 1:
            raise ValueError(
                f"a circuit carries what one Steer edit does: row {b} needs exactly one and has"
                f" {len(steers)}"
            )
        steers[0].vector.check(model, output=False)
        circuit.check(model, steers[0].vector.layer)
        if steers[0].positions is not None:
            raise ValueError(
                f"row {b}: under a circuit a Steer edit acts at every position, not at"
                f" {steers[0].positions!r}"
            )
        for edit in edits:
            if not isinstance(edit, Steer):
                _check_below(model, edit, b, circuit.graph.layer)


def _check_below(model: Model, edit: Any, row: int, layer: int) -> None:
    """Raises ValueError unless the edit acts below the steering layer, where the base run and the
    circuit's run are the same. From that layer on every input reads a residual stream of its own.
    """
    if not isinstance(edit, Ablate):
        names = [edit.site]
    elif edit.sites is None:
        names = ["blocks.*.hook_resid_pre"]
    else:
        names = list(edit.sites)
    for name in names:
        for site in model._sites.find_all(name):
            if not site.before_layers and (
                not site.name.startswith("blocks.") or site.key[1] >= layer
            ):
                raise ValueError(
                    f"row {row}: under a circuit edits must lie below the steering layer {layer},"
                    f" {type(edit).__name__} at {site.name} does not"
                )


class CircuitBatch:
    """Takes the place of a Batch while rows are decoded. All rows have the same Steer edit.

    edits: (edits of each row, whether all rows share them), as in Batch.
    """

    paired = False

    def __init__(
        self,
        circuit: Circuit,
        model: Model,
        prompt_lengths: Sequence[int],
        edits: tuple[RowsEdits, bool],
    ) -> None:
        rows_edits, shared = edits
        steer = next(e for e in rows_edits[0] if isinstance(e, Steer))
        self.model, self.n = model, len(prompt_lengths)
        self.steer = np.float32(steer.coefficient) * steer.vector.direction
        self.compiled = compile_circuits(
            circuit.graph,
            [Rows(kept_matrix(circuit.graph, circuit.edges))],
            model.config,
        )
        self.layer = circuit.graph.layer
        self.circuits: _engine.Circuits | None = None
        complete = len(circuit) == circuit.graph.n_edges
        # The run of all edges is bit-identical to the steered run, that of a circuit which does not
        # reach the logits to the base run: neither needs the engine's Circuits.
        self.plain = complete or self.compiled.logits[0] < 0
        self.base = Batch(
            model,
            prompt_lengths,
            [None] * self.n,
            (
                (
                    rows_edits
                    if complete
                    else [[e for e in row if not isinstance(e, Steer)] for row in rows_edits]
                ),
                shared,
            ),
            None,
        )

    def reserve(self, n_tokens: int, n_slots: int) -> None:
        """Reserves memory for n_tokens tokens at once, or fewer where memory is short, and for
        n_slots cache slots. Raises ValueError where the smallest layout does not fit.
        """
        from ..runtime.device import _engine

        if self.plain:
            return
        self.circuits = circuits = _engine().Circuits(
            self.model._engine, self.layer, self.compiled.arrays
        )
        budget = self.model._engine_device.available_bytes * 2 * MEMORY_SHARE
        chunk = min(CHUNK_TOKENS, n_tokens)
        while True:
            needed, largest = circuits.bytes(chunk, n_slots, n_slots, False)
            if needed <= budget and largest <= BUFFER_MOST:
                break
            if chunk <= LEAST_TOKENS:
                raise ValueError(
                    f"decoding under this circuit needs {needed / 1e6:.0f} MB for {n_slots} tokens"
                    f" and {budget / 1e6:.0f} MB may be used: shorten the prompts, lower"
                    " max_new_tokens or batch_size"
                )
            chunk = max(LEAST_TOKENS, chunk // 2)
        circuits.reserve(chunk, n_slots, n_slots, np.ascontiguousarray(self.steer, np.float32))

    def forward(
        self,
        cache: _engine.Cache,
        tokens: Sequence[Sequence[int]],
        *,
        slots: Sequence[int] | Array,
        starts: Sequence[int] | None = None,
        active: Sequence[int] | None = None,
        logits: str | None = "last",
        decode: bool = False,
        **placed: Any,
    ) -> tuple[Float32Array | None, dict[tuple[int, int], Float32Array]]:
        """As Batch.forward: (logits after each row's last token, float32 [n, V], no captures)."""
        if self.circuits is None:
            return self.base.forward(
                cache,
                tokens,
                slots=slots,
                starts=starts,
                active=active,
                logits=logits,
                decode=decode,
                **placed,
            )
        rows = packed_rows(
            tokens,
            start=starts,
            slot=slots,
            edit_row=range(self.n) if active is None else active,
            edits=self.base.edits,
            decode=decode,
        )
        last = np.cumsum([len(t) for t in tokens]) - 1
        logits_of = request(self.model.config.final_softcap, logits=True)
        _, _, values = self.circuits.forward(cache, rows, last.astype(np.uint32), logits_of)
        assert values is not None  # they were requested
        return values[0], {}
