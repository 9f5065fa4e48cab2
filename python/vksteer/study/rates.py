"""Seconds of each kind of work on this device with this model, measured by short runs of the very
calls that the steps make.

The runs take a few prompts of the study, steer with the difference of their means, attribute one
answer and evaluate circuits of its scores. They are kept in the study's folder (rates.json), beside
what results depend on, for each device, model and kernels; delete the file to measure again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import circuits, ov, patching, steering
from ..base.idle_clock import IdleClock, n_cores
from ..base.json_files import load_json, save_json
from ..base.provenance import digest
from ..errors import ModelError
from ..freezing import ABLATIONS
from ..inputs.samples import Sample
from ..inputs.vectors import SteeringVector
from ..runtime.edits import Steer
from ..steering.losses import Continuation, LogProbs
from ..steering.scores import last_logits
from .meaning import is_related, related_words
from .prompts import Prompts
from .vectors import BATCH
from .work import ROWS, Lengths

if TYPE_CHECKING:
    from ..patching.edge_scores import EdgeScores
    from ..runtime.decoding import Generation
    from ..runtime.model import Model

FILE, FORMAT = "rates.json", "vksteer.study_rates"
#: Seconds that a calibration should take, and the prompts of each kind that it runs.
AIM, LEAST_ROWS, MOST_ROWS = 14.0, 2, 12
#: Where time is for fewer prompts than this, samples are few and cut to so many tokens of answer.
SLOW_ROWS, CROP = 4, 16
#: There, answers of a whole batch begin with so many tokens; frozen decoding takes so many rows.
BEGINNING, FROZEN_ROWS = 8, 8
#: Answers are decoded until they end, for at most so many tokens, fewer where time is short.
NEW_TOKENS = 128
#: A call is timed until its runs have taken so many processor seconds, at most so many times.
TRIAL, TRIALS = 0.3, 5
#: Circuits of the two lists that show how much circuits share, and of one that bisects.
FEW, MANY, NEAR = 4, 18, 7
#: Tokens decoded to see how many more there is time for.
FEW_TOKENS = 8
#: Tokens decoded for the comparison of frozen and plain decoding.
SHORT = 6


@dataclass(frozen=True)
class Rates:
    """seconds, processor: {kind of work: seconds of a unit}, on an idle machine and of processor
    time; see base/idle_clock.py. frozen: how many times longer decoding takes where parts are
    frozen. nonzero: share of the candidates that are not zero.
    sharing: n circuits of one list cost as much as n**sharing times one, because they share much of
    their work. took: seconds of the calibration.
    """

    seconds: Mapping[str, float]
    processor: Mapping[str, float]
    frozen: float
    nonzero: float
    sharing: float
    lengths: Lengths
    took: float = 0.0

    def cost(self, work: Mapping[str, float]) -> tuple[float, float]:
        """(Seconds, processor seconds) of this work."""
        found = []
        for rates in (self.seconds, self.processor):
            total = 0.0
            for kind, n in work.items():
                plain = kind.removeprefix("frozen ")
                total += n * rates[plain] * (1.0 if plain == kind else self.frozen)
            found.append(total)
        return found[0], found[1]

    def to_dict(self) -> dict[str, Any]:
        return {
            "seconds": dict(self.seconds),
            "processor": dict(self.processor),
            "frozen": self.frozen,
            "nonzero": self.nonzero,
            "sharing": self.sharing,
            "lengths": {
                "ends": list(self.lengths.ends),
                "open": self.lengths.open,
                "limit": self.lengths.limit,
            },
            "took": self.took,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Rates:
        lengths = content["lengths"]
        return cls(
            content["seconds"],
            content["processor"],
            float(content["frozen"]),
            float(content["nonzero"]),
            float(content["sharing"]),
            Lengths(tuple(lengths["ends"]), int(lengths["open"]), int(lengths["limit"])),
            float(content["took"]),
        )


def key_of(model: Model, belongs: str) -> str:
    """What rates belong to: device, kernels and cores, the model and the prompts (a hash)."""
    return digest("rates 2", str(model.device), list(model.kernels), n_cores(), belongs)


def kept_rates(model: Model, belongs: str, folder: Path) -> Rates | None:
    """The rates of this device and kernels that the study's folder holds. belongs: hash of the
    model and the prompts. None where it holds none or its file is damaged.
    """
    try:
        kept = load_json(folder / FILE, format=FORMAT, what="rates", limit=1 << 24)["rates"]
        return Rates.from_dict(kept[key_of(model, belongs)])
    except (ModelError, KeyError, TypeError, ValueError):
        return None


def rates_of(
    model: Model, data: Prompts, belongs: str, folder: Path, say: Callable[[str], object]
) -> Rates:
    """The rates that the study's folder holds; measured and kept there where it holds none. say:
    is told what is measured.
    """
    found = kept_rates(model, belongs, folder)
    if found is not None:
        return found
    say("measuring how fast this device does the work of a study")
    found = measure(model, data)
    say(f"measured in {found.took:.1f} s")
    try:
        kept = load_json(folder / FILE, format=FORMAT, what="rates", limit=1 << 24)["rates"]
    except (ModelError, KeyError):
        kept = {}
    content = {"rates": {**kept, key_of(model, belongs): found.to_dict()}}
    save_json(folder / FILE, content, format=FORMAT, indent=1)
    return found


def measure(model: Model, data: Prompts) -> Rates:
    """Measures all rates; see this file's head."""
    with IdleClock(False) as clock:
        found = _Calibration(model, data).run()
    return Rates(
        found.seconds,
        found.processor,
        found.frozen,
        found.nonzero,
        found.sharing,
        found.lengths,
        round(clock.seconds, 3),
    )


@dataclass
class _Calibration:
    model: Model
    data: Prompts
    seconds: dict[str, float] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)
    frozen: float = 1.0
    nonzero: float = 1.0
    sharing: float = 1.0
    slow: bool = False  # whether few and short samples must do
    lengths: Lengths = field(default_factory=lambda: Lengths((), 1, 1))

    def run(self) -> _Calibration:
        harmful, harmless = self.data.pair("train")
        self._clock(lambda: self.model.run(harmful[:1], logits=None))  # compiles pipelines
        first = self._clock(lambda: self.model.run(harmful[:1], logits=None))
        # A calibration passes some 60 times over its prompts, and decodes about as long.
        fitting = int(AIM / 60 / max(first.seconds, 1e-4))
        self.slow = fitting < SLOW_ROWS
        n = min(MOST_ROWS, max(LEAST_ROWS, fitting), len(harmful), len(harmless))
        rows = self.model.chat_tokens(harmful[:n]), self.model.chat_tokens(harmless[:n])
        vector = self._passes(rows)
        answers = self._decoding(rows, vector)
        self._frozen(rows, vector)
        samples = _samples(rows, answers, CROP if self.slow else None)
        moved, vector = self._moved(samples, vector)
        scores = self._attribution(moved, vector)
        self._circuits(moved, vector, scores)
        self._losses(samples, vector)
        self._meaning(vector)
        return self

    # -- measuring ---------------------------------------------------------------------------------

    def _clock(self, call: Callable[[], object]) -> IdleClock:
        """Times a call: the mean of as many runs as take TRIAL seconds, at most TRIALS."""
        seconds: list[float] = []
        processor: list[float] = []
        while not seconds or (sum(processor) < TRIAL and len(seconds) < TRIALS):
            with IdleClock(self.model.device.type == "software") as clock:
                call()
            seconds.append(clock.seconds)
            processor.append(clock.processor)
        clock.seconds, clock.processor = float(np.mean(seconds)), float(np.mean(processor))
        return clock

    def _keep(self, kind: str, units: float, clock: IdleClock) -> None:
        self.seconds[kind], self.processor[kind] = clock.seconds / units, clock.processor / units

    def _passes(self, rows: tuple[list[list[int]], list[list[int]]]) -> SteeringVector:
        """Passes whose activations, and whose logits, are read; a vector for what follows."""
        L = self.model.config.n_layers
        means = partial(steering.difference_in_means, self.model, *rows, progress=False)
        found = means()
        every = [row for side in rows for row in side]
        tokens = sum(map(len, every))
        self._keep("capture", tokens * L, self._clock(means))
        at = found.vectors.reshape(-1, L, self.model.config.d_model)
        self.nonzero = float(np.mean(at.any(axis=-1)))
        layer = min(round(0.6 * L), L - 1)
        vector = found.vector(int(found.positions[-1]), layer)
        if vector.norm == 0:  # the same template token, before any prompt can have an effect
            direction = np.random.default_rng(0).standard_normal(vector.width)
            vector = SteeringVector(direction.astype(np.float32), layer)

        def logits() -> None:
            list(last_logits(self.model, [(row, [Steer(vector, 1.0)]) for row in every]))

        logits()  # the inputs of this layer are kept from here on
        self._keep("score", tokens * (L - layer), self._clock(logits))
        return vector

    def _generate(
        self, rows: Sequence[Sequence[int]], vector: SteeringVector | None, new: int, **options: Any
    ) -> tuple[list[Generation], IdleClock]:
        """Answers to rows, of which the first half is steered against the vector."""
        half = len(rows) // 2
        signs = [] if vector is None else [-1.0 if i < half else 1.0 for i in range(len(rows))]
        edits = [[Steer(vector, sign)] for sign in signs if vector is not None]
        made: list[Generation] = []

        def call() -> None:
            made[:] = self.model.generate(
                rows, max_new_tokens=new, edits=edits, temperature=0.0, progress=False, **options
            )

        clock = self._clock(call)
        return made, clock

    def _decoding(
        self, rows: tuple[list[list[int]], list[list[int]]], vector: SteeringVector
    ) -> list[Generation]:
        """Prompts, steps and tokens of answers, and how long answers are. Returns the steered
        answers.
        """
        every = [row for side in rows for row in side]
        one = [rows[0][0], rows[1][0]]
        room = self.model.config.n_ctx - max(map(len, every))
        self.model.generate(one, max_new_tokens=2, progress=False)  # compiles pipelines
        prefill = self._generate(every, vector, 1)[1]
        self._keep("prefill", sum(map(len, every)), prefill)
        new = min(NEW_TOKENS, room)
        few = self._generate(every, None, min(FEW_TOKENS, new))[1].seconds
        # The difference may be lost in the noise of the prompts' time, of which a step is a share.
        step = max((few - prefill.seconds) / (FEW_TOKENS - 1), few / (5 * FEW_TOKENS))
        new = max(min(new, FEW_TOKENS), min(new, int(AIM / 9 / step)))
        plain, plain_clock = self._generate(every, None, new)
        steered, steered_clock = self._generate(every, vector, new)
        narrow, narrow_clock = self._generate(one, vector, new)
        whole = self._batch(rows, vector) if self.slow else None
        for name in ("seconds", "processor"):
            wide = _decoded(plain) + _decoded(steered)
            prompts = sum(map(len, every)) * getattr(self, name)["prefill"]
            wide_time = getattr(plain_clock, name) + getattr(steered_clock, name) - 2 * prompts
            if whole is not None:
                wide, wide_time = whole[0], getattr(whole[2], name) - getattr(whole[1], name)
            prompts = sum(map(len, one)) * getattr(self, name)["prefill"]
            narrow_time = getattr(narrow_clock, name) - prompts
            a, b = _two_rates(wide, max(wide_time, 1e-6), _decoded(narrow), max(narrow_time, 1e-6))
            getattr(self, name).update(step=a, token=b)
        ended = [len(g.tokens) for g in [*plain, *steered] if g.finish_reason != "length"]
        self.lengths = Lengths(tuple(ended), len(plain) + len(steered) - len(ended), new)
        return steered

    def _batch(
        self, rows: tuple[list[list[int]], list[list[int]]], vector: SteeringVector
    ) -> tuple[np.ndarray, IdleClock, IdleClock]:
        """What a whole batch decodes in a few steps, [steps, tokens]; times of its prompts, and of
        prompts and steps. A few rows do not tell what a token costs beside a step.
        """
        short = beginnings(rows, ROWS)
        prompts = self._generate(short, vector, 1)[1]
        made, clock = self._generate(short, vector, 1 + SHORT)
        return _decoded(made), prompts, clock

    def _frozen(
        self, rows: tuple[list[list[int]], list[list[int]]], vector: SteeringVector
    ) -> None:
        """How much longer decoding takes with frozen parts, the mean over the rows of Table 1."""
        half = max(1, len(rows[0]) // 2)
        some = [row for side in rows for row in side[:half]]
        if self.slow:
            some = beginnings(rows, FROZEN_ROWS)
        plain = self._generate(some, vector, SHORT)[1].seconds
        ways: list[dict[str, Any]] = [dict(options) for options in ABLATIONS.values() if options]
        self.model.generate(
            some[:1], max_new_tokens=2, progress=False, **ways[-1], edits=[Steer(vector, 1.0)]
        )  # compiles pipelines
        frozen = [self._generate(some, vector, SHORT, **options)[1].seconds for options in ways]
        self.frozen = float(np.mean(frozen)) / plain

    def _moved(
        self, samples: Sequence[Sample], vector: SteeringVector
    ) -> tuple[list[Sample], SteeringVector]:
        """Samples whose predicted tokens steering changes, so that there is something to attribute,
        and the vector, doubled until there is such a sample.
        """
        some = list(samples[: 1 if self.slow else max(LEAST_ROWS, len(samples) // 4)])
        for _ in range(6):
            found = patching.attribute(
                self.model, some, vector, -1.0, steps=1, dims="steer", progress=False
            )
            assert found.weights is not None
            if found.weights.any():
                return [some[i] for i in np.flatnonzero(found.weights)], vector
            vector = vector.with_norm(2 * vector.norm)
        raise ValueError(
            "rates cannot be measured: the difference of the means of the first prompts, at 32"
            " times its norm, changes none of the model's next tokens; are these prompts of two"
            " kinds?"
        )

    def _attribution(self, samples: list[Sample], vector: SteeringVector) -> EdgeScores:
        """Gradient passes, and what every sample costs beside them."""
        attribute = partial(
            patching.attribute, self.model, samples, vector, -1.0, dims="steer", per_sample=True,
            progress=False,
        )  # fmt: skip
        scores = attribute(steps=1)
        few, many = (self._clock(partial(attribute, steps=n)) for n in (1, 4))
        tokens, above = sum(map(len, samples)), self.model.config.n_layers - vector.layer
        for name in ("seconds", "processor"):
            a, b = getattr(few, name), getattr(many, name)
            step = max((b - a) / 3, 0.05 * b)
            getattr(self, name)["gradient"] = step / (tokens * above)
            rest = max(a - step, 0.02 * a)
            getattr(self, name)["contract"] = rest / (tokens * scores.graph.n_edges)
        return scores

    def _circuits(self, samples: list[Sample], vector: SteeringVector, scores: EdgeScores) -> None:
        """Lists of circuits, and exact patches."""
        E, above = scores.graph.n_edges, self.model.config.n_layers - vector.layer
        units = sum(map(len, samples)) * above

        def evaluate(shares: Sequence[float]) -> IdleClock:
            some = [scores.circuit(max(1, min(E, round(x * E)))) for x in shares]
            return self._clock(
                lambda: circuits.evaluate(some, self.model, samples, vector, -1.0, progress=False)
            )

        evaluate([0.5])
        final = evaluate([1.0])
        self._keep("final", units, final)
        few, many = (FEW, min(MANY, E - 1)) if not self.slow else (FEW // 2, min(MANY // 2, E - 1))
        lists = [[(i + 1) / (n + 1) for i in range(n)] for n in (few, many)]
        clocks = [evaluate(shares) for shares in lists]
        for name in ("seconds", "processor"):
            base = getattr(final, name)
            some, more = (max(getattr(c, name) - base, 0.05 * base) for c in clocks)
            power = math.log(more / some) / math.log(many / few) if many > few else 1.0
            if name == "seconds":
                self.sharing = min(max(power, 0.0), 1.0)
            getattr(self, name)["circuits"] = more / (many**self.sharing * units)
        near = [0.05 + 0.05 * i / NEAR for i in range(NEAR)]
        self._beside("near", NEAR * units, evaluate(near), final)
        order = np.argsort(-np.abs(scores.edges), kind="stable")

        def patch(n: int) -> None:
            edges = [int(i) for i in order[:n]]
            patching.exact(self.model, samples[0], vector, -1.0, edges=edges)

        patch(2)
        one, n = self._clock(lambda: patch(1)), min(4 if self.slow else 8, E)
        units = max(1, n - 1) * len(samples[0]) * above
        self._beside("patch", units, self._clock(lambda: patch(n)), one)

    def _beside(self, kind: str, units: float, clock: IdleClock, base: IdleClock) -> None:
        """The rate of what a call does beyond `base`, at least a hundredth of it."""
        for name in ("seconds", "processor"):
            whole, less = getattr(clock, name), getattr(base, name)
            getattr(self, name)[kind] = max(whole - less, 0.01 * whole) / units

    def _losses(self, samples: Sequence[Sample], vector: SteeringVector) -> None:
        """Passes of a training, with gradients and without."""
        samples = samples[: LEAST_ROWS if self.slow else BATCH]
        some = [Continuation(s.prompt_tokens, s.response_tokens) for s in samples]
        units = sum(map(len, samples)) * (self.model.config.n_layers - vector.layer)
        log_probs = LogProbs(self.model, vector.layer)
        loss = partial(log_probs, some, vector.direction, [1.0] * len(some))
        loss()
        for kind, gradient in (("learn", True), ("reread", False)):
            self._keep(kind, units, self._clock(partial(loss, gradient=gradient)))

    def _meaning(self, vector: SteeringVector) -> None:
        """Vectors read through the unembedding, and texts compared with a list of words."""
        some = [vector, -vector] * 8
        lens = partial(ov.logit_lens, self.model, some, top=20, progress=False)
        lens()
        self._keep("lens", len(some), self._clock(lens))
        assert self.model.tokenizer is not None  # prompts are texts
        n = min(self.model.config.d_vocab, len(self.model.tokenizer))
        texts = self.model.tokenizer.tokens(range(0, n, max(1, n // 500)))
        words = related_words(*self.data.pair("train"))
        compare = lambda: [is_related(text, (), words) for text in texts]
        self._keep("word", len(texts), self._clock(compare))


def beginnings(rows: tuple[list[list[int]], list[list[int]]], n: int) -> list[list[int]]:
    """Rows of BEGINNING tokens, all different where the prompts are long enough: parts of their
    text, so that little time goes into reading them.
    """
    tokens = [token for side in rows for row in side for token in row]
    last = max(1, len(tokens) - BEGINNING + 1)
    return [tokens[i % last : i % last + BEGINNING] for i in range(n)]


def _samples(
    rows: tuple[list[list[int]], list[list[int]]],
    answers: Sequence[Generation],
    most: int | None,
) -> list[Sample]:
    """The answers, of at most so many tokens, as samples; those of harmful prompts stand first."""
    prompts = [row for side in rows for row in side]
    return [
        Sample(tuple(row), tuple(int(t) for t in g.tokens[:most]))
        for row, g in zip(prompts, answers, strict=True)
    ]


def _decoded(made: Sequence[Generation]) -> np.ndarray:
    """[steps, tokens] of a batch beyond its first token, which comes with the prompts."""
    lengths = [len(g.tokens) for g in made]
    return np.array([max(lengths) - 1, sum(lengths) - len(lengths)], float)


def _two_rates(
    wide: np.ndarray, wide_time: float, narrow: np.ndarray, narrow_time: float
) -> tuple[float, float]:
    """(Seconds of a step, seconds of a token) that explain both, neither below 0."""
    try:
        step, token = np.linalg.solve(np.array([wide, narrow]), [wide_time, narrow_time])
    except np.linalg.LinAlgError:
        step = token = -1.0
    if token < 0:
        return wide_time / max(wide[0], 1.0), 0.0
    if step < 0:
        return 0.0, wide_time / max(wide[1], 1.0)
    return float(step), float(token)
