"""The sections of the report: each figure with its data, sample count, interval and one sentence
that says what it means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import charts
from .charts import Series
from .claims import CARRY, HARDLY, LEAST_PROMPTS, effect

Steps = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Figure:
    """title; sentence: what it means; chart: SVG or ""; head, rows: its data; note: sample counts
    and intervals.
    """

    title: str
    sentence: str
    chart: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str


def sections(steps: Steps) -> list[tuple[str, list[Figure]]]:
    """[(heading, figures)] of the steps that have run, in the order that tells the story."""
    story: list[tuple[str, list[tuple[str, Callable[[Steps], Figure]]]]] = [
        (
            "What the vector does, how strongly and how reliably",
            [
                ("screen", _screen),
                ("candidates", _candidates),
                ("strength", _strength),
                ("range", _range),
                ("behaviour", _behaviour),
            ],
        ),
        ("Through what it acts", [("table1", _table1), ("rerouting", _rerouting)]),
        (
            "The circuit",
            [
                ("circuits", _curve),
                ("circuits", _overlaps),
                ("attribution", _types),
                ("exact", _exact),
            ],
        ),
        ("What it says", [("values", _values)]),
        ("How sparse it may become", [("sparsity", _sparsity)]),
    ]
    found = []
    for heading, figures in story:
        there = [draw(steps) for step, draw in figures if step in steps]
        if there:
            found.append((heading, there))
    return found


def number(value: Any, digits: int = 3) -> str:
    """A number for a table; a dash for None."""
    return "–" if value is None else f"{value:.{digits}g}"


def _rate(rate: Mapping[str, Any]) -> str:
    return f"{rate['asr']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def _rates(label: str, rates: Sequence[Mapping[str, Any]], x: Sequence[float] = ()) -> Series:
    return Series(
        label,
        [r["asr"] for r in rates],
        x,
        [r["low"] for r in rates],
        [r["high"] for r in rates],
    )


WILSON = "Intervals are 95 % Wilson intervals."


def _screen(steps: Steps) -> Figure:
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


def _candidates(steps: Steps) -> Figure:
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
        f" {found['rejected']} candidates were removed by a filter.",
        charts.matrix("Induce score", positions, layers, table["induce"]),
        ("position", "layer", "induce score", "KL", "bypass score"),
        rows,
        "The squares show the induce score (refusal metric on harmless prompts under the vector),"
        " in nats; empty where a filter made it unnecessary.",
    )


def _strength(steps: Steps) -> Figure:
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
        _rates("harmless prompts, +a", [r["harmless"] for r in rows], x),
        _rates("harmful prompts, -a", [r["harmful"] for r in rows], x),
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
                _rate(r["harmless"]),
                _rate(r["harmful"]),
                number(r["kl"]),
                number(r["kl_side"]),
                r["verdict"],
            ]
            for r in rows
        ],
        f"{rows[0]['harmless']['n']} validation prompts of each kind. The dose is the length of"
        f" what is added over the length of the residual stream. {WILSON}",
    )


def _range(steps: Steps) -> Figure:
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
            "–" if r["rate"] is None else _rate(r["rate"]),
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
        f"Bounds: KL {bounds['kl']:g} nats on the prompts that should stay as they are, repetition"
        f" +{bounds['repetition']:g}, ended texts -{bounds['unended']:g}; at least"
        f" {100 * bounds['effect']:.0f} % of what the rate could move. {WILSON}",
    )


def _rerouting(steps: Steps) -> Figure:
    found = steps["rerouting"]
    layer, head, most = found["largest"]
    first = steps["candidates"]["layer"]
    shown = found["distance"][first:]
    names = [f"layer {first + i}" for i in range(len(shown))]
    heads = [f"h{h}" for h in range(len(shown[0]))]
    return Figure(
        "How far attention moves",
        f"Steering moves {100 * found['mean']:.0f} % of the attention on average, most in"
        f" a{layer}.h{head} ({100 * most:.0f} %).",
        charts.matrix("Total variation of patterns", names, heads, shown),
        ("head", "from token", "to token", "before", "after"),
        [[f"a{l}.h{h}", str(q), str(k), number(a), number(b)] for l, h, q, k, a, b in found["top"]],
        f"{found['prompts']} harmful prompts under {found['coefficient']:+g}; total variation"
        " between both runs' patterns, the mean over all tokens. The table holds the entries that"
        " change most.",
    )


def _behaviour(steps: Steps) -> Figure:
    found = steps["behaviour"]
    rows = {"unsteered": found["unsteered"], "prompt": found["prompted"], **found["vectors"]}
    names = list(rows)
    series = [
        _rates("harmless prompts, +a", [rows[n]["harmless"] for n in names]),
        _rates("harmful prompts, -a", [rows[n]["harmful"] for n in names]),
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
                _rate(rows[n]["harmless"]),
                _rate(rows[n]["harmful"]),
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


def _table1(steps: Steps) -> Figure:
    rows, setting = steps["table1"]["rows"], steps["table1"]["setting"]
    order = ["none", "QK", "OV", "SVV", "MLP direct", "MLP"]
    names = [n for n in order if n in rows] + [n for n in rows if n not in order]
    series = [
        _rates("harmless prompts", [rows[n]["harmless"] for n in names]),
        _rates("harmful prompts", [rows[n]["harmful"] for n in names]),
    ]
    qk, ov = rows["QK"]["average_change"], rows["OV"]["average_change"]
    whole = effect(rows["none"], rows["unsteered"])
    doses, n = setting["dose"], min(setting["n_harmless"], setting["n_harmful"])
    few = f", as far as {n} prompts of each kind can tell" if n < LEAST_PROMPTS else ""
    return Figure(
        "Table 1: parts frozen or ablated",
        f"Freezing the attention patterns changes the rates by {100 * qk:.0f} % on average,"
        f" freezing the values by {100 * ov:.0f} %: {_acts(whole, qk, ov)}{few}.",
        charts.bars("Attack success rate by ablation", names, series, "ASR"),
        ("ablation", "ASR harmless", "ASR harmful", "average change"),
        [
            [
                n,
                _rate(rows[n]["harmless"]),
                _rate(rows[n]["harmful"]),
                f"{100 * rows[n]['average_change']:.1f} %" if n != "none" else "–",
            ]
            for n in names
        ],
        f"{setting['n_harmless']} harmless prompts under +{setting['coefficient'][0]:g} (dose"
        f" {doses[0]:.2f}), {setting['n_harmful']} harmful prompts under"
        f" -{setting['coefficient'][1]:g} (dose {doses[1]:.2f}). {WILSON}",
    )


def _acts(whole: float, qk: float, ov: float) -> str:
    """Through what the vector acts, by the thresholds of the claims."""
    if whole < CARRY:
        return (
            f"steering itself moves them by {100 * whole:.0f} %, too little to tell through what"
            " it acts"
        )
    if ov >= CARRY and qk <= HARDLY:
        return "the vector acts through OV"
    return f"the vector acts through {'OV more than through QK' if ov > qk else 'QK as well'}"


def _curve(steps: Steps) -> Figure:
    curve, smallest = steps["circuits"]["curve"], steps["circuits"]["smallest"]
    rows = [
        [
            name,
            str(found.get("size", "–")),
            f"{100 * found['share']:.1f} %" if "share" in found else found["why"],
            number(found.get("faithfulness")),
        ]
        for name, found in smallest.items()
    ]
    chart, note = "", f"No curve: {curve['why']}." if "why" in curve else ""
    if "faithfulness" in curve:
        x = [100 * e / curve["n_edges"] for e in curve["edges"]]
        mean = [_mean(row) for row in curve["random"]]
        series = [
            Series("circuit", curve["faithfulness"], x, curve["low"], curve["high"]),
            Series("random, twice the edges", mean, x),
        ]
        chart = charts.lines("Faithfulness by size", series, "edges, %", "faithfulness")
        setting = curve["setting"]
        note = (
            f"The curve's circuits were found on {setting['n_found_on']} samples and judged on"
            f" {setting['n_judged_on']} others; 95 % bootstrap intervals over samples."
        )
    sizes = [f["share"] for f in smallest.values() if "share" in f]
    if sizes:
        note += " Those of the table were found and judged on the same samples."
    sentence = (
        f"Between {100 * min(sizes):.1f} and {100 * max(sizes):.1f} % of the edges carry 85 % of"
        " the effect."
        if sizes
        else "No circuit reaches 85 % of the effect."
        if any("flips none" not in f["why"] for f in smallest.values())
        else "Steering flips no prompt, so there is no circuit to find."
    )
    head = ("samples or vector", "smallest faithful circuit", "share of all edges", "faithfulness")
    return Figure("Faithful circuits", sentence, chart, head, rows, note)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def _overlaps(steps: Steps) -> Figure:
    found = steps["circuits"]["overlap_of_tenths"]
    names, values = found["names"], found["values"]
    pairs = [(values[i][j], names[i], names[j]) for i in range(len(names)) for j in range(i)]
    sentence = (
        "The circuits that share least are {1} and {2}: {0:.2f}.".format(*min(pairs))
        if pairs
        else "There are fewer than two circuits to compare."
    )
    return Figure(
        "Overlap of circuits",
        sentence,
        charts.matrix("Overlap", names, [str(i + 1) for i in range(len(names))], values),
        ("", *names),
        [[n, *(f"{v:.2f}" for v in row)] for n, row in zip(names, values, strict=True)],
        "Circuits of a tenth of the edges; shared edges over those of the smaller circuit.",
    )


def _types(steps: Steps) -> Figure:
    sets = {n: d for n, d in steps["attribution"]["data_sets"].items() if "top_by_type" in d}
    if not sets:
        return Figure("Where edges end", "Steering flips no prompt.", "", (), (), "")
    kinds = ("q", "k", "v", "mlp", "logits")
    tops = {n: d["top_by_type"][max(d["top_by_type"], key=int)] for n, d in sets.items()}
    series = [Series(n, [top[k] for k in kinds]) for n, top in tops.items()]
    strongest = max(kinds, key=lambda k: sum(top[k] for top in tops.values()))
    return Figure(
        "Where the strongest edges end",
        f"Of the strongest tenth of the edges the largest share ends in {strongest} inputs.",
        charts.bars("Share of edges by the input they end in", kinds, series, "share of edges"),
        ("samples", *kinds),
        [[n, *(f"{100 * top[k]:.1f} %" for k in kinds)] for n, top in tops.items()],
        ", ".join(f"{n}: {d['samples']} samples of {d['asked']} prompts" for n, d in sets.items()),
    )


def _exact(steps: Steps) -> Figure:
    found = steps["exact"]
    if "n" not in found:
        return Figure("Estimates and exact patches", found["why"], "", (), (), "")
    return Figure(
        "Estimates beside exact patches",
        f"The estimates rank {found['n']} patched edges with a Spearman correlation of"
        f" {number(found['spearman'])}.",
        charts.points(
            "Estimated and exact effects",
            found["estimates"],
            found["measured"],
            "estimate",
            "exact",
        ),
        ("Pearson", "Spearman", "same sign", "slope"),
        [[number(found[k]) for k in ("pearson", "spearman", "sign", "slope")]],
        f"One sample; {found['half_strongest']} strongest edges and as many at random, each patched"
        " by itself.",
    )


def _values(steps: Steps) -> Figure:
    found = steps["values"]
    rows = [["the vector", "", " · ".join(found["vector"])]]
    rows.append(["its negative", "", " · ".join(found["negated"])])
    first = steps["candidates"]["layer"]
    for (layer, head), tokens in zip(found["largest"], found["heads"], strict=True):
        norm = found["norms"][layer - first][head]
        rows.append([f"a{layer}.h{head}", number(norm), " · ".join(tokens)])
    return Figure(
        "Steering value vectors",
        "What steering writes through the heads with the largest value vectors, read by the logit"
        " lens, beside the vector itself.",
        "",
        ("head", "norm", "tokens that it promotes most"),
        rows,
        "A value vector depends on the weights and the vector alone; no samples are involved.",
    )


def _sparsity(steps: Steps) -> Figure:
    found = steps["sparsity"]
    if "rows" not in found:
        return Figure("Sparsity", found["why"], "", (), (), "")
    rows = [r for r in found["rows"] if r["method"] in ("gradient", "random")]
    series = []
    for method in ("gradient", "random"):
        for side, sign in (("harmless", "+"), ("harmful", "-")):
            some = sorted((r for r in rows if r["method"] == method), key=lambda r: r["sparsity"])
            x = [100 * r["sparsity"] for r in some]
            series.append(_rates(f"{method}, {side} {sign}a", [r[side] for r in some], x))
    pairs = [p for some in found["overlaps"].values() for p in some]
    agree = (
        f"; kept dimensions of two vectors overlap by {min(p[2] for p in pairs):.2f} or more"
        if pairs
        else ""
    )
    return Figure(
        "Dimensions set to zero",
        f"Rates as fewer dimensions are kept, by gradient and at random{agree}.",
        charts.lines("Attack success rate by sparsity", series, "dimensions set to zero, %", "ASR"),
        ("kept by", "tau", "sparsity", "ASR harmless", "ASR harmful"),
        [
            [
                r["method"],
                "–" if r["tau"] is None else f"{r['tau']:g}",
                f"{100 * r['sparsity']:.1f} %",
                _rate(r["harmless"]),
                _rate(r["harmful"]),
            ]
            for r in rows
        ],
        f"{found['setting']['n_harmless']} prompts of each kind. {WILSON}",
    )
