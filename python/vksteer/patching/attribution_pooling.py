"""The scores of every sample as one EdgeScores (docs/method.md section 5)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.types import Array
from ..inputs.samples import samples_hash
from .edge_scores import EdgeScores
from .score_tables import combine

if TYPE_CHECKING:
    from ..circuits.graph import Graph
    from ..inputs.samples import Sample

#: Of one sample: (number of metric positions, edges float64 [E] or [E, S], nodes float64 [N], dims
#: float64 [1 or N, D]); None for a sample without metric positions.
SampleScores: TypeAlias = tuple[int, Array, Array, Array] | None


def pool(
    graph: Graph,
    samples: Sequence[Sample],
    found: Sequence[SampleScores],
    settings: dict[str, Any],
    provenance: dict[str, Any],
    per_sample: bool,
    dims_shape: tuple[int, int],
) -> EdgeScores:
    """Samples averaged by their metric positions. found: scores in the order of the samples, with
    edges [E, S] where settings has per_position. Warns where no sample has a metric position.
    """
    weights = np.array([0 if scores is None else scores[0] for scores in found], np.int64)
    if not weights.any():
        warnings.warn(
            f"none of the {len(samples)} samples has a metric position: steering changes no greedy"
            " token there (or no KL passes the threshold); all scores are 0",
            stacklevel=4,
        )
    edges, nodes, dims, positions = [], [], [], []
    for sample, scores in zip(samples, found, strict=True):
        if scores is None:
            edges.append(np.zeros(graph.n_edges))
            nodes.append(np.zeros(graph.n_upstream))
            dims.append(np.zeros(dims_shape))
            positions.append(np.zeros((graph.n_edges, len(sample))))
            continue
        _, by_edge, by_node, by_dim = scores
        edges.append(by_edge.sum(1) if settings["per_position"] else by_edge)
        nodes.append(by_node)
        dims.append(by_dim)
        positions.append(by_edge)

    def mean(tables: Sequence[Array]) -> Array:
        return combine(tables, weights) if weights.any() else np.zeros_like(tables[0])

    counts = {
        "samples_hash": samples_hash(samples),
        "n_samples": len(samples),
        "left_out": int((weights == 0).sum()),
    }
    return EdgeScores(
        graph,
        mean(edges),
        mean(nodes),
        weights=weights,
        dims=mean(dims).astype(np.float32),
        positions=positions if settings["per_position"] else None,
        sample_edges=np.stack(edges) if per_sample else None,
        sample_nodes=np.stack(nodes) if per_sample else None,
        settings=settings | counts,
        provenance=provenance,
    )
