"""The rule that chooses one candidate, a pair of position and layer, from tables of scores
(docs/method.md section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..base.types import Float64Array, IntArray

CRITERIA = ("paper", "arditi")
#: Limit of the KL filter, in nats.
MAX_KL = 0.1
#: The filters in their order; the first one that a candidate fails is named as the reason.
FILTERS = ("layer", "undefined", "induce", "kl")


@dataclass(frozen=True)
class Rejection:
    """Why one candidate was not eligible."""

    index: int  # row of the tables
    layer: int
    filter: str  # one of FILTERS
    reason: str  # in words, with the value and the limit
    # How far it was from passing: what induce lacks to 0, in logits, plus the excess of KL in units
    # of its limit; inf where undefined.
    shortfall: float
    position: int | None = None  # the position of row `index`, where known

    def __str__(self) -> str:
        where = (
            f"position {self.position}"
            if self.position is not None
            else f"position index {self.index}"
        )
        return f"{where}, layer {self.layer}: {self.reason}"


def layer_allowed(layer: int, n_layers: int, strict: bool) -> bool:
    """Whether l < int(0.8 L) as in the authors' code, or l < 0.8 L as in the paper (strict), in
    integers so that no rounding decides.
    """
    return 5 * layer < 4 * n_layers if strict else layer < 4 * n_layers // 5


def examine(
    bypass: Float64Array,
    induce: Float64Array,
    kl: Float64Array,
    *,
    strict: bool = False,
    positions: Sequence[int] | IntArray | None = None,
) -> tuple[list[tuple[int, int]], list[Rejection]]:
    """Applies the filters to every candidate: (eligible candidates, rejections), each position by
    position and then layer by layer.

    bypass, induce, kl: float64 [P, L]. A candidate is undefined where a score is NaN that its
    filters need. positions: the position of each row, for the rejections.
    """
    eligible, rejected = [], []
    n_layers = induce.shape[1]
    for p, l in np.ndindex(*induce.shape):
        scores = float(bypass[p, l]), float(induce[p, l]), float(kl[p, l])
        failed = _failed(*scores, l, n_layers, strict)
        if failed is None:
            eligible.append((p, l))
        else:
            position = None if positions is None else int(positions[p])
            rejected.append(Rejection(p, l, *failed, position))
    return eligible, rejected


def _failed(
    bypass: float, induce: float, kl: float, layer: int, n_layers: int, strict: bool
) -> tuple[str, str, float] | None:
    """(filter, reason, shortfall) of the first filter that one candidate fails."""
    induces = induce > 0 if strict else induce >= 0
    close = kl < MAX_KL if strict else kl <= MAX_KL
    if not layer_allowed(layer, n_layers, strict):
        limit = f"0.8 * {n_layers}" if strict else f"{4 * n_layers // 5} = int(0.8 * {n_layers})"
        return "layer", f"layer {layer} is not below {limit}", np.inf
    if np.isnan(induce) or (induces and (np.isnan(kl) or (close and np.isnan(bypass)))):
        reason = f"a score is NaN (bypass {bypass:.3g}, induce {induce:.3g}, KL {kl:.3g})"
        return "undefined", reason, np.inf
    if not induces:
        reason = f"induce {induce:.4g}, needed {'>' if strict else '>='} 0"
        if np.isnan(kl):
            return "induce", reason, max(0.0, -induce)
        excess = max(0.0, kl / MAX_KL - 1)
        return "induce", f"{reason} (KL {kl:.4g})", max(0.0, -induce) + excess
    if not close:
        limit = f"{'<' if strict else '<='} {MAX_KL}"
        reason = f"KL {kl:.4g}, needed {limit} (induce {induce:.4g})"
        return "kl", reason, max(0.0, kl / MAX_KL - 1)
    return None


def closest(rejected: list[Rejection]) -> Rejection | None:
    """The rejected candidate of the smallest shortfall; None where nothing was measured."""
    measured = [r for r in rejected if np.isfinite(r.shortfall)]
    return min(measured, key=lambda r: r.shortfall, default=None)


def none_left(rejected: list[Rejection]) -> ValueError:
    """The error when no candidate is left: how many each filter removed, and the closest."""
    counts = {name: sum(r.filter == name for r in rejected) for name in FILTERS}
    removed = ", ".join(f"{name}: {n}" for name, n in counts.items() if n)
    best = closest(rejected)
    return ValueError(
        f"no candidate is left of {len(rejected)} (removed by filter: {removed}). "
        + (f"The closest: {best}. " if best else "None was measured. ")
        + "Look at the table of scores; more prompts, prompts that the model really refuses, or"
        " other refusal tokens may help"
    )


def _sigmoid(x: float) -> float:
    # Accurate in both tails: 1 / (1 + exp(-x)) loses the differences between large negative x.
    e = np.exp(-np.abs(x))
    return float(1 / (1 + e) if x >= 0 else e / (1 + e))


def best_of(
    eligible: Sequence[tuple[int, int]], bypass: Float64Array, induce: Float64Array, criterion: str
) -> tuple[int, int]:
    """The eligible candidate of the smallest value by `criterion`; among equals the first position,
    then the lowest layer. bypass, induce: float64 [P, L].
    """

    def value(candidate: tuple[int, int]) -> float:
        if criterion == "arditi":
            return float(bypass[candidate])
        return _sigmoid(bypass[candidate]) - _sigmoid(induce[candidate])

    return min(eligible, key=lambda candidate: (value(candidate), candidate))


def check_criterion(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")


def choose(
    bypass: npt.ArrayLike,
    induce: npt.ArrayLike,
    kl: npt.ArrayLike,
    criterion: str = "paper",
    strict: bool = False,
) -> tuple[int, int]:
    """The candidate that the rule chooses: (position index, layer) (docs/method.md section 2).

    bypass, induce, kl: float [P, L]; L is the number of the model's layers; NaN marks what is no
    candidate. criterion: "paper" minimises sigmoid(bypass) - sigmoid(induce); "arditi" minimises
    bypass, which then is the score under ablation. strict: the paper's inequalities (induce > 0, KL
    < 0.1, l < 0.8 L) instead of those of the code (>=, <=, l < int(0.8 L)).
    Ties go to the first position, then to the lowest layer. Raises ValueError for tables that do
    not fit, and where no candidate is left: the message says how many each filter removed and which
    candidate came closest.
    """
    check_criterion(criterion)
    tables: dict[str, Float64Array] = {}
    for name, table in (("bypass", bypass), ("induce", induce), ("kl", kl)):
        tables[name] = np.asarray(table, dtype=np.float64)
        if tables[name].ndim != 2 or not tables[name].size:
            raise ValueError(
                f"{name} must be a table [positions, layers], not of shape {tables[name].shape}"
            )
        if tables[name].shape != tables["bypass"].shape:
            raise ValueError(
                f"{name} has shape {tables[name].shape}, bypass {tables['bypass'].shape}: all three"
                " must be [positions, layers]"
            )
    # What lacks any of the three scores is no candidate, whichever filter comes first.
    missing = np.isnan(tables["bypass"]) | np.isnan(tables["induce"]) | np.isnan(tables["kl"])
    if missing.all():
        raise ValueError("no candidate is left: every cell is NaN")
    known = np.where(missing, np.nan, tables["induce"])
    eligible, rejected = examine(tables["bypass"], known, tables["kl"], strict=strict)
    if not eligible:
        raise none_left(rejected)
    return best_of(eligible, tables["bypass"], known, criterion)
