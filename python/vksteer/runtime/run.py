"""`model.run`: one teacher-forced forward pass over a batch, and its result."""

from __future__ import annotations

import numpy as np

from .batch import Batch, check_freeze_spec
from .edit_compiler import RowShape, per_row, touched


class Run:
    """What a run gave. Arrays are float32 C-contiguous, own their memory and
    never change afterwards.

    logits: [B, S, V], [B, V] or None. tokens: int32 [B, S], left-padded with 0. mask: bool [B, S],
    True at real positions; `[:, -1]` is the last token of every row. touched: int64 [n_edits, B],
    tokens that each edit changed. `run[site]`: a captured site, axes as `model.sites` says.
    """

    def __init__(self, logits, tokens, mask, touched, captured):
        self.logits, self.tokens, self.mask, self.touched, self._captured = (
            logits,
            tokens,
            mask,
            touched,
            captured,
        )

    def __getitem__(self, site: str) -> np.ndarray:
        try:
            return self._captured[site]
        except KeyError:
            raise KeyError(
                f"{site!r} was not captured; this run has"
                f" {', '.join(self._captured) or 'no captures'}"
            ) from None

    def __contains__(self, site) -> bool:
        return site in self._captured

    def keys(self):
        """Names of captured sites."""
        return self._captured.keys()

    def items(self):
        return self._captured.items()

    def __repr__(self):
        return (
            f"Run(rows={self.tokens.shape[0]}, positions={self.tokens.shape[1]},"
            f" captured={len(self._captured)})"
        )


def split_rows(model, prompts, responses):
    """(token rows with their responses, prompt lengths): texts through the template, everything
    checked against vocabulary and context.
    """
    from ..loading.tokenizer import prompt_list

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
        for row, answer in zip(rows, answers):
            if isinstance(answer, str):
                row += model._need_tokenizer("a text response").encode(answer, add_bos=False)
            elif len(answer):
                row += prompt_list([answer])[0]
    for i, row in enumerate(rows):
        check_tokens(model, row, i)
    return rows, lengths


def check_tokens(model, row, i, room: int = 0):
    """Vocabulary and context, before any work. room: tokens that will still come."""
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


def execute(
    model,
    prompts,
    responses=None,
    *,
    edits=(),
    capture=(),
    logits="all",
    freeze=None,
    ablate=None,
    freeze_layers=None,
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
    # Nothing above the last captured layer is looked at where no logits are wanted.
    layered = [
        max(1, s.key[1] + (not s.name.endswith("hook_resid_pre")))
        for s in sites
        if s.name.startswith("blocks.")
    ]
    stop = (
        {"stop_layer": max(layered)}
        if logits is None and layered and len(layered) == sum(s.name != "hook_embed" for s in sites)
        else {}
    )
    values, captured = batch.forward(
        cache,
        rows,
        slots=slots,
        columns=[n_columns - t for t in totals],
        n_columns=n_columns,
        capture=[s.key for s in sites],
        logits=logits,
        **stop,
    )
    tokens, mask = (
        np.zeros((len(rows), n_columns), np.int32),
        np.zeros((len(rows), n_columns), bool),
    )
    for b, row in enumerate(rows):
        tokens[b, n_columns - len(row) :] = row
        mask[b, n_columns - len(row) :] = True
    return Run(values, tokens, mask, counts, {s.name: captured[s.key] for s in sites})
