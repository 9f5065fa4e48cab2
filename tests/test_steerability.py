"""Steerability curves: what is read from them, and the batch that measures them."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from vksteer.reliability import Choice, Curves

LAMBDAS = np.array([-1.5, -1, -0.5, 0, 0.5, 1, 1.5])


def test_straight_lines_have_their_slopes():
    slopes = np.array([0.7, -0.2, 3.0])
    curves = Curves(LAMBDAS, 0.4 + np.outer(slopes, LAMBDAS))
    np.testing.assert_allclose(curves.slope, slopes, atol=1e-12)
    assert curves.residual.max() < 1e-24
    np.testing.assert_allclose(curves.spearman, [1, -1, 1], atol=1e-12)
    assert curves.anti_steerable == pytest.approx(1 / 3)
    assert curves.mean_slope == pytest.approx(slopes.mean())
    np.testing.assert_allclose(curves.normalised, 1 / (1 + np.exp(-curves.propensity)))


def test_slope_and_residual_are_those_of_least_squares(rng):
    y = rng.standard_normal((5, 7))
    curves = Curves(LAMBDAS, y)
    for row, slope, residual in zip(y, curves.slope, curves.residual, strict=True):
        fit, (rest,), *_ = np.polyfit(LAMBDAS, row, 1, full=True)
        assert slope == pytest.approx(fit[0]) and residual == pytest.approx(rest)


def test_rank_correlation_equals_scipys(rng):
    from scipy.stats import spearmanr

    y = rng.integers(0, 4, (6, 7)).astype(float)  # with ties
    for row, rho in zip(y, Curves(LAMBDAS, y).spearman, strict=True):
        assert rho == pytest.approx(spearmanr(LAMBDAS, row).statistic)


def test_a_constant_item_is_said_to_be_constant():
    curves = Curves(LAMBDAS, np.full((2, 7), 0.3))
    assert curves.slope.tolist() == [0, 0] and np.isnan(curves.spearman).all()
    assert "2 constant" in curves.to_markdown() and "undefined" in curves.to_markdown()
    assert curves.to_dict()["spearman"] == [None, None]


def test_transfer_is_a_ratio_only_where_it_means_something(rng):
    own = Curves(LAMBDAS, np.outer([1.0, 1.2, 0.8], LAMBDAS))
    foreign = Curves(LAMBDAS, np.outer([0.5, 0.4, 0.6], LAMBDAS))
    found = foreign.transfer(own)
    assert found.ratio == pytest.approx(0.5) and found.denominator == pytest.approx(1.0)
    nothing = Curves(LAMBDAS, np.outer([1.0, -1.0, 0.1], LAMBDAS))
    assert foreign.transfer(nothing).ratio is None


def test_bias_shares():
    first = np.array([True, False] * 4)
    second = np.array([True, True, False, False] * 2)
    curves = Curves(LAMBDAS, np.outer(2.0 * first + 1, LAMBDAS))
    found = curves.bias_shares(first, second)
    assert found.first == pytest.approx(1) and found.second == pytest.approx(0)
    assert found.both == pytest.approx(1)
    alone = curves.bias_shares(first)
    assert alone.first == pytest.approx(1) and np.isnan(alone.second)
    # only together do the two explain the slopes
    crossed = Curves(LAMBDAS, np.outer(1.0 * (first == second), LAMBDAS)).bias_shares(first, second)
    assert crossed.first == pytest.approx(0) and crossed.both == pytest.approx(1)
    with pytest.raises(ValueError, match="each of 8 items"):
        curves.bias_shares([True])


ITEMS = [
    Choice([5, 9, 7, 30], [3, 11], [4, 11]),
    Choice([8, 2], [6], [9, 1, 5]),
    Choice([12, 40, 33, 21, 7, 9], [3], [4]),
]


@pytest.fixture(params=["llama3", "gemma2"])
def model(zoo, request):
    return zoo.engine(request.param)


def by_hand(model, item, vector, a, positions):
    """Give log p(positive) - log p(negative), each from a run of its own."""
    sums = []
    for answer in (item.positive, item.negative):
        row, n = item.prompt + answer, len(item.prompt)
        at = slice(n, None) if positions == "answer" else positions
        edits = [vs.Steer(vector, a, at)]
        logits = model.run(item.prompt, responses=[answer], edits=edits, logits="all").logits[0]
        x = logits.astype(np.float64)
        logp = (
            x
            - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))
            - x.max(1, keepdims=True)
        )
        sums.append(sum(logp[t - 1, row[t]] for t in range(n, len(row))))
    return sums[0] - sums[1]


@pytest.mark.parametrize("positions", [None, "answer", [-1], "prompt"])
@pytest.mark.parametrize("layer", [0, 2])
def test_propensity_equals_runs_of_single_rows(model, rng, layer, positions):
    vector = vs.SteeringVector(2 * rng.standard_normal(model.config.d_model), layer)
    curves = vs.reliability.steerability(
        model, ITEMS, vector, (-1, 0, 2), positions=positions, progress=False
    )
    expected = [[by_hand(model, i, vector, a, positions) for a in (-1, 0, 2)] for i in ITEMS]
    # the logits are bit-identical; sums of log probabilities round differently here and there
    np.testing.assert_allclose(curves.propensity, expected, rtol=0, atol=1e-9)
    if positions == "answer":
        # one answer token each: it is predicted before the first steered token
        assert np.ptp(curves.propensity[2]) == 0
    else:
        assert np.ptp(curves.propensity, axis=1).min() > 0


@pytest.mark.parametrize("positions", [None, "answer"])
def test_tokens_that_merge_across_the_border(model, rng, monkeypatch, positions):
    """The answers' tokens begin where prompt and rows stop to agree, not behind the prompt."""
    prompt, rows = [5, 9, 7, 30, 2], {"A": [5, 9, 7, 41], "B": [5, 9, 7, 30, 8, 11]}

    original = type(model).chat_tokens

    def tokens(self, prompts, response=None, **more):
        if prompts[0] != "x":
            return original(self, prompts, response=response, **more)
        return [prompt] if response is None else [rows[response[0]]]

    vector = vs.SteeringVector(2 * rng.standard_normal(model.config.d_model), 1)
    with monkeypatch.context() as m:
        m.setattr(type(model), "chat_tokens", tokens)
        found = vs.reliability.steerability(
            model, [Choice("x", "A", "B")], vector, (0, 2), positions=positions, progress=False
        )
    at = slice(3, None) if positions else None
    for k, a in enumerate((0, 2)):
        sums = []
        for row in rows.values():
            edits = [vs.Steer(vector, a, at)]
            logits = model.run([row], edits=edits, logits="all").logits[0].astype(np.float64)
            logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
            sums.append(sum(logp[t - 1, row[t]] for t in range(3, len(row))))
        assert found.propensity[0, k] == pytest.approx(sums[0] - sums[1], abs=1e-9)


def test_all_in_one_batch_have_the_bits_of_each_alone(model, rng):
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    run = lambda items, at: (
        vs.reliability.steerability(model, items, vector, at, progress=False).propensity
    )
    together = run(ITEMS, (-1, 0, 2))
    alone = np.concatenate([run([i], (-1, 0, 2)) for i in ITEMS])
    pairs = np.concatenate([run(ITEMS, (a, 5))[:, :1] for a in (-1, 0, 2)], axis=1)
    assert together.tolist() == alone.tolist() == pairs.tolist()


def test_coefficient_zero_changes_nothing(model, rng):
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    other = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    run = lambda v: vs.reliability.steerability(model, ITEMS, v, (0, 1), progress=False)
    assert run(vector).propensity[:, 0].tolist() == run(other).propensity[:, 0].tolist()


def test_texts_and_the_output_of_the_last_block(rng):
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        items = [Choice("Where is the mill?", "I cannot say.", "By the river.")]
        vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), model.config.n_layers)
        curves = vs.reliability.steerability(model, items, vector, (-1, 1), progress=False)
        assert np.isfinite(curves.propensity).all() and curves.dose > 0
        assert f"{curves.dose:.3f}" in curves.to_markdown()
        assert len(curves.plot().axes[0].lines) == 3


@pytest.mark.parametrize(
    "items, options, message",
    [
        ([], {}, "items is empty"),
        ([Choice([1, 2], [3], [3])], {}, "the same tokens"),
        ([Choice([1, 2], [3], [4])], dict(coefficients=[1.0]), "two different"),
        ([Choice([1, 2], [3], [4])], dict(coefficients=[1.0, np.nan]), "finite number"),
        ([Choice([1] * 512, [3], [4])], {}, "context holds 512"),
        ([([1], [2], [3])], {}, "not a Choice"),
    ],
)
def test_refusals(zoo, rng, items, options, message):
    model = zoo.engine("llama3")
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    with pytest.raises(ValueError, match=message):
        vs.reliability.steerability(model, items, vector, progress=False, **options)


@pytest.mark.parametrize("positions", [None, "answer"])
def test_prompts_with_a_common_head(model, rng, positions):
    """The head runs once for each coefficient, with the bits of each item alone."""
    head = [7, 3, 9, 30, 11, 2]
    items = [Choice(head + i.prompt, i.positive, i.negative) for i in ITEMS]
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    run = lambda some: (
        vs.reliability.steerability(
            model, some, vector, (-1, 0, 2), positions=positions, progress=False
        ).propensity
    )
    together = run(items)
    assert together.tolist() == np.concatenate([run([i]) for i in items]).tolist()
    expected = [[by_hand(model, i, vector, a, positions) for a in (-1, 0, 2)] for i in items]
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["gemma2", "phi3_long"])
def test_long_answers_take_bounded_memory(zoo, rng, monkeypatch, name):
    """Logits of a long answer are read in parts, where the row's length does not decide its
    rotation.
    """
    from vksteer.reliability import choices

    model = zoo.engine(name)
    n = 60 if name == "gemma2" else model.config.rope_switch
    draw = lambda k: rng.integers(0, model.config.d_vocab, k).tolist()
    items = [Choice(draw(9), draw(n), draw(n - 7)), Choice(draw(4), [3], [5, 6])]
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    run = lambda: vs.reliability.steerability(model, items, vector, (-1, 1), progress=False)
    whole, calls = run().propensity, []
    forward = choices._Pass._forward

    def counted(self, cache, rows, parts, logits=None):
        found = forward(self, cache, rows, parts, logits)
        calls.append(0 if found is None else found.nbytes)
        return found

    monkeypatch.setattr(choices._Pass, "_forward", counted)
    monkeypatch.setattr(choices, "LOGIT_BYTES", 4 * 4 * 10 * model.config.d_vocab)
    np.testing.assert_allclose(run().propensity, whole, rtol=0, atol=1e-9)
    if name == "gemma2":
        assert max(calls) <= choices.LOGIT_BYTES and len(calls) > n // 10
    expected = [[by_hand(model, i, vector, a, None) for a in (-1, 1)] for i in items]
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-8)
