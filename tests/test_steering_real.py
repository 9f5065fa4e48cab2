"""Difference in means, scores and selection through the engine, against a float64 reference: the
oracle's own forward pass, one prompt at a time.

Random models of several families (token prompts) and the bundled tiny chat models (the toy world's
prompts). Bound: 2e-3, of the largest value for vectors, absolute for KL, and of max(1, largest) for
the refusal metric, which is a logit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oracle.compare import assert_same_bits
from vksteer import data, steering
from vksteer.runtime import model as vs
from vksteer.runtime.edits import Ablate, Steer

BUNDLED = Path(data.__file__).parents[1] / "models"
RANDOM = ("llama3", "llama_bias", "gemma2", "qwen3")
TINY = ("tiny-llama-chat", "tiny-gemma-chat")
BOUND = 2e-3


class Case:
    """A model through the engine, its oracle, and prompts as token lists: train and validation,
    harmful and harmless.
    """

    def __init__(self, model, reference, train, validation, positions):
        self.model, self.reference, self.train, self.validation, self.positions = (
            model,
            reference,
            train,
            validation,
            positions,
        )

    def forward(self, tokens, edits=(), keep=False):
        import torch

        with torch.no_grad():
            return self.reference.forward(tokens, edits=list(edits), keep=keep)

    def probabilities(self, tokens, edits=()):
        """Next-token probabilities after the prompt, float64 [V]."""
        import torch

        return torch.softmax(self.forward(tokens, edits).logits[-1], dim=-1).numpy()


@pytest.fixture(scope="module")
def cases(zoo):
    made = {}

    def make(name):
        if name in made:
            return made[name]
        if name in TINY:
            from oracle.reference import Reference

            model = vs.Model.from_pretrained(name, dtype="float32")
            draw = lambda split, n: tuple(
                model.chat_tokens(prompts) for prompts in data.tiny_pair(split, n)
            )
            made[name] = Case(
                model, Reference(BUNDLED / name), draw("train", 12), draw("validation", 6), None
            )
        else:
            rng = np.random.default_rng(sum(name.encode()))
            V = zoo.reference(name).facts.d_vocab
            # Two classes that differ: the second half of the vocabulary is "harmful".
            draw = lambda n, low, high: [
                rng.integers(low, high, k).tolist() + [1, 2] for k in rng.integers(3, 20, n)
            ]
            pair = lambda n: (draw(n, V // 2, V), draw(n, 3, V // 2))
            made[name] = Case(zoo.engine(name), zoo.reference(name), pair(7), pair(5), [-2, -1])
        return made[name]

    yield make
    for name, case in made.items():
        if name in TINY:
            case.model.close()


def candidates(case):
    return steering.difference_in_means(
        case.model, *case.train, positions=case.positions, progress=False
    )


@pytest.mark.parametrize("name", RANDOM + TINY)
def test_difference_in_means(cases, name):
    case = cases(name)
    cands = candidates(case)
    L = case.reference.facts.n_layers
    means = []
    for prompts in case.train:
        rows = [
            [
                case.forward(tokens, keep=True)
                .sites[f"blocks.{l}.hook_resid_pre"]
                .numpy()[cands.positions]
                for l in range(L)
            ]
            for tokens in prompts
        ]
        means.append(np.mean(rows, axis=0).swapaxes(0, 1))
    want = means[0] - means[1]
    assert cands.vectors.shape == want.shape
    for p, l in np.ndindex(want.shape[:2]):
        worst = np.abs(cands.vectors[p, l] - want[p, l]).max()
        assert worst <= BOUND * np.abs(want[p, l]).max(), (
            f"{name}, position {cands.positions[p]}, layer {l}: {worst:.3g} of"
            f" {np.abs(want[p, l]).max():.3g}"
        )


@pytest.mark.parametrize("name", RANDOM + TINY)
def test_scores(cases, name):
    case = cases(name)
    cands = candidates(case)
    layers = [1, case.model.config.n_layers - 1]
    tokens = None if name in TINY else [3, 7, 11]
    table = cands.evaluate(*case.validation, refusal_tokens=tokens, layers=layers, progress=False)
    ids = list(table.refusal_tokens.ids)
    harmful, harmless = case.validation

    def metric(prompts, edits):
        inside = [case.probabilities(t, edits)[ids].sum() for t in prompts]
        return np.mean([np.log(p / (1 - p)) for p in inside])

    base = [case.probabilities(t) for t in harmless]
    for p in (0, len(cands.positions) - 1):
        for l in layers:
            v = cands.vector(int(cands.positions[p]), l)
            ablated = [case.probabilities(t, [Ablate(v)]) for t in harmless]
            want = {
                "bypass": metric(harmful, [Steer(v, -1.0)]),
                "induce": metric(harmless, [Steer(v, 1.0)]),
                "bypass_ablation": metric(harmful, [Ablate(v)]),
                "kl": np.mean([(a * np.log(a / b)).sum() for a, b in zip(base, ablated)]),
            }
            for score, value in want.items():
                got = getattr(table, score)[p, l]
                assert abs(got - value) <= BOUND * max(1.0, abs(value)), (
                    f"{name}, {score}, position {cands.positions[p]}, layer {l}: {got} against"
                    f" {value}"
                )


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "tiny-llama-chat"])
def test_batches_change_no_bit(cases, name, monkeypatch):
    case = cases(name)
    cands = candidates(case)
    table = cands.evaluate(*case.validation, refusal_tokens=[3, 7], layers=[1], progress=False)
    monkeypatch.setattr("vksteer.steering.scores.BATCH_TOKENS", 1)  # one row a call
    monkeypatch.setattr("vksteer.steering.candidates.CAPTURE_BYTES", 1)
    alone = candidates(case)
    assert_same_bits(f"{name}: vectors", alone.vectors, cands.vectors)
    other = alone.evaluate(*case.validation, refusal_tokens=[3, 7], layers=[1], progress=False)
    for score in ("bypass", "induce", "kl", "bypass_ablation"):
        assert_same_bits(f"{name}: {score}", getattr(other, score), getattr(table, score))


@pytest.mark.parametrize("name", TINY)
def test_selection_is_the_rule_on_the_whole_table(cases, name):
    case = cases(name)
    cands = candidates(case)
    full = cands.evaluate(*case.validation, progress=False)
    for criterion, bypass in (("paper", full.bypass), ("arditi", full.bypass_ablation)):
        zero = ~cands.vectors.any(axis=-1)
        p, l = steering.choose(np.where(zero, np.nan, bypass), full.induce, full.kl, criterion)
        v = cands.select(*case.validation, criterion=criterion, progress=False)
        assert (v.position, v.layer) == (cands.positions[p], l)
        assert (
            v.meta["selection"]["kl"] == full.kl[p, l]
            and v.meta["selection"]["refusal_token_texts"]
        )
        assert len(cands.rejected) < zero.size


@pytest.mark.parametrize("name", TINY)
def test_refusals_of_the_tiny_models_begin_with_i(cases, name):
    derived = steering.derive_refusal_tokens(cases(name).model, *cases(name).validation)
    assert derived.texts[0].strip() == "I" and derived.on_harmful[0] > 0.5 > derived.on_harmless[0]


@pytest.mark.parametrize("name", TINY)
def test_a_small_table_one_layer_at_a_time(cases, name):
    """Frozen generation itself is checked token for token in test_freezing.py; here the table and
    per-layer freezing on a real chat model.
    """
    from vksteer.freezing import ablation_table

    case = cases(name)
    v = candidates(case).vector(-1, case.model.config.n_layers // 2)
    harmful, harmless = data.tiny_pair("test", 3)
    whole = ablation_table(
        case.model, v, harmful, harmless, 1.0, max_new_tokens=12, random_control=1, progress=False
    )
    assert len(whole) == 8 and all(
        row.harmless.n == row.harmful.n == 3 and round(3 * row.harmless.asr, 9) in (0, 1, 2, 3)
        for row in whole
    )
    last = case.model.config.n_layers - 1
    single = ablation_table(
        case.model,
        v,
        harmful,
        harmless,
        1.0,
        max_new_tokens=12,
        layers=[last],
        random_control=0,
        progress=False,
    )
    assert (
        single["none"].harmless == whole["none"].harmless
        and single.texts["none"] == whole.texts["none"]
    )
    # At the vector's own last layer, freezing that one layer is freezing them all.
    at_last = candidates(case).vector(-1, last)
    both = [
        ablation_table(
            case.model,
            at_last,
            harmful,
            harmless,
            1.0,
            max_new_tokens=12,
            layers=l,
            random_control=0,
            progress=False,
        )
        for l in (None, [last])
    ]
    for ablation in ("QK", "OV", "SVV", "MLP direct", "MLP"):
        assert both[0].texts[ablation] == both[1].texts[f"{ablation} {last}"]
