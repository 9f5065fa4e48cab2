"""`vs.patching.exact`: one edge or node really patched, and m read (method.md section 5): what
the scores estimate.

The machinery is that of circuits with the roles of what is kept exchanged. The corrupt run takes
the base run's place; beside it goes the clean run, whose nodes give the differences that are
patched in, and one run for each patch, in which everything after the patch is computed anew.
"""

from __future__ import annotations

import numpy as np

from ..base.progress import Progress
from ..circuits.final_rows import final_rows
from ..circuits.graph import graph as graph_of
from ..circuits.plan import Rows
from ..circuits.readings import Reader, measure_ends
from ..circuits.runs import Passes, sample_job
from ..inputs.samples import check_samples, check_steering
from ..runtime.edit_compiler import RowShape, resolve
from ..runtime.edits import Steer


def _patches(graph, edges, nodes) -> list[list[tuple[int, int]]]:
    """For every patch the inputs that change: (upstream, downstream) pairs."""
    if (edges is None) == (nodes is None):
        raise ValueError("give either edges=[...] or nodes=[...], by name or number")
    what, given, names = (
        ("edge", edges, graph.edge_names) if nodes is None else ("node", nodes, graph.node_names)
    )
    given = [given] if isinstance(given, str) else list(given)
    numbers = []
    table = (
        {name: i for i, name in enumerate(names)} if any(isinstance(x, str) for x in given) else {}
    )
    for x in given:
        if isinstance(x, str):
            if x not in table:
                raise KeyError(f"no {what} {x!r} in {graph!r}")
            numbers.append(table[x])
        elif (
            isinstance(x, (int, np.integer))
            and not isinstance(x, (bool, np.bool_))
            and 0 <= x < len(names)
        ):
            numbers.append(int(x))
        else:
            raise ValueError(f"{what} {x!r} is not one of 0 to {len(names) - 1}, nor a name")
    if nodes is None:
        return [[(int(graph.upstream[e]), int(graph.downstream[e]))] for e in numbers]
    return [[(u, v) for v in range(int(graph.start[u]), graph.n_downstream)] for u in numbers]


def exact(
    model,
    sample,
    vector,
    coefficient,
    edges=None,
    nodes=None,
    positions=None,
    *,
    clean="steered",
    metric="logit_diff",
    threshold=0.0,
    capped=True,
    max_memory=None,
    progress=False,
) -> np.ndarray:
    """m(patched) - m(corrupt) of every edge or every node on its own, float64 [n]; many at
    once as rows of a batch.

    An edge's patch adds u_clean - u_corrupt to the stream that its input reads, before the norm; a
    node's replaces what the node adds to the stream. edges, nodes: names or numbers of the graph.
    positions: where, all together (default everywhere; negative ones and "response" as in an edit).
    clean: the run that is patched in, "steered" or "base". metric, threshold, capped: as in
    `attribute`. max_memory: bytes of device memory. Raises ValueError or KeyError before any work;
    ValueError where the sample has no metric position.
    """
    coefficient = check_steering(model, vector, coefficient)
    (sample,) = samples = check_samples(model, sample)[:1]
    if clean not in ("steered", "base"):
        raise ValueError(f"clean must be 'steered' or 'base', not {clean!r}")
    if metric not in ("logit_diff", "kl", "directional_kl"):
        raise ValueError(f"metric {metric!r} is not one of logit_diff, directional_kl, kl")
    graph = graph_of(model, vector.layer)
    patches = _patches(graph, edges, nodes)
    selection = resolve(positions, RowShape(len(sample.prompt_tokens), len(sample)))
    mask = None
    if positions is not None:
        mask = np.zeros(len(sample), np.uint8)
        chosen = (
            slice(selection.start, selection.stop, selection.step)
            if selection.listed is None
            else [p for p in selection.listed if p < len(sample)]
        )
        mask[chosen] = 1
    if not patches:
        return np.zeros(0)
    everything = np.ones((graph.n_upstream, graph.n_downstream), bool)
    everything[np.arange(graph.n_downstream)[None] < graph.start[:, None]] = False
    source = Rows(everything, steered=True, read=False)
    rows = [Rows(everything, steered=False, patches=p) for p in patches]
    sign, edits = (1, []) if clean == "steered" else (-1, [Steer(vector, coefficient)])
    passes = Passes(
        model,
        graph,
        np.float32(sign * coefficient) * vector.direction,
        max_memory,
        edits,
        masked=mask is not None,
    )
    passes.check(rows[:1], [len(sample)], (source,))
    softcap = model.config.final_softcap if capped else 0.0
    final = final_rows(model, samples, vector, coefficient, capped=capped)[0]
    reader = Reader(final, (metric,), clean, threshold, kl_apart=True)
    if not reader.rows.size:
        raise ValueError(
            "the sample has no metric position: steering changes nothing there that this metric"
            " reads"
        )
    ends = measure_ends(model, [reader], (metric,), softcap)[0]
    corrupt = 1 if clean == "steered" else 0
    pick = lambda values, i: None if values is None else values[i]
    start = float(reader.values(metric, pick(ends[0], corrupt), pick(ends[1], corrupt)).mean())
    with Progress(progress, len(rows), "exact patches") as bar:
        found = passes.run(
            rows,
            [sample_job(model, sample, reader, vector.layer, mask)],
            softcap,
            (metric,),
            bar.step,
            first=(source,),
        )
    return np.array(
        [
            0.0 if values[0] is None else float(reader.values(metric, *values[0]).mean()) - start
            for values in found
        ]
    )
