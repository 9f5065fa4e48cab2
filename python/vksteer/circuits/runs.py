"""The model under circuits: `vs.circuits.evaluate` (method.md section 5). The passes run in C
(csrc/analysis/circuit.c), circuits and samples packed.

Readings, as in tests/oracle/circuits.py. P prompt tokens, S in all; a sample without positions for
a metric has weight 0 there and is left out:
- logit_diff: logit(y) - logit(y*), greedy tokens of the clean and of the corrupt run, where they
  differ, P - 1 to S - 1; pooled over all positions;
- logit_diff_per_sample: the same, averaged within each sample first, over samples then;
- directional_kl: KL(P_corrupt||P_x) - KL(P_clean||P_x), at positions P - 1 to S - 1 with
  KL(P_steer||P_base) > threshold;
- kl: KL(P_clean||P_x) at positions that predict a response token, P - 1 to S - 2; match: share of
  them whose greedy token is the clean run's; logprob: log p(response token).
Whatever `clean` says, a circuit is run by steering and keeping the base run's contributions
outside; `full` is the steered run, `empty` the base run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base.progress import Progress
from ..inputs.samples import check_samples, check_steering
from .curve import pooled
from .final_rows import FinalRows, final_rows, request
from .plan import Rows, compile_plan, kept_matrix

#: Tokens of the samples that go through the layers at once, where memory allows; the
#: fewest that are tried.
CHUNK_TOKENS, LEAST_TOKENS = 512, 16
#: Share of the free device memory that is used where max_memory names none, and the most of it.
MEMORY_SHARE, MEMORY_MOST = 0.4, 6 << 30
#: Runs that are planned at once.
RUNS_MOST = 256
#: Buffers are at most this large (csrc/gpu/gpu.h).
BUFFER_MOST = 1 << 30
#: Metrics of two logits; the others read the whole distribution.
PAIRS = ("logit_diff", "logit_diff_per_sample")


@dataclass
class MetricResult:
    """value m(C), full m(steered run), empty m(base run); per_sample: float64 [n_samples] arrays
    "value", "full", "empty", "weight".
    """

    value: float
    full: float
    empty: float
    per_sample: dict[str, np.ndarray]

    @property
    def faithfulness(self) -> float:
        """(value - empty) / (full - empty); NaN where steering changes nothing."""
        difference = self.full - self.empty
        return (self.value - self.empty) / difference if difference else float("nan")

    def __repr__(self):
        return (
            f"MetricResult(faithfulness={self.faithfulness:.4f}, value={self.value:.4g},"
            f" full={self.full:.4g}, empty={self.empty:.4g})"
        )


# -- what metrics read -----------------------------------------------------------------------------


class Reader:
    """A sample's metrics: which rows they read, and their values from what was read.

    clean: "steered" or "base". kl_apart: kl is read where KL(P_steer||P_base) > threshold, as
    scores read it. Values of a run come as (pairs [n, 2], whole [n, 4]) over `rows`, ascending
    indices into the FinalRows.
    """

    def __init__(
        self, rows: FinalRows, metrics, clean: str, threshold: float, kl_apart: bool = False
    ):
        self.final, self.clean, self.metrics = rows, clean, metrics
        n = len(rows.targets)
        differ = np.flatnonzero(rows.greedy_base != rows.greedy_steered)
        apart = np.flatnonzero(rows.kl_base > threshold)
        at = {"logit_diff": differ, "logit_diff_per_sample": differ, "directional_kl": apart} | (
            {"kl": apart} if kl_apart else {}
        )
        self.at = {m: at.get(m, np.arange(n - 1)) for m in metrics}
        self.rows = (
            np.unique(np.concatenate(list(self.at.values()))).astype(np.int64)
            if metrics
            else np.zeros(0, np.int64)
        )
        self.a, self.b = (
            (rows.greedy_steered, rows.greedy_base)
            if clean == "steered"
            else (rows.greedy_base, rows.greedy_steered)
        )

    def values(self, metric, pairs, whole) -> np.ndarray:
        """float64 [positions of the metric]."""
        at = np.searchsorted(self.rows, self.at[metric])
        if metric in PAIRS:
            x = pairs[at].astype(np.float64)
            return x[:, 0] - x[:, 1]
        x = whole[at].astype(np.float64)
        from_clean, from_corrupt = (
            (x[:, 0], x[:, 1]) if self.clean == "steered" else (x[:, 1], x[:, 0])
        )
        if metric == "kl":
            return from_clean
        if metric == "directional_kl":
            return from_corrupt - from_clean
        if metric == "match":
            return (x[:, 3].astype(np.int64) == self.a[self.at[metric]]).astype(np.float64)
        return x[:, 2]


def whole_wanted(metrics) -> bool:
    """Does one of them read whole distributions?"""
    return any(m not in PAIRS for m in metrics)


def joint_request(readers, metrics, softcap):
    """One request for the rows of several samples, one behind the other."""
    join = lambda get: np.concatenate([get(r) for r in readers])
    pairs = any(m in PAIRS for m in metrics)
    whole = whole_wanted(metrics)
    return request(
        softcap,
        join(lambda r: r.a[r.rows]) if pairs else None,
        join(lambda r: r.b[r.rows]) if pairs else None,
        join(lambda r: r.final.steered[r.rows]) if whole else None,
        join(lambda r: r.final.base[r.rows]) if whole else None,
        join(lambda r: r.final.targets[r.rows]) if whole else None,
    )


def measure_ends(model, readers, metrics, softcap) -> list[tuple]:
    """What the steered and the base run read at every sample's rows: [(pairs [2, n, 2], whole [2,
    n, 4])], steered first, for samples that have rows.
    """
    from ..runtime.device import _engine

    out = []
    # sample by sample: both runs' rows of all samples need not be copied at once
    for reader in readers:
        if not reader.rows.size:
            out.append((np.zeros((2, 0, 2)), np.zeros((2, 0, 4))))
            continue
        both = np.ascontiguousarray(
            np.stack([reader.final.steered[reader.rows], reader.final.base[reader.rows]]),
            np.float32,
        )
        pairs, whole, _ = _engine().measure(
            model._engine, both, both.shape[1], joint_request([reader], metrics, softcap)
        )
        out.append((pairs, whole))
    return out


# -- passes ----------------------------------------------------------------------------------------


@dataclass
class Job:
    """One sample to be run: its tokens up to the last that is read, the stream entering the
    steering layer, and its reader.
    """

    tokens: tuple[int, ...]
    inputs: np.ndarray
    reader: Reader
    at: np.ndarray  # positions that are read
    mask: np.ndarray | None = None  # uint8 [tokens]: where patches act


def sample_job(model, sample, reader, layer, mask=None) -> Job:
    """The tail that no metric reads is not run."""
    at = reader.rows + reader.final.first
    n = int(at[-1]) + 1
    inputs = model._layer_inputs.get([sample.tokens], layer)[0]
    return Job(sample.tokens[:n], inputs[:n], reader, at, None if mask is None else mask[:n])


class Passes:
    """Runs beside a base run, in as few passes as memory allows.

    steer: float32 [D], what steering adds to the base run. edits: the base run's own (one list).
    Bits do not depend on how runs and samples are packed.
    """

    def __init__(self, model, graph, steer, max_memory, edits=(), masked=False):
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

    def _make(self, rows):
        from ..runtime.device import _engine

        plan = compile_plan(self.graph, rows, self.model.config.post_norms, self.masked)
        return plan, _engine().Circuits(self.model._engine, self.graph.layer, plan.arrays)

    def _size(self, circuits, chunk, longest, total):
        slots = min(total, max(chunk, longest))
        needed, largest = circuits.bytes(chunk, slots)
        return slots, needed, needed <= self.budget and largest <= BUFFER_MOST

    def check(self, rows, lengths, first=()) -> None:
        """ValueError where one of the runs does not fit into the memory even alone; the message
        says how much the largest needs.
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

    def fit(self, rows, lengths, first=()):
        """(plan, engine's circuits, how many of `rows` they hold, chunk, slots): as many as memory
        allows. first: runs that every pass needs.
        """
        longest, total = max(lengths), sum(lengths)
        chunk, n = min(CHUNK_TOKENS, total), min(len(rows), RUNS_MOST)
        while True:
            plan, circuits = self._make([*first, *rows[:n]])
            slots, needed, fits = self._size(circuits, chunk, longest, total)
            if fits or (n == 1 and chunk <= LEAST_TOKENS):
                return plan, circuits, n if fits else 0, chunk, slots
            if n > 1:
                n = max(1, min(int(n * 0.9), int(n * self.budget / needed)))
            else:
                chunk = max(LEAST_TOKENS, chunk // 2)

    def run(self, rows, jobs, softcap, metrics, step, first=()):
        """(pairs [n, 2], whole [n, 4]) for every run and job, None where the run is the base
        run: list [run][job].
        """
        out: list[list] = []
        lengths = [len(j.tokens) for j in jobs]
        done = 0
        self.check(rows, lengths, first)
        while done < len(rows):
            plan, circuits, n, chunk, slots = self.fit(rows[done:], lengths, first)
            if n == 0:
                self.check(rows[done : done + 1], lengths, first)
            entries = plan.logits[len(first) :]
            results = [[None] * len(jobs) for _ in range(n)]
            if (entries >= 0).any():
                circuits.reserve(chunk, slots, self.steer)
                self._pass(
                    circuits,
                    slots,
                    jobs,
                    lengths,
                    softcap,
                    metrics,
                    entries,
                    results,
                    lambda k: step(k * n),
                )
            else:
                step(n * len(jobs))
            out += results
            done += n
            del circuits
        return out

    def _pass(self, circuits, slots, jobs, lengths, softcap, metrics, entries, results, step):
        from ..runtime.device import _engine
        from ..runtime.gradients import pack

        cache = _engine().Cache(self.model._engine, slots)
        for group in pack(lengths, slots):
            some = [jobs[i] for i in group]
            pairs, whole = self._forward(circuits, cache, some, softcap, metrics)
            ends = np.cumsum([len(j.at) for j in some])
            for i, job, end in zip(group, some, ends):
                part = slice(end - len(job.at), end)
                for r, e in enumerate(entries):
                    if e >= 0:
                        results[r][i] = (
                            None if pairs is None else pairs[e, part],
                            None if whole is None else whole[e, part],
                        )
            step(len(group))

    def _forward(self, circuits, cache, jobs, softcap, metrics):
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
        pairs, whole, _ = circuits.forward(
            cache,
            rows,
            tokens.astype(np.uint32),
            joint_request([j.reader for j in jobs], metrics, softcap),
            mask,
        )
        return pairs, whole


# -- evaluate --------------------------------------------------------------------------------------


def evaluate(
    circuits,
    model,
    samples,
    vector,
    coefficient,
    *,
    metrics=("logit_diff",),
    clean="steered",
    threshold=0.0,
    capped=True,
    max_memory=None,
    progress=True,
) -> list[dict[str, MetricResult]]:
    """See vs.circuits.evaluate. clean: which run's distribution kl and match compare with, and the
    sign of the two differences. threshold: of directional_kl. capped: logits after the final soft
    cap. max_memory: bytes of device memory (default: a share of what is free); it changes no bit.

    Raises ValueError before any work, also where max_memory is too small (the message says
    how much is needed).
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
    # the whole graph is the steered run itself
    partial = [c for c in different if len(c) < graph.n_edges]
    rows = [Rows(kept_matrix(graph, c.edges)) for c in partial]
    passes = Passes(model, graph, np.float32(coefficient) * vector.direction, max_memory)
    passes.check(rows, [len(s) for s in samples])
    with Progress(progress, len(samples) * (1 + len(partial)), "circuits") as bar:
        finals = final_rows(
            model,
            samples,
            vector,
            coefficient,
            capped=capped,
            progress=lambda done, total, last=[0]: (
                bar.step(done - last[0]),
                last.__setitem__(0, done),
            ),
        )
        readers = [Reader(f, metrics, clean, threshold) for f in finals]
        ends = measure_ends(model, readers, metrics, softcap)
        used = [i for i, r in enumerate(readers) if r.rows.size]
        jobs = [sample_job(model, samples[i], readers[i], vector.layer) for i in used]
        found = passes.run(rows, jobs, softcap, metrics, bar.step) if jobs else []
    read = {c: dict(zip(used, values)) for c, values in zip(partial, found)}
    return [
        _results(read.get(c), len(c) == graph.n_edges, readers, ends, metrics) for c in circuits
    ]


def _results(read, whole_graph, readers, ends, metrics) -> dict[str, MetricResult]:
    """read: {sample: (pairs, whole) or None}, of one circuit."""
    out = {}
    for metric in metrics:
        per = {name: np.zeros(len(readers)) for name in ("value", "full", "empty", "weight")}
        for i, (reader, (pairs, whole)) in enumerate(zip(readers, ends)):
            n = len(reader.at[metric])
            if n == 0:
                continue
            end = lambda k: float(
                reader.values(
                    metric, None if pairs is None else pairs[k], None if whole is None else whole[k]
                ).mean()
            )
            mine = None if whole_graph or read is None else read.get(i)
            per["full"][i], per["empty"][i] = end(0), end(1)
            per["value"][i] = (
                per["full"][i]
                if whole_graph
                else per["empty"][i]
                if mine is None
                else float(reader.values(metric, *mine).mean())
            )
            per["weight"][i] = 1.0 if metric == "logit_diff_per_sample" else n
        out[metric] = MetricResult(*pooled(per), per)
    return out
