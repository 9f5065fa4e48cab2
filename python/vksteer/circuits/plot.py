"""A compact picture of a circuit: steer at the top, layers downward, heads across, MLPs in the last
column, logits at the bottom.
"""

from __future__ import annotations

import numpy as np

from ..base.figures import new_figure
from .graph import INPUT_KINDS

#: By the input that an edge ends in.
COLOURS = {"q": "#7b5ea7", "k": "#c9a227", "v": "#c8643c", "mlp": "#4878a8", "logits": "#444444"}
_POINTS = 16  # of a curve


def _places(graph):
    """x, y of upstream nodes [N, 2] and of inputs [n_downstream, 2]; y grows
    downward, one unit a layer.
    """
    H, G, L = graph.n_heads, graph.n_kv_heads, graph.depth
    group, middle, mlp_x = H // G, (H - 1) / 2, H + 0.5
    nodes, inputs = [(middle, -1.0)], []
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


def _curves(starts, ends) -> np.ndarray:
    """Cubic curves that leave and arrive vertically; those that stay in their column (MLP to MLP)
    bow to the right. [n, _POINTS, 2].
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
    return (1 - t) ** 3 * a + 3 * (1 - t) ** 2 * t * b + 3 * (1 - t) * t**2 * c + t**3 * d


def _strength(circuit, scores) -> np.ndarray | None:
    """|score| of the circuit's edges, largest 1; None without scores."""
    if scores is None:
        return None
    if getattr(scores, "graph", circuit.graph) != circuit.graph:
        raise ValueError(
            f"scores of another graph: {scores.graph!r}; the circuit has {circuit.graph!r}"
        )
    values = np.abs(np.asarray(getattr(scores, "edges", scores), float))
    if values.shape != (circuit.graph.n_edges,):
        raise ValueError(f"scores must be [{circuit.graph.n_edges}], not {list(values.shape)}")
    values = values[circuit.edges]
    return values / values.max() if values.size and values.max() > 0 else np.ones(values.size)


def draw(circuit, path=None, *, scores=None, title: str | None = None):
    """See `Circuit.plot`. Raises ImportError without matplotlib, ValueError for
    scores of another graph.
    """
    graph, edges = circuit.graph, circuit.edges
    H, L = graph.n_heads, graph.depth
    strength = _strength(circuit, scores)
    figure = new_figure(min(14.0, max(5.0, 0.36 * (H + 3))), min(16.0, max(3.2, 0.5 * (L + 2.5))))
    from matplotlib.collections import LineCollection  # the figure above has explained its absence

    axes = figure.add_subplot()
    nodes, inputs = _places(graph)
    upstream, downstream = graph.upstream[edges], graph.downstream[edges]
    curves = _curves(nodes[upstream], inputs[downstream])
    kinds = graph.input_kind[downstream]
    # hundreds of edges stay apart, thousands become shades
    alpha = float(np.clip(14 / np.sqrt(max(len(circuit), 1)), 0.05, 0.85))
    counts = circuit.counts()
    for i, name in enumerate(INPUT_KINDS):
        mine = np.flatnonzero(kinds == i)
        if mine.size:
            widths = 0.8 if strength is None else 0.3 + 2.4 * np.sqrt(strength[mine])
            axes.add_collection(
                LineCollection(
                    curves[mine],
                    colors=COLOURS[name],
                    linewidths=widths,
                    alpha=alpha,
                    zorder=1,
                    capstyle="round",
                )
            )
            axes.plot([], [], color=COLOURS[name], lw=2, label=f"{name} {counts[name]}")
    taking_part = np.zeros(graph.n_upstream, bool)
    taking_part[upstream] = True
    degree = np.bincount(upstream, minlength=graph.n_upstream)
    axes.scatter(
        *nodes[~taking_part].T,
        s=5,
        facecolors="none",
        edgecolors="#cccccc",
        linewidths=0.5,
        zorder=2,
    )
    axes.scatter(
        *nodes[taking_part].T,
        s=14 + 40 * degree[taking_part] / max(degree.max(), 1),
        color="#222222",
        linewidths=0,
        zorder=3,
    )
    # A key/value head's group of query heads, where an edge ends in it.
    group, used = H // graph.n_kv_heads, downstream[(kinds == 1) | (kinds == 2)]
    bars = sorted(
        {
            (int(i) // graph.width, (int(i) % graph.width - H) % graph.n_kv_heads * group)
            for i in used
        }
    )
    lines = [[(first - 0.15, l - 0.1), (first + group - 0.85, l - 0.1)] for l, first in bars]
    axes.add_collection(LineCollection(lines, colors="#999999", linewidths=0.8, zorder=2))
    axes.text(*(nodes[0] - (0, 0.28)), "steer", ha="center", va="bottom", fontsize=8)
    axes.text(inputs[-1, 0], inputs[-1, 1] + 0.12, "logits", ha="center", va="top", fontsize=8)
    axes.set_xlim(-0.8, H + 1.6)
    axes.set_ylim(L + 0.9, -1.8)
    step = max(1, -(-H // 16))
    axes.set_xticks(
        [*range(0, H, step), H + 0.5], [*map(str, range(0, H, step)), "MLP"], fontsize=7
    )
    axes.set_yticks(range(L), [str(graph.layer + l) for l in range(L)], fontsize=7)
    axes.set_xlabel("head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        title
        or f"{len(circuit)} of {graph.n_edges} edges ({100 * len(circuit) / graph.n_edges:.3g} %)",
        fontsize=9,
    )
    if len(circuit):
        axes.legend(
            frameon=False,
            fontsize=7,
            ncols=5,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.6 / axes.figure.get_figheight()),
        )
    if path is not None:
        figure.savefig(path, dpi=160)
    return figure
