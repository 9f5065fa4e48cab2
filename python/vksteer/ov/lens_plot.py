"""The figure of a Lens (needs matplotlib)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..base.figures import new_figure, tick_text
from ..base.types import PathLike

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .lens import Lens


def lens_figure(lens: Lens, path: PathLike | None = None, mark: str | None = None) -> Figure:
    """The figure that Lens.plot describes."""
    axes_of = lens.tokens.ndim - 1
    if axes_of > 2:
        raise ValueError(
            f"a plot has room for two leading axes, these vectors have {axes_of}: take a part of"
            " them"
        )
    figure = _map(lens, mark) if axes_of == 2 else _bars(lens)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _map(lens: Lens, mark: str | None) -> Figure:
    """Two leading axes: a map of the largest values."""
    n, m = lens.tokens.shape[:2]
    figure = new_figure(max(5.0, 0.75 * m + 1.5), max(2.5, 0.32 * n + 1.0))
    axes = figure.add_subplot()
    best = lens.values[..., 0].astype(np.float64)
    image = axes.imshow(best, cmap="viridis", aspect="auto")
    middle = (np.nanmin(best) + np.nanmax(best)) / 2
    for i, j in np.ndindex(n, m):
        axes.text(
            j,
            i,
            tick_text(lens._texts[int(lens.tokens[i, j, 0])]),
            ha="center",
            va="center",
            fontsize=6,
            color="black" if best[i, j] > middle else "white",
        )
    if mark is not None:
        from matplotlib.patches import Rectangle

        for i, j in {hit.index for hit in lens.find(mark)}:
            axes.add_patch(
                Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor="#d62728", linewidth=1.6)
            )
    axes.set_xticks(range(m), lens.labels[1], fontsize=7)
    axes.set_yticks(range(n), lens.labels[0], fontsize=7)
    figure.colorbar(image, label=f"largest {lens.by}")
    return figure


def _bars(lens: Lens, most: int = 12) -> Figure:
    """At most one leading axis: bars of the first tokens of each vector."""
    tokens, values = (a.reshape(-1, a.shape[-1])[:, :most] for a in (lens.tokens, lens.values))
    names = lens.labels[0] if lens.labels else [""]
    columns = min(4, len(tokens))
    rows = -(-len(tokens) // columns)
    figure = new_figure(3.2 * columns, 0.22 * tokens.shape[1] * rows + 0.7 * rows)
    for i, (some, heights) in enumerate(zip(tokens, values)):
        axes = figure.add_subplot(rows, columns, i + 1)
        at = np.arange(len(some))[::-1]
        axes.barh(at, heights, color="#4878a8")
        axes.set_yticks(at, [tick_text(lens._texts[int(t)]) for t in some], fontsize=7)
        axes.set_title(names[i], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(lens.by, fontsize=7)
    return figure
