"""The sections of the report: each figure with its data, sample count, interval and one sentence
that says what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import figures_inside as inside
from . import figures_of_sparsity as sparse
from . import figures_of_vectors as vectors
from . import figures_to_read as to_read
from .figures import Figure, Steps

#: (heading, [(step, figure)]) in the order that tells the story.
STORY: tuple[tuple[str, tuple[tuple[str, Callable[[Steps], Figure]], ...]], ...] = (
    (
        "What the vector does, how strongly and how reliably",
        (
            ("screen", vectors.screen),
            ("candidates", vectors.candidates),
            ("strength", vectors.strength),
            ("range", vectors.ranges),
            ("behaviour", vectors.behaviour),
        ),
    ),
    ("Through what it acts", (("table1", inside.table1), ("rerouting", inside.rerouting))),
    (
        "The circuit",
        (
            ("circuits", inside.curve),
            ("circuits", inside.searched),
            ("circuits", inside.overlaps),
            ("attribution", inside.strongest),
            ("attribution", inside.types),
            ("exact", inside.exact),
        ),
    ),
    ("What it says", (("values", inside.values),)),
    (
        "How sparse it may become",
        (("sparsity", sparse.sparsity), ("sparsity", sparse.shared_dimensions)),
    ),
)
#: Figures that also show texts, after those of the section above.
READ: Mapping[str, tuple[tuple[str, Callable[[Steps, Any], Figure]], ...]] = {
    "Through what it acts": (("texts", to_read.answers),),
    "The circuit": (("positions", to_read.tokens), ("positions", to_read.layers)),
}


def sections(
    steps: Steps, texts: Mapping[str, Any] | None = None
) -> list[tuple[str, list[Figure]]]:
    """[(heading, figures)] of the steps that have run, in the order that tells the story.

    texts: {step: what its file of texts holds}; without a step's, its figures show numbers alone.
    """
    found = []
    for heading, figures in STORY:
        there = [draw(steps) for step, draw in figures if step in steps]
        there += [
            draw(steps, (texts or {}).get(step))
            for step, draw in READ.get(heading, ())
            if step in steps
        ]
        if there:
            found.append((heading, there))
    return found
