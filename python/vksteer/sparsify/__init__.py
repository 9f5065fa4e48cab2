"""Sparse steering vectors: the dimensions that carry the effect (docs/method.md section 8)."""

from .choosing import (
    SparseVector,
    by_effect,
    by_gradient,
    by_magnitude,
    by_random,
    gradient_ratio,
    iou,
    kept_of,
    overlap_test,
)
from .sweeping import SparsityRow, SparsitySweep, sweep

__all__ = [
    "SparseVector",
    "SparsityRow",
    "SparsitySweep",
    "by_effect",
    "by_gradient",
    "by_magnitude",
    "by_random",
    "gradient_ratio",
    "iou",
    "kept_of",
    "overlap_test",
    "sweep",
]
