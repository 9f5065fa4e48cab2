"""Rotation tables for long texts (longrope, Phi-3): which texts use them, and what happens to texts
that grow beyond the switch while they are generated. The model's switch lies at 40 tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vksteer as vs
from oracle import circuits as oc
from oracle.compare import assert_close, assert_same_bits, real
from test_circuit_runs import Setting as CircuitSetting
from test_gradients import check as check_gradients
from vksteer.reliability import choices
from vksteer.runtime.batch import packed_rows
from vksteer.runtime.resume import last_logits, layer_inputs

NAME, SWITCH = "phi3_long", 40
NEW = 6


@pytest.fixture
def pair(zoo):
    ref, model = zoo.reference(NAME), zoo.engine(NAME)
    assert ref.facts.rope_switch == model.config.rope_switch == SWITCH
    return ref, model


def draw(ref, rng, *lengths):
    return [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in lengths]


def vector(ref, rng, layer=1):
    return vs.SteeringVector(rng.standard_normal(ref.facts.d_model).astype(np.float32), layer)


def test_a_text_is_long_by_itself(pair, rng):
    """Rows of both kinds in one batch: every site against the oracle. The largest error met is
    2.5e-6 of a site's largest value.
    """
    ref, model = pair
    rows = draw(ref, rng, 61, 3, SWITCH, SWITCH + 1, SWITCH - 1)
    run = model.run(rows, capture=["*"])
    for b, row in enumerate(rows):
        want = ref.forward(row)
        assert_close(f"logits, row {b}", run.logits[b, -len(row) :], want.logits, 2e-5)
        for site, value in want.sites.items():
            assert_close(f"{site}, row {b}", real(site, run[site], b, len(row)), value, 2e-5)


def test_gradients_of_long_texts(pair, rng):
    ref, model = pair
    prompts, responses = draw(ref, rng, 37, 9, 50), draw(ref, rng, 5, 3, 0)
    of = [vs.LogProb([36, 40], [3, 4]), vs.LogitDiff(-1, 1, 2), vs.LogitDiff(-1, 5, 2)]
    edits = [vs.Steer(vector(ref, rng, 0), 0.7)]
    check_gradients(ref, model, prompts, responses, of, list(model.sites), edits, NAME)


def want_tokens(ref, prompt, **options):
    tokens, margins = ref.generate(prompt, NEW, **options)
    assert min(margins) > 1e-3, "a near tie: choose another seed"
    return tokens


@pytest.mark.parametrize("freeze", [None, "qk", "ov"])
def test_texts_grow_beyond_the_switch(pair, rng, freeze):
    """Greedy decoding against the oracle, which has no cache; some rows cross the switch at
    different steps, others not at all. The largest error of a captured value is 1.5e-6.
    """
    ref, model = pair
    prompts = draw(ref, rng, SWITCH - 3, 5, SWITCH, SWITCH - 1, SWITCH + 2)
    edits = [vs.Steer(vector(ref, rng), 0.8)]
    site = f"blocks.{ref.facts.n_layers - 1}.hook_resid_post"
    options = dict(max_new_tokens=NEW, ignore_eos=True, edits=edits, freeze=freeze, progress=False)
    gens = model.generate(prompts, capture=[site], **options)
    for b, (prompt, gen) in enumerate(zip(prompts, gens)):
        assert gen.tokens.tolist() == want_tokens(ref, prompt, edits=edits, freeze=freeze)
        for i in range(NEW):
            row = ref.forward(
                prompt + gen.tokens[: i + 1].tolist(),
                edits=edits,
                prompt_length=len(prompt),
                freeze=freeze,
            )
            assert_close(f"row {b}, step {i}", gen.captured[site][i], row.sites[site][-1], 2e-5)
        (alone,) = model.generate([prompt], capture=[site], **options)
        assert_same_bits(f"row {b} alone", alone.captured[site], gen.captured[site])


def test_generation_is_that_of_transformers(zoo, pair, rng):
    import transformers

    ref, model = pair
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        zoo.folder(NAME), dtype=torch.float32
    ).eval()
    for prompt in draw(ref, rng, SWITCH - 3, SWITCH, 7):
        want_tokens(ref, prompt)
        found = theirs.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW, eos_token_id=None
        )
        (gen,) = model.generate([prompt], max_new_tokens=NEW, ignore_eos=True, progress=False)
        assert gen.tokens.tolist() == found[0, len(prompt) :].tolist()


def test_decoding_under_a_circuit_beyond_the_switch(zoo, rng):
    s = CircuitSetting(zoo, NAME, rng, sizes=((7, 9),))
    for prompt in draw(s.ref, rng, SWITCH - 2, SWITCH):
        (gen,) = s.model.generate(
            [prompt],
            circuit=s.circuits[3],
            edits=[vs.Steer(s.vector, 1.0)],
            max_new_tokens=NEW,
            ignore_eos=True,
            progress=False,
        )
        want, margins = oc.generate(s.ref, prompt, NEW, s.exact, 1.0, set(s.circuits[3]))
        assert min(margins) > 1e-3, "a near tie: choose another seed"
        assert gen.tokens.tolist() == want


def test_the_engine_refuses_keys_of_the_other_table(pair):
    from vksteer.runtime.device import _engine

    _, model = pair
    cache = _engine().Cache(model._engine, 64)

    def step(start, n, decode=False):
        rows = packed_rows([[1] * n], start=[start], decode=decode)
        model._engine.forward(cache, rows, [], 0)

    step(0, SWITCH - 1)
    step(SWITCH - 1, 1, decode=True)
    for n in (1, 2, 20):
        with pytest.raises(ValueError, match="all of its tokens must be run again"):
            step(SWITCH, n)
    step(0, SWITCH + 1)
    step(SWITCH + 1, 1, decode=True)


def test_a_shared_head_is_not_rotated_by_the_other_table(pair, rng):
    ref, model = pair
    (head,) = draw(ref, rng, 20)
    v = vector(ref, rng)
    for tails in ((1, 3, 19), (1, 30, 25, 2), (30, 31)):
        prompts = [head + tail for tail in draw(ref, rng, *tails)]
        rows = [(p, [vs.Steer(v, a)]) for a in (1.0, -0.5) for p in prompts]
        want = model.run([p for p, _ in rows], edits=[e for _, e in rows], logits="last").logits
        assert_same_bits(f"tails {tails}", last_logits(model, rows), want)
        first, rest = layer_inputs(model, prompts, [1], 1)
        run = model.run(prompts, capture=["blocks.1.hook_resid_pre"], logits=None)
        for b, p in enumerate(prompts):
            whole = np.concatenate([first[1], rest[1][b][len(first[1]) - len(p) :]])
            kept = run["blocks.1.hook_resid_pre"][b, -len(p) :]
            assert_same_bits(f"streams, {tails}, {b}", whole[-len(p) :], kept)


def test_passes_of_long_answers_fit_the_memory(pair, rng, monkeypatch):
    """Long rows share no head, so that logits of all of their tokens are returned."""
    ref, model = pair
    items = [
        vs.reliability.Choice(*draw(ref, rng, *lengths))
        for lengths in ((38, 5, 4), (39, 4, 6), (20, 4, 3))
    ]
    vector_, strengths = vector(ref, rng), [-0.5, 1.0]
    want = vs.reliability.steerability(model, items, vector_, strengths, progress=False)
    passes = []
    forward = choices.Batch.forward

    def seen(self, *args, **options):
        logits, captured = forward(self, *args, **options)
        passes.append(0 if logits is None else logits.nbytes)
        return logits, captured

    most = 4 * 2 * len(strengths) * 44 * ref.facts.d_vocab  # of the longest item
    monkeypatch.setattr(choices, "LOGIT_BYTES", most)
    monkeypatch.setattr(choices.Batch, "forward", seen)
    got = vs.reliability.steerability(model, items, vector_, strengths, progress=False)
    assert max(passes) <= most
    np.testing.assert_array_equal(got.propensity, want.propensity)


def test_the_preference_between_long_answers(pair, rng):
    """Rows that share a head of at most SWITCH tokens, on both sides of the switch."""
    ref, model = pair
    v = vector(ref, rng)
    items = [
        vs.reliability.Choice(*draw(ref, rng, *lengths)) for lengths in ((35, 9, 2), (20, 4, 3))
    ]
    got = vs.reliability.steerability(model, items, v, [-0.5, 0.0, 1.0], progress=False)
    for i, item in enumerate(items):
        for k, a in enumerate((-0.5, 0.0, 1.0)):
            sums = []
            for answer in (item.positive, item.negative):
                tokens = item.prompt + answer
                logits = ref.forward(tokens[:-1], edits=[vs.Steer(v, a)]).logits
                said = torch.log_softmax(logits, -1)[len(item.prompt) - 1 :]
                sums.append(float(said[torch.arange(len(answer)), answer].sum()))
            assert_close(f"item {i}, {a}", got.propensity[i, k], np.array(sums[0] - sums[1]), 1e-4)
