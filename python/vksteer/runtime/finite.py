"""NaN and infinity in results: noticed cheaply in what a call returns, and on a hit traced to the
first layer and site where they arise, and to the edits or the model as their cause.

A sum of squares that overflows float32 makes a norm's scale infinite and its output zero, or equal
to its bias, so a row of logits that are all zero, or those of the biases alone, is traced as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.types import Array, Float32Array
from .batch import Batch, FreezeSpec
from .edits import Ablate, Steer

if TYPE_CHECKING:
    from .model import Model
    from .sites import Site

#: (site, position from the row's first token, value)
Origin = tuple["Site", int, float]

#: Sites of every layer, where it has them, that are captured first; overflow shows in one of them.
_COARSE = (
    "hook_resid_pre",
    "ln1.hook_scale",
    "ln1_post.hook_scale",
    "ln2.hook_scale",
    "ln2_post.hook_scale",
    "hook_resid_post",
)


def all_finite(array: Array) -> bool:
    """Whether a float array holds neither NaN nor infinity. The sum is finite then, unless it
    overflows; only otherwise every entry is examined.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def checked(site: Site, values: Array) -> Array:
    """What of a captured site must be finite: all values, or the largest of each query's scores,
    which are minus infinity at masked keys.
    """
    return np.maximum(values.max(axis=-1), 0) if site.over_keys and values.size else values


#: Logits are those of the biases alone if they differ by less than this share of the largest one.
#: Equal on lavapipe; decoding on a GPU adds in another order.
_SAME = 1e-5


def bias_logits(model: Model) -> Float32Array | None:
    """Logits of a token whose final norm puts out nothing but its bias, float32 [V]; None where
    there are no biases, and they are zero.
    """
    c, engine = model.config, model._engine
    if not (c.norm_bias or c.unembed_bias):
        return None
    logits = np.zeros(c.d_vocab, np.float32)
    if c.norm_bias:
        logits += engine.apply("unembed", -1, engine.vector("b_ln_final", -1)[None])[0]
    if c.unembed_bias:
        logits += engine.vector("b_unembed", -1)
    if c.final_softcap:
        logits = np.float32(c.final_softcap) * np.tanh(logits / np.float32(c.final_softcap))
    return logits


def first_logit(model: Model) -> tuple[float, float]:
    """(value, tolerance): rows whose first logit is no nearer to it have logits that are neither
    all zero nor those of the biases alone.
    """
    empty = model._bias_logits
    if empty is None:
        return 0.0, 0.0
    return float(empty[0]), 2 * _SAME * float(np.abs(empty).max())


def suspect_row(
    logits: Float32Array | None,
    captured: Iterable[Array],
    lengths: Sequence[int] | None = None,
    empty: Float32Array | None = None,
) -> int | None:
    """The first row with a value that is not finite, or with logits that are all zero at a token,
    or all those of `empty`; None where there is none.

    logits: [B, S, V], [B, V] or None; captured: arrays [B, ...]; lengths: tokens of each row, which
    stand at the end of S. empty: float32 [V], see `bias_logits`; None: zeros.
    """
    for array in (*(() if logits is None else (logits,)), *captured):
        if not all_finite(array):
            bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
            return int(bad.argmax())
    if logits is None:
        return None
    near = 0.0 if empty is None else _SAME * float(np.abs(empty).max())
    zero = np.abs(logits[..., 0] - (0 if empty is None else empty[0])) <= near
    if logits.ndim == 3 and lengths is not None:
        for b, n in enumerate(lengths):
            zero[b, : zero.shape[1] - n] = False
    hits = np.argwhere(zero)
    gone = (
        np.abs(logits[tuple(at)] - (0 if empty is None else empty)).max() <= near for at in hits
    )
    return next((int(at[0]) for at, bad in zip(hits, gone) if bad), None)


def check(
    model: Model,
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    rows_edits: Sequence[Sequence[Any]],
    spec: FreezeSpec | None,
    logits: Float32Array | None,
    captured: Iterable[Array],
) -> None:
    """Raises ValueError where logits or captures of these rows hold NaN or infinity, saying where
    they arise and what the cause is. rows: token ids; lengths: of the prompts in them.
    """
    arrays = list(captured)
    b = suspect_row(logits, arrays, [len(row) for row in rows], model._bias_logits)
    if b is None:
        return
    message = explain(model, rows[b], lengths[b], rows_edits[b], spec)
    returned = arrays if logits is None else [logits, *arrays]
    if message is None and all(map(all_finite, returned)):
        return  # logits of zero or of biases, without an overflow
    raise ValueError(f"row {b}: {message or 'the result holds values that are not finite'}")


def explain(
    model: Model,
    row: Sequence[int],
    prompt_length: int,
    edits: Sequence[Any],
    spec: FreezeSpec | None,
) -> str | None:
    """Where values of one row stop being finite, and why; None where all are finite.

    row: token ids of prompt and response.
    """
    logits, found = _origin(model, row, prompt_length, edits, spec)
    if found is None and logits:
        return None
    if found is None:
        where = "all sites are finite and the logits are not, so they arise in the unembedding"
    else:
        site, position, value = found
        layer = f"layer {site.layer}" if site.name.startswith("blocks.") else "outside the layers"
        where = f"values stop being finite at {site.name} ({layer}), position {position}: {value}"
    return f"{where}; {_cause(model, row, prompt_length, edits, found is None)}"


def _cause(
    model: Model, row: Sequence[int], prompt_length: int, edits: Sequence[Any], only_logits: bool
) -> str:
    if edits:
        logits, plain = _origin(model, row, prompt_length, (), None)
        if plain is None and logits:
            listed = ", ".join(map(_described, edits))
            return (
                "without the edits every value is finite, so the edits are the cause: use a smaller"
                f" coefficient or smaller values ({listed})"
            )
        return f"it is so without the edits, too: {_model_fault(only_logits)}"
    return _model_fault(only_logits)


def _model_fault(only_logits: bool) -> str:
    what = "the unembedding's weights" if only_logits else "weights"
    return (
        f"the model is the cause: {what} that are NaN, infinite or damaged, or activations that"
        " overflow float32; check the files, or load another copy"
    )


def _described(edit: Any) -> str:
    name = type(edit).__name__
    if isinstance(edit, Steer):
        size = abs(float(edit.coefficient)) * float(edit.vector.norm)
        return (
            f"{name} at layer {edit.vector.layer} with coefficient {float(edit.coefficient):g},"
            f" which adds a vector of length {size:.3g}"
        )
    if isinstance(edit, Ablate):
        return name
    values = getattr(edit, "values", getattr(edit, "factor", getattr(edit, "mean", None)))
    try:
        largest = float(np.abs(np.asarray(values, np.float64)).max())
    except (TypeError, ValueError):
        return f"{name} at {edit.site}"
    return f"{name} at {edit.site} with values up to {largest:.3g}"


def _origin(
    model: Model,
    row: Sequence[int],
    prompt_length: int,
    edits: Sequence[Any],
    spec: FreezeSpec | None,
) -> tuple[bool, Origin | None]:
    """(whether the last logits are finite, the first site where a value is not)."""
    sites = model._sites.by_name
    layers = range(model.config.n_layers)
    names = [f"blocks.{l}.{name}" for l in layers for name in _COARSE]
    names = ["hook_embed", "hook_pos_embed", *names, "ln_final.hook_scale"]
    coarse = [sites[name] for name in names if name in sites]
    logits, captured = _captured(model, row, prompt_length, edits, spec, coarse)
    first = next((s for s in coarse if not np.isfinite(captured[s.key]).all()), None)
    if first is None:
        return bool(np.isfinite(logits).all()), None
    inside = [first]
    if first.name.startswith("blocks."):
        # width over all heads is the largest kind, and adds nothing to the heads' own values
        inside = [
            s
            for s in sites.values()
            if s.name.startswith(f"blocks.{first.layer}.") and s.kind != "heads_width"
        ]
        _, captured = _captured(model, row, prompt_length, edits, spec, inside)
    for site in inside:
        found = _first_bad(site, captured[site.key][0], len(row))
        if found is not None:
            return False, found
    return False, _first_bad(first, captured[first.key][0], len(row))


def _first_bad(site: Site, values: Array, n: int) -> Origin | None:
    """values: of one row, [pos, ...], or [head, query, key] with masked keys at any value."""
    if site.over_keys:
        values = np.where(np.tril(np.ones((n, n), bool)), values, 0).transpose(1, 0, 2)
    bad = np.argwhere(~np.isfinite(values))
    return (site, int(bad[0][0]), float(values[tuple(bad[0])])) if len(bad) else None


def _captured(
    model: Model,
    row: Sequence[int],
    prompt_length: int,
    edits: Sequence[Any],
    spec: FreezeSpec | None,
    sites: Sequence[Site],
) -> tuple[Float32Array, dict[tuple[int, int], Float32Array]]:
    """(logits at the last token, captures) of one row by itself."""
    batch = Batch(model, [prompt_length], [len(row)], ([list(edits)], False), spec)
    cache, slots = model._run_cache([len(row)], 2 if batch.paired else 1)
    logits, captured = batch.forward(
        cache,
        [row],
        slots=slots,
        columns=[0],
        n_columns=len(row),
        capture=[s.key for s in sites],
        logits="last",
    )
    return np.asarray(logits), captured
