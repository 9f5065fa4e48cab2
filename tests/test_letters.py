"""Questions with balanced letters, and the decomposition of what the letter does."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from vksteer.reliability import Curves, letter_choices

N = 101
QUESTIONS = [f"Which of them is bigger, {i} or {i + 1}?" for i in range(N)]
BIGGER, SMALLER = [str(i + 1) for i in range(N)], [str(i) for i in range(N)]
LAMBDAS = np.array([-1.0, 0.0, 1.0])


@pytest.mark.parametrize("n", [1, 2, 100, 101])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_letter_is_right_more_often(n, seed):
    items = letter_choices(QUESTIONS[:n], BIGGER[:n], SMALLER[:n], seed=seed)
    a = int(items.positive_is_a.sum())
    assert abs(2 * a - n) == n % 2 and items.question.tolist() == list(range(n))
    for i, (item, first) in enumerate(zip(items, items.positive_is_a, strict=True)):
        one, two = (BIGGER[i], SMALLER[i]) if first else (SMALLER[i], BIGGER[i])
        assert item.prompt == f"{QUESTIONS[i]}\n\nChoices:\n (A) {one}\n (B) {two}"
        assert (item.positive, item.negative) == (("(A)", "(B)") if first else ("(B)", "(A)"))


def test_the_seed_decides_the_letters():
    flags = [letter_choices(QUESTIONS, BIGGER, SMALLER, seed=s).positive_is_a for s in (3, 3, 4)]
    assert (flags[0] == flags[1]).all() and (flags[0] != flags[2]).any()
    alternating = np.arange(N) % 2 == 0
    assert (flags[0] != alternating).any() and (flags[0] == alternating).any()
    odd = [int(letter_choices(["?"], ["a"], ["b"], seed=s).positive_is_a[0]) for s in range(20)]
    assert 0 < sum(odd) < 20  # the odd one is not always A


def test_both_orders():
    items = letter_choices(QUESTIONS[:3], BIGGER[:3], SMALLER[:3], both_orders=True)
    assert items.question.tolist() == [0, 0, 1, 1, 2, 2]
    assert items.positive_is_a.tolist() == [True, False] * 3
    assert items[0].prompt.endswith("(A) 1\n (B) 0") and items[1].prompt.endswith("(A) 0\n (B) 1")
    assert items[0].positive == items[1].negative == "(A)" and len(items[:2]) == 2


def test_the_decomposition_equals_the_formulas(rng):
    """Against sums over the items, one by one, in float64."""
    n = 12
    items = letter_choices(QUESTIONS[:n], BIGGER[:n], SMALLER[:n], both_orders=True)
    slopes = rng.standard_normal(2 * n) + 0.7 * items.positive_is_a
    curves = Curves(LAMBDAS, 0.3 + np.outer(slopes, LAMBDAS))
    found = items.bias(curves)
    grand = slopes.mean()
    by_question = [slopes[items.question == q].mean() for q in range(n)]
    by_letter = [slopes[items.positive_is_a == flag].mean() for flag in (True, False)]
    whole = sum((s - grand) ** 2 for s in slopes)
    between = sum(2 * (m - grand) ** 2 for m in by_question) / whole
    letter = sum(n * (m - grand) ** 2 for m in by_letter) / whole
    assert found.question_share == pytest.approx(between, abs=1e-10)
    assert found.letter_share == pytest.approx(letter, abs=1e-10)
    assert found.rest_share == pytest.approx(1 - between - letter, abs=1e-10)
    np.testing.assert_allclose(found.content, by_question, atol=1e-10)
    for q in range(n):
        pair = slopes[items.question == q]
        assert found.letter[q] == pytest.approx((pair[0] - pair[1]) / 2, abs=1e-10)
    # one-way, the letter explains the same of balanced items
    one_way = curves.bias_shares(items.positive_is_a).first
    assert found.letter_share == pytest.approx(one_way, abs=1e-10)


def test_a_pure_letter_and_a_pure_content():
    items = letter_choices(QUESTIONS[:4], BIGGER[:4], SMALLER[:4], both_orders=True)
    letter = items.bias(2.0 * items.positive_is_a)
    assert letter.letter_share == 1 and letter.question_share == letter.rest_share == 0
    np.testing.assert_array_equal(letter.letter, np.ones(4))
    content = items.bias(items.question.astype(float))
    assert content.question_share == 1 and content.letter.tolist() == [0] * 4
    still = items.bias(np.ones(8))
    assert np.isnan([still.question_share, still.letter_share, still.rest_share]).all()


def test_the_items_run():
    """A question in both orders through a model: the answers are one letter apart."""
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        items = letter_choices(["Which?"], ["the bridge"], ["the well"], both_orders=True)
        vector = vs.SteeringVector(np.ones(model.config.d_model), layer=3)
        curves = vs.reliability.steerability(model, items, vector, (0.0, 0.1), progress=False)
        assert items.bias(curves).content.shape == (1,)
        assert items.bias(curves.propensity[:, 0]).letter.shape == (1,)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(questions=[]), "questions is empty"),
        (dict(questions=["a", " "]), r"questions\[1\]"),
        (dict(negatives=["x"]), "belong together.*'negatives': 1"),
        (dict(negatives=["one", "4"]), "question 0: both answers are 'one'"),
        (dict(positives=["one", 2]), r"positives\[1\] is 2"),
        (dict(template="{question} {a}"), r"no place \{b\}"),
        (dict(template="{question} {a} {b} {c}"), "cannot be filled"),
        (dict(template="{question} {a} {b"), "cannot be filled"),
        (dict(seed=0.5), "seed"),
    ],
)
def test_refusals(arguments, message):
    given = dict(questions=["a?", "b?"], positives=["one", "two"], negatives=["three", "four"])
    given |= arguments
    with pytest.raises(ValueError, match=message):
        letter_choices(**given)


def test_bias_refuses():
    once = letter_choices(["a?", "b?"], ["1", "2"], ["3", "4"])
    with pytest.raises(ValueError, match="both_orders=True"):
        once.bias([1.0, 2.0])
    both = letter_choices(["a?"], ["1"], ["3"], both_orders=True)
    with pytest.raises(ValueError, match="each of 2 items"):
        both.bias([1.0])
    with pytest.raises(ValueError, match="finite"):
        both.bias([1.0, np.nan])
