"""EAP-IG over whole responses (method.md section 5): scores of edges, nodes and dimensions, from
the engine's own gradients.

The samples go through in groups. For a group the device holds, token by token, what steering
changes in every node's output and the gradients of every input averaged over the integration's
steps (csrc/analysis/attribution.h); then the scores are contracted a tile of tokens at a time. A
sample's scores do not depend on its group, on how steps are packed into batches, or on the memory:
sums run in a fixed order.
"""

from __future__ import annotations

import hashlib
import json
import sys

import numpy as np

from ..base.checks import require_int
from ..base.progress import Progress
from ..base.store import Store
from ..circuits.graph import graph as graph_of
from ..inputs.samples import check_samples, check_steering, samples_hash
from ..runtime.batch import first_tokens, packed_rows
from ..runtime.edit_compiler import EditCompiler, RowShape, add_all
from ..runtime.edits import Steer
from ..runtime.gradients import DIRECTIONAL_KL, KL_DIVERGENCE, PAIR, RowMetric, metric_tuple
from .attribution_layout import Layout, consecutive, group_samples, layout, passes
from .attribution_pooling import pool
from .edge_scores import EdgeScores, score_provenance
from .memory_plan import memory_bytes

RULES = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
METRICS = {"logit_diff": PAIR, "directional_kl": DIRECTIONAL_KL, "kl": KL_DIVERGENCE}


class _Attribution:
    """One call's settings and its engine object."""

    def __init__(
        self,
        model,
        vector,
        coefficient,
        *,
        clean,
        steps,
        rule,
        metric,
        threshold,
        at,
        capped,
        dims,
        per_position,
        plan: Layout,
    ):
        from ..runtime.device import _engine

        self.model, self.vector, self.coefficient, self.clean = model, vector, coefficient, clean
        self.steps, self.shift, self.metric, self.threshold, self.capped = (
            steps,
            RULES[rule],
            metric,
            threshold,
            capped,
        )
        self.per_position, self.plan, self.graph = per_position, plan, graph_of(model, vector.layer)
        self.dims_rows = 1 if dims == "steer" else self.graph.n_upstream
        self.tile = _engine().ATTRIBUTE_TILE
        self.sign = 1.0 if clean == "steered" else -1.0
        self.engine = _engine().Attribution(
            model._engine,
            plan.capacity,
            plan.step_capacity,
            vector.layer,
            plan.n_slots,
            steps,
            at == "normed",
            plan.keep_inside,
        )

    def rows(self, tokens, coefficients, inputs):
        """(cache, packed rows) of token lists that are steered each by its own coefficient (0: not
        at all), from their inputs [tokens, D] of the steering layer on.
        """
        from ..runtime.device import _engine

        lengths = [len(t) for t in tokens]
        compiler = EditCompiler(self.model, [RowShape(t, t) for t in lengths])
        add_all(compiler, [[Steer(self.vector, c)] if c else [] for c in coefficients], False)
        layer = self.vector.layer
        return (
            _engine().Cache(self.model._engine, sum(lengths), layer),
            packed_rows(tokens, edits=compiler.build(), first_layer=layer, inputs=inputs),
        )

    def forward(self, samples, inputs, ranges):
        """Base and steered runs of the samples: fills the slots' differences, returns the metric of
        every sample (None: no positions).

        ranges: (first, end) positions of each sample that get slots.
        """
        tokens = [s.tokens for s in samples for _ in range(2)]
        cache, packed = self.rows(
            tokens,
            [c for _ in samples for c in (0.0, self.coefficient)],
            [x for x in inputs for _ in range(2)],
        )
        starts = first_tokens(map(len, tokens))
        pairs, picks = [], []
        for i, (s, (first, end)) in enumerate(zip(samples, ranges)):
            base, steered = starts[2 * i], starts[2 * i + 1]
            at = np.arange(first, end)
            clean, corrupt = (steered, base) if self.clean == "steered" else (base, steered)
            pairs.append(np.stack([clean + at, corrupt + at], 1))
            read = np.arange(len(s.prompt_tokens) - 1, len(s))
            picks.append(np.stack([base + read, steered + read], 1))
        top, _, kl, normed = self.engine.forward(
            cache,
            packed,
            0,
            np.ascontiguousarray(np.concatenate(pairs), np.uint32),
            np.ascontiguousarray(np.concatenate(picks), np.uint32),
            self.capped,
            self.metric != "logit_diff",
        )
        metrics, done = [], 0
        for s, picked in zip(samples, picks):
            part = slice(done, done + len(picked))
            metrics.append(
                self.metric_of(len(s.prompt_tokens) - 1, top[part], kl[part], normed[part])
            )
            done += len(picked)
        return metrics

    def metric_of(self, first, top, kl, normed) -> RowMetric | None:
        """The scalar of one sample from its base and steered predictions at positions
        first, first + 1, ...
        """
        clean, corrupt = (1, 0) if self.clean == "steered" else (0, 1)
        if self.metric == "logit_diff":
            where = np.flatnonzero(top[:, 0] != top[:, 1])
        else:
            where = np.flatnonzero(kl > self.threshold)
        if not len(where):
            return None
        positions, weights = (
            first + where.astype(np.int64),
            np.full(len(where), 1.0 / len(where), np.float32),
        )
        if self.metric == "logit_diff":
            return RowMetric(
                PAIR,
                positions,
                weights,
                top[where, clean].astype(np.uint32),
                top[where, corrupt].astype(np.uint32),
            )
        other = normed[where, corrupt] if self.metric == "directional_kl" else None
        return RowMetric(
            METRICS[self.metric], positions, weights, reference=normed[where, clean], other=other
        )

    def step(self, samples, inputs, metrics, slots, ranges, first_step, end_step):
        """Steps [first_step, end_step) of consecutive samples, whose slots begin at `slots`."""
        n_steps = end_step - first_step
        tokens = [s.tokens for s in samples for _ in range(n_steps)]
        coefficients = [
            self.coefficient * (i + self.shift) / self.steps
            for _ in samples
            for i in range(first_step, end_step)
        ]
        stacked = np.repeat(np.arange(len(samples)), n_steps)
        cache, packed = self.rows(tokens, coefficients, [inputs[i] for i in stacked])
        starts = first_tokens(map(len, tokens)).reshape(len(samples), n_steps)
        sources = np.concatenate(
            [
                starts[i][None] + np.arange(first, end)[:, None]
                for i, (first, end) in enumerate(ranges)
            ]
        )
        return self.engine.step(
            cache,
            packed,
            metric_tuple([metrics[i] for i in stacked], [len(t) for t in tokens], self.capped),
            slots,
            np.ascontiguousarray(sources, np.uint32),
            n_steps,
            first_step,
        )

    def contract(self, slot, n):
        """Scores of a sample's slots [slot, slot + n): (edges [E] or [E, n], nodes [N], dims)."""
        size = 1 if self.per_position else self.tile
        tiles = [(slot + i, min(size, n - i)) for i in range(0, n, size)]
        steer = (
            np.float32(self.sign * self.coefficient) * np.asarray(self.vector.direction, np.float32)
        ).astype(np.float32)
        calls = [tiles] if not self.per_position else [[t] for t in tiles]
        edges, nodes, dims = [], 0, 0
        for call in calls:
            matrix, node, dim = self.engine.contract(
                np.array(call, np.uint32), steer, self.dims_rows
            )
            edges.append(matrix[self.graph.upstream, self.graph.downstream])
            nodes, dims = nodes + node, dims + dim
        return (np.stack(edges, 1) if self.per_position else edges[0]), nodes, dims

    def group(self, samples, inputs, step_done):
        """One list entry a sample: (weight, edges, nodes, dims), or None for a sample
        without metric positions.
        """
        out: list = [None] * len(samples)
        if self.plan.n_slots < max(map(len, samples)):  # a part of one sample's positions at a time
            return [self.in_parts(s, x, step_done) for s, x in zip(samples, inputs)]
        ranges = [(0, len(s)) for s in samples]
        metrics = self.forward(samples, inputs, ranges)
        self.engine.reset()
        slots = np.concatenate([[0], np.cumsum([len(s) for s in samples])]).astype(int)
        kept = [i for i, m in enumerate(metrics) if m is not None]
        step_done(self.steps * (len(samples) - len(kept)))
        for run in consecutive(kept):
            for i, j, first, end in passes(
                [len(samples[r]) for r in run], self.plan.step_capacity, self.steps
            ):
                part = run[i:j]
                self.step(
                    [samples[r] for r in part],
                    [inputs[r] for r in part],
                    [metrics[r] for r in part],
                    int(slots[part[0]]),
                    [ranges[r] for r in part],
                    first,
                    end,
                )
                step_done((end - first) * len(part))
        for r in kept:
            out[r] = (len(metrics[r].positions),) + self.contract(int(slots[r]), len(samples[r]))
        return out

    def in_parts(self, sample, inputs, step_done):
        edges, nodes, dims, weight = None, 0, 0, 0
        n = self.plan.n_slots // self.tile * self.tile
        parts = [(first, min(first + n, len(sample))) for first in range(0, len(sample), n)]
        for which, part in enumerate(parts):
            metric = self.forward([sample], [inputs], [part])[0]
            if metric is None:
                step_done(self.steps)
                return None
            self.engine.reset()
            for _, _, first, end in passes([len(sample)], self.plan.step_capacity, self.steps):
                self.step([sample], [inputs], [metric], 0, [part], first, end)
                if which == 0:
                    step_done(end - first)
            # Tile after tile onto the same sums, as one contraction of all tiles adds them.
            size = 1 if self.per_position else self.tile
            for first in range(0, part[1] - part[0], size):
                e, u, d = self.contract(first, min(size, part[1] - part[0] - first))
                edges = (
                    e
                    if edges is None
                    else np.concatenate([edges, e], 1)
                    if self.per_position
                    else edges + e
                )
                nodes, dims = nodes + u, dims + d
            weight = len(metric.positions)
        return weight, edges, nodes, dims


def stream_inputs(model, rows, layer: int) -> list[np.ndarray]:
    """The unsteered stream entering `layer` for token rows: one float32 [tokens, D] each.
    Layers above are not run.
    """
    site = f"blocks.{layer}.hook_resid_pre"
    if layer == 0:
        site = "hook_embed"
    run = model.run([list(r) for r in rows], capture=[site], logits=None)
    return [np.ascontiguousarray(x[-len(r) :]) for r, x in zip(rows, run[site])]


def _checkpoint(path, key: str) -> tuple[Store, dict[int, tuple | None]]:
    """The store of finished samples and what it holds: (weight, edges, nodes, dims), or None for a
    sample without metric positions.
    """
    store = Store(
        path,
        format="vksteer.attribution",
        key=key,
        argument="checkpoint",
        what="checkpoint of an attribution",
        other="another attribution (model, vector, samples or settings differ)",
        field=None,
    )
    try:
        return store, {int(i): None if store[i] is None else tuple(store[i]) for i in store}
    except (TypeError, ValueError) as error:
        store.refuse(error)


def _check(steps, rule, metric, threshold, at, clean, dims):
    for value, known, name in (
        (rule, RULES, "rule"),
        (metric, METRICS, "metric"),
        (at, ("pre_norm", "normed"), "at"),
        (clean, ("steered", "base"), "clean"),
        (dims, ("steer", "all"), "dims"),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, known))}")
    if not np.isfinite(threshold) or threshold < 0:
        raise ValueError(f"threshold={threshold!r}: a KL divergence of 0 nats or more")
    return require_int(steps, "steps", 1)


def attribute(
    model,
    samples,
    vector,
    coefficient,
    *,
    clean="steered",
    steps=10,
    rule="midpoint",
    metric="logit_diff",
    threshold=0.0,
    at="pre_norm",
    capped=True,
    dims="steer",
    per_position=False,
    per_sample=False,
    max_memory=None,
    progress=True,
    checkpoint=None,
) -> EdgeScores:
    """Scores of every edge, node and dimension of steering by coefficient * vector (EAP-IG,
    method.md section 5).

    samples: list of Sample (prompt and whole response, teacher forced). clean: "steered" (what the
    base run would have to become) or "base"; the integration path always runs from base to steered,
    in `steps` steps by `rule` ("midpoint", "left", "right").
    metric: "logit_diff" (positions where the two runs' greedy tokens differ; threshold is
    ignored), "directional_kl" or "kl" (positions with KL(P_steer || P_base) > threshold, in nats;
    "kl" is KL(P_clean || P_x)); averaged over a sample's positions. capped: logits after a final
    soft cap. at: gradients with respect to the inputs before their norm ("pre_norm") or after norm
    and gain ("normed").
    dims: "steer" -> scores.dims [1, D], "all" -> [N, D]. per_position: scores.positions, one [E,
    S] a sample. per_sample: scores.sample_edges [n, E] and sample_nodes [n, N]. max_memory:
    device bytes beside the weights (int or "2GiB"; default 1 GiB or half of what is free); it
    changes speed, not a bit. progress: True (prints the plan, shows a bar), False or
    callable(done, total) in steps. checkpoint: a file; a killed call goes on from it. Returns
    EdgeScores. Raises ValueError, TypeError before work; DeviceError. Ctrl-C leaves the model
    usable and the checkpoint whole.
    """
    model._check_open()
    samples = check_samples(model, samples)
    coefficient = check_steering(model, vector, coefficient)
    steps = _check(steps, rule, metric, threshold, at, clean, dims)
    budget = memory_bytes(max_memory)
    lengths = [len(s) for s in samples]
    plan = layout(
        model, vector.layer, lengths, steps, at == "normed", metric != "logit_diff", budget
    )
    if progress is True:
        print(
            f"vksteer: attribution of {len(samples)} samples, {sum(lengths)} tokens, {steps} steps:"
            f" {plan.bytes / 1e6:.0f} MB beside the weights, {plan.n_slots} tokens at a time,"
            f" {'activations kept' if plan.keep_inside else 'activations computed twice'}",
            file=sys.stderr,
        )
    settings = {
        "steps": steps,
        "rule": rule,
        "metric": metric,
        "threshold": float(threshold) if metric != "logit_diff" else 0.0,
        "at": at,
        "clean": clean,
        "capped": bool(capped),
        "dims": dims,
        "per_position": bool(per_position),
    }
    provenance = score_provenance(model, vector, coefficient)
    key = hashlib.sha256(
        json.dumps(
            [settings, provenance, samples_hash(samples)], sort_keys=True, default=str
        ).encode()
    ).hexdigest()
    store, found = _checkpoint(checkpoint, key)
    worker = _Attribution(
        model,
        vector,
        coefficient,
        clean=clean,
        steps=steps,
        rule=rule,
        metric=metric,
        threshold=threshold,
        at=at,
        capped=bool(capped),
        dims=dims,
        per_position=per_position,
        plan=plan,
    )
    with Progress(progress, steps * len(samples), "attribute") as bar:
        if found:
            bar.step(steps * len(found))
        for group in group_samples(
            [i for i in range(len(samples)) if i not in found], lengths, plan
        ):
            part = [samples[i] for i in group]
            results = worker.group(
                part, stream_inputs(model, [s.tokens for s in part], vector.layer), bar.step
            )
            new = dict(zip(group, results))
            found.update(new)
            for i, result in new.items():
                store.put(str(i), result)
    return pool(
        worker.graph,
        samples,
        found,
        settings,
        provenance,
        per_position,
        per_sample,
        worker.dims_rows,
        model.config.d_model,
    )
