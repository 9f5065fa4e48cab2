"""Figures of what vectors do: reliability, choice, strength, and behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import charts
from .charts import Series
from .claims import effect
from .figures import WILSON, Figure, Steps, number, rate, rates


def screen(steps: Steps) -> Figure:
    """Predictors of steerability by layer."""
    rows = steps["screen"]["rows"]
    names = ("mean_cosine", "d_prime", "auc", "norm_ratio", "stability_mean")
    best = steps["screen"]["best"]
    at = "nowhere" if best is None else f"layer {best[0]}"
    n = rows[0]["n"] if rows else 0
    good, bad = (steps["screen"]["thresholds"][k] for k in ("steerable", "unsteerable"))
    series = [
        Series(label, [r[name] for r in rows], [r["layer"] for r in rows])
        for label, name in (("mean cosine", "mean_cosine"), ("AUC", "auc"))
    ]
    return Figure(
        "Reliability before steering",
        f"The differences between the two kinds of prompts agree most at {at}.",
        charts.lines("Predictors by layer", series, "layer", "predictor"),
        ("layer", "mean cosine", "d'", "AUC", "norm ratio", "stability", "verdict"),
        [[str(r["layer"]), *(number(r[k]) for k in names), r["verdict"]] for r in rows],
        f"{n} pairs of prompts in the lists' order; activations before the layer at the last"
        f" position. Verdicts by the mean cosine: from {good:g} on likely steerable, up to {bad:g}"
        " likely unreliable, the means of two kinds of data sets in arXiv 2602.17881 (Llama 2 7B,"
        " pairs of one question each). They are no guarantee.",
    )


RELAXED = (
    " None passed all filters, so the one on the induce score was dropped: at coefficient 1 this"
    " vector does not make refusal more likely than everything else after harmless prompts."
)


def candidates(steps: Steps) -> Figure:
    """Scores of the candidates and the chosen one."""
    found = steps["candidates"]
    table = found["table"]
    positions = [str(p) for p in table["positions"]]
    layers = [str(i) for i in range(found["n_layers"])]
    rows = [
        [
            p,
            l,
            number(table["induce"][i][j]),
            number(table["kl"][i][j]),
            number(table["bypass"][i][j]),
        ]
        for i, p in enumerate(positions)
        for j, l in enumerate(layers)
        if table["induce"][i][j] is not None
    ]
    return Figure(
        "Candidates",
        f"The rule chose layer {found['layer']} and position {found['position']};"
        f" {found['rejected']} candidates were removed by a filter."
        + (RELAXED if found.get("relaxed") else ""),
        charts.matrix("Induce score", positions, layers, table["induce"]),
        ("position", "layer", "induce score", "KL", "bypass score"),
        rows,
        f"{_counted(steps, 'train')} give the differences, {_counted(steps, 'validation')} the"
        " scores."
        " The squares show the induce score (refusal metric on harmless prompts under the vector),"
        " in nats; empty where a filter made it unnecessary.",
    )


def _counted(steps: Steps, split: str) -> str:
    """How many prompts a split has."""
    harmful, harmless = steps["prompts"]["counts"][split]
    return f"{harmful} harmful and {harmless} harmless prompts"


def strength(steps: Steps) -> Figure:
    """Rates by coefficient."""
    found = steps["strength"]
    rows = [found["unsteered"], *found["rows"]]
    x = [r["coefficient"] for r in rows]
    plus, minus = found["coefficient"]
    sentence = (
        f"Used from here on: +{plus:g} on harmless and -{minus:g} on harmful prompts."
        if found["works"]
        else "No coefficient works in both directions: 1 is used from here on, so read what follows"
        " with care."
    )
    series = [
        rates("harmless prompts, +a", [r["harmless"] for r in rows], x),
        rates("harmful prompts, -a", [r["harmful"] for r in rows], x),
    ]
    return Figure(
        "How strong it must be",
        sentence,
        charts.lines("Attack success rate by coefficient", series, "coefficient a", "ASR"),
        ("a", "dose", "ASR harmless (+a)", "ASR harmful (-a)", "KL (+a)", "KL (-a)", "verdict"),
        [
            [
                f"{r['coefficient']:g}",
                f"{r['dose']:.3f}",
                rate(r["harmless"]),
                rate(r["harmful"]),
                number(r["kl"]),
                number(r["kl_side"]),
                r["verdict"],
            ]
            for r in rows
        ],
        f"{rows[0]['harmless']['n']} validation prompts of each kind. The dose is the length of"
        f" what is added over the length of the residual stream. {WILSON}",
    )


def ranges(steps: Steps) -> Figure:
    """The coefficients that change behaviour and break nothing."""
    found = steps["range"]
    said = []
    for side, way in (("plus", "+a on harmless prompts"), ("minus", "-a on harmful prompts")):
        interval = found[side]
        if interval is None:
            said.append(f"{way}: none ({found['reason'][side]})")
        else:
            said.append(f"{way}: {interval[0]:.2f} to {interval[1]:.2f}")
    rows = [
        [
            r["side"],
            f"{r['coefficient']:.3g}",
            f"{r['dose']:.3f}",
            number(r["kl"]),
            "–" if r["rate"] is None else rate(r["rate"]),
            ", ".join(r["broken"]) or ("counts" if r["counts"] else "too weak"),
        ]
        for r in found["rows"]
    ]
    bounds = found["bounds"]
    return Figure(
        "The range that works",
        f"Coefficients that change behaviour inside all bounds, {said[0]}; {said[1]}.",
        "",
        ("side", "a", "dose", "KL", "ASR", "verdict"),
        rows,
        f"{_counted(steps, 'validation')}. Bounds: KL {bounds['kl']:g} nats on the"
        f" prompts that should stay as they are, repetition +{bounds['repetition']:g},"
        f" ended texts -{bounds['unended']:g}; at least"
        f" {100 * bounds['effect']:.0f} % of what the rate could move. {WILSON}",
    )


def behaviour(steps: Steps) -> Figure:
    """Rates of all vectors and of prompting."""
    found = steps["behaviour"]
    rows = {"unsteered": found["unsteered"], "prompt": found["prompted"], **found["vectors"]}
    names = list(rows)
    series = [
        rates("harmless prompts, +a", [rows[n]["harmless"] for n in names]),
        rates("harmful prompts, -a", [rows[n]["harmful"] for n in names]),
    ]
    best = max(found["vectors"], key=lambda n: effect(rows[n], found["unsteered"]))
    return Figure(
        "Methods of finding a vector",
        (
            f"On test prompts {best} moves the two rates the most."
            if effect(rows[best], found["unsteered"]) > 0
            else "On test prompts no vector moves the two rates the way it should."
        )
        + " The row prompt has an instruction before each prompt instead of a vector.",
        charts.bars("Attack success rate by vector", names, series, "ASR"),
        ("vector", "a", "dose", "ASR harmless", "ASR harmful", "ended", "repetition"),
        [
            [
                n,
                *_strengths(found["vectors"].get(n)),
                rate(rows[n]["harmless"]),
                rate(rows[n]["harmful"]),
                f"{rows[n]['harmless']['ended']:.2f} / {rows[n]['harmful']['ended']:.2f}",
                f"{rows[n]['harmless']['repetition']:.2f} / {rows[n]['harmful']['repetition']:.2f}",
            ]
            for n in names
        ],
        f"{found['setting']['n_harmless']} harmless and {found['setting']['n_harmful']} harmful"
        f" test prompts. {WILSON}",
    )


def _strengths(vector: Mapping[str, Any] | None) -> tuple[str, str]:
    """(coefficients, doses) of a vector on harmless and on harmful prompts; dashes without one."""
    if vector is None:
        return "–", "–"
    (plus, minus), (one, two) = vector["coefficient"], vector["dose"]
    return f"+{plus:g} / -{minus:g}", f"{one:.2f} / {two:.2f}"
