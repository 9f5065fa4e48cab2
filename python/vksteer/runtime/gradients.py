"""`model.gradients`: d(scalar)/d(site) for one scalar a row, through the engine's backward pass
(csrc/run/backward.c).

The three scalars read the logits of `model.run` (after a final soft cap). Positions count from the
row's own first token; negative ones from the prompt's end, as everywhere (docs/api.md). The logits
at position p predict the token at p + 1.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, KeysView, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _engine as extension
from ..base.arrays import as_float32
from ..base.progress import Progress
from ..base.types import (
    BoolArray,
    Float32Array,
    Float64Array,
    Int32Array,
    IntArray,
    ProgressLike,
    UInt32Array,
)
from . import finite
from .batch import Batch, first_tokens, packed_rows
from .edit_compiler import RowShape, per_row
from .edits import Ablate, Add, MeanAblate, Scale, Set
from .run import left_padded, split_rows

if TYPE_CHECKING:
    from .edits import Edit
    from .model import Model
    from .sites import Site

#: The engine's numbers of the metrics (csrc/run/tape.h).
PAIR, LOG_PROB, KL_DIVERGENCE, DIRECTIONAL_KL, CHOICE = (
    extension.constants[f"METRIC_{name}"]
    for name in ("PAIR", "LOG_PROB", "KL", "DIRECTIONAL_KL", "CHOICE")
)
#: Tokens that go forward and back together, unless a row is longer.
BATCH_TOKENS = 512
#: Share of the free device memory that a tape may take before it keeps only layer inputs.
MEMORY_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class LogitDiff:
    """logit(a) - logit(b) at one position. a, b: token ids."""

    position: int
    a: int
    b: int


@dataclass(frozen=True, eq=False)
class LogProb:
    """sum over i of log p(tokens[i]), read from the logits at positions[i]. Nats."""

    positions: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True, eq=False)
class KL:
    """sum over i of KL(softmax(reference_logits[i]) || p at positions[i]), in nats.
    reference_logits: float [n positions, V].
    """

    reference_logits: Any
    positions: Sequence[int]


class Gradients:
    """The result of `model.gradients`. `grads[site]`: float32, shaped and left-padded as
    `run[site]`, with zeros at padding and masked keys.

    values: float64 [B], the scalars. tokens int32 [B, S], mask bool [B, S].
    """

    def __init__(
        self,
        values: Float64Array,
        tokens: Int32Array,
        mask: BoolArray,
        arrays: dict[str, Float32Array],
    ) -> None:
        self.values, self.tokens, self.mask, self._arrays = values, tokens, mask, arrays

    def __getitem__(self, site: str) -> Float32Array:
        try:
            return self._arrays[site]
        except KeyError:
            raise KeyError(
                f"no gradient was taken at {site!r}; there are {', '.join(self._arrays)}"
            ) from None

    def __contains__(self, site: object) -> bool:
        return site in self._arrays

    def keys(self) -> KeysView[str]:
        """Names of the sites."""
        return self._arrays.keys()

    def items(self) -> ItemsView[str, Float32Array]:
        """Pairs (site, gradient) of all sites, float32, shaped and left-padded as `run[site]`. The
        arrays are those that `grads[site]` returns.
        """
        return self._arrays.items()

    def __repr__(self) -> str:
        return (
            f"Gradients(rows={self.tokens.shape[0]}, positions={self.tokens.shape[1]},"
            f" sites={len(self._arrays)})"
        )


@dataclass
class RowMetric:
    """A scalar of one row, checked: ascending positions from its first token, weights, and
    what its kind needs.
    """

    kind: int
    positions: IntArray  # int64 [n], ascending
    weights: Float32Array  # float32 [n]
    a: UInt32Array | None = None  # uint32 [n]
    b: UInt32Array | None = None
    reference_logits: Float32Array | None = None  # float32 [n, V]
    reference: Float32Array | None = None  # float32 [n, D]: normed final rows
    other: Float32Array | None = None


def _positions(positions: Any, shape: RowShape, what: str) -> IntArray:
    assert shape.total is not None  # a row that is run has its response
    raw = [int(p) for p in np.atleast_1d(np.asarray(positions)).tolist()]
    at = np.array([p if p >= 0 else shape.prompt + p for p in raw], np.int64)
    bad = [r for r, p in zip(raw, at, strict=True) if not 0 <= p < shape.total]
    if bad or not raw:
        raise ValueError(
            f"{what}: position {bad[0] if bad else '(none)'} of a row with {shape.total} tokens,"
            f" {shape.prompt} of them the prompt"
        )
    if len(set(at.tolist())) < len(at):
        raise ValueError(f"{what}: a position is named twice in {raw}")
    return at


def _ids(tokens: Any, n: int, vocab: int, what: str) -> UInt32Array:
    ids = np.atleast_1d(np.asarray(tokens)).astype(np.int64)
    if ids.shape != (n,) or ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab:
        raise ValueError(
            f"{what}: {n} token ids below {vocab} are needed, not {np.asarray(tokens).tolist()}"
        )
    return ids.astype(np.uint32)


def row_metric(of: Any, shape: RowShape, vocab: int, row: int) -> RowMetric:
    """The metric of one row. ValueError or TypeError where the scalar does not fit the row."""
    what = f"row {row}, {type(of).__name__}"
    if isinstance(of, LogitDiff):
        at = _positions([of.position], shape, what)
        return RowMetric(
            PAIR,
            at,
            np.ones(1, np.float32),
            _ids([of.a], 1, vocab, what),
            _ids([of.b], 1, vocab, what),
        )
    if isinstance(of, LogProb):
        at = _positions(of.positions, shape, what)
        order = np.argsort(at)
        return RowMetric(
            LOG_PROB,
            at[order],
            np.ones(len(at), np.float32),
            _ids(of.tokens, len(at), vocab, what)[order],
        )
    if isinstance(of, KL):
        at = _positions(of.positions, shape, what)
        order = np.argsort(at)
        logits = as_float32(of.reference_logits)
        logits = logits[None] if logits.ndim == 1 else logits
        if logits.shape != (len(at), vocab):
            raise ValueError(
                f"{what}: reference_logits must be [{len(at)} positions, {vocab}], not"
                f" {list(logits.shape)}"
            )
        if not np.isfinite(logits).all():
            raise ValueError(f"{what}: reference_logits hold NaN or infinity")
        return RowMetric(
            KL_DIVERGENCE, at[order], np.ones(len(at), np.float32), reference_logits=logits[order]
        )
    raise TypeError(f"of={of!r}: use vs.LogitDiff, vs.LogProb or vs.KL")


def _site_layer(site: Site, n_layers: int) -> int:
    """The layer at which the backward pass may stop for a site; n_layers for the final norm."""
    name, layer = site.name, site.key[1]
    if name.startswith("ln_final"):
        return n_layers
    return 0 if site.before_layers else layer


_NO_GRADIENT = ("hook_scale", "hook_attn_scores", "hook_pattern")


def check_edits(model: Model, rows_edits: Iterable[Iterable[Edit]]) -> None:
    """Raises ValueError for an edit through which the backward pass has no gradient."""
    for row, edits in enumerate(rows_edits):
        for edit in edits:
            sites = (
                [edit.site]
                if isinstance(edit, (Set, Add, Scale, MeanAblate))
                else list(edit.sites or ())
                if isinstance(edit, Ablate)
                else []
            )
            for name in (s.name for site in sites for s in model._sites.find_all([site])):
                if name.endswith(_NO_GRADIENT):
                    raise ValueError(
                        f"row {row}: there is no gradient through an edit of {name}; edit what it"
                        " is computed from"
                    )
                if name.endswith("hook_result") and model.config.d_head % 16:
                    raise ValueError(
                        f"row {row}: there is no gradient through an edit of {name} with heads of"
                        f" {model.config.d_head} (not a multiple of 16)"
                    )


def tape_for(
    model: Model, n_tokens: int, first_layer: int, keep_inside: bool | None = None
) -> extension.Tape:
    """A tape of at least n_tokens from this layer on; the last one is kept and used again.

    keep_inside: keep the intermediate values of layers, not only their inputs; None: where memory
    allows.
    """
    from .device import _engine

    capacity = max(n_tokens, 16)
    kept = model._tape
    if kept is not None:
        last, size, first, inside = kept
        if (
            size >= capacity
            and size <= 4 * capacity + 64
            and first == first_layer
            and keep_inside in (None, inside)
        ):
            return last
    model._tape = kept = None
    engine = _engine()
    free = model._engine_device.available_bytes
    if keep_inside is None:
        keep_inside = (
            engine.tape_bytes(model._engine, capacity, first_layer, True) <= MEMORY_SHARE * free
        )
    tape: extension.Tape = engine.Tape(model._engine, capacity, first_layer, keep_inside)
    model._tape = (tape, capacity, first_layer, bool(keep_inside))
    return tape


def pack(lengths: Iterable[int], limit: int) -> list[list[int]]:
    """Groups of consecutive rows with at most `limit` tokens together; a longer row is alone."""
    groups: list[list[int]] = []
    total = 0
    for i, n in enumerate(lengths):
        if not groups or total + n > limit:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += n
    return groups


def metric_tuple(
    metrics: Sequence[RowMetric], lengths: Sequence[int], capped: bool = True
) -> extension.Metric:
    """The engine's metric of a packed batch, whose rows all have the same kind."""
    starts = first_tokens(lengths)

    def join(parts: list[Any], dtype: Any) -> Any:
        return None if parts[0] is None else np.ascontiguousarray(np.concatenate(parts), dtype)

    return (
        metrics[0].kind,
        capped,
        join([m.positions + s for m, s in zip(metrics, starts, strict=True)], np.uint32),
        join([m.a for m in metrics], np.uint32),
        join([m.b for m in metrics], np.uint32),
        join([m.weights for m in metrics], np.float32),
        join([m.reference for m in metrics], np.float32),
        join([m.other for m in metrics], np.float32),
        join([m.reference_logits for m in metrics], np.float32),
    )


def cache_for(model: Model, n_tokens: int) -> extension.Cache:
    """The model's own cache, with at least n_tokens slots."""
    from .device import _engine

    kept = model._cache
    if kept is None or kept[1] < n_tokens:
        model._cache = kept = None
        model._cache = kept = (_engine().Cache(model._engine, n_tokens), n_tokens)
    return kept[0]


def differentiate(
    model: Model,
    rows: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    edits: Any,
    metrics: Sequence[RowMetric],
    keys: Iterable[tuple[int, int]],
    stop_layer: int,
    *,
    inputs: Sequence[Float32Array] | None = None,
    first_layer: int = 0,
    columns: Any = None,
    n_columns: int | None = None,
    tape_layer: int | None = None,
) -> tuple[Float32Array, dict[tuple[int, int], Float32Array]]:
    """One packed batch through the forward and the backward pass.

    rows: token lists; edits: (per-row lists, shared);
    metrics: RowMetric of one kind a row; keys: (site, layer) pairs; inputs: per-row float32 [n, D]
    residual streams entering first_layer; tape_layer: where the tape begins (default: the stop
    layer), for calls that share one. Returns (values a metric token, {key: array}).
    """
    lengths = [len(r) for r in rows]
    n, total = len(rows), sum(lengths)
    n_columns = n_columns or max(lengths)
    columns = [n_columns - t for t in lengths] if columns is None else columns
    batch = Batch(model, prompt_lengths, lengths, edits, None)
    tape = tape_for(
        model,
        total,
        min(stop_layer, model.config.n_layers - 1) if tape_layer is None else tape_layer,
    )
    cache = cache_for(model, total)
    packed = packed_rows(
        rows,
        out_row=range(n),
        column=columns,
        n_out_rows=n,
        n_columns=n_columns,
        n_keys=n_columns,
        edits=batch.edits,
        first_layer=first_layer,
        inputs=inputs,
    )
    metric = metric_tuple(metrics, lengths)
    values, found, _ = tape.differentiate(cache, packed, list(keys), metric, stop_layer)
    return values, found


def gradients(
    model: Model,
    prompts: Any,
    responses: Any = None,
    *,
    of: Any,
    at: str | Iterable[str],
    edits: Any = (),
    progress: ProgressLike = True,
) -> Gradients:
    """See Model.gradients."""
    sites = model._sites.find_all(at)
    if not sites:
        raise ValueError("at names no site: give at least one, e.g. at=['blocks.3.hook_resid_pre']")
    rows, prompt_lengths = split_rows(model, prompts, responses)
    lengths = [len(r) for r in rows]
    rows_edits, shared = per_row(edits, len(rows))
    check_edits(model, rows_edits)
    metrics = _row_metrics(of, prompt_lengths, lengths, model.config.d_vocab)
    stop_layer = min(_site_layer(s, model.config.n_layers) for s in sites)
    n_columns = max(lengths)
    arrays: dict[tuple[int, int], Float32Array] = {}
    values = np.zeros(len(rows))
    batches = _batches(lengths, metrics)
    with Progress(progress, len(batches), "gradients") as bar:
        for group in batches:
            part = [metrics[i] for i in group]
            found, got = differentiate(
                model,
                [rows[i] for i in group],
                [prompt_lengths[i] for i in group],
                ([rows_edits[0]] * len(group) if shared else [rows_edits[i] for i in group], False),
                part,
                [s.key for s in sites],
                stop_layer,
                n_columns=n_columns,
            )
            ends = np.cumsum([len(m.positions) for m in part])
            for i, m, end in zip(group, part, ends):
                mine = found[end - len(m.positions) : end].astype(np.float64)
                values[i] = float((mine[:, 0] - mine[:, 1]).sum() if m.kind == PAIR else mine.sum())
            for key, array in got.items():
                if key not in arrays:
                    arrays[key] = np.zeros((len(rows), *array.shape[1:]), np.float32)
                arrays[key][group] = array
            bar.step()
    for b, metric in enumerate(metrics):
        row_arrays = [array[b] for array in arrays.values()]
        result = row_arrays, float(values[b])
        _check_finite(model, b, rows[b], prompt_lengths[b], rows_edits[b], metric, *result)
    tokens, mask = left_padded(rows)
    return Gradients(values, tokens, mask, {s.name: arrays[s.key] for s in sites})


def _row_metrics(
    of: Any, prompt_lengths: Sequence[int], lengths: Sequence[int], vocab: int
) -> list[RowMetric]:
    """The metric of each row, from one scalar for all or one a row."""
    scalars = list(of) if isinstance(of, (list, tuple)) else [of] * len(lengths)
    if len(scalars) != len(lengths):
        raise ValueError(
            f"{len(scalars)} scalars for {len(lengths)} rows: give one for all, or one a row"
        )
    return [
        row_metric(s, RowShape(p, t), vocab, i)
        for i, (s, p, t) in enumerate(zip(scalars, prompt_lengths, lengths))
    ]


def _check_finite(
    model: Model,
    b: int,
    row: Sequence[int],
    prompt_length: int,
    edits: Sequence[Edit],
    metric: RowMetric,
    arrays: Sequence[Float32Array],
    value: float,
) -> None:
    """Raises ValueError where a row's scalar or gradients are not finite, saying where that begins.
    A row with nothing but zeros is examined, too: an overflow in a norm makes its output zero.
    """
    if not (np.isfinite(value) and all(map(finite.all_finite, arrays))):
        why = _origin(model, row, prompt_length, edits, metric)
        raise ValueError(f"row {b}: the gradients are not finite; {why}")
    if value == 0 and not any(array.any() for array in arrays):
        forward = finite.explain(model, row, prompt_length, edits, None)
        if forward is not None:
            raise ValueError(f"row {b}: {forward}")


def _origin(
    model: Model, row: Sequence[int], prompt_length: int, edits: Sequence[Edit], metric: RowMetric
) -> str:
    """Where one row's gradients stop being finite, and why: in the forward pass, or else at the
    first site of the backward pass.
    """
    forward = finite.explain(model, row, prompt_length, edits, None)
    if forward is not None:
        return forward
    sites = model._sites.by_name
    names = [f"blocks.{l}.hook_resid_pre" for l in range(model.config.n_layers)]
    names.append(f"blocks.{model.config.n_layers - 1}.hook_resid_post")
    keys = {name: sites[name].key for name in names}
    _, got = differentiate(
        model, [row], [prompt_length], ([list(edits)], False), [metric], list(keys.values()), 0
    )
    bad = [name for name in names if not finite.all_finite(got[keys[name]])]
    if not bad:
        return "the forward pass is finite, and the gradient overflows float32 inside a layer"
    return (
        "the forward pass is finite; the backward pass, which begins at the last layer, stops being"
        f" finite at {bad[-1]}: the gradient overflows float32"
    )


def _batches(lengths: Sequence[int], metrics: Sequence[RowMetric]) -> list[list[int]]:
    """Rows that are differentiated together: metrics of one kind, at most BATCH_TOKENS tokens."""
    order = sorted(range(len(lengths)), key=lambda i: metrics[i].kind)
    return [
        [same[i] for i in group]
        for same in _runs(order, metrics)
        for group in pack([lengths[i] for i in same], BATCH_TOKENS)
    ]


def _runs(order: Iterable[int], metrics: Sequence[RowMetric]) -> list[list[int]]:
    """Groups of consecutive rows whose metrics are of one kind."""
    groups: list[list[int]] = []
    for i in order:
        if not groups or metrics[groups[-1][0]].kind != metrics[i].kind:
            groups.append([])
        groups[-1].append(i)
    return groups
