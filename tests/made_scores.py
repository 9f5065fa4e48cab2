"""Edge scores with random contents, and their comparison."""

from __future__ import annotations

import numpy as np

from vksteer.circuits.graph import Graph
from vksteer.patching.edge_scores import EdgeScores, combine

SMALL = Graph(3, 4, 2, 1)
E, N = SMALL.n_edges, SMALL.n_upstream
WEIGHTS = [3, 0, 5]


def make(rng, graph=SMALL, weights=WEIGHTS, **more):
    """Scores with every optional part."""
    n, e = len(weights), graph.n_edges
    sample_edges, sample_nodes = (
        rng.standard_normal((n, e)),
        rng.standard_normal((n, graph.n_upstream)),
    )
    options = dict(
        weights=weights,
        dims=rng.standard_normal((graph.n_upstream, 6)),
        sample_edges=sample_edges,
        sample_nodes=sample_nodes,
        positions=[rng.standard_normal((e, s)).astype(np.float32) for s in range(4, 4 + n)],
        settings={"metric": "logit_diff", "steps": 10, "at": "pre_norm", "samples_hash": "s"},
        provenance={
            "model": "m",
            "model_hash": "ab",
            "vector_hash": "v",
            "layer": 1,
            "coefficient": -1.0,
            "d_model": 6,
        },
    )
    return EdgeScores(
        graph, combine(sample_edges, weights), combine(sample_nodes, weights), **{**options, **more}
    )


def same(a, b):
    assert (
        a.graph == b.graph
        and a.n_positions == b.n_positions
        and dict(a.settings) == dict(b.settings)
        and dict(a.provenance) == dict(b.provenance)
    )
    for name in ("edges", "nodes", "dims", "weights", "sample_edges", "sample_nodes"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    assert (a.positions is None) == (b.positions is None)
    for x, y in zip(a.positions or (), b.positions or ()):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
