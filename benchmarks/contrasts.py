"""Does a screen of activations predict what steering does? Sixteen harmless contrasts on a real
model: the predictors of `vs.reliability.screen` from 20 pairs, the measured effect on 20 others,
and the rank correlation of each predictor with the effect.

    python benchmarks/contrasts.py --model PATH --out docs/results/NAME

A contrast is two ways of answering the same request. Its vector is the mean difference of the
residual streams at the last token of the answers. One contrast has no direction by construction:
the answers of every second item are exchanged.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import vksteer as vs
from vksteer.reliability import Choice
from vksteer.reliability.screening import STEERABLE, UNSTEERABLE

TOPICS = [
    ("the garden", "le jardin"),
    ("the library", "la bibliothèque"),
    ("the old bridge", "le vieux pont"),
    ("the river", "la rivière"),
    ("the school", "l'école"),
    ("the market", "le marché"),
    ("the train", "le train"),
    ("the kitchen", "la cuisine"),
    ("the museum", "le musée"),
    ("the forest", "la forêt"),
    ("the village", "le village"),
    ("the concert", "le concert"),
    ("the beach", "la plage"),
    ("the new book", "le nouveau livre"),
    ("the mountain", "la montagne"),
    ("the castle", "le château"),
    ("the bakery", "la boulangerie"),
    ("the park", "le parc"),
    ("the lake", "le lac"),
    ("the theatre", "le théâtre"),
]
NUMBERS = [
    *("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    *("nineteen", "twenty", "thirty"),
]
DIGITS = [*range(2, 21), 30]
CAPITALS = [
    ("France", "Paris"),
    ("Italy", "Rome"),
    ("Spain", "Madrid"),
    ("Germany", "Berlin"),
    ("Japan", "Tokyo"),
    ("Russia", "Moscow"),
    ("Egypt", "Cairo"),
    ("Greece", "Athens"),
    ("Norway", "Oslo"),
    ("Austria", "Vienna"),
    ("Poland", "Warsaw"),
    ("Cuba", "Havana"),
    ("Kenya", "Nairobi"),
    ("Peru", "Lima"),
    ("Ireland", "Dublin"),
    ("Sweden", "Stockholm"),
    ("Hungary", "Budapest"),
    ("Portugal", "Lisbon"),
    ("Iran", "Tehran"),
    ("Finland", "Helsinki"),
]
WARM, COLD = ["red", "orange", "yellow", "pink"], ["blue", "green", "grey", "violet"]
WORDINGS = ("Tell me something about {t}.", "Write one sentence about {t}.")


def upper_first(text: str) -> str:
    return text[0].upper() + text[1:]


def about(positive: str, negative: str, wordings=WORDINGS):
    """Answers about a topic, in two wordings of the request. {t}: the topic, {T}: capitalised,
    {f}: in French, {U}: in upper case.
    """

    def item(i: int, wording: int) -> tuple[str, str, str]:
        english, french = TOPICS[i]
        names = {"t": english, "T": upper_first(english), "f": french, "U": english.upper()}
        return tuple(x.format(**names) for x in (wordings[wording], positive, negative))

    return item


def _numbers(i: int, wording: int) -> tuple[str, str, str]:
    question = ("How many are there?", "Count the chairs.")[wording]
    return question, f"There are {DIGITS[i]} chairs.", f"There are {NUMBERS[i]} chairs."


def _parity(i: int, wording: int) -> tuple[str, str, str]:
    question = ("Name a number.", "Which number comes to your mind?")[wording]
    return question, f"I choose {2 * i + 20}.", f"I choose {2 * i + 21}."


def _capitals(i: int, wording: int) -> tuple[str, str, str]:
    (country, city), (_, other) = CAPITALS[i], CAPITALS[(i + 7) % len(CAPITALS)]
    question = (f"What is the capital of {country}?", f"Name the capital of {country}.")[wording]
    return question, f"The capital is {city}.", f"The capital is {other}."


def _colours(i: int, wording: int) -> tuple[str, str, str]:
    topic = TOPICS[i][0]
    question = (f"Which colour fits {topic}?", f"In which colour would you paint {topic}?")[wording]
    return question, f"I would take {WARM[i % 4]}.", f"I would take {COLD[(i + i // 4) % 4]}."


def _letters(i: int, wording: int) -> tuple[str, str, str]:
    a, b = TOPICS[i][0], TOPICS[(i + 3) % len(TOPICS)][0]
    question = ("Which do you prefer?", "Choose one of the two.")[wording]
    return f"{question} (A) {a} (B) {b}", "I choose (A).", "I choose (B)."


MOOD = about("{T} was wonderful and I loved it.", "{T} was terrible and I hated it.")


def _mixed(i: int, wording: int) -> tuple[str, str, str]:
    prompt, positive, negative = MOOD(i, wording)
    return (prompt, negative, positive) if i % 2 else (prompt, positive, negative)


#: name -> function (topic, wording) -> (prompt, positive, negative)
CONTRASTS = {
    "French / English": about("J'aime beaucoup {f}.", "I like {t} a lot."),
    "formal / informal": about(
        "I should like to express my sincere appreciation of {t}.", "Yeah, {t} is kinda cool."
    ),
    "long / short": about(
        "{T} could be described at great length, with its history, its details and the many small"
        " stories that people tell about it.",
        "{T} is nice.",
    ),
    "good / bad review": MOOD,
    "upper / lower case": about("I SAW {U} TODAY.", "I saw {t} today."),
    "digits / words": _numbers,
    "true / false capital": _capitals,
    "past / future": about("I visited {t} and I liked it.", "I will visit {t} and I will like it."),
    "yes / no": about(
        "Yes, it is.", "No, it is not.", ("Is {t} interesting?", "Is {t} worth a visit?")
    ),
    "question / statement": about("Have you ever seen {t}?", "I have often seen {t}."),
    "we / I": about("We like {t} and our friends do, too.", "I like {t} and my friends do, too."),
    "exclamation / full stop": about("{T} is great!", "{T} is great."),
    "warm / cold colour": _colours,
    "even / odd number": _parity,
    "letter A / letter B": _letters,
    "good / bad review, half exchanged": _mixed,
}
PREDICTORS = (
    "mean_cosine",
    "mean_cosine_leave_one_out",
    "pairwise_cosine",
    "d_prime",
    "auc",
    "overlap",
    "norm_ratio",
    "stability_mean",
    "dose",  # no predictor of the paper: how long the vector is
)
#: What is predicted: the slope of the propensity over -a, 0, +a and the share of items where it is
#: negative (arXiv 2407.12404); the change from 0 to +a and the share where it is negative
#: (arXiv 2602.17881).
TARGETS = ("slope", "anti_steerable_slope", "effect", "anti_steerable")


def items(name: str) -> tuple[list[Choice], list[Choice]]:
    """(20 to make the vector, 20 to measure it): no topic is in both."""
    made = [
        [
            Choice(*CONTRASTS[name](i, w))
            for i in range(len(TOPICS))
            if (i // 2) % 2 == part
            for w in (0, 1)
        ]
        for part in (0, 1)
    ]
    return made[0], made[1]


def answered(model, choices: list[Choice], name: str) -> list[list[int]]:
    """Prompt and answer as tokens, up to the answer's last own token."""
    rows = []
    for choice in choices:
        (row,) = model.chat_tokens([choice.prompt], response=[getattr(choice, name)])
        rows.append([int(t) for t in row])
    return rows


def verdict(mean_cosine: float) -> str:
    if mean_cosine >= STEERABLE:
        return "likely steerable"
    return "likely unreliable" if mean_cosine <= UNSTEERABLE else "uncertain"


def measure(model, name: str, layer: int, coefficient: float) -> dict:
    """The predictors of one contrast and the measured effect of its vector."""
    train, test = items(name)
    positive, negative = answered(model, train, "positive"), answered(model, train, "negative")
    # the kept inputs of this layer are what `vs.reliability.screen` takes, too
    a, b = (
        np.stack(
            [
                x[-1]
                for x in model._layer_inputs.get(list(map(tuple, rows)), layer, every_layer=False)
            ]
        )
        for rows in (positive, negative)
    )
    row = vs.reliability.predictors(a, b)
    other = vs.reliability.predictors(a, b, leave_one_out=True)
    vector = vs.SteeringVector(a.mean(axis=0) - b.mean(axis=0), layer, method="dim")
    curves = vs.reliability.steerability(
        model, test, vector, (-coefficient, 0.0, coefficient), progress=False
    )
    effect = curves.propensity[:, 2] - curves.propensity[:, 1]
    return {
        "name": name,
        **{p: row[p] for p in PREDICTORS if p in row},
        "mean_cosine_leave_one_out": other["mean_cosine"],
        "verdict": verdict(row["mean_cosine"]),
        "dose": curves.dose * coefficient,
        "effect": float(effect.mean()),
        "effect_sd": float(effect.std(ddof=1)),
        "anti_steerable": float((effect < 0).mean()),
        "slope": curves.mean_slope,
        "anti_steerable_slope": curves.anti_steerable,
    }


def spearman(x, y, draws: int = 20_000) -> tuple[float, float]:
    """(rank correlation, two-sided p of a permutation test with a fixed seed)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    rho = vs.patching.agreement(x, y).spearman
    ranks = [np.argsort(np.argsort(v, kind="stable")) - (len(v) - 1) / 2 for v in (x, y)]
    rng, n = np.random.default_rng(0), len(x)
    scale = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    drawn = np.array([ranks[0] @ ranks[1][rng.permutation(n)] for _ in range(draws)]) / scale
    return rho, float((np.sum(np.abs(drawn) >= abs(rho) - 1e-12) + 1) / (draws + 1))


def correlations(rows: list[dict]) -> list[dict]:
    out = []
    for predictor in PREDICTORS:
        values = [r[predictor] for r in rows]
        found = {"predictor": predictor}
        for target in TARGETS:
            rho, p = spearman(values, [r[target] for r in rows])
            found |= {target: rho, f"{target}_p": p}
        out.append(found)
    return out


def markdown(result: dict) -> str:
    rows = sorted(result["rows"], key=lambda r: -r["mean_cosine"])
    lines = [
        (
            "| contrast | mean cosine | d' | AUC | stability | dose | slope | share below 0 |"
            " effect of +a | share below 0 | verdict |"
        ),
        "|:---|---:|---:|---:|---:|---:|---:|---:|---:|---:|:---|",
    ]
    lines += [
        f"| {r['name']} | {r['mean_cosine']:.2f} | {r['d_prime']:.2f} | {r['auc']:.2f} |"
        f" {r['stability_mean']:.2f} | {r['dose']:.2f} | {r['slope']:+.2f} |"
        f" {100 * r['anti_steerable_slope']:.0f} % | {r['effect']:+.2f} |"
        f" {100 * r['anti_steerable']:.0f} % | {r['verdict']} |"
        for r in rows
    ]
    names = ("slope", "share of slopes below 0", "effect of +a", "share of effects below 0")
    lines += [
        "",
        "| rho (p) with | " + " | ".join(names) + " |",
        "|:---|" + "---:|" * len(TARGETS),
    ]
    for c in result["correlations"]:
        cells = [f"{c[t]:+.2f} ({c[t + '_p']:.3f})" for t in TARGETS]
        lines.append(f"| {c['predictor'].replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, help="default: 0.4 of the model's layers")
    parser.add_argument("--coefficient", type=float, default=1.0)
    parser.add_argument("--out", help="write OUT.json, and the tables to OUT.tables.md")
    arguments = parser.parse_args()
    with vs.Model.from_pretrained(arguments.model, progress=False) as model:
        n = model.config.n_layers
        layer = round(0.4 * n) if arguments.layer is None else arguments.layer
        rows = []
        for name in CONTRASTS:
            rows.append(measure(model, name, layer, arguments.coefficient))
            print(json.dumps(rows[-1]), flush=True)
        result = {
            "model": Path(arguments.model).name,
            "layer": layer,
            "n_layers": n,
            "coefficient": arguments.coefficient,
            "n_train": len(items(name)[0]),
            "n_test": len(items(name)[1]),
            "device": model.device.name,
            "version": vs.__version__,
            "rows": rows,
            "correlations": correlations(rows),
        }
    print(markdown(result))
    if arguments.out:
        Path(arguments.out + ".json").write_text(json.dumps(result, indent=1) + "\n")
        Path(arguments.out + ".tables.md").write_text(markdown(result) + "\n")


if __name__ == "__main__":
    main()
