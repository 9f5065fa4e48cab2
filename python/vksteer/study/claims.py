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
SPARSE = 0.9

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
        value + above,
        min(setting["n_harmless"], setting["n_harmful"]),
    )


def _frozen(
    steps: Steps, row: str, entry: tuple[str, str, str], holds: Callable[[float], bool]
) -> dict[str, Any]:
    if "table1" not in steps:
        return _entry(*entry)
    value, low, high, n = _change(steps, row)
    if n < LEAST_PROMPTS or holds(low) != holds(high):
        verdict = UNKNOWN
    else:
        verdict = HOLDS if holds(value) else FAILS
    why = f"average change of the rates on {n} prompts of each kind when {row} is frozen"
    return _entry(*entry, value=value, low=low, high=high, verdict=verdict, why=why)


def _patterns(steps: Steps) -> dict[str, Any]:
    entry = (
        "Attention patterns hardly matter: with those of the unsteered run, steering still works.",
        "8.75 % average change",
        f"the whole interval of the change lies at or below {100 * HARDLY:.0f} %",
    )
    return _frozen(steps, "QK", entry, lambda change: change <= HARDLY)


def _values(steps: Steps) -> dict[str, Any]:
    entry = (
        "Values carry the effect: with those of the unsteered run, steering stops working.",
        "71.75 % average change",
        f"the whole interval of the change lies at or above {100 * CARRY:.0f} %",
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
    if alone:
        return _entry(*entry, value=share, why=why)
    return _entry(*entry, value=share, verdict=HOLDS if any(heads) else FAILS, why=why)


def _effect(row: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How far both rates move from those of the unsteered model, on average."""
    moved = base["harmless"]["asr"] - row["harmless"]["asr"]
    return float((moved + row["harmful"]["asr"] - base["harmful"]["asr"]) / 2)


def _sparse(steps: Steps) -> dict[str, Any]:
    entry = (
        "90 to 99 % of the dimensions can go, and the methods agree on the rest.",
        "84 to 99 % sparse vectors keep working",
        f"at least {100 * SPARSE:.0f} % can go with {100 * KEEP:.0f} % of the effect left",
    )
    if "sparsity" not in steps or "rows" not in steps["sparsity"]:
        return _entry(*entry)
    rows, overlaps = steps["sparsity"]["rows"], steps["sparsity"]["overlaps"]
    base = next(r for r in rows if r["method"] == "unsteered")
    curve = [r for r in rows if r["method"] == "gradient"]
    whole = max((_effect(r, base) for r in curve if r["sparsity"] == 0), default=0.0)
    kept = [r["sparsity"] for r in curve if whole > 0 and _effect(r, base) >= KEEP * whole]
    n = min(steps["sparsity"]["setting"]["n_harmless"], steps["sparsity"]["setting"]["n_harmful"])
    most = max(kept, default=0.0)
    p = [pair[3] for pairs in overlaps.values() for pair in pairs]
    agree = (
        f"; the largest p-value of {len(p)} overlaps of two vectors is {max(p):.2g}" if p else ""
    )
    verdict = UNKNOWN if n < LEAST_PROMPTS else HOLDS if most >= SPARSE else FAILS
    why = (
        f"the sparsest of {len(curve)} vectors that still work, on {n} prompts of each kind{agree}"
    )
    return _entry(*entry, value=most, verdict=verdict, why=why)
