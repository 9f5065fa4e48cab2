"""The model under circuits: `vs.circuits.evaluate` (docs/method.md section 5). The passes run in
the engine (csrc/analysis/circuit.c), with circuits and samples packed together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _engine as extension
from ..base.progress import Progress
from ..base.types import Array, Float32Array, IntArray, ProgressLike
from ..inputs.samples import check_samples, check_steering
from .curve import pooled
from .final_rows import final_rows
from .plan import CompiledCircuits, Rows, compile_circuits, kept_matrix
from .readings import (
    MetricResult,
    Read,
    Reader,
    distributions_needed,
    joint_request,
    measure_ends,
    read_of,
)

if TYPE_CHECKING:
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model
    from .circuit import Circuit
    from .graph import Graph

#: Tokens of one chunk where memory allows, and the fewest that are tried.
CHUNK_TOKENS, LEAST_TOKENS = 512, 16
#: Without max_memory: this share of the free device memory, and at most so many bytes.
MEMORY_SHARE, MEMORY_MOST = 0.4, 6 << 30
#: Most runs that are compiled together.
RUNS_MOST = 256
#: Bytes of the largest buffer.
BUFFER_MOST = extension.constants["GPU_BUFFER_MAX"]


@dataclass
class Job:
    """One sample to be run: its tokens up to the last that is read, the residual stream that enters
    the steering layer, float32 [tokens, D], and its reader.
    """

    tokens: tuple[int, ...]
    inputs: Float32Array
    reader: Reader
    at: IntArray  # int64 [n], positions that are read
    mask: Array | None = None  # uint8 [tokens], 1 where patches act


def sample_job(
    model: Model, sample: Sample, reader: Reader, layer: int, mask: Array | None = None
) -> Job:
    """The job of one sample, without the tokens after the last position that a metric reads. Where
    the length of a text decides its rotation tables, a text that is cut keeps those of the whole.
    """
    at, switch = reader.rows + reader.final.first, model.config.rope_switch
    n = int(at[-1]) + 1
    if len(sample.tokens) > switch > 0:
        n = max(n, switch + 1)
    inputs = model._layer_inputs.get([sample.tokens], layer)[0]
    return Job(sample.tokens[:n], inputs[:n], reader, at, None if mask is None else mask[:n])


class Passes:
    """Runs beside a base run, in as few passes as memory allows.

    steer: what steering adds to the residual stream of the base run, float32 [D]. max_memory:
    device bytes, or None for a share of what is free. edits: edits of the base run itself. masked:
    whether patches act at some tokens only. distributions: whether metrics read them. Results are
    bit-identical however runs and samples are packed.
    """

    def __init__(
        self,
        model: Model,
        graph: Graph,
        steer: Array,
        max_memory: int | None,
        edits: Sequence[Any] = (),
        masked: bool = False,
        distributions: bool = True,
    ) -> None:
        self.distributions = distributions
        self.model, self.graph, self.steer, self.edits, self.masked = (
            model,
            graph,
            np.ascontiguousarray(steer, np.float32),
            list(edits),
            masked,
        )
        free = model._engine_device.available_bytes
        self.budget = (
            min(free * MEMORY_SHARE, MEMORY_MOST) if max_memory is None else int(max_memory)
        )
        self.named = max_memory is not None

    def _make(self, rows: Sequence[Rows]) -> tuple[CompiledCircuits, extension.Circuits]:
        from ..runtime.device import _engine

        compiled = compile_circuits(self.graph, rows, self.model.config, self.masked)
        return compiled, _engine().Circuits(self.model._engine, self.graph.layer, compiled.arrays)

    def _size(
        self, circuits: extension.Circuits, chunk: int, longest: int, total: int
    ) -> tuple[int, int, bool]:
        slots = min(total, max(chunk, longest))
        needed, largest = circuits.bytes(chunk, slots, longest, self.distributions)
        return slots, needed, needed <= self.budget and largest <= BUFFER_MOST

    def check(
        self, rows: Sequence[Rows], lengths: Sequence[int], first: Sequence[Rows] = ()
    ) -> None:
        """Raises ValueError where one of the runs does not fit into memory even alone; the message
        says how much the largest needs. lengths: tokens of the samples. first: runs that every pass
        needs.
        """
        if not rows or self.fit(rows, lengths, first)[2] == min(len(rows), RUNS_MOST):
            return
        longest, total = max(lengths), sum(lengths)
        chunk = min(LEAST_TOKENS, total)
        sizes = [self._size(self._make([*first, row])[1], chunk, longest, total) for row in rows]
        needed = max(size for _, size, _ in sizes)
        if not all(fits for _, _, fits in sizes):
            what = (
                f"max_memory={self.budget}"
                if self.named
                else f"the free device memory (of which {self.budget / 1e6:.0f} MB may be used)"
            )
            raise ValueError(
                f"{what} is too small: one circuit over {longest} tokens, {chunk} at a time, needs"
                f" {needed} bytes ({needed / 1e6:.1f} MB)"
            )

    def fit(
        self, rows: Sequence[Rows], lengths: Sequence[int], first: Sequence[Rows] = ()
    ) -> tuple[CompiledCircuits, extension.Circuits, int, int, int]:
        """As many of `rows` as memory allows: (compiled circuits, the engine's, how many of `rows`
        they hold, tokens of a chunk, cache slots). first: runs that every pass needs.
        """
        longest, total = max(lengths), sum(lengths)
        chunk, n = min(CHUNK_TOKENS, total), min(len(rows), RUNS_MOST)
        while True:
            compiled, circuits = self._make([*first, *rows[:n]])
            slots, needed, fits = self._size(circuits, chunk, longest, total)
            if fits or (n == 1 and chunk <= LEAST_TOKENS):
                return compiled, circuits, n if fits else 0, chunk, slots
            if n > 1:
                n = max(1, min(int(n * 0.9), int(n * self.budget / needed)))
            else:
                chunk = max(LEAST_TOKENS, chunk // 2)

    def run(
        self,
        rows: Sequence[Rows],
        jobs: Sequence[Job],
        softcap: float,
        metrics: Sequence[str],
        step: Callable[[int], object],
        first: Sequence[Rows] = (),
    ) -> list[list[Read | None]]:
        """What every run reads of every job: [run][job], pairs [n, 2] and distributions [n, 4], or
        None where the run is bit-identical to the base run. step: called with the number of runs of
        a job that are done.
        """
        out: list[list[Read | None]] = []
        lengths = [len(j.tokens) for j in jobs]
        done = 0
        self.check(rows, lengths, first)
        while done < len(rows):
            compiled, circuits, n, chunk, slots = self.fit(rows[done:], lengths, first)
            if n == 0:
                self.check(rows[done : done + 1], lengths, first)
            entries = compiled.logits[len(first) :]
            results: list[list[Read | None]] = [[None] * len(jobs) for _ in range(n)]
            if (entries >= 0).any():
                circuits.reserve(chunk, slots, max(lengths), self.steer)
                self._pass(
                    circuits,
                    slots,
                    jobs,
                    lengths,
                    softcap,
                    metrics,
                    entries,
                    results,
                    step,
                )
            else:
                step(n * len(jobs))
            out += results
            done += n
            del circuits
        return out

    def _pass(
        self,
        circuits: extension.Circuits,
        slots: int,
        jobs: Sequence[Job],
        lengths: Sequence[int],
        softcap: float,
        metrics: Sequence[str],
        entries: IntArray,
        results: list[list[Read | None]],
        step: Callable[[int], object],
    ) -> None:
        from ..runtime.device import _engine
        from ..runtime.gradients import pack

        cache = _engine().Cache(self.model._engine, slots)
        for group in pack(lengths, slots):
            some = [jobs[i] for i in group]
            pairs, distributions = self._forward(circuits, cache, some, softcap, metrics)
            ends = np.cumsum([len(j.at) for j in some])
            for i, job, end in zip(group, some, ends):
                part = slice(end - len(job.at), end)
                for r, e in enumerate(entries):
                    if e >= 0:
                        results[r][i] = (
                            None if pairs is None else pairs[e, part],
                            None if distributions is None else distributions[e, part],
                        )
            step(len(group) * len(entries))

    def _forward(
        self,
        circuits: extension.Circuits,
        cache: extension.Cache,
        jobs: Sequence[Job],
        softcap: float,
        metrics: Sequence[str],
    ) -> Read:
        from ..runtime.batch import Batch, first_tokens, packed_rows

        lengths = [len(j.tokens) for j in jobs]
        batch = Batch(self.model, lengths, lengths, ([list(self.edits)] * len(jobs), True), None)
        rows = packed_rows(
            [j.tokens for j in jobs],
            edits=batch.edits,
            first_layer=self.graph.layer,
            inputs=[j.inputs for j in jobs],
        )
        tokens = np.concatenate([s + j.at for s, j in zip(first_tokens(lengths), jobs)])
        mask = np.concatenate([j.mask for j in jobs]) if self.masked else None
        pairs, distributions, _ = circuits.forward(
            cache,
            rows,
            tokens.astype(np.uint32),
            joint_request([j.reader for j in jobs], metrics, softcap),
            mask,
        )
        return pairs, distributions


def evaluate(
    circuits: Sequence[Circuit],
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    *,
    metrics: Sequence[str] = ("logit_diff",),
    clean: str = "steered",
    threshold: float = 0.0,
    capped: bool = True,
    max_memory: int | None = None,
    progress: ProgressLike = True,
) -> list[dict[str, MetricResult]]:
    """As vs.circuits.evaluate, without its checks of names.

    clean: "steered" or "base", the run that kl and match compare with; it also decides the sign of
    logit_diff and directional_kl. threshold: of directional_kl, in nats. capped: whether logits are
    those after the final softcap. max_memory: bytes of device memory (default: a share of what is
    free); results are bit-identical whatever it is. Raises ValueError before any work, also where
    max_memory is too small; the message says how much is needed.
    """
    coefficient = check_steering(model, vector, coefficient)
    samples = check_samples(model, samples)
    if clean not in ("steered", "base"):
        raise ValueError(f"clean must be 'steered' or 'base', not {clean!r}")
    if not np.isfinite(threshold) or threshold < 0:
        raise ValueError(f"threshold must be a finite number from 0 on, not {threshold!r}")
    for circuit in circuits:
        circuit.check(model, vector.layer)
    metrics = tuple(dict.fromkeys(metrics))
    graph = circuits[0].graph
    softcap = model.config.final_softcap if capped else 0.0
    different = list(dict.fromkeys(circuits))
    # The circuit of all edges is the steered run itself.
    partial = [c for c in different if len(c) < graph.n_edges]
    rows = [Rows(kept_matrix(graph, c.edges)) for c in partial]
    steer = np.float32(coefficient) * vector.direction
    whole = distributions_needed(metrics)
    passes = Passes(model, graph, steer, max_memory, distributions=whole)
    passes.check(rows, [len(s) for s in samples])
    with Progress(progress, len(samples) * (1 + len(partial)), "circuits") as bar:
        done = 0

        def report(now: int, _: int) -> None:
            nonlocal done
            bar.step(now - done)
            done = now

        finals = final_rows(model, samples, vector, coefficient, capped=capped, progress=report)
        readers = [Reader(f, metrics, clean, threshold) for f in finals]
        ends = measure_ends(model, readers, metrics, softcap)
        used = [i for i, r in enumerate(readers) if r.rows.size]
        jobs = [sample_job(model, samples[i], readers[i], vector.layer) for i in used]
        found = passes.run(rows, jobs, softcap, metrics, bar.step) if jobs else []
    read = {c: dict(zip(used, values, strict=True)) for c, values in zip(partial, found)}
    return [
        _results(read.get(c), len(c) == graph.n_edges, readers, ends, metrics) for c in circuits
    ]


def _results(
    read: Mapping[int, Read | None] | None,
    complete: bool,
    readers: Sequence[Reader],
    ends: Sequence[Read],
    metrics: Sequence[str],
) -> dict[str, MetricResult]:
    """The metrics of one circuit. read: what it read of each sample, None where it is the base run;
    complete: it has all edges and is the steered run.
    """
    out = {}
    for metric in metrics:
        per = {name: np.zeros(len(readers)) for name in ("value", "full", "empty", "weight")}
        for i, (reader, end) in enumerate(zip(readers, ends, strict=True)):
            n = len(reader.at[metric])
            if n == 0:
                continue
            full, empty = (reader.mean(metric, read_of(end, run)) for run in (0, 1))
            mine = None if read is None else read.get(i)
            if complete:
                value = full
            elif mine is None:
                value = empty
            else:
                value = reader.mean(metric, mine)
            per["value"][i], per["full"][i], per["empty"][i] = value, full, empty
            per["weight"][i] = 1.0 if metric == "logit_diff_per_sample" else n
        out[metric] = MetricResult(*pooled(per), per)
    return out
