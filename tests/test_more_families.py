"""The method on every family of oracle/more_families.py against the float64 oracle: steering and
edits, bits that do not depend on the batch, scores by divergences, gradients of training.
test_attribution_families.py and test_circuit_families.py have scores, circuits and exact patches;
the files that run over all families have sites, gradients, freezing and value vectors.

Bounds are those of the tests of the same things on the first families.
"""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from attribution_setting import Setting, check
from oracle import losses
from oracle.compare import assert_close, assert_same_bits, real
from oracle.more_families import MORE_FAMILIES
from test_edits import case, vector  # noqa: F401  case is a fixture
from test_edits import check as check_run
from test_training import GRADIENT, LOSS, ragged
from test_training import vector as short_vector
from vksteer import steering

LNS = ("ln1", "ln2", "ln1_post", "ln2_post")

pytestmark = pytest.mark.parametrize("name", MORE_FAMILIES)


def test_steering_at_the_first_a_middle_and_the_last_layer(case, rng, name):
    ref, model, prompts, responses = case(name)
    last = ref.facts.n_layers - 1
    for layer, coefficient in ((0, 1.0), ((last + 1) // 2, -0.8), (last, 0.7)):
        seen = [f"blocks.{layer}.hook_resid_pre", f"blocks.{last}.hook_resid_post"]
        v = vector(vs, ref, rng, layer)
        for positions in (None, slice(-2, None)):
            edits = [vs.Steer(v, coefficient, positions)]
            check_run(ref, model, prompts, responses, edits, seen)


def test_edits(case, rng, name):
    """One edit at every kind of site that the family has."""
    ref, model, prompts, responses = case(name)
    f = ref.facts
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    u = draw(f.d_model)
    edits = [
        [vs.Ablate(u)],
        [vs.Add("hook_embed", u)],
        [vs.Set("blocks.1.attn.hook_z", draw(f.d_head), positions=[-1, 2], heads=[1])],
        [vs.Scale("blocks.1.attn.hook_v", -0.5, heads=[0])],
        [vs.Add("blocks.1.attn.hook_k", draw(f.d_head)), vs.Scale("blocks.0.attn.hook_q", 0.5)],
        [vs.Set("blocks.1.mlp.hook_post", draw(f.d_mlp), positions=slice(1, None, 2))],
        [vs.Scale("blocks.1.mlp.hook_pre", -1.0), vs.Add("blocks.0.hook_mlp_out", u)],
        [vs.Scale("blocks.1.attn.hook_result", 0.3, heads=[0]), vs.Scale("ln_final.*", 1.5)],
        [vs.Scale("blocks.1.attn.hook_pattern", 0.5, heads=[1], positions=[-1])],
    ]
    every = slice(0, None, 2)
    for site in (
        "hook_pos_embed",
        "blocks.1.attn.hook_rot_q",
        "blocks.0.attn.hook_rot_k",
        "blocks.1.hook_resid_mid",
        *(f"blocks.1.{ln}.hook_{part}" for ln in LNS for part in ("scale", "normalized")),
    ):
        if site in model.sites:
            edits.append([vs.Scale(site, 0.6, positions=every)])
    if f.gated:  # a factor would be undone by a norm on the output
        edits.append([vs.Add("blocks.1.mlp.hook_pre_linear", draw(f.d_mlp), positions=every)])
    for some in edits:
        check_run(ref, model, prompts, responses, some)
    check_run(ref, model, prompts, responses, [e for some in edits[:6] for e in some])


def test_alone_padded_and_batched_are_the_same_bits(case, rng, name):
    ref, model, _, _ = case(name)
    rows = [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in (9, 1, 33, 17, 2)]
    together = model.run(rows, capture=["*"])
    assert_same_bits("without captures", model.run(rows).logits, together.logits)
    turned = model.run(rows[::-1], capture=["*"])
    for b, row in enumerate(rows):
        n, alone = len(row), model.run([row], capture=["*"])
        assert_same_bits(f"row {b}", alone.logits[0], together.logits[b, -n:])
        for site in model.sites:
            want = real(site, together[site], b, n)
            assert_same_bits(f"{site}, row {b}", alone[site][0], want)
            assert_same_bits(f"{site}, row {b} turned", real(site, turned[site], -b - 1, n), want)
    steer = [vs.Steer(vector(vs, ref, rng), 0.5)]
    options = dict(max_new_tokens=9, ignore_eos=True, edits=steer, progress=False)
    site = f"blocks.{ref.facts.n_layers - 1}.hook_resid_post"
    gens = model.generate(rows, capture=[site], **options)
    responses = [gen.tokens.tolist() for gen in gens]
    run = model.run(rows, responses, edits=steer, capture=[site])
    for b, (row, gen) in enumerate(zip(rows, gens)):
        (alone,) = model.generate([row], capture=[site], **options)
        assert alone.tokens.tolist() == responses[b]
        assert_same_bits(f"decoding, row {b}", alone.captured[site], gen.captured[site])
        # a row that grows beyond the switch of longrope was decoded with other tables before
        if len(row) > ref.facts.rope_switch or len(row) + 9 <= ref.facts.rope_switch:
            n = len(gen.captured[site])
            assert_close("decoded against prefilled", gen.captured[site], run[site][b, -n:], 2e-5)


def test_scores(zoo, rng, name):
    """With metrics of whole distributions; test_attribution_families.py has all of the rest."""
    s = Setting(zoo, rng, name, sizes=((7, 9), (4, 14)))
    for options in (
        dict(steps=3, metric="directional_kl", at="normed", clean="base"),
        dict(steps=2, metric="kl", rule="left", capped=False),
    ):
        got, want = s.both(**options)
        check(f"{name} {options}", got, want, options.get("at", "pre_norm"))
        largest = want.edges[options.get("at", "pre_norm")].abs()
        assert float(largest.max()) > 1e-3 and (largest != 0).float().mean() > 0.5


def test_gradients_of_training(zoo, rng, name):
    model, ref = zoo.engine(name), zoo.reference(name)
    for layer in (0, model.config.n_layers - 1):
        examples, v = ragged(rng, model.config.d_vocab)[::3], short_vector(rng, model, layer)
        for loss, own, options in (
            (steering.ntp_loss, losses.ntp, {}),
            (steering.po_loss, losses.po, dict(phi=0.3)),
        ):
            got = loss(model, examples, v, 0.7, **options)
            want = losses.with_gradient(own, ref, examples, v.direction, layer, 0.7, **options)
            assert abs(got[0] - want[0]) <= LOSS * max(1.0, abs(want[0]))
            assert_close(f"{name}, layer {layer}, {own.__name__}", got[1], want[1], GRADIENT)
