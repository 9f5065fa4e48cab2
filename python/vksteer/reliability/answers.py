"""How often the logit lens already prefers the right one of two answers: the final norm and the
unembedding, read at an earlier place of the residual stream. NumPy only, in float64.

Source: Billa, "Predicting where steering vectors succeed" (arXiv 2604.15557), whose A_lin is this
accuracy at each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import is_int
from ..base.types import Array, Float64Array

if TYPE_CHECKING:
    from ..runtime.model import Model

#: (answer to positive prompts, answer to negative prompts), token ids; or one such pair per item.
Answers: TypeAlias = "tuple[int, int] | Sequence[tuple[int, int]]"


@dataclass(frozen=True, eq=False)
class AnswerLens:
    """The lens on two tokens for each of n items.

    pairs: the token ids, n of them. read: float64 [n, D], the difference of their rows of the
    unembedding times the norm's gain. constant: float64 [n], what biases add. centred: the final
    norm subtracts the mean. eps: of the norm.
    """

    pairs: list[tuple[int, int]]
    read: Float64Array
    constant: Float64Array
    centred: bool
    eps: float

    def differences(self, activations: Array) -> Float64Array:
        """logit(first) - logit(second) before a factor and a soft cap of logits, which change no
        sign, float64 [n], of one activation an item.

        activations: [n, D], of the residual stream.
        """
        x = np.asarray(activations, dtype=np.float64)
        if self.centred:
            x = x - x.mean(axis=1, keepdims=True)
        scale = np.sqrt((x**2).mean(axis=1) + self.eps)
        found: Float64Array = np.einsum("id,id->i", x, self.read) / scale + self.constant
        return found

    def accuracy(self, positive: Array, negative: Array) -> float:
        """The share of the 2n activations for which the lens prefers the right token, ties counted
        one half: the first of the pair for positive items, the second for negative ones.
        """
        right = np.concatenate([self.differences(positive), -self.differences(negative)])
        return float(((right > 0) + 0.5 * (right == 0)).mean())


def answer_lens(model: Model, answers: Any, n: int) -> AnswerLens:
    """The lens on `answers`, one pair for all of n items or one for each.

    Raises ValueError for anything but pairs of two different token ids of the model.
    """
    pairs = _pairs(answers, n, model.config.d_vocab)
    engine, c = model._engine, model.config
    rows = {
        token: engine.rows("unembed", 0, token, 1)[0].astype(np.float64)
        for token in sorted({token for pair in pairs for token in pair})
    }
    apart = np.stack([rows[a] - rows[b] for a, b in pairs])
    constant = np.zeros(n)
    if c.norm_bias:
        constant += apart @ engine.vector("b_ln_final", 0).astype(np.float64)
    if c.unembed_bias:
        bias = engine.vector("b_unembed", 0).astype(np.float64)
        constant += [bias[a] - bias[b] for a, b in pairs]
    read = apart * engine.vector("ln_final", 0).astype(np.float64)
    return AnswerLens(pairs, read, constant, c.norm == "layer", c.norm_eps)


def _pairs(answers: Any, n: int, d_vocab: int) -> list[tuple[int, int]]:
    try:
        listed = list(answers)
        pairs = [tuple(listed)] * n if listed and is_int(listed[0]) else [tuple(p) for p in listed]
    except TypeError:
        raise ValueError(
            f"answers must be two token ids, or such a pair for each item, not {answers!r}"
        ) from None
    if len(pairs) != n:
        raise ValueError(f"answers: {len(pairs)} pairs of tokens for {n} pairs of prompts")
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not all(is_int(t) and 0 <= t < d_vocab for t in pair):
            raise ValueError(
                f"answers[{i}] is {pair!r}, not two token ids (0 to {d_vocab - 1}); take them from"
                " model.tokenizer.encode"
            )
        if pair[0] == pair[1]:
            raise ValueError(f"answers[{i}] names token {pair[0]} twice: the two must differ")
    return [(int(a), int(b)) for a, b in pairs]
