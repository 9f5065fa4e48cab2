"""Small graphs for the tests of circuits, and Hypothesis' scores on them."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from vksteer.circuits.graph import Graph

SHAPES = [
    (1, 1, 1, 0),
    (2, 2, 1, 0),
    (2, 2, 2, 1),
    (3, 2, 1, 1, True),  # attention and MLP of a layer in parallel
    (3, 4, 2, 1),
    (2, 3, 3, 0),
]
SHAPES += [(1, 1, 1, 0, True), (3, 4, 2, 1, True), (2, 3, 3, 0, True)]
SMALL = Graph(3, 4, 2, 1)


@st.composite
def scored(draw, shapes=SHAPES):
    """A small graph with scores of which many are equal."""
    g = Graph(*draw(st.sampled_from(shapes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    return g, rng.integers(-levels, levels + 1, g.n_edges) / levels
