"""`model.generate`: decoding with a key/value cache. The passes run in C; this loop samples, ends
rows and hands tokens out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from ..base.checks import require_int
from ..base.progress import Progress
from .batch import Batch, check_freeze_spec, steering_of
from .edit_compiler import per_row
from .run import check_tokens


@dataclass
class Generation:
    """One row's answer.

    text: decoded new tokens without special ones, a stop string cut off ("" without a
    tokenizer). tokens: int32 [n], new tokens only, an end token included. finish_reason: "stop"
    (end token or stop string) or "length". prompt_tokens: int32. captured: {site: float32 [n,
    ...]}, the site at each new token.
    """

    text: str
    tokens: np.ndarray
    finish_reason: str
    prompt_tokens: np.ndarray
    captured: dict = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else softmax(logits / temperature), the top_k most likely, then the
    fewest that together reach top_p.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature!r} must be a finite number from 0 (greedy) on"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must lie above 0 and at most at 1 (off)")

    def generator(self, row: int):
        """Every row draws from its own stream, so that micro-batches change nothing."""
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([int(self.seed) & (2**63 - 1), row]))
        )

    def pick(self, logits: np.ndarray, random) -> int:
        """logits: float32 [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        x = logits.astype(np.float64) / self.temperature
        if self.top_k and self.top_k < x.size:
            order = np.argsort(-x, kind="stable")[: self.top_k]
        else:
            order = np.argsort(-x, kind="stable")
        p = np.exp(x[order] - x[order[0]])
        p /= p.sum()
        if self.top_p < 1:
            p = np.where(np.cumsum(p) - p < self.top_p, p, 0)
            p /= p.sum()
        return int(
            order[
                min(
                    np.searchsorted(np.cumsum(p), random.random() * p.sum(), side="right"),
                    np.count_nonzero(p) - 1,
                )
            ]
        )


class _Row:
    """One prompt being answered."""

    def __init__(self, model, index, prompt, request):
        self.index, self.prompt, self.request = index, prompt, request
        self.tokens: list[int] = []
        self.random = request.sampling.generator(index)
        self.stream = model.tokenizer.stream() if model.tokenizer is not None else None
        self.text, self.reason = "", None
        self.captured: list[dict] = []

    def accept(self, token: int) -> str:
        """Takes a new token; returns its piece of text. Sets `reason` when the row has ended."""
        request = self.request
        self.tokens.append(token)
        piece = self.stream.push(token) if self.stream else ""
        self.text += piece
        if (not request.ignore_eos and token in request.eos_ids) or (
            request.stops and self._stopped()
        ):
            self.reason = "stop"
        elif len(self.tokens) >= request.max_new_tokens:
            self.reason = "length"
        return piece

    def _stopped(self) -> bool:
        # What the tokens say so far; incomplete characters cannot be part of a stop string.
        found = [i for i in (self.text.find(s) for s in self.request.stops) if i >= 0]
        if found:
            self.text, self.cut = self.text[: min(found)], True
        return bool(found)

    cut = False

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
        )


@dataclass(frozen=True)
class Request:
    """Arguments of one generate call that every row shares."""

    max_new_tokens: int
    sampling: Sampling
    stops: tuple[str, ...]
    eos_ids: frozenset
    ignore_eos: bool


def _request(model, max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos) -> Request:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"stop={stop!r}: use a str or a list of str, none of them empty")
    if stops:
        model._need_tokenizer("a stop string")
    return Request(
        require_int(max_new_tokens, "max_new_tokens", 1),
        Sampling(float(temperature), require_int(top_k, "top_k", 0), float(top_p), int(seed)),
        stops,
        frozenset(model.eos_ids),
        bool(ignore_eos),
    )


def generate(
    model,
    prompts,
    *,
    max_new_tokens,
    edits,
    freeze,
    ablate,
    freeze_layers,
    temperature,
    top_k,
    top_p,
    seed,
    stop,
    ignore_eos,
    capture,
    batch_size,
    on_token,
    progress,
    circuit=None,
) -> list[Generation]:
    """See Model.generate."""
    request = _request(model, max_new_tokens, temperature, top_k, top_p, seed, stop, ignore_eos)
    sites = model._sites.find_all(capture)
    if any(s.over_keys for s in sites):
        raise ValueError(
            "scores and patterns of decoded tokens have a different number of keys at every step:"
            " capture them with run(prompt, response)"
        )
    rows = model.chat_tokens(prompts)
    for i, row in enumerate(rows):
        check_tokens(model, row, i, request.max_new_tokens)
    rows_edits, shared = per_row(edits, len(rows))
    spec = check_freeze_spec(freeze, ablate, freeze_layers, rows_edits, model.config.n_layers)
    if batch_size is not None:
        batch_size = require_int(batch_size, "batch_size", 1)
    if circuit is not None:
        if not hasattr(circuit, "decoding_batch"):
            raise ValueError(f"circuit must be a Circuit, not {circuit!r}")
        circuit.check_rows(model, rows_edits, freeze, ablate, sites)
    double = 2 if spec or circuit is not None else 1
    # Every edit is checked before the first row is run; a single micro-batch needs no other.
    everything = Batch(
        model, [len(r) for r in rows], [None] * len(rows), (rows_edits, shared), spec
    )
    parts = list(
        _micro_batches(
            model, [(len(r) + request.max_new_tokens) * double for r in rows], batch_size
        )
    )
    if circuit is not None:
        parts = [
            list(same)
            for part in parts
            for _, same in groupby(part, key=lambda i: steering_of(rows_edits[i]))
        ]
    done = []
    with Progress(progress, len(rows) * request.max_new_tokens, "generate") as bar:
        for part in parts:
            states = [_Row(model, i, rows[i], request) for i in part]
            batch = everything
            if circuit is not None:
                batch = circuit.decoding_batch(
                    model, [len(rows[i]) for i in part], ([rows_edits[i] for i in part], shared)
                )
            elif len(parts) > 1:
                batch = Batch(
                    model,
                    [len(rows[i]) for i in part],
                    [None] * len(part),
                    ([rows_edits[i] for i in part], shared),
                    spec,
                )
            _decode(model, batch, states, sites, on_token, bar)
            done += [s.result() for s in states]
    return done


def _micro_batches(model, slots, batch_size):
    """Consecutive rows whose caches fit into half of the free memory together; a row that does not
    fit alone is refused with what would fit.
    """
    per_slot = model._engine.plan()["cache_per_token"]
    budget = max(model._engine_device.available_bytes // 2, per_slot)
    if max(slots) * per_slot > budget:
        raise ValueError(
            f"a row of {max(slots)} tokens needs {max(slots) * per_slot / 1e9:.2f} GB of keys and"
            f" values and {budget / 1e9:.2f} GB may be used: at most {budget // per_slot} tokens"
            " fit; shorten the prompt or lower max_new_tokens"
        )
    limit = batch_size or 64
    part, used = [], 0
    for i, n in enumerate(slots):
        if part and (len(part) >= limit or (used + n) * per_slot > budget):
            yield part
            part, used = [], 0
        part.append(i)
        used += n
    yield part


def _decode(model, batch, states, sites, on_token, bar) -> None:
    """Prefill, then one token a step for every row that has not ended; ended
    rows leave the batch.
    """
    from .device import _engine

    double = 2 if batch.paired else 1
    capacity = [len(s.prompt) + s.request.max_new_tokens for s in states]
    starts = np.concatenate([[0], np.cumsum(np.repeat(capacity, double))]).astype(np.uint32)
    cache = _engine().Cache(model._engine, int(starts[-1]))
    batch.reserve(sum(len(s.prompt) for s in states), int(starts[-1]))
    slots_of = lambda active: np.concatenate(
        [starts[double * a : double * a + double] for a in active]
    )
    active = list(range(len(states)))
    width = max(len(s.prompt) for s in states)
    logits, _ = batch.forward(
        cache,
        [s.prompt for s in states],
        slots=slots_of(active),
        columns=[width - len(s.prompt) for s in states],
        n_columns=width,
        logits="last",
        active=active,
    )
    keys = [s.key for s in sites]
    while True:
        for state, row in zip([states[a] for a in active], logits):
            if not np.isfinite(row).all():
                raise ValueError(
                    f"row {state.index}: the logits are not finite after {len(state.tokens)} new"
                    " tokens; an edit is too strong for this model, or its weights are damaged"
                )
            token = state.request.sampling.pick(row, state.random)
            piece = state.accept(token)
            if on_token is not None:
                on_token(state.index, token, piece)
        ended = [a for a in active if states[a].reason]
        for a in ended:
            bar.step(states[a].request.max_new_tokens - len(states[a].tokens) + 1)
        # The last token of an ended row is fed once more only where its activations were asked for.
        feeding = active if sites else [a for a in active if not states[a].reason]
        if not feeding:
            return
        positions = [len(states[a].prompt) + len(states[a].tokens) - 1 for a in feeding]
        logits, captured = batch.forward(
            cache,
            [[states[a].tokens[-1]] for a in feeding],
            starts=positions,
            slots=slots_of(feeding),
            columns=[-p for p in positions],
            n_columns=1,
            key_columns=[0] * len(feeding),
            n_keys=max(positions) + 1,
            capture=keys,
            logits="last",
            active=feeding,
            decode=True,
        )
        for i, a in enumerate(feeding):
            if sites:
                states[a].captured.append({s.name: captured[s.key][i, 0] for s in sites})
        still = [i for i, a in enumerate(feeding) if not states[a].reason]
        active = [feeding[i] for i in still]
        logits = logits[still]
        if active:
            bar.step(len(active))
        else:
            return
