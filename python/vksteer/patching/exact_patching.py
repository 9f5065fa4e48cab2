"""`vs.patching.exact`: exact scores, which patch one edge or node and read the metric
(docs/method.md section 5). EAP-IG estimates them.

The passes are those of circuits. The corrupt run takes the place of the base run. The clean run
goes beside it and gives the differences that are patched in, and so does one run for each patch, in
which everything after the patch is computed again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..base.checks import is_int
from ..base.progress import Progress
from ..base.types import Float64Array, ProgressLike
from ..circuits.final_rows import final_rows
from ..circuits.graph import graph as graph_of
from ..circuits.plan import Rows
from ..circuits.readings import Reader, measure_ends, read_of
from ..circuits.runs import Passes, sample_job
from ..inputs.samples import check_samples, check_steering
from ..runtime.edit_compiler import RowShape, resolve
from ..runtime.edits import Steer

if TYPE_CHECKING:
    from ..circuits.graph import Graph
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

#: Edges or nodes by name or number, or one name.
Patched: TypeAlias = Iterable[str | int] | str


def find_patches(
    graph: Graph, edges: Patched | None, nodes: Patched | None
) -> list[list[tuple[int, int]]]:
    """The inputs that each patch changes, as (upstream, downstream) pairs."""
    if edges is not None and nodes is None:
        numbers = _numbers(graph, "edge", edges, graph.edge_names)
        return [[(int(graph.upstream[e]), int(graph.downstream[e]))] for e in numbers]
    if nodes is not None and edges is None:
        numbers = _numbers(graph, "node", nodes, graph.node_names)
        return [[(u, v) for v in range(int(graph.start[u]), graph.n_downstream)] for u in numbers]
    raise ValueError("give either edges=[...] or nodes=[...], by name or number")


def _numbers(graph: Graph, what: str, given: Patched, names: Sequence[str]) -> list[int]:
    """Names or numbers as numbers. Raises KeyError for unknown names, ValueError for others."""
    given = [given] if isinstance(given, str) else list(given)
    by_name = any(isinstance(x, str) for x in given)
    table = {name: i for i, name in enumerate(names)} if by_name else {}
    numbers = []
    for x in given:
        if isinstance(x, str):
            if x not in table:
                raise KeyError(f"no {what} {x!r} in {graph!r}")
            numbers.append(table[x])
        elif is_int(x) and 0 <= x < len(names):
            numbers.append(int(x))
        else:
            raise ValueError(f"{what} {x!r} is not one of 0 to {len(names) - 1}, nor a name")
    return numbers


def exact(
    model: Model,
    sample: Sample,
    vector: SteeringVector,
    coefficient: float,
    edges: Patched | None = None,
    nodes: Patched | None = None,
    positions: Any = None,
    *,
    clean: str = "steered",
    metric: str = "logit_diff",
    threshold: float = 0.0,
    capped: bool = True,
    max_memory: int | None = None,
    progress: ProgressLike = False,
) -> Float64Array:
    """m(patched) - m(corrupt) of every edge or every node by itself, float64 [n] in the order given
    (docs/method.md section 5). Many patches run together in one batch.

    The patch of an edge adds u_clean - u_corrupt to the residual stream that its input reads,
    before the norm; the patch of a node replaces what the node adds to the residual stream. sample:
    one Sample. vector: a SteeringVector; its layer decides the graph. coefficient: what it is
    multiplied by. edges, nodes: exactly one of the two, names or numbers of the graph. positions:
    where, all together, of one list or slice as in an edit (None: everywhere). clean: the run that
    is patched in, "steered" (default) or "base". metric: "logit_diff" (default), "directional_kl"
    or "kl". threshold: smallest KL of a position that the KL metrics read, in nats. capped: logits
    after the final softcap. max_memory: bytes of device memory (default: a share of what is free).
    progress: True, False (default) or callable(done, total).
    Raises ValueError, TypeError or KeyError (unknown edge or node) before any work; ValueError
    where the sample has no metric position.
    """
    coefficient = check_steering(model, vector, coefficient)
    sample = check_samples(model, sample)[0]
    _check_reading(clean, metric)
    graph = graph_of(model, vector.layer)
    patches = find_patches(graph, edges, nodes)
    mask = _mask(positions, sample)
    if not patches:
        return np.zeros(0)
    source, rows = patch_rows(graph, patches)
    sign, edits = (1, []) if clean == "steered" else (-1, [Steer(vector, coefficient)])
    steer = np.float32(sign * coefficient) * vector.direction
    passes = Passes(model, graph, steer, max_memory, edits, masked=mask is not None)
    passes.check(rows[:1], [len(sample)], (source,))
    softcap = model.config.final_softcap if capped else 0.0
    final = final_rows(model, [sample], vector, coefficient, capped=capped)[0]
    reader = Reader(final, (metric,), clean, threshold, kl_apart=True)
    if not reader.rows.size:
        raise ValueError(
            "the sample has no metric position: steering changes nothing there that this metric"
            " reads"
        )
    ends = measure_ends(model, [reader], (metric,), softcap)[0]
    start = reader.mean(metric, read_of(ends, 1 if clean == "steered" else 0))
    jobs = [sample_job(model, sample, reader, vector.layer, mask)]
    with Progress(progress, len(rows), "exact patches") as bar:
        found = passes.run(rows, jobs, softcap, (metric,), bar.step, first=(source,))
    effects = [0.0 if read is None else reader.mean(metric, read) - start for (read,) in found]
    return np.array(effects)


def _check_reading(clean: str, metric: str) -> None:
    if clean not in ("steered", "base"):
        raise ValueError(f"clean must be 'steered' or 'base', not {clean!r}")
    if metric not in ("logit_diff", "kl", "directional_kl"):
        raise ValueError(f"metric {metric!r} is not one of logit_diff, directional_kl, kl")


def _mask(positions: object, sample: Sample) -> npt.NDArray[np.uint8] | None:
    """uint8 [tokens], 1 where patches act; None for everywhere."""
    selection = resolve(positions, RowShape(len(sample.prompt_tokens), len(sample)))
    if positions is None:
        return None
    mask = np.zeros(len(sample), np.uint8)
    if selection.listed is None:
        mask[selection.start : selection.stop : selection.step] = 1
    else:
        mask[[p for p in selection.listed if p < len(sample)]] = 1
    return mask


def patch_rows(
    graph: Graph, patches: Sequence[Sequence[tuple[int, int]]]
) -> tuple[Rows, list[Rows]]:
    """The clean run, and one run for each patch."""
    everything = np.ones((graph.n_upstream, graph.n_downstream), bool)
    everything[np.arange(graph.n_downstream)[None] < graph.start[:, None]] = False
    source = Rows(everything, steered=True, read=False)
    return source, [Rows(everything, steered=False, patches=p) for p in patches]
