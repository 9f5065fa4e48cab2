"""Gradients through edits of queries and keys in the families that norm, clamp, rotate or scale
them in other ways than Llama, against autograd through the float64 oracle.
"""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from test_gradients import case, check  # noqa: F401  case is a fixture

#: what is special about its attention
NAMES = {
    "gpt_neox": "a part of the head",
    "gptj": "neighbouring channels",
    "phi_norm": "LayerNorm of heads, with biases",
    "olmo": "a clamp",
    "olmo2": "a norm over all heads, none before attention",
    "smollm3": "layers without rotation",
    "granite": "a factor on what is added",
    "cohere_norm": "LayerNorm of heads, neighbouring channels",
    "glm4": "neighbouring channels of a part of the head",
    "ministral3": "a factor on queries by position",
}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_edits_of_queries_and_keys(case, rng, name):
    ref, model, prompts, responses, kinds = case(name)
    f = ref.facts
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    edits = [
        vs.Scale("blocks.1.attn.hook_q", 1.5, positions=slice(1, None, 2)),
        vs.Add("blocks.1.attn.hook_k", draw(f.d_head), heads=[0]),
        vs.Scale("blocks.0.attn.hook_v", -0.7),
        vs.Set("blocks.0.attn.hook_k", draw(f.d_head), positions=[2]),
    ]
    for site in ("blocks.0.attn.hook_rot_q", "blocks.1.attn.hook_rot_k"):
        if site in model.sites:
            edits.append(vs.Scale(site, 0.6, positions=[-1, 3]))
    if "blocks.0.ln1.hook_normalized" in model.sites:
        edits.append(vs.Scale("blocks.1.ln1.hook_normalized", 1.3))
        edits.append(vs.Add("blocks.0.ln1.hook_normalized", 0.3 * draw(f.d_model)))
    for kind in ("log probability", "logit difference"):
        of = kinds[kind]
        check(ref, model, prompts, responses, of, list(model.sites), edits, f"{name}, {kind}")


@pytest.mark.parametrize("name", ["granite", "olmo", "phi"])
def test_gradients_through_edited_results_and_outputs(case, rng, name):
    """hook_result and hook_attn_out are what is added to the stream: after Granite's factor, and
    for Phi with its bias. (The heads of these models are no multiple of 16, so that only outputs
    are edited here.)
    """
    ref, model, prompts, responses, kinds = case(name)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    edits = [
        vs.Scale("blocks.1.hook_attn_out", 0.4),
        vs.Add("blocks.0.hook_mlp_out", draw(ref.facts.d_model)),
        vs.Scale("blocks.1.mlp.hook_post", -0.5, positions=[1, -1]),
    ]
    check(ref, model, prompts, responses, kinds["KL"], list(model.sites), edits, name)


def test_clamps_are_awake(case):
    """Some of q, k and v are clamped, so that the gradients above meet both kinds."""
    ref, _, prompts, _, _ = case("olmo")
    row = ref.forward(prompts[1])
    for site in ("q", "k", "v"):
        share = (row.sites[f"blocks.1.attn.hook_{site}"].abs() == ref.facts.clip_qkv).float().mean()
        assert 0.05 < float(share) < 0.6, f"{site}: {share:.2f}"
