"""The engine's part of an attribution: base and steered runs, integration steps and the contraction
of groups of samples (docs/method.md section 5).

For a group the device holds, for every sample token, what steering changes in every node's output
and the gradients of every input averaged over the integration's steps
(csrc/analysis/attribution.h); then the scores are contracted, a tile of sample tokens at a time. A
sample's scores do not depend on its group, on how steps are packed into batches, or on the memory:
sums run in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.checks import require_int
from ..base.types import Array, Float32Array
from ..circuits.graph import graph as graph_of
from ..runtime.batch import first_tokens, packed_rows
from ..runtime.edit_compiler import EditCompiler, RowShape, add_all
from ..runtime.edits import Steer
from ..runtime.gradients import DIRECTIONAL_KL, KL_DIVERGENCE, PAIR, RowMetric, metric_tuple
from .attribution_layout import Layout, consecutive, passes
from .attribution_pooling import SampleScores

if TYPE_CHECKING:
    from .. import _engine
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

#: Where in its interval the gradient of a step is taken.
RULES = {"midpoint": 0.5, "left": 0.0, "right": 1.0}
METRICS = {"logit_diff": PAIR, "directional_kl": DIRECTIONAL_KL, "kl": KL_DIVERGENCE}


@dataclass(frozen=True)
class Settings:
    """What decides the scores besides model, vector, coefficient and samples; see `attribute`."""

    steps: int
    rule: str
    metric: str
    threshold: float
    at: str
    clean: str
    capped: bool
    dims: str
    per_position: bool

    def checked(self) -> Settings:
        """The same with plain types; threshold 0 where the metric ignores it. Raises ValueError for
        what is out of range.
        """
        for value, known, name in (
            (self.rule, RULES, "rule"),
            (self.metric, METRICS, "metric"),
            (self.at, ("pre_norm", "normed"), "at"),
            (self.clean, ("steered", "base"), "clean"),
            (self.dims, ("steer", "all"), "dims"),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, known))}")
        if not np.isfinite(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold={self.threshold!r}: a KL divergence of 0 nats or more")
        return Settings(
            require_int(self.steps, "steps", 1),
            self.rule,
            self.metric,
            float(self.threshold) if self.metric != "logit_diff" else 0.0,
            self.at,
            self.clean,
            bool(self.capped),
            self.dims,
            bool(self.per_position),
        )


class AttributionRuns:
    """The runs of one call of `attribute`, with the engine's accumulators.

    The engine holds, for each sample token, the differences of outputs and the sums of gradients
    (csrc/analysis/attribution.h). vector, coefficient: the steering. plan: how much goes through at
    once.
    """

    def __init__(
        self,
        model: Model,
        vector: SteeringVector,
        coefficient: float,
        settings: Settings,
        plan: Layout,
    ) -> None:
        from ..runtime.device import _engine

        self.model, self.vector, self.coefficient = model, vector, coefficient
        self.settings, self.plan = settings, plan
        self.graph = graph_of(model, vector.layer)
        self.dims_rows = 1 if settings.dims == "steer" else self.graph.n_upstream
        self.tile = _engine().ATTRIBUTE_TILE
        self.sign = 1.0 if settings.clean == "steered" else -1.0
        self.engine = _engine().Attribution(
            model._engine,
            plan.capacity,
            plan.step_capacity,
            plan.longest,
            vector.layer,
            plan.n_sample_tokens,
            settings.steps,
            settings.at == "normed",
            plan.keep_inside,
        )

    def rows(
        self,
        tokens: Sequence[Sequence[int]],
        coefficients: Sequence[float],
        inputs: Sequence[Float32Array],
    ) -> tuple[_engine.Cache, _engine.PackedRows]:
        """(cache, packed rows) of token lists, each steered by its own coefficient; 0 leaves it
        unsteered. inputs: the residual stream that enters the steering layer, float32 [tokens, D]
        of each.
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

    def forward(
        self,
        samples: Sequence[Sample],
        inputs: Sequence[Float32Array],
        ranges: Sequence[tuple[int, int]],
    ) -> list[RowMetric | None]:
        """Base and steered runs of the samples: fills the differences of outputs of their sample
        tokens and returns each sample's metric, None where it has no metric position.

        inputs: the residual stream that enters the steering layer, float32 [tokens, D] of each
        sample. ranges: (first, end) positions of each sample that are accumulated.
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
            clean, corrupt = (
                (steered, base) if self.settings.clean == "steered" else (base, steered)
            )
            pairs.append(np.stack([clean + at, corrupt + at], 1))
            read = np.arange(len(s.prompt_tokens) - 1, len(s))
            picks.append(np.stack([base + read, steered + read], 1))
        top, _, kl, normed = self.engine.forward(
            cache,
            packed,
            0,
            np.ascontiguousarray(np.concatenate(pairs), np.uint32),
            np.ascontiguousarray(np.concatenate(picks), np.uint32),
            self.settings.capped,
            self.settings.metric != "logit_diff",
        )
        metrics, done = [], 0
        for s, picked in zip(samples, picks):
            part = slice(done, done + len(picked))
            metrics.append(
                self.metric_of(len(s.prompt_tokens) - 1, top[part], kl[part], normed[part])
            )
            done += len(picked)
        return metrics

    def metric_of(
        self, first: int, top: npt.NDArray[np.int32], kl: Float32Array, normed: Float32Array
    ) -> RowMetric | None:
        """The metric of one sample, from its base and steered predictions at positions first,
        first + 1, ...; None without metric positions.

        top: greedy tokens [n, 2]; kl: KL(P_steer||P_base) [n]; normed: final rows [n, 2, D]; base
        before steered.
        """
        clean, corrupt = (1, 0) if self.settings.clean == "steered" else (0, 1)
        if self.settings.metric == "logit_diff":
            where = np.flatnonzero(top[:, 0] != top[:, 1])
        else:
            where = np.flatnonzero(kl > self.settings.threshold)
        if not len(where):
            return None
        positions, weights = (
            first + where.astype(np.int64),
            np.full(len(where), 1.0 / len(where), np.float32),
        )
        if self.settings.metric == "logit_diff":
            return RowMetric(
                PAIR,
                positions,
                weights,
                top[where, clean].astype(np.uint32),
                top[where, corrupt].astype(np.uint32),
            )
        other = normed[where, corrupt] if self.settings.metric == "directional_kl" else None
        return RowMetric(
            METRICS[self.settings.metric],
            positions,
            weights,
            reference=normed[where, clean],
            other=other,
        )

    def step(
        self,
        samples: Sequence[Sample],
        inputs: Sequence[Float32Array],
        metrics: Sequence[RowMetric],
        sample_token: int,
        ranges: Sequence[tuple[int, int]],
        first_step: int,
        end_step: int,
    ) -> Float32Array:
        """Adds the gradients of steps [first_step, end_step) of consecutive samples, whose sample
        tokens begin at number `sample_token`. Returns the metric at each of its positions.
        """
        n_steps, shift = end_step - first_step, RULES[self.settings.rule]
        tokens = [s.tokens for s in samples for _ in range(n_steps)]
        coefficients = [
            self.coefficient * (i + shift) / self.settings.steps
            for _ in samples
            for i in range(first_step, end_step)
        ]
        stacked = [i for i in range(len(samples)) for _ in range(n_steps)]
        cache, packed = self.rows(tokens, coefficients, [inputs[i] for i in stacked])
        starts = first_tokens(map(len, tokens)).reshape(len(samples), n_steps)
        sources = np.concatenate(
            [
                starts[i][None] + np.arange(first, end)[:, None]
                for i, (first, end) in enumerate(ranges)
            ]
        )
        values: Float32Array = self.engine.step(
            cache,
            packed,
            metric_tuple(
                [metrics[i] for i in stacked], [len(t) for t in tokens], self.settings.capped
            ),
            sample_token,
            np.ascontiguousarray(sources, np.uint32),
            n_steps,
            first_step,
        )
        return values

    def contract(self, sample_token: int, n: int) -> tuple[Array, Array, Array]:
        """Scores of the n sample tokens from number `sample_token` on: edges float64 [E], or [E, n]
        by position; nodes float64 [N]; dims float64 [1 or N, D].
        """
        size = 1 if self.settings.per_position else self.tile
        tiles = [(sample_token + i, min(size, n - i)) for i in range(0, n, size)]
        steer = (
            np.float32(self.sign * self.coefficient) * np.asarray(self.vector.direction, np.float32)
        ).astype(np.float32)
        calls = [tiles] if not self.settings.per_position else [[t] for t in tiles]
        edges = []
        nodes: Any = 0
        dims: Any = 0
        for call in calls:
            matrix, node, dim = self.engine.contract(
                np.array(call, np.uint32), steer, self.dims_rows
            )
            edges.append(matrix[self.graph.upstream, self.graph.downstream])
            nodes, dims = nodes + node, dims + dim
        return (np.stack(edges, 1) if self.settings.per_position else edges[0]), nodes, dims

    def group(
        self,
        samples: Sequence[Sample],
        inputs: Sequence[Float32Array],
        step_done: Callable[[int], object],
    ) -> list[SampleScores]:
        """The scores of every sample of a group. step_done: called with the number of steps that
        are done.
        """
        out: list[SampleScores] = [None] * len(samples)
        if self.plan.n_sample_tokens < max(map(len, samples)):
            return [self.in_parts(s, x, step_done) for s, x in zip(samples, inputs)]
        ranges = [(0, len(s)) for s in samples]
        metrics = self.forward(samples, inputs, ranges)
        self.engine.reset()
        starts = np.concatenate([[0], np.cumsum([len(s) for s in samples])]).tolist()
        kept = {i: m for i, m in enumerate(metrics) if m is not None}
        step_done(self.settings.steps * (len(samples) - len(kept)))
        for run in consecutive(kept):
            for i, j, first, end in passes(
                [len(samples[r]) for r in run], self.plan.step_capacity, self.settings.steps
            ):
                part = run[i:j]
                self.step(
                    [samples[r] for r in part],
                    [inputs[r] for r in part],
                    [kept[r] for r in part],
                    starts[part[0]],
                    [ranges[r] for r in part],
                    first,
                    end,
                )
                step_done((end - first) * len(part))
        for r, metric in kept.items():
            out[r] = (len(metric.positions), *self.contract(starts[r], len(samples[r])))
        return out

    def in_parts(
        self, sample: Sample, inputs: Float32Array, step_done: Callable[[int], object]
    ) -> SampleScores:
        """The scores of one sample whose positions do not all fit: all steps for one part of the
        positions after the other.
        """
        tables: list[Array] = []
        nodes: Any = 0
        dims: Any = 0
        weight = 0
        n = self.plan.n_sample_tokens // self.tile * self.tile
        parts = [(first, min(first + n, len(sample))) for first in range(0, len(sample), n)]
        for which, part in enumerate(parts):
            metric = self.forward([sample], [inputs], [part])[0]
            if metric is None:
                step_done(self.settings.steps)
                return None
            self.engine.reset()
            for _, _, first, end in passes(
                [len(sample)], self.plan.step_capacity, self.settings.steps
            ):
                self.step([sample], [inputs], [metric], 0, [part], first, end)
                if which == 0:
                    step_done(end - first)
            # Tile after tile is added to the same sums, as one contraction of all tiles does.
            size = 1 if self.settings.per_position else self.tile
            for first in range(0, part[1] - part[0], size):
                e, u, d = self.contract(first, min(size, part[1] - part[0] - first))
                tables = (
                    [*tables, e] if self.settings.per_position or not tables else [tables[0] + e]
                )
                nodes, dims = nodes + u, dims + d
            weight = len(metric.positions)
        return (
            weight,
            np.concatenate(tables, 1) if self.settings.per_position else tables[0],
            nodes,
            dims,
        )
