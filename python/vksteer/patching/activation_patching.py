"""Exact activation patching between two prompts, layer by layer: the heat map that interpretability
courses begin with (Meng et al. 2022; Wang et al. 2022; Zhang and Nanda, arXiv 2309.16042).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import is_int
from ..base.distributions import log_softmax
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Array, Float32Array, Float64Array, ProgressLike, Prompt
from ..inputs.prompts import as_tokens, token_text
from ..runtime.batch import Batch, first_tokens
from ..runtime.edit_compiler import RowShape
from ..runtime.edits import Set
from ..runtime.gradients import KL, LogitDiff, LogProb, row_metric
from ..runtime.resume import layer_inputs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..runtime.model import Model
    from ..runtime.sites import Site

#: A scalar of a row's logits, as `model.gradients` takes it.
Metric: TypeAlias = LogitDiff | LogProb | KL

_COLOURS = {True: "200,60,40", False: "40,90,200"}
#: Bytes of logits, and tokens, of one pass.
LOGIT_BYTES, PASS_TOKENS = 256 << 20, 8192


@dataclass(frozen=True, eq=False)
class Heatmap:
    """values: float64 [L, S] (or [L, H] for a site with heads), m(patched) - m(corrupt), the mean
    over pairs of prompts. clean, corrupt: the metric of the two runs, float64 [pairs]. site: the
    name without its layer. columns: what the second axis counts, token texts or heads. meta:
    provenance.
    """

    values: Float64Array
    clean: Float64Array
    corrupt: Float64Array
    site: str
    columns: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return (
            f"Heatmap({self.site}, {self.values.shape[0]} layers x {self.values.shape[1]}; metric"
            f" {self.clean.mean():.3f} clean, {self.corrupt.mean():.3f} corrupt)"
        )

    @property
    def restored(self) -> Float64Array:
        """Values / (m(clean) - m(corrupt)): 1 where one patch restores all. Means over pairs are
        taken before the quotient; infinite or NaN where the two runs agree.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            share: Float64Array = self.values / (self.clean.mean() - self.corrupt.mean())
        return share

    def top(self, n: int = 10) -> list[tuple[int, int, float]]:
        """The n largest patches by size: (layer, column, value), the largest first."""
        order = np.argsort(-np.abs(self.values), axis=None, kind="stable")[:n]
        places = [np.unravel_index(i, self.values.shape) for i in order]
        return [(int(l), int(c), float(self.values[l, c])) for l, c in places]

    def _repr_html_(self) -> str:
        largest = float(np.abs(self.values).max()) or 1.0
        head = "".join(f"<th>{i}</th>" for i in range(self.values.shape[1]))
        lines = []
        for l, row in enumerate(self.values):
            cells = "".join(
                f'<td title="{v:.3f}" style="background:rgba({_COLOURS[v > 0]}'
                f',{abs(v) / largest:.2f})">{v:.2f}</td>'
                for v in row.tolist()
            )
            lines.append(f"<tr><th>{l}</th>{cells}</tr>")
        return f"<table><tr><th>{self.site}</th>{head}</tr>{''.join(lines)}</table>"

    def plot(self) -> Figure:
        """Layers against columns as a map. Raises ImportError, naming what to install, without
        matplotlib.
        """
        L, n = self.values.shape
        figure = new_figure(max(4.0, 0.35 * n + 1.5), max(3.0, 0.2 * L + 1))
        axes = figure.subplots()
        size = float(np.abs(self.values).max()) or 1.0
        image = axes.imshow(self.values, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
        axes.set_xticks(range(n), self.columns, rotation=90, fontsize=7)
        axes.set(ylabel="layer", title=self.site)
        figure.colorbar(image, ax=axes, label="m(patched) - m(corrupt)")
        return figure


def heatmap(
    model: Model,
    clean: Prompt | Sequence[Prompt],
    corrupt: Prompt | Sequence[Prompt],
    *,
    of: Metric | Sequence[Metric],
    site: str = "hook_resid_pre",
    progress: ProgressLike = True,
) -> Heatmap:
    """What one activation of the clean run changes when it is put into the corrupt run.

    clean, corrupt: one pair of prompts (texts or token lists) of equal length, or lists of pairs
    that all have one length: means over pairs are returned. of: the metric, vs.LogitDiff,
    vs.LogProb or vs.KL, one for all pairs or one for each. site: without "blocks.{l}.", for example
    "hook_resid_pre", "hook_attn_out", "hook_mlp_out" (patched at one position at a time) or
    "attn.hook_z" (patched for one head at a time, at all positions).

    Returns a Heatmap: `.values` float64 [L, S] or [L, H], m(patched) - m(corrupt), exact for each
    patch. Layers below a patch run once. Raises ValueError before any work for prompts of unequal
    length, lists of unequal length, a site without layers or that the model does not have, and
    metrics whose positions lie outside the prompt.
    """
    pairs = prompt_pairs(model, clean, corrupt)
    listed = row_metrics(of, len(pairs), len(pairs[0][0]), model.config.d_vocab)
    sites = _sites(model, site)
    found, ends = [], []
    with Progress(progress, len(pairs) * len(sites), "heat map") as bar:
        for (good, bad), metric in zip(pairs, listed, strict=True):
            patching = _Patching(model, good, bad, metric, sites)
            found.append(patching.run(bar))
            ends.append((patching.clean, patching.corrupt))
    if sites[0].has_heads:
        columns = tuple(f"h{h}" for h in range(sites[0].n_heads))
    elif len(pairs) == 1:
        columns = tuple(token_text(model, t) for t in pairs[0][1])
    else:
        columns = tuple(str(p) for p in range(len(pairs[0][1])))
    meta = provenance(model, prompts_hash=digest(pairs), site=site, n_pairs=len(pairs))
    both = np.array(ends)
    return Heatmap(np.mean(found, axis=0), both[:, 0], both[:, 1], site, columns, meta)


def prompt_pairs(model: Model, clean: Any, corrupt: Any) -> list[tuple[list[int], list[int]]]:
    sides = as_tokens(model, clean, "clean"), as_tokens(model, corrupt, "corrupt")
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"clean and corrupt are pairs: {len(sides[0])} and {len(sides[1])} prompts were given"
        )
    for i, (good, bad) in enumerate(zip(*sides, strict=True)):
        if len(good) != len(bad):
            raise ValueError(
                f"pair {i} has {len(good)} clean and {len(bad)} corrupt tokens: activations are"
                " patched position by position, so both prompts must have one length"
            )
        if len(good) != len(sides[0][0]):
            raise ValueError(
                f"pair {i} has {len(good)} tokens and pair 0 {len(sides[0][0])}: means over pairs"
                " need one length"
            )
    return list(zip(*sides, strict=True))


def row_metrics(of: Any, n: int, length: int, vocabulary: int) -> list[Metric]:
    listed = list(of) if isinstance(of, (list, tuple)) else [of] * n
    if len(listed) != n:
        raise ValueError(f"of must be one metric, or one for each of {n} pairs, not {len(listed)}")
    for i, metric in enumerate(listed):
        if not isinstance(metric, (LogitDiff, LogProb, KL)):
            raise ValueError(f"of must be vs.LogitDiff, vs.LogProb or vs.KL, not {metric!r}")
        for p in metric_positions(metric):
            if not is_int(p) or not -length <= p < length:
                raise ValueError(f"of: position {p!r} lies outside the prompts' {length} tokens")
        for token in _tokens(metric):
            if not is_int(token) or not 0 <= token < vocabulary:
                raise ValueError(f"of: {token!r} is no token id (0 to {vocabulary - 1})")
        row_metric(metric, RowShape(length, length), vocabulary, i)  # counts and shapes
    return listed


def metric_positions(metric: Metric) -> list[Any]:
    at = metric.position if isinstance(metric, LogitDiff) else metric.positions
    return [at] if is_int(at) else list(at)  # type: ignore[arg-type]


def _tokens(metric: Metric) -> list[Any]:
    if isinstance(metric, LogitDiff):
        return [metric.a, metric.b]
    if not isinstance(metric, LogProb):
        return []
    return [metric.tokens] if is_int(metric.tokens) else list(metric.tokens)


def metric_value(metric: Metric, logits: Float64Array) -> float:
    """The metric of logits [n positions, V] at its positions, in their order."""
    if isinstance(metric, LogitDiff):
        return float(logits[0, metric.a] - logits[0, metric.b])
    logp = log_softmax(logits)
    if isinstance(metric, LogProb):
        return float(logp[np.arange(len(logp)), _tokens(metric)].sum())
    reference = log_softmax(np.asarray(metric.reference_logits, np.float64))
    return float((np.exp(reference) * (reference - logp)).sum())


def _sites(model: Model, site: str) -> list[Site]:
    """The site of every layer."""
    if not isinstance(site, str) or site.startswith("blocks."):
        raise ValueError(f'site {site!r}: name it without its layer, for example "hook_resid_pre"')
    names = [f"blocks.{l}.{site}" for l in range(model.config.n_layers)]
    try:
        return [model._sites.find_all([name])[0] for name in names]
    except KeyError as error:
        raise ValueError(f"site {site!r}: {error.args[0]}") from None


class _Patching:
    """All patches of one pair of prompts. Only tokens up to the metric's last position are run:
    later ones cannot change it, and patches there count as 0. Where the length of a text decides
    its rotation tables, prompts that are cut keep those of the whole.
    """

    def __init__(
        self, model: Model, clean: list[int], corrupt: list[int], metric: Metric, sites: list[Site]
    ) -> None:
        self.model, self.metric, self.sites, self.length = model, metric, sites, len(corrupt)
        at = [p % len(corrupt) for p in metric_positions(metric)]
        n, switch = max(at) + 1, model.config.rope_switch
        if len(corrupt) > switch > 0:
            n = max(n, switch + 1)
        self.tokens, self.at, whole = corrupt[:n], at, clean[:n]
        run = model.run([whole], capture=[s.name for s in sites], logits="all")
        self.patches = {s.name: run[s.name][0] for s in sites}
        assert run.logits is not None  # they were asked for
        self.clean = metric_value(metric, run.logits[0][at].astype(np.float64))
        layers = sorted({s.layer for s in sites})
        _, streams = layer_inputs(model, [self.tokens], layers, len(self.tokens))
        self.streams = {l: streams[l][0] for l in layers}
        base = model.run([self.tokens], logits="all").logits
        assert base is not None
        self.corrupt = metric_value(metric, base[0][at].astype(np.float64))

    def run(self, bar: Progress) -> Float64Array:
        """float64 [L, S] or [L, H]."""
        heads = self.sites[0].has_heads
        values = np.zeros((len(self.sites), self.sites[0].n_heads if heads else self.length))
        for i, site in enumerate(self.sites):
            edits = self._edits(site)
            values[i, : len(edits)] = self._layer(site, edits) - self.corrupt
            bar.step(1)
        return values

    def _edits(self, site: Site) -> list[Set]:
        """One for each position, or for each head at all positions."""
        patch: Array = self.patches[site.name]
        if not site.has_heads:
            return [Set(site.name, patch[p][None], [p]) for p in range(max(self.at) + 1)]
        # patterns and scores are [head, query, key], other sites [query, head, width]
        heads = range(site.n_heads)
        parts = [patch[h : h + 1] if site.over_keys else patch[:, h : h + 1] for h in heads]
        return [Set(site.name, part, heads=[h]) for h, part in zip(heads, parts, strict=True)]

    def _layer(self, site: Site, edits: list[Set]) -> Float64Array:
        """The metric under each edit; rows begin at the site's layer."""
        n, V = len(self.tokens), self.model.config.d_vocab
        last = self.at == [n - 1]
        each = 4 * V * (1 if last else n)
        most = max(1, min(LOGIT_BYTES // each, PASS_TOKENS // n))
        found: list[float] = []
        for start in range(0, len(edits), most):
            some = edits[start : start + most]
            for logits in self._pass(site.layer, some, last):
                rows = logits[None] if last else logits[self.at]
                found.append(metric_value(self.metric, rows.astype(np.float64)))
        return np.array(found)

    def _pass(self, layer: int, edits: list[Set], last: bool) -> Float32Array:
        """Logits [rows, V] after the last token, or [rows, tokens, V]."""
        from ..runtime.device import _engine

        n, rows = len(self.tokens), len(edits)
        batch = Batch(self.model, [n] * rows, [n] * rows, ([[e] for e in edits], False), None)
        resumed: dict[str, Any] = {}
        if layer:
            resumed = {"first_layer": layer, "inputs": [self.streams[layer]] * rows}
        logits, _ = batch.forward(
            _engine().Cache(self.model._engine, n * rows),
            [self.tokens] * rows,
            slots=first_tokens([n] * rows),
            columns=[0] * rows,
            n_columns=n,
            logits="last" if last else "all",
            **resumed,
        )
        assert logits is not None  # they were asked for
        return logits
