"""Scores of every sample as one EdgeScores (method.md section 5)."""

from __future__ import annotations

import warnings

import numpy as np

from ..inputs.samples import samples_hash
from .edge_scores import EdgeScores, combine


def pool(
    graph, samples, found, settings, provenance, per_position, per_sample, dims_rows, width
) -> EdgeScores:
    weights = np.array(
        [0 if found[i] is None else found[i][0] for i in range(len(samples))], np.int64
    )
    if not weights.any():
        warnings.warn(
            f"none of the {len(samples)} samples has a metric position: steering changes no greedy"
            " token there (or no KL passes the threshold); all scores are 0",
            stacklevel=3,
        )
    empty = (
        0,
        np.zeros((graph.n_edges, 0) if per_position else graph.n_edges),
        np.zeros(graph.n_upstream),
        np.zeros((dims_rows, width)),
    )
    first = next((v for v in found.values() if v is not None), empty)
    rows = [
        v if v is not None else (0,) + tuple(np.zeros_like(x) for x in first[1:])
        for v in (found[i] for i in range(len(samples)))
    ]
    edges = [r[1].sum(1) if per_position and w else r[1] for r, w in zip(rows, weights)]
    if per_position:
        edges = [e if w else np.zeros(graph.n_edges) for e, w in zip(edges, weights)]
        positions = [
            r[1] if w else np.zeros((graph.n_edges, len(s)))
            for r, w, s in zip(rows, weights, samples)
        ]
    mean = lambda tables: combine(tables, weights) if weights.any() else np.zeros_like(tables[0])
    return EdgeScores(
        graph,
        mean(edges),
        mean([r[2] for r in rows]),
        weights=weights,
        dims=mean([r[3] for r in rows]).astype(np.float32),
        positions=positions if per_position else None,
        sample_edges=np.stack(edges) if per_sample else None,
        sample_nodes=np.stack([r[2] for r in rows]) if per_sample else None,
        settings=settings
        | {
            "samples_hash": samples_hash(samples),
            "n_samples": len(samples),
            "left_out": int((weights == 0).sum()),
        },
        provenance=provenance,
    )
