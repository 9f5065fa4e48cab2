"""Faithful circuits of smallest size and faithfulness curves, on a scripted evaluation."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from small_circuits import SMALL
from vksteer import circuits
from vksteer.circuits import curve as curves
from vksteer.circuits import faithfulness
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.graph import Graph
from vksteer.circuits.search import (
    METHODS,
)
from vksteer.errors import ModelError
from vksteer.inputs.samples import Sample
from vksteer.inputs.vectors import SteeringVector
from vksteer.patching.edge_scores import EdgeScores

# -- a scripted evaluation -------------------------------------------------------------------------


class Result(SimpleNamespace):
    @property
    def faithfulness(self):
        return (self.value - self.empty) / (self.full - self.empty)


class Runs(ModuleType):
    """In place of `vksteer.circuits.runs`: every edge carries a known part of the effect on each
    sample, and value = the sum over the edges of the circuit.
    """

    def __init__(self, effects):
        super().__init__("vksteer.circuits.runs")
        self.effects, self.calls = np.asarray(effects, float), []  # [n_samples, E]

    def evaluate(self, some, model, samples, vector, coefficient, *, metrics, progress, **options):
        self.calls.append(
            SimpleNamespace(n=len(some), samples=list(samples), options=options, metrics=metrics)
        )
        effects, weight = (
            self.effects[[s.prompt_tokens[0] for s in samples]],
            np.array([float(s.response_tokens[0]) for s in samples]),
        )
        out = []
        for c in some:
            value, full = effects[:, c.edges].sum(1) - 2.0, effects.sum(1) - 2.0
            pool = lambda x: float(weight @ x / weight.sum())
            empty = np.full(len(samples), -2.0)
            out.append(
                {
                    m: Result(
                        value=pool(value),
                        full=pool(full),
                        empty=pool(empty),
                        per_sample=dict(value=value, full=full, empty=empty, weight=weight),
                    )
                    for m in metrics
                }
            )
        return out


CONFIG = SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=2, d_model=6, d_vocab=50, n_ctx=20)
VECTOR = SteeringVector(np.ones(6), 1)
MODEL = SimpleNamespace(config=CONFIG, fingerprint="model")
# The first token of the prompt numbers the sample, the first of the response is its weight.
SAMPLES = [Sample([i, 1], [w, 3]) for i, w in enumerate([4, 1, 2, 5, 3, 2, 2, 1])]


@pytest.fixture
def runs(monkeypatch, rng):
    effects = rng.random((len(SAMPLES), SMALL.n_edges)) * np.linspace(1, 0.1, SMALL.n_edges)
    module = Runs(effects)
    monkeypatch.setattr("vksteer.circuits.runs.evaluate", module.evaluate)
    return module


@pytest.fixture
def scores(runs):
    weights = np.array([s.response_tokens[0] for s in SAMPLES])
    return EdgeScores(
        SMALL,
        weights @ runs.effects / weights.sum(),
        weights=weights,
        sample_edges=runs.effects,
        provenance={"model_hash": "model"},
    )


def test_evaluate_hands_on(runs):
    full, some = Circuit(SMALL, np.ones(SMALL.n_edges, bool)), circuits.random(SMALL, 20, 0)
    out = circuits.evaluate(
        [full, some, Circuit(SMALL)],
        MODEL,
        SAMPLES,
        VECTOR,
        1.0,
        ("logit_diff", "kl"),
        progress=False,
        max_memory=5,
    )
    assert [round(r["kl"].faithfulness, 9) for r in out][::2] == [1, 0] and 0 < out[1][
        "logit_diff"
    ].faithfulness < 1
    assert runs.calls[0].options == {"max_memory": 5}
    assert (
        some.evaluate(MODEL, SAMPLES, VECTOR, 1.0)["logit_diff"].faithfulness
        == out[1]["logit_diff"].faithfulness
    )
    assert circuits.evaluate([], MODEL, SAMPLES, VECTOR, 1.0) == []


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(circuits=[Circuit(Graph(3, 4, 2, 0), [0])]), "another graph"),
        (dict(vector=SteeringVector(np.ones(6), 2)), "another graph"),
        (dict(circuits=[{1}]), r"circuits\[0\]"),
        (dict(samples=[]), "empty"),
        (dict(samples=[Sample([1], [60])]), "vocabulary"),
        (dict(samples=[([1], [2])]), "not a Sample"),
        (dict(samples=[Sample([1] * 15, [1] * 6)]), "context"),
        (dict(metrics=("accuracy",)), "accuracy"),
        (dict(vector=SteeringVector(np.ones(5), 1)), "width"),
    ],
)
def test_evaluate_refuses_before_any_work(runs, change, says):
    arguments = (
        dict(
            circuits=[Circuit(SMALL, [0])],
            model=MODEL,
            samples=SAMPLES,
            vector=VECTOR,
            coefficient=1.0,
        )
        | change
    )
    with pytest.raises(ValueError, match=says):
        circuits.evaluate(**arguments)
    assert not runs.calls


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.85, 0.99, 1.0])
def test_minimum_faithful_is_the_smallest(runs, scores, method, threshold):
    c = circuits.minimum_faithful(
        scores, MODEL, SAMPLES, VECTOR, -1.0, threshold, method=method, progress=False
    )
    share = lambda circuit: (
        circuits.evaluate([circuit], MODEL, SAMPLES, VECTOR, -1.0)[0]["logit_diff"].faithfulness
    )
    # Here faithfulness grows with every edge, so that a scan over all sizes must agree.
    n = next(
        n
        for n in range(1, SMALL.n_edges + 1)
        if share(scores.circuit(n, method)) >= threshold
        or len(scores.circuit(n, method)) == SMALL.n_edges
    )
    assert (
        c == scores.circuit(n, method)
        and c.meta["n"] == n
        and c.meta["faithfulness"] == pytest.approx(share(c))
    )
    assert c.meta["threshold"] == threshold
    sizes = faithfulness.grid(SMALL.n_edges)
    at = next(i for i, size in enumerate(sizes) if size >= n)
    # without the whole grid, it is run up to the pass in which the threshold is reached
    passes = faithfulness.passes_of_grid(len(sizes))
    run = next(some.stop for some in passes if at in some)
    part = circuits.minimum_faithful(
        scores, MODEL, SAMPLES, VECTOR, -1.0, threshold, method=method, whole_grid=False,
        progress=False,
    )  # fmt: skip
    assert part == c and part.meta == c.meta
    for curve, most in ((c.curve, len(sizes)), (part.curve, run)):
        assert {*sizes[:most]} <= {*curve.sizes.tolist()} and max(curve.sizes) == sizes[most - 1]
        assert n in curve.sizes and (np.diff(curve.sizes) > 0).all()
        assert curve.smallest(min(threshold, 1 - 1e-9)) == n
    assert c.curve.faithfulness[-1] == pytest.approx(1)


def test_passes_of_a_grid():
    assert [len(some) for some in faithfulness.passes_of_grid(100)] == [8, 8, 16, 32, 36]
    assert [*faithfulness.passes_of_grid(5)] == [range(5)]
    assert [i for some in faithfulness.passes_of_grid(77) for i in some] == [*range(77)]


@pytest.mark.parametrize("whole", [True, False])
def test_minimum_faithful_bisects_inside_the_step(monkeypatch, whole):
    """Against a bisection written out here. The grid is evaluated in one pass, or in passes until
    one holds the size, and each further pass takes three levels of the bisection.
    """
    g = Graph(12, 4, 2, 0)
    rng = np.random.default_rng(1)
    module = Runs(np.abs(rng.standard_normal((1, g.n_edges))))
    monkeypatch.setattr("vksteer.circuits.runs.evaluate", module.evaluate)
    model, sample = (
        SimpleNamespace(config=SimpleNamespace(**{**vars(CONFIG), "n_layers": 12})),
        [Sample([0], [1])],
    )
    scores = EdgeScores(g, module.effects[0], n_positions=1)
    c = circuits.minimum_faithful(
        scores, model, sample, SteeringVector(np.ones(6), 0), 1.0, 0.6, method="top",
        whole_grid=whole, progress=False,
    )  # fmt: skip
    n_calls = [call.n for call in module.calls]
    carried = lambda n: scores.circuit(n, "top").mask @ module.effects[0] / module.effects[0].sum()
    grid = faithfulness.grid(g.n_edges)
    high = top = next(n for n in grid if carried(n) >= 0.6)
    low = grid[grid.index(high) - 1]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if carried(middle) >= 0.6 else (middle, high)
    passes = [len(some) for some in faithfulness.passes_of_grid(100) if some[0] <= grid.index(top)]
    passes = [100] if whole else passes
    assert len(c) == high and n_calls[: len(passes)] == passes
    assert all(n <= 7 for n in n_calls[len(passes) :]) and len(n_calls) <= len(passes) + 3


@pytest.mark.parametrize(
    "n_edges, step, want",
    [
        (100, 0.01, list(range(1, 101))),
        (8790, 0.01, None),
        (7, 0.01, list(range(1, 8))),
        (10, 0.3, [3, 6, 9, 10]),
        (5, 1, [5]),
    ],
)
def test_grid(n_edges, step, want):
    got = faithfulness.grid(n_edges, step)
    assert (
        got == want
        if want
        else (got[0] == 88 and got[9] == 879 and got[-1] == 8790 and len(got) == 100)
    )
    with pytest.raises(ValueError, match="step"):
        faithfulness.grid(10, 0)


def test_minimum_faithful_refuses(runs, scores):
    for threshold in (0, 1.1, "x", True, np.nan):
        with pytest.raises(ValueError, match="threshold"):
            circuits.minimum_faithful(scores, MODEL, SAMPLES, VECTOR, 1.0, threshold)
    other = EdgeScores(
        SMALL, scores.edges, n_positions=1, provenance={"model_hash": "other", "model": "m"}
    )
    with pytest.raises(ValueError, match="another model"):
        circuits.minimum_faithful(other, MODEL, SAMPLES, VECTOR, 1.0)
    with pytest.raises(ValueError, match="another graph"):
        circuits.minimum_faithful(scores, MODEL, SAMPLES, SteeringVector(np.ones(6), 0), 1.0)
    assert not runs.calls
    runs.effects[:] = 0
    with pytest.raises(ValueError, match="changes nothing"):
        circuits.minimum_faithful(scores, MODEL, SAMPLES, VECTOR, 1.0)


def test_none_reaches(runs, scores, monkeypatch):
    low = lambda some, *a, **k: [
        {
            "logit_diff": SimpleNamespace(
                value=0.1 * len(c) / SMALL.n_edges,
                full=1.0,
                empty=0.0,
                faithfulness=0.1 * len(c) / SMALL.n_edges,
            )
        }
        for c in some
    ]
    monkeypatch.setattr("vksteer.circuits.runs.evaluate", low)
    with pytest.raises(ValueError, match=r"no circuit reaches 0.85.*0.100"):
        circuits.minimum_faithful(scores, MODEL, SAMPLES, VECTOR, 1.0)


# -- the curve -------------------------------------------------------------------------------------


def test_curve(runs, scores, tmp_path):
    curve = circuits.faithfulness_curve(
        scores,
        MODEL,
        SAMPLES,
        VECTOR,
        1.0,
        metrics=("logit_diff", "kl"),
        random=2,
        bootstrap=400,
        progress=False,
    )
    assert (
        len(runs.calls) == 1
        and (np.diff(curve.sizes) > 0).all()
        and curve.sizes[-1] == SMALL.n_edges == curve.n_edges
    )
    weight = np.array([s.response_tokens[0] for s in SAMPLES])
    for n, edges, share, low, high in zip(
        curve.sizes, curve.edges, curve.faithfulness, curve.low, curve.high
    ):
        c = scores.circuit(int(n))
        assert edges == len(c) and share == pytest.approx(
            (weight @ runs.effects[:, c.edges].sum(1)) / (weight @ runs.effects.sum(1))
        )
        assert low <= share <= high and (high - low < 0.3)
    fits = 2 * curve.sizes <= SMALL.n_edges
    assert (
        np.isfinite(curve.random[fits]).all()
        and np.isnan(curve.random[~fits]).all()
        and (curve.random_edges[fits] >= 2 * curve.sizes[fits, None]).all()
    )
    np.testing.assert_array_equal(curve.values["kl"]["faithfulness"], curve.faithfulness)
    assert (
        curve.setting["n_samples"] == 8
        and curve.setting["samples_hash"]
        and [len(c) for c in curve.circuits] == curve.edges.tolist()
    )
    text = curve.to_markdown()
    assert (
        "random, twice the size" in text
        and "95 % bootstrap" in text
        and text.count("\n") == len(curve) + 3
        and repr(curve) == text
    )
    json.dumps(curve.to_dict(), allow_nan=False)
    curve.save(tmp_path / "curve.json")
    again = circuits.FaithfulnessCurve.load(tmp_path / "curve.json")
    for name in ("sizes", "edges", "faithfulness", "low", "high", "random", "random_edges"):
        np.testing.assert_array_equal(getattr(again, name), getattr(curve, name))
    assert again.to_markdown() == text and again.to_dict() == curve.to_dict()
    (tmp_path / "curve.json").write_text(
        (tmp_path / "curve.json").read_text().replace('"n_edges": ', '"n_edges": 1')
    )
    with pytest.raises(ModelError, match="checksum"):
        circuits.FaithfulnessCurve.load(tmp_path / "curve.json")


def test_curve_is_kept_with_a_circuit(runs, scores, tmp_path):
    c = circuits.minimum_faithful(scores, MODEL, SAMPLES, VECTOR, 1.0, progress=False)
    c.save(tmp_path / "c.json")
    again = Circuit.load(tmp_path / "c.json")
    assert again == c and again.curve.to_dict() == c.curve.to_dict() and again.meta == c.meta


def test_curve_on_halves(runs, scores):
    curve = circuits.faithfulness_curve(
        scores,
        MODEL,
        SAMPLES,
        VECTOR,
        1.0,
        sizes=[5, 20],
        random=1,
        halves=True,
        seed=3,
        progress=False,
    )
    first, second = curve.setting["found_on"], curve.setting["judged_on"]
    assert (
        sorted(first + second) == list(range(8))
        and len(first) == 4
        and [s.prompt_tokens[0] for s in runs.calls[0].samples] == second
    )
    weight = np.array([SAMPLES[i].response_tokens[0] for i in first])
    np.testing.assert_allclose(
        scores.of_samples(first).edges, weight @ runs.effects[first] / weight.sum()
    )
    assert (
        curve.circuits[0] == scores.of_samples(first).circuit(5)
        and "found on 4, judged on 4" in curve.to_markdown()
    )
    assert (
        circuits.faithfulness_curve(
            scores, MODEL, SAMPLES, VECTOR, 1.0, sizes=[5], halves=True, seed=4, progress=False
        ).setting["found_on"]
        != first
    )
    for bad, says in (
        (EdgeScores(SMALL, scores.edges, n_positions=1), "per_sample"),
        (scores.of_samples(range(5)), "hold 5, given are 8"),
    ):
        with pytest.raises(ValueError, match=says):
            circuits.faithfulness_curve(bad, MODEL, SAMPLES, VECTOR, 1.0, halves=True)
    stated = EdgeScores(
        SMALL,
        scores.edges,
        weights=scores.weights,
        sample_edges=scores.sample_edges,
        settings={"samples_hash": "x"},
    )
    with pytest.raises(ValueError, match="others"):
        circuits.faithfulness_curve(stated, MODEL, SAMPLES, VECTOR, 1.0, halves=True)


@pytest.mark.parametrize(
    "options, says",
    [
        (dict(sizes=[0]), "from 1 on"),
        (dict(sizes=[]), "at least one"),
        (dict(sizes=[10**6]), "more than"),
        (dict(random=-1), "random"),
        (dict(metrics=()), "metrics"),
        (dict(method="best"), "method"),
        (dict(bootstrap=1.5), "bootstrap"),
    ],
)
def test_curve_refuses(runs, scores, options, says):
    with pytest.raises(ValueError, match=says):
        circuits.faithfulness_curve(scores, MODEL, SAMPLES, VECTOR, 1.0, progress=False, **options)
    assert not runs.calls


def test_bootstrap_pools_before_it_divides(rng):
    n = 30
    weight, full = rng.integers(1, 9, n), rng.standard_normal(n) + 3
    value = 0.7 * full + 0.1 * rng.standard_normal(n)
    per_sample = dict(value=value, full=full, empty=np.zeros(n), weight=weight)
    low, high = curves.bootstrap(per_sample, 4000, 0.9, seed=1)
    drawn = []
    for _ in range(4000):
        i = rng.integers(0, n, n)
        drawn.append((weight[i] @ value[i]) / (weight[i] @ full[i]))
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.05, 0.95])), abs=4e-3)
    assert (low, high) == curves.bootstrap(per_sample, 4000, 0.9, seed=1)
    # Samples without metric positions do not count, whatever their values.
    more = {name: np.append(x, 0 if name == "weight" else np.nan) for name, x in per_sample.items()}
    assert curves.bootstrap(more, 4000, 0.9, seed=1) == (low, high) and curves.pooled(
        more
    ) == curves.pooled(per_sample)
    assert np.isnan(curves.bootstrap({name: x[:1] for name, x in per_sample.items()})).all()
    assert np.isnan(curves.bootstrap(per_sample | {"full": np.zeros(n)}, 50)).all()


def test_curve_picture(runs, scores, tmp_path):
    curve = circuits.faithfulness_curve(scores, MODEL, SAMPLES, VECTOR, 1.0, progress=False)
    curve.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    circuits.minimum_faithful(scores, MODEL, SAMPLES, VECTOR, 1.0, progress=False).curve.plot(
        threshold=None
    )
