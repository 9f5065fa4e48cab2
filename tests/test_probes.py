"""Linear probes: fits against their definitions, and readings of a model."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs


@pytest.fixture
def classes(rng):
    y = np.arange(60) % 2
    X = rng.standard_normal((60, 9))
    X[:, 3] += 1.5 * (2 * y - 1)
    return X, y


@pytest.mark.parametrize("l2", [0.1, 1.0, 30.0])
def test_the_logistic_fit_is_where_the_gradient_vanishes(classes, l2):
    X, y = classes
    probe = vs.probes.fit(X, y, l2=l2)
    p = 1 / (1 + np.exp(-probe.score(X)))
    gradient = X.T @ (p - y) + l2 * probe.direction
    assert np.abs(gradient).max() < 1e-8 and abs((p - y).sum()) < 1e-8


def test_more_dimensions_than_samples(rng):
    X, y = rng.standard_normal((12, 300)), np.arange(12) % 2
    probe = vs.probes.fit(X, y, l2=0.5)
    p = 1 / (1 + np.exp(-probe.score(X)))
    assert np.abs(X.T @ (p - y) + 0.5 * probe.direction).max() < 1e-8
    assert probe.train_accuracy == 1


def test_the_mean_probe_is_the_difference_of_the_means(classes):
    X, y = classes
    probe = vs.probes.fit(X, y, method="mean")
    pos, neg = X[y == 1].mean(0), X[y == 0].mean(0)
    np.testing.assert_allclose(probe.direction, pos - neg)
    assert probe.score(pos) == pytest.approx(-probe.score(neg))


def test_cross_validation_holds_samples_out(rng):
    """On noise a probe fits its own samples and not those that it has not seen."""
    X, y = rng.standard_normal((80, 200)), np.arange(80) % 2
    probe = vs.probes.fit(X, y)
    assert probe.train_accuracy == 1 and 0.25 < probe.accuracy < 0.75
    assert vs.probes.fit(X, y).accuracy == probe.accuracy  # the same seed


def test_separate_classes_are_told_apart(classes):
    X, y = classes
    for method in ("logistic", "mean"):
        probe = vs.probes.fit(X, y, method=method)
        assert probe.accuracy > 0.85 and int(np.abs(probe.direction).argmax()) == 3
    assert np.isnan(vs.probes.fit(X[:3], [0, 1, 1]).accuracy)  # one sample of a class


def test_reading_gives_a_score_for_every_token(zoo, rng):
    model = zoo.engine("llama3")
    probe = vs.probes.fit(rng.standard_normal((8, model.config.d_model)), np.arange(8) % 2)
    prompts, site = [[5, 9, 7, 30], [8, 2]], "blocks.1.hook_resid_mid"
    reading = probe.read(model, prompts, site)
    for tokens, scores in zip(prompts, reading, strict=True):
        h = model.run(tokens, capture=[site], logits=None)[site][0]
        assert scores.tolist() == probe.score(h).tolist() and scores.shape == (len(tokens),)
    page = reading._repr_html_()
    assert page.count("<span") == 6 and page.count("<div") == 2
    assert len(reading.plot(1).axes[0].patches) == 2
    other = vs.probes.Reading((np.array([1.0, -2.0]),), (("$x", "$\n"),), site)
    other.plot().canvas.draw()  # dollar signs would begin mathematics
    with pytest.raises(ValueError, match="one site of width"):
        probe.read(model, prompts, "blocks.1.attn.hook_q")


@pytest.mark.parametrize(
    "X, y, options, message",
    [
        (np.ones((3, 2)), [0, 1], {}, r"X must be \[n, D\]"),
        (np.full((2, 2), np.inf), [0, 1], {}, "not finite"),
        (np.ones((2, 2)), [0, 2], {}, "0 and 1 only"),
        (np.ones((2, 2)), [1, 1], {}, "one class only"),
        (np.ones((2, 2)), [0, 1], dict(method="svm"), "method must be"),
        (np.ones((2, 2)), [0, 1], dict(l2=0), "l2 must be"),
    ],
)
def test_refusals(X, y, options, message):
    with pytest.raises(ValueError, match=message):
        vs.probes.fit(X, y, **options)
