"""How far the circuits of several vectors agree: overlaps with intervals, and beside them how far
the circuit of one vector agrees with itself on other samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from ..base.types import Array, IntArray
from ..circuits.faithfulness import halves_of
from ..circuits.search import Growth
from ..inputs.samples import Samples
from ..patching.edge_scores import EdgeScores

#: Fewest samples of a vector for which intervals are made.
LEAST_SAMPLES = 8
#: Draws of prompts with replacement.
DRAWS = 200
CONFIDENCE = 0.95

Compared = Mapping[str, tuple[EdgeScores, Samples]]


def agreement(found: Compared, seed: int) -> dict[str, Any]:
    """Overlaps of the circuits of a tenth of the edges of every two vectors.

    found: scores with those of each sample, and the samples, by vector; all made from one list of
    prompts. Returns {"why"} for fewer than two vectors or fewer than 8 samples of one; otherwise
    {"pairs": [[first, second, overlap, low, high]], "own": {name: overlap of the circuits of the
    vector's two halves of samples}, "chance": the overlap of two random sets of edges, "samples",
    "draws"}. The intervals are Student's with the standard deviation over draws of prompts with
    replacement, the same prompts for all vectors (Efron 1979), and hold for all pairs together with
    95 % (Bonferroni). Percentiles of the draws would lie too low: a draw holds fewer different
    prompts, so its circuits agree less.
    """
    if len(found) < 2:
        return {"why": "fewer than two vectors have edge scores"}
    samples = {name: int((_weights(scores) > 0).sum()) for name, (scores, _) in found.items()}
    if min(samples.values()) < LEAST_SAMPLES:
        return {
            "why": f"{min(samples.values())} samples of one vector: intervals need {LEAST_SAMPLES}"
        }
    pairs = list(itertools.combinations(found, 2))
    drawn = _drawn(found, pairs, seed)
    wide = _student(1 - (1 - CONFIDENCE) / 2 / len(pairs), min(samples.values()))
    whole = {name: _tenth(scores, _weights(scores)) for name, (scores, _) in found.items()}
    rows = []
    for (a, b), spread in zip(pairs, wide * drawn.std(axis=0, ddof=1), strict=True):
        value = _overlap(whole[a], whole[b])
        rows.append([a, b, value, max(0.0, value - spread), min(1.0, value + spread)])
    first, _ = next(iter(found.values()))
    return {
        "pairs": rows,
        "own": {name: _own(*both, seed) for name, both in found.items()},
        "chance": _size(first) / first.graph.n_edges,
        "samples": samples,
        "draws": len(drawn),
    }


def _student(level: float, n: int) -> float:
    """The quantile of Student's distribution for n samples, times sqrt(n / (n - 1)), by which a
    bootstrap's standard deviation is too small (expansion 26.7.5 of Abramowitz and Stegun).
    """
    z, v = NormalDist().inv_cdf(level), n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return t * math.sqrt(n / v)


def _size(scores: EdgeScores) -> int:
    return max(1, scores.graph.n_edges // 10)


def _weights(scores: EdgeScores) -> IntArray:
    """The samples' numbers of metric positions."""
    assert scores.weights is not None
    return scores.weights


def _tenth(scores: EdgeScores, weights: Array) -> IntArray:
    """Ascending edges of the circuit by the samples' mean with these weights."""
    assert scores.sample_edges is not None
    edges = np.asarray(weights, np.float64) @ scores.sample_edges
    return Growth.of(scores.graph, edges, "pruned").edges(_size(scores))


def _overlap(a: IntArray, b: IntArray) -> float:
    """Shared edges over those of the smaller set."""
    return len(np.intersect1d(a, b, assume_unique=True)) / min(len(a), len(b))


def _own(scores: EdgeScores, samples: Samples, seed: int) -> float:
    """The overlap of the circuits of the two halves of a vector's samples."""
    weights, halves = _weights(scores), []
    for half in halves_of(scores, samples, seed):
        kept = np.zeros_like(weights)
        kept[half] = weights[half]
        halves.append(_tenth(scores, kept))
    return _overlap(*halves)


def _drawn(found: Compared, pairs: list[tuple[str, str]], seed: int) -> Array:
    """float64 [draws, pairs]: overlaps where prompts are drawn with replacement. A draw that leaves
    a vector without samples is left out.
    """
    rng = np.random.default_rng([seed, 11])
    prompts = sorted({int(i) for _, samples in found.values() for i in samples.index})
    rows = []
    for counts in rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), DRAWS):
        times = dict(zip(prompts, counts.tolist(), strict=True))
        weights = {
            name: _weights(scores) * [times[int(i)] for i in samples.index]
            for name, (scores, samples) in found.items()
        }
        if all(w.any() for w in weights.values()):
            sets = {name: _tenth(found[name][0], w) for name, w in weights.items()}
            rows.append([_overlap(sets[a], sets[b]) for a, b in pairs])
    return np.array(rows)
