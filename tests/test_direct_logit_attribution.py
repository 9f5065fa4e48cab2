"""Direct logit attribution: the parts sum to the logit, and each part is what it says."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from oracle.families import FAMILIES

PROMPTS = [[5, 9, 7, 30, 2], [8, 2, 7], [11, 40, 3, 6, 9, 21, 77]]
#: Largest measured 3e-6 of the largest logit (float32 engine).
BOUND = 2e-4


def uncapped(model, logits):
    """The logit before the soft cap."""
    cap = model.config.final_softcap
    return cap * np.arctanh(logits / cap) if cap else logits


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_sum_to_the_logit(zoo, name):
    model = zoo.engine(name)
    logits = uncapped(model, model.run(PROMPTS, logits="last").logits.astype(np.float64))
    found = vs.ov.direct_logit_attribution(model, PROMPTS, [3, 50, 20])
    size = np.abs(logits).max()
    error = np.abs(found.total - logits[[0, 1, 2], [3, 50, 20]]).max() / size
    assert error < BOUND
    c = model.config
    assert found.heads.shape == (3, c.n_layers, c.n_heads) and found.mlps.shape == (3, c.n_layers)
    away = vs.ov.direct_logit_attribution(model, PROMPTS, [3, 50, 20], minus=7)
    error = np.abs(away.total - (logits[[0, 1, 2], [3, 50, 20]] - logits[:, 7])).max() / size
    assert error < BOUND


@pytest.mark.parametrize("name", ["llama_bias", "gemma2"])
def test_a_head_is_its_result_through_norm_and_unembedding(zoo, name):
    model = zoo.engine(name)
    c, layer, head, at = model.config, 1, 2, 1
    names = ["ln_final.hook_scale", f"blocks.{layer}.attn.hook_result"]
    names += [f"blocks.{layer}.ln1_post.hook_scale"] if c.post_norms else []
    run = model.run(PROMPTS[0], capture=names, logits=None)
    part = run[names[1]][0, at, head].astype(np.float64)
    if c.post_norms:
        part = part / run[names[2]][0, at, 0] * model._engine.vector("ln1_post", layer)
    row = model._engine.rows("unembed", 0, 3, 1)[0] * model._engine.vector("ln_final", 0)
    expected = part @ row / run[names[0]][0, at, 0]
    found = vs.ov.direct_logit_attribution(model, PROMPTS[:1], 3, position=at)
    assert found.heads[0, layer, head] == pytest.approx(expected, rel=1e-5)
    assert len(found.top(3)) == 3 and "<table>" in found._repr_html_()
    assert len(found.plot().axes) == 3


def test_a_row_alone_has_the_parts_of_the_row_in_a_batch(zoo):
    model = zoo.engine("qwen3")
    together = vs.ov.direct_logit_attribution(model, PROMPTS, 3)
    for i, prompt in enumerate(PROMPTS):
        alone = vs.ov.direct_logit_attribution(model, [prompt], 3)
        np.testing.assert_allclose(alone.heads[0], together.heads[i], rtol=1e-12)
        assert alone.embed[0] == pytest.approx(together.embed[i], rel=1e-12)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(tokens=[1, 2]), "one for each of 3 prompts"),
        (dict(tokens=999999), "999999 is no token id"),
        (dict(tokens=1, position=-4), "lies outside prompt 1"),
        (dict(tokens=1, minus=-1), "minus: -1 is no token id"),
    ],
)
def test_refusals(zoo, arguments, message):
    with pytest.raises(ValueError, match=message):
        vs.ov.direct_logit_attribution(zoo.engine("llama3"), PROMPTS, **arguments)
