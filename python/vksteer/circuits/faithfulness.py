"""How much of steering's effect circuits of each size carry, and the smallest one that carries
enough (method.md section 5).

Faithfulness = (m(C) - m(0)) / (m(M) - m(0)), m pooled over all metric positions of all samples
before the ratio. Intervals are bootstrap over samples: samples are drawn with replacement, pooled,
and only then divided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..base.provenance import digest
from ..inputs.samples import check_samples, samples_hash
from . import search as circuit_search
from .circuit import Circuit, evaluate
from .curve import THRESHOLD, FaithfulnessCurve, bootstrap, per_sample_of

#: Sizes of `faithfulness_curve` where none are named, as shares of all edges.
SHARES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0)
#: Levels of the bisection whose circuits are run in one pass: 2**n - 1 circuits over one base pass
#: cost little more than n over n passes.
AHEAD = 3


def _curve(
    scores, sizes, circuits, results, metric, metrics, setting, controls=None, draws=0
) -> FaithfulnessCurve:
    """From what `evaluate` gave: results[i] belongs to circuits[i]; controls[i] is a list of
    (circuit, result) or absent.
    """
    main = [r[metric] for r in results]
    intervals = [
        (
            bootstrap(p, draws, setting.get("confidence", 0.95), setting.get("seed", 0))
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


def _setting(scores, model, samples, vector, coefficient, **more) -> dict[str, Any]:
    return {
        "n_samples": len(samples),
        "coefficient": float(coefficient),
        "layer": vector.layer,
        "vector_hash": digest(vector.direction),
        "samples_hash": samples_hash(samples),
        "model_hash": scores.provenance.get("model_hash"),
        "scores_vector_hash": scores.provenance.get("vector_hash"),
        **more,
    }


def _changes(results, metric):
    """ValueError where there is nothing to be faithful to."""
    r = results[0][metric]
    if not math.isfinite(r.full - r.empty) or r.full == r.empty:
        raise ValueError(
            f"steering changes nothing on these samples: {metric} is {r.full:g} with all edges and"
            f" {r.empty:g} with none, so faithfulness is undefined"
        )


# -- the smallest circuit --------------------------------------------------------------------------


def grid(n_edges: int, step: float = 0.01) -> list[int]:
    """Sizes at every `step` of the edges, rounded up, the last one all edges."""
    if not 0 < step <= 1:
        raise ValueError(f"step must be a share above 0 and at most 1, not {step!r}")
    # 1e-9: 3 * 0.01 of 100 edges are 3, not 4
    return sorted(
        {
            min(n_edges, math.ceil(i * step * n_edges - 1e-9))
            for i in range(1, math.ceil(1 / step - 1e-9) + 1)
        }
        - {0}
    )


def _midpoints(low: int, high: int, levels: int) -> list[int]:
    """Every size that `levels` steps of a bisection between low and high could ask for."""
    if not levels or high - low < 2:
        return []
    middle = (low + high) // 2
    return [*_midpoints(low, middle, levels - 1), middle, *_midpoints(middle, high, levels - 1)]


def minimum_faithful(
    scores,
    model,
    samples,
    vector,
    coefficient,
    threshold: float = THRESHOLD,
    *,
    method: str = "pruned",
    metric: str = "logit_diff",
    step: float = 0.01,
    progress=True,
    **options,
):
    """The smallest circuit of `scores` that carries at least `threshold` of steering's effect: a
    Circuit, its `curve` kept.

    The smallest size of a fixed grid (`step` of the edges) that reaches it, all in one pass; then
    bisection between that size and the one before it, which supposes that faithfulness rises inside
    the one step. vector: may be another than the one that was scored, of the same layer. method: as
    in `scores.circuit`. options: for `vs.circuits.evaluate`.
    Raises ValueError before any work for scores of another model or graph, and a threshold outside
    (0, 1]; after it where steering changes nothing.
    """
    samples = _checked(scores, model, samples, vector, threshold)
    sizes = grid(scores.graph.n_edges, step)
    found: dict[int, tuple] = {}  # size -> (circuit, result)

    def measure(some):
        """Evaluates what is not known yet, each different circuit once."""
        wanted = {n: scores.circuit(n, method) for n in some if n not in found}
        known = {circuit: result for circuit, result in found.values()}
        new = [x for x in dict.fromkeys(wanted.values()) if x not in known]
        if new:
            known.update(
                zip(
                    new,
                    evaluate(
                        new,
                        model,
                        samples,
                        vector,
                        coefficient,
                        (metric,),
                        progress=progress,
                        **options,
                    ),
                )
            )
        found.update({n: (circuit, known[circuit]) for n, circuit in wanted.items()})

    def reaches(n):
        share = found[n][1][metric].faithfulness
        # All edges carry everything; a threshold of 1 is not to fail by rounding.
        return share >= threshold or (
            len(found[n][0]) == scores.graph.n_edges and abs(share - 1) < 1e-2
        )

    measure(sizes)
    _changes([found[sizes[-1]][1]], metric)
    at = next((i for i, n in enumerate(sizes) if reaches(n)), None)
    if at is None:
        best = max(sizes, key=lambda n: found[n][1][metric].faithfulness)
        raise ValueError(
            f"no circuit reaches {threshold:g} by {metric}: the best of {len(sizes)} has"
            f" {found[best][1][metric].faithfulness:.3f} ({best} edges)"
        )
    low, high = (sizes[at - 1] if at else 0), sizes[at]
    while high - low > 1:
        measure(_midpoints(low, high, AHEAD))
        for _ in range(AHEAD):
            if high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if reaches(middle) else (middle, high)
    order = sorted(found)
    setting = _setting(
        scores, model, samples, vector, coefficient, method=method, threshold=threshold, step=step
    )
    curve = _curve(
        scores,
        order,
        [found[n][0] for n in order],
        [found[n][1] for n in order],
        metric,
        (metric,),
        setting,
    )
    circuit = found[high][0]
    meta = {
        **circuit.meta,
        "n": high,
        "threshold": threshold,
        "metric": metric,
        "faithfulness": float(found[high][1][metric].faithfulness),
    }
    return Circuit(circuit.graph, circuit.edges, meta=meta, curve=curve)


def _checked(scores, model, samples, vector, threshold=THRESHOLD) -> list:
    if (
        isinstance(threshold, bool)
        or not isinstance(threshold, (int, float, np.number))
        or not 0 < threshold <= 1
    ):
        raise ValueError(f"threshold must be a share above 0 and at most 1, not {threshold!r}")
    vector.check(model)
    scores.check(model, layer=vector.layer)
    return check_samples(model, samples)


# -- the curve -------------------------------------------------------------------------------------


def faithfulness_curve(
    scores,
    model,
    samples,
    vector,
    coefficient,
    sizes: Sequence[int] | None = None,
    *,
    method: str = "pruned",
    metrics: Sequence[str] = ("logit_diff",),
    random: int = 3,
    bootstrap: int = 1000,
    confidence: float = 0.95,
    halves: bool = False,
    seed: int = 0,
    progress=True,
    **options,
) -> FaithfulnessCurve:
    """Faithfulness of the circuits of many sizes, random circuits of twice the size beside them,
    with bootstrap intervals: one call, one pass.

    sizes: numbers of edges (default: SHARES of them). metrics: the first is drawn, bootstrapped and
    compared with random circuits; others stand beside it. random: random circuits for each size (0:
    none). bootstrap: draws of samples (0: no intervals). halves: find the circuits on one half of
    the samples (drawn by `seed`) and judge them on the other; needs scores made with
    per_sample=True from the same samples in the same order. options: for `vs.circuits.evaluate`.
    Raises ValueError before any work for scores of another model or graph, bad sizes, and halves
    without per-sample scores.
    """
    samples = _checked(scores, model, samples, vector)
    E = scores.graph.n_edges
    if sizes is None:
        sizes = {max(1, round(share * E)) for share in SHARES}
    sizes = sorted({circuit_search.check_size(scores.graph, n, "sizes") for n in sizes})
    if not sizes or sizes[0] < 1:
        raise ValueError("sizes must hold at least one number, each from 1 on")
    n_random, draws, seed = (
        require_int(random, "random", 0),
        require_int(bootstrap, "bootstrap", 0),
        require_int(seed, "seed", 0),
    )
    metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    if not metrics:
        raise ValueError("metrics is empty: name at least one, for example 'logit_diff'")
    more = {
        "method": method,
        "seed": seed,
        "confidence": confidence,
        "bootstrap": draws,
        "halves": bool(halves),
    }
    if halves:
        first, second = _halves(scores, samples, seed)
        more |= {
            "found_on": first,
            "judged_on": second,
            "n_found_on": len(first),
            "n_judged_on": len(second),
        }
        scores, samples = scores.of_samples(first), [samples[i] for i in second]

    chosen = [scores.circuit(n, method) for n in sizes]
    growths = [
        circuit_search.Growth(scores.graph, circuit_search.random_order(scores.graph, seed + r))
        for r in range(n_random)
    ]
    control = [
        [
            Circuit(
                scores.graph,
                g.edges(2 * n),
                meta={"method": "random", "n": 2 * n, "seed": seed + r},
            )
            for r, g in enumerate(growths)
            if 2 * n <= E
        ]
        for n in sizes
    ]
    every = list(dict.fromkeys([*chosen, *(x for some in control for x in some)]))
    results = dict(
        zip(
            every,
            evaluate(
                every, model, samples, vector, coefficient, metrics, progress=progress, **options
            ),
        )
    )
    _changes(list(results.values()), metrics[0])
    setting = _setting(scores, model, samples, vector, coefficient, **more)
    return _curve(
        scores,
        sizes,
        chosen,
        [results[x] for x in chosen],
        metrics[0],
        metrics,
        setting,
        [[(x, results[x]) for x in some] for some in control],
        draws,
    )


def _halves(scores, samples, seed: int) -> tuple[list[int], list[int]]:
    """Two halves of the samples that have metric positions: ascending indices."""
    if scores.sample_edges is None:
        raise ValueError(
            "halves=True needs scores of each sample: make them with attribute(...,"
            " per_sample=True)"
        )
    if len(scores.weights) != len(samples):
        raise ValueError(
            "halves=True needs the samples that were scored: the scores hold"
            f" {len(scores.weights)}, given are {len(samples)}"
        )
    stated = scores.settings.get("samples_hash")
    if stated and stated != samples_hash(samples):
        raise ValueError(
            "halves=True needs the samples that were scored, in the same order; these are others"
        )
    used = np.flatnonzero(scores.weights > 0)
    if used.size < 2:
        raise ValueError(
            f"halves=True needs at least two samples with metric positions, not {used.size}"
        )
    shuffled = np.random.default_rng(seed).permutation(used)
    middle = (used.size + 1) // 2
    return sorted(shuffled[:middle].tolist()), sorted(shuffled[middle:].tolist())
