"""The losses that steering vectors are trained with, NTP and PO, and their gradients with respect
to the direction (docs/method.md section 2).

Both consist of one quantity: log p of the first 64 tokens of a response after its prompt, with the
residual stream steered by coefficient * sign * direction at every position. Layers below that of
the vector run once for each sequence, and the input of the vector's layer is kept; from there on
the engine runs forward and backward passes. Each sequence has a gradient of its own, and these are
combined in float64, so that results are bit-identical for all batches and orders of work.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import is_number
from ..base.types import Float32Array, Float64Array, IntArray
from ..inputs.prompts import _is_tokens, as_tokens
from ..inputs.vectors import SteeringVector
from ..runtime.edits import Steer
from ..runtime.gradients import BATCH_TOKENS, LOG_PROB, MEMORY_SHARE, RowMetric, differentiate, pack

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Tokens of a response that are summed.
LIMIT = 64
#: Most tokens of a forward and a backward pass; more are not faster.
MOST_TOKENS = 4 * BATCH_TOKENS
#: Log-probabilities of unsteered responses that are kept for each model.
_KEPT_REFERENCES = 1 << 16
_references: weakref.WeakKeyDictionary[Model, dict[Continuation, float]] = (
    weakref.WeakKeyDictionary()
)

#: Anything with prompt, winning and sign, and for PO losing: texts or token lists.
Examples: TypeAlias = Iterable[Any]


@dataclass(frozen=True)
class Continuation:
    """A prompt and the tokens of a response that are summed."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens that are run; the last one of the response is only predicted."""
        return self.prompt + self.response[:-1]

    @property
    def predicting(self) -> IntArray:
        """Positions whose logits predict the response's tokens, int64 [len(response)]."""
        return np.asarray(len(self.prompt) - 1 + np.arange(len(self.response)))


@dataclass(frozen=True)
class Prepared:
    """An example as tokens. losing: None where the loss does not need it."""

    winning: Continuation
    losing: Continuation | None
    sign: int


def _response(model: Model, value: object, what: str, limit: int) -> tuple[int, ...]:
    """The first `limit` tokens of a text with its end-of-turn token, or of a token list."""
    if isinstance(value, str) and value.strip():
        tokenizer = model._need_tokenizer(f"{what}, a text,")
        given = tokenizer.encode(value, add_bos=False) + list(
            tokenizer.end_of_turn or model.eos_ids[:1]
        )
    elif isinstance(value, str) or not _is_tokens(value):
        raise ValueError(
            f"{what} is {value!r}: a response is a text that is not blank, or a list of token ids"
            " that is not empty"
        )
    else:
        given = list(value)
    tokens = tuple(int(t) for t in given)
    bad = [t for t in tokens if not 0 <= t < model.config.d_vocab]
    if bad:
        raise ValueError(
            f"{what}: token {bad[0]} is not in the vocabulary of {model.config.d_vocab}"
        )
    return tokens[:limit]


def prepare(
    model: Model,
    examples: Examples,
    *,
    losing: bool,
    limit: int = LIMIT,
    what: str = "examples",
) -> list[Prepared]:
    """Checked examples as tokens. losing: whether the loss needs losing responses. limit: tokens of
    a response. what: name of the argument, for messages.

    Raises ValueError naming the example for an empty list, a sign other than +1 or -1, an empty
    response, tokens outside the vocabulary, and a sequence that is longer than the context.
    """
    try:
        listed = list(examples)
    except TypeError:
        raise ValueError(f"{what} must be a list of examples, not {examples!r}") from None
    if not listed:
        raise ValueError(
            f"{what} is empty: give at least one example (prompt, winning, losing, sign)"
        )
    for i, example in enumerate(listed):
        _check_example(example, losing, f"{what}[{i}]")
    prompts = as_tokens(model, [e.prompt for e in listed], f"{what}: prompts")
    return [
        _prepared(model, tuple(prompt), example, losing, limit, f"{what}[{i}]")
        for i, (prompt, example) in enumerate(zip(prompts, listed, strict=True))
    ]


def _check_example(example: Any, losing: bool, what: str) -> None:
    fields = ("prompt", "winning", "sign") + (("losing",) if losing else ())
    missing = [f for f in fields if not hasattr(example, f)]
    if missing:
        raise ValueError(
            f"{what} has no {missing[0]}: an example has prompt, winning, losing and sign"
        )
    sign = example.sign
    if not is_number(sign) or sign not in (1, -1):
        raise ValueError(
            f"{what}: sign is {sign!r}: it must be +1 (the vector is added) or -1 (it is"
            " subtracted)"
        )
    if not isinstance(example.prompt, str) and not _is_tokens(example.prompt):
        raise ValueError(
            f"{what}: prompt {example.prompt!r} is neither a text nor a list of token ids"
        )


def _prepared(
    model: Model, prompt: tuple[int, ...], example: Any, losing: bool, limit: int, what: str
) -> Prepared:
    if max(prompt) >= model.config.d_vocab or min(prompt) < 0:
        raise ValueError(
            f"{what}: the prompt holds token {max(prompt)}, the vocabulary is"
            f" {model.config.d_vocab}"
        )

    def continuation(name: str) -> Continuation:
        response = _response(model, getattr(example, name), f"{what}.{name}", limit)
        return Continuation(prompt, response)

    winning = continuation("winning")
    lost = continuation("losing") if losing else None
    for s in (winning, lost):
        if s is not None and len(s.tokens) > model.config.n_ctx:
            raise ValueError(
                f"{what}: prompt and response have {len(s.tokens)} tokens, the model's context"
                f" holds {model.config.n_ctx}"
            )
    return Prepared(winning, lost, int(example.sign))


def check_phi(phi: object) -> float:
    """The phi of PO as a float. Raises ValueError unless it is a finite number above 0."""
    if not is_number(phi) or phi <= 0:
        raise ValueError(f"phi must be a finite number above 0, not {phi!r}")
    return float(phi)


def check_reduction(reduction: str) -> str:
    """The reduction. Raises ValueError unless it is "mean" or "sum"."""
    if reduction not in ("mean", "sum"):
        raise ValueError(
            f"reduction={reduction!r}: 'mean' (over a response's tokens, the authors') or 'sum'"
        )
    return reduction


def tokens_at_once(model: Model, layer: int) -> int:
    """Tokens of a forward and a backward pass: as many as keep the activations of the layers from
    `layer` on within their share of the device's free memory.
    """
    from ..runtime.device import _engine

    per_token = (
        _engine().tape_bytes(model._engine, 1 << 16, layer, True)
        - _engine().tape_bytes(model._engine, 1 << 15, layer, True)
    ) / (1 << 15)
    fits = int(MEMORY_SHARE * model._engine_device.available_bytes / per_token)
    return max(BATCH_TOKENS // 4, min(MOST_TOKENS, fits))


class LogProbs:
    """log p of sequences under a direction at one layer, with gradients, batch by batch.

    batch_tokens: tokens of a batch (default: as memory allows); results are bit-identical whatever
    it is.
    """

    def __init__(self, model: Model, layer: int, batch_tokens: int | None = None) -> None:
        self.model, self.layer = model, layer
        self.limit = tokens_at_once(model, layer) if batch_tokens is None else batch_tokens

    def _inputs(self, sequences: Sequence[Continuation]) -> list[Float32Array] | None:
        return (
            self.model._layer_inputs.get(
                [s.tokens for s in sequences], self.layer, every_layer=False
            )
            if self.layer
            else None
        )

    def _edits(
        self, direction: Float32Array | None, coefficients: Sequence[float] | Float64Array
    ) -> list[list[Steer]]:
        if direction is None:
            return [[] for _ in coefficients]
        vector = SteeringVector(direction, self.layer)
        return [[Steer(vector, float(c))] for c in coefficients]

    def _batches(self, sequences: Sequence[Continuation]) -> list[list[int]]:
        return pack([len(s.tokens) for s in sequences], self.limit)

    def __call__(
        self,
        sequences: Sequence[Continuation],
        direction: Float32Array | None,
        coefficients: Sequence[float] | Float64Array,
        gradient: bool = True,
        weights: Sequence[Float64Array] | None = None,
    ) -> tuple[Float64Array, Float64Array | None]:
        """(log p of each sequence, float64 [n]; the gradient of log p / |y| with respect to the
        steered residual stream, summed over positions, float64 [n, D], or None).

        direction: float32 [D], or None for the unsteered model. coefficients: one for each
        sequence. weights: for each sequence those of its tokens' log p.
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
                    np.full(len(s.response), 1 / len(s.response), np.float32)
                    if weights is None
                    else (weights[i] / len(s.response)).astype(np.float32),
                    np.array(s.response, np.uint32),
                )
                for i, s in zip(group, some, strict=True)
            ]
            found, got = differentiate(
                model,
                [s.tokens for s in some],
                [len(s.prompt) for s in some],
                ([edits[i] for i in group], False),
                metrics,
                [site] if gradient else [],
                self.layer if gradient else n_layers,
                inputs=self._inputs(some),
                first_layer=self.layer,
                tape_layer=self.layer,
            )
            at = 0
            for row, (i, s) in enumerate(zip(group, some)):
                said = found[at : at + len(s.response)].astype(np.float64)
                values[i] = said.sum() if weights is None else (weights[i] * said).sum()
                at += len(s.response)
                if gradients is not None:
                    gradients[i] = got[site][row, -len(s.tokens) :].sum(axis=0, dtype=np.float64)
        return values, gradients

    def references(self, sequences: Sequence[Continuation]) -> Float64Array:
        """The unsteered model's log p, float64 [n]; kept as long as the model exists."""
        kept = _references.setdefault(self.model, {})
        missing = list(dict.fromkeys(s for s in sequences if s not in kept))
        if missing:
            if len(kept) + len(missing) > _KEPT_REFERENCES:
                kept.clear()
                missing = list(dict.fromkeys(sequences))
            values, _ = self(missing, None, np.zeros(len(missing)), gradient=False)
            kept.update(zip(missing, values.tolist()))
        return np.array([kept[s] for s in sequences])

    def matches(
        self,
        sequences: Sequence[Continuation],
        direction: Float32Array | None,
        coefficients: Sequence[float] | Float64Array,
    ) -> float:
        """Share of the sequences' response tokens that the steered model predicts greedily."""
        from ..runtime.batch import Batch, first_tokens
        from ..runtime.device import _engine

        model, edits, hits = self.model, self._edits(direction, coefficients), 0
        room = max(1, (1 << 24) // model.config.d_vocab)  # tokens whose logits are held together
        for group in pack([len(s.tokens) for s in sequences], min(self.limit, room)):
            some = [sequences[i] for i in group]
            lengths = [len(s.tokens) for s in some]
            width = max(lengths)
            inputs = self._inputs(some)
            batch = Batch(
                model,
                [len(s.prompt) for s in some],
                lengths,
                ([edits[i] for i in group], False),
                None,
            )
            resumed: dict[str, Any] = {}
            if inputs is not None:
                resumed = {"first_layer": self.layer, "inputs": inputs}
            logits, _ = batch.forward(
                _engine().Cache(model._engine, sum(lengths)),
                [s.tokens for s in some],
                slots=first_tokens(lengths),
                columns=[width - n for n in lengths],
                n_columns=width,
                logits="all",
                **resumed,
            )
            assert logits is not None
            for row, s in enumerate(some):
                hits += int(
                    (logits[row, -len(s.response) :].argmax(axis=-1) == np.array(s.response)).sum()
                )
        return hits / sum(len(s.response) for s in sequences)


class Objective:
    """A loss of prepared examples: objective(examples, direction, coefficients) gives (losses
    float64 [n], gradients with respect to the direction, float64 [n, D] or None).

    phi: of PO; None for NTP. reduction: of NTP, "mean" or "sum" over tokens. coefficients: without
    the examples' signs.
    """

    def __init__(
        self, log_probs: LogProbs, phi: float | None = None, reduction: str = "mean"
    ) -> None:
        self.log_probs, self.phi, self.reduction = log_probs, phi, reduction
        #: Weights of the tokens of winning responses, for NTP; empty: all alike.
        self.weights: Mapping[Prepared, Float64Array] = {}

    def __call__(
        self,
        examples: Sequence[Prepared],
        direction: Float32Array,
        coefficients: Sequence[float] | Float64Array,
        gradient: bool = True,
    ) -> tuple[Float64Array, Float64Array | None]:
        factors = np.array([float(c) * e.sign for c, e in zip(coefficients, examples)])
        losses, gradients = (self._ntp if self.phi is None else self._po)(
            examples, direction, factors, gradient
        )
        return losses, None if gradients is None else factors[:, None] * gradients

    def _ntp(
        self,
        examples: Sequence[Prepared],
        direction: Float32Array | None,
        factors: Float64Array,
        gradient: bool,
    ) -> tuple[Float64Array, Float64Array | None]:
        weights = [self.weights[e] for e in examples] if self.weights else None
        values, gradients = self.log_probs(
            [e.winning for e in examples], direction, factors, gradient, weights
        )
        n = np.array([len(e.winning.response) for e in examples], np.float64)
        if self.reduction == "sum":
            return -values, None if gradients is None else -n[:, None] * gradients
        return -values / n, None if gradients is None else -gradients

    def _po(
        self,
        examples: Sequence[Prepared],
        direction: Float32Array | None,
        factors: Float64Array,
        gradient: bool,
    ) -> tuple[Float64Array, Float64Array | None]:
        assert self.phi is not None
        sequences = [s for e in examples for s in (e.winning, e.losing) if s is not None]
        values, gradients = self.log_probs(sequences, direction, np.repeat(factors, 2), gradient)
        n = np.array([len(s.response) for s in sequences], np.float64)
        reference = self.log_probs.references(sequences)
        b = np.maximum(self.phi * (reference[1::2] - reference[::2]), 1.0)
        delta = b * (values / n)[::2] - (values / n)[1::2]
        losses = np.logaddexp(0.0, -delta)
        if gradients is None:
            return losses, None
        slope = -np.exp(-np.logaddexp(0.0, delta))  # d loss / d delta = -sigmoid(-delta)
        return losses, slope[:, None] * (b[:, None] * gradients[::2] - gradients[1::2])


def mean_gradient(gradients: Float64Array) -> Float64Array:
    """The mean over examples, float64 [D], summed in list order, unlike NumPy's mean."""
    total: Float64Array = np.zeros(gradients.shape[1])
    for g in gradients:
        total += g
    return total / len(gradients)


def check_vector(model: Model, vector: object) -> None:
    """Raises ValueError unless it is a SteeringVector of this model that is not zero."""
    if not isinstance(vector, SteeringVector):
        raise ValueError(f"vector must be a SteeringVector, not {type(vector).__name__}")
    vector.check(model, output=False)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it steers nothing; begin from a small random one")


def check_number(value: object, what: str) -> float:
    """The value as a float. Raises ValueError naming `what` unless it is a finite number."""
    if not is_number(value):
        raise ValueError(f"{what} must be a finite number, not {value!r}")
    return float(value)


def _loss(
    model: Model,
    examples: Examples,
    vector: SteeringVector,
    coefficient: float,
    phi: float | None,
    reduction: str,
    limit: int,
) -> tuple[float, Float32Array]:
    model._check_open()
    check_vector(model, vector)
    coefficient = check_number(coefficient, "coefficient")
    prepared = prepare(model, examples, losing=phi is not None, limit=limit)
    objective = Objective(LogProbs(model, vector.layer), phi, reduction)
    losses, gradients = objective(prepared, vector.direction, [coefficient] * len(prepared))
    assert gradients is not None
    return float(losses.mean()), mean_gradient(gradients).astype(np.float32)


def ntp_loss(
    model: Model,
    examples: Examples,
    vector: SteeringVector,
    coefficient: float,
    *,
    reduction: str = "mean",
    limit: int = LIMIT,
) -> tuple[float, Float32Array]:
    """The NTP loss -log p(winning | prompt, steered) (docs/method.md section 2): (mean over
    examples, its gradient with respect to the direction, float32 [D]).

    examples: anything with prompt, winning and sign (+1 or -1), texts or token lists; a text
    response gets the end-of-turn token. Each is steered by coefficient * sign * direction at every
    position. limit: how many first tokens of a response are summed. reduction: "mean" over these,
    or "sum". Raises ValueError before any work for bad examples, a vector that is zero or of
    another width or layer, and a coefficient that is not finite.
    """
    return _loss(model, examples, vector, coefficient, None, check_reduction(reduction), limit)


def po_loss(
    model: Model,
    examples: Examples,
    vector: SteeringVector,
    coefficient: float,
    *,
    phi: float = 2e-2,
    limit: int = LIMIT,
) -> tuple[float, Float32Array]:
    """The PO loss -log sigmoid(delta), one-directional RePS (docs/method.md section 2): (mean over
    examples, its gradient with respect to the direction, float32 [D]).

    delta = b/|yw| log p(yw | steered) - 1/|yl| log p(yl | steered), with b = max(phi (log p(yl) -
    log p(yw)), 1) of the unsteered model, a constant. |y| is the number of tokens that are summed,
    at most `limit`. examples also need losing; otherwise as `ntp_loss`. Raises ValueError for phi
    <= 0 too.
    """
    return _loss(model, examples, vector, coefficient, check_phi(phi), "mean", limit)
