"""Figures to read: answers side by side, and the tokens of samples with their scores.

Both show what the model wrote where the report may hold texts, and numbers alone where not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..judge import wilson
from . import charts
from .charts import Series
from .figures import WILSON, Figure, Steps, number, rate

#: Rows of Table 1 that freeze or ablate a part, as they stand in the third column.
FROZEN = ("QK", "OV", "SVV", "MLP direct", "MLP")
SIDES = {"harmless": "Harmless prompts, +a", "harmful": "Harmful prompts, -a"}
NO_TEXTS = " This report was drawn without texts."


def answers(steps: Steps, texts: Mapping[str, Any] | None) -> Figure:
    """Answers of the base, the steered and the frozen model; texts: of the step, or None."""
    found = steps["texts"]
    alike, kept, asked = found["alike"], found["kept"], found["prompts"]
    names = [name for name in FROZEN if name in alike["harmful"]]
    series = [
        Series(f"{side}, as the {word} answer", [alike[side][n][key] for n in names])
        for side in SIDES
        for key, word in (("steered", "steered"), ("base", "unsteered"))
    ]
    kinds = [(side, key) for side in SIDES for key in ("steered", "base")]
    weights = {side: asked[side] / sum(asked.values()) for side in SIDES}
    same = sum(weights[side] * alike[side]["QK"]["steered"] for side in SIDES)
    return Figure(
        "Answers side by side",
        f"With frozen attention patterns {100 * same:.0f} % of the answers are the steered model's,"
        " token for token.",
        charts.bars("Share of answers that are the same", names, series, "share"),
        ("frozen or ablated", *(s.label for s in series)),
        [[n, *(_share(alike[side][n][key], asked[side]) for side, key in kinds)] for n in names],
        f"{WILSON} {asked['harmless']} harmless and {asked['harmful']} harmful test prompts"
        + (
            f"; the first {kept['harmless']} and {kept['harmful']} are shown. A mark stands at the"
            " first token that differs: in the steered answer from the unsteered one, in the third"
            " column from the steered one."
            if texts
            else f".{NO_TEXTS}"
        ),
        *(("answers.html", _columns(texts["sides"], names)) if texts else ()),
    )


def _share(value: float, n: int) -> str:
    """A share of n answers with its interval."""
    low, high = wilson(round(value * n), n)
    return rate({"asr": value, "low": low, "high": high})


def _columns(sides: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What answers.html draws: the names of the rows, and for each side its prompts with the parts
    of the three columns.
    """
    return {
        "rows": names,
        "sides": [
            (
                title,
                [
                    {
                        "prompt": one["prompt"],
                        "base": _parts(one["answers"]["unsteered"], None),
                        "steered": _parts(one["answers"]["none"], "base"),
                        "frozen": [(n, _parts(one["answers"][n], "steered")) for n in names],
                    }
                    for one in sides[side]
                ],
            )
            for side, title in SIDES.items()
        ],
    }


def _parts(answer: Mapping[str, Any], against: str | None) -> dict[str, Any]:
    """{"before", "mark", "after", "said"}: a text around its first differing token, and in words
    where that is.
    """
    text, at = answer["text"], answer[against] if against else None
    if against is None:
        return {"before": text, "mark": "", "after": "", "said": ""}
    other = "unsteered" if against == "base" else "steered"
    if at is None:
        return {"before": text, "mark": "", "after": "", "said": f"the same as {other}"}
    token, start, end = at
    return {
        "before": text[:start],
        "mark": text[start:end] or "(ends)",
        "after": text[end:],
        "said": f"differs from {other} at token {token + 1}",
    }


def tokens(steps: Steps, texts: Mapping[str, Any] | None) -> Figure:
    """Samples as strips of tokens, each with its score and marks; texts: of the step, or None."""
    found = steps["positions"]
    if "shown" not in found:
        return Figure("Tokens of samples", found["why"], "", (), (), "")
    shares = found["prompt_share"]
    strips = [_strip(one, _labels(texts, i, one)) for i, one in enumerate(found["shown"])]
    return Figure(
        "Tokens of samples",
        f"{100 * min(shares):.0f} to {100 * max(shares):.0f} % of what steering adds at single"
        " tokens comes from tokens of the prompt.",
        "",
        ("sample", "position", "token", "score", "marks"),
        [
            [f"{found['samples'][i] + 1}", str(p), t["text"], number(t["score"]), t["words"]]
            for i, strip in enumerate(strips)
            for p, t in enumerate(strip)
        ],
        f"{len(strips)} of {found['of']} samples, harmful prompts under {found['coefficient']:+g}."
        " The score is that of the node steer at the token: what steering there adds to the metric,"
        " to first order along the path of integration. ▴ steered, ◆ read by the metric: what comes"
        " next differs between the base and the steered run." + ("" if texts else NO_TEXTS),
        "tokens.html",
        [(f"sample {found['samples'][i] + 1}", strip) for i, strip in enumerate(strips)],
    )


def _labels(texts: Mapping[str, Any] | None, i: int, one: Mapping[str, Any]) -> list[str]:
    """The tokens of a sample; where texts are left out, their part and their number there."""
    if texts is not None:
        return [str(t) for t in texts["tokens"][i]]
    prompt, n = one["prompt"], len(one["tokens"])
    return [f"prompt {p + 1}" if p < prompt else f"response {p - prompt + 1}" for p in range(n)]


def _strip(one: Mapping[str, Any], labels: Sequence[str]) -> list[dict[str, Any]]:
    """What tokens.html draws of one sample."""
    most = max(map(abs, one["tokens"]), default=0.0) or 1.0
    first, end = one["steered"]
    strip = []
    for p, (label, score) in enumerate(zip(labels, one["tokens"], strict=True)):
        marks = [("▴", "steered")] * (first <= p < end) + [("◆", "metric")] * (p in one["metric"])
        strip.append(
            {
                "text": label.replace("\n", "⏎"),
                "score": score,
                "shade": round(100 * abs(score) / most),
                "sign": "plus" if score >= 0 else "minus",
                "marks": "".join(m for m, _ in marks),
                "words": ", ".join(w for _, w in marks),
                "response": p == one["prompt"],
            }
        )
    return strip


def layers(steps: Steps, texts: Mapping[str, Any] | None) -> Figure:
    """The heat map of layers and tokens of the first sample; texts: of the step, or None."""
    found = steps["positions"]
    if "shown" not in found:
        return Figure("Layers and tokens", found["why"], "", (), (), "")
    one = found["shown"][0]
    labels = [t.replace("\n", "⏎") for t in _labels(texts, 0, one)]
    rows = [f"layer {found['layer'] + i}" for i in range(len(one["layers"]) - 1)] + ["logits"]
    _, row, p = max(
        (abs(v), i, p) for i, values in enumerate(one["layers"]) for p, v in enumerate(values)
    )
    short = [t if len(t) < 9 else f"{t[:8]}…" for t in labels]
    return Figure(
        "Layers and tokens",
        f"The largest sum of scores, {number(one['layers'][row][p])}, enters {rows[row]} at token"
        f" {p} ({labels[p]}).",
        charts.matrix("Sum of edge scores by layer and token", rows, short, one["layers"]),
        ("position", "token", *rows),
        [
            [str(p), label, *(number(values[p]) for values in one["layers"])]
            for p, label in enumerate(labels)
        ],
        f"Sample {found['samples'][0] + 1} of {found['of']}: the scores of all edges that end in a"
        " layer's inputs at a token, summed; the logits read what the last layer leaves. One sample"
        " has no interval." + ("" if texts else NO_TEXTS),
    )
