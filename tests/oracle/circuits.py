"""Circuits in torch float64, from docs/method.md section 5: the model under a set of edges, its
faithfulness, greedy decoding; pruning by brute force.

A circuit is a set of edge names. Its run is the steered run in which every downstream input reads
the run's own residual stream plus, over the upstream nodes whose edge to it is not in the circuit,
what they add in the base run minus what they add in this run. The norm comes after.

Every metric is a number of a run, pooled (a mean over all positions of all samples); faithfulness =
(value - empty) / (full - empty) with `full` of the steered run and `empty` of the base run.
The metrics, with P the length of the prompt and S that of all tokens:
- logit_diff: logit(steered run's greedy token) - logit(base run's), at positions P-1 to S-1
  where the two differ;
- logit_diff_per_sample: the same, averaged within each sample first and over samples with any such
  position then, before the ratio;
- directional_kl: KL(P_base||P_x) - KL(P_steer||P_x), at positions P-1 to S-1 with
  KL(P_steer||P_base) > threshold;
- kl: KL(P_steer||P_x), at the positions that predict a response token, P-1 to S-2; full is 0;
- match: share of the same positions where the greedy prediction is the steered run's; full is 1;
- logprob: log p(response token) at the same positions.
A sample is left out of a metric for which it has no positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attribution import Case, kl
from .separated import Separated, edge_pairs, fed_by

METRICS = ("logit_diff", "logit_diff_per_sample", "kl", "directional_kl", "match", "logprob")


# -- the model under circuits ----------------------------------------------------------------------


def run(net, base, coefficient, circuits):
    """One run per circuit (a set of edge names). net: a Separated; base: its base run (one run)."""
    outside = {}  # downstream node -> [(upstream node, [R] 1 where the edge is not in the circuit)]
    for u, v in edge_pairs(net.f, net.layer):
        missing = torch.tensor([float(f"{u}->{v}" not in c) for c in circuits], dtype=torch.float64)
        outside.setdefault(v, []).append((u, missing))

    def at_input(name, x, outputs):
        for u, missing in outside[name]:
            x = x + missing[:, None, None] * (base.outputs[u] - outputs[u])
        return x

    return net.run([coefficient] * len(circuits), at_input=at_input)


def generate(ref, prompt, n_new, vector, coefficient, circuit, eos=()):
    """Greedy decoding under a circuit without a cache. Returns (new tokens, top-1 margins)."""
    tokens, margins = [int(t) for t in prompt], []
    for _ in range(n_new):
        net = Separated(ref, tokens, vector, vector.layer)
        top = torch.topk(run(net, net.run([0.0]), coefficient, [circuit]).logits[0, -1], 2)
        margins.append(float(top.values[0] - top.values[1]))
        tokens.append(int(top.indices[0]))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :], margins


# -- faithfulness ----------------------------------------------------------------------------------


@dataclass
class Result:
    """value: m(C). full: m of the steered run. empty: m of the base run."""

    value: float
    full: float
    empty: float

    @property
    def faithfulness(self):
        return (self.value - self.empty) / (self.full - self.empty)


def measure(case, logits, metric, threshold=0.0, capped=True):
    """The metric of every run at each of its positions: logits [R, S, V] -> [R, n]."""
    if metric in ("logit_diff", "logit_diff_per_sample", "directional_kl"):
        kind = "directional_kl" if metric == "directional_kl" else "logit_diff"
        return case.metric(kind, threshold=threshold, capped=capped).each(logits)
    predicting = range(len(case.prompt) - 1, len(case.tokens) - 1)
    x, steered = logits[:, predicting], case.steered.read(capped)[0, predicting]
    if metric == "kl":
        return kl(steered, x)
    if metric == "match":
        return (x.argmax(-1) == steered.argmax(-1)).to(torch.float64)
    assert metric == "logprob"
    return torch.log_softmax(x, dim=-1)[
        :, torch.arange(len(predicting)), torch.tensor(case.response)
    ]


def evaluate(
    ref,
    circuits,
    samples,
    vector,
    coefficient,
    metrics=("logit_diff",),
    *,
    threshold=0.0,
    capped=True,
    cases=None,
):
    """One {metric: Result} per circuit."""
    cases = cases or [Case(ref, s, vector, coefficient) for s in samples]
    # per sample [R + 2, n]: the circuits, the steered run, the base run
    found = {m: [] for m in metrics}
    for case in cases:
        runs = run(case.net, case.base, case.coefficient, circuits)
        logits = torch.cat([r.read(capped) for r in (runs, case.steered, case.base)])
        for m in metrics:
            found[m].append(measure(case, logits, m, threshold, capped))
    results = [{} for _ in circuits]
    for m, of_samples in found.items():
        values = [v for v in of_samples if v.shape[1]]
        means = (
            torch.stack([v.mean(1) for v in values]).mean(0)
            if m == "logit_diff_per_sample"
            else torch.cat(values, dim=1).mean(1)
        )
        *each, full, empty = means.tolist()
        for result, value in zip(results, each, strict=True):
            result[m] = Result(value, full, empty)
    return results


# -- finding circuits ------------------------------------------------------------------------------


def paths(facts, edges):
    """Every path from steer to logits, as tuples of edge names, by depth-first
    enumeration. For tiny graphs.
    """
    leaving = {}
    for e in edges:
        leaving.setdefault(e.split("->")[0], []).append(e)

    def walk(node, path):
        for e in leaving.get(node, ()):
            to = e.split("->")[1]
            if to == "logits":
                yield (*path, e)
            for head in fed_by(facts, to):
                yield from walk(head, (*path, e))

    yield from walk("steer", ())


def prune(facts, edges):
    """The edges that lie on a path from steer to logits within `edges`, as a set of names: what is
    reached from both ends grows until it stops growing.
    """
    ends = [(e, *e.split("->")) for e in edges]
    feeds = {v: fed_by(facts, v) for _, _, v in ends}
    # upstream nodes that steering reaches; upstream nodes from which the logits are reached
    reached, useful = {"steer"}, set()
    leads = lambda v: v == "logits" or any(u in useful for u in feeds[v])
    size = -1
    while size != len(reached) + len(useful):
        size = len(reached) + len(useful)
        for _, u, v in ends:
            if u in reached:
                reached.update(feeds[v])
            if leads(v):
                useful.add(u)
    return {e for e, u, v in ends if u in reached and leads(v)}


def ranking(scores):
    """Edge numbers by falling |score|, ties by graph order."""
    return sorted(range(len(scores)), key=lambda i: (-abs(float(scores[i])), i))


def pruned(facts, names, scores, n):
    """The shortest prefix of the ranking that has at least n edges after pruning, pruned; found
    prefix by prefix.
    """
    order = [names[i] for i in ranking(scores)]
    for k in range(len(order) + 1):
        left = prune(facts, order[:k])
        if len(left) >= n:
            return left
    raise AssertionError(f"a graph of {len(names)} edges has no {n} on paths")


def top(names, scores, n):
    return {names[i] for i in ranking(scores)[:n]}


def greedy(facts, names, scores, n, backward):
    """Adds the edge of largest |score| that touches the circuit until n edges are on paths; returns
    these. Backward, an edge touches that ends in an input of a node of the circuit (at first:
    logits); forward, one that starts at a node of it (at first: steer).
    """
    order = [names[i] for i in ranking(scores)]
    nodes, taken = {"logits" if backward else "steer"}, set()

    def touches(e):
        u, v = e.split("->")
        return (
            u in nodes if not backward else v in nodes or any(x in nodes for x in fed_by(facts, v))
        )

    while len(left := prune(facts, taken)) < n:
        e = next(e for e in order if e not in taken and touches(e))
        taken.add(e)
        u, v = e.split("->")
        nodes.update([u] if backward else fed_by(facts, v))
    return left
