"""`model.generate(circuit=...)`: decoding with only a circuit's edges carrying what steering does.
The base row and the circuit's run take the same tokens, each with its own keys and values
(csrc/analysis/circuit.h).
"""

from __future__ import annotations

import numpy as np

from ..runtime.batch import Batch, packed_rows
from ..runtime.edits import Ablate, Steer
from .final_rows import request
from .plan import Rows, compile_plan, kept_matrix
from .runs import BUFFER_MOST, CHUNK_TOKENS, LEAST_TOKENS, MEMORY_SHARE


def check_rows(circuit, model, rows_edits, freeze, ablate, sites) -> None:
    """Raises ValueError before any work: a circuit of another graph, rows without exactly one
    Steer, what has no meaning under a circuit.
    """
    if freeze is not None or ablate is not None:
        raise ValueError(
            "a circuit says which contributions of the base run are kept: freeze and ablate do not"
            " combine with it"
        )
    if sites:
        raise ValueError(
            "under a circuit every input reads a stream of its own: there are no captures"
        )
    for b, edits in enumerate(rows_edits):
        steers = [e for e in edits if isinstance(e, Steer)]
        if len(steers) != 1:
            raise ValueError(
                f"a circuit carries what one Steer edit does: row {b} needs exactly one and has"
                f" {len(steers)}"
            )
        steers[0].vector.check(model)
        circuit.check(model, steers[0].vector.layer)
        if steers[0].positions is not None:
            raise ValueError(
                f"row {b}: under a circuit a Steer edit acts at every position, not at"
                f" {steers[0].positions!r}"
            )
        for edit in edits:
            if not isinstance(edit, Steer):
                _check_below(model, edit, b, circuit.graph.layer)


def _check_below(model, edit, row, layer):
    """Edits below the steering layer are the base run's and the circuit's alike; above it every
    input reads a stream of its own.
    """
    names = (
        ["blocks.*.hook_resid_pre"]
        if isinstance(edit, Ablate) and edit.sites is None
        else list(edit.sites)
        if isinstance(edit, Ablate)
        else [edit.site]
    )
    for name in names:
        for site in model._sites.find_all(name):
            if site.name != "hook_embed" and (
                not site.name.startswith("blocks.") or site.key[1] >= layer
            ):
                raise ValueError(
                    f"row {row}: under a circuit edits must lie below the steering layer {layer},"
                    f" {type(edit).__name__} at {site.name} does not"
                )


class CircuitBatch:
    """Takes the place of a Batch while decoding. All rows have the same Steer."""

    paired = False

    def __init__(self, circuit, model, prompt_lengths, edits):
        rows_edits, shared = edits
        steer = next(e for e in rows_edits[0] if isinstance(e, Steer))
        self.model, self.n = model, len(prompt_lengths)
        self.steer = np.float32(steer.coefficient) * steer.vector.direction
        plan = compile_plan(
            circuit.graph,
            [Rows(kept_matrix(circuit.graph, circuit.edges))],
            model.config.post_norms,
        )
        self.layer, self.plan, self.circuits = circuit.graph.layer, plan, None
        whole = len(circuit) == circuit.graph.n_edges
        # the steered run, or the base run: to the last bit
        self.plain = whole or plan.logits[0] < 0
        self.base = Batch(
            model,
            prompt_lengths,
            [None] * self.n,
            (
                (
                    rows_edits
                    if whole
                    else [[e for e in row if not isinstance(e, Steer)] for row in rows_edits]
                ),
                shared,
            ),
            None,
        )

    def reserve(self, n_tokens: int, n_slots: int) -> None:
        """Memory for that many tokens at once (fewer, where it is short) and cache slots."""
        from ..runtime.device import _engine

        if self.plain:
            return
        self.circuits = _engine().Circuits(self.model._engine, self.layer, self.plan.arrays)
        budget = self.model._engine_device.available_bytes * 2 * MEMORY_SHARE
        chunk = min(CHUNK_TOKENS, n_tokens)
        while True:
            needed, largest = self.circuits.bytes(chunk, n_slots)
            if needed <= budget and largest <= BUFFER_MOST:
                break
            if chunk <= LEAST_TOKENS:
                raise ValueError(
                    f"decoding under this circuit needs {needed / 1e6:.0f} MB for {n_slots} tokens"
                    f" and {budget / 1e6:.0f} MB may be used: shorten the prompts, lower"
                    " max_new_tokens or batch_size"
                )
            chunk = max(LEAST_TOKENS, chunk // 2)
        self.circuits.reserve(chunk, n_slots, np.ascontiguousarray(self.steer, np.float32))

    def forward(
        self,
        cache,
        tokens,
        *,
        slots,
        starts=None,
        active=None,
        logits="last",
        decode=False,
        **placed,
    ):
        """As Batch.forward; the logits after each row's last token, under the circuit."""
        if self.plain:
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
        wanted = request(self.model.config.final_softcap, logits=True)
        _, _, values = self.circuits.forward(cache, rows, last.astype(np.uint32), wanted)
        return values[0], {}
