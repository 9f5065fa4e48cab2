"""Recorded calls: patching, circuits, OV circuits and sparsity."""

from __future__ import annotations

import numpy as np
from recorded_case import METHODS, METRICS, QUIET, call, of_generations, of_metrics, of_scores

import vksteer as vs

# -- patching and circuits ---------------------------------------------------------------------


@call
def samples(case):
    found = {}
    for responses, keep in (("steered", "flipped"), ("base", "all")):
        made = vs.patching.make_samples(
            case.model,
            case.harmful,
            case.vector,
            case.coefficient,
            responses=responses,
            keep=keep,
            max_new_tokens=case.new_tokens,
            **QUIET,
        )
        pairs = [[list(s.prompt_tokens), list(s.response_tokens)] for s in made]
        found[f"{responses}, {keep}"] = [pairs, made.dropped, made.index, made.line]
    return found


@call
def attribute(case):
    choices = {
        "pre_norm": {"per_sample": True, "per_position": case.small, "dims": "all"},
        "normed": {"at": "normed", "per_sample": True},
        "kl from base": {"metric": "kl", "clean": "base", "rule": "left"},
        "directional kl": {"metric": "directional_kl", "rule": "right", "threshold": 0.01},
    }
    found = {"order": case.scores.edge_names, "nodes' order": case.scores.node_names}
    for name, options in choices.items():
        scores = vs.patching.attribute(*case.scored, steps=3, **options, **QUIET)
        found |= {f"{name}: {what}": value for what, value in of_scores(scores).items()}
    return found


@call
def exact(case):
    m, sample = case.model, case.samples[0]
    edges = [edge.name for edge in case.scores.top(6)]
    nodes = [node.name for node in case.scores.top_nodes(4)]
    arguments = (m, sample, case.vector, case.coefficient)
    return {
        "edges": vs.patching.exact(*arguments, edges=edges),
        "edges from base": vs.patching.exact(*arguments, edges=edges, clean="base", metric="kl"),
        "nodes": vs.patching.exact(*arguments, nodes=nodes),
        "at positions": vs.patching.exact(*arguments, nodes=nodes, positions="response"),
    }


def sizes_of(case) -> list[int]:
    return [len(case.scores.edges) * share // 100 for share in (2, 10, 40)]


@call
def circuits(case):
    found = {}
    for method in METHODS if case.small else METHODS[:2]:
        for n in sizes_of(case):
            c = case.scores.circuit(n, method=method)
            found[f"{method}, {n}"] = [c.edge_names, c.distribution()]
    c, d = case.scores.circuit(sizes_of(case)[1]), vs.circuits.random(case.scores.graph, 40, 3)
    found["random"] = d.edge_names
    found["sets"] = [c.complement().edge_names, c.pruned().edge_names, c.overlap(d), c.counts()]
    found["distribution"] = case.scores.distribution(40)
    return found


@call
def evaluate(case):
    some = [case.scores.circuit(n) for n in sizes_of(case)[: 3 if case.small else 1]]
    metrics = METRICS if case.small else METRICS[:1]
    results = vs.circuits.evaluate(some, *case.scored, metrics=metrics, **QUIET)
    found = {f"circuit {i}": of_metrics(result) for i, result in enumerate(results)}
    generated = case.model.generate(
        case.harmful[:2], edits=[case.steer], circuit=some[0], max_new_tokens=8, **QUIET
    )
    found |= {f"decoding: {k}": value for k, value in of_generations(generated).items()}
    if case.small:
        found["alone"] = of_metrics(some[0].evaluate(*case.scored, **QUIET))
        least = vs.circuits.minimum_faithful(case.scores, *case.scored, threshold=0.5, **QUIET)
        found["minimum faithful"] = least.edge_names
        curve = vs.circuits.faithfulness_curve(
            case.scores, *case.scored, sizes=sizes_of(case), random=1, bootstrap=50, **QUIET
        )
        for name in ("sizes", "edges", "faithfulness", "low", "high", "random", "random_edges"):
            found[f"curve: {name}"] = getattr(curve, name)
    return found


@call
def plan(case):
    config = case.model.config
    choices = [{}, {"dims": "all", "at": "normed"}, {"metric": "kl", "max_memory": "200MB"}]
    return {
        str(options): vs.patching.plan(config, case.vector.layer, 300, **options).to_dict()
        for options in choices
    }


# -- OV circuits and sparsity ------------------------------------------------------------------


@call
def ov(case):
    m, v, last = case.model, case.vector, case.layers - 1
    svv = vs.ov.steering_value_vectors(m, v)
    found = {"values": svv.values, "layers": svv.layers, "sums": svv.sum_over_heads()}
    for by in ("logit", "cosine"):
        lens = vs.ov.logit_lens(m, svv.values, top=5, by=by, **QUIET)
        found |= {f"lens, {by}: tokens": lens.tokens, f"lens, {by}: values": lens.values}
        found[f"lens, {by}: text"] = lens.text()
    parts = vs.ov.decompose(
        m, case.rows[:3], v, case.coefficient, last, responses=case.responses[:3]
    )
    names = ("direct", "indirect", "scales", "base", "heads_share", "share")
    found |= {f"decompose: {name}": getattr(parts, name) for name in names}
    shares = vs.ov.direct_shares(m, case.rows[:3], v, case.coefficient, **QUIET)
    found["direct shares"] = shares.to_dict()
    for name, weight in zip(("W_Q", "W_K", "W_V", "W_O"), vs.ov.head_weights(m, last, 1)):
        found[name] = np.asarray(weight)
    return found


@call
def sparsify(case):
    v, scores = case.vector, case.scores
    k = v.width // 3
    sparse = {
        "gradient": vs.sparsify.by_gradient(v, scores, 1.0),
        "effect": vs.sparsify.by_effect(v, scores, k),
        "magnitude": vs.sparsify.by_magnitude(v, k),
        "random": vs.sparsify.by_random(v, k, 11),
    }
    found = {name: [u.direction, u.kept, u.norm] for name, u in sparse.items()}
    pair = sparse["effect"], sparse["magnitude"]
    return found | {
        "ratio": vs.sparsify.gradient_ratio(v, scores),
        "iou": vs.sparsify.iou(*pair),
        "overlap test": vs.sparsify.overlap_test(*pair),
    }
