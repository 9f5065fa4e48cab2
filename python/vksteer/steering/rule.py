"""The rule that chooses one candidate out of (position, layer), alone: arrays in, indices out
(method.md section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CRITERIA = ("paper", "arditi")
MAX_KL = 0.1
#: The filters in the order they are asked; the first that a candidate fails is the
#: one that removed it.
FILTERS = ("layer", "undefined", "induce", "kl")


@dataclass(frozen=True)
class Rejection:
    """Why one candidate was not eligible."""

    index: int  # row of the table
    layer: int
    filter: str  # one of FILTERS
    reason: str  # in words, with the value and the limit
    # how far it was from passing: logits below 0 for induce, plus KL's excess in units of the
    # limit; inf where undefined
    shortfall: float
    position: int | None = None  # the position that row `index` stands for, where known

    def __str__(self) -> str:
        where = (
            f"position {self.position}"
            if self.position is not None
            else f"position index {self.index}"
        )
        return f"{where}, layer {self.layer}: {self.reason}"


def layer_allowed(layer: int, n_layers: int, strict: bool) -> bool:
    """L < int(0.8 L) as in the authors' code, or l < 0.8 L as in the paper (strict); in whole
    numbers, so no rounding decides.
    """
    return 5 * layer < 4 * n_layers if strict else layer < 4 * n_layers // 5


def examine(
    bypass: Float64Array, induce: Float64Array, kl: Float64Array, *, strict: bool = False, positions: Sequence[int] | IntArray | None=None
) -> tuple[list[tuple[int, int]], list[Rejection]]:
    """Every cell through the filters: (eligible cells, rejections), both position by position,
    then layer by layer.

    bypass, induce, kl: float [P, L]. A cell that is NaN in a value that is asked
    for is no candidate.
    """
    eligible, rejected = [], []
    n_layers = induce.shape[1]
    induce_sign, kl_sign = (">", "<") if strict else (">=", "<=")
    for p, l in np.ndindex(induce.shape):
        b, i, k = float(bypass[p, l]), float(induce[p, l]), float(kl[p, l])
        induces = i > 0 if strict else i >= 0
        close = k < MAX_KL if strict else k <= MAX_KL
        if not layer_allowed(l, n_layers, strict):
            limit = (
                f"0.8 * {n_layers}" if strict else f"{4 * n_layers // 5} = int(0.8 * {n_layers})"
            )
            name, reason, short = "layer", f"layer {l} is not below {limit}", np.inf
        elif np.isnan(i) or (induces and (np.isnan(k) or (close and np.isnan(b)))):
            name, reason, short = (
                "undefined",
                f"a score is NaN (bypass {b:.3g}, induce {i:.3g}, KL {k:.3g})",
                np.inf,
            )
        elif not induces:
            excess = 0.0 if np.isnan(k) else max(0.0, k / MAX_KL - 1)
            name, reason, short = (
                "induce",
                f"induce {i:.4g}, wanted {induce_sign} 0"
                + ("" if np.isnan(k) else f" (KL {k:.4g})"),
                max(0.0, -i) + excess,
            )
        elif not close:
            name, reason, short = (
                "kl",
                f"KL {k:.4g}, wanted {kl_sign} {MAX_KL} (induce {i:.4g})",
                max(0.0, k / MAX_KL - 1),
            )
        else:
            eligible.append((p, l))
            continue
        rejected.append(
            Rejection(
                p, l, name, reason, float(short), None if positions is None else int(positions[p])
            )
        )
    return eligible, rejected


def closest(rejected: list[Rejection]) -> Rejection | None:
    """The rejected candidate that fell short by least; None where nothing was measured."""
    measured = [r for r in rejected if np.isfinite(r.shortfall)]
    return min(measured, key=lambda r: r.shortfall, default=None)


def none_left(rejected: list[Rejection]) -> ValueError:
    """The error that says which filter removed how many, and which candidate came closest."""
    counts = {name: sum(r.filter == name for r in rejected) for name in FILTERS}
    removed = ", ".join(f"{name}: {n}" for name, n in counts.items() if n)
    best = closest(rejected)
    return ValueError(
        f"no candidate is left of {len(rejected)} (removed by filter: {removed}). "
        + (f"The closest: {best}. " if best else "None was measured. ")
        + "Look at the table of scores; more prompts, prompts that the model really refuses, or"
        " other refusal tokens may help"
    )


def _sigmoid(x: Float64Array | float) -> Float64Array:
    # Both tails exact: 1 / (1 + exp(-x)) would lose the differences of large negative x.
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def best_of(eligible: Sequence[tuple[int, int]], bypass: Float64Array, induce: Float64Array, criterion: str) -> tuple[int, int]:
    """The eligible cell of smallest value; among equals the first position,
    then the lowest layer.
    """

    def value(cell: tuple[int, int]) -> float:
        if criterion == "arditi":
            return float(bypass[cell])
        return float(_sigmoid(bypass[cell]) - _sigmoid(induce[cell]))

    return min(eligible, key=lambda cell: (value(cell), cell))


def check_criterion(criterion: str) -> None:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, not {criterion!r}")


def choose(bypass: npt.ArrayLike, induce: npt.ArrayLike, kl: npt.ArrayLike, criterion: str = "paper", strict: bool = False) -> tuple[int, int]:
    """The candidate that the method's rule picks: (position index, layer).

    bypass, induce, kl: float [P, L], in the units of method.md section 2; NaN: not a
    candidate. L is the number of the model's layers. criterion: "paper" minimises
    sigmoid(bypass) - sigmoid(induce); "arditi" minimises bypass, which then is the score under
    ablation. strict: the paper's inequalities (induce > 0, KL < 0.1, l < 0.8 L) instead of the
    code's (>=, <=, l < int(0.8 L)).
    Ties go to the first position, then to the lowest layer. Raises ValueError for tables that
    do not fit, and where no candidate is left: the message says how many each filter removed
    and which came closest.
    """
    check_criterion(criterion)
    tables = {}
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
    # Whoever has no number anywhere is no candidate, whichever filter would have come first.
    missing = np.isnan(tables["bypass"]) | np.isnan(tables["induce"]) | np.isnan(tables["kl"])
    if missing.all():
        raise ValueError("no candidate is left: every cell is NaN")
    tables["induce"] = np.where(missing, np.nan, tables["induce"])
    eligible, rejected = examine(**tables, strict=strict)
    if not eligible:
        raise none_left(rejected)
    return best_of(eligible, tables["bypass"], tables["induce"], criterion)
