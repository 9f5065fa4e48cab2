"""Whether steering value vectors mean something: how many of the tokens that they promote are about
refusing or about what harmful prompts are about, beside the vector itself and random directions.

The rule. A token is related if

- it is one of the refusal tokens by which the vector was chosen, or
- its text, without white space and in lower case, has at least four letters, and begins with a word
  of the list below or is the beginning of one.

The list holds the words of at least four letters of the substring judge's refusal phrases, and
those that stand in two or more of the harmful training prompts and in none of the harmless ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import ov
from ..base.types import Float64Array, ProgressLike
from ..freezing import random_vector
from ..inputs.prompts import token_text
from ..inputs.vectors import SteeringVector
from ..judge import REFUSALS

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Tokens that are read of every vector, and as many of its negative (docs/method.md section 7).
TOKENS = 20
#: Heads: the tenth with the largest norm, within these bounds.
LARGEST, MOST_HEADS = 8, 32
#: Random directions. The share of a vector that beats all of them has p = 1/21.
DIRECTIONS = 20
#: Draws of heads with replacement.
DRAWS = 1000
WORD = re.compile(r"[^\W\d_]{4,}")


def related_words(harmful: Iterable[str], harmless: Iterable[str]) -> set[str]:
    """The list of words of the rule, in lower case."""

    def counted(texts: Iterable[str]) -> Counter[str]:
        return Counter(word for text in texts for word in set(WORD.findall(text.lower())))

    often = {word for word, n in counted(harmful).items() if n > 1}
    return often - set(counted(harmless)) | set(counted(REFUSALS))


def is_related(text: str, refusal: Iterable[str], words: Iterable[str]) -> bool:
    """Whether a token is related, by the rule above. refusal: texts of the refusal tokens."""
    if text in refusal:
        return True
    short = text.strip().lower()
    if not WORD.fullmatch(short):
        return False
    return any(short.startswith(word) or word.startswith(short) for word in words)


def meaning(
    model: Model,
    vector: SteeringVector,
    prompts: tuple[Sequence[str], Sequence[str]],
    refusal: Sequence[str],
    *,
    seed: int = 0,
    progress: ProgressLike = True,
) -> dict[str, Any]:
    """Shares of related tokens among the top 20 of a vector and the top 20 of its negative.

    vector: of "dim". prompts: (harmful, harmless) training prompts. refusal: texts of the refusal
    tokens. Returns
    {"heads": [[layer, head]] of the largest norm, "shares": of their value vectors, "share": the
    mean with "low" and "high" of a bootstrap over the heads, "vector": of the vector itself,
    "random": means over the same heads of 20 random directions, "random_vectors": of these
    directions themselves, "p": how often a random direction does as well, "vocabulary": of all
    tokens, "words": how many the list has, "found": the related tokens of the value vectors,
    "excess": {"vector": [mean, low, high], "random": [mean, low, high]}, what the heads' share is
    above the vector's and above the mean of the random directions through the same head}.
    """
    words = related_words(*prompts)
    related = np.array([is_related(t, refusal, words) for t in _vocabulary(model)])
    svv = ov.steering_value_vectors(model, vector)
    n_heads = min(MOST_HEADS, max(LARGEST, svv.norms.size // 10), int((svv.norms > 0).sum()))
    places = svv.largest(n_heads)
    directions = [random_vector(vector, seed, i) for i in range(DIRECTIONS)]
    controls = [ov.steering_value_vectors(model, direction) for direction in directions]
    read = [one[place] for one in (svv, *controls) for place in places]
    read += [one.direction for one in (vector, *directions)]
    signed = np.stack([np.stack([row, -row]) for row in read])
    tokens = ov.logit_lens(model, signed, top=TOKENS, progress=progress).tokens
    shares = related[tokens].mean(axis=(1, 2), dtype=np.float64)
    alone = shares[-1 - DIRECTIONS :]
    heads = shares[: -1 - DIRECTIONS].reshape(1 + DIRECTIONS, n_heads)
    of_heads = np.unique(tokens[:n_heads])
    random = heads[1:].mean(axis=1)
    mean, low, high = _over_heads(heads[0], seed)
    return {
        "heads": [list(place) for place in places],
        "shares": heads[0],
        "share": mean,
        "low": low,
        "high": high,
        "vector": alone[0],
        "random": random,
        "random_vectors": alone[1:],
        "p": (1 + int((random >= mean).sum())) / (1 + DIRECTIONS),
        "vocabulary": related.mean(),
        "words": len(words),
        "found": [token_text(model, int(t)) for t in of_heads[related[of_heads]]],
        "excess": {
            "vector": _over_heads(heads[0] - alone[0], seed),
            "random": _over_heads(heads[0] - heads[1:].mean(axis=0), seed),
        },
    }


def _vocabulary(model: Model) -> list[str]:
    """The text of every row of the unembedding; those beyond the tokenizer's have none."""
    assert model.tokenizer is not None  # prompts are texts
    n = model.config.d_vocab
    known = model.tokenizer.tokens(range(min(n, len(model.tokenizer))))
    return known + [""] * (n - len(known))


def _over_heads(values: Float64Array, seed: int) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % percentile interval where heads are drawn with replacement."""
    at = np.random.default_rng([seed, 13]).integers(0, values.size, (DRAWS, values.size))
    low, high = np.quantile(values[at].mean(axis=1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
