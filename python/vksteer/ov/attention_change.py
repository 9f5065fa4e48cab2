"""`vs.ov.rerouting`: which heads attend elsewhere under steering.

The OV circuit is what a head moves; this is the QK side: how far its attention patterns move.
Patterns of long prompts do not fit into memory together, so they are captured a few layers at a
time, and where one layer is too large a few queries at a time, and only sums are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..base.checks import is_number, require_int
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Float32Array, Float64Array, IntArray, ProgressLike, Prompts
from ..inputs.prompts import as_tokens, batches, token_text
from ..runtime.batch import Batch, first_tokens
from ..runtime.edits import Steer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

#: Bytes of patterns that are captured at once, and tokens of a pass.
PATTERN_BYTES, PASS_TOKENS = 128 << 20, 4096
#: The largest changes that are kept for each prompt.
KEPT = 100


class Rerouted(NamedTuple):
    """One entry of a pattern: attention of `head` in `layer` from token `query` to token `key`,
    without and with steering.
    """

    layer: int
    head: int
    query: int
    key: int
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Rerouting:
    """How far steering moves attention.

    distance: float64 [L, H], the total variation between the patterns of the unsteered and the
    steered run, 1/2 sum over keys |difference|, the mean over all queries; 0 means the same
    pattern, 1 disjoint ones. each: the same for each prompt, float64 [prompts, L, H]. tokens: the
    texts of each prompt's tokens. coefficient: a. meta: provenance.
    """

    distance: Float64Array
    each: Float64Array
    tokens: tuple[tuple[str, ...], ...]
    coefficient: float
    changes: tuple[tuple[Rerouted, ...], ...]  # of each prompt, the largest first, at most KEPT
    meta: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.each)

    def __repr__(self) -> str:
        l, h = np.unravel_index(int(self.distance.argmax()), self.distance.shape)
        return (
            f"Rerouting({len(self)} prompts, {self.distance.shape[0]} layers x"
            f" {self.distance.shape[1]} heads; mean distance {self.distance.mean():.3f}, largest"
            f" {self.distance[l, h]:.3f} at a{l}.h{h})"
        )

    def top(self, n: int = 10, prompt: int | None = None) -> list[Rerouted]:
        """The n entries of patterns that change most, the largest first: (layer, head, query, key,
        before, after). prompt: of this prompt only (None: of all prompts). Raises ValueError for
        an n below 1 or above 100, which are kept for each prompt, and a prompt that there is not.
        """
        if prompt is not None and not 0 <= require_int(prompt, "prompt") < len(self):
            raise ValueError(f"prompt={prompt}: there are {len(self)} prompts")
        if require_int(n, "n", 1) > KEPT:
            raise ValueError(f"n={n}: the {KEPT} largest changes of each prompt are kept")
        chosen = self.changes if prompt is None else (self.changes[prompt],)
        return sorted((c for some in chosen for c in some), key=_rank)[:n]

    def _repr_html_(self) -> str:
        rows = sorted(
            ((c, i) for i, some in enumerate(self.changes) for c in some),
            key=lambda pair: _rank(pair[0]),
        )[:12]
        lines = "".join(
            f"<tr><td>a{c.layer}.h{c.head}</td><td>{i}</td>"
            f"<td>{c.query} {escape(self.tokens[i][c.query])}</td>"
            f"<td>{c.key} {escape(self.tokens[i][c.key])}</td>"
            f"<td>{c.before:.3f}</td><td>{c.after:.3f}</td></tr>"
            for c, i in rows
        )
        titles = "".join(
            f"<th>{t}</th>" for t in ("head", "prompt", "from token", "to token", "before", "after")
        )
        return f"<p>{escape(repr(self))}</p><table><tr>{titles}</tr>{lines}</table>"

    def plot(self) -> Figure:
        """Distance by layer and head as a map. Raises ImportError, naming what to install, without
        matplotlib.
        """
        L, H = self.distance.shape
        figure = new_figure(max(4.0, 0.3 * H + 1.5), max(3.0, 0.2 * L + 1))
        axes = figure.subplots()
        image = axes.imshow(self.distance, cmap="Blues", vmin=0, aspect="auto")
        axes.set(xlabel="head", ylabel="layer", title=f"attention moved by {self.coefficient:+g} s")
        figure.colorbar(image, ax=axes, label="total variation")
        return figure


def _rank(c: Rerouted) -> tuple[float, int, int, int, int]:
    return (-abs(c.after - c.before), c.layer, c.head, c.query, c.key)


def rerouting(
    model: Model,
    prompts: Prompts,
    vector: SteeringVector,
    coefficient: float,
    *,
    progress: ProgressLike = True,
) -> Rerouting:
    """How steering moves the attention patterns of every head.

    prompts: texts or token lists. vector, coefficient: as in `Steer`, at all tokens. Both runs are
    rows of one batch that starts at the vector's layer; patterns below it are not touched. Memory
    stays bounded for long prompts: patterns are captured in parts of at most 128 MB.

    Returns a Rerouting: `.distance` float64 [L, H], `.top(n)`, `.plot()`. Raises ValueError before
    any work for bad prompts, a coefficient that is no finite number, and a vector of another width
    or layer, or of the output of the last block.
    """
    vector.check(model, output=False)
    if not is_number(coefficient):
        raise ValueError(f"coefficient must be a finite number, not {coefficient!r}")
    rows = as_tokens(model, prompts, "prompts")
    c = model.config
    each = np.zeros((len(rows), c.n_layers, c.n_heads))
    changes: list[list[Rerouted]] = [[] for _ in rows]
    most = max(1, PATTERN_BYTES // (8 * c.n_heads * max(map(len, rows)) ** 2))
    with Progress(progress, len(rows) * (c.n_layers - vector.layer), "rerouting") as bar:
        for part in batches(rows, tokens=PASS_TOKENS, most=most):
            pair = _Pair(model, rows[part], vector, float(coefficient))
            for layer, start, patterns in pair.patterns(bar):
                for i, (base, steered) in enumerate(patterns, part.start):
                    moved = steered - base
                    each[i, layer] += np.abs(moved).sum(axis=(1, 2), dtype=np.float64) / 2
                    changes[i] = _largest(changes[i], layer, start, base, moved)
    lengths = np.array([len(row) for row in rows], np.float64)
    distance = each.sum(axis=0) / lengths.sum()
    texts = tuple(tuple(token_text(model, t) for t in row) for row in rows)
    meta = provenance(
        model,
        vector_hash=digest(vector.direction),
        layer=vector.layer,
        prompts_hash=digest(rows),
    )
    kept = tuple(map(tuple, changes))
    each /= lengths[:, None, None]
    return Rerouting(distance, each, texts, float(coefficient), kept, meta)


def _largest(
    found: list[Rerouted], layer: int, start: int, base: Float32Array, moved: Float32Array
) -> list[Rerouted]:
    """The largest changes so far, with those of one layer from query `start` on: [H, queries,
    keys].
    """
    size = np.abs(moved).ravel()
    n = min(KEPT, size.size)
    for flat in np.argpartition(-size, n - 1)[:n] if n else ():
        if size[flat] > 0:
            h, q, k = (int(i) for i in np.unravel_index(flat, moved.shape))
            before = float(base[h, q, k])
            after = before + float(moved[h, q, k])
            found.append(Rerouted(layer, h, start + q, k, before, after))
    return sorted(found, key=_rank)[:KEPT]


class _Pair:
    """Unsteered and steered runs of some prompts, as rows of one batch: row 2i and row 2i + 1."""

    def __init__(
        self, model: Model, rows: list[list[int]], vector: SteeringVector, coefficient: float
    ) -> None:
        self.model, self.layer = model, vector.layer
        self.tokens = [row for row in rows for _ in range(2)]
        self.lengths = [len(row) for row in self.tokens]
        self.longest = max(self.lengths)
        edits = [[Steer(vector, coefficient)] if i % 2 else [] for i in range(len(self.tokens))]
        self.batch = Batch(model, self.lengths, self.lengths, (edits, False), None)
        self.slots: IntArray = first_tokens(self.lengths)
        self.streams: list[Float32Array] | None = None
        if vector.layer:
            inputs = model._layer_inputs.get(
                [tuple(r) for r in rows], vector.layer, every_layer=False
            )
            self.streams = [x for x in inputs for _ in range(2)]

    def patterns(
        self, bar: Progress
    ) -> Iterator[tuple[int, int, list[tuple[Float32Array, Float32Array]]]]:
        """Yields (layer, first query, [(unsteered, steered) of each prompt]), each [H, queries of
        the prompt, keys of the prompt].
        """
        c, layer = self.model.config, self.layer
        query = 4 * len(self.tokens) * c.n_heads * self.longest  # bytes of one query of a layer
        while layer < c.n_layers:
            n = max(1, min(c.n_layers - layer, PATTERN_BYTES // (query * self.longest)))
            tile = self.longest
            if n == 1 and not 0 < c.rope_switch < self.longest:
                # rows that are grown tile by tile keep their rotation
                tile = max(1, min(self.longest, PATTERN_BYTES // query))
            following: list[list[Float32Array]] = [[] for _ in self.tokens]
            cache = self._cache()
            for start in range(0, self.longest, tile):
                found, streams = self._pass(cache, layer, n, start, start + tile)
                for rest, more in zip(following, streams, strict=True):
                    rest.append(more)
                for i, captured in enumerate(found):
                    yield layer + i, start, self._split(captured, start)
            self.streams = [np.concatenate(parts) for parts in following]
            layer += n
            bar.step(n * (len(self.tokens) // 2))

    def _cache(self) -> Any:
        from ..runtime.device import _engine

        return _engine().Cache(self.model._engine, sum(self.lengths), self.layer)

    def _split(self, captured: Float32Array, start: int) -> list[tuple[Float32Array, Float32Array]]:
        """Without padding."""
        width = captured.shape[2]
        parts = [x[:, : max(0, min(width, n - start)), :n] for x, n in zip(captured, self.lengths)]
        return list(zip(parts[::2], parts[1::2], strict=True))

    def _pass(
        self, cache: Any, layer: int, n: int, start: int, stop: int
    ) -> tuple[list[Float32Array], list[Float32Array]]:
        """Layers [layer, layer + n) of tokens [start, stop): ([rows, H, queries, keys] of each
        layer, the streams that leave them).
        """
        sites = self.model._sites
        names = [f"blocks.{l}.attn.hook_pattern" for l in range(layer, layer + n)]
        names.append(f"blocks.{layer + n - 1}.hook_resid_post")
        keys = [sites.find_all([name])[0].key for name in names]
        active = [i for i, length in enumerate(self.lengths) if length > start]
        resumed: dict[str, Any] = {}
        if layer:
            assert self.streams is not None  # made by the pass before, or kept
            resumed = {
                "first_layer": layer,
                "inputs": [self.streams[i][start:stop] for i in active],
            }
        _, captured = self.batch.forward(
            cache,
            [self.tokens[i][start:stop] for i in active],
            starts=[start] * len(active),
            slots=self.slots[active],
            columns=[-start] * len(active),
            n_columns=min(stop, self.longest) - start,
            key_columns=[0] * len(active),
            n_keys=self.longest,
            active=active,
            capture=keys,
            stop_layer=0 if layer + n == self.model.config.n_layers else layer + n,
            **resumed,
        )
        streams = [np.zeros((0, self.model.config.d_model), np.float32)] * len(self.lengths)
        for i, values in zip(active, captured[keys[-1]], strict=True):
            streams[i] = values[: self.lengths[i] - start]
        if len(active) == len(self.lengths):
            return [captured[key] for key in keys[:-1]], streams
        patterns = []
        for key in keys[:-1]:
            whole = np.zeros((len(self.lengths), *captured[key].shape[1:]), np.float32)
            whole[active] = captured[key]
            patterns.append(whole)
        return patterns, streams
