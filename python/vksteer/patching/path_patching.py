"""`vs.patching.path`: path patching between two prompts (Goldowsky-Dill et al., arXiv 2304.05969,
section 3), one edge of the graph at a time.

The passes are those of `exact`. Both prompts have the same positions, so they differ in what enters
layer 0 only: the corrupt prompt is the base run, and the difference of the embeddings takes the
place of a steering vector, another one for each token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.progress import Progress
from ..base.types import Array, Float32Array, Float64Array, IntArray, ProgressLike, Prompt
from ..circuits.final_rows import request
from ..circuits.graph import Graph
from ..circuits.graph import graph as graph_of
from ..circuits.plan import Rows
from ..circuits.runs import Passes
from ..inputs.prompts import is_single
from ..runtime.batch import first_tokens, packed_rows
from ..runtime.gradients import LogitDiff, pack
from .activation_patching import (
    LOGIT_BYTES,
    Metric,
    metric_positions,
    metric_value,
    prompt_pairs,
    row_metrics,
)
from .exact_patching import Patched, find_patches, patch_rows

if TYPE_CHECKING:
    from ..runtime.model import Model

#: What enters layer 0.
STREAM = "blocks.0.hook_resid_pre"


@dataclass
class _Pair:
    """A pair of prompts up to the metric's last position: the corrupt tokens, the difference of
    what enters layer 0 (clean minus corrupt), float32 [tokens, D], the positions that are read,
    ascending, and the metric of the corrupt run.
    """

    tokens: list[int]
    steer: Float32Array
    metric: Metric
    at: IntArray
    corrupt: float
    length: int  # tokens of the whole prompt

    def value(self, logits: Array) -> float:
        """The metric of logits [positions, V], or of the two logits of a LogitDiff [1, 2]."""
        x = logits.astype(np.float64)
        if isinstance(self.metric, LogitDiff):
            return float(x[0, 0] - x[0, 1])
        places = np.array([p % self.length for p in metric_positions(self.metric)])
        return metric_value(self.metric, x[np.searchsorted(self.at, places)])


def path(
    model: Model,
    clean: Prompt | Sequence[Prompt],
    corrupt: Prompt | Sequence[Prompt],
    *,
    of: Metric | Sequence[Metric],
    edges: Patched,
    max_memory: int | None = None,
    progress: ProgressLike = True,
) -> Float64Array:
    """What single edges change when they carry what they carry in the clean run: m(patched) -
    m(corrupt), where everything but the edge and what is computed from it is the corrupt run.

    clean, corrupt: a pair of prompts (texts or token lists) of equal length, or lists of pairs that
    all have one length. of: the metric, vs.LogitDiff, vs.LogProb or vs.KL, one for all pairs or one
    for each. edges: names as in `vs.patching.graph(model, 0).edge_names`, such as "a3.h1->m4" or
    "m4->logits", or their numbers; "embed->m2" (also "steer->m2") is what the embedding hands on.
    max_memory: bytes of device memory (default: a share of what is free).

    The patch adds u_clean - u_corrupt to the residual stream that the edge's input reads, before
    the norm, at all positions. Returns float64 [edges], for lists of pairs [pairs, edges]. Many
    edges and pairs run together. Raises ValueError before any work for prompts and metrics as
    `heatmap` does, and KeyError for an unknown edge.
    """
    given = prompt_pairs(model, clean, corrupt)
    listed = row_metrics(of, len(given), len(given[0][0]), model.config.d_vocab)
    graph = graph_of(model, 0)
    patches = find_patches(graph, _aliases(edges), None)
    single = is_single(clean)
    found = np.zeros((len(given), len(patches)))
    if not patches:
        return found[0] if single else found
    source, rows = patch_rows(graph, patches)
    steer = np.zeros(model.config.d_model, np.float32)
    passes = Passes(model, graph, steer, max_memory, distributions=False)
    passes.check(rows[:1], [len(given[0][0])], (source,))
    with Progress(progress, len(given) * len(rows), "path patching") as bar:
        for group in pack([len(bad) for _, bad in given], 512):
            jobs = [_pair(model, *given[i], listed[i]) for i in group]
            for part, values in _runs(passes, graph, source, rows, jobs):
                found[group, part] = values
                bar.step(values.size)
    return found[0] if single else found


def _aliases(edges: Patched) -> Patched:
    """Edges by the names of the graph, where the embedding is "steer"."""
    listed = [edges] if isinstance(edges, str) else list(edges)
    return [
        "steer" + e.removeprefix("embed") if isinstance(e, str) and e.startswith("embed->") else e
        for e in listed
    ]


def _pair(model: Model, good: list[int], bad: list[int], metric: Metric) -> _Pair:
    """Runs both prompts. Where the length of a text decides its rotation tables, prompts that are
    cut keep those of the whole.
    """
    places = [p % len(bad) for p in metric_positions(metric)]
    n, switch = max(places) + 1, model.config.rope_switch
    if len(bad) > switch > 0:
        n = max(n, switch + 1)
    streams = model.run([good[:n], bad[:n]], capture=[STREAM], logits=None)[STREAM]
    logits = model.run([bad[:n]], logits="all").logits
    assert logits is not None  # they were asked for
    corrupt = metric_value(metric, logits[0][places].astype(np.float64))
    steer = np.ascontiguousarray(streams[0] - streams[1])
    return _Pair(bad[:n], steer, metric, np.unique(places), corrupt, len(bad))


def _runs(
    passes: Passes, graph: Graph, source: Rows, rows: Sequence[Rows], jobs: Sequence[_Pair]
) -> Iterator[tuple[slice, Float64Array]]:
    """Yields (patches, m(patched) - m(corrupt) float64 [jobs, patches]), as many patches at once as
    memory allows.
    """
    lengths = [len(j.tokens) for j in jobs]
    read = sum(len(j.at) for j in jobs)
    whole = not all(isinstance(j.metric, LogitDiff) for j in jobs)
    most = max(1, LOGIT_BYTES // (4 * read * passes.model.config.d_vocab)) if whole else len(rows)
    done = 0
    while done < len(rows):
        some = rows[done : done + most]
        compiled, circuits, n, chunk, slots = passes.fit(some, lengths, (source,))
        if n == 0:
            passes.check(some[:1], lengths, (source,))
        entries = compiled.logits[1:]
        values = np.zeros((len(jobs), n))
        if (entries >= 0).any():
            circuits.reserve(chunk, slots, max(lengths), passes.steer)
            for group in pack(lengths, slots):
                part = [jobs[i] for i in group]
                values[group] = _forward(passes, circuits, slots, part, entries, whole)
        yield slice(done, done + n), values
        done += n
        del circuits


def _forward(
    passes: Passes, circuits: Any, slots: int, jobs: Sequence[_Pair], entries: IntArray, whole: bool
) -> Float64Array:
    """m(patched) - m(corrupt) of each job under each run, float64 [jobs, runs]."""
    from ..runtime.device import _engine

    model = passes.model
    starts = first_tokens(len(j.tokens) for j in jobs)
    counts = [len(j.at) for j in jobs]
    pair = None
    if not whole:
        pair = [np.repeat([getattr(j.metric, x) for j in jobs], counts) for x in "ab"]
    a, b = (None, None) if pair is None else pair
    two, _, logits = circuits.forward(
        _engine().Cache(model._engine, slots),
        packed_rows([j.tokens for j in jobs]),
        np.concatenate([s + j.at for s, j in zip(starts, jobs)]).astype(np.uint32),
        request(model.config.final_softcap, a, b, logits=whole),
        None,
        np.concatenate([j.steer for j in jobs]),
    )
    read = logits if whole else two
    ends = np.cumsum(counts)
    out = np.zeros((len(jobs), len(entries)))
    for i, (job, count, end) in enumerate(zip(jobs, counts, ends, strict=True)):
        for r, e in enumerate(entries):
            if e >= 0:
                out[i, r] = job.value(read[e, end - count : end]) - job.corrupt
    return out
