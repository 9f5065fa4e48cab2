"""The accuracy of the logit lens on two answers: formulas, a model's own logits, and the screen."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from vksteer.reliability.answers import AnswerLens, answer_lens


@pytest.mark.parametrize("centred", [False, True])
def test_differences_equal_the_formula(rng, centred):
    n, d, eps = 5, 17, 1e-5
    first, second, gain, shift = (rng.standard_normal((n, d)) for _ in range(4))
    gain, shift = gain[0], shift[0]
    x = rng.standard_normal((n, d))
    lens = AnswerLens([(0, 1)] * n, (first - second) * gain, (first - second) @ shift, centred, eps)
    found = lens.differences(x.astype(np.float64))
    for i in range(n):
        row = x[i] - x[i].mean() if centred else x[i]
        normed = row / np.sqrt(np.mean(row * row) + eps) * gain + shift
        expected = float(normed @ first[i]) - float(normed @ second[i])
        assert found[i] == pytest.approx(expected, abs=1e-10)


def test_accuracy_counts_both_classes_and_halves_ties():
    """Along one axis: a positive activation is read rightly if it is positive, a negative one if it
    is negative.
    """
    lens = AnswerLens([(0, 1)] * 4, np.ones((4, 1)), np.zeros(4), False, 1e-6)
    positive = np.array([[1.0], [2.0], [-1.0], [0.0]])
    negative = np.array([[-1.0], [0.0], [-3.0], [4.0]])
    # right: 2 of the positive and 2 of the negative; ties: one of each
    assert lens.accuracy(positive, negative) == (2 + 2 + 0.5 + 0.5) / 8
    assert lens.accuracy(positive, positive) == 0.5
    assert lens.accuracy(np.ones((4, 1)), -np.ones((4, 1))) == 1


#: Largest difference from the model's own float32 logits (up to 19) over 20 seeds and the four
#: families below: 3.0e-6.
AGAINST_LOGITS = 1.2e-5


@pytest.mark.parametrize("family", ["llama3", "gemma2", "gpt2", "phi"])
def test_the_lens_on_the_last_output_is_the_models_own(zoo, rng, family):
    model = zoo.engine(family)
    last = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    rows = [rng.integers(3, 100, n).tolist() for n in (6, 9, 4)]
    pairs = [(5, 9), (40, 7), (8, 60)]
    run = model.run(rows, capture=[last], logits="last")
    lens = answer_lens(model, pairs, 3)
    found = lens.differences(run[last][:, -1])
    logits = run.logits.astype(np.float64)
    cap = model.config.final_softcap
    if cap:
        logits = cap * np.arctanh(logits / cap)
    expected = [logits[i, a] - logits[i, b] for i, (a, b) in enumerate(pairs)]
    np.testing.assert_allclose(found, expected, atol=AGAINST_LOGITS)


def test_the_screen_has_the_column_only_with_answers(zoo, rng):
    model = zoo.engine("llama3")
    positive = [rng.integers(3, 200, n).tolist() for n in (9, 5, 12, 7)]
    negative = [rng.integers(3, 200, n).tolist() for n in (6, 8, 5, 11)]
    plain = vs.reliability.screen(model, positive, negative, progress=False)
    table = vs.reliability.screen(
        model, positive, negative, positions=(-1, -2), answers=(5, 9), progress=False
    )
    for layer in range(model.config.n_layers):
        for position in (-1, -2):
            site = f"blocks.{layer}.hook_resid_pre"
            sides = [
                np.stack(
                    [model.run(p, capture=[site], logits=None)[site][0, position] for p in side]
                ).astype(np.float64)
                for side in (positive, negative)
            ]
            gain, rows = (
                model._engine.vector("ln_final", 0).astype(np.float64),
                [model._engine.rows("unembed", 0, t, 1)[0].astype(np.float64) for t in (5, 9)],
            )
            right = [
                (float(x * gain @ rows[0]) > float(x * gain @ rows[1])) == (k == 0)
                for k, side in enumerate(sides)
                for x in side  # the norm's scale is positive and changes no sign
            ]
            assert table[layer, position].lens_accuracy == np.mean(right)
    assert "lens accuracy" in table.to_markdown() and len(table.plot().axes[0].lines) == 8
    assert table.to_dict()["rows"][0]["lens_accuracy"] == table.rows[0].lens_accuracy
    swapped = vs.reliability.screen(model, positive, negative, answers=(9, 5), progress=False)
    for row in swapped:
        assert row.lens_accuracy == 1 - table[row.layer, -1].lens_accuracy
    assert "lens" not in plain.to_markdown() and "lens_accuracy" not in plain.to_dict()["rows"][0]
    assert np.isnan(plain.rows[0].lens_accuracy) and "answers_hash" not in plain.meta
    assert [row.mean_cosine for row in plain] == [
        row.mean_cosine for row in table if row.position == -1
    ]


@pytest.mark.parametrize(
    "answers, message",
    [
        ((5,), "not two token ids"),
        ((5, 5), "names token 5 twice"),
        ((5, 10**7), "not two token ids"),
        ((5, -1), "not two token ids"),
        ((5, 1.5), "not two token ids"),
        ([(5, 9)], "1 pairs of tokens for 2 pairs of prompts"),
        ([(5, 9), (5, 6, 7)], r"answers\[1\]"),
        ([], "0 pairs"),
        (5, "must be two token ids"),
        ([5, 9, 6], "not two token ids"),
        ("ab", "not two token ids"),
    ],
)
def test_answers_are_refused_before_work(zoo, answers, message):
    with pytest.raises(ValueError, match=message):
        vs.reliability.screen(
            zoo.engine("llama3"),
            [[1, 2], [3, 4]],
            [[2, 3], [5, 6]],
            answers=answers,
            progress=False,
        )
