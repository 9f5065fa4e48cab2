"""The oracle of attribution, circuits and losses itself: identities, finite differences and limits
that hold whatever the model is.

Measured here (12 kinds, 16 tokens): logits within 2e-14 of Reference's, gradients within 2e-10 of
the largest of central differences, completeness at 90 steps within 7e-5 of the difference of m, 9.0
times nearer than at 30; with clipped queries, keys and values within 4e-4.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from oracle.attribution import attribute, gradients, score
from oracle.compare import assert_close
from oracle.reference import Steer
from oracle.separated import (
    downstream_nodes,
    edge_names,
    edge_pairs,
    node_names,
    upstream_nodes,
)
from oracle_setting import KINDS, Setting, setting  # noqa: F401

# -- the graph -------------------------------------------------------------------------------------

GEMMA = SimpleNamespace(n_layers=26, n_heads=8, n_kv_heads=4, parallel=False)
LLAMA = SimpleNamespace(n_layers=28, n_heads=24, n_kv_heads=8, parallel=False)
PYTHIA = SimpleNamespace(n_layers=12, n_heads=12, n_kv_heads=12, parallel=True)
GPT2 = SimpleNamespace(n_layers=12, n_heads=12, n_kv_heads=12, parallel=False)
OLMO2 = SimpleNamespace(n_layers=16, n_heads=16, n_kv_heads=16, parallel=False)


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
    "facts, layer, counts",
    [
        (PYTHIA, 6, (223, 561, 6732)),
        (GPT2, 6, (223, 561, 6804)),
        (OLMO2, 8, (393, 1380, 22208)),
    ],
    ids=["pythia-160m", "gpt2", "olmo2-1b"],
)
def test_counts_of_other_layers(facts, layer, counts):
    """From the steering node, MLPs and heads. By hand: with n layers and w inputs in each, steer
    has w n + 1 edges, an MLP those of later layers, a head of a parallel layer the same.
    """
    kinds = {name: kind for name, kind, _ in upstream_nodes(facts, layer)}
    ups = [kinds[u] for u, _ in edge_pairs(facts, layer)]
    assert (ups.count("steer"), ups.count("mlp"), ups.count("head")) == counts
    n, w = facts.n_layers - layer, facts.n_heads + 2 * facts.n_kv_heads + 1
    later = [w * (n - 1 - i) + 1 for i in range(n)]
    own = 0 if facts.parallel else 1
    assert counts == (w * n + 1, sum(later), facts.n_heads * sum(x + own for x in later))


@pytest.mark.parametrize(
    "facts, layer",
    [
        (GEMMA, 15),
        (LLAMA, 12),
        (SimpleNamespace(n_layers=3, n_heads=3, n_kv_heads=1, parallel=False), 0),
        (SimpleNamespace(n_layers=2, n_heads=4, n_kv_heads=4, parallel=False), 1),
        (PYTHIA, 6),
        (SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=2, parallel=True), 1),
    ],
    ids=["gemma", "llama", "three", "last", "pythia", "parallel"],
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
            added = heads.sum(1) + f.residual_scale * bias
            close(f"attention {l}", added, row.sites[block + "hook_attn_out"])
            if f.pre_norms:
                norm = f"model.layers.{l}.input_layernorm"
                gain = s.ref.w[norm + ".weight"] + f.norm_offset
                want = row.sites[block + "ln1.hook_normalized"] * gain
                want = want + s.ref.w.get(norm + ".bias", 0.0)
            else:
                want = row.sites[block + "hook_resid_pre"]
            close(f"normed {l}", both.normed[f"a{l}.h0<k>"][r], want)
            reads = "hook_resid_pre" if f.parallel else "hook_resid_mid"
            close(f"MLP input {l}", both.inputs[f"m{l}"][r], row.sites[block + reads])
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
        if not s.facts.pre_norms and kind != "logits":
            assert torch.equal(into["normed"][i], into["pre_norm"][i])
            continue
        second = "pre_feedforward_layernorm" if s.facts.post_norms else "post_attention_layernorm"
        weight = (
            "model.norm.weight"
            if kind == "logits"
            else f"model.layers.{l}.{second if kind == 'mlp' else 'input_layernorm'}.weight"
        )
        gain = s.ref.w[weight] + s.facts.norm_offset
        x, back = runs.inputs[v][0], into["normed"][i]
        mean = (lambda y: y.mean(-1, keepdim=True)) if s.facts.norm == "layer" else lambda y: 0.0
        x = x - mean(x)
        rms = torch.sqrt((x * x).mean(-1, keepdim=True) + s.facts.eps)
        # minus its part along x, and LayerNorm's mean: the norm's derivative, by hand
        back = back * gain / rms
        back = back - x * (back * x).mean(-1, keepdim=True) / rms**2
        back = back - mean(back)
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
    if s.facts.clip_qkv:  # m has kinks where a query, key or value reaches the bound
        assert abs(fine) < 2e-3 * abs(difference)
        return
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
