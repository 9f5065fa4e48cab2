"""What a candidate does to the next token: the refusal metric, the KL divergence, and the tokens
that stand for refusal (docs/method.md section 2).

Everything is computed in float64 from the engine's float32 logits, with means over prompts in their
order, so results are bit-identical for every batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..base.checks import is_int
from ..base.display import Table
from ..base.distributions import log_softmax, logsumexp, rowwise
from ..base.progress import Progress
from ..base.types import Float32Array, Float64Array, Prompts
from ..inputs.prompts import batches, token_text
from ..runtime.edits import Ablate, Steer

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

#: About so many tokens, and at most so many float32 logits, of one engine call.
BATCH_TOKENS = 8192
BATCH_LOGITS = 1 << 24

#: (tokens, edits) of every row.
Rows: TypeAlias = Sequence[tuple[list[int], list[Any]]]


def refusal_metric(logits: npt.ArrayLike, refusal_tokens: Sequence[int]) -> Float64Array:
    """log(P_ref / (1 - P_ref)), float64 [...], where P_ref is the summed next-token probability of
    `refusal_tokens`; no epsilon (docs/method.md section 2).

    logits: [..., V], or log-probabilities. Both sums are taken as logarithms, so that nothing is
    lost where P_ref is near 0 or 1.
    """
    inside = np.zeros(np.shape(logits)[-1], dtype=bool)
    inside[list(refusal_tokens)] = True
    return rowwise(lambda x: logsumexp(x[inside]) - logsumexp(x[~inside]), (), logits)


def kl_divergence(logp: npt.ArrayLike, logits: npt.ArrayLike) -> Float64Array:
    """KL(P || Q) over the last axis in nats, float64 [...]. logp: log-probabilities of P, [..., V].
    logits: of Q. Rounding can make it slightly negative.
    """
    return rowwise(lambda p, x: (np.exp(p) * (p - (x - logsumexp(x)))).sum(), (), logp, logits)


def _last_logits(model: Model, rows: Rows) -> Float32Array:
    """Logits after the last token of every row, float32 [len(rows), V].

    Rows that come together share their first edited layer, so that the run can resume from a kept
    input of that layer. All runs of candidates go through this function.
    """
    from ..runtime.resume import can_resume, keeps_layer_inputs, last_logits

    if keeps_layer_inputs(model) and can_resume(rows):
        return last_logits(model, rows)
    logits = model.run(
        [tokens for tokens, _ in rows], edits=[edits for _, edits in rows], logits="last"
    ).logits
    return np.asarray(logits)


def last_logits(
    model: Model, rows: Rows, step: Callable[[int], object] | None = None
) -> Iterator[tuple[slice, Float32Array]]:
    """`_last_logits` batch by batch: yields (slice of rows, logits float32 [n, V]). step: called
    with the number of rows that are done.
    """
    for part in batches(
        [tokens for tokens, _ in rows],
        tokens=BATCH_TOKENS,
        most=max(1, BATCH_LOGITS // model.config.d_vocab),
    ):
        logits = _last_logits(model, rows[part])
        if logits.shape != (part.stop - part.start, model.config.d_vocab):
            raise RuntimeError(
                f"the engine returned logits {logits.shape} for {part.stop - part.start} rows of"
                f" vocabulary {model.config.d_vocab}"
            )
        yield part, logits
        if step is not None:
            step(part.stop - part.start)


# -- refusal tokens --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RefusalTokens:
    """The tokens whose summed probability the refusal metric reads, and how they were found."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    #: Mean next-token probability of each after harmful and after harmless prompts; empty where
    #: the tokens were given.
    on_harmful: tuple[float, ...] = ()
    on_harmless: tuple[float, ...] = ()

    def __str__(self) -> str:
        if not self.on_harmful:
            return ", ".join(f"{text!r} ({i})" for i, text in zip(self.ids, self.texts))
        return ", ".join(
            f"{text!r} ({i}; mean probability {a:.3f} after harmful, {b:.3f} after harmless"
            " prompts)"
            for i, text, a, b in zip(self.ids, self.texts, self.on_harmful, self.on_harmless)
        )


def given_refusal_tokens(model: Model, ids: int | Sequence[int]) -> RefusalTokens:
    """The refusal tokens of given ids. Raises ValueError for an empty list, for the whole
    vocabulary, and for ids outside it.
    """
    given = [ids] if isinstance(ids, (int, np.integer)) else list(ids)
    V = model.config.d_vocab
    for i in given:
        if not is_int(i) or not 0 <= i < V:
            raise ValueError(
                f"refusal_tokens: {i!r} is no token id (whole numbers from 0 to {V - 1})"
            )
    different = tuple(dict.fromkeys(int(i) for i in given))
    if not different or len(different) >= V:
        raise ValueError(
            f"refusal_tokens names {len(different)} of {V} tokens: give at least one and not all,"
            " or None to derive them"
        )
    return RefusalTokens(different, tuple(token_text(model, i) for i in different))


def refusal_tokens_from(
    model: Model,
    harmful_logp: Float64Array,
    harmless_logp: Float64Array,
    *,
    share: float = 0.1,
    least: float = 0.05,
    most: int = 8,
) -> RefusalTokens:
    """Tokens with which the model begins its responses to harmful but not to harmless prompts.

    harmful_logp, harmless_logp: next-token log-probabilities, float64 [n, V]. Tokens are ranked by
    mean probability after harmful minus after harmless prompts. The first is kept, and every other
    one whose difference is at least `share` of the first's, at most `most` tokens.
    Raises ValueError where the first difference is below `least`: the responses then begin alike,
    and the tokens must be given.
    """
    a, b = np.exp(harmful_logp).mean(axis=0), np.exp(harmless_logp).mean(axis=0)
    difference = a - b
    order = np.argsort(-difference, kind="stable")[:most]
    first = float(difference[order[0]])
    if first < least:
        raise ValueError(
            "refusal tokens cannot be derived: the token that tells harmful from harmless prompts"
            f" best, {token_text(model, order[0])!r}, differs by {first:.3f} in probability. Does"
            " the model refuse these harmful prompts? Else name the tokens with"
            " refusal_tokens=[...]"
        )
    ids = tuple(int(i) for i in order if difference[i] >= share * first)
    return RefusalTokens(
        ids,
        tuple(token_text(model, i) for i in ids),
        tuple(float(a[i]) for i in ids),
        tuple(float(b[i]) for i in ids),
    )


def derive_refusal_tokens(model: Model, harmful: Prompts, harmless: Prompts) -> RefusalTokens:
    """Refusal tokens from the unsteered model's next tokens after these prompts (texts or token
    lists). Raises ValueError where the responses to both kinds begin alike.
    """
    from ..inputs.prompts import as_tokens, refuse_equal_classes

    pair = []
    classes = as_tokens(model, harmful, "harmful"), as_tokens(model, harmless, "harmless")
    refuse_equal_classes(*classes)
    for prompts in classes:
        rows: Rows = [(tokens, []) for tokens in prompts]
        pair.append(np.concatenate([log_softmax(logits) for _, logits in last_logits(model, rows)]))
    return refusal_tokens_from(model, *pair)


# -- the table -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores(Table):
    """Scores of all candidates (docs/method.md section 2): means over prompts, float64 [P, L] each,
    NaN where not measured.

    bypass: refusal metric on harmful prompts under a = -1. induce: refusal metric on harmless
    prompts under a = +1. kl: KL(unsteered || ablated) on harmless prompts, in nats.
    bypass_ablation: refusal metric on harmful prompts under directional ablation.
    """

    bypass: Float64Array
    induce: Float64Array
    kl: Float64Array
    bypass_ablation: Float64Array
    positions: tuple[int, ...]
    refusal_tokens: RefusalTokens
    #: Refusal metric of the unsteered model, mean over the harmful and over the harmless prompts.
    unsteered: tuple[float, float] = field(default=(float("nan"), float("nan")))

    def to_markdown(self) -> str:
        """A table with one row for each measured candidate, and the refusal tokens above it."""
        lines = [
            f"Refusal tokens: {self.refusal_tokens}",
            f"Unsteered metric: harmful {self.unsteered[0]:.3f}, harmless {self.unsteered[1]:.3f}",
            "",
            "| position | layer | bypass | induce | KL | bypass under ablation |",
            "|---:|---:|---:|---:|---:|---:|",
        ]

        def number(x: float) -> str:
            return "" if np.isnan(x) else f"{x:.3f}"

        for p, l in np.ndindex(self.induce.shape):
            scores = [
                float(table[p, l])
                for table in (self.bypass, self.induce, self.kl, self.bypass_ablation)
            ]
            if not np.isnan(scores).all():
                lines.append(
                    f"| {self.positions[p]} | {l} | " + " | ".join(map(number, scores)) + " |"
                )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: lists and numbers; NaN becomes None."""

        def plain(table: Float64Array) -> list[list[float | None]]:
            return [[None if np.isnan(x) else float(x) for x in row] for row in table]

        return {
            "bypass": plain(self.bypass),
            "induce": plain(self.induce),
            "kl": plain(self.kl),
            "bypass_ablation": plain(self.bypass_ablation),
            "positions": list(self.positions),
            "refusal_tokens": list(self.refusal_tokens.ids),
            "refusal_token_texts": list(self.refusal_tokens.texts),
            "unsteered": list(self.unsteered),
        }


class Scorer:
    """Measures candidates on fixed validation prompts. The unsteered model runs once, on
    construction.

    harmful, harmless: token lists. refusal_tokens: ids, or None to derive them from these prompts.
    """

    SCORES = ("bypass", "induce", "kl", "bypass_ablation")

    def __init__(
        self,
        model: Model,
        harmful: list[list[int]],
        harmless: list[list[int]],
        refusal_tokens: Sequence[int] | None,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.harmful, self.harmless = model, harmful, harmless
        if refusal_tokens is not None:
            self.refusal = given_refusal_tokens(model, refusal_tokens)
        base = [
            np.concatenate(
                [
                    log_softmax(logits)
                    for _, logits in last_logits(model, [(tokens, []) for tokens in rows])
                ]
            )
            for rows in (harmful, harmless)
        ]
        if refusal_tokens is None:
            self.refusal = refusal_tokens_from(model, *base)
        self.harmless_logp = base[1]
        on_harmful, on_harmless = (
            float(refusal_metric(logp, self.refusal.ids).mean()) for logp in base
        )
        self.unsteered = on_harmful, on_harmless
        if progress is not None:
            progress.say(f"refusal tokens: {self.refusal}")

    def prompts(self, score: str) -> list[list[int]]:
        """The prompts that a score is measured on."""
        return self.harmful if score.startswith("bypass") else self.harmless

    def measure(
        self,
        score: str,
        vectors: Sequence[SteeringVector],
        step: Callable[[int], object] | None = None,
    ) -> Float64Array:
        """One score of every vector, float64 [len(vectors)], from rows of (vector, prompt) pairs,
        vector by vector.

        A zero vector changes nothing: its scores are those of the unsteered model, its KL is 0, and
        no row is run for it. (A difference in means is zero where both kinds of prompts have the
        same tokens up to its position.)
        """
        prompts = self.prompts(score)
        edits_of: dict[str, Callable[[SteeringVector], Any]] = {
            "bypass": lambda v: Steer(v, -1.0),
            "induce": lambda v: Steer(v, 1.0),
        }
        edit = edits_of.get(score, Ablate)
        at_zero = {"kl": 0.0, "induce": self.unsteered[1]}.get(score, self.unsteered[0])
        real = [i for i, v in enumerate(vectors) if v.norm > 0]
        rows = [
            (tokens, edits) for edits in ([edit(vectors[i])] for i in real) for tokens in prompts
        ]
        values = np.empty(len(rows), dtype=np.float64)
        for part, logits in last_logits(self.model, rows, step):
            if score == "kl":
                values[part] = kl_divergence(
                    self.harmless_logp[np.arange(part.start, part.stop) % len(prompts)], logits
                )
            else:
                values[part] = refusal_metric(logits, self.refusal.ids)
        out = np.full(len(vectors), at_zero, dtype=np.float64)
        out[real] = values.reshape(len(real), len(prompts)).mean(axis=1)
        if step is not None:
            step((len(vectors) - len(real)) * len(prompts))
        return out
