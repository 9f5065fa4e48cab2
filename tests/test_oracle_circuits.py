"""The independent exact patches, circuits and losses that the engine is compared with."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oracle import circuits as oc
from oracle import losses
from oracle.attribution import exact, kl
from oracle.compare import assert_close
from oracle.reference import Steer, Vector
from oracle.separated import (
    Separated,
    edge_names,
    fed_by,
)
from oracle_setting import KINDS, Setting, setting  # noqa: F401


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("metric", ["logit_diff", "directional_kl", "kl"])
def test_exact_patches_and_circuits_that_lack_one_edge(setting, name, metric):
    """A base value patched into one input of the steered run is the circuit of all other edges; all
    of the steering node is the whole effect.
    """
    s = setting(name)
    options = dict(case=s.case, metric=metric)
    m = s.case.metric(metric, clean="base")
    got = exact(*s.common, edges=s.names, clean="base", **options)
    runs = oc.run(s.case.net, s.case.base, s.coefficient, [set(s.names) - {e} for e in s.names])
    assert_close("edges", got, m(runs.logits) - m(s.case.steered.logits), 1e-9)
    assert float(got.abs().max()) > 1e-2
    for clean in ("steered", "base"):
        whole = exact(*s.common, nodes=["steer"], clean=clean, **options)[0]
        m = s.case.metric(metric, clean=clean)
        one, other = s.case.roles(clean)
        assert abs(float(whole) - float(m(one.logits) - m(other.logits))) < 1e-9
    # a node's patch is the patch of all its edges, where nothing stands between: the last MLP
    last = f"m{s.facts.n_layers - 1}"
    assert torch.allclose(
        exact(*s.common, nodes=[last], **options),
        exact(*s.common, edges=[last + "->logits"], **options),
        atol=1e-10,
    )


def test_exact_patches_at_positions(setting):
    s = setting("gemma2")
    edge, n = "steer->a2.h1<v>", len(s.case.tokens)
    whole = exact(*s.common, edges=[edge], case=s.case)
    assert torch.allclose(
        whole, exact(*s.common, edges=[edge], positions=list(range(n)), case=s.case)
    )
    last = exact(*s.common, edges=[edge], positions=[-1], case=s.case)
    assert torch.allclose(
        last, exact(*s.common, edges=[edge], positions=[6], case=s.case)
    ) and not torch.allclose(last, whole)
    assert exact(*s.common, edges=[edge], positions=[], case=s.case).item() == 0.0
    x, patched = (
        s.case.base,
        s.case.net.run(
            [0.0], at_input=lambda name, x, _: x + (name == "a2.h1<v>") * s.case.net.vector
        ),
    )
    m = s.case.metric("logit_diff")
    assert torch.allclose(whole, m(patched.logits) - m(x.logits), atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_full_and_empty_circuits(setting, rng, name):
    s = setting(name)
    # steering enters nothing: the base run
    from_heads = {e for e in s.names if not e.startswith("steer")}
    runs = oc.run(s.case.net, s.case.base, s.coefficient, [set(s.names), set(), from_heads])
    for r, want in enumerate((s.case.steered, s.case.base, s.case.base)):
        assert_close(f"circuit {r}", runs.logits[r], want.logits[0], 1e-11)
    full, empty = s.evaluate([set(s.names), set()], *oc.METRICS)
    for metric in oc.METRICS:
        assert abs(full[metric].faithfulness - 1) < 1e-9 and abs(empty[metric].faithfulness) < 1e-9
        assert (full[metric].full, full[metric].empty) == (empty[metric].full, empty[metric].empty)
    assert (
        full["kl"].full == 0
        and full["kl"].empty > 0
        and full["match"].full == 1
        and full["logprob"].full < 0
    )
    # the vector alone, added before the final norm
    only = oc.run(s.case.net, s.case.base, s.coefficient, [{"steer->logits"}])
    x = s.case.base.inputs["logits"][0] + s.coefficient * s.case.net.vector
    x = x - x.mean(-1, keepdim=True) if s.facts.norm == "layer" else x
    gain = s.ref.w["model.norm.weight"] + s.facts.norm_offset
    normed = x / torch.sqrt((x * x).mean(-1, keepdim=True) + s.facts.eps) * gain
    normed = normed + s.ref.w.get("model.norm.bias", 0.0)
    logits = normed @ s.ref.unembed.T + s.ref.w.get("lm_head.bias", 0.0)
    logits = s.facts.logit_scale * logits
    assert_close("steer->logits", only.uncapped[0], logits, 1e-11)


@pytest.mark.parametrize("name", [k for k in KINDS if k not in ("gemma2", "olmo2")])
def test_edges_off_all_paths_change_nothing(setting, rng, name):
    """True without post-norms only: there a head that leads nowhere still enters the RMS by which
    its layer's other heads are divided.
    """
    s = setting(name)
    some = [{e for e in s.names if rng.random() < share} for share in (0.1, 0.2, 0.3, 0.5, 0.7)]
    left = [oc.prune(s.facts, c) for c in some]
    assert any(0 < len(b) < len(a) for a, b in zip(some, left))
    a, b = (oc.run(s.case.net, s.case.base, s.coefficient, c).logits for c in (some, left))
    assert_close("pruned", a, b, 1e-11)


def test_metrics_by_hand(setting):
    s = setting("qwen2")
    circuit = {e for i, e in enumerate(s.names) if i % 3}
    found = s.evaluate([circuit], *oc.METRICS, threshold=0.5)[0]
    runs = [
        (c, *(x.logits[0] for x in (oc.run(c.net, c.base, 1.0, [circuit]), c.steered, c.base)))
        for c in s.cases
    ]
    differences, divergences, kls, matches, said = [], [], [], [], []
    for case, x, steered, base in runs:
        first, n = len(case.prompt) - 1, len(case.tokens)
        pair = [
            (p, steered[p].argmax(), base[p].argmax())
            for p in range(first, n)
            if steered[p].argmax() != base[p].argmax()
        ]
        differences.append([float(x[p, a] - x[p, b]) for p, a, b in pair])
        divergences += [
            float(kl(base[p], x[p]) - kl(steered[p], x[p]))
            for p in range(first, n)
            if kl(steered[p], base[p]) > 0.5
        ]
        for p in range(first, n - 1):
            kls.append(float(kl(steered[p], x[p])))
            matches.append(float(x[p].argmax() == steered[p].argmax()))
            said.append(float(torch.log_softmax(x[p], -1)[case.tokens[p + 1]]))
    assert len(kls) == 9 + 3
    want = dict(
        logit_diff=np.mean(np.concatenate(differences)),
        logit_diff_per_sample=np.mean([np.mean(d) for d in differences]),
        directional_kl=np.mean(divergences),
        kl=np.mean(kls),
        match=np.mean(matches),
        logprob=np.mean(said),
    )
    for metric, value in want.items():
        assert abs(found[metric].value - value) < 1e-10, metric
    assert abs(found["logit_diff"].value - found["logit_diff_per_sample"].value) > 1e-3


def test_decoding_under_a_circuit(setting):
    s = setting("gemma2")
    prompt = s.samples[0].prompt_tokens
    generate = lambda circuit: oc.generate(s.ref, prompt, 8, s.vector, 1.0, circuit)
    steered, base = (s.ref.generate(prompt, 8, edits=[Steer(s.vector, a)]) for a in (1.0, 0.0))
    assert generate(set(s.names))[0] == steered[0] != base[0] == generate(set())[0]
    np.testing.assert_allclose(generate(set(s.names))[1], steered[1], rtol=0, atol=1e-11)
    circuit = {e for e in s.names if "m2" in e or e.startswith("steer->a")}
    new, _ = generate(circuit)  # causal: one pass over prompt and response says the same
    net = Separated(s.ref, prompt + new, s.vector, s.layer)
    logits = oc.run(net, net.run([0.0]), 1.0, [circuit]).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize("shape", [(2, 2, 1, 0), (2, 2, 2, 0), (3, 2, 1, 1), (3, 3, 1, 1)], ids=str)
def test_pruning_is_the_union_of_all_paths(rng, shape):
    facts, layer = (
        SimpleNamespace(n_layers=shape[0], n_heads=shape[1], n_kv_heads=shape[2]),
        shape[3],
    )
    names = edge_names(facts, layer)
    assert (
        oc.prune(facts, names) == set(names) == {e for path in oc.paths(facts, names) for e in path}
    )
    some = 0
    for share in (0.1, 0.2, 0.4, 0.6):
        for _ in range(8):
            kept = [e for e in names if rng.random() < share]
            left = oc.prune(facts, kept)
            assert left == {e for path in oc.paths(facts, kept) for e in path}
            some += 0 < len(left) < len(kept)
    assert some > 8


def test_finding_circuits(rng):
    facts, layer = SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=2), 1
    names = edge_names(facts, layer)
    scores = np.round(rng.standard_normal(len(names)), 1)  # ties, which graph order decides
    order = sorted(range(len(names)), key=lambda i: (-abs(scores[i]), i))
    assert oc.ranking(scores) == order and oc.top(names, scores, 5) == {names[i] for i in order[:5]}
    for n in (0, 1, 2, 7, 20, 60, len(names)):
        c = oc.pruned(facts, names, scores, n)
        assert len(c) >= n and oc.prune(facts, c) == c and (n == 0) == (not c)
        # a shorter prefix has fewer than n
        longest = max((order.index(names.index(e)) for e in c), default=-1)
        assert len(oc.prune(facts, [names[i] for i in order[: max(longest, 0)]])) < max(n, 1)
        for backward in (True, False):
            g = oc.greedy(facts, names, scores, n, backward)
            assert len(g) >= n and oc.prune(facts, g) == g
    assert (
        oc.pruned(facts, names, scores, len(names))
        == oc.greedy(facts, names, scores, len(names), True)
        == set(names)
    )
    # a key input belongs to both query heads of its group
    best = {"steer->a1.h0<k>", "a1.h1->logits"}
    chain = [
        3.0 if e in best else 2.0 if e == "steer->logits" else 1.0 if e == "steer->m2" else 0.0
        for e in names
    ]
    assert oc.pruned(facts, names, chain, 1) == best == oc.pruned(facts, names, chain, 2)
    assert (
        oc.greedy(facts, names, chain, 1, True) == best == oc.greedy(facts, names, chain, 1, False)
    )
    assert oc.greedy(facts, names, chain, 3, True) == best | {"steer->logits"}
    assert (
        fed_by(facts, "a2.h1<v>") == ["a2.h2", "a2.h3"]
        and fed_by(facts, "a2.h1<q>") == ["a2.h1"]
        and fed_by(facts, "logits") == []
    )


@pytest.mark.parametrize(
    "loss, options",
    [
        (losses.ntp, {}),
        (losses.ntp, dict(reduction="sum")),
        (losses.po, dict(phi=2e-2)),
        (losses.po, dict(phi=5.0)),
    ],
    ids=["ntp", "ntp sum", "po", "po, b above 1"],
)
@pytest.mark.parametrize("name", ["gemma2", "llama3"])
def test_loss_gradients_are_central_differences(zoo, rng, name, loss, options):
    ref = zoo.reference(name)
    draw = lambda n: rng.integers(0, ref.facts.d_vocab, n).tolist()
    examples = [
        SimpleNamespace(prompt=draw(p), winning=draw(w), losing=draw(l), sign=sign)
        for p, w, l, sign in ((5, 3, 7, 1), (4, 6, 2, -1))
    ]
    v, e = (
        torch.tensor(rng.standard_normal(ref.facts.d_model)),
        torch.tensor(rng.standard_normal(ref.facts.d_model)) * 1e-5,
    )
    value = lambda x: losses.with_gradient(loss, ref, examples, x, 1, 0.6, **options)[0]
    _, grad = losses.with_gradient(loss, ref, examples, v, 1, 0.6, **options)
    got, want = float(grad @ e), (value(v + e) - value(v - e)) / 2
    assert abs(got - want) < 1e-6 * float(grad.norm() * e.norm())


def test_losses_by_hand(zoo, rng):
    ref = zoo.reference("qwen3")
    draw = lambda n: rng.integers(0, ref.facts.d_vocab, n).tolist()
    example = SimpleNamespace(prompt=draw(6), winning=draw(70), losing=draw(5), sign=-1)
    v = torch.tensor(rng.standard_normal(ref.facts.d_model))

    def said(response, coefficient):
        logits = torch.log_softmax(
            ref.forward(example.prompt + response, edits=[Steer(Vector(v, 1), coefficient)]).logits,
            -1,
        )
        return sum(float(logits[5 + i, t]) for i, t in enumerate(response[:64]))

    won, lost = said(example.winning, -0.5), said(example.losing, -0.5)
    value, _ = losses.with_gradient(losses.ntp, ref, [example], v, 1, 0.5)
    assert abs(value + won / 64) < 1e-10
    assert (
        abs(losses.with_gradient(losses.ntp, ref, [example], v, 1, 0.5, reduction="sum")[0] + won)
        < 1e-8
    )
    phis = set()
    for phi in (1e-5, 2e-2, 1.0):
        b = max(phi * (said(example.losing, 0.0) - said(example.winning, 0.0)), 1.0)
        phis.add(b > 1)
        delta = b * won / 64 - lost / 5
        assert abs(
            losses.with_gradient(losses.po, ref, [example], v, 1, 0.5, phi=phi)[0]
            - np.logaddexp(0, -delta)
        ) < 1e-8 * max(1, abs(delta))
    assert phis == {True, False}
    two = SimpleNamespace(**{**vars(example), "sign": 1})
    single = [losses.with_gradient(losses.ntp, ref, [x], v, 1, 0.5) for x in (example, two)]
    both = losses.with_gradient(losses.ntp, ref, [example, two], v, 1, 0.5)
    assert abs(both[0] - (single[0][0] + single[1][0]) / 2) < 1e-12 and torch.allclose(
        both[1], (single[0][1] + single[1][1]) / 2
    )
