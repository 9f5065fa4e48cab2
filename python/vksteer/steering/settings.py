"""The settings of a training, and its optimiser (docs/method.md section 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from ..base.checks import require_int
from ..base.types import Float64Array
from .losses import LIMIT, check_number, check_phi, check_reduction
from .weighting import check_kind

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Factors of the authors' code; one is drawn for every example of every epoch.
AUTHORS_FACTORS = tuple(range(2, 21, 2))
#: Of Adam.
BETAS, EPSILON = (0.9, 0.999), 1e-8

#: None for the coefficient, "authors" for AUTHORS_FACTORS, or strengths to draw from.
Factors: TypeAlias = "str | Iterable[float] | None"


@dataclass(frozen=True)
class Settings:
    """What decides the result of a training besides model and examples; see `train_ntp`."""

    loss: str  # "ntp" or "po"
    layer: int
    phi: float | None = None
    coefficient: float = 1.0  # each example is steered by coefficient * sign; unused with factors
    factors: Factors = None
    epochs: int = 10
    batch_size: int = 6
    lr: float = 0.01
    weight_decay: float = 0.0
    clip: float | None = 1.0
    optimizer: str = "adamw"
    seed: int = 42
    init: float = 0.01  # standard deviation of the initial vector
    limit: int = LIMIT
    reduction: str = "mean"
    token_weights: str = "uniform"
    refresh: int | None = None  # steps after which the weights are computed again

    def check(self, model: Model) -> Settings:
        """The same with plain types. Raises ValueError for what is out of range."""
        layer = require_int(self.layer, "layer", 0)
        if layer >= model.config.n_layers:
            raise ValueError(
                f"layer {layer}: the model has layers 0 to {model.config.n_layers - 1}"
            )
        factors = _factors(self.factors)
        if self.optimizer not in ("adam", "adamw"):
            raise ValueError(
                f"optimizer={self.optimizer!r}: use 'adamw' or 'adam' (they differ in weight_decay"
                " only)"
            )
        decay = check_number(self.weight_decay, "weight_decay")
        if decay < 0:
            raise ValueError(f"weight_decay must be 0 or more, not {decay}")
        return Settings(
            self.loss,
            layer,
            None if self.loss == "ntp" else check_phi(self.phi),
            _positive(self.coefficient, "coefficient"),
            factors,
            require_int(self.epochs, "epochs", 1),
            require_int(self.batch_size, "batch_size", 1),
            _positive(self.lr, "lr"),
            decay,
            None if self.clip is None else _positive(self.clip, "clip"),
            self.optimizer,
            require_int(self.seed, "seed", 0),
            _positive(self.init, "init"),
            require_int(self.limit, "limit", 1),
            check_reduction(self.reduction),
            check_kind(self.token_weights),
            None if self.refresh is None else require_int(self.refresh, "refresh", 1),
        )


def _factors(factors: Factors) -> tuple[float, ...] | None:
    if factors is None:
        return None
    if isinstance(factors, str) and factors == "authors":
        factors = AUTHORS_FACTORS
    if isinstance(factors, str) or not isinstance(factors, Iterable):
        raise ValueError(
            f"factors={factors!r}: None, 'authors' (2, 4, ..., 20), or a list of numbers"
        )
    checked = tuple(_positive(f, "factors") for f in factors)
    if not checked:
        raise ValueError("factors is empty: name at least one, or None for the coefficient")
    return checked


def _positive(number: object, what: str) -> float:
    value = check_number(number, what)
    if value <= 0:
        raise ValueError(f"{what} must be above 0, not {value}")
    return value


@dataclass(frozen=True)
class Adam:
    """The state of Adam or AdamW for one vector, float64 [D] each, computed as PyTorch does, with
    gradients clipped by norm first. A step returns a new state, so an interrupted step leaves the
    old one intact.
    """

    vector: Float64Array
    first: Float64Array  # running mean of gradients
    second: Float64Array  # running mean of their squares
    steps: int = 0

    def step(self, s: Settings, gradient: Float64Array, lr: float) -> tuple[Adam, float]:
        """(the state after a step, the gradient's norm before clipping)."""
        norm, vector, steps = float(np.sqrt(gradient @ gradient)), self.vector, self.steps + 1
        if s.clip is not None:
            gradient = gradient * min(1.0, s.clip / (norm + 1e-6))
        if s.optimizer == "adamw":
            vector = vector * (1 - lr * s.weight_decay)
        elif s.weight_decay:
            gradient = gradient + s.weight_decay * vector
        first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient * gradient
        move = (
            first / (1 - BETAS[0] ** steps) / (np.sqrt(second / (1 - BETAS[1] ** steps)) + EPSILON)
        )
        return Adam(vector - lr * move, first, second, steps), norm
