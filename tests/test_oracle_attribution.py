"""The oracle of attribution, circuits and losses itself: identities, finite differences and limits
that hold whatever the model is.

Measured here (5 kinds, 16 tokens): logits within 2e-14 of Reference's, gradients within 2e-10 of
the largest of central differences, completeness at 90 steps within 7e-5 of the difference of m, 9.0
times nearer than at 30.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oracle import circuits as oc
from oracle import losses
from oracle.attribution import Case, attribute, exact, gradients, kl, score
from oracle.compare import assert_close
from oracle.reference import Steer, Vector
from oracle.separated import (
    Separated,
    downstream_nodes,
    edge_names,
    edge_pairs,
    fed_by,
    node_names,
    upstream_nodes,
)

KINDS = ["llama3", "gemma2", "qwen2", "qwen3", "llama_bias"]


class Setting:
    """A family's oracle, a vector at a layer, samples and their cases."""

    def __init__(self, zoo, name, rng, layer=1, sizes=((7, 9), (4, 3)), coefficient=1.0):
        self.ref = zoo.reference(name)
        self.facts, self.layer, self.coefficient = self.ref.facts, layer, coefficient
        draw = lambda n: rng.integers(0, self.facts.d_vocab, n).tolist()
        self.vector = Vector(rng.standard_normal(self.facts.d_model), layer)
        self.samples = [
            SimpleNamespace(prompt_tokens=draw(p), response_tokens=draw(r)) for p, r in sizes
        ]
        self.cases = [Case(self.ref, s, self.vector, coefficient) for s in self.samples]
        self.names = edge_names(self.facts, layer)
        self.common = self.ref, self.samples[0], self.vector, coefficient

    @property
    def case(self):
        return self.cases[0]

    def evaluate(self, circuits, *metrics, **options):
        return oc.evaluate(
            self.ref,
            circuits,
            self.samples,
            self.vector,
            self.coefficient,
            metrics,
            cases=self.cases,
            **options,
        )


@pytest.fixture
def setting(zoo, rng):
    return lambda name, **options: Setting(zoo, name, rng, **options)


# -- the graph -------------------------------------------------------------------------------------

GEMMA = SimpleNamespace(n_layers=26, n_heads=8, n_kv_heads=4)
LLAMA = SimpleNamespace(n_layers=28, n_heads=24, n_kv_heads=8)


@pytest.mark.parametrize(
    "facts, layer, counts, incoming",
    [
        (GEMMA, 15, (188, 946, 7656), dict(mlp=594, q=4048, k=2024, v=2024, logits=100)),
        (LLAMA, 12, (657, 4936, 118848), dict(mlp=3400, q=72384, k=24128, v=24128, logits=401)),
    ],
    ids=["gemma", "llama"],
)
def test_counts_of_the_method_page(facts, layer, counts, incoming):
    kind_of_up = {name: kind for name, kind, _ in upstream_nodes(facts, layer)}
    kind_of_down = {name: kind for name, kind, _ in downstream_nodes(facts, layer)}
    pairs = edge_pairs(facts, layer)
    ups, downs = [kind_of_up[u] for u, _ in pairs], [kind_of_down[v] for _, v in pairs]
    assert (ups.count("steer"), ups.count("mlp"), ups.count("head")) == counts and len(
        pairs
    ) == sum(counts) == sum(incoming.values())
    assert {k: downs.count(k) for k in incoming} == incoming


@pytest.mark.parametrize(
    "facts, layer",
    [
        (GEMMA, 15),
        (LLAMA, 12),
        (SimpleNamespace(n_layers=3, n_heads=3, n_kv_heads=1), 0),
        (SimpleNamespace(n_layers=2, n_heads=4, n_kv_heads=4), 1),
    ],
    ids=["gemma", "llama", "three", "last"],
)
def test_names_and_order_are_those_of_the_engine(facts, layer):
    import vksteer as vs

    graph = vs.patching.graph(facts, layer)
    assert list(graph.edge_names) == edge_names(facts, layer) and list(
        graph.node_names
    ) == node_names(facts, layer)


# -- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_runs_are_those_of_the_reference(setting, name):
    s = setting(name)
    f, case = s.facts, s.case
    both = s.case.net.run([0.0, 1.0, -0.6])
    for r, coefficient in enumerate((0.0, 1.0, -0.6)):
        row = s.ref.forward(case.tokens, edits=[Steer(s.vector, coefficient)])
        close = lambda what, got, want: assert_close(
            f"{name} a={coefficient} {what}", got, want, 1e-12
        )
        close("logits", both.logits[r], row.logits)
        close("steer", both.outputs["steer"][r], row.sites[f"blocks.{s.layer}.hook_resid_pre"])
        for l in range(s.layer, f.n_layers):
            block = f"blocks.{l}."
            close(f"stream {l}", both.stream[l][r], row.sites[block + "hook_resid_pre"])
            close(f"MLP {l}", both.outputs[f"m{l}"][r], row.sites[block + "hook_mlp_out"])
            heads = torch.stack([both.outputs[f"a{l}.h{h}"][r] for h in range(f.n_heads)], dim=1)
            want = row.sites[block + "attn.hook_result"]
            if f.post_norms:
                gain = s.ref.w[f"model.layers.{l}.post_attention_layernorm.weight"] + f.norm_offset
                want = want / row.sites[block + "ln1_post.hook_scale"][:, None] * gain
            close(f"heads {l}", heads, want)
            bias = s.ref.w.get(f"model.layers.{l}.self_attn.o_proj.bias", 0.0)
            close(f"attention {l}", heads.sum(1) + bias, row.sites[block + "hook_attn_out"])
            gain = s.ref.w[f"model.layers.{l}.input_layernorm.weight"] + f.norm_offset
            close(
                f"normed {l}",
                both.normed[f"a{l}.h0<k>"][r],
                row.sites[block + "ln1.hook_normalized"] * gain,
            )
            close(f"MLP input {l}", both.inputs[f"m{l}"][r], row.sites[block + "hook_resid_mid"])
        if f.final_softcap:
            assert not torch.allclose(both.uncapped, both.logits)
        else:
            assert torch.equal(both.uncapped, both.logits)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("metric", ["logit_diff", "directional_kl", "kl"])
def test_gradients_are_central_differences(setting, rng, name, metric):
    """dm/dv and dm/du, one input or output moved alone along a random direction at one position."""
    s = setting(name)
    m = s.case.metric(metric)
    out, into = gradients(s.case, m, [0.7])
    downs = [v for v, _, _ in downstream_nodes(s.facts, s.layer)]
    for where, names, grads in (
        ("at_output", node_names(s.facts, s.layer), out),
        ("at_input", downs, into["pre_norm"]),
    ):
        scale = float(grads.abs().max())
        moved = 0
        for i, name_ in enumerate(names):
            p, e = (
                int(rng.integers(len(s.case.tokens))),
                torch.tensor(rng.standard_normal(s.facts.d_model)) * 1e-5,
            )

            def change(this, x, *_):
                if this != name_:
                    return x
                x = x.clone()
                x[:, p] += torch.stack([e, -e])
                return x

            up, down = m(s.case.net.run([0.7, 0.7], **{where: change}).logits).tolist()
            want = float(grads[i, p] @ e)
            assert abs((up - down) / 2 - want) < 1e-8 * scale * float(e.norm()), (
                f"{where} {name_} at {p}: {(up - down) / 2} against {want}"
            )
            moved += want != 0
        assert moved > len(names) // 2


@pytest.mark.parametrize("name", KINDS)
def test_both_definitions_of_dm_dv_are_one_through_the_norm(setting, name):
    s = setting(name)
    _, into = gradients(s.case, s.case.metric("logit_diff"), [0.4])
    runs = s.case.net.run([0.4])
    for i, (v, kind, l) in enumerate(downstream_nodes(s.facts, s.layer)):
        second = "pre_feedforward_layernorm" if s.facts.post_norms else "post_attention_layernorm"
        weight = (
            "model.norm.weight"
            if kind == "logits"
            else f"model.layers.{l}.{second if kind == 'mlp' else 'input_layernorm'}.weight"
        )
        gain = s.ref.w[weight] + s.facts.norm_offset
        x = runs.inputs[v][0]
        rms = torch.sqrt((x * x).mean(-1, keepdim=True) + s.facts.eps)
        # minus its part along x: the norm's derivative, by hand
        back = into["normed"][i] * gain / rms
        back = back - x * (back * x).mean(-1, keepdim=True) / rms**2
        assert_close(v, back, into["pre_norm"][i], 1e-10)


# -- scores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_edges_dims_and_positions_add_up(setting, name):
    """The stream is a sum: a node's effect is that of all its edges, and an input's edges together
    are the change of the stream there.
    """
    s = setting(name)
    options = dict(case=s.case, steps=3, metric="directional_kl")
    found = score(*s.common, **options)
    ups, pairs = node_names(s.facts, s.layer), edge_pairs(s.facts, s.layer)
    leaving = torch.stack(
        [sum(x for x, (u, _) in zip(found.edges["pre_norm"], pairs) if u == node) for node in ups]
    )
    assert_close("edges of a node", leaving, found.nodes, 1e-11)
    assert_close("dims", found.dims.sum(1), found.nodes, 1e-12)
    for at in ("pre_norm", "normed"):
        assert_close("positions", found.positions[at].sum(1), found.edges[at], 1e-12)
    _, into = gradients(
        s.case, s.case.metric("directional_kl"), [s.coefficient * (i + 0.5) / 3 for i in range(3)]
    )
    for i, (v, _, _) in enumerate(downstream_nodes(s.facts, s.layer)):
        for at in ("pre_norm", "normed"):
            arriving = sum(x for x, (_, to) in zip(found.edges[at], pairs) if to == v)
            change = s.case.steered.inputs[v][0] - s.case.base.inputs[v][0]
            assert (
                abs(float(arriving - (change * into[at][i]).sum()))
                < 1e-11 * float(found.edges[at].abs().max()) + 1e-12
            )
    assert found.positions["pre_norm"].shape == (len(s.names), len(s.case.tokens))
    assert_close(
        "steer",
        s.case.steered.outputs["steer"] - s.case.base.outputs["steer"],
        torch.as_tensor(s.vector.direction).expand(1, len(s.case.tokens), -1),
        1e-12,
    )


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "metric, clean",
    [("logit_diff", "steered"), ("directional_kl", "base"), ("kl", "steered"), ("kl", "base")],
)
def test_completeness(setting, name, metric, clean):
    """The steering node's score tends to m(clean) - m(corrupt), with the midpoint rule as 1/T^2;
    the two end points are what left and right differ in.
    """
    s = setting(name)
    at = lambda rule, steps: float(
        score(*s.common, case=s.case, metric=metric, clean=clean, rule=rule, steps=steps).nodes[0]
    )
    difference = score(*s.common, case=s.case, metric=metric, clean=clean, steps=1).difference
    coarse, fine = (at("midpoint", steps) - difference for steps in (30, 90))
    assert abs(fine) < 2e-4 * abs(difference) and 8.5 < coarse / fine < 9.5
    left, right = at("left", 90), at("right", 90)
    assert abs((left + right) / 2 - difference) < 4e-4 * abs(difference)  # the trapezoid rule
    start, end = (
        float(
            (
                gradients(s.case, s.case.metric(metric, clean=clean), [a])[0][0] * s.case.net.vector
            ).sum()
        )
        for a in (0.0, s.coefficient)
    )
    towards = s.coefficient * (1 if clean == "steered" else -1)
    assert abs(right - left - towards * (end - start) / 90) < 1e-10 * max(1.0, abs(difference))


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_identical_runs_give_exact_zeros(setting, name):
    s = setting(name, coefficient=0.0)
    for metric in ("logit_diff", "directional_kl", "kl"):
        for threshold in (0.0, -1.0):
            found = (
                attribute(s.ref, s.samples[:1], s.vector, 0.0, metric=metric, threshold=threshold)
                if threshold < 0 and metric != "logit_diff"
                else score(*s.common, metric=metric, threshold=threshold)
            )
            assert found.n == (10 if threshold < 0 and metric != "logit_diff" else 0)
            for values in (found.nodes, found.dims, *found.edges.values()):
                assert not values.any()


def test_roles(setting):
    """Swapping the roles changes two signs for two of the metrics and therefore nothing;
    plain KL depends on it.
    """
    s = setting("qwen3")
    for metric in ("logit_diff", "directional_kl", "kl"):
        one, other = (
            score(*s.common, case=s.case, metric=metric, clean=clean)
            for clean in ("steered", "base")
        )
        same = all(
            torch.allclose(one.edges[at], other.edges[at], rtol=0, atol=1e-12) for at in one.edges
        )
        assert same == (metric != "kl") and one.n == other.n
    m = s.case.metric("kl")
    assert m(s.case.steered.logits).item() == 0 and m(s.case.base.logits).item() > 0
    assert (
        abs(
            s.case.metric("kl")(s.case.base.logits).item()
            + s.case.metric("directional_kl")(s.case.base.logits).item()
        )
        < 1e-12
    )


def test_capped_and_uncapped(setting):
    for name, same in (("llama3", True), ("gemma2", False)):
        s = setting(name)
        for metric in ("logit_diff", "directional_kl"):
            a, b = (
                score(*s.common, case=s.case, metric=metric, capped=capped)
                for capped in (True, False)
            )
            assert torch.equal(a.edges["pre_norm"], b.edges["pre_norm"]) == same
            if metric == "logit_diff":
                assert a.n == b.n  # a soft cap moves no first choice
    s = setting("gemma2")
    m = s.case.metric("logit_diff", capped=False)
    p = m.positions[0]
    top = [int(run.logits[0, p].argmax()) for run in (s.case.steered, s.case.base)]
    assert (
        abs(
            m.each(s.case.steered.uncapped)[0, 0]
            - (s.case.steered.uncapped[0, p, top[0]] - s.case.steered.uncapped[0, p, top[1]])
        )
        < 1e-12
    )


def test_metric_positions(setting):
    """From the token before the first response token to the last one; a sample's weight
    is how many they are.
    """
    s = setting("llama3")
    for case, n in zip(s.cases, (7, 4)):
        rows = [s.ref.forward(case.tokens, edits=[Steer(s.vector, a)]).logits for a in (0.0, 1.0)]
        differ = [
            p for p in range(n - 1, len(case.tokens)) if rows[0][p].argmax() != rows[1][p].argmax()
        ]
        assert case.positions("logit_diff") == differ and len(differ) > 1
        p, q = (torch.log_softmax(x, -1) for x in (rows[1], rows[0]))
        divergence = torch.stack(
            [(p[i].exp() * (p[i] - q[i])).sum() for i in range(len(case.tokens))]
        )
        assert_close("divergence", case.divergence(), divergence[n - 1 :], 1e-11)
        for threshold in (0.0, float(divergence[n - 1 :].sort().values[1:3].mean())):
            for metric in ("kl", "directional_kl"):
                assert case.positions(metric, threshold) == [
                    i for i in range(n - 1, len(case.tokens)) if divergence[i] > threshold
                ]
    each = [score(s.ref, x, s.vector, 1.0) for x in s.samples]
    both = attribute(s.ref, s.samples, s.vector, 1.0)
    assert both.n == each[0].n + each[1].n and each[0].n != each[1].n
    assert torch.allclose(
        both.nodes, (each[0].n * each[0].nodes + each[1].n * each[1].nodes) / both.n, atol=1e-12
    )


# -- exact patches ---------------------------------------------------------------------------------


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


# -- circuits --------------------------------------------------------------------------------------


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
    gain = s.ref.w["model.norm.weight"] + s.facts.norm_offset
    logits = x / torch.sqrt((x * x).mean(-1, keepdim=True) + s.facts.eps) * gain @ s.ref.unembed.T
    assert_close("steer->logits", only.uncapped[0], logits, 1e-11)


@pytest.mark.parametrize("name", [k for k in KINDS if k != "gemma2"])
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
        logit_diff=np.mean(sum(differences, [])),
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


# -- losses ----------------------------------------------------------------------------------------


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
