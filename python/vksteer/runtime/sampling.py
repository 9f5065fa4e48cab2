"""How the next token of a row is picked from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..base.types import Float32Array


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; else softmax(logits / temperature), the top_k most likely, then the
    fewest that together reach top_p.
    """

    temperature: float
    top_k: int
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"temperature={self.temperature!r} must be a finite number from 0 (greedy) on"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k!r} must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p!r} must lie above 0 and at most at 1 (off)")

    def generator(self, row: int) -> np.random.Generator:
        """A row's own generator, so that draws do not depend on micro-batches."""
        return np.random.Generator(
            np.random.Philox(np.random.SeedSequence([int(self.seed) & (2**63 - 1), row]))
        )

    def pick(self, logits: Float32Array, random: np.random.Generator) -> int:
        """The next token from logits, float32 [V]."""
        if self.temperature == 0:
            return int(logits.argmax())
        x = logits.astype(np.float64) / self.temperature
        if self.top_k and self.top_k < x.size:
            order = np.argsort(-x, kind="stable")[: self.top_k]
        else:
            order = np.argsort(-x, kind="stable")
        p = np.exp(x[order] - x[order[0]])
        p /= p.sum()
        if self.top_p < 1:
            p = np.where(np.cumsum(p) - p < self.top_p, p, 0)
            p /= p.sum()
        return int(
            order[
                min(
                    np.searchsorted(np.cumsum(p), random.random() * p.sum(), side="right"),
                    np.count_nonzero(p) - 1,
                )
            ]
        )
