"""Figures of what happens inside: frozen parts, circuits, value vectors, and dimensions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import charts
from .charts import Series
from .claims import CARRY, HARDLY, LEAST_PROMPTS, average_change, effect, with_interval
from .figures import WILSON, Figure, Steps, number, rate, rates
from .inside import MAIN, THRESHOLD


def table1(steps: Steps) -> Figure:
    """Rates with parts frozen or ablated."""
    rows, setting = steps["table1"]["rows"], steps["table1"]["setting"]
    order = ["none", "QK", "OV", "SVV", "MLP direct", "MLP"]
    names = [n for n in order if n in rows] + [n for n in rows if n not in order]
    series = [
        rates("harmless prompts", [rows[n]["harmless"] for n in names]),
        rates("harmful prompts", [rows[n]["harmful"] for n in names]),
    ]
    qk, ov = rows["QK"]["average_change"], rows["OV"]["average_change"]
    whole = effect(rows["none"], rows["unsteered"])
    doses, n = setting["dose"], min(setting["n_harmless"], setting["n_harmful"])
    few = f", as far as {n} prompts of each kind can tell" if n < LEAST_PROMPTS else ""
    return Figure(
        "Table 1: parts frozen or ablated",
        f"Freezing the attention patterns changes the rates by {100 * qk:.0f} % on average,"
        f" freezing the values by {100 * ov:.0f} %: {_acts(rows, whole)}{few}.",
        charts.bars("Attack success rate by ablation", names, series, "ASR"),
        ("ablation", "ASR harmless", "ASR harmful", "average change"),
        [
            [
                n,
                rate(rows[n]["harmless"]),
                rate(rows[n]["harmful"]),
                with_interval(*average_change(rows, n), "%") if n != "none" else "–",
            ]
            for n in names
        ],
        f"{setting['n_harmless']} harmless prompts under +{setting['coefficient'][0]:g} (dose"
        f" {doses[0]:.2f}), {setting['n_harmful']} harmful prompts under"
        f" -{setting['coefficient'][1]:g} (dose {doses[1]:.2f}). {WILSON} Those of the changes"
        " are Newcombe's, of differences of two rates. The vector acts through OV where the whole"
        f" interval of OV's change lies at or above {100 * CARRY:.0f} %, and that of QK's at or"
        f" below {100 * HARDLY:.0f} %.",
    )


def _acts(rows: Mapping[str, Any], whole: float) -> str:
    """Through what the vector acts, by the thresholds of the claims and the whole intervals."""
    if whole < CARRY:
        return (
            f"steering itself moves them by {100 * whole:.0f} %, too little to tell through what"
            " it acts"
        )
    (_, qk_low, qk_high), (_, ov_low, ov_high) = (average_change(rows, n) for n in ("QK", "OV"))
    if ov_low >= CARRY and qk_high <= HARDLY:
        return "the vector acts through OV"
    if max(qk_high, ov_high) <= HARDLY:
        return "the vector hardly needs either"
    if ov_low > qk_high:
        return "the vector acts through OV more than through QK"
    if qk_low > ov_high:
        return "the vector acts through QK more than through OV"
    if min(qk_low, ov_low) > HARDLY:
        return "the vector acts through QK as well"
    return "these samples cannot tell through which of them the vector acts"


def rerouting(steps: Steps) -> Figure:
    """How far steering moves attention."""
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
        ("head", "prompt", "from token", "to token", "before", "after"),
        [
            [f"a{l}.h{h}", str(i), str(q), str(k), number(a), number(b)]
            for i, l, h, q, k, a, b in found["top"]
        ],
        f"{found['prompts']} harmful prompts under {found['coefficient']:+g}; total variation"
        " between both runs' patterns, the mean over all tokens. The table holds the entries that"
        " change most; prompts and tokens are counted from 0.",
    )


def curve(steps: Steps) -> Figure:
    """Faithfulness by size, and the smallest faithful circuits."""
    curve, smallest = steps["circuits"]["curve"], steps["circuits"]["smallest"]
    rows = [
        [
            name,
            str(found.get("size", "–")),
            f"{100 * found['share']:.1f} %" if "share" in found else found["why"],
            _judged(found),
            _faithful(found),
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
    if any("share" in f for f in smallest.values()):
        note += (
            " The circuits of the table were found on one half of the samples and judged on the"
            " other. One is faithful where the whole 95 % interval there lies at or above 0.85, and"
            " not where it lies below."
        )
    head = (
        "samples or vector",
        "smallest circuit",
        "share of all edges",
        "faithfulness",
        "faithful",
    )
    return Figure("Faithful circuits", _carried(smallest), chart, head, rows, note)


def _carried(smallest: Mapping[str, Mapping[str, Any]]) -> str:
    """What the smallest circuits carry where they were found, and on other samples."""
    there = [f for f in smallest.values() if "share" in f]
    if not there:
        if any("flips none" not in f["why"] for f in smallest.values()):
            return "No circuit reaches 85 % of the effect."
        return "Steering flips no prompt, so there is no circuit to find."
    shares = [100 * f["share"] for f in there]
    text = (
        f"Circuits of {min(shares):.1f} to {max(shares):.1f} % of the edges reach 85 % of the"
        " effect on the samples that choose them"
    )
    judged = [100 * f["faithfulness"] for f in there if f.get("faithfulness") is not None]
    if judged:
        text += f"; on other samples they carry {min(judged):.0f} to {max(judged):.0f} %"
    verdicts = [_faithful(f) for f in there]
    return f"{text}. Surely faithful there: {verdicts.count('yes')} of {len(there)}."


def _faithful(found: Mapping[str, Any]) -> str:
    """Whether a smallest circuit is faithful on the samples that judge it, by its interval."""
    low, high = found.get("low"), found.get("high")
    if low is None or high is None:
        return "–"
    return "yes" if low >= THRESHOLD else "no" if high < THRESHOLD else "cannot be told"


def searched(steps: Steps) -> Figure:
    """Faithfulness by size of the data sets and vectors beside the main one."""
    smallest = steps["circuits"]["smallest"]
    others = {n: f for n, f in smallest.items() if n != MAIN}
    there = {n: f for n, f in others.items() if "size" in f}
    measured_sizes = {n: f["searched"] for n, f in there.items() if "searched" in f}
    series, rows = [], []
    for name, measured in measured_sizes.items():
        x = [100 * edges / there[name]["edges"] for edges in measured["edges"]]
        series.append(Series(name, measured["faithfulness"], x))
        rows += [
            [name, str(edges), number(value)]
            for edges, value in zip(measured["edges"], measured["faithfulness"], strict=True)
        ]
    most = max((100 * found["share"] for found in there.values()), default=0.0)
    sentence = (
        f"{len(there)} of {len(others)} other data sets and learned vectors"
        f" reach 85 % of their effect, with at most {most:.1f} % of the edges."
        if there
        else "No other data set or learned vector has a circuit that reaches 85 % of its effect."
    )
    counts = sorted({found["samples_found"] for found in there.values()})
    return Figure(
        "Circuits of other samples and vectors",
        sentence,
        charts.lines("Faithfulness by size in the search", series, "edges, %", "faithfulness"),
        ("samples or vector", "edges", "faithfulness"),
        rows,
        "What the search for the smallest circuit measured, on the samples that choose it"
        f" ({', '.join(map(str, counts))} of each); it ends with the first pass of sizes of which"
        " one reaches 85 %. Faithfulness on other samples, with its interval, stands in the table"
        " above."
        if there
        else "",
    )


def _judged(found: Mapping[str, Any]) -> str:
    """The faithfulness of a smallest circuit on the samples that judge it, with its interval."""
    if found.get("faithfulness") is None:
        return "–"
    ends = [number(found[key]) for key in ("low", "high")]
    return (
        f"{number(found['faithfulness'])} [{', '.join(ends)}] ({found['samples_judged']} samples)"
    )


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def overlaps(steps: Steps) -> Figure:
    """What the circuits of a tenth of the edges share."""
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
        ("samples or vector", *names),
        [[n, *(f"{v:.2f}" for v in row)] for n, row in zip(names, values, strict=True)],
        "Circuits of a tenth of the edges, of all samples; shared edges over those of the smaller"
        f" circuit. {_certainty(steps['circuits']['agreement'])}",
    )


def _certainty(found: Mapping[str, Any]) -> str:
    """The intervals of the overlaps of every two vectors, and what they are held against."""
    if "why" in found:
        return f"No intervals: {found['why']}."
    pairs = [f"{a} and {b} {with_interval(*overlap)}" for a, b, *overlap in found["pairs"]]
    own = [f"{name} {value:.2f}" for name, value in found["own"].items()]
    counts = [f"{n} of {name}" for name, n in found["samples"].items()]
    return (
        f"Harmful prompts, steered, in 95 % intervals over samples that hold together:"
        f" {', '.join(pairs)}. Samples: {', '.join(counts)}. Each vector with itself on other"
        f" samples: {', '.join(own)}; by chance {found['chance']:.2f}."
    )


def strongest(steps: Steps) -> Figure:
    """The strongest edges of the main data set as a table."""
    found = steps["attribution"]["data_sets"]["harmful.steered"]
    if "top" not in found:
        return Figure("The strongest edges", "Steering flips no prompt.", "", (), (), "")
    top = found["top"]
    return Figure(
        "The strongest edges",
        f"The {len(top)} strongest of {found['edges']} edges hold"
        f" {100 * sum(share for _, _, share in top):.0f} % of all scores by size;"
        f" the strongest is {top[0][0]}.",
        "",
        ("edge", "score", "share", "sign"),
        [
            [
                name,
                number(abs(score)),
                f"{100 * share:.1f} %",
                "negative" if score < 0 else "positive",
            ]
            for name, score, share in top
        ],
        f"Harmful prompts, steered responses: {found['line']}, {found['positions']} metric"
        " positions. Means over samples have no interval here; the curve above has.",
    )


def types(steps: Steps) -> Figure:
    """Inputs that the strongest edges end in."""
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


def exact(steps: Steps) -> Figure:
    """Estimates beside exact patches."""
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
        f"One sample{_fisher(found['spearman'], found['n'])}; {found['half_strongest']} strongest"
        " edges and as many at random, each patched"
        " by itself.",
    )


def _fisher(r: float | None, n: int) -> str:
    """The 95 % interval of a Spearman correlation of n pairs, by Fisher's transformation with the
    variance of Bonett and Wright (Psychometrika 65, 2000); "" where there is none.
    """
    if r is None or n < 4 or abs(r) >= 1:
        return ""
    half = 1.96 * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(r) + x) for x in (-half, half))
    return f", Spearman correlation between {low:.2f} and {high:.2f} (95 %, over edges)"


def values(steps: Steps) -> Figure:
    """Value vectors and the tokens that they promote."""
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
