"""The dose of steering, against the residual stream of the unsteered run."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs


@pytest.fixture
def vector(zoo, rng):
    width = zoo.engine("llama3").config.d_model
    return vs.SteeringVector(rng.standard_normal(width), 2)


PROMPTS = [[5, 9, 7, 30, 2], [8, 2, 7], [11] * 9]


def by_hand(model, tokens, vector, a, at=slice(None)):
    last = vector.layer == model.config.n_layers
    site = f"blocks.{vector.layer - last}.hook_resid_{'post' if last else 'pre'}"
    h = model.run(tokens, capture=[site], logits=None)[site][0].astype(np.float64)
    return np.mean(abs(a) * vector.norm / np.linalg.norm(h, axis=1)[at])


@pytest.mark.parametrize("a", [1.5, -2.0, 0.0])
def test_mean_over_all_tokens(zoo, vector, a):
    model = zoo.engine("llama3")
    found = vs.dose(model, PROMPTS, vector, a)
    expected = [by_hand(model, p, vector, a) for p in PROMPTS]
    np.testing.assert_allclose(found.ratio, expected, rtol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected)) and (found.ratio >= 0).all()
    assert found.ratio.dtype == np.float64 and found.ratio.shape == (3,)


def test_responses_and_positions(zoo, vector):
    model = zoo.engine("llama3")
    responses = [[3, 4], [6], [7, 8, 9]]
    rows = [p + r for p, r in zip(PROMPTS, responses)]
    found = vs.dose(model, PROMPTS, vector, 1.0, responses=responses)
    expected = [by_hand(model, row, vector, 1.0) for row in rows]
    np.testing.assert_allclose(found.ratio, expected, rtol=1e-12)
    found = vs.dose(model, PROMPTS, vector, 1.0, responses=responses, positions="response")
    expected = [
        by_hand(model, row, vector, 1.0, slice(len(p), None)) for row, p in zip(rows, PROMPTS)
    ]
    np.testing.assert_allclose(found.ratio, expected, rtol=1e-12)
    found = vs.dose(model, PROMPTS, vector, 1.0, positions=[-1, 0])
    expected = [by_hand(model, p, vector, 1.0, [0, len(p) - 1]) for p in PROMPTS]
    np.testing.assert_allclose(found.ratio, expected, rtol=1e-12)


def test_a_vector_of_the_last_output_uses_the_output_of_the_last_block(zoo, rng):
    model = zoo.engine("llama3")
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), model.config.n_layers)
    found = vs.dose(model, PROMPTS, vector, 1.0)
    np.testing.assert_allclose(
        found.ratio, [by_hand(model, p, vector, 1.0) for p in PROMPTS], rtol=1e-12
    )


def test_a_row_alone_has_the_bits_of_the_row_in_a_batch(zoo, vector):
    model = zoo.engine("llama3")
    together = vs.dose(model, PROMPTS, vector, 1.0).ratio
    alone = [vs.dose(model, [p], vector, 1.0).ratio[0] for p in PROMPTS]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(coefficient=float("nan")), "finite number"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(responses=[[1]]), "3 prompts need as many responses"),
        (dict(positions=slice(50, None)), "name no token of prompt 0"),
        (dict(responses=["hi"] * 3), "no tokenizer"),
    ],
)
def test_refusals(zoo, vector, arguments, message):
    given = dict(prompts=PROMPTS, vector=vector, coefficient=1.0) | arguments
    with pytest.raises(ValueError, match=message):
        vs.dose(zoo.engine("llama3"), **given)


def test_tables_show_the_dose(vector_of_the_bundled_model):
    model, vector = vector_of_the_bundled_model
    harmful, harmless = [[5, 9, 7, 30], [8, 2, 7]], [[4, 1, 7], [3, 2, 7, 8, 9]]
    unit = {
        "harmless": vs.dose(model, harmless, vector, 1.0).mean,
        "harmful": vs.dose(model, harmful, vector, 1.0).mean,
    }
    options = dict(max_new_tokens=2, progress=False)
    rows = vs.steering.sweep(model, vector, [0.5, -2], harmful, harmless, **options)
    mean = (unit["harmless"] + unit["harmful"]) / 2  # as many of each
    assert [r.dose for r in rows] == pytest.approx([0.5 * mean, 2 * mean], rel=1e-12)
    assert f"| 0.5 | {0.5 * mean:.3f} |" in rows.to_markdown() and rows.unsteered.dose == 0
    table = vs.freezing.ablation_table(
        model, vector, harmful, harmless, (0.5, 1.5), random_control=0, **options
    )
    expected = [0.5 * unit["harmless"], 1.5 * unit["harmful"]]
    assert table.setting["dose"] == pytest.approx(expected, rel=1e-12)
    assert f"Dose: {expected[0]:.3f} harmless" in table.to_markdown()
    both = {"one": vector, "two": vs.SteeringVector(vector.direction[::-1], vector.layer)}
    found = vs.steering.compare(
        model,
        both,
        harmful,
        harmless,
        coefficient=(0.5, 1.5),
        normalize=False,
        circuits=False,
        **options,
    )
    assert found["one"].dose == pytest.approx(expected, rel=1e-12)
    assert f"{expected[0]:.3f} / {expected[1]:.3f}" in found.to_markdown()
    assert found.to_dict()["vectors"]["one"]["dose"] == list(found["one"].dose)


@pytest.fixture
def vector_of_the_bundled_model(rng):
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        yield model, vs.SteeringVector(rng.standard_normal(model.config.d_model), 3)
