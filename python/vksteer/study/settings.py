"""The settings of a study: sample counts by size, and everything else that results depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..base.checks import require_int

#: The four data sets of docs/method.md section 5.
DATA_SETS = ("harmful.steered", "harmful.base", "harmless.steered", "harmless.base")

#: Counts by size. train, validation, test: prompts of each kind. samples: prompts of each kind for
#: circuits. new_tokens: of an answer. steps: of EAP-IG. epochs: of NTP and PO. controls: random
#: directions in Table 1. patches: edges patched exactly. coefficients: of the sweep.
#: shares: sizes of the faithfulness curve, of all edges. grid: distance of the sizes in which the
#: smallest faithful circuit is searched for. taus: thresholds of the sparse vectors.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "train": 24,
        "validation": 12,
        "test": 12,
        "samples": 6,
        "new_tokens": 40,
        "steps": 4,
        "epochs": 1,
        "controls": 1,
        "patches": 12,
        "coefficients": (0.5, 0.8, 1.2),
        "shares": (0.02, 0.1, 0.3),
        "grid": 0.1,
        "taus": (0.0, 0.5, 1.5),
    },
    "demo": {
        "train": 36,
        "validation": 12,
        "test": 40,
        "samples": 16,
        "new_tokens": 56,
        "steps": 5,
        "epochs": 2,
        "controls": 1,
        "patches": 20,
        "coefficients": (0.4, 0.55, 0.7, 0.9),
        "shares": (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.4),
        "grid": 0.05,
        "taus": (0.0, 0.5, 1.0, 1.5, 2.0),
    },
    "small": {
        "train": 64,
        "validation": 32,
        "test": 48,
        "samples": 16,
        "new_tokens": 72,
        "steps": 10,
        "epochs": 4,
        "controls": 2,
        "patches": 60,
        "coefficients": (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5),
        "grid": 0.02,
        "shares": (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4),
        "taus": (0.0, 0.3, 1.0, 1.25, 1.5, 2.0),
    },
    "full": {
        "train": 128,
        "validation": 32,
        "test": 100,
        "samples": 64,
        "new_tokens": 128,
        "steps": 10,
        "epochs": 10,
        "controls": 3,
        "patches": 300,
        "coefficients": (0.25, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2, 1.5, 2.0),
        "grid": 0.01,
        "shares": (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7),
        "taus": (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5),
    },
}


@dataclass(frozen=True)
class Settings:
    """Everything that the results of a study depend on beside the model and the prompts.

    size: "tiny", "demo", "small" or "full", the counts of SIZES, or "budget", counts that a budget
    chose (ladder.py). seed: of splits, training, random controls and bootstrap draws. The other
    fields are counts; see SIZES.
    """

    size: str
    seed: int
    train: int
    validation: int
    test: int
    samples: int
    new_tokens: int
    steps: int
    epochs: int
    controls: int
    patches: int
    coefficients: tuple[float, ...]
    shares: tuple[float, ...]
    grid: float
    taus: tuple[float, ...]
    data_hash: str = ""  # of the prompts, and of what was changed to fit them
    chosen_by: str = ""  # hash of the prompts that find and choose vectors

    @classmethod
    def of(cls, size: str, seed: int = 0) -> Settings:
        """The settings of a size. Raises ValueError for an unknown size and a seed that is not a
        whole number.
        """
        if size not in SIZES:
            raise ValueError(f"size={size!r}: use {', '.join(map(repr, SIZES))}")
        return cls.of_counts(size, SIZES[size], seed)

    @classmethod
    def of_counts(cls, size: str, counts: Mapping[str, Any], seed: int = 0) -> Settings:
        """The settings of these counts, which are named as in SIZES."""
        return cls(size=size, seed=require_int(seed, "seed", 0), **counts)

    @property
    def counts(self) -> dict[str, Any]:
        """The counts alone, named as in SIZES."""
        return {name: getattr(self, name) for name in SIZES["tiny"]}

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
