"""Upper bounds on a model's sizes: well above any released model of these families, low enough that
no product of two overflows 64 bits.
"""

from __future__ import annotations

LIMITS = {
    "n_layers": 1024,
    "d_model": 1 << 17,
    "n_heads": 4096,
    "n_kv_heads": 4096,
    "d_head": 4096,
    "d_mlp": 1 << 20,
    "d_vocab": 1 << 23,
    "n_ctx": 1 << 27,
}
