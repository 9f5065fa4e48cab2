"""Cache vectors from pairs of prompts: the mean difference of keys and values at one position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import require_int
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Float64Array, ProgressLike, Prompts
from ..inputs.prompts import as_tokens, batches
from ..runtime.batch import Batch, first_tokens
from ..runtime.device import _engine
from .cache_steer import entry
from .cache_vectors import ROTATIONS, CacheVector
from .rotating import is_long, rotated

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Tokens and rows of one pass.
PASS_TOKENS, PASS_ROWS = 8192, 64


def extract(
    model: Model,
    positive: Prompts,
    negative: Prompts | None = None,
    *,
    position: int = -1,
    difference: bool = True,
    rotate: str = "cache",
    keep_heads: int | None = None,
    progress: ProgressLike = True,
) -> CacheVector:
    """The mean over pairs of what the cache holds at one position of the positive prompt, minus the
    same of the negative prompt (Belitsky et al., arXiv 2507.08799; docs/cache-steering.md):

        keys[l, g] = mean_i (K+[i, l, g, p+] - K-[i, l, g, p-]), and the same for values

    positive, negative: texts or token lists, pair i is positive[i] and negative[i]. position: of
    each prompt, counted from its own end where it is negative. difference: False takes the mean of
    the positives alone, and `negative` is not read. rotate: "cache" takes keys as they lie in the
    cache, after norm and rotation; "unrotated" takes them before rotation, so that prompts of
    different lengths compare, and they are rotated to the entry's position when they are added.
    keep_heads: how many key/value heads of each layer are kept, those with the longest values; of
    equal lengths the lower head. progress: True, False or callable(done, total), in prompts.

    Returns a CacheVector, float32 [L, G, d_head]; sums are float64. Raises ValueError before any
    work for unequal numbers of prompts, prompts too long for the context, of one token, or without
    that position, an unknown `rotate`, and keep_heads beyond G.
    """
    rows, n = _rows(model, positive, negative, difference)
    _check(model, rotate, keep_heads)
    position = require_int(position, "position")
    at = [
        entry(position, len(row), f"{'positive' if i < n else 'negative'}[{i % n}]")
        for i, row in enumerate(rows)
    ]
    c = model.config
    sums = np.zeros((2, 2, c.n_layers, c.n_kv_heads, c.d_head))  # positives, negatives
    with Progress(progress, len(rows), "cache vectors") as bar:
        for i, found in enumerate(_entries(model, rows, at, bar)):
            if rotate == "unrotated":
                long = is_long(c, len(rows[i]))
                found[0] = rotated(c, found[0], at[i], long, back=True)
            sums[i // n] += found
    mean = (sums[0] - sums[1]) / n
    meta = provenance(
        model,
        prompts=digest(rows),
        n=n,
        position=position,
        difference=bool(difference),
        rotate=rotate,
    )
    vector = CacheVector(mean[0], mean[1], rotate=rotate, position=position, meta=meta)
    return vector if keep_heads is None else vector.keep_heads(keep_heads)


def _check(model: Model, rotate: str, keep_heads: int | None) -> None:
    heads = model.config.n_kv_heads
    if rotate not in ROTATIONS:
        raise ValueError(f"rotate={rotate!r}: use 'cache' or 'unrotated'")
    if keep_heads is not None and require_int(keep_heads, "keep_heads", 1) > heads:
        raise ValueError(f"keep_heads={keep_heads}: there are {heads} key/value heads")
    model._check_open()


def _rows(
    model: Model, positive: Prompts, negative: Prompts | None, difference: bool
) -> tuple[list[list[int]], int]:
    """(positive prompts, then negative ones where they count; the number of positive ones)."""
    rows = as_tokens(model, positive, "positive")
    n = len(rows)
    if not difference:
        return rows, n
    if negative is None:
        raise ValueError("negative is missing: give one prompt for each positive one")
    rows += as_tokens(model, negative, "negative")
    if len(rows) != 2 * n:
        raise ValueError(
            f"{n} positive and {len(rows) - n} negative prompts: give pairs, one negative prompt"
            " for each positive one"
        )
    return rows, n


def _entries(
    model: Model, rows: Sequence[Sequence[int]], at: Sequence[int], bar: Progress
) -> Iterator[Float64Array]:
    """Keys and values of one entry of each row, float64 [2, L, G, d_head], in passes of bounded
    size.
    """
    c = model.config
    parts = list(batches(rows, tokens=PASS_TOKENS, most=PASS_ROWS))
    cache: Any = _engine().Cache(model._engine, max(sum(map(len, rows[part])) for part in parts))
    for part in parts:
        some = rows[part]
        lengths = [len(row) for row in some]
        slots = first_tokens(lengths)
        batch = Batch(model, lengths, lengths, ([[]] * len(some), True), None)
        batch.forward(
            cache,
            some,
            slots=slots,
            columns=[max(lengths) - n for n in lengths],
            n_columns=max(lengths),
        )
        found = cache.read((slots + np.array(at[part])).astype(np.uint32))
        bar.step(len(some))
        for i in range(len(some)):
            yield found[:, :, i].astype(np.float64).reshape(2, c.n_layers, c.n_kv_heads, c.d_head)
