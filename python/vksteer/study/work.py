"""How much work each step of a study does, as counts: tokens of prompts and answers, rows and
gradient passes, circuits and patches.

A count is that of one kind of work (KINDS). Times the kind's measured rate (rates.py) it gives
seconds. Where a count depends on what the study will find (how many prompts steering flips, how
many coefficients a search tries), it is one of the expectations below until the step that finds it
has finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ..circuits.faithfulness import AHEAD, passes_of_grid
from .meaning import DIRECTIONS, LARGEST, MOST_HEADS
from .settings import DATA_SETS, Settings
from .shown import MOST_SAMPLES

#: Kind of work -> what is counted.
KINDS = {
    "capture": "tokens x layers of passes whose activations are read",
    "score": "tokens x layers of passes whose last logits are read",
    "prefill": "tokens of prompts that are answered",
    "step": "steps of decoding, each for all rows of a batch",
    "token": "decoded tokens",
    "gradient": "tokens x steps x layers of attribution",
    "contract": "tokens x edges of attribution",
    "final": "tokens x layers of the steered and the base run beside circuits",
    "circuits": "tokens x layers x circuits of all sizes, to the power at which they share work",
    "near": "circuits x tokens x layers, of nearly the same size",
    "patch": "patches x tokens x layers",
    "learn": "tokens x layers forward and backward",
    "lens": "vectors read through the unembedding",
    "word": "tokens of the vocabulary whose texts are compared with a list of words",
    "reread": "tokens x layers forward under a loss",
}
#: Most rows that are decoded together (runtime/generation.py).
ROWS = 64
#: What is expected of a study before it has found it. Shares of the candidates whose KL, and whose
#: bypass, are measured (candidates); coefficients tried by `range` for each side; share of the
#: prompts of training that give a pair; share of prompts that steering flips; depth of the vector.
KL_SHARE, BYPASS_SHARE, TRIED, PAIR_SHARE, FLIPPED, DEPTH = 0.35, 0.25, 13, 0.85, 0.95, 2 / 3
#: Share of the edges that the smallest faithful circuit is expected to have.
SMALLEST = 0.2
#: Fewest samples that are halved (inside.py).
LEAST_HALVED = 4


@dataclass(frozen=True)
class Lengths:
    """Lengths of greedy answers of this model to prompts of the study.

    ends: of the answers that ended, in tokens. open: how many were cut off at `limit`. Beyond the
    limit answers end as often per token as below it.
    """

    ends: tuple[int, ...]
    open: int
    limit: int

    def survival(self, limit: int) -> list[float]:
        """The share of answers that have more than i tokens, for i from 0 to limit - 1."""
        n = len(self.ends) + self.open
        shares = [sum(e > i for e in self.ends) + self.open for i in range(min(limit, self.limit))]
        found = [s / n for s in shares]
        seen = sum(self.ends) + self.open * self.limit
        goes_on = 1 - len(self.ends) / seen if seen else 1.0
        while len(found) < limit:
            found.append(found[-1] * goes_on if self.open else 0.0)
        return found

    def mean(self, limit: int) -> float:
        """Expected tokens of an answer of at most `limit`."""
        return sum(self.survival(limit))

    def longest(self, limit: int, rows: int) -> float:
        """Expected tokens of the longest of so many answers."""
        return sum(1 - (1 - share) ** rows for share in self.survival(limit))


@dataclass(frozen=True)
class Known:
    """What finished steps have found; None where they have not."""

    layer: int | None = None
    examples: int | None = None
    vectors: int | None = None
    samples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """What a study's work depends on beside its settings.

    prompts: {split: (prompts, tokens of all)} of both kinds together. n_layers, positions: of the
    model and its chat template. nonzero: share of the candidates that are not zero. layer: of the
    vector. edges: of the graph from a layer on. sharing: see rates.py. n_heads: of a layer.
    vocabulary: tokens.
    """

    prompts: Mapping[str, tuple[int, int]]
    n_layers: int
    positions: int
    nonzero: float
    edges: Callable[[int], int]
    sharing: float
    n_heads: int
    vocabulary: int
    lengths: Lengths
    known: Known = Known()

    @property
    def layer(self) -> int:
        """The vector's layer, or where a layer is expected that may be chosen."""
        known = self.known.layer
        return known if known is not None else round(DEPTH * self.n_layers)

    @property
    def above(self) -> int:
        return self.n_layers - self.layer

    def tokens(self, split: str, prompts: float | None = None) -> float:
        """Tokens of the split's prompts, or of so many of them."""
        n, tokens = self.prompts[split]
        return tokens if prompts is None else prompts * tokens / n


class Work(dict[str, float]):
    """{kind: count}."""

    def __add__(self, other: Mapping[str, float]) -> Work:
        kinds = dict.fromkeys([*self, *other])
        return Work({kind: self.get(kind, 0.0) + other.get(kind, 0.0) for kind in kinds})

    def times(self, factor: float) -> Work:
        return Work({kind: factor * n for kind, n in self.items()})


def answers(
    shape: Shape, rows: float, prompt_tokens: float, limit: int, times: float = 1.0
) -> Work:
    """Decoding of `rows` rows, `times` times."""
    batches = [ROWS] * int(rows // ROWS) + ([rows % ROWS] if rows % ROWS else [])
    steps = sum(shape.lengths.longest(limit, max(1, round(n))) for n in batches)
    return _work(
        prefill=times * prompt_tokens,
        step=times * steps,
        token=times * rows * shape.lengths.mean(limit),
    )


def _work(**counts: float) -> Work:
    return Work(counts)


def circuits_of(shape: Shape, circuits: int, tokens: float, near: bool = False) -> Work:
    """The work of a list of circuits over so many tokens of samples, with the steered and the base
    run that they are compared with. near: whether they are of nearly the same size.
    """
    work = _work(final=tokens * shape.above)
    if near:
        return work + _work(near=circuits * tokens * shape.above)
    return work + _work(circuits=circuits**shape.sharing * tokens * shape.above)


def _pair(shape: Shape, s: Settings, split: str, times: float) -> Work:
    n = shape.prompts[split][0]
    return answers(shape, n, shape.tokens(split), s.new_tokens, times)


def _screen(shape: Shape, s: Settings) -> Work:
    return _work(capture=shape.tokens("train") * shape.n_layers)


def _candidates(shape: Shape, s: Settings) -> Work:
    L = shape.n_layers
    allowed = 4 * L // 5
    side = shape.tokens("validation") / 2
    rows = shape.positions * allowed * shape.nonzero * (1 + KL_SHARE + BYPASS_SHARE)
    layers = L - (allowed - 1) / 2  # a run begins at the candidate's layer
    return _screen(shape, s) + _work(score=2 * side * L + rows * side * layers)


def _strength(shape: Shape, s: Settings) -> Work:
    n = len(s.coefficients)
    side = shape.tokens("validation") / 2
    return _pair(shape, s, "validation", n + 1) + _work(
        score=side * (3 * shape.n_layers + 2 * n * shape.above)
    )


def _range(shape: Shape, s: Settings) -> Work:
    both = shape.tokens("validation")
    return _pair(shape, s, "validation", TRIED + 1) + _work(
        score=both * (2 * shape.n_layers + TRIED * shape.above)
    )


def _pairs(shape: Shape, s: Settings) -> Work:
    n, tokens = shape.prompts["train"]
    return answers(shape, 2 * n, 2.2 * tokens, s.new_tokens)


def _examples(shape: Shape) -> float:
    known = shape.known.examples
    return PAIR_SHARE * shape.prompts["train"][0] if known is None else known


def _sequences(shape: Shape, s: Settings) -> float:
    """Tokens of the training's prompts with one response each."""
    n, tokens = shape.prompts["train"]
    return _examples(shape) * (tokens / n + shape.lengths.mean(s.new_tokens))


def _ntp(shape: Shape, s: Settings) -> Work:
    tokens = _sequences(shape, s)
    return _work(score=tokens * shape.layer, learn=s.epochs * tokens * shape.above)


def _po(shape: Shape, s: Settings) -> Work:
    tokens = 2 * _sequences(shape, s)
    return _work(
        score=tokens * shape.layer,
        learn=s.epochs * tokens * shape.above,
        reread=tokens * shape.above,
    )


def _n_vectors(shape: Shape) -> int:
    return 3 if shape.known.vectors is None else shape.known.vectors


def _behaviour(shape: Shape, s: Settings) -> Work:
    n, tokens = shape.prompts["test"]
    return _pair(shape, s, "test", 1 + _n_vectors(shape)) + answers(
        shape, n, tokens + PREFIX * n, s.new_tokens
    )


#: Tokens of an instruction that is put before prompts.
PREFIX = 20


def _table1(shape: Shape, s: Settings) -> Work:
    n, tokens = shape.prompts["test"]
    return (
        _pair(shape, s, "test", 2 + s.controls)
        + answers(shape, n, tokens + PREFIX * n, s.new_tokens)
        + _frozen(_pair(shape, s, "test", 5))
    )


def _frozen(work: Work) -> Work:
    return Work({f"frozen {kind}": n for kind, n in work.items()})


def _samples(shape: Shape, s: Settings, name: str) -> tuple[float, float]:
    """(Samples of a data set or vector, their tokens.)"""
    n = min(s.samples, shape.prompts["test"][0] // 2)
    kept = shape.known.samples.get(name, FLIPPED * n)
    return kept, shape.tokens("test", kept) + kept * shape.lengths.mean(s.new_tokens)


def _attributed(shape: Shape, s: Settings, names: Sequence[str]) -> Work:
    n = min(s.samples, shape.prompts["test"][0] // 2)
    work = answers(shape, 2 * n, shape.tokens("test", 2 * n), s.new_tokens, len(names))
    for name in names:
        _, tokens = _samples(shape, s, name)
        work += _work(
            gradient=tokens * s.steps * shape.above,
            contract=tokens * shape.edges(shape.layer),
        )
    return work


def _learned(shape: Shape) -> tuple[str, ...]:
    return ("ntp", "po")[: _n_vectors(shape) - 1]


def _attribution(shape: Shape, s: Settings) -> Work:
    return _attributed(shape, s, DATA_SETS)


def _attribution_learned(shape: Shape, s: Settings) -> Work:
    return _attributed(shape, s, _learned(shape))


def _exact(shape: Shape, s: Settings) -> Work:
    kept, tokens = _samples(shape, s, DATA_SETS[0])
    if not kept:
        return _work()
    one = tokens / kept * shape.above
    return _work(final=one, patch=s.patches * one)


def _circuits(shape: Shape, s: Settings) -> Work:
    """Circuits are found on one half of the samples, and judged on the other."""
    edges, work = shape.edges(shape.layer), _work()
    step = s.grid * edges  # edges between two sizes of the grid
    passes = math.ceil(math.log2(max(2.0, step)) / AHEAD)
    near = min(2**AHEAD - 1, max(1, math.ceil(step) - 1))
    for name in (*DATA_SETS, *_learned(shape)):
        kept, tokens = _samples(shape, s, name)
        if kept < LEAST_HALVED:
            continue
        half = tokens / 2
        if name == DATA_SETS[0]:  # the curve, with two random circuits at each size
            random = 2 * sum(2 * x <= 1 for x in s.shares)
            work += circuits_of(shape, len(s.shares) + random, half)
        for some in passes_of_grid(math.ceil(1 / s.grid)):
            if some[0] < SMALLEST / s.grid:
                work += circuits_of(shape, len(some), half)
        work += circuits_of(shape, near, half, near=True).times(passes)
        work += circuits_of(shape, 1, half, near=True)
    return work


def _rerouting(shape: Shape, s: Settings) -> Work:
    n = min(s.samples, shape.prompts["test"][0] // 2)
    return _work(capture=2 * shape.tokens("test", n) * shape.n_layers)


def _sparsity(shape: Shape, s: Settings) -> Work:
    # the unsteered model, the whole vector, a random direction, and two methods at each threshold,
    # without the harmful prompts whose gradients choose dimensions
    side = shape.prompts["test"][0] // 2
    used = 1.0 if s.samples >= side else 1 - s.samples / (2 * side)
    return _pair(shape, s, "test", used * (3 + 2 * (len(s.taus) - 1)))


def _values(shape: Shape, s: Settings) -> Work:
    # value vectors of the largest heads and the vectors themselves, with their negatives, and those
    # of all heads once
    every = shape.above * shape.n_heads
    heads = min(MOST_HEADS, max(LARGEST, every // 10))
    return _work(lens=2 * (1 + DIRECTIONS) * (heads + 1) + every, word=shape.vocabulary)


def _positions(shape: Shape, s: Settings) -> Work:
    kept, tokens = _samples(shape, s, DATA_SETS[0])
    if not kept:
        return _work()
    tokens *= min(MOST_SAMPLES, kept) / kept
    return _work(
        gradient=tokens * s.steps * shape.above,
        contract=tokens * shape.edges(shape.layer),
        final=tokens * shape.above,
    )


def _nothing(shape: Shape, s: Settings) -> Work:
    return _work()


WORK: dict[str, Callable[[Shape, Settings], Work]] = {
    "prompts": _nothing,
    "screen": _screen,
    "candidates": _candidates,
    "strength": _strength,
    "range": _range,
    "pairs": _pairs,
    "ntp": _ntp,
    "po": _po,
    "behaviour": _behaviour,
    "table1": _table1,
    "attribution": _attribution,
    "attribution_learned": _attribution_learned,
    "exact": _exact,
    "circuits": _circuits,
    "rerouting": _rerouting,
    "values": _values,
    "texts": _nothing,
    "positions": _positions,
    "sparsity": _sparsity,
}
