"""Figures of how sparse a vector may become: rates without dimensions, and dimensions shared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts
from .claims import CARRY, KEEP, P_VALUE, effect
from .figures import WILSON, Figure, Steps, number, rate, rates


def sparsity(steps: Steps) -> Figure:
    """Rates as dimensions are set to zero."""
    found = steps["sparsity"]
    if "rows" not in found:
        return Figure("Sparsity", found["why"], "", (), (), "")
    rows = [r for r in found["rows"] if r["method"] in ("gradient", "random")]
    series = []
    for method in ("gradient", "random"):
        for side, sign in (("harmless", "+"), ("harmful", "-")):
            some = sorted((r for r in rows if r["method"] == method), key=lambda r: r["sparsity"])
            x = [100 * r["sparsity"] for r in some]
            series.append(rates(f"{method}, {side} {sign}a", [r[side] for r in some], x))
    return Figure(
        "Dimensions set to zero",
        _kept(found),
        charts.lines("Attack success rate by sparsity", series, "dimensions set to zero, %", "ASR"),
        ("kept by", "tau", "sparsity", "ASR harmless", "ASR harmful"),
        [
            [
                r["method"],
                "–" if r["tau"] is None else f"{r['tau']:g}",
                f"{100 * r['sparsity']:.1f} %",
                rate(r["harmless"]),
                rate(r["harmful"]),
            ]
            for r in rows
        ],
        f"{found['setting']['n_harmless']} harmless and {found['setting']['n_harmful']} harmful"
        f" prompts. {WILSON}",
    )


def _kept(found: Mapping[str, Any]) -> str:
    """What is left of the effect in the sparsest vector that keeps most of it."""
    base = next(r for r in found["rows"] if r["method"] == "unsteered")
    curve = [r for r in found["rows"] if r["method"] == "gradient"]
    curve.sort(key=lambda r: float(r["sparsity"]))
    whole = effect(curve[0], base)
    if whole < CARRY:
        return f"The vector that keeps the most moves the rates by {100 * whole:.0f} % only."
    works = [r for r in curve if effect(r, base) >= KEEP * whole]
    if works[-1] is curve[0]:
        return (
            f"Each of the {len(curve) - 1} sparser vectors loses more than {100 * (1 - KEEP):.0f} %"
            " of the effect."
        )
    chance = [
        r
        for r in found["rows"]
        if r["method"] == "random" and abs(r["sparsity"] - works[-1]["sparsity"]) < 0.005
    ]
    beside = (
        f"; one that keeps as many at random has"
        f" {100 * max(effect(r, base) for r in chance) / whole:.0f} %"
        if chance
        else ""
    )
    return (
        f"Without {100 * works[-1]['sparsity']:.0f} % of its dimensions the vector keeps"
        f" {100 * effect(works[-1], base) / whole:.0f} % of its effect{beside}."
    )


def shared_dimensions(steps: Steps) -> Figure:
    """The dimensions that every two sparse vectors keep."""
    found = steps["sparsity"]
    pairs = [(tau, *pair) for tau, some in found.get("overlaps", {}).items() for pair in some]
    if not pairs:
        why = "There are fewer than two sparse vectors to compare."
        return Figure("Shared dimensions", why, "", (), (), "")
    beyond = sum(p < P_VALUE for *_, p in pairs)
    zeros = {f"{r['tau']:g}": r["sparsity"] for r in found["rows"] if r["method"] == "gradient"}
    return Figure(
        "Shared dimensions",
        f"Of {len(pairs)} pairs of sparse vectors, {beyond} keep more dimensions in common than"
        f" chance explains (p < {P_VALUE:g}).",
        "",
        ("tau", "zeros in dim", "two vectors", "intersection over union", "p"),
        [
            [
                tau,
                f"{100 * zeros[tau]:.1f} %" if tau in zeros else "–",
                f"{a}, {b}",
                number(iou),
                number(p),
            ]
            for tau, a, b, iou, p in pairs
        ],
        "p: the hypergeometric probability of as large an overlap of two random sets of these"
        " sizes, each pair by itself. It counts dimensions, not samples, so there is no interval.",
    )
