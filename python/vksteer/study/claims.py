"""The five claims of the paper, each with this model's number, an interval where one can be given,
the paper's number, and a verdict that follows from stated thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told from these samples"
#: Fewest samples, and fewest prompts of each kind, on which a verdict rests.
LEAST_SAMPLES, LEAST_PROMPTS = 8, 30
SHARED, HARDLY, CARRY, KEEP = 0.8, 0.2, 0.5, 0.8
SPARSE, P_VALUE = 0.9, 0.05
#: Added to the thresholds of changes.
WORKS = f", and steering itself moves the rates by at least {100 * CARRY:.0f} %"
AGREE = f", and there the dimensions that every two vectors keep overlap with p < {P_VALUE:g}"

Steps = Mapping[str, Mapping[str, Any]]


def claims(steps: Steps) -> list[dict[str, Any]]:
    """One entry for each claim: claim, value, low, high, unit, paper, threshold, verdict, why. The
    value is None where the steps that it needs have not run.
    """
    return [_shared(steps), _patterns(steps), _values(steps), _meaning(steps), _sparse(steps)]


def _entry(claim: str, paper: str, threshold: str, **found: Any) -> dict[str, Any]:
    base = {"value": None, "low": None, "high": None, "verdict": UNKNOWN, "why": "has not run"}
    return {"claim": claim, "paper": paper, "threshold": threshold, **base, **found}


def _shared(steps: Steps) -> dict[str, Any]:
    entry = (
        "The methods of finding a vector share one circuit.",
        "overlaps of 0.9 and more",
        f"circuits of a tenth of the edges overlap by at least {SHARED} for every two vectors",
    )
    if "circuits" not in steps:
        return _entry(*entry)
    overlap = steps["circuits"]["overlap_of_tenths"]
    names = [n for n in overlap["names"] if n in ("harmful.steered", "ntp", "po")]
    at = [overlap["names"].index(n) for n in names]
    pairs = [overlap["values"][i][j] for i in at for j in at if i < j]
    if not pairs:
        return _entry(*entry, why="fewer than two vectors have edge scores")
    least = min(pairs)
    samples = [steps["attribution"]["data_sets"]["harmful.steered"]["samples"]]
    samples += [v["samples"] for v in steps["attribution_learned"]["vectors"].values()]
    enough = min(samples) >= LEAST_SAMPLES
    verdict = (HOLDS if least >= SHARED else FAILS) if enough else UNKNOWN
    why = f"the smallest of {len(pairs)} overlaps; {min(samples)} samples of one vector"
    return _entry(*entry, value=least, verdict=verdict, why=why)


def _newcombe(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float, float]:
    """(difference, low, high) of two rates: Newcombe's hybrid of two Wilson intervals."""
    difference = a["asr"] - b["asr"]
    low = difference - math.hypot(a["asr"] - a["low"], b["high"] - b["asr"])
    high = difference + math.hypot(a["high"] - a["asr"], b["asr"] - b["low"])
    return difference, low, high


def _change(steps: Steps, row: str) -> tuple[float, float, float, int]:
    """(average change, low, high, prompts of the smaller kind) of a row of Table 1. The interval
    adds the widths of both sides' in squares; it is of the two signed changes, so it may pass 0.
    """
    rows = steps["table1"]["rows"]
    parts = [_newcombe(rows[row][side], rows["none"][side]) for side in ("harmless", "harmful")]
    value = sum(abs(d) for d, _, _ in parts) / 2
    below = math.hypot(*(abs(d - low) for d, low, _ in parts)) / 2
    above = math.hypot(*(abs(high - d) for d, _, high in parts)) / 2
    setting = steps["table1"]["setting"]
    return (
        value,
        max(0.0, value - below),
        min(1.0, value + above),
        min(setting["n_harmless"], setting["n_harmful"]),
    )


def _frozen(
    steps: Steps, row: str, entry: tuple[str, str, str], holds: Callable[[float], bool]
) -> dict[str, Any]:
    if "table1" not in steps:
        return _entry(*entry)
    value, low, high, n = _change(steps, row)
    why = f"average change of the rates on {n} prompts of each kind when {row} is frozen"
    rows = steps["table1"]["rows"]
    whole = effect(rows["none"], rows["unsteered"])
    if n < LEAST_PROMPTS or holds(low) != holds(high):
        verdict = UNKNOWN
    elif whole < CARRY:  # there is too little that could be left or lost
        verdict = UNKNOWN
        why += f"; steering itself moves them by {100 * whole:.0f} % only"
    else:
        verdict = HOLDS if holds(value) else FAILS
    return _entry(*entry, value=value, low=low, high=high, verdict=verdict, why=why)


def _patterns(steps: Steps) -> dict[str, Any]:
    entry = (
        "Attention patterns hardly matter: with those of the unsteered run, steering still works.",
        "8.75 % average change",
        f"the whole interval of the change lies at or below {100 * HARDLY:.0f} %{WORKS}",
    )
    return _frozen(steps, "QK", entry, lambda change: change <= HARDLY)


def _values(steps: Steps) -> dict[str, Any]:
    entry = (
        "Values carry the effect: with those of the unsteered run, steering stops working.",
        "71.75 % average change",
        f"the whole interval of the change lies at or above {100 * CARRY:.0f} %{WORKS}",
    )
    return _frozen(steps, "OV", entry, lambda change: change >= CARRY)


def _meaning(steps: Steps) -> dict[str, Any]:
    entry = (
        "Steering value vectors mean something even where the vector itself does not.",
        "read by eye",
        "more of the largest heads than the vector or its negative promote a refusal token",
    )
    if "values" not in steps or "candidates" not in steps:
        return _entry(*entry)
    values = steps["values"]
    refusal = set(steps["candidates"]["table"]["refusal_token_texts"])
    heads = [bool(refusal & set(tokens)) for tokens in values["heads"]]
    alone = bool(refusal & (set(values["vector"]) | set(values["negated"])))
    share = sum(heads) / len(heads)
    why = (
        f"{sum(heads)} of the {len(heads)} largest value vectors have a refusal token among their"
        f" top {len(values['heads'][0])}; of the vector and its negative"
        f" {'one has, too' if alone else 'neither has'}"
    )
    if alone or min(steps["prompts"]["counts"]["train"]) < LEAST_PROMPTS:
        return _entry(*entry, value=share, why=why)
    return _entry(*entry, value=share, verdict=HOLDS if any(heads) else FAILS, why=why)


def effect(row: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How far both rates move from those of the unsteered model, on average; negative where they
    move the wrong way.
    """
    moved = base["harmless"]["asr"] - row["harmless"]["asr"]
    return float((moved + row["harmful"]["asr"] - base["harmful"]["asr"]) / 2)


def _sparse(steps: Steps) -> dict[str, Any]:
    entry = (
        "90 to 99 % of the dimensions can go, and the methods agree on the rest.",
        "84 to 99 % sparse vectors keep working",
        f"at least {100 * SPARSE:.0f} % can go with {100 * KEEP:.0f} % of the effect left{AGREE}",
    )
    if "sparsity" not in steps:
        return _entry(*entry)
    found = steps["sparsity"]
    if "rows" not in found:
        return _entry(*entry, why=found["why"])
    base = next(r for r in found["rows"] if r["method"] == "unsteered")
    curve = [r for r in found["rows"] if r["method"] == "gradient"]
    least = min(r["sparsity"] for r in curve)
    whole = max(effect(r, base) for r in curve if r["sparsity"] == least)
    if whole < CARRY:
        why = f"the vector that keeps the most moves the rates by {100 * whole:.0f} % only"
        return _entry(*entry, why=why)
    best = max(
        (r for r in curve if effect(r, base) >= KEEP * whole), key=lambda r: float(r["sparsity"])
    )
    n = min(found["setting"]["n_harmless"], found["setting"]["n_harmful"])
    p = [pair[3] for pair in found["overlaps"].get(f"{best['tau']:g}", [])]
    agree = (
        f"the largest p-value of {len(p)} overlaps of two vectors there is {max(p):.2g}"
        if p
        else "no two vectors are compared there"
    )
    if n < LEAST_PROMPTS or (best["sparsity"] >= SPARSE and not p):
        verdict = UNKNOWN
    else:
        verdict = HOLDS if best["sparsity"] >= SPARSE and max(p) < P_VALUE else FAILS
    why = (
        f"the sparsest of {len(curve)} vectors that still work, on {n} prompts of each kind;"
        f" {agree}"
    )
    return _entry(*entry, value=best["sparsity"], verdict=verdict, why=why)
