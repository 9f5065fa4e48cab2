"""How much of the effect of steering circuits of each size carry, and the smallest circuit that
carries enough (docs/method.md section 5).

Faithfulness is (m(C) - m(0)) / (m(M) - m(0)), where m is pooled over all metric positions of all
samples before the ratio. Intervals are bootstrap intervals: samples are drawn with replacement and
pooled before the ratio.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import require_int
from ..base.provenance import digest, loaded_with
from ..base.types import ProgressLike
from ..inputs.samples import check_samples, samples_hash
from . import search as circuit_search
from .circuit import Circuit, evaluate
from .curve import THRESHOLD, FaithfulnessCurve, per_sample_of
from .curve import bootstrap as bootstrap_interval

if TYPE_CHECKING:
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..patching.edge_scores import EdgeScores
    from ..runtime.model import Model
    from .graph import Graph

#: Sizes of `faithfulness_curve` where none are named, as shares of all edges.
SHARES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
#: Levels of the bisection whose circuits are run in one pass: 2**n - 1 circuits in one pass cost
#: little more than n circuits in n passes.
AHEAD = 3

#: Sizes of the grid that are run in the first pass.
GRID_AHEAD = 8

#: What `evaluate` gives for one circuit: {metric: result}.
Results: TypeAlias = Mapping[str, Any]


def _curve(
    scores: EdgeScores,
    sizes: Sequence[int],
    circuits: Sequence[Circuit],
    results: Sequence[Results],
    metric: str,
    metrics: Sequence[str],
    setting: dict[str, Any],
    controls: Sequence[Sequence[tuple[Circuit, Results]]] | None = None,
    draws: int = 0,
) -> FaithfulnessCurve:
    """The curve of measured circuits. results[i] belongs to circuits[i]; controls[i] holds the
    random circuits beside it with their results. draws: of the bootstrap, 0 for no intervals.
    """
    main = [r[metric] for r in results]
    intervals = [
        (
            bootstrap_interval(p, draws, setting.get("confidence", 0.95), setting.get("seed", 0))
            if draws and (p := per_sample_of(r))
            else (math.nan, math.nan)
        )
        for r in main
    ]
    values = (
        {
            m: {
                "faithfulness": np.array([r[m].faithfulness for r in results], np.float64),
                "value": np.array([r[m].value for r in results], np.float64),
                "full": float(results[0][m].full),
                "empty": float(results[0][m].empty),
            }
            for m in metrics
        }
        if results
        else {}
    )
    controls = controls or [[] for _ in circuits]
    width = max(map(len, controls), default=0)
    random, random_edges = (
        np.full((len(circuits), width), np.nan),
        np.zeros((len(circuits), width), np.int64),
    )
    for i, some in enumerate(controls):
        for j, (circuit, result) in enumerate(some):
            random[i, j], random_edges[i, j] = result[metric].faithfulness, len(circuit)
    return FaithfulnessCurve(
        metric,
        scores.graph.n_edges,
        np.array(sizes, np.int64),
        np.array([len(c) for c in circuits], np.int64),
        np.array([r.faithfulness for r in main], np.float64),
        np.array([x[0] for x in intervals]),
        np.array([x[1] for x in intervals]),
        random,
        random_edges,
        values,
        setting,
        list(circuits),
    )


def _setting(
    scores: EdgeScores,
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    **more: Any,
) -> dict[str, Any]:
    return {
        "n_samples": len(samples),
        "coefficient": float(coefficient),
        "layer": vector.layer,
        "vector_hash": digest(vector.direction),
        "samples_hash": samples_hash(samples),
        "model_hash": scores.provenance.get("model_hash"),
        **loaded_with(model),
        "scores_vector_hash": scores.provenance.get("vector_hash"),
        **more,
    }


def _check_effect(results: Results, metric: str) -> None:
    """Raises ValueError where steering does not change the metric."""
    r = results[metric]
    if not math.isfinite(r.full - r.empty) or r.full == r.empty:
        raise ValueError(
            f"steering changes nothing on these samples: {metric} is {r.full:g} with all edges and"
            f" {r.empty:g} with none, so faithfulness is undefined"
        )


# -- the smallest circuit --------------------------------------------------------------------------


def grid(n_edges: int, step: float = 0.01) -> list[int]:
    """Ascending sizes at every `step` (a share) of the edges, rounded up; the last is all edges.
    Raises ValueError for a step outside (0, 1].
    """
    if not 0 < step <= 1:
        raise ValueError(f"step must be a share above 0 and at most 1, not {step!r}")
    # 1e-9 absorbs rounding: 3 * 0.01 of 100 edges are 3 edges, not 4.
    return sorted(
        {
            min(n_edges, math.ceil(i * step * n_edges - 1e-9))
            for i in range(1, math.ceil(1 / step - 1e-9) + 1)
        }
        - {0}
    )


def passes_of_grid(n: int) -> list[range]:
    """Which of n sizes a search runs together, pass by pass, where it does not run the whole grid:
    each pass as many as all before it, so that one that goes on to the end costs little more than
    one pass.
    """
    found: list[range] = []
    while (first := found[-1].stop if found else 0) < n:
        found.append(range(first, min(n, first + max(GRID_AHEAD, first))))
    return found


def _midpoints(low: int, high: int, levels: int) -> list[int]:
    """Every size that `levels` steps of a bisection between low and high may need."""
    if not levels or high - low < 2:
        return []
    middle = (low + high) // 2
    return [*_midpoints(low, middle, levels - 1), middle, *_midpoints(middle, high, levels - 1)]


def minimum_faithful(
    scores: EdgeScores,
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    threshold: float = THRESHOLD,
    *,
    method: str = "pruned",
    metric: str = "logit_diff",
    step: float = 0.01,
    whole_grid: bool = True,
    progress: ProgressLike = True,
    **options: Any,
) -> Circuit:
    """The smallest circuit of `scores` that carries at least `threshold` of the effect of steering
    (docs/method.md section 5): a Circuit with its `curve`.

    One pass finds the smallest size of a fixed grid that reaches the threshold. Bisection between
    that size and the one before it then supposes that faithfulness rises within this one step.
    scores: EdgeScores of `attribute`. samples: Samples. vector: may be another than the scored one,
    of the same layer. coefficient: what the vector is multiplied by. threshold: a faithfulness
    above 0 and at most 1 (default 0.85). method: as in `scores.circuit`. metric: one of those of
    `vs.circuits.evaluate`. step: distance of the grid's sizes, a share of all edges above 0 and at
    most 1. whole_grid: False runs the grid in ascending order, pass by pass, only until a size
    reaches the threshold: the same circuit for less work, whose curve ends there. progress: True,
    False or callable(done, total). options: of `Circuit.evaluate`.
    Raises ValueError before any work for scores of another model or graph, and for a threshold,
    step, method or metric out of range; after it where steering changes nothing and where no
    circuit reaches the threshold.
    """
    samples = _checked(scores, model, samples, vector, threshold)
    search = _Search(
        scores,
        method,
        metric,
        threshold,
        lambda circuits: evaluate(
            circuits, model, samples, vector, coefficient, (metric,), progress=progress, **options
        ),
    )
    size = search.smallest(grid(scores.graph.n_edges, step), whole_grid)
    setting = _setting(
        scores, model, samples, vector, coefficient, method=method, threshold=threshold, step=step
    )
    circuit, result = search.found[size]
    meta = {
        **circuit.meta,
        "n": size,
        "threshold": threshold,
        "metric": metric,
        "faithfulness": float(result[metric].faithfulness),
    }
    return Circuit(circuit.graph, circuit.edges, meta=meta, curve=search.curve(setting))


class _Search:
    """The search for the smallest faithful circuit. found: {size: (circuit, its results)}."""

    def __init__(
        self,
        scores: EdgeScores,
        method: str,
        metric: str,
        threshold: float,
        measure: Callable[[list[Circuit]], list[dict[str, Any]]],
    ):
        self.scores, self.method, self.metric = scores, method, metric
        self.threshold, self._evaluate = threshold, measure
        self.found: dict[int, tuple[Circuit, Results]] = {}

    def measure(self, sizes: Iterable[int]) -> None:
        """Evaluates the sizes that are not known yet, each different circuit once."""
        missing = {n: self.scores.circuit(n, self.method) for n in sizes if n not in self.found}
        known = dict(self.found.values())
        new = [c for c in dict.fromkeys(missing.values()) if c not in known]
        if new:
            known.update(zip(new, self._evaluate(new), strict=True))
        self.found.update({n: (circuit, known[circuit]) for n, circuit in missing.items()})

    def faithfulness(self, size: int) -> float:
        return float(self.found[size][1][self.metric].faithfulness)

    def reaches(self, size: int) -> bool:
        share = self.faithfulness(size)
        # All edges carry the whole effect; a threshold of 1 must not fail by rounding.
        complete = len(self.found[size][0]) == self.scores.graph.n_edges
        return share >= self.threshold or (complete and abs(share - 1) < 1e-2)

    def smallest(self, sizes: Sequence[int], whole: bool) -> int:
        """The smallest size that reaches the threshold, by the grid and then by bisection."""
        at = None
        for some in [range(len(sizes))] if whole else passes_of_grid(len(sizes)):
            self.measure(sizes[i] for i in some)
            _check_effect(self.found[sizes[some[0]]][1], self.metric)
            at = next((i for i in some if self.reaches(sizes[i])), None)
            if at is not None:
                break
        if at is None:
            best = max(sizes, key=self.faithfulness)
            raise ValueError(
                f"no circuit reaches {self.threshold:g} by {self.metric}: the best of {len(sizes)}"
                f" has {self.faithfulness(best):.3f} ({best} edges)"
            )
        low, high = (sizes[at - 1] if at else 0), sizes[at]
        while high - low > 1:
            self.measure(_midpoints(low, high, AHEAD))
            for _ in range(AHEAD):
                if high - low > 1:
                    middle = (low + high) // 2
                    low, high = (low, middle) if self.reaches(middle) else (middle, high)
        return high

    def curve(self, setting: dict[str, Any]) -> FaithfulnessCurve:
        """Everything that was measured, by size."""
        sizes = sorted(self.found)
        circuits, results = zip(*(self.found[n] for n in sizes), strict=True)
        return _curve(self.scores, sizes, circuits, results, self.metric, (self.metric,), setting)


def _checked(
    scores: EdgeScores,
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    threshold: float = THRESHOLD,
) -> list[Sample]:
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, (int, float, np.number))
        or not 0 < threshold <= 1
    ):
        raise ValueError(f"threshold must be a share above 0 and at most 1, not {threshold!r}")
    vector.check(model, output=False)
    scores.check(model, layer=vector.layer)
    return check_samples(model, samples)


# -- the curve -------------------------------------------------------------------------------------


def faithfulness_curve(
    scores: EdgeScores,
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    sizes: Sequence[int] | None = None,
    *,
    method: str = "pruned",
    metrics: Sequence[str] = ("logit_diff",),
    random: int = 3,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    halves: bool = False,
    seed: int = 0,
    progress: ProgressLike = True,
    **options: Any,
) -> FaithfulnessCurve:
    """Faithfulness of circuits of many sizes, and of random ones (docs/method.md section 5): a
    FaithfulnessCurve with one point for each size.

    scores: EdgeScores of `attribute`. samples, vector, coefficient: as in `minimum_faithful`.
    sizes: numbers of edges (default: fixed shares, 0.2 % to all). method: as in `scores.circuit`.
    metrics: the first is drawn, bootstrapped and compared with random circuits; the others are
    measured too. random: random circuits for each size, of twice the size (0: none). bootstrap:
    draws of samples (0: no intervals). confidence: of the intervals. halves: find the circuits on
    one half of the samples and judge them on the other; needs scores made with per_sample=True from
    the same samples in the same order. seed: of random circuits, draws and halves. progress: True,
    False or callable(done, total). options: of `Circuit.evaluate`.
    Raises ValueError before any work for scores of another model or graph, bad sizes, and halves
    without per-sample scores; after it where steering changes nothing.
    """
    samples = _checked(scores, model, samples, vector)
    chosen_sizes = _sizes(scores.graph, sizes)
    n_random, seed = require_int(random, "random", 0), require_int(seed, "seed", 0)
    draws = require_int(bootstrap, "bootstrap", 0)
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise ValueError("metrics is empty: name at least one, for example 'logit_diff'")
    more: dict[str, Any] = {"method": method, "seed": seed, "confidence": confidence}
    more |= {"bootstrap": draws, "halves": bool(halves)}
    if halves:
        first, second = halves_of(scores, samples, seed)
        more |= {"found_on": first, "judged_on": second}
        more |= {"n_found_on": len(first), "n_judged_on": len(second)}
        scores, samples = scores.of_samples(first), [samples[i] for i in second]
    setting = _setting(scores, model, samples, vector, coefficient, **more)
    chosen = [scores.circuit(n, method) for n in chosen_sizes]
    control = _random_circuits(scores.graph, chosen_sizes, n_random, seed)
    every = list(dict.fromkeys([*chosen, *(x for some in control for x in some)]))
    options |= {"metrics": metrics, "progress": progress}
    results = dict(zip(every, evaluate(every, model, samples, vector, coefficient, **options)))
    _check_effect(results[every[0]], metrics[0])
    main = [results[x] for x in chosen]
    beside = [[(x, results[x]) for x in some] for some in control]
    return _curve(scores, chosen_sizes, chosen, main, metrics[0], metrics, setting, beside, draws)


def _sizes(graph: Graph, sizes: Sequence[int] | None) -> list[int]:
    """Ascending sizes without repetition."""
    if sizes is None:
        sizes = [max(1, round(share * graph.n_edges)) for share in SHARES]
    checked = sorted({circuit_search.check_size(graph, n, "sizes") for n in sizes})
    if not checked or checked[0] < 1:
        raise ValueError("sizes must hold at least one number, each from 1 on")
    return checked


def _random_circuits(graph: Graph, sizes: Sequence[int], n: int, seed: int) -> list[list[Circuit]]:
    """For each size n random circuits of twice the size, none where the graph is smaller."""
    growths = [
        circuit_search.Growth(graph, circuit_search.random_order(graph, seed + r)) for r in range(n)
    ]

    def circuit(r: int, size: int) -> Circuit:
        meta = {"method": "random", "n": size, "seed": seed + r}
        return Circuit(graph, growths[r].edges(size), meta=meta)

    return [[circuit(r, 2 * size) for r in range(n) if 2 * size <= graph.n_edges] for size in sizes]


def halves_of(
    scores: EdgeScores, samples: Sequence[Sample], seed: int
) -> tuple[list[int], list[int]]:
    """Two halves of the samples that have metric positions, drawn by the seed: ascending indices,
    of which the first list has one more where their number is odd.

    Raises ValueError without scores of each of these samples, and for fewer than two of them.
    """
    weights = scores.weights
    if scores.sample_edges is None or weights is None:
        raise ValueError(
            "halves=True needs scores of each sample: make them with attribute(...,"
            " per_sample=True)"
        )
    if len(weights) != len(samples):
        raise ValueError(
            "halves=True needs the samples that were scored: the scores hold"
            f" {len(weights)}, given are {len(samples)}"
        )
    stated = scores.settings.get("samples_hash")
    if stated and stated != samples_hash(samples):
        raise ValueError(
            "halves=True needs the samples that were scored, in the same order; these are others"
        )
    used = np.flatnonzero(weights > 0)
    if used.size < 2:
        raise ValueError(
            f"halves=True needs at least two samples with metric positions, not {used.size}"
        )
    shuffled = np.random.default_rng(seed).permutation(used)
    middle = (used.size + 1) // 2
    return sorted(shuffled[:middle].tolist()), sorted(shuffled[middle:].tolist())
