"""`vs.DynamicScale` against the float64 oracle: runs, gradients by autograd, decoding, freezing.

Bounds: that of oracle/compare.py for runs; 1e-4 of a site's largest gradient, as in
test_gradients.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vksteer as vs
from oracle.compare import assert_close, assert_same_bits, real

PROMPTS, RESPONSES = (5, 17, 9), (4, 0, 7)
KINDS = ["gpt2", "llama3", "gemma2", "qwen3"]
#: Of the gradients, as a share of a site's largest.
GRADIENT_BOUND = 1e-4  # met on lavapipe: 8.4e-6


@pytest.fixture
def case(zoo, rng):
    def make(name):
        ref, model = zoo.reference(name), zoo.engine(name)
        draw = lambda n: rng.integers(0, ref.facts.d_vocab, n).tolist()
        w = lambda: rng.standard_normal(ref.facts.d_model).astype(np.float32)
        edits = [
            vs.DynamicScale("blocks.0.hook_attn_out", w(), 0.7),
            vs.Steer(vs.SteeringVector(w(), 1), 0.5),
            vs.DynamicScale("blocks.1.hook_resid_pre", w(), -0.4, positions=slice(1, None)),
            vs.Scale("blocks.1.hook_mlp_out", 1.3),
            vs.DynamicScale("blocks.1.hook_mlp_out", w(), 0.3, positions="response"),
            vs.DynamicScale("blocks.1.hook_mlp_out", w(), 0.2),
            vs.DynamicScale("hook_embed", w(), 0.2),
            vs.DynamicScale("ln_final.hook_normalized", w(), 0.1),
        ]
        return ref, model, [draw(n) for n in PROMPTS], [draw(n) for n in RESPONSES], edits

    return make


@pytest.mark.parametrize("name", KINDS)
def test_runs_and_gradients(case, name):
    ref, model, prompts, responses, edits = case(name)
    sites = [
        "hook_embed",
        "blocks.0.hook_attn_out",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_mlp_out",
        "blocks.1.hook_resid_post",
    ]
    run = model.run(prompts, responses, edits=edits, capture=sites)
    of = vs.LogitDiff(-1, 3, 7)
    found = model.gradients(prompts, responses, of=of, at=sites, edits=edits, progress=False)
    wants, leaf = [], lambda x: x.detach().requires_grad_()
    for b, (p, r) in enumerate(zip(prompts, responses)):
        row = ref.forward(p + r, edits=edits, prompt_length=len(p), hooks={"hook_embed": leaf})
        scalar = row.logits[len(p) - 1, 3] - row.logits[len(p) - 1, 7]
        wants.append(torch.autograd.grad(scalar, [row.sites[s] for s in sites]))
        n = len(p) + len(r)
        assert_close(f"logits, row {b}", run.logits[b, -n:], row.logits.detach())
        for site in sites:
            assert_close(f"{site}, row {b}", real(site, run[site], b, n), row.sites[site].detach())
    for i, site in enumerate(sites):
        largest = max(float(w[i].abs().max()) for w in wants)
        for b, want in enumerate(wants):
            mine = real(site, found[site], b, len(prompts[b]) + len(responses[b]))
            error = np.abs(mine - want[i].numpy()).max() / largest
            assert error <= GRADIENT_BOUND, f"{name}, {site}, row {b}: {error:.2e}"


def test_a_row_alone_has_the_bits_of_a_row_in_company(case):
    _, model, prompts, responses, edits = case("gemma2")
    site = "blocks.1.hook_resid_pre"
    per_row = [edits, edits[:3], [*edits[2:], vs.DynamicScale(site, edits[0].w, 2.0)]]
    of = vs.LogitDiff(-1, 3, 7)
    run = model.run(prompts, responses, edits=per_row, capture=[site])
    grads = model.gradients(prompts, responses, of=of, at=[site], edits=per_row, progress=False)
    for b, (p, r) in enumerate(zip(prompts, responses)):
        n = len(p) + len(r)
        alone = model.run([p], [r], edits=per_row[b], capture=[site])
        assert_same_bits("logits", run.logits[b, -n:], alone.logits[0])
        assert_same_bits(site, run[site][b, -n:], alone[site][0])
        slope = model.gradients([p], [r], of=of, at=[site], edits=per_row[b], progress=False)
        assert_same_bits(f"gradient of {site}", grads[site][b, -n:], slope[site][0])


def test_without_inside_values_gradients_have_the_same_bits(case):
    """A tape that keeps layer inputs alone runs every layer, with its edits, again."""
    from vksteer.runtime.gradients import tape_for

    _, model, prompts, responses, edits = case("llama3")
    ask = dict(of=vs.LogProb([-1], [5]), at=["hook_embed"], edits=edits, progress=False)
    inside = model.gradients(prompts, responses, **ask)["hook_embed"]
    model._tape = None
    tape_for(model, 64, 0, keep_inside=False)
    assert_same_bits("gradient", model.gradients(prompts, responses, **ask)["hook_embed"], inside)


def test_zero_changes_nothing(case):
    _, model, prompts, responses, edits = case("qwen3")
    plain = model.run(prompts, responses)
    w = edits[0].w
    for none in (
        [vs.DynamicScale("blocks.*.hook_attn_out", np.zeros_like(w))],
        [vs.DynamicScale("blocks.*.hook_mlp_out", w, 0.0)],
    ):
        run = model.run(prompts, responses, edits=none)
        assert_same_bits("logits", run.logits, plain.logits)


@pytest.mark.parametrize("freeze", [None, "qk", "mlp"])
def test_decoding(case, freeze):
    """Every new token is scaled, too, also in a frozen run, whose base run has all edits but the
    Steer.
    """
    ref, model, prompts, _, edits = case("llama3")
    made = model.generate(
        prompts, max_new_tokens=6, edits=edits, freeze=freeze, ignore_eos=True, progress=False
    )
    plain = model.generate(prompts, max_new_tokens=6, ignore_eos=True, progress=False)
    assert any(m.tokens.tolist() != p.tokens.tolist() for m, p in zip(made, plain))
    for prompt, generation in zip(prompts, made):
        want, _ = ref.generate(prompt, 6, edits=edits, freeze=freeze)
        assert generation.tokens.tolist() == want


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(site="blocks.0.attn.hook_z"), "not of the model's width"),
        (dict(site="blocks.0.hook_nothing"), "hook_nothing"),
        (dict(w=np.zeros(7, np.float32)), r"shape \[7\]"),
        (dict(w=np.full(36, np.nan, np.float32)), "not finite"),
        (dict(factor=np.inf), "must be finite"),
    ],
)
def test_refusals(zoo, change, says):
    model = zoo.engine("llama3")
    fields = dict(site="blocks.0.hook_mlp_out", w=np.ones(36, np.float32), factor=1.0) | change
    with pytest.raises((ValueError, KeyError), match=says):
        model.run([[1, 2]], edits=[vs.DynamicScale(**fields)])
