"""Resumed and prefix-sharing passes give the bits of plain runs."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.compare import assert_same_bits

#: Learned positions, parallel layers, norms after attention only.
KINDS = ["gpt2", "gpt_neox", "olmo2"]


@pytest.mark.parametrize(
    "name", ["llama3", "gemma2", "gemma3", "qwen2", "qwen3", "mistral", *KINDS]
)
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_last_logits_are_those_of_plain_runs(zoo, rng, name, layer):
    import vksteer as vs
    from vksteer.runtime.resume import can_resume, last_logits

    model = zoo.engine(name)
    c = model.config
    head = rng.integers(0, c.d_vocab, 9).tolist()
    prompts = [head + rng.integers(0, c.d_vocab, n).tolist() for n in (1, 7, 12, 3)] + [
        head + [5],
        head + [5, 6],
    ]
    vectors = [
        vs.SteeringVector(rng.standard_normal(c.d_model).astype(np.float32), layer)
        for _ in range(2)
    ]
    for edits in (
        [[vs.Steer(vectors[0], 1.0)], [vs.Steer(vectors[1], -0.5)]],
        [[vs.Ablate(vectors[0])], [vs.Ablate(vectors[1])]],
        [[], [vs.Ablate(vectors[0])]],
    ):
        rows = [(p, e) for e in edits for p in prompts]
        assert can_resume(rows)
        want = model.run([p for p, _ in rows], edits=[e for _, e in rows], logits="last").logits
        assert_same_bits(f"{name} {edits}", last_logits(model, rows), want)
    assert not can_resume([(prompts[0], [vs.Steer(vectors[0], 1.0, positions=[0])])])


def test_rows_without_a_common_head(zoo, rng):
    import vksteer as vs
    from vksteer.runtime.resume import last_logits

    model = zoo.engine("qwen2")
    v = vs.SteeringVector(rng.standard_normal(model.config.d_model).astype(np.float32), 1)
    rows = [
        (rng.integers(0, model.config.d_vocab, n).tolist(), [vs.Steer(v, 1.0)]) for n in (1, 4, 30)
    ]
    want = model.run([p for p, _ in rows], edits=[e for _, e in rows], logits="last").logits
    assert_same_bits("no head", last_logits(model, rows), want)


def test_long_texts_of_longrope(zoo, rng):
    """Texts beyond the switch are rotated by other tables from their first token on: they take
    nothing from the pass of a shorter prefix.
    """
    import vksteer as vs
    from vksteer.runtime.resume import last_logits, layer_inputs

    model = zoo.engine("phi3_long")
    c = model.config
    head = rng.integers(0, c.d_vocab, 30).tolist()
    tails = [rng.integers(0, c.d_vocab, n).tolist() for n in (4, 8, 20, 2, 7, 15)]
    prompts = [head + tail for tail in tails]
    assert {len(p) > c.rope_switch for p in prompts} == {False, True}
    v = vs.SteeringVector(rng.standard_normal(c.d_model).astype(np.float32), 1)
    rows = [(p, [vs.Steer(v, a)]) for a in (1.0, -0.5) for p in prompts]
    want = model.run([p for p, _ in rows], edits=[e for _, e in rows], logits="last").logits
    assert_same_bits("last logits", last_logits(model, rows), want)
    short = [p for p in prompts if len(p) <= c.rope_switch]
    for some, shared in ((prompts, 0), (short, 30)):
        whole = model.run(some, capture="blocks.1.hook_resid_pre", logits=None)
        kept, rest = layer_inputs(model, some, [1], 1)
        assert len(kept[1]) == shared
        for i, p in enumerate(some):
            n = len(p) - shared
            row = np.concatenate([kept[1], rest[1][i, len(rest[1][i]) - n :]])
            want = whole["blocks.1.hook_resid_pre"][i, -len(p) :]
            assert_same_bits(f"stream of {len(p)} tokens", row, want)


@pytest.mark.parametrize("name", ["llama3", "gemma3", "qwen2", "mistral", *KINDS])
@pytest.mark.parametrize("n_head", [0, 9])
def test_streams_are_those_of_plain_runs(zoo, rng, name, n_head):
    from vksteer.runtime.resume import layer_inputs

    model = zoo.engine(name)
    c = model.config
    head = rng.integers(0, c.d_vocab, n_head).tolist()
    prompts = [
        head + [i] + rng.integers(0, c.d_vocab, n).tolist() for i, n in enumerate((4, 7, 12, 3))
    ]
    sites = [f"blocks.{l}.hook_resid_pre" for l in range(c.n_layers)]
    want = model.run(prompts, capture=sites, logits=None)
    # the shortest prompt has n_head + 4 tokens
    for reach, expected in ((1, n_head), (5, min(n_head, 8)), (9, min(n_head, 4)), (12, 0)):
        if reach > n_head + 4:
            continue
        shared, rest = layer_inputs(model, prompts, range(c.n_layers), reach)
        assert len(shared[0]) == expected
        for l, site in enumerate(sites):
            for i, prompt in enumerate(prompts):
                whole = np.concatenate(
                    [shared[l], rest[l][i, len(rest[l][i]) - (len(prompt) - expected) :]]
                )
                assert_same_bits(
                    f"{name} layer {l} prompt {i}", whole, want[site][i, -len(prompt) :]
                )


def test_a_cache_may_go_while_its_copies_wait(zoo, rng):
    """Copies are recorded and not waited for: the memory must outlive them."""
    from vksteer.runtime.device import _engine

    model = zoo.engine("qwen2")
    prompt = rng.integers(0, model.config.d_vocab, 40).tolist()
    want = model.run([prompt]).logits
    for _ in range(20):
        cache = _engine().Cache(model._engine, 4096)
        cache.copy(0, np.array([1024, 2048], np.uint32), 1024, 0)
        del cache
        assert_same_bits("after", model.run([prompt]).logits, want)
