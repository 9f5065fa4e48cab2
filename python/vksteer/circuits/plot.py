"""A compact picture of a circuit: steer at the top, layers downward, heads across, MLPs in the last
column, logits at the bottom.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..base.figures import new_figure
from ..base.types import Float64Array, PathLike
from .graph import INPUT_KINDS, Graph

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..patching.edge_scores import EdgeScores
    from .circuit import Circuit

#: By the input that an edge ends in.
COLOURS = {"q": "#7b5ea7", "k": "#c9a227", "v": "#c8643c", "mlp": "#4878a8", "logits": "#444444"}
#: Points of a curve.
_POINTS = 16


def _places(graph: Graph) -> tuple[Float64Array, Float64Array]:
    """(x, y) of upstream nodes [N, 2] and of inputs [n_downstream, 2]; y grows downward, by one for
    each layer.
    """
    H, G, L = graph.n_heads, graph.n_kv_heads, graph.depth
    group, middle, mlp_x = H // G, (H - 1) / 2, H + 0.5
    nodes: list[tuple[float, float]] = [(middle, -1.0)]
    inputs: list[tuple[float, float]] = []
    for l in range(L):
        nodes += [(h, l) for h in range(H)] + [(mlp_x, l + 0.45)]
        inputs += [(h, l - 0.1) for h in range(H)]
        # k and v at the middle of their group, a little apart
        inputs += [
            (g * group + (group - 1) / 2 + shift, l - 0.1)
            for shift in (-0.12, 0.12)
            for g in range(G)
        ]
        inputs.append((mlp_x, l + 0.35))
    return np.array(nodes, float), np.array(inputs + [(middle, L + 0.35)], float)


def _curves(starts: Float64Array, ends: Float64Array) -> Float64Array:
    """Cubic Bezier curves that leave and arrive vertically, [n, _POINTS, 2]. Curves that stay in
    their column (MLP to MLP) bend to the right.
    """
    t = np.linspace(0, 1, _POINTS)[None, :, None]
    half = (starts[:, 1] + ends[:, 1]) / 2
    span = ends[:, 1] - starts[:, 1]
    bow = np.where(np.abs(ends[:, 0] - starts[:, 0]) < 1e-6, 0.12 + 0.1 * np.minimum(span, 8), 0)
    first, second = (
        np.stack([starts[:, 0] + bow, half - bow * 0.2], 1),
        np.stack([ends[:, 0] + bow, half + bow * 0.2], 1),
    )
    a, b, c, d = (p[:, None] for p in (starts, first, second, ends))
    points: Float64Array = (
        (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d
    )
    return points


def _strength(circuit: Circuit, scores: EdgeScores | npt.ArrayLike | None) -> Float64Array | None:
    """|score| of the circuit's edges divided by the largest, float64 [n]; None without scores."""
    if scores is None:
        return None
    graph = getattr(scores, "graph", circuit.graph)
    if graph != circuit.graph:
        raise ValueError(f"scores of another graph: {graph!r}; the circuit has {circuit.graph!r}")
    values = np.abs(np.asarray(getattr(scores, "edges", scores), float))
    if values.shape != (circuit.graph.n_edges,):
        raise ValueError(f"scores must be [{circuit.graph.n_edges}], not {list(values.shape)}")
    values = values[circuit.edges]
    return values / values.max() if values.size and values.max() > 0 else np.ones(values.size)


def draw(
    circuit: Circuit,
    path: PathLike | None = None,
    *,
    scores: EdgeScores | npt.ArrayLike | None = None,
    title: str | None = None,
) -> Figure:
    """See `Circuit.plot`. Raises ImportError without matplotlib, ValueError for scores of another
    graph.
    """
    graph = circuit.graph
    H, L = graph.n_heads, graph.depth
    strength = _strength(circuit, scores)
    figure = new_figure(min(14.0, max(5.0, 0.36 * (H + 3))), min(16.0, max(3.2, 0.5 * (L + 2.5))))
    axes = figure.add_subplot()
    nodes, inputs = _places(graph)
    _draw_edges(axes, circuit, nodes, inputs, strength)
    _draw_nodes(axes, circuit, nodes)
    _draw_groups(axes, circuit)
    steer, logits = nodes[0], inputs[-1]
    axes.text(steer[0], steer[1] - 0.28, "steer", ha="center", va="bottom", fontsize=8)
    axes.text(logits[0], logits[1] + 0.12, "logits", ha="center", va="top", fontsize=8)
    _label(axes, graph)
    share = 100 * len(circuit) / graph.n_edges
    axes.set_title(title or f"{len(circuit)} of {graph.n_edges} edges ({share:.3g} %)", fontsize=9)
    if len(circuit):
        below: Any = (0.5, -0.6 / figure.get_figheight())
        axes.legend(frameon=False, fontsize=7, ncols=5, loc="upper center", bbox_to_anchor=below)
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure


def _draw_edges(
    axes: Axes,
    circuit: Circuit,
    nodes: Float64Array,
    inputs: Float64Array,
    strength: Float64Array | None,
) -> None:
    from matplotlib.collections import LineCollection  # new_figure has explained its absence

    graph, edges = circuit.graph, circuit.edges
    downstream = graph.downstream[edges]
    curves = _curves(nodes[graph.upstream[edges]], inputs[downstream])
    kinds = graph.input_kind[downstream]
    # Hundreds of edges can be told apart; thousands become shades.
    alpha = float(np.clip(14 / np.sqrt(max(len(circuit), 1)), 0.05, 0.85))
    counts = circuit.counts()
    for i, name in enumerate(INPUT_KINDS):
        mine = np.flatnonzero(kinds == i)
        if mine.size:
            widths = 0.8 if strength is None else 0.3 + 2.4 * np.sqrt(strength[mine])
            lines = LineCollection(
                list(curves[mine]),
                colors=COLOURS[name],
                linewidths=widths,
                alpha=alpha,
                zorder=1,
                capstyle="round",
            )
            axes.add_collection(lines)
            axes.plot([], [], color=COLOURS[name], lw=2, label=f"{name} {counts[name]}")


def _draw_nodes(axes: Axes, circuit: Circuit, nodes: Float64Array) -> None:
    """Nodes from which an edge starts are filled, larger the more edges start there."""
    graph = circuit.graph
    degree = np.bincount(graph.upstream[circuit.edges], minlength=graph.n_upstream)
    used = degree > 0
    x, y = nodes[~used].T
    axes.scatter(x, y, s=5, facecolors="none", edgecolors="#cccccc", linewidths=0.5, zorder=2)
    x, y = nodes[used].T
    sizes = 14 + 40 * degree[used] / max(degree.max(), 1)
    axes.scatter(x, y, s=sizes, color="#222222", linewidths=0, zorder=3)


def _draw_groups(axes: Axes, circuit: Circuit) -> None:
    """A bar over the query heads of each key/value head in which an edge ends."""
    from matplotlib.collections import LineCollection

    graph = circuit.graph
    H, G, group = graph.n_heads, graph.n_kv_heads, graph.n_heads // graph.n_kv_heads
    downstream = graph.downstream[circuit.edges]
    kinds = graph.input_kind[downstream]
    used = downstream[(kinds == 1) | (kinds == 2)].tolist()
    bars = sorted({(i // graph.width, (i % graph.width - H) % G * group) for i in used})
    lines = [[(first - 0.15, l - 0.1), (first + group - 0.85, l - 0.1)] for l, first in bars]
    axes.add_collection(LineCollection(lines, colors="#999999", linewidths=0.8, zorder=2))


def _label(axes: Axes, graph: Graph) -> None:
    H, L = graph.n_heads, graph.depth
    axes.set_xlim(-0.8, H + 1.6)
    axes.set_ylim(L + 0.9, -1.8)
    step = max(1, -(-H // 16))
    heads = range(0, H, step)
    axes.set_xticks([*heads, H + 0.5], [*map(str, heads), "MLP"], fontsize=7)
    axes.set_yticks(range(L), [str(graph.layer + l) for l in range(L)], fontsize=7)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
