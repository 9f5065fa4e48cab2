"""Every edit at every kind of site against the float64 oracle, what positions mean, what a run
reports. test_edit_refusals.py has what is refused.

The bound of oracle/compare.py holds for logits and for the edited site, whose captured value is the
one after edits. Largest error met on lavapipe: 4.7e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.compare import assert_close, assert_same_bits, real, share

PROMPTS, RESPONSES = (5, 17, 9), (4, 0, 7)
THOROUGH = ["gemma2", "llama_bias", "qwen3"]
#: One of each kind of layer, position and norm.
KINDS = [
    "gpt2",
    "gpt_neox",
    "gptj",
    "phi_norm",
    "olmo",
    "olmo2",
    "granite",
    "cohere2",
    "ministral3",
]


@pytest.fixture
def case(zoo, rng):
    """The oracle and the engine of a family, and a ragged batch with responses."""

    def make(name):
        ref, model = zoo.reference(name), zoo.engine(name)
        draw = lambda n: rng.integers(0, ref.facts.d_vocab, n).tolist()
        return ref, model, [draw(n) for n in PROMPTS], [draw(n) for n in RESPONSES]

    return make


def check(ref, model, prompts, responses, edits, capture=(), changes=True):
    """Compares a run with the oracle and returns it. edits: one list for all rows or for each."""
    edits = list(edits)
    per_row = bool(edits) and isinstance(edits[0], (list, tuple))
    run = model.run(prompts, responses, edits=edits, capture=list(capture))
    for b, (prompt, response) in enumerate(zip(prompts, responses)):
        mine = list(edits[b]) if per_row else edits
        with torch.no_grad():
            want = ref.forward(prompt + response, edits=mine, prompt_length=len(prompt))
        n = len(prompt) + len(response)
        assert_close(f"logits, row {b}, {mine}", run.logits[b, -n:], want.logits)
        for site in capture:
            assert_close(f"{site}, row {b}, {mine}", real(site, run[site], b, n), want.sites[site])
        if changes is True and any(want.touched):
            with torch.no_grad():
                plain = ref.forward(prompt + response, keep=False).logits
            assert share(plain, want.logits)[0] > 1e-3, (
                f"in the oracle, {mine} changes nothing in row {b}: this would test nothing"
            )
        if not per_row:
            assert run.touched[:, b].tolist() == want.touched, f"touched, row {b}, {mine}"
    if not per_row:
        assert run.touched.shape == (len(edits), len(prompts)) and np.issubdtype(
            run.touched.dtype, np.integer
        )
    return run


def vector(vs, ref, rng, layer=1, size=1.0):
    return vs.SteeringVector(
        (size * rng.standard_normal(ref.facts.d_model)).astype(np.float32), layer
    )


ALL_FAMILIES = [
    "llama2",
    "llama3",
    "llama_yarn",
    "llama_bias",
    "mistral",
    "gemma2",
    "gemma3",
    "qwen2",
    "qwen3",
]


@pytest.mark.parametrize("name", ALL_FAMILIES)
def test_steer_and_ablate(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses = case(name)
    v, u = vector(vs, ref, rng), rng.standard_normal(ref.facts.d_model).astype(np.float32)
    seen = [
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_pre",
        "blocks.1.hook_attn_out",
        "blocks.1.attn.hook_pattern",
    ]
    some = "blocks.1.hook_resid_post" if ref.facts.parallel else "blocks.1.hook_resid_mid"
    for edits in (
        [vs.Steer(v, 1.0)],
        [vs.Steer(v, -0.7)],
        [vs.Steer(v, 0.5), vs.Steer(vector(vs, ref, rng, 0), 0.5)],
        [vs.Steer(vector(vs, ref, rng, ref.facts.n_layers - 1), 2.0)],
        [vs.Ablate(v)],
        [vs.Ablate(u)],
        [vs.Ablate(u, sites=[some, "blocks.*.hook_attn_out"])],
        [vs.Steer(v, 1.0), vs.Ablate(u), vs.Steer(v, 0.25)],
    ):
        check(ref, model, prompts, responses, edits, seen)


POSITIONS = [
    None,
    "prompt",
    "response",
    [0],
    [-1],
    [-2, 1],
    [3, 1, 6],
    slice(None),
    slice(2, 5),
    slice(-3, None),
    slice(None, -1),
    slice(1, None, 2),
    slice(-2, 2),
    slice(-3, -1),
    [],
]


@pytest.mark.parametrize("positions", POSITIONS, ids=str)
def test_positions_count_from_the_rows_own_first_token(case, rng, positions):
    import vksteer as vs

    ref, model, prompts, responses = case("gemma2")
    v = vector(vs, ref, rng)
    check(
        ref,
        model,
        prompts,
        responses,
        [vs.Steer(v, 1.0, positions=positions)],
        ["blocks.1.hook_resid_pre"],
    )
    check(
        ref,
        model,
        prompts,
        responses,
        [vs.Add("blocks.2.attn.hook_z", 1.5, positions=positions)],
        ["blocks.2.attn.hook_z"],
        changes=None,
    )
    check(
        ref,
        model,
        prompts,
        responses,
        [vs.Scale("blocks.2.mlp.hook_post", -1.0, positions=positions)],
        ["blocks.2.mlp.hook_post"],
        changes=None,
    )
    check(
        ref,
        model,
        prompts,
        responses,
        [vs.Scale("blocks.1.attn.hook_pattern", 0.5, positions=positions)],
        ["blocks.1.attn.hook_pattern"],
        changes=None,
    )
    check(
        ref,
        model,
        prompts,
        responses,
        [vs.Ablate(v, positions=positions)],
        ["blocks.3.hook_mlp_out"],
        changes=None,
    )


def sites_of_layer(ref, layer):
    return [
        s
        for s in ref.site_names()
        if s.startswith(f"blocks.{layer}.") or not s.startswith("blocks.")
    ]


@pytest.mark.parametrize("name", [*THOROUGH, *KINDS])
def test_every_site_can_be_edited(case, rng, name):
    ref, model, prompts, responses = case(name)
    import vksteer as vs

    failures = []
    assert list(model.sites) == ref.site_names()
    for site in sites_of_layer(ref, 1):
        for edit in (
            vs.Scale(site, 1.5, positions=slice(1, None, 2)),
            vs.Add(site, 0.25, positions=[-1, 2]),
            vs.Set(site, 0.3, positions=[-2]),
        ):
            try:
                check(ref, model, prompts, responses, [edit], [site], changes=None)
            except Exception as e:  # all sites are tried, so that one report names them all
                failures.append(
                    f"{type(edit).__name__} at {site}: {type(e).__name__}: {str(e).splitlines()[0]}"
                )
    assert not failures, f"{len(failures)} of {3 * len(sites_of_layer(ref, 1))}:\n" + "\n".join(
        failures
    )


@pytest.mark.parametrize("name", THOROUGH)
def test_values_broadcast_against_the_selected_slice(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses = case(name)
    f = ref.facts
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    P = [-1, 2, 0]  # in this order: the first value is for the last token of the prompt
    for edits in (
        [vs.Set("blocks.1.hook_resid_mid", draw(f.d_model), positions=P)],
        [vs.Set("blocks.1.hook_resid_mid", draw(3, f.d_model), positions=P)],
        [vs.Set("blocks.1.hook_resid_mid", draw(3, 1), positions=P)],
        [vs.Add("blocks.1.hook_attn_out", draw(2, f.d_model), positions=slice(1, 3))],
        [vs.Set("blocks.1.attn.hook_q", draw(3, f.n_heads, f.d_head), positions=P)],
        [vs.Set("blocks.1.attn.hook_k", draw(f.n_kv_heads, f.d_head), positions=P)],
        [vs.Set("blocks.1.attn.hook_v", draw(f.d_head), positions="prompt")],
        [vs.Scale("blocks.1.attn.hook_z", draw(f.n_heads, 1))],
        [vs.Scale("blocks.1.mlp.hook_post", draw(f.d_mlp))],
        [vs.MeanAblate("blocks.1.mlp.hook_post", draw(f.d_mlp))],
        [
            vs.MeanAblate(
                "blocks.1.attn.hook_result", draw(f.n_heads, f.d_model), positions=slice(-2, None)
            )
        ],
        [vs.Set("blocks.1.attn.hook_result", draw(3, 1, f.d_model), positions=P, heads=[1])],
        [vs.Set("blocks.1.ln2.hook_scale", 1.0 + draw(3, 1) ** 2, positions=P)],
        [vs.Add("ln_final.hook_normalized", draw(3, f.d_model), positions=P)],
        [vs.Add("hook_embed", draw(f.d_model), positions=[1])],
    ):
        check(ref, model, prompts, responses, edits, [edits[0].site])


@pytest.mark.parametrize("name", ["gemma2", "llama3", "qwen2"])
def test_heads(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses = case(name)
    f = ref.facts
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    two = [f.n_heads - 1, 0]
    for edits in (
        [vs.Set("blocks.1.attn.hook_z", draw(f.d_head), heads=[1])],
        [vs.Set("blocks.1.attn.hook_z", draw(2, f.d_head), heads=two)],
        [vs.Set("blocks.1.attn.hook_z", draw(3, 2, f.d_head), heads=two, positions=[-1, 0, 2])],
        [vs.Scale("blocks.1.attn.hook_pattern", 0.0, heads=[0])],
        [vs.Scale("blocks.1.attn.hook_attn_scores", 2.0, heads=two, positions=slice(2, None))],
        [vs.Add("blocks.1.attn.hook_q", draw(f.d_head), heads=[2])],
        [vs.Add("blocks.1.attn.hook_rot_q", draw(f.d_head), heads=two)],
        [
            vs.Add(
                "blocks.1.attn.hook_rot_k",
                draw(f.d_head),
                heads=[f.n_kv_heads - 1],
                positions=[0, 2],
            )
        ],
        [vs.Scale("blocks.1.attn.hook_v", -1.0, heads=[f.n_kv_heads - 1])],
        [vs.MeanAblate("blocks.1.attn.hook_result", draw(f.d_model), heads=[1])],
    ):
        check(ref, model, prompts, responses, edits, [edits[0].site])
    one = model.run(prompts, edits=[vs.Scale("blocks.1.attn.hook_z", 0.5, heads=1)]).logits
    assert_same_bits(
        "heads=1 and heads=[1]",
        one,
        model.run(prompts, edits=[vs.Scale("blocks.1.attn.hook_z", 0.5, heads=[1])]).logits,
    )


@pytest.mark.parametrize("name", ["gemma2", "mistral", "llama3"])
def test_pattern_and_scores(case, rng, name):
    """An edit cannot unmask a key, neither in the future nor outside a window."""
    import vksteer as vs

    ref, model, prompts, responses = case(name)
    # Layer 0 has a sliding window in Gemma 2 and Mistral.
    both = ["blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"]
    for edits in (
        [vs.Set(both[0], 0.0)],
        [vs.Set(both[1], 0.1)],
        [vs.Scale(both[0], 0.0)],
        [vs.Add(both[0], 3.0, heads=[0], positions=[4])],
        [vs.Set(both[1], 0.25, heads=[1], positions=[-1])],
        [vs.Scale(both[0], -1.0), vs.Scale(both[1], 0.5)],
    ):
        check(ref, model, prompts, responses, edits, both, changes=None)
    # All keys of one query of one prompt, as [head, query, key] without padding.
    n = len(prompts[1])
    row = rng.random((1, 1, n)).astype(np.float32)
    check(ref, model, prompts[1:2], [[]], [vs.Set(both[1], row, heads=[1], positions=[-1])], both)
    every = rng.random((ref.facts.n_heads, 2, n)).astype(np.float32)
    check(ref, model, prompts[1:2], [[]], [vs.Set(both[1], every, positions=[-1, 3])], both)


@pytest.mark.parametrize("name", ["gemma2", "llama_bias"])
def test_several_edits_act_in_order(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses = case(name)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    site, D = "blocks.1.hook_resid_pre", ref.facts.d_model
    v = vector(vs, ref, rng)
    a, b, c, d = (
        vs.Scale(site, 2.0),
        vs.Add(site, draw(D)),
        vs.Steer(v, 1.0),
        vs.Set(site, draw(D), positions=[-1]),
    )
    for edits in (
        [a, b],
        [b, a],
        [c, a],
        [a, c],
        [d, c],
        [c, d],
        [a, b, c, d],
        [d, c, b, a],
        [vs.Ablate(v), c],
        [c, vs.Ablate(v)],
    ):
        check(ref, model, prompts, responses, edits, [site], changes=None)
    assert (
        share(model.run(prompts, edits=[a, b]).logits, model.run(prompts, edits=[b, a]).logits)[0]
        > 1e-3
    )
    check(
        ref,
        model,
        prompts,
        responses,
        [
            vs.Scale("blocks.0.attn.hook_q", 1.2),
            vs.Add("blocks.1.mlp.hook_pre", 0.5),
            vs.Set("blocks.1.attn.hook_z", 0.0, heads=[0]),
            c,
            vs.Scale("blocks.2.ln1.hook_normalized", 0.9),
            vs.Scale("blocks.*.hook_mlp_out", 0.8, positions="response"),
        ],
        ["blocks.2.hook_resid_post"],
    )


@pytest.mark.parametrize("name", ["gemma3", "qwen2"])
def test_edits_of_one_row_leave_the_others_alone(case, rng, name):
    import vksteer as vs

    ref, model, prompts, responses = case(name)
    v = vector(vs, ref, rng)
    edits = [
        [vs.Steer(v, 1.0)],
        [],
        [
            vs.Steer(v, -1.0),
            vs.Scale("blocks.1.attn.hook_pattern", 0.5),
            vs.Set("blocks.0.mlp.hook_post", 0.1, positions=[-1]),
        ],
    ]
    run = check(ref, model, prompts, responses, edits, ["blocks.1.hook_resid_pre"], changes=None)
    plain, alone = (
        model.run(prompts, responses),
        [model.run([p], [r], edits=e) for p, r, e in zip(prompts, responses, edits)],
    )
    assert_same_bits("a row without edits", run.logits[1], plain.logits[1])
    for b in range(3):
        n = PROMPTS[b] + RESPONSES[b]
        assert_same_bits(f"row {b} alone", run.logits[b, -n:], alone[b].logits[0])
    assert run.touched.shape[1] == 3


def test_edits_that_change_nothing_change_no_bit(case, rng):
    import vksteer as vs

    ref, model, prompts, responses = case("gemma2")
    plain = model.run(prompts, responses, capture=["*"])
    same = plain["blocks.1.hook_resid_mid"]
    for edits in (
        [vs.Steer(vector(vs, ref, rng), 0.0)],
        [vs.Scale("blocks.1.attn.hook_z", 1.0)],
        [vs.Steer(vector(vs, ref, rng), 2.0, positions=[])],
        [vs.Add("blocks.1.hook_attn_out", 0.0, positions=[400])],
    ):
        run = model.run(prompts, responses, edits=edits, capture=["*"])
        assert_same_bits(str(edits), run.logits, plain.logits)
    n = PROMPTS[1] + RESPONSES[1]  # setting a site to its captured value is the same run
    run = model.run(
        prompts[1:2],
        responses[1:2],
        edits=[vs.Set("blocks.1.hook_resid_mid", same[1, -n:])],
        capture=["blocks.3.hook_resid_post"],
    )
    assert_same_bits(
        "captured and set",
        run["blocks.3.hook_resid_post"][0],
        plain["blocks.3.hook_resid_post"][1, -n:],
    )


def test_touched_counts_tokens(case, rng):
    import vksteer as vs

    ref, model, prompts, responses = case("llama2")
    v = vector(vs, ref, rng)
    run = model.run(
        prompts,
        responses,
        edits=[
            vs.Steer(v, 1.0),
            vs.Steer(v, 1.0, "prompt"),
            vs.Steer(v, 1.0, "response"),
            vs.Steer(v, 1.0, [-1, 0, 6]),
            vs.Steer(v, 1.0, slice(-2, None)),
            vs.Ablate(v),
        ],
    )
    assert run.touched.tolist() == [
        [9, 17, 16],
        [5, 17, 9],
        [4, 0, 7],
        [3, 3, 3],
        [6, 2, 9],
        [9, 17, 16],
    ]
    assert model.run(prompts).touched.shape == (0, 3)


def test_the_model_is_usable_after_a_refusal(case, rng):
    import vksteer as vs

    ref, model, prompts, responses = case("llama2")
    with pytest.raises(ValueError):
        model.run(prompts, edits=[vs.Steer(vs.SteeringVector(np.ones(7, np.float32), 1), 1.0)])
    check(ref, model, prompts, responses, [vs.Steer(vector(vs, ref, rng), 1.0)])
