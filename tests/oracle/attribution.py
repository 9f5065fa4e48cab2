"""Multi-token patching in torch float64, from docs/method.md sections 4 and 5: metrics, EAP-IG
scores by autograd, exact patches.

Where the page leaves a choice:
- positions with a metric run from prompt_length - 1 to the last token, both included; m is the mean
  over those of one sample;
- `capped=False` reads the logits before the final soft cap everywhere: in m, in the distributions
  of both KL metrics, in KL(P_steer||P_base);
- "clean" is the run that the score leads to: u_clean - u_corrupt, m(clean) - m(corrupt).
  Plain KL is m(x) = KL(P_clean||P_x), which falls towards the clean run, so that helpful
  edges score below 0;
- the integration path runs from base to steered whatever `clean` says: left a*i/T, midpoint
  a*(i+0.5)/T, right a*(i+1)/T;
- the logits input is a downstream input like all others: `at="normed"` takes it after the final
  norm and its gain;
- an exact patch of an edge adds u_clean - u_corrupt to that input before its norm, at all
  `positions` at once; of a node, it replaces what the node adds to the stream there. Everything
  else is the corrupt run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from .reference import selected
from .separated import Separated, downstream_nodes, edge_pairs, node_names

RULES = {"left": 0.0, "midpoint": 0.5, "right": 1.0}


def kl(p, q):
    """KL(P||Q) of logits [..., V] -> [...]."""
    p, q = torch.log_softmax(p, dim=-1), torch.log_softmax(q, dim=-1)
    return (p.exp() * (p - q)).sum(-1)


class Case:
    """A sample with its base run and its steered run.

    sample: anything with prompt_tokens and response_tokens. vector: has .direction [D] and .layer.
    """

    def __init__(self, ref, sample, vector, coefficient):
        self.sample = sample
        self.prompt, self.response = list(sample.prompt_tokens), list(sample.response_tokens)
        self.tokens = self.prompt + self.response
        self.coefficient, self.layer = float(coefficient), vector.layer
        self.net = Separated(ref, self.tokens, vector, vector.layer)
        self.base, self.steered = self.net.run([0.0]), self.net.run([self.coefficient])

    def candidates(self):
        """Positions at which a metric may be read."""
        return list(range(len(self.prompt) - 1, len(self.tokens)))

    def divergence(self, capped=True):
        """KL(P_steer||P_base) at the candidates: [n]."""
        return kl(self.steered.read(capped)[0], self.base.read(capped)[0])[self.candidates()]

    def positions(self, metric, threshold=0.0, capped=True):
        """Metric positions: where the greedy predictions of the two runs differ, or where
        KL(P_steer||P_base) > threshold.
        """
        if metric == "logit_diff":
            a, b = (run.read(capped)[0].argmax(-1) for run in (self.steered, self.base))
            return [p for p in self.candidates() if a[p] != b[p]]
        return [
            p
            for p, value in zip(self.candidates(), self.divergence(capped).tolist())
            if value > threshold
        ]

    def margin(self):
        """The smallest difference between the two largest logits, over both runs and the
        candidates.
        """
        both = torch.cat([self.base.uncapped, self.steered.uncapped])[:, self.candidates()]
        top = torch.topk(both, 2).values
        return float((top[..., 0] - top[..., 1]).min())

    def roles(self, clean):
        """(clean run, corrupt run)."""
        return {"steered": (self.steered, self.base), "base": (self.base, self.steered)}[clean]

    def metric(self, kind, *, clean="steered", threshold=0.0, capped=True):
        runs = self.roles(clean)
        positions = self.positions(kind, threshold, capped)
        return Metric(kind, positions, *(run.read(capped)[0, positions] for run in runs))


@dataclass
class Metric:
    """m(x), a mean over `positions` of a function of a run's logits there. clean, corrupt: [n, V],
    the logits of the two runs there.
    """

    kind: str
    positions: list
    clean: torch.Tensor
    corrupt: torch.Tensor

    def each(self, logits):
        """[R, S, V] -> [R, n]."""
        x = logits[:, self.positions]
        if self.kind == "logit_diff":
            i = torch.arange(len(self.positions))
            return x[:, i, self.clean.argmax(-1)] - x[:, i, self.corrupt.argmax(-1)]
        if self.kind == "kl":
            return kl(self.clean, x)
        assert self.kind == "directional_kl"
        return kl(self.corrupt, x) - kl(self.clean, x)

    def __call__(self, logits):
        """[R, S, V] -> [R]."""
        return self.each(logits).mean(1)


@dataclass(frozen=True)
class Sample:
    prompt_tokens: tuple
    response_tokens: tuple


def clear_cases(ref, rng, vector, coefficient, sizes, tries=3, margin=1e-3, divergence=1e-3):
    """A case of random tokens for every (prompt length, response length), which can be compared
    with single precision.

    Left out are samples whose first and second choice lie closer than `margin` somewhere in one of
    the two runs, whose KL(P_steer||P_base) is below `divergence` somewhere (it decides with a
    threshold of 0), and those whose greedy predictions never differ; a size is drawn again at most
    `tries` times. Raises AssertionError where a size stays without a sample.
    """
    cases = []
    for p, r in sizes:
        for _ in range(tries):
            draw = lambda n: tuple(rng.integers(0, ref.facts.d_vocab, n).tolist())
            case = Case(ref, Sample(draw(p), draw(r)), vector, coefficient)
            if (
                case.margin() >= margin
                and case.divergence().min() >= divergence
                and case.positions("logit_diff")
            ):
                cases.append(case)
                break
    assert len(cases) == len(sizes), (
        f"{len(cases)} of {len(sizes)} sizes have a sample without near ties after {tries} tries"
        " each"
    )
    return cases


def clear_threshold(cases, capped=True):
    """A KL threshold in the widest gap (as a ratio) among the middle half of all candidates'
    KL(P_steer||P_base): both sides occur, none is near it.
    """
    values = sorted(x for case in cases for x in case.divergence(capped).tolist())
    low, high = max(
        pairwise(values),
        key=lambda pair: (
            pair[1] / pair[0] if pair[0] in values[len(values) // 4 : -len(values) // 4] else 0.0
        ),
    )
    assert high > 1.01 * low
    return (low + high) / 2


# -- scores ----------------------------------------------------------------------------------------


@dataclass
class Scores:
    """Scores of one sample (with positions) or of several (combined; positions and the values of m
    are then lists, one per sample).

    edges: {"pre_norm" | "normed": [E]}, nodes [N], dims [N, D]: sums over positions. n: metric
    positions. positions: {"pre_norm" | "normed": [E, S]}. difference: m(clean) - m(corrupt).
    """

    n: int
    edges: dict
    nodes: torch.Tensor
    dims: torch.Tensor
    positions: object
    difference: object


def gradients(case, metric, coefficients, capped=True):
    """Mean over the coefficients of dm/du for every upstream node [N, S, D], and of dm/dv for every
    downstream input {at: [M, S, D]}.
    """
    runs = case.net.run(coefficients, gradients=True)
    groups = [runs.outputs, runs.inputs, runs.normed]
    tensors = [t for group in groups for t in group.values()]
    # each run is a function of its own tensors alone
    found = torch.autograd.grad(metric(runs.read(capped)).sum(), tensors, allow_unused=True)
    means = iter(
        [torch.zeros_like(t).mean(0) if g is None else g.mean(0) for t, g in zip(tensors, found)]
    )
    out, before, after = (torch.stack([next(means) for _ in group]) for group in groups)
    return out, {"pre_norm": before, "normed": after}


def score(
    ref,
    sample,
    vector,
    coefficient,
    *,
    clean="steered",
    steps=10,
    rule="midpoint",
    metric="logit_diff",
    threshold=0.0,
    capped=True,
    case=None,
):
    """EAP-IG scores of one sample, both definitions of dm/dv at once. A sample without metric
    positions has scores of 0 and n = 0.
    """
    case = case or Case(ref, sample, vector, coefficient)
    m = case.metric(metric, clean=clean, threshold=threshold, capped=capped)
    ups, downs = (
        node_names(ref.facts, vector.layer),
        [name for name, _, _ in downstream_nodes(ref.facts, vector.layer)],
    )
    pairs = edge_pairs(ref.facts, vector.layer)
    a, b = case.roles(clean)
    difference = torch.stack([a.outputs[u][0] - b.outputs[u][0] for u in ups])  # [N, S, D]
    if m.positions:
        out, into = gradients(
            case, m, [case.coefficient * (i + RULES[rule]) / steps for i in range(steps)], capped
        )
        values = [m(run.read(capped)).item() for run in (a, b)]
    else:
        out, into, values = (
            torch.zeros_like(difference),
            {
                at: difference.new_zeros(len(downs), *difference.shape[1:])
                for at in ("pre_norm", "normed")
            },
            (0.0, 0.0),
        )
    i, j = (
        torch.tensor([ups.index(u) for u, _ in pairs]),
        torch.tensor([downs.index(v) for _, v in pairs]),
    )
    positions = {at: torch.einsum("usd,vsd->uvs", difference, g)[i, j] for at, g in into.items()}
    products = difference * out
    return Scores(
        n=len(m.positions),
        edges={at: p.sum(1) for at, p in positions.items()},
        nodes=products.sum((1, 2)),
        dims=products.sum(1),
        positions=positions,
        difference=values[0] - values[1],
    )


def combine(found):
    """Samples' scores averaged, weighted by their number of metric positions; those
    without any are left out.
    """
    total = sum(s.n for s in found)
    mean = lambda pick: sum(s.n * pick(s) for s in found) / total
    return Scores(
        n=total,
        edges={at: mean(lambda s, at=at: s.edges[at]) for at in found[0].edges},
        nodes=mean(lambda s: s.nodes),
        dims=mean(lambda s: s.dims),
        positions=[s.positions for s in found],
        difference=[s.difference for s in found],
    )


def attribute(ref, samples, vector, coefficient, *, cases=None, **options):
    """Scores of several samples. cases: theirs, if they are already there.
    options: as in `score`.
    """
    cases = cases or [None] * len(samples)
    return combine(
        [
            score(ref, s, vector, coefficient, case=c, **options)
            for s, c in zip(samples, cases, strict=True)
        ]
    )


# -- exact patches ---------------------------------------------------------------------------------


def exact(
    ref,
    sample,
    vector,
    coefficient,
    *,
    edges=None,
    nodes=None,
    positions=None,
    clean="steered",
    metric="logit_diff",
    threshold=0.0,
    capped=True,
    case=None,
):
    """m(patched) - m(corrupt) of every edge or node on its own: float64 [n]. positions: as an
    edit's, patched together.
    """
    case = case or Case(ref, sample, vector, coefficient)
    m = case.metric(metric, clean=clean, threshold=threshold, capped=capped)
    a, b = case.roles(clean)
    at = selected(positions, len(case.prompt), len(case.tokens))
    targets = [e.split("->") for e in edges] if edges is not None else [(n, None) for n in nodes]
    start = 0.0 if clean == "steered" else case.coefficient

    def patched(x, wanted):
        """Adds u_clean - u_corrupt to a copy of x. wanted: [(run, upstream node u)]."""
        x = x.clone()
        for run, name in wanted:
            x[run, at] += a.outputs[name][0, at] - b.outputs[name][0, at]
        return x

    at_input = lambda name, x, outputs: patched(
        x, [(r, u) for r, (u, v) in enumerate(targets) if v == name]
    )
    at_output = lambda name, x: patched(
        x, [(r, u) for r, (u, v) in enumerate(targets) if v is None and u == name]
    )
    runs = case.net.run([start] * len(targets), at_input=at_input, at_output=at_output)
    return m(runs.read(capped)) - m(b.read(capped))
