"""Keys rotated to a position, and back, with a model's own tables, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..base.types import Array, Float64Array

if TYPE_CHECKING:
    from ..loading.config import Config


def rotated(
    config: Config, keys: Array, position: int, long: bool, *, back: bool = False
) -> Float64Array:
    """Keys of all layers as they lie in the cache at this position; back: the inverse.

    keys: [L, G, d_head], after the norm of keys and before rotation. long: by the tables of texts
    longer than `rope_switch` tokens. Layers that rotate nothing are returned as they are. Source:
    RoFormer (arXiv 2104.09864), eq. 34, with the scalings of `vksteer.loading.rope`.
    """
    out = np.array(keys, np.float64)
    tables = config.rope_long if long and config.rope_long else config.rope
    for layer, number in enumerate(config.rope_table):
        if number < 0:
            continue
        table = tables[number]
        n = table.inv_freq.size
        angles = position * table.inv_freq
        factor = 1 / table.attention_factor if back else table.attention_factor
        cosine, sine = np.cos(angles) * factor, np.sin(-angles if back else angles) * factor
        pairs = (
            (slice(0, 2 * n, 2), slice(1, 2 * n, 2))
            if config.rope_interleaved
            else (slice(0, n), slice(n, 2 * n))
        )
        a, b = (np.array(out[layer][:, pair]) for pair in pairs)
        out[layer][:, pairs[0]] = a * cosine - b * sine
        out[layer][:, pairs[1]] = b * cosine + a * sine
    return out


def is_long(config: Config, n_tokens: int) -> bool:
    """Whether a text of n_tokens is rotated by the tables of long texts."""
    return 0 < config.rope_switch < n_tokens
