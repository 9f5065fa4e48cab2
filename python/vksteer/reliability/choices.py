"""The propensity of a model to give one answer rather than another, under many coefficients in one
batch over shared prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_number
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Float64Array, ProgressLike, Prompt
from ..inputs.dosing import stream_norms
from ..runtime.batch import Batch, first_tokens
from ..runtime.edits import Steer
from ..runtime.resume import PREFIX
from .curves import Curves

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

#: Coefficients of the paper's curves.
COEFFICIENTS = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
#: Bytes of logits, and tokens, of one pass.
LOGIT_BYTES, PASS_TOKENS = 256 << 20, 16384


@dataclass(frozen=True)
class Choice:
    """prompt: a text, which goes through the chat template, or token ids. positive, negative: the
    two answers, texts or token ids; token ids are appended as they are.
    """

    prompt: Prompt
    positive: Prompt
    negative: Prompt


@dataclass(frozen=True)
class _Item:
    """Tokens of one choice. common: leading tokens in which the prompt and both rows agree; the
    answers' tokens begin there.
    """

    prompt: tuple[int, ...]
    rows: tuple[tuple[int, ...], tuple[int, ...]]  # positive, negative
    common: int


def steerability(
    model: Model,
    items: Sequence[Choice],
    vector: SteeringVector,
    coefficients: Sequence[float] = COEFFICIENTS,
    *,
    positions: Any = None,
    progress: ProgressLike = True,
) -> Curves:
    """How the preference for one answer changes with the coefficient, item by item.

    items: Choices. vector: s; each coefficient a steers by a * s. positions: None steers every
    token of prompt and answer, as `Steer` does; "answer" steers from the answer's first token on
    (found by comparing tokens with the prompt's, since a tokenizer may merge across the border), as
    in the paper; anything else as in `Steer`.

    The propensity is log p(positive) - log p(negative), summed over the answers' tokens; those of
    the prompt cancel exactly, because they are not summed. All coefficients and both answers are
    rows of one batch, layers below the vector's run once for each item, the prompt runs once for
    each coefficient, and the shared prefix of all prompts once for each coefficient and batch.
    Returns Curves: `.propensity` float64 [n, k], `.slope`, `.residual`, `.spearman` [n],
    `.anti_steerable`, `.mean_slope`.
    Raises ValueError before any work for empty lists, fewer than two different coefficients,
    answers that are equal or empty, rows too long for the context, and a vector of another width
    or layer.
    """
    vector.check(model)
    strengths = _coefficients(coefficients)
    checked = [_item(model, choice, i) for i, choice in enumerate(_items(items))]
    found = np.empty((len(checked), len(strengths)))
    with Progress(progress, len(checked), "steerability") as bar:
        for part in _parts(model, checked, len(strengths)):
            some = checked[part]
            found[part] = _propensity(model, some, vector, strengths, positions)
            bar.step(len(some))
        norms = stream_norms(model, [item.prompt for item in checked], vector.layer)
    unit = float(np.mean([np.mean(vector.norm / row) for row in norms]))
    meta = provenance(
        model,
        vector_hash=digest(vector.direction),
        layer=vector.layer,
        items_hash=digest([[item.prompt, item.rows] for item in checked]),
        positions=repr(positions),
    )
    return Curves(np.array(strengths), found, unit, meta)


def _coefficients(given: Sequence[float]) -> list[float]:
    listed = list(given)
    for a in listed:
        if not is_number(a):
            raise ValueError(f"coefficients: {a!r} is not a finite number")
    if len(set(listed)) < 2:
        raise ValueError("coefficients must name at least two different numbers: a curve needs two")
    return [float(a) for a in listed]


def _items(items: Any) -> list[Choice]:
    listed: list[Choice] = [items] if isinstance(items, Choice) else list(items)
    if not listed:
        raise ValueError("items is empty: give at least one Choice")
    for i, item in enumerate(listed):
        if not isinstance(item, Choice):
            raise ValueError(f"items[{i}] is {item!r}, not a Choice(prompt, positive, negative)")
    return listed


def _item(model: Model, choice: Choice, i: int) -> _Item:
    prompt = model.chat_tokens([choice.prompt])[0]
    rows = []
    for name in ("positive", "negative"):
        answer = getattr(choice, name)
        if isinstance(answer, str) and not answer:
            raise ValueError(f"items[{i}].{name} is empty: an answer needs at least one token")
        row = model.chat_tokens([choice.prompt], response=[answer])[0]
        if len(row) > model.config.n_ctx:
            raise ValueError(
                f"items[{i}]: prompt and {name} answer have {len(row)} tokens, the model's context"
                f" holds {model.config.n_ctx}"
            )
        rows.append(tuple(int(t) for t in row))
    if rows[0] == rows[1]:
        raise ValueError(f"items[{i}]: the two answers are the same tokens")
    common = min(_agree(prompt, row) for row in rows)
    if common < 1 or any(len(row) == common for row in rows):
        raise ValueError(f"items[{i}]: an answer adds no token to the prompt")
    return _Item(tuple(prompt), (rows[0], rows[1]), common)


def _agree(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of leading tokens that are equal."""
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


def _shared(model: Model, item: _Item) -> int:
    """Leading tokens that are run once for several rows. The last common token is none of them: its
    output predicts the first token of the answer. 0 where a row is so long that its rotation is
    another one than that of the common tokens alone (longrope).
    """
    rotated_otherwise = 0 < model.config.rope_switch < max(map(len, item.rows)) - 1
    return 0 if rotated_otherwise else item.common - 1


def _head(items: Sequence[_Item], shared: Sequence[int]) -> int:
    """Leading tokens of all prompts that are run once for all of them; 0 where that is not worth a
    pass.
    """
    agreed = [_agree(items[0].prompt, item.prompt) for item in items]
    head = min([min(shared) - 1, *agreed])
    return head if head >= PREFIX and len(items) > 1 else 0


def _parts(model: Model, items: Sequence[_Item], k: int) -> Iterator[slice]:
    """Slices of items whose logits and tokens fit a pass."""
    start = tokens = width = 0
    for i, item in enumerate(items):
        more = 2 * k * max(map(len, item.rows))
        own = max(map(len, item.rows)) - 1 - _shared(model, item)
        wide = max(width, own)
        logits = 4 * 2 * k * (i - start + 1) * wide * model.config.d_vocab
        if i > start and (tokens + more > PASS_TOKENS or logits > LOGIT_BYTES):
            yield slice(start, i)
            start, tokens, wide = i, 0, own
        tokens, width = tokens + more, wide
    yield slice(start, len(items))


class _Pass:
    """Rows of some items in one batch: item by item, coefficient by coefficient, the positive
    answer and the negative one. Each row is (item, coefficient, tokens).

    What rows share runs once: the shared prefix of all prompts (the head of a chat template) for
    each coefficient, and so each prompt; where only the answer is steered, once for all of them.
    """

    def __init__(
        self,
        model: Model,
        items: Sequence[_Item],
        vector: SteeringVector,
        coefficients: Sequence[float],
        positions: Any,
    ) -> None:
        self.model, self.layer = model, min(vector.layer, model.config.n_layers - 1)
        self.rows = [(item, a, row) for item in items for a in coefficients for row in item.rows]
        #: the last token predicts nothing that is read
        self.tokens = [row[:-1] for _, _, row in self.rows]
        self.shared = [_shared(model, item) for item, _, _ in self.rows]
        answer = isinstance(positions, str) and positions == "answer"
        #: rows in a row whose shared part is the same: one run, copied to the others
        self.same = 2 * len(coefficients) if answer else 2
        #: leaders (the first of such rows) of one item
        self.of_item = 1 if answer else len(coefficients)
        self.head = _head(items, self.shared) if answer or positions is None else 0
        edits = [
            [Steer(vector, a, slice(item.common, None) if answer else positions)]
            for item, a, _ in self.rows
        ]
        prompts = [len(item.prompt) for item, _, _ in self.rows]
        totals = [len(row) for _, _, row in self.rows]
        self.batch = Batch(model, prompts, totals, (edits, False), None)
        self.slots = first_tokens(map(len, self.tokens)).astype(np.uint32)
        self._streams: dict[tuple[int, ...], Any] = {}
        if self.layer:
            distinct = list(dict.fromkeys(self.tokens))
            found = model._layer_inputs.get(distinct, self.layer, every_layer=False)
            self._streams = dict(zip(distinct, found, strict=True))

    def _forward(
        self, cache: Any, rows: Sequence[int], parts: Sequence[slice], logits: str | None = None
    ) -> Any:
        """Runs a part of the tokens of some rows, from the vector's layer on; returns their logits,
        [rows, longest part, V], or None.
        """
        starts = [part.start for part in parts]
        tokens = [self.tokens[r][part] for r, part in zip(rows, parts, strict=True)]
        resumed: dict[str, Any] = {}
        if self.layer:
            inputs = [
                self._streams[self.tokens[r]][part] for r, part in zip(rows, parts, strict=True)
            ]
            resumed = {"first_layer": self.layer, "inputs": inputs}
        found, _ = self.batch.forward(
            cache,
            tokens,
            starts=starts,
            slots=self.slots[list(rows)],
            columns=[-start for start in starts],
            n_columns=max(map(len, tokens)),
            key_columns=[0] * len(rows),
            n_keys=max(map(len, self.tokens)),
            active=rows,
            logits=logits,
            **resumed,
        )
        return found

    def _run_shared(self, cache: Any) -> None:
        """Fills the cache with what rows share."""
        leaders = [r for r in range(0, len(self.rows), self.same) if self.shared[r] > 0]
        if not leaders:
            return
        if self.head:
            first = leaders[: self.of_item]
            self._forward(cache, first, [slice(0, self.head)] * len(first))
            for i, r in enumerate(first):
                others = self.slots[leaders[i + self.of_item :: self.of_item]]
                cache.copy(int(self.slots[r]), others, self.head, self.layer)
        self._forward(cache, leaders, [slice(self.head, self.shared[r]) for r in leaders])
        for r in leaders:
            others = self.slots[r + 1 : r + self.same]
            cache.copy(int(self.slots[r]), others, self.shared[r], self.layer)

    def log_probabilities(self) -> Float64Array:
        """Of each row's answer, summed over its tokens, float64 [rows]. Logits of long answers are
        read in parts; those of rows whose length decides their rotation are not.
        """
        from ..runtime.device import _engine

        cache = _engine().Cache(self.model._engine, sum(map(len, self.tokens)))
        self._run_shared(cache)
        longest = max(len(t) - s for t, s in zip(self.tokens, self.shared, strict=True))
        tile = longest
        if all(self.shared):
            each = 4 * len(self.rows) * self.model.config.d_vocab
            tile = max(1, min(longest, LOGIT_BYTES // each))
        sums = np.zeros(len(self.rows))
        for start in range(0, longest, tile):
            rows, parts = [], []
            for r, (tokens, shared) in enumerate(zip(self.tokens, self.shared, strict=True)):
                if shared + start < len(tokens):
                    rows.append(r)
                    parts.append(slice(shared + start, min(len(tokens), shared + start + tile)))
            logits = self._forward(cache, rows, parts, "all")
            for r, part, values in zip(rows, parts, logits, strict=True):
                item, _, row = self.rows[r]
                first = max(part.start, item.common - 1)  # predicts the answer's first token
                sums[r] += _log_probability(
                    values[first - part.start : part.stop - part.start],
                    row[first + 1 : part.stop + 1],
                )
        return sums


def _propensity(
    model: Model,
    items: Sequence[_Item],
    vector: SteeringVector,
    coefficients: Sequence[float],
    positions: Any,
) -> Float64Array:
    """float64 [items, coefficients]."""
    sums = _Pass(model, items, vector, coefficients, positions).log_probabilities()
    pairs = sums.reshape(len(items), len(coefficients), 2)
    return pairs[..., 0] - pairs[..., 1]


def _log_probability(logits: Any, targets: Sequence[int]) -> float:
    """The summed log probability of the targets, in float64. logits: [targets, V]."""
    x = logits.astype(np.float64)
    top = x.max(axis=1)
    total = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    return float((x[np.arange(len(targets)), list(targets)] - total).sum())
