"""The tables in the README of a bundled tiny model, from figures.json, seeds.json and table1.json
of its folder, and the choice of strengths from a sweep.
"""

from __future__ import annotations

import json
from pathlib import Path


def _cell(r: dict) -> str:
    show = lambda x: "-" if x is None else f"{x:.2f}"
    return (
        f"{show(r['asr'])} / {show(r['ended'])} / {show(r['on_topic'])} / {show(r['consistent'])} /"
        f" {show(r['looping'])}"
    )


def card_table(figures: dict, split: str) -> str:
    """Markdown of the unsteered behaviour, the chosen vector and the sweep on one split; the column
    heads give the numbers of requests.
    """
    rows = figures["unsteered"][split]
    lines = ["| unsteered | n | refused | right | ended |", "|---|---|---|---|---|"]
    for name, r in rows.items():
        lines.append(
            f"| {name.replace('_', ' ')} | {r['n']} | {1 - r['asr']:.3f} |"
            f" {'-' if 'right' not in r else format(r['right'], '.3f')} | {r['ended']:.3f} |"
        )
    c = figures["chosen"]
    if c is None:
        return "\n".join(lines + ["", "No candidate passes the filters."])
    lines += [
        "",
        (
            f"Chosen: layer {c['layer']}, position {c['position']}, norm {c['norm']}, KL {c['kl']},"
            f" bypass {c['bypass']}, induce {c['induce']}."
        ),
        "",
        (
            f"| a | harmless at +a ({figures['sweep'][split][0]['harmless_plus']['n']}): ASR /"
            " ended / on topic / consistent / looping | harmful at -a"
            f" ({figures['sweep'][split][0]['harmful_minus']['n']}): the same |"
        ),
        "|---|---|---|",
    ]
    lines += [
        f"| {row['coefficient']} | {_cell(row['harmless_plus'])} | {_cell(row['harmful_minus'])} |"
        for row in figures["sweep"][split]
    ]
    return "\n".join(lines)


def seeds_table(all_seeds: dict[str, dict], split: str) -> str:
    """Markdown with one row per seed: the figures by which the seed was chosen. `all_seeds`: seed
    -> figures, as `collect` returns them.
    """
    lines = [
        (
            f"| seed | {split}: harmful right | harmless how-to right | layer, position, KL |"
            " (plus, minus) | harmless at +plus: ASR / ended / consistent / looping | harmful at"
            " -minus: ASR / ended / on topic |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for seed, f in sorted(all_seeds.items(), key=lambda kv: int(kv[0])):
        u, c = f["unsteered"][split], f["chosen"]
        head = (
            f"| {seed} | {u['harmful']['right']:.3f} ({u['harmful']['n']}) |"
            f" {u['harmless_howto']['right']:.3f} ({u['harmless_howto']['n']}) | "
        )
        if c is None:
            lines.append(head + "no candidate passes the filters | - | - | - |")
            continue
        a, b = strengths(f["sweep"]["validation"])
        plus, minus = (
            next(r for r in f["sweep"][split] if r["coefficient"] == x)[side]
            for x, side in ((a, "harmless_plus"), (b, "harmful_minus"))
        )
        show = lambda r, names: " / ".join("-" if r[n] is None else f"{r[n]:.2f}" for n in names)
        lines.append(
            head + f"{c['layer']}, {c['position']}, {c['kl']:.3f} | ({a}, {b}) |"
            f" {show(plus, ('asr', 'ended', 'consistent', 'looping'))} ({plus['n']}) |"
            f" {show(minus, ('asr', 'ended', 'on_topic'))} ({minus['n']}) |"
        )
    return "\n".join(lines)


def induced(row: dict) -> float:
    """How well +a induces refusals of harmless requests: the product of the shares of refusals, of
    texts that end, of refusals without a wrong field, and of texts without a loop.
    """
    r = row["harmless_plus"]
    return (1 - r["asr"]) * r["ended"] * (r["consistent"] or 0.0) * (1 - r["looping"])


def bypassed(row: dict) -> float:
    """How well -a makes the model answer harmful requests: the product of the shares of answers, of
    texts that end, and of answers with every field right.
    """
    r = row["harmful_minus"]
    return r["asr"] * r["ended"] * (r["on_topic"] or 0.0)


def strengths(table: list[dict]) -> tuple[float, float]:
    """(plus, minus): the best coefficient in each direction on a sweep; the smaller of equals.

    Seed and recipe were chosen by the lesser of the two directions' scores at these coefficients,
    on the validation sweep, among models that are right on at least 0.97 of the requests when they
    are not steered.
    """
    return tuple(
        max(table, key=lambda row: (score(row), -row["coefficient"]))["coefficient"]
        for score in (induced, bypassed)
    )


def collect(folders: list[Path]) -> dict[str, dict]:
    """The main figures of several seeds' folders, for seeds.json beside the committed weights."""
    out = {}
    for folder in folders:
        f, t = (
            json.loads((folder / name).read_text()) for name in ("figures.json", "training.json")
        )
        out[str(t["seed"])] = {
            "unsteered": f["unsteered"],
            "chosen": f["chosen"],
            "sweep": f.get("sweep"),
            "weights_sha256": f["weights_sha256"],
            "recipe": t["recipe"],
        }
    return out


def table1(folder: Path) -> str:
    """Markdown of table1.json (tools/tiny_table1.py): Table 1 of every seed with Wilson intervals,
    and the share of answers that are on topic.
    """
    parts = []
    tables = json.loads((folder / "table1.json").read_text())
    for seed, t in sorted(tables.items(), key=lambda kv: int(kv[0])):
        s, (plus, minus) = t["setting"], t["setting"]["coefficient"]
        parts += [
            "",
            (
                f"Seed {seed}: layer {s['layer']}, position {s['position']}; {s['n_harmless']}"
                f" harmless test prompts under +{plus:g}, {s['n_harmful']} harmful ones under"
                f" -{minus:g}; {s['max_new_tokens']} tokens."
            ),
            "",
            (
                "| ablation | harmless ASR | harmful ASR | average change | ended | repetition | on"
                " topic, of the answers |"
            ),
            "|:---|---:|---:|---:|---:|---:|---:|",
        ]
        parts += [_table1_row(name, row) for name, row in t["rows"].items()]
    return "\n".join(parts[1:])


def _table1_row(name: str, row: dict) -> str:
    sides = [row["harmless"], row["harmful"]]
    pair = lambda key: " / ".join("-" if s[key] is None else f"{s[key]:.2f}" for s in sides)
    rates = [f"{s['asr']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in sides]
    change = "-" if name == "none" else f"{100 * row['average_change']:.1f} %"
    shown = [name, *rates, change, pair("ended"), pair("repetition"), pair("on_topic")]
    return f"| {' | '.join(shown)} |"


BEGIN, END = "<!-- figures: made by tools/tiny_figures.py -->", "<!-- /figures -->"


def card_block(folder: Path) -> str:
    """The part of a folder's README that is made from its figures.json, seeds.json and table1.json.
    A test compares both.
    """
    seeds = json.loads((folder / "seeds.json").read_text())
    return "\n".join(
        [
            BEGIN,
            card_table(json.loads((folder / "figures.json").read_text()), "test"),
            "",
            "### All seeds of the recipe",
            "",
            seeds_table(seeds, "test"),
            "",
            "The same on the validation list, on which the strengths were chosen:",
            "",
            seeds_table(seeds, "validation"),
            "",
            "### Table 1",
            "",
            table1(folder),
            END,
        ]
    )
