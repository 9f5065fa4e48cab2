"""The method on every family of oracle/more_families.py against the float64 oracle: steering and
edits, bits that do not depend on the batch, scores, exact patches, circuits, gradients of training.

Bounds are those of the tests of the same things on the first families.
"""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from attribution_setting import BOUND, Setting
from attribution_setting import check as check_scores
from oracle import circuits as oc
from oracle import losses
from oracle.attribution import exact
from oracle.compare import assert_close, assert_same_bits, real
from oracle.families import FAMILIES
from oracle.more_families import MORE_FAMILIES
from test_circuit_runs import Setting as CircuitSetting
from test_edits import case, check, vector  # noqa: F401  case is a fixture
from test_training import GRADIENT, LOSS, ragged
from test_training import vector as short_vector
from vksteer import steering
from vksteer.circuits.circuit import Circuit

LNS = ("ln1", "ln2", "ln1_post", "ln2_post")

pytestmark = pytest.mark.parametrize("name", [n for n in MORE_FAMILIES if n in FAMILIES])


def test_steering_at_the_first_a_middle_and_the_last_layer(case, rng, name):
    ref, model, prompts, responses = case(name)
    last = ref.facts.n_layers - 1
    for layer, coefficient in ((0, 1.0), ((last + 1) // 2, -0.8), (last, 0.7)):
        seen = [f"blocks.{layer}.hook_resid_pre", f"blocks.{last}.hook_resid_post"]
        v = vector(vs, ref, rng, layer)
        for positions in (None, slice(-2, None)):
            edits = [vs.Steer(v, coefficient, positions)]
            check(ref, model, prompts, responses, edits, seen)


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
        check(ref, model, prompts, responses, some)
    check(ref, model, prompts, responses, [e for some in edits[:6] for e in some])


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
    s = Setting(zoo, rng, name, sizes=((7, 9), (4, 14)))
    for options in (
        dict(steps=3, dims="all", per_position=True),
        dict(steps=3, metric="directional_kl", at="normed", clean="base"),
        dict(steps=2, metric="kl", rule="left", capped=False),
    ):
        got, want = s.both(**options)
        check_scores(f"{name} {options}", got, want, options.get("at", "pre_norm"))
        largest = want.edges[options.get("at", "pre_norm")].abs()
        assert float(largest.max()) > 1e-3 and (largest != 0).float().mean() > 0.5
    got, want = s.both(steps=3, dims="all", per_position=True)
    assert_close("dims", got.dims, want.dims, BOUND)
    for i in range(len(s.cases)):
        assert_close(f"sample {i}", got.positions[i], want.positions[i]["pre_norm"], BOUND)


def test_exact_patches(zoo, rng, name):
    s = Setting(zoo, rng, name, sizes=((6, 8),))
    graph = vs.patching.graph(s.model, 1)
    edges = [
        graph.edge_names[i]
        for i in sorted(rng.choice(graph.n_edges, min(24, graph.n_edges), replace=False))
    ]
    edges += ["steer->logits", "steer->m1", "m1->logits"]
    common = s.ref, s.samples[0], s.vector, s.coefficient
    for what in (dict(edges=edges), dict(nodes=list(graph.node_names))):
        for clean in ("steered", "base"):
            got = vs.patching.exact(
                s.model,
                s.samples[0],
                s.vector,
                s.coefficient,
                clean=clean,
                progress=False,
                **what,
            )
            want = exact(*common, clean=clean, case=s.cases[0], **what)
            assert_close(f"{name} {clean} {list(what)}", got, want, BOUND)


def test_circuits(zoo, rng, name):
    s = CircuitSetting(zoo, name, rng, sizes=((7, 9), (4, 1)))
    s.circuits = [s.circuits[i] for i in (0, 2, 4, 6)]
    for circuit, got, want in zip(s.circuits, s.evaluate(), s.oracle(), strict=True):
        for metric in oc.METRICS:
            scale = max(1.0, abs(want[metric].full), abs(want[metric].empty))
            for part in ("value", "full", "empty"):
                a, b = getattr(got[metric], part), getattr(want[metric], part)
                # near ties under a circuit may fall either way
                assert metric == "match" or abs(a - b) <= 1e-4 * scale, (
                    f"{name} {len(circuit)} edges, {metric} {part}: {a} against {b}"
                )
    ends = [Circuit(s.graph), Circuit(s.graph, np.arange(s.graph.n_edges))]
    for result, end in zip(s.evaluate(ends), ("empty", "full")):
        for values in (result[metric].per_sample for metric in oc.METRICS):
            assert np.array_equal(values["value"], values[end])


def test_decoding_under_a_circuit(zoo, rng, name):
    s = CircuitSetting(zoo, name, rng, sizes=((7, 9),))
    prompts = [rng.integers(0, s.ref.facts.d_vocab, n).tolist() for n in (5, 9)]
    gens = s.model.generate(
        prompts,
        circuit=s.circuits[3],
        edits=[vs.Steer(s.vector, 1.0)],
        max_new_tokens=6,
        ignore_eos=True,
        progress=False,
    )
    for prompt, gen in zip(prompts, gens):
        want, margins = oc.generate(s.ref, prompt, 6, s.exact, 1.0, set(s.circuits[3]))
        got = gen.tokens.tolist()
        if got != want:
            step = next(i for i in range(6) if got[i] != want[i])
            assert margins[step] < 1e-3, f"step {step}: {got} against {want}"


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
