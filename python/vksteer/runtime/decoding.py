"""One micro-batch of `model.generate`: its rows, prefill and steps. The passes run in C; this
module reports tokens and ends rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.display import html_table
from ..base.progress import Progress
from ..base.types import Float32Array, Int32Array, UInt32Array
from . import finite
from .batch import Batch
from .cache_edits import RowCacheEdits, add_to_cache
from .sampling import Sampling

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site

#: on_token(row, token, text)
OnToken: TypeAlias = Callable[[int, int, str], object]


#: The most steps that the device takes by itself, and how long they may take on the whole: between
#: two blocks progress is shown and Ctrl-C is noticed.
BLOCK_STEPS = 16
BLOCK_SECONDS = 0.25


@dataclass
class Generation:
    """One row's answer.

    text: decoded new tokens without special ones, cut off before a stop string ("" without a
    tokenizer). tokens: int32 [n], new tokens only, an end token included. finish_reason: "stop"
    (end token or stop string) or "length". prompt_tokens: int32. captured: {site: float32 [n,
    ...]}, the site at each new token. cache_edits: what each cache edit of the row was (its
    position, what it appended, coefficients and the vector's hash).
    """

    text: str
    tokens: Int32Array
    finish_reason: str
    prompt_tokens: Int32Array
    captured: dict[str, Float32Array] = field(default_factory=dict, repr=False)
    cache_edits: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def _repr_html_(self) -> str:
        why = {"stop": "ended by itself", "length": "cut off"}[self.finish_reason]
        head = (f"{len(self.prompt_tokens)} prompt tokens, {len(self.tokens)} new ones, {why}",)
        return html_table(head, [(self.text,)])


@dataclass(frozen=True)
class Request:
    """Arguments of one generate call that every row shares."""

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    eos_ids: frozenset[int]
    ignore_eos: bool


class Row:
    """One prompt and its new tokens."""

    def __init__(
        self,
        model: Model,
        index: int,
        prompt: list[int],
        request: Request,
        edits: Sequence[Any] = (),
        cache_edits: RowCacheEdits | None = None,
    ) -> None:
        self.index, self.prompt, self.request, self.edits = index, prompt, request, edits
        self.cache_edits = cache_edits
        self.tokens: list[int] = []
        self.random = request.sampling.generator(index)
        self.tokenizer = model.tokenizer
        self.stream = None if self.tokenizer is None else self.tokenizer.stream()
        # stop strings may hold special tokens, which `text` leaves out
        self.searched = self.tokenizer.stream(False) if self.tokenizer and request.stops else None
        self.text = self.whole_text = ""
        self.reason: str | None = None  # set when the row has ended
        self.cut = False  # a stop string has been cut off
        self.captured: list[dict[str, Float32Array]] = []
        self.latest: dict[str, Float32Array] = {}  # of the newest token

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.tokens)

    def accept(self, token: int) -> str:
        """Takes a new token; returns its piece of text. Sets `reason` when the row has ended."""
        request = self.request
        self.tokens.append(token)
        piece = self.stream.push(token) if self.stream else ""
        self.text += piece
        if self.searched:
            self.whole_text += self.searched.push(token)
        if (not request.ignore_eos and token in request.eos_ids) or (
            request.stops and self._stopped()
        ):
            self.reason = "stop"
        elif len(self.tokens) >= request.max_new_tokens:
            self.reason = "length"
        return piece

    def _stopped(self) -> bool:
        # `whole_text` lacks incomplete characters, which cannot be part of a stop string.
        found = [i for i in (self.whole_text.find(s) for s in self.request.stops) if i >= 0]
        if found:
            self.text, self.cut = self._text_before(min(found)), True
        return bool(found)

    def _text_before(self, end: int) -> str:
        """The new text without special tokens, up to this index of the text with them."""
        assert self.tokenizer is not None  # stop strings need one
        decode = self.tokenizer.decode
        n = len(self.tokens)
        while n and not (
            len(before := decode(self.tokens[:n])) <= end and self.whole_text.startswith(before)
        ):
            n -= 1
        rest = self.whole_text[len(decode(self.tokens[:n])) if n else 0 : end]
        # a stop string may begin inside a special token, whose text is left out
        partial = "" if self.tokens[n] in self.tokenizer.special_ids else rest
        return decode(self.tokens[:n], True) + partial

    def result(self) -> Generation:
        if self.stream and not self.cut:
            self.text += self.stream.flush()
        captured = {}
        if self.captured:
            captured = {
                name: np.stack([step[name] for step in self.captured]) for name in self.captured[0]
            }
        return Generation(
            self.text,
            np.array(self.tokens, np.int32),
            self.reason or "length",
            np.array(self.prompt, np.int32),
            captured,
            self.cache_edits.to_dicts() if self.cache_edits else [],
        )


class Decoding:
    """One micro-batch: prefill, then one token a step for every row that has not ended. Ended rows
    leave the batch. Greedy decoding that nobody watches takes several steps at once, a block, in
    which the device picks the tokens; the results are the same.
    """

    def __init__(
        self,
        model: Model,
        batch: Batch,  # or one of circuits, with the same `forward`
        states: list[Row],
        sites: list[Site],
        on_token: OnToken | None,
        bar: Progress,
    ) -> None:
        from .device import _engine

        self.batch, self.states, self.sites = batch, states, sites
        self.on_token, self.bar = on_token, bar
        self.double = 2 if batch.paired else 1
        capacity = [len(s.prompt) + s.request.max_new_tokens for s in states]
        starts = np.concatenate([[0], np.cumsum(np.repeat(capacity, self.double))])
        self.starts = starts.astype(np.uint32)
        self.cache = _engine().Cache(model._engine, int(self.starts[-1]))
        batch.reserve(sum(len(s.prompt) for s in states), int(self.starts[-1]))
        self.blocks = self._blocks_fit(model, states)
        self.step_seconds = 0.0  # of the newest step or block

    def run(self) -> None:
        active = list(range(len(self.states)))
        self._accept(active, self._from_start(active))
        # The last token of an ended row runs once more only for the captures at it.
        while feeding := active if self.sites else [a for a in active if not self.states[a].reason]:
            begin, steps = time.monotonic(), self._steps_at_once(feeding)
            if steps > 1:
                active = self._block(feeding, steps)
            else:
                logits = self._step(feeding)
                still = [i for i, a in enumerate(feeding) if not self.states[a].reason]
                active = [feeding[i] for i in still]
                if not active:
                    return
                self.bar.step(len(active))
                self._accept(active, logits[still])
            self.step_seconds = (time.monotonic() - begin) / steps

    def _blocks_fit(self, model: Model, states: list[Row]) -> bool:
        """Can the device take several steps of this micro-batch by itself?"""
        request, plan = states[0].request, model._engine.plan()
        return (
            request.sampling.temperature == 0
            and not request.stops
            and self.on_token is None
            and not self.sites
            and isinstance(self.batch, Batch)
            and len(states) * self.double <= plan["chunk"]
            and model.config.d_vocab <= 1 << 24
            # A CPU computes what follows a row's end token in vain; a GPU waits for the host less.
            and (self._never_stops(request) or model._engine.kernels in ("tiled", "matrix"))
        )

    @staticmethod
    def _never_stops(request: Request) -> bool:
        return request.ignore_eos or not request.eos_ids

    def _steps_at_once(self, rows: list[int]) -> int:
        """Steps that the device takes by itself from here on; 1 for a step with the host."""
        if not self.blocks or not self.step_seconds:  # the first step shows how long one takes
            return 1
        states = [self.states[a] for a in rows]
        most = min(BLOCK_STEPS, *(s.request.max_new_tokens - len(s.tokens) for s in states))
        switch = self.batch.model.config.rope_switch
        for length in (s.length for s in states):
            if switch and length <= switch:
                most = min(most, switch - length + 1)
            elif length - 1 == switch > 0:
                return 1  # all tokens of the row are run again
        if not self._never_stops(states[0].request):
            # so that at most a third of all steps are for nothing where a row ends
            most = min(most, 1 + len(states[0].tokens) // 2)
        if self.step_seconds * most > BLOCK_SECONDS:
            most = int(BLOCK_SECONDS / self.step_seconds)
        return max(most, 1)

    def _block(self, rows: list[int], steps: int) -> list[int]:
        """Takes several steps, the tokens of which the device picks. Returns the rows that have not
        ended.
        """
        lengths = [self.states[a].length for a in rows]
        picked = self.batch.decode_block(
            self.cache,
            [self.states[a].tokens[-1] for a in rows],
            steps,
            starts=[n - 1 for n in lengths],
            slots=self._slots(rows),
            active=rows,
            empty=finite.first_logit(self.batch.model),
        )
        live = list(range(len(rows)))
        for tokens in picked.tolist():
            if min(tokens[i] for i in live) < 0:
                # Nothing else is amiss with the step: the host takes it again and looks at it.
                self.blocks = False
                break
            self.bar.step(len(live))
            for i in live:
                self._take(self.states[rows[i]], tokens[i])
            self._count_ended([rows[i] for i in live])
            live = [i for i in live if not self.states[rows[i]].reason]
            if not live:
                break
        return [rows[i] for i in live]

    def _slots(self, rows: list[int]) -> UInt32Array:
        """First cache slots of the engine rows of these rows."""
        double = self.double
        return np.concatenate([self.starts[double * a : double * a + double] for a in rows])

    def _from_start(self, rows: list[int], capture: bool = False) -> Float32Array:
        """Logits [rows, V] after all tokens of these rows, which are run from their first on. Cache
        edits are applied between the prompt and what follows it.
        """
        states = [self.states[a] for a in rows]
        ends, rest = [s.length for s in states], []
        for i, state in enumerate(states):
            if state.cache_edits:
                rest += [i] if state.cache_edits.n_prompt < state.length else []
                # all keys of a row are rotated by one table, that of its whole length
                if self._long(state.cache_edits.n_prompt) == self._long(state.length):
                    ends[i] = state.cache_edits.n_prompt
        logits = self._pass(rows, [0] * len(rows), ends, capture)
        edited = [i for i, s in enumerate(states) if s.cache_edits]
        if edited:
            add_to_cache(
                self.batch.model,
                self.cache,
                [e for s in states if (e := s.cache_edits)],
                [self._slots([rows[i]]) for i in edited],
                [self._long(ends[i]) for i in edited],
            )
        if rest:
            starts = [e.n_prompt for i in rest if (e := states[i].cache_edits)]
            lengths = [states[i].length for i in rest]
            logits[rest] = self._pass([rows[i] for i in rest], starts, lengths, capture)
        return logits

    def _long(self, length: int) -> bool:
        return 0 < self.batch.model.config.rope_switch < length

    def _accept(self, rows: list[int], logits: Float32Array) -> None:
        """Picks the next token of each row."""
        for a, row in zip(rows, logits, strict=True):
            state = self.states[a]
            if finite.suspect_row(row[None], (), None, self.batch.model._bias_logits) is not None:
                self._refuse(state, bool(np.isfinite(row).all()))
            self._take(state, state.request.sampling.pick(row, state.random))
        self._count_ended(rows)

    def _take(self, state: Row, token: int) -> None:
        piece = state.accept(token)
        if self.on_token is not None:
            self.on_token(state.index, token, piece)

    def _count_ended(self, rows: list[int]) -> None:
        """Steps that rows which have ended will not take."""
        for state in (self.states[a] for a in rows):
            if state.reason:
                self.bar.step(state.request.max_new_tokens - len(state.tokens) + 1)

    def _refuse(self, state: Row, all_zero: bool) -> None:
        """Raises ValueError for logits or captures that are not finite, with the layer and site
        where that begins, and the cause. all_zero: finite logits that are all zero; nothing is
        raised where every site is finite, too.
        """
        model, spec = self.batch.model, getattr(self.batch, "freeze_spec", None)
        row = state.prompt + state.tokens
        why = finite.explain(model, row, len(state.prompt), state.edits, spec)
        if why is None and all_zero:
            return
        raise ValueError(
            f"row {state.index}: values are not finite after {len(state.tokens)} new tokens;"
            f" {why or 'an edit is too strong for this model, or its weights are damaged'}"
        )

    def _step(self, rows: list[int]) -> Float32Array:
        """Runs the newest token of each row, keeps the captures; logits [rows, V] after it."""
        # The keys of a row that grows beyond the switch of longrope were rotated by the table of
        # shorter texts: all of its tokens are run again, as transformers does for Phi-3.
        switch = self.batch.model.config.rope_switch
        lengths = [self.states[a].length for a in rows]
        again = [i for i, n in enumerate(lengths) if 0 < switch == n - 1]
        if 0 < len(again) < len(rows):
            logits = np.empty((len(rows), self.batch.model.config.d_vocab), np.float32)
            for part in ([i for i in range(len(rows)) if i not in again], again):
                logits[part] = self._step([rows[i] for i in part])
            return logits
        if again:
            logits = self._from_start(rows, capture=True)
        else:
            starts = [n - 1 for n in lengths]
            logits = self._pass(rows, starts, lengths, capture=True, decode=True)
        if self.sites:
            for state in (self.states[a] for a in rows):
                state.captured.append(state.latest)
        return logits

    def _pass(
        self,
        rows: list[int],
        starts: list[int],
        ends: list[int],
        capture: bool,
        decode: bool = False,
    ) -> Float32Array:
        """Runs tokens [starts[i], ends[i]) of each row; logits [rows, V] after them. capture: the
        sites at each row's last token become its `latest`.
        """
        states = [self.states[a] for a in rows]
        sites = self.sites if capture else []
        width = max(end - start for start, end in zip(starts, ends, strict=True))
        logits, captured = self.batch.forward(
            self.cache,
            [(s.prompt + s.tokens)[a:b] for s, a, b in zip(states, starts, ends, strict=True)],
            starts=starts,
            slots=self._slots(rows),
            columns=[width - end for end in ends],
            n_columns=width,
            key_columns=[0] * len(rows),
            n_keys=max(ends),
            capture=[s.key for s in sites],
            logits="last",
            active=rows,
            decode=decode,
        )
        if sites:
            if not all(finite.all_finite(captured[s.key]) for s in sites):
                bad = finite.suspect_row(None, [captured[s.key] for s in sites])
                self._refuse(states[bad or 0], False)
            for i, state in enumerate(states):
                state.latest = {s.name: captured[s.key][i, -1] for s in sites}
        return np.asarray(logits)
