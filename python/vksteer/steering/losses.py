"""The losses that steering vectors are trained with, NTP and PO, and their gradients with respect
to the direction (method.md section 2).

Both are made of one quantity: log p of the first 64 tokens of a response after its prompt, the
stream steered by coefficient * sign * direction at every position. Layers below the vector's run
once per sequence and are kept; the layers above run forward and back in the engine. Each
sequence's gradient is taken by itself and combined here in float64, so that neither the batch nor
the order of work changes a bit.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..inputs.prompts import _is_tokens, as_tokens
from ..inputs.vectors import SteeringVector
from ..runtime.edits import Steer
from ..runtime.gradients import BATCH_TOKENS, LOG_PROB, MEMORY_SHARE, RowMetric, differentiate, pack

#: Tokens of a response that count.
LIMIT = 64
#: Most tokens that go forward and back together; more bring no speed.
MOST_TOKENS = 4 * BATCH_TOKENS
#: Log probabilities of unsteered responses that are kept per model.
_KEPT_REFERENCES = 1 << 16
_references: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Continuation:
    """A prompt and the tokens of a response that count. The last of these is
    predicted and never read.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.response[:-1]

    @property
    def predicting(self) -> np.ndarray:
        """Positions whose logits predict the response's tokens, int64 [len(response)]."""
        return len(self.prompt) - 1 + np.arange(len(self.response))


@dataclass(frozen=True)
class Prepared:
    """An example as tokens. losing: None where no loss asks for it."""

    winning: Continuation
    losing: Continuation | None
    sign: int


def _response(model: Model, value: object, what: str, limit: int) -> tuple[int, ...]:
    """A text with its end-of-turn token, or a token list as it is; the first `limit` tokens."""
    if isinstance(value, str) and value.strip():
        tokenizer = model._need_tokenizer(f"{what}, a text,")
        value = tokenizer.encode(value, add_bos=False) + list(
            tokenizer.end_of_turn or model.eos_ids[:1]
        )
    elif not _is_tokens(value):
        raise ValueError(
            f"{what} is {value!r}: a response is a text that is not blank, or a list of token ids"
            " that is not empty"
        )
    tokens = tuple(int(t) for t in value)
    bad = [t for t in tokens if not 0 <= t < model.config.d_vocab]
    if bad:
        raise ValueError(
            f"{what}: token {bad[0]} is not in the vocabulary of {model.config.d_vocab}"
        )
    return tokens[:limit]


def prepare(
    model: Model, examples: Examples, *, losing: bool, limit: int = LIMIT, what: str = "examples"
) -> list[Prepared]:
    """Examples (anything with prompt, winning, losing and sign; texts or token lists) as
    tokens, everything checked.

    Raises ValueError naming the example for an empty list, a sign other than +1 or -1, an empty
    response, tokens outside the vocabulary, and a sequence that is longer than the context.
    """
    try:
        examples = list(examples)
    except TypeError:
        raise ValueError(f"{what} must be a list of examples, not {examples!r}") from None
    if not examples:
        raise ValueError(
            f"{what} is empty: give at least one example (prompt, winning, losing, sign)"
        )
    fields = ("prompt", "winning", "sign") + (("losing",) if losing else ())
    for i, example in enumerate(examples):
        missing = [f for f in fields if not hasattr(example, f)]
        if missing:
            raise ValueError(
                f"{what}[{i}] has no {missing[0]}: an example has prompt, winning, losing and sign"
            )
        sign = example.sign
        if (
            isinstance(sign, (bool, np.bool_))
            or not isinstance(sign, (int, float, np.integer, np.floating))
            or sign not in (1, -1)
        ):
            raise ValueError(
                f"{what}[{i}]: sign is {sign!r}: it must be +1 (the vector is added) or -1 (it is"
                " subtracted)"
            )
        if not isinstance(example.prompt, str) and not _is_tokens(example.prompt):
            raise ValueError(
                f"{what}[{i}]: prompt {example.prompt!r} is neither a text nor a list of token ids"
            )
    prompts = [
        tuple(row) for row in as_tokens(model, [e.prompt for e in examples], f"{what}: prompts")
    ]
    out = []
    for i, (prompt, example) in enumerate(zip(prompts, examples)):
        if max(prompt) >= model.config.d_vocab or min(prompt) < 0:
            raise ValueError(
                f"{what}[{i}]: the prompt holds token {max(prompt)}, the vocabulary is"
                f" {model.config.d_vocab}"
            )
        pair = [
            (
                Continuation(
                    prompt, _response(model, getattr(example, name), f"{what}[{i}].{name}", limit)
                )
                if name == "winning" or losing
                else None
            )
            for name in ("winning", "losing")
        ]
        for s in pair:
            if s is not None and len(s.tokens) > model.config.n_ctx:
                raise ValueError(
                    f"{what}[{i}]: prompt and response have {len(s.tokens)} tokens, the model's"
                    f" context holds {model.config.n_ctx}"
                )
        out.append(Prepared(*pair, int(example.sign)))
    return out


def check_phi(phi: object) -> float:
    if (
        isinstance(phi, (bool, np.bool_))
        or not isinstance(phi, (int, float, np.integer, np.floating))
        or not math.isfinite(phi)
        or phi <= 0
    ):
        raise ValueError(f"phi must be a finite number above 0, not {phi!r}")
    return float(phi)


def check_reduction(reduction: str) -> str:
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction={reduction!r}: 'mean' (over a response's tokens, the authors') or 'sum'"
        )
    return reduction


def tokens_at_once(model: Model, layer: int) -> int:
    """Tokens that go forward and back together: as many as keep every value of these layers in
    their share of the device's free memory.
    """
    from ..runtime.device import _engine

    per_token = (
        _engine().tape_bytes(model._engine, 1 << 16, layer, True)
        - _engine().tape_bytes(model._engine, 1 << 15, layer, True)
    ) / (1 << 15)
    fits = int(MEMORY_SHARE * model._engine_device.available_bytes / per_token)
    return max(BATCH_TOKENS // 4, min(MOST_TOKENS, fits))


class LogProbs:
    """log p of sequences under a direction at one layer, with gradients; knows how to cut
    the work into batches.

    batch_tokens: tokens that go together (default: as memory allows); changes no bit.
    """

    def __init__(self, model: Model, layer: int, batch_tokens: int | None = None) -> None:
        self.model, self.layer = model, layer
        self.limit = tokens_at_once(model, layer) if batch_tokens is None else batch_tokens

    def _streams(self, sequences: Sequence[Continuation]) -> list[Float32Array] | None:
        return (
            self.model._layer_inputs.get(
                [s.tokens for s in sequences], self.layer, every_layer=False
            )
            if self.layer
            else None
        )

    def _edits(self, direction: Float32Array | None, coefficients: Sequence[float] | Float64Array) -> list[list[Steer]]:
        if direction is None:
            return [[] for _ in coefficients]
        vector = SteeringVector(direction, self.layer)
        return [[Steer(vector, float(c))] for c in coefficients]

    def _batches(self, sequences: Sequence[Continuation]) -> list[list[int]]:
        return pack([len(s.tokens) for s in sequences], self.limit)

    def __call__(
        self, sequences: Sequence[Continuation], direction: Float32Array | None, coefficients: Sequence[float] | Float64Array, gradient: bool = True
    ) -> tuple[Float64Array, Float64Array | None]:
        """(log p float64 [n], d(log p / tokens)/d(steered stream) float64 [n, D] summed over all
        positions, or None).

        direction: float32 [D], or None for the unsteered model; coefficients: one a sequence.
        """
        model, n_layers = self.model, self.model.config.n_layers
        values = np.zeros(len(sequences))
        gradients = np.zeros((len(sequences), model.config.d_model)) if gradient else None
        site = model._sites.by_name[f"blocks.{self.layer}.hook_resid_pre"].key
        edits = self._edits(direction, coefficients)
        for group in self._batches(sequences):
            some = [sequences[i] for i in group]
            metrics = [
                RowMetric(
                    LOG_PROB,
                    s.predicting,
                    np.full(len(s.response), 1 / len(s.response), np.float32),
                    np.array(s.response, np.uint32),
                )
                for s in some
            ]
            found, got = differentiate(
                model,
                [s.tokens for s in some],
                [len(s.prompt) for s in some],
                ([edits[i] for i in group], False),
                metrics,
                [site] if gradient else [],
                self.layer if gradient else n_layers,
                inputs=self._streams(some),
                first_layer=self.layer,
                tape_layer=self.layer,
            )
            at = 0
            for row, (i, s) in enumerate(zip(group, some)):
                values[i] = found[at : at + len(s.response)].astype(np.float64).sum()
                at += len(s.response)
                if gradient:
                    gradients[i] = got[site][row, -len(s.tokens) :].sum(axis=0, dtype=np.float64)
        return values, gradients

    def references(self, sequences: Sequence[Continuation]) -> np.ndarray:
        """Log p of the unsteered model, float64 [n]; kept for as long as the model lives."""
        kept = _references.setdefault(self.model, {})
        missing = list(dict.fromkeys(s for s in sequences if s not in kept))
        if missing:
            if len(kept) + len(missing) > _KEPT_REFERENCES:
                kept.clear()
                missing = list(dict.fromkeys(sequences))
            values, _ = self(missing, None, np.zeros(len(missing)), gradient=False)
            kept.update(zip(missing, values.tolist()))
        return np.array([kept[s] for s in sequences])

    def matches(self, sequences: Sequence[Continuation], direction: Float32Array | None, coefficients: Sequence[float] | Float64Array) -> float:
        """Share of the sequences' response tokens that the steered model predicts greedily."""
        from ..runtime.batch import Batch, first_tokens
        from ..runtime.device import _engine

        model, edits, hits = self.model, self._edits(direction, coefficients), 0
        room = max(1, (1 << 24) // model.config.d_vocab)  # logits at once
        for group in pack([len(s.tokens) for s in sequences], min(self.limit, room)):
            some = [sequences[i] for i in group]
            lengths = [len(s.tokens) for s in some]
            width = max(lengths)
            streams = self._streams(some)
            batch = Batch(
                model,
                [len(s.prompt) for s in some],
                lengths,
                ([edits[i] for i in group], False),
                None,
            )
            resumed = {} if streams is None else {"first_layer": self.layer, "inputs": streams}
            logits, _ = batch.forward(
                _engine().Cache(model._engine, sum(lengths)),
                [s.tokens for s in some],
                slots=first_tokens(lengths),
                columns=[width - n for n in lengths],
                n_columns=width,
                logits="all",
                **resumed,
            )
            for row, s in enumerate(some):
                hits += int(
                    (logits[row, -len(s.response) :].argmax(axis=-1) == np.array(s.response)).sum()
                )
        return hits / sum(len(s.response) for s in sequences)


class Objective:
    """A loss over prepared examples: `objective(examples, direction, coefficients)` -> (losses
    float64 [n], gradients float64 [n, D] or None).

    phi: None for NTP. The gradient is with respect to the direction; coefficients are without
    the examples' signs.
    """

    def __init__(self, log_probs: LogProbs, phi: float | None = None, reduction: str = "mean") -> None:
        self.log_probs, self.phi, self.reduction = log_probs, phi, reduction

    def __call__(
        self, examples: Sequence[Prepared], direction: Float32Array, coefficients: Sequence[float] | Float64Array, gradient: bool = True
    ) -> tuple[Float64Array, Float64Array | None]:
        factors = np.array([float(c) * e.sign for c, e in zip(coefficients, examples)])
        losses, gradients = (self._ntp if self.phi is None else self._po)(
            examples, direction, factors, gradient
        )
        return losses, factors[:, None] * gradients if gradient else None

    def _ntp(self, examples: Sequence[Prepared], direction: Float32Array | None, factors: Float64Array, gradient: bool) -> tuple[Float64Array, Float64Array | None]:
        values, gradients = self.log_probs(
            [e.winning for e in examples], direction, factors, gradient
        )
        n = np.array([len(e.winning.response) for e in examples], np.float64)
        if self.reduction == "sum":
            return -values, -n[:, None] * gradients if gradient else None
        return -values / n, -gradients if gradient else None

    def _po(self, examples: Sequence[Prepared], direction: Float32Array | None, factors: Float64Array, gradient: bool) -> tuple[Float64Array, Float64Array | None]:
        won, lost = [e.winning for e in examples], [e.losing for e in examples]
        sequences = [s for pair in zip(won, lost) for s in pair]
        values, gradients = self.log_probs(sequences, direction, np.repeat(factors, 2), gradient)
        n = np.array([len(s.response) for s in sequences], np.float64)
        reference = self.log_probs.references(sequences)
        b = np.maximum(self.phi * (reference[1::2] - reference[::2]), 1.0)
        delta = b * (values / n)[::2] - (values / n)[1::2]
        losses = np.logaddexp(0.0, -delta)
        if not gradient:
            return losses, None
        slope = -np.exp(-np.logaddexp(0.0, delta))  # d loss / d delta = -sigmoid(-delta)
        return losses, slope[:, None] * (b[:, None] * gradients[::2] - gradients[1::2])


def mean_gradient(gradients: Float64Array) -> np.ndarray:
    """Mean over examples, float64 [D], added up in list order whatever NumPy would prefer."""
    total = np.zeros(gradients.shape[1])
    for g in gradients:
        total += g
    return total / len(gradients)


def check_vector(model: Model, vector: SteeringVector) -> None:
    if not isinstance(vector, SteeringVector):
        raise ValueError(f"vector must be a SteeringVector, not {type(vector).__name__}")
    vector.check(model)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it steers nothing; begin from a small random one")


def check_number(value: object, what: str) -> float:
    if (
        isinstance(value, (bool, np.bool_))
        or not isinstance(value, (int, float, np.integer, np.floating))
        or not math.isfinite(value)
    ):
        raise ValueError(f"{what} must be a finite number, not {value!r}")
    return float(value)


def _loss(model: Model, examples: Examples, vector: SteeringVector, coefficient: float, phi: float | None, reduction: str, limit: int) -> tuple[float, np.ndarray]:
    model._check_open()
    check_vector(model, vector)
    coefficient = check_number(coefficient, "coefficient")
    prepared = prepare(model, examples, losing=phi is not None, limit=limit)
    objective = Objective(LogProbs(model, vector.layer), phi, reduction)
    losses, gradients = objective(prepared, vector.direction, [coefficient] * len(prepared))
    return float(losses.mean()), mean_gradient(gradients).astype(np.float32)


def ntp_loss(
    model: Model, examples: Examples, vector: SteeringVector, coefficient: float, *, reduction: str = "mean", limit: int = LIMIT
) -> tuple[float, np.ndarray]:
    """Next-token prediction: -log p(winning | prompt, steered), as (mean over examples, its
    gradient float32 [D] with respect to the direction).

    examples: anything with prompt, winning and sign (+1 or -1); texts or token lists, a text
    response gets the end-of-turn token. Each is steered by coefficient * sign * direction at every
    position. limit: the first so many tokens of a response are summed. reduction: "mean" over
    these, or "sum". Raises ValueError before any work: `prepare`'s cases, a vector that is zero or
    of another width or layer, a coefficient that is not finite.
    """
    return _loss(model, examples, vector, coefficient, None, check_reduction(reduction), limit)


def po_loss(
    model: Model, examples: Examples, vector: SteeringVector, coefficient: float, *, phi: float = 2e-2, limit: int = LIMIT
) -> tuple[float, np.ndarray]:
    """Preference optimisation (one-directional RePS): -log sigmoid(delta), as (mean over examples,
    its gradient float32 [D]).

    delta = b/|yw| log p(yw | steered) - 1/|yl| log p(yl | steered), b = max(phi (log p(yl) -
    log p(yw)), 1) of the unsteered model, a constant. |y| is the number of tokens that are
    summed (at most `limit`). examples also need losing; the rest as `ntp_loss`. Raises
    ValueError for phi <= 0.
    """
    return _loss(model, examples, vector, coefficient, check_phi(phi), "mean", limit)
