"""`model.run`: one teacher-forced forward pass over a batch, and its result."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, KeysView, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.types import BoolArray, Float32Array, Int32Array, IntArray
from . import finite
from .batch import Batch, check_freeze_spec
from .edit_compiler import RowShape, per_row, touched

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site


class Run:
    """The result of `model.run`. Arrays are float32 C-contiguous, own their memory and never change
    afterwards.

    logits: [B, S, V], [B, V] or None. tokens: int32 [B, S], left-padded with 0. mask: bool [B, S],
    True at real positions; `[:, -1]` is the last token of every row. touched: int64 [n_edits, B],
    tokens that each edit changed. `run[site]`: a captured site, axes as `model.sites` says.
    """

    def __init__(
        self,
        logits: Float32Array | None,
        tokens: Int32Array,
        mask: BoolArray,
        touched: IntArray,
        captured: dict[str, Float32Array],
    ) -> None:
        self.logits, self.tokens, self.mask = logits, tokens, mask
        self.touched, self._captured = touched, captured

    def __getitem__(self, site: str) -> Float32Array:
        try:
            return self._captured[site]
        except KeyError:
            raise KeyError(
                f"{site!r} was not captured; this run has"
                f" {', '.join(self._captured) or 'no captures'}"
            ) from None

    def __contains__(self, site: object) -> bool:
        return site in self._captured

    def keys(self) -> KeysView[str]:
        """Names of the captured sites."""
        return self._captured.keys()

    def items(self) -> ItemsView[str, Float32Array]:
        """Pairs (site, values) of all captured sites: names as in `model.sites`, values float32
        with axes as there, left-padded with 0 along positions. The arrays are those that
        `run[site]` returns.
        """
        return self._captured.items()

    def __repr__(self) -> str:
        return (
            f"Run(rows={self.tokens.shape[0]}, positions={self.tokens.shape[1]},"
            f" captured={len(self._captured)})"
        )


def split_rows(model: Model, prompts: Any, responses: Any) -> tuple[list[list[int]], list[int]]:
    """(token rows with their responses, prompt lengths). Texts go through the chat template, and
    everything is checked against vocabulary and context.
    """
    from ..loading.prompt_rows import prompt_list

    rows = model.chat_tokens(prompts)
    lengths = [len(r) for r in rows]
    if responses is not None:
        answers = [responses] if isinstance(responses, str) else list(responses)
        if answers and all(isinstance(t, (int, np.integer)) for t in answers):
            answers = [answers]
        if len(answers) != len(rows):
            raise ValueError(
                f"{len(answers)} responses for {len(rows)} prompts: give one per prompt"
            )
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, str):
                tokenizer = model._need_tokenizer("a text response")
                row.extend(tokenizer.encode(answer, add_bos=False))
            elif len(answer):
                row.extend(map(int, prompt_list([answer])[0]))
    for i, row in enumerate(rows):
        check_tokens(model, row, i)
    return rows, lengths


def check_tokens(model: Model, row: Sequence[int], i: int, room: int = 0) -> None:
    """Raises ValueError where row i does not fit the vocabulary or the context. room: tokens that
    will follow.
    """
    c = model.config
    if len(row) + room > c.n_ctx:
        more = f" and {room} new ones" if room else ""
        raise ValueError(
            f"row {i} has {len(row)} tokens{more}, the model's context holds {c.n_ctx}: shorten it"
            + (" or lower max_new_tokens" if room else "")
        )
    top = max(row)
    if top >= c.d_vocab:
        raise ValueError(
            f"row {i}, position {row.index(top)}: token {top} is not in the vocabulary of"
            f" {c.d_vocab}"
        )


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Int32Array, BoolArray]:
    """(tokens int32 [B, S], padded with 0; mask bool [B, S], True at tokens)."""
    n_columns = max(map(len, rows))
    tokens = np.zeros((len(rows), n_columns), np.int32)
    mask = np.zeros((len(rows), n_columns), bool)
    for b, row in enumerate(rows):
        tokens[b, n_columns - len(row) :] = row
        mask[b, n_columns - len(row) :] = True
    return tokens, mask


def _stop_layer(sites: Sequence[Site]) -> int:
    """The layer before which a pass without logits may stop: neither it nor a later one has a
    captured site. 0 where all layers are needed.
    """
    layered = [
        max(1, s.key[1] + (not s.name.endswith("hook_resid_pre")))
        for s in sites
        if s.name.startswith("blocks.")
    ]
    if not layered or len(layered) < sum(not s.before_layers for s in sites):
        return 0
    return max(layered)


def execute(
    model: Model,
    prompts: Any,
    responses: Any = None,
    *,
    edits: Any = (),
    capture: str | Iterable[str] = (),
    logits: str | None = "all",
    freeze: str | None = None,
    ablate: str | None = None,
    freeze_layers: Iterable[int] | None = None,
) -> Run:
    """See Model.run."""
    if logits not in ("all", "last", None):
        raise ValueError(f"logits={logits!r}: use 'all', 'last' or None")
    sites = model._sites.find_all(capture)
    rows, lengths = split_rows(model, prompts, responses)
    rows_edits, shared = per_row(edits, len(rows))
    spec = check_freeze_spec(freeze, ablate, freeze_layers, rows_edits, model.config.n_layers)
    totals = [len(r) for r in rows]
    counts = touched(rows_edits, [RowShape(p, t) for p, t in zip(lengths, totals)])
    batch = Batch(model, lengths, totals, (rows_edits, shared), spec)
    n_columns = max(totals)
    cache, slots = model._run_cache(totals, 2 if batch.paired else 1)
    values, captured = batch.forward(
        cache,
        rows,
        slots=slots,
        columns=[n_columns - t for t in totals],
        n_columns=n_columns,
        capture=[s.key for s in sites],
        logits=logits,
        stop_layer=0 if logits is not None else _stop_layer(sites),
    )
    arrays = [finite.checked(s, captured[s.key]) for s in sites]
    finite.check(model, rows, lengths, rows_edits, spec, values, arrays)
    tokens, mask = left_padded(rows)
    return Run(values, tokens, mask, counts, {s.name: captured[s.key] for s in sites})
