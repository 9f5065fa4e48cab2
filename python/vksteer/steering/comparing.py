"""Vectors of one model compared: what each does in both directions, how similar they are, and
whether they work through the same circuit (docs/method.md sections 2 and 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import require_int
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Float64Array, PathLike, ProgressLike, Prompts
from ..inputs.prompt_pair import PromptPair, magnitudes
from .comparison import ComparedVector, Comparison
from .losses import check_vector

if TYPE_CHECKING:
    from ..circuits.circuit import Circuit
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..judge import Judge, Rate
    from ..runtime.model import Model

#: Prompts whose responses become the samples of a circuit.
SAMPLES = 16
SIDES = {"harmful": -1, "harmless": 1}

#: a, or (plus, minus), or one of these for each vector.
Magnitude: TypeAlias = float | tuple[float, float]
Coefficient: TypeAlias = "Magnitude | Mapping[str, Magnitude]"


def _strengths(coefficient: Coefficient, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    """{name: (plus, minus)}."""
    if not isinstance(coefficient, Mapping):
        return dict.fromkeys(names, magnitudes(coefficient))
    missing = [name for name in names if name not in coefficient]
    if missing:
        raise ValueError(
            f"coefficient names no strength of {missing[0]!r}: give one for each vector, or one"
            " for all"
        )
    return {name: magnitudes(coefficient[name]) for name in names}


@dataclass(frozen=True)
class _Options:
    """How circuits are found; see `compare`."""

    side: str
    n_samples: int
    size: int | None
    threshold: float
    steps: int
    max_new_tokens: int
    judge: Judge | None

    @classmethod
    def of(
        cls, side: str, n_samples: int, size: int | None, threshold: float, steps: int, *rest: Any
    ) -> _Options:
        """The options, checked."""
        if side not in SIDES:
            raise ValueError(f"side={side!r}: 'harmful' or 'harmless'")
        n_samples, steps = require_int(n_samples, "n_samples", 1), require_int(steps, "steps", 1)
        size = None if size is None else require_int(size, "size", 1)
        return cls(side, n_samples, size, threshold, steps, *rest)


class _Circuits:
    """Samples, scores and circuits of every vector. prompts: those that are steered."""

    def __init__(
        self,
        model: Model,
        vectors: Mapping[str, SteeringVector],
        strengths: Mapping[str, tuple[float, float]],
        prompts: Sequence[list[int]],
        options: _Options,
    ):
        self.model, self.vectors, self.options = model, vectors, options
        self.names, self.prompts = list(vectors), prompts[: options.n_samples]
        side = options.side
        self.coefficients = {
            name: SIDES[side] * strengths[name][side == "harmful"] for name in vectors
        }
        self.found: dict[str, Circuit | None] = dict.fromkeys(vectors)
        self.samples: dict[str, Sequence[Sample]] = dict.fromkeys(vectors, ())
        n = len(vectors)
        self.overlaps, self.cross = np.full((n, n), np.nan), np.full((n, n), np.nan)

    def run(self, bar: Progress, notes: list[str]) -> None:
        """Finds the circuit of every vector, then fills `overlaps` and `cross`."""
        for name in self.names:
            self.found[name], self.samples[name] = self._find(name, notes)
            bar.step()
        for i, j in np.ndindex(*self.overlaps.shape):
            a, b = self.found[self.names[i]], self.found[self.names[j]]
            if a is not None and b is not None and a.graph == b.graph and len(a) and len(b):
                self.overlaps[i, j] = a.overlap(b)
        for j, name in enumerate(self.names):
            mine = self.found[name]
            same = {
                i: other
                for i, other in enumerate(self.found.values())
                if mine is not None and other is not None and other.graph == mine.graph
            }
            if same:
                self.cross[list(same), j] = self._under(name, list(same.values()))
            bar.step()

    def _find(self, name: str, notes: list[str]) -> tuple[Circuit | None, Sequence[Sample]]:
        """The circuit of one vector, None where it flips no prompt, and its samples."""
        from .. import circuits, patching

        vector, a, o = self.vectors[name], self.coefficients[name], self.options
        samples = patching.make_samples(
            self.model,
            self.prompts,
            vector,
            a,
            responses="steered",
            max_new_tokens=o.max_new_tokens,
            keep="flipped",
            judge=o.judge,
            progress=False,
        )
        if not len(samples):
            notes.append(
                f"the circuit of {name}, none of whose {len(self.prompts)} prompts it flips"
            )
            return None, samples
        scores = patching.attribute(
            self.model, samples, vector, a, clean="steered", steps=o.steps, progress=False
        )
        if o.size is not None:
            return scores.circuit(min(o.size, scores.graph.n_edges)), samples
        try:
            circuit = circuits.minimum_faithful(
                scores, self.model, samples, vector, a, threshold=o.threshold, progress=False
            )
        except ValueError as error:  # no size reaches the threshold
            notes.append(
                f"the minimum faithful circuit of {name} ({error}); its strongest tenth is shown"
            )
            circuit = scores.circuit(max(1, scores.graph.n_edges // 10))
        return circuit, samples

    def _under(self, name: str, others: Sequence[Circuit]) -> list[float]:
        """Faithfulness of circuits under one vector, on the samples of that vector."""
        from .. import circuits

        vector, a = self.vectors[name], self.coefficients[name]
        results = circuits.evaluate(
            others, self.model, self.samples[name], vector, a, progress=False
        )
        return [r["logit_diff"].faithfulness for r in results]


def compare(
    model: Model,
    vectors: Mapping[str, SteeringVector],
    harmful: Prompts,
    harmless: Prompts,
    coefficient: Coefficient = 1.0,
    *,
    normalize: bool = True,
    max_new_tokens: int = 64,
    judge: Judge | None = None,
    min_words: int | str | None = "auto",
    circuits: bool | str = "auto",
    side: str = "harmful",
    n_samples: int = SAMPLES,
    size: int | None = None,
    threshold: float = 0.85,
    steps: int = 10,
    prompt_baseline: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    out: PathLike | None = None,
    progress: ProgressLike = True,
) -> Comparison:
    """Compares vectors of one model, for example {"dim": v, "ntp": u, "po": w}: ASR both ways with
    ended and repetition, cosines, overlaps of circuits, each circuit's faithfulness under the
    other vectors, and edges by type.

    harmful, harmless: prompts (texts or token lists). coefficient: a, (plus, minus), or a dict with
    one of these for each vector; harmless prompts get +plus, harmful ones -minus. normalize: all
    vectors get the norm of the first one. judge, min_words: as in `freezing.ablation_table`.
    circuits: False, or True or "auto" for circuits of all vectors, compared where they share a
    layer. side: the kind of prompts, of which the first `n_samples` are steered for them and the
    flipped ones kept. size: edges of every circuit (None: the minimum faithful one at `threshold`).
    steps: of EAP-IG. prompt_baseline: one more row; out: a file of answers; both as in `sweep`.
    Raises ValueError before work for an empty dict, bad vectors, empty lists and bad numbers.
    """
    vectors, strengths = _checked(model, vectors, coefficient, normalize)
    with_circuits = _with_circuits(circuits)
    options = _Options.of(side, n_samples, size, threshold, steps, max_new_tokens, judge)
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size, out)
    prompted = pair.prompted(prompt_baseline)
    prompts = pair.harmful_rows if side == "harmful" else pair.harmless_rows
    finder = _Circuits(model, vectors, strengths, prompts, options)
    notes = _notes(vectors) if with_circuits else []
    runs = len(vectors) + 1 + (prompted is not None)
    total = len(pair) * runs + 2 * len(vectors) * with_circuits
    with Progress(progress, total, "compare") as bar:
        unsteered, rates = _rates(pair, vectors, strengths, judge, min_words, bar)
        baseline = _baseline(pair, prompted, judge, min_words, bar)
        if with_circuits:
            finder.run(bar, notes)
    return Comparison(
        _rows(vectors, strengths, rates, finder, pair),
        unsteered,
        _cosines(list(vectors.values())),
        finder.overlaps,
        finder.cross,
        _setting(model, vectors, pair, normalize, options, prompt_baseline),
        notes,
        baseline,
    )


def _checked(
    model: Model,
    vectors: Mapping[str, SteeringVector],
    coefficient: Coefficient,
    normalize: bool,
) -> tuple[dict[str, SteeringVector], dict[str, tuple[float, float]]]:
    """(vectors as they are used, strengths)."""
    if not isinstance(vectors, Mapping) or not vectors:
        raise ValueError(
            'vectors must name at least one SteeringVector, for example {"dim": v, "ntp": u}'
        )
    for vector in vectors.values():
        check_vector(model, vector)
    used = {str(name): v for name, v in vectors.items()}
    strengths = _strengths(coefficient, list(used))
    if normalize:
        first = next(iter(used.values()))
        used = {name: v if v is first else v.with_norm(first.norm) for name, v in used.items()}
    return used, strengths


def _notes(vectors: Mapping[str, SteeringVector]) -> list[str]:
    layers = {v.layer for v in vectors.values()}
    if len(layers) == 1:
        return []
    return [
        (
            f"overlaps and cross-faithfulness between layers {sorted(layers)}: circuits of"
            " different layers are of different graphs"
        )
    ]


def _rates(
    pair: PromptPair,
    vectors: Mapping[str, SteeringVector],
    strengths: Mapping[str, tuple[float, float]],
    judge: Judge | None,
    min_words: int | str | None,
    bar: Progress,
) -> tuple[tuple[Rate, Rate], dict[str, dict[str, Rate]]]:
    """((harmless, harmful) of the unsteered model, {name: {"harmless", "harmful"}})."""
    base = pair.rates(pair.run(), judge, min_words)
    bar.step(len(pair))
    rates = {}
    for name, vector in vectors.items():
        rates[name] = pair.rates(pair.run(vector, *strengths[name]), judge, min_words)
        bar.step(len(pair))
    return _both(base), rates


def _with_circuits(circuits: bool | str) -> bool:
    if circuits not in (True, False, "auto"):
        raise ValueError(f"circuits={circuits!r}: True, False or 'auto'")
    return circuits is not False


def _baseline(
    pair: PromptPair,
    prompted: PromptPair | None,
    judge: Judge | None,
    min_words: int | str | None,
    bar: Progress,
) -> tuple[Rate, Rate] | None:
    """(harmless, harmful) rates under an instruction."""
    if prompted is None:
        return None
    rates = _both(pair.rates(prompted.run(), judge, min_words))
    bar.step(len(pair))
    return rates


def _both(rates: Mapping[str, Rate]) -> tuple[Rate, Rate]:
    return rates["harmless"], rates["harmful"]


def _rows(
    vectors: Mapping[str, SteeringVector],
    strengths: Mapping[str, tuple[float, float]],
    rates: Mapping[str, Mapping[str, Rate]],
    finder: _Circuits,
    pair: PromptPair,
) -> list[ComparedVector]:
    rows = []
    for name, vector in vectors.items():
        circuit, doses = finder.found[name], pair.doses(vector)
        plus, minus = strengths[name]
        rows.append(
            ComparedVector(
                name,
                strengths[name],
                vector.norm,
                rates[name]["harmless"],
                rates[name]["harmful"],
                circuit,
                len(finder.samples[name]),
                None if circuit is None else circuit.distribution(),
                (plus * doses["harmless"], minus * doses["harmful"]),
            )
        )
    return rows


def _cosines(vectors: Sequence[SteeringVector]) -> Float64Array:
    """float64 [n, n]."""
    cosines = np.ones((len(vectors), len(vectors)))
    for i, j in np.ndindex(*cosines.shape):
        if i != j:
            cosines[i, j] = vectors[i].cosine(vectors[j])
    return cosines


def _setting(
    model: Model,
    vectors: Mapping[str, SteeringVector],
    pair: PromptPair,
    normalize: bool,
    options: _Options,
    prompt_baseline: str | Sequence[str] | None,
) -> dict[str, Any]:
    """How the vectors were compared."""
    return {
        "layers": [v.layer for v in vectors.values()],
        "methods": [v.method for v in vectors.values()],
        "normalize": bool(normalize),
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "judge": "substring" if options.judge is None else type(options.judge).__name__,
        "side": options.side,
        "steps": options.steps,
        "threshold": options.threshold,
        "size": options.size,
        "vector_hashes": [digest(v.direction) for v in vectors.values()],
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        "prompt_baseline": prompt_baseline,
        **provenance(model),
    }
