"""The five claims of the paper (arXiv 2604.08524, docs/method.md), each with this model's number,
an interval where one can be given, the paper's number, and a verdict.

A claim holds where its whole interval lies on the side of the threshold that it names, and does not
hold where the whole interval lies on the other side. Everything else cannot be told: intervals that
hold the threshold, samples that are too few, and effects that are too small to lose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from ..judge import wilson

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told from these samples"
#: Fewest prompts of each kind on which a verdict rests.
LEAST_PROMPTS = 30
SHARED, HARDLY, CARRY, KEEP = 0.8, 0.2, 0.5, 0.8
SPARSE, P_VALUE, MEANS = 0.9, 0.05, 0.05
#: Added to the thresholds of changes.
WORKS = f", and steering itself moves the rates by at least {100 * CARRY:.0f} %"
AGREE = f", and there the dimensions that every two vectors keep overlap with p < {P_VALUE:g}"

Steps = Mapping[str, Mapping[str, Any]]


def claims(steps: Steps) -> list[dict[str, Any]]:
    """One entry for each claim: claim, value, low, high, unit, paper, threshold, verdict, why. The
    value is None where the steps that it needs have not run; in the units "%" and "points" it is
    shown times 100.
    """
    return [_shared(steps), _patterns(steps), _values(steps), _meaning(steps), _sparse(steps)]


def shown(claim: Mapping[str, Any]) -> str:
    """The value of a claim with its interval and unit; a dash where there is none."""
    found = claim["value"], claim["low"], claim["high"]
    return "–" if found[0] is None else with_interval(*found, claim.get("unit", ""))


def with_interval(value: float, low: float | None, high: float | None, unit: str = "") -> str:
    """A number with its interval, where there is one; with a unit, shares are shown times 100."""
    times, digits, after = (100, 1, f" {unit}") if unit else (1, 2, "")
    text = f"{times * value:.{digits}f}{after}"
    if low is None or high is None:
        return text
    return f"{text} [{times * low:.{digits}f}, {times * high:.{digits}f}]"


def _entry(claim: str, paper: str, threshold: str, **found: Any) -> dict[str, Any]:
    base = {"value": None, "low": None, "high": None, "unit": "%"}
    base |= {"verdict": UNKNOWN, "why": "has not run"}
    return {"claim": claim, "paper": paper, "threshold": threshold, **base, **found}


def _shared(steps: Steps) -> dict[str, Any]:
    entry = (
        "The methods of finding a vector share one circuit.",
        "overlaps of 0.9 and more",
        (
            f"the whole interval of the overlap of every two vectors' circuits of a tenth of the"
            f" edges lies at or above {SHARED}; it does not hold where the smallest lies below"
            f" {SHARED}, though each of the two vectors has {SHARED} or more with itself on other"
            " samples"
        ),
    )
    overlap = partial(_entry, *entry, unit="")
    if "circuits" not in steps:
        return overlap()
    found = steps["circuits"]["agreement"]
    if "why" in found:
        pairs = _pairs(steps["circuits"]["overlap_of_tenths"])
        return overlap(value=min(pairs) if pairs else None, why=found["why"])
    a, b, value, low, high = min(found["pairs"], key=lambda pair: float(pair[2]))
    own = min(found["own"][a], found["own"][b])
    verdict = FAILS if high < SHARED <= own else UNKNOWN
    if min(pair[3] for pair in found["pairs"]) >= SHARED:
        verdict = HOLDS
    why = (
        f"the smallest of {len(found['pairs'])} overlaps, of {a} and {b};"
        f" {min(found['samples'].values())} samples of one vector; chance gives"
        f" {found['chance']:.2f}, other samples of the same vector {own:.2f} or more"
    )
    if smallest := _pairs(steps["circuits"]["overlap"]):
        why += f"; the smallest faithful circuits overlap by {min(smallest):.2f} or more"
    return overlap(value=value, low=low, high=high, verdict=verdict, why=why)


def _pairs(overlap: Mapping[str, Any]) -> list[float]:
    """The overlaps of every two vectors' circuits on the samples that all vectors have."""
    at = [i for i, n in enumerate(overlap["names"]) if n in ("harmful.steered", "ntp", "po")]
    return [overlap["values"][i][j] for i in at for j in at if i < j]


def _newcombe(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[float, float, float]:
    """(difference, low, high) of two rates: Newcombe's hybrid of two Wilson intervals."""
    difference = a["asr"] - b["asr"]
    low = difference - math.hypot(a["asr"] - a["low"], b["high"] - b["asr"])
    high = difference + math.hypot(a["high"] - a["asr"], b["asr"] - b["low"])
    return difference, low, high


def _size(change: float, low: float, high: float) -> tuple[float, float, float]:
    """The size of a change, with the sizes of all changes in its interval."""
    ends = sorted((abs(low), abs(high)))
    return abs(change), 0.0 if low <= 0 <= high else ends[0], ends[1]


def _average(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(mean, low, high) of the two kinds' figures, given as (value, low, high). The interval adds
    the widths in squares, as of two independent figures (Zou and Donner 2008).
    """
    value = sum(part[0] for part in parts) / 2
    below = math.hypot(*(v - low for v, low, _ in parts)) / 2
    above = math.hypot(*(high - v for v, _, high in parts)) / 2
    return value, max(-1.0, value - below), min(1.0, value + above)


def average_change(rows: Mapping[str, Any], row: str) -> tuple[float, float, float]:
    """(average change, low, high) of a row of Table 1 from the row "none"."""
    return _average(_sizes(rows[row], rows["none"]))


#: Which way steering moves the attack success rates of the two kinds.
STEERED = {"harmless": -1, "harmful": 1}


def _undone(row: Mapping[str, Any], steered: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """How far a row takes back what steering did to each rate: (change, low, high) each."""
    parts = []
    for side, way in STEERED.items():
        change, low, high = _newcombe(row[side], steered[side])
        parts.append((-change, -high, -low) if way > 0 else (change, low, high))
    return parts


def _sizes(row: Mapping[str, Any], steered: Mapping[str, Any]) -> list[tuple[float, float, float]]:
    """How far a row moves each rate, either way: (size, low, high) each."""
    return [_size(*_newcombe(row[side], steered[side])) for side in STEERED]


def _frozen(
    steps: Steps, row: str, entry: tuple[str, str, str], least: float, most: float, undone: bool
) -> dict[str, Any]:
    """A claim about the average change when a part is frozen. undone: only what takes back the
    change that steering made counts; otherwise any change does.
    """
    if "table1" not in steps:
        return _entry(*entry)
    rows, setting = steps["table1"]["rows"], steps["table1"]["setting"]
    parts = _undone(rows[row], rows["none"]) if undone else _sizes(rows[row], rows["none"])
    value, low, high = _average(parts)
    n = min(setting["n_harmless"], setting["n_harmful"])
    whole = effect(rows["none"], rows["unsteered"])
    why = (
        f"average change of the rates{' back' if undone else ''} on {n} prompts of each kind when"
        f" {row} is frozen; steering itself moves them by {100 * whole:.0f} %"
    )
    if whole < CARRY:  # there is too little that could be left or lost
        why += " only"
    told = n >= LEAST_PROMPTS and whole >= CARRY
    verdict = UNKNOWN
    if told and least <= low and high <= most:
        verdict = HOLDS
    elif told and (high < least or low > most):
        verdict = FAILS
    return _entry(*entry, value=value, low=low, high=high, verdict=verdict, why=why)


def _patterns(steps: Steps) -> dict[str, Any]:
    entry = (
        "Attention patterns hardly matter: with those of the unsteered run, steering still works.",
        "8.75 % average change",
        f"the whole interval of the change lies at or below {100 * HARDLY:.0f} %{WORKS}",
    )
    return _frozen(steps, "QK", entry, 0.0, HARDLY, undone=False)


def _values(steps: Steps) -> dict[str, Any]:
    entry = (
        "Values carry the effect: with those of the unsteered run, steering stops working.",
        "71.75 % average change",
        f"the whole interval of the change back lies at or above {100 * CARRY:.0f} %{WORKS}",
    )
    return _frozen(steps, "OV", entry, CARRY, math.inf, undone=True)


def _meaning(steps: Steps) -> dict[str, Any]:
    entry = (
        "Steering value vectors mean something even where the vector itself does not.",
        "read by eye",
        (
            "the largest heads promote related tokens more often than the vector itself, and more"
            f" often than with random directions (p < {P_VALUE:g}): the whole intervals of both"
            f" differences lie above 0, neither below {100 * MEANS:.0f} points; it does not hold"
            f" where one lies below {100 * MEANS:.0f} points and reaches down to 0"
        ),
    )
    difference = partial(_entry, *entry, unit="points")
    if "values" not in steps:
        return difference()
    found = steps["values"]["meaning"]
    chance = sum(found["random"]) / len(found["random"])
    alone = sum(found["random_vectors"]) / len(found["random_vectors"])
    value, low, high = min(found["excess"].values(), key=lambda excess: float(excess[0]))
    lows, highs = ([e[i] for e in found["excess"].values()] for i in (1, 2))
    why = (
        f"{100 * found['share']:.1f} % of the top tokens of {len(found['heads'])} heads are"
        f" related, {100 * found['vector']:.1f} % of the vector's own; random directions have"
        f" {100 * chance:.1f} % through the same heads (p = {found['p']:.2g}) and"
        f" {100 * alone:.1f} % of their own"
    )
    verdict = UNKNOWN
    if found["vector"] - alone >= MEANS:
        why += "; the vector itself means something"
    elif min(steps["prompts"]["counts"]["train"]) < LEAST_PROMPTS:
        why += f"; fewer than {LEAST_PROMPTS} prompts say which tokens are related"
    elif min(lows) > 0 and min(highs) >= MEANS and found["p"] < P_VALUE:
        verdict = HOLDS
    elif any(h < MEANS and l <= 0 for l, h in zip(lows, highs, strict=True)):
        verdict = FAILS
    return difference(value=value, low=low, high=high, verdict=verdict, why=why)


def effect(row: Mapping[str, Any], base: Mapping[str, Any]) -> float:
    """How far both rates move from those of the unsteered model, on average; negative where they
    move the wrong way.
    """
    moved = base["harmless"]["asr"] - row["harmless"]["asr"]
    return float((moved + row["harmful"]["asr"] - base["harmful"]["asr"]) / 2)


def _lost(
    row: Mapping[str, Any], whole: Mapping[str, Any], base: Mapping[str, Any]
) -> tuple[float, float, float]:
    """(share of the effect of `whole` that `row` loses, low, high)."""
    value, low, high = _average(_undone(row, whole))
    size = effect(whole, base)
    return value / size, low / size, high / size


def _sparse(steps: Steps) -> dict[str, Any]:
    entry = (
        "90 to 99 % of the dimensions can go, and the methods agree on the rest.",
        "84 to 99 % sparse vectors keep working",
        (
            f"the densest vector in which {100 * SPARSE:.0f} % or more of the dimensions are zero"
            f" loses at most {100 * (1 - KEEP):.0f} % of the effect with its whole interval{AGREE};"
            f" it does not hold where one with at most {100 * SPARSE:.0f} % zeros surely loses"
            " more. Harmful prompts whose gradients chose the dimensions are not counted, while"
            " there are others"
        ),
    )
    if "sparsity" not in steps:
        return _entry(*entry)
    found = steps["sparsity"]
    if "rows" not in found:
        return _entry(*entry, why=found["why"])
    base = next(r for r in found["rows"] if r["method"] == "unsteered")
    curve = sorted(
        (r for r in found["rows"] if r["method"] == "gradient"), key=lambda r: float(r["sparsity"])
    )
    if effect(curve[0], base) < CARRY:
        why = (
            "the vector that keeps the most moves the rates by"
            f" {100 * effect(curve[0], base):.0f} % only"
        )
        return _entry(*entry, why=why)
    lost = [_lost(r, curve[0], base) for r in curve]
    works = [i for i, (value, _, _) in enumerate(lost) if value <= 1 - KEEP]
    sure = [curve[i]["sparsity"] for i, (_, _, high) in enumerate(lost) if high <= 1 - KEEP]
    gone = [curve[i]["sparsity"] for i, (_, low, _) in enumerate(lost) if low > 1 - KEEP]
    best = curve[works[-1]]
    verdict, why = _sparse_verdict(found, curve, lost, _too_many(curve, base))
    why = (
        f"the sparsest of {len(curve)} vectors that lose at most {100 * (1 - KEEP):.0f} % of the"
        f" effect; the interval goes from the sparsest that surely does to the first beyond that"
        f" surely does not; {why}"
    )
    low = max(sure, default=0.0)
    high = min((s for s in gone if s > low), default=1.0)
    return _entry(*entry, value=best["sparsity"], low=low, high=high, verdict=verdict, why=why)


def _too_many(curve: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> list[float]:
    """Shares of zeros up to SPARSE that surely lose more than 1 - KEEP of the effect. Each of them
    could speak against the claim, so their intervals hold together (Bonferroni).
    """
    tested = [r for r in curve[1:] if r["sparsity"] <= SPARSE]
    confidence = 1 - P_VALUE / max(1, len(tested))
    whole = _with_confidence(curve[0], confidence)
    rows = [_with_confidence(r, confidence) for r in tested]
    return [r["sparsity"] for r in rows if _lost(r, whole, base)[1] > 1 - KEEP]


def _with_confidence(row: Mapping[str, Any], confidence: float) -> dict[str, Any]:
    """The row with Wilson intervals of this confidence around its rates."""
    rates = {}
    for side in STEERED:
        asr, n = row[side]["asr"], row[side]["n"]
        low, high = wilson(round(asr * n), n, confidence)
        rates[side] = {**row[side], "low": low, "high": high}
    return {**row, **rates}


def _sparse_verdict(
    found: Mapping[str, Any],
    curve: Sequence[Mapping[str, Any]],
    lost: Sequence[tuple[float, float, float]],
    too_many: Sequence[float],
) -> tuple[str, str]:
    """(Verdict, what it rests on). What speaks for the claim is one vector that no effect chose."""
    n = min(found["setting"]["n_harmless"], found["setting"]["n_harmful"])
    said = "{n_harmless} harmless and {n_harmful} harmful prompts".format(**found["setting"])
    at = next((i for i, r in enumerate(curve) if r["sparsity"] >= SPARSE), None)
    if n < LEAST_PROMPTS:
        return UNKNOWN, said
    if too_many:
        return FAILS, f"{said}; {100 * min(too_many):.0f} % are too many"
    if at is None:
        return UNKNOWN, f"{said}; no threshold sets {100 * SPARSE:.0f} % to zero"
    row, (value, low, high) = curve[at], lost[at]
    said += (
        f"; without {100 * row['sparsity']:.0f} % the effect is smaller by {100 * value:.0f} %"
        f" [{100 * low:.0f}, {100 * high:.0f}]"
    )
    pairs = found["overlaps"].get(f"{row['tau']:g}", [])
    compared = {name for pair in pairs for name in pair[:2]}
    if alone := [name for name in found["vectors"] if name not in compared]:
        return UNKNOWN, f"{said}; {', '.join(alone)} cannot be compared there"
    p = max(pair[3] for pair in pairs)
    said += (
        f"; of {len(pairs)} overlaps of two vectors there the largest p-value is {p:.2g}, the"
        f" smallest intersection over union {min(pair[2] for pair in pairs):.2f}"
    )
    if high > 1 - KEEP:
        return UNKNOWN, said
    return HOLDS if p < P_VALUE else UNKNOWN, said
