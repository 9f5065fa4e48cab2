"""Predictors of reliability: formulas on made activations, and the screen on a model."""

from __future__ import annotations

import math

import numpy as np
import pytest

import vksteer as vs
from vksteer.reliability import predictors


def brute(pos, neg, bins=50):
    """The same quantities written down directly, pair by pair."""
    d = pos - neg
    v = d.mean(0)
    cos = lambda a, b: float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    n = len(d)
    middle = (pos.mean(0) + neg.mean(0)) / 2
    kp, kn = ([2 * float((a - middle) @ v) / float(v @ v) for a in side] for side in (pos, neg))
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a in kp for b in kn]
    edges = np.linspace(min(kp + kn), max(kp + kn), bins + 1)
    shares = [np.histogram(k, bins=edges)[0] / n for k in (kp, kn)]
    return {
        "mean_cosine": np.mean([cos(x, v) for x in d]),
        "pairwise_cosine": np.mean([cos(d[i], d[k]) for i in range(n) for k in range(i)]),
        "d_prime": (np.mean(kp) - np.mean(kn)) / math.sqrt((np.var(kp) + np.var(kn)) / 2),
        "overlap": np.minimum(*shares).sum(),
        "auc": np.mean(wins),
        "norm_ratio": np.linalg.norm(v) / np.mean(np.linalg.norm(d, axis=1)),
    }, (kp, kn)


@pytest.fixture
def pairs(rng):
    base = rng.standard_normal((40, 17))
    return base + 0.7 + 0.5 * rng.standard_normal((40, 17)), base


def test_predictors_equal_the_formulas(pairs):
    found = predictors(*pairs)
    expected, (kp, kn) = brute(*pairs)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-10), name
    # class means lie at +1 and -1 by construction
    assert np.mean(kp) == pytest.approx(1, abs=1e-12) and np.mean(kn) == pytest.approx(
        -1, abs=1e-12
    )
    assert found["n"] == 40 and found["n_undefined"] == 0 and found["flags"] == ()
    assert 0.9 < found["stability_mean"] < 1 and 0 < found["stability_sd"] < 0.1


def test_leave_one_out_takes_the_mean_of_the_others(pairs):
    pos, neg = pairs
    d = pos - neg
    expected = []
    for i in range(len(d)):
        others = np.delete(d, i, axis=0).mean(0)
        expected.append(d[i] @ others / np.linalg.norm(d[i]) / np.linalg.norm(others))
    found = predictors(pos, neg, leave_one_out=True)
    assert found["mean_cosine"] == pytest.approx(np.mean(expected), abs=1e-12)
    assert found["mean_cosine"] < predictors(pos, neg)["mean_cosine"]


def test_results_do_not_depend_on_the_order_of_the_samples(pairs, rng):
    pos, neg = pairs
    order = rng.permutation(len(pos))
    assert predictors(pos[order], neg[order]) == predictors(pos, neg)


def test_d_prime_does_not_depend_on_the_scale_of_the_vector_or_on_a_shift(pairs):
    pos, neg = pairs
    first = predictors(pos, neg)["d_prime"]
    assert predictors(3 * pos, 3 * neg)["d_prime"] == pytest.approx(first, rel=1e-12)
    assert predictors(pos + 5, neg + 5)["d_prime"] == pytest.approx(first, rel=1e-12)


def test_gaussians_of_known_separation():
    """The d prime is the separation over the standard deviation, and AUC = Phi(d' / sqrt 2)."""
    rng = np.random.default_rng(3)
    n, apart, sd = 100_000, 1.5, 0.8
    pos, neg = (rng.normal(m, sd, (n, 1)) for m in (apart, 0.0))
    found = predictors(pos, neg)
    error = math.sqrt(2 / n + (apart / sd) ** 2 / (4 * n))  # standard error of d'
    assert abs(found["d_prime"] - apart / sd) < 4 * error
    auc = 0.5 * (1 + math.erf(found["d_prime"] / 2))
    assert found["auc"] == pytest.approx(auc, abs=4 * 0.5 / math.sqrt(n))


def test_overlap_of_equal_and_of_separate_samples(rng):
    x = rng.standard_normal((30, 1))
    both = np.concatenate([x, x])
    # the same values in another order, and one pair that differs, so that there is a vector
    shuffled = both[rng.permutation(60)]
    shuffled[0] += 1e-9
    assert predictors(both, shuffled)["overlap"] > 0.95
    assert predictors(x + 100, x)["overlap"] == 0
    assert predictors(x + 100, x)["auc"] == 1


def test_undefined_cases_are_said(rng):
    pos = rng.standard_normal((6, 3))
    neg = pos.copy()
    neg[1:] -= rng.standard_normal((5, 3))
    found = predictors(pos, neg)
    assert found["n_undefined"] == 1 and np.isfinite(found["mean_cosine"])
    constant = predictors(np.ones((4, 3)), np.zeros((4, 3)))
    assert constant["d_prime"] == math.inf and "infinite" in constant["flags"][0]
    assert constant["mean_cosine"] == pytest.approx(1) and constant["auc"] == 1
    # seven times 0.1 is not 0.7 in float64: the means round, and the variance is about 1e-33
    rounded = predictors(np.full((7, 3), 0.1), np.full((7, 3), [0.3, 0.7, 0.5]))
    assert rounded["d_prime"] == math.inf and "infinite" in rounded["flags"][0]


#: The means of any order of these rows differ by rounding alone.
SHUFFLED = np.random.default_rng(3).standard_normal((5, 4))


@pytest.mark.parametrize(
    "pos, neg, message",
    [
        (np.ones((1, 3)), np.zeros((1, 3)), "at least 2 pairs"),
        (np.ones((3, 3)), np.ones((3, 3)), "have equal means"),
        (SHUFFLED, SHUFFLED[[2, 0, 4, 1, 3]], "have equal means"),
        (np.ones((3, 3)), np.zeros((4, 3)), "must be pairs"),
        (np.ones(3), np.zeros(3), r"\[samples, width\]"),
        (np.full((3, 3), np.nan), np.zeros((3, 3)), r"a_pos\[0\] holds values"),
    ],
)
def test_refusals(pos, neg, message):
    with pytest.raises(ValueError, match=message):
        predictors(pos, neg)


def test_screen_equals_predictors_of_captures(zoo, rng):
    model = zoo.engine("llama3")
    positive = [rng.integers(3, 200, n).tolist() for n in (9, 5, 12, 7)]
    negative = [rng.integers(3, 200, n).tolist() for n in (6, 8, 5, 11)]
    table = vs.reliability.screen(model, positive, negative, positions=(-2, -1), progress=False)
    assert len(table) == 2 * model.config.n_layers
    for layer, position in ((0, -1), (2, -2)):
        site = f"blocks.{layer}.hook_resid_pre"
        sides = [
            np.stack([model.run(p, capture=[site], logits=None)[site][0, position] for p in side])
            for side in (positive, negative)
        ]
        expected, row = predictors(*sides), table[layer, position]
        for name in ("mean_cosine", "pairwise_cosine", "d_prime", "overlap", "auc"):
            assert getattr(row, name) == expected[name], name
    assert table.best.mean_cosine == np.nanmax(table.column("mean_cosine"))
    assert "likely" in table.to_markdown() and table.to_dict()["rows"][0]["verdict"]
    figure = table.plot()
    assert len(figure.axes[0].lines) == 2 * 2 + 2


def test_screen_says_where_classes_do_not_differ(zoo):
    model = zoo.engine("llama3")
    # the last token decides resid_pre of layer 0: with the same one the classes are equal there
    table = vs.reliability.screen(
        model, [[5, 9, 7], [8, 2, 7]], [[4, 1, 7], [3, 2, 7]], progress=False
    )
    assert table[0, -1].note == "equal means" and table[0, -1].verdict == "undefined"
    assert np.isfinite(table[1, -1].mean_cosine)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(negative=[[1, 2]]), "are pairs: 2 and 1"),
        (dict(positive=[[1, 2]], negative=[[2, 3]]), "at least 2 pairs"),
        (dict(positions=(0,)), "count back"),
        (dict(positions=(-3,)), "reaches before its start"),
        (dict(layers=[99]), "99 is no layer"),
        (dict(bins=0), "bins"),
    ],
)
def test_screen_refuses_before_work(zoo, arguments, message):
    given = dict(positive=[[1, 2], [3, 4]], negative=[[2, 3], [5, 6]]) | arguments
    with pytest.raises(ValueError, match=message):
        vs.reliability.screen(zoo.engine("llama3"), **given, progress=False)
