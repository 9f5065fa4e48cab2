"""Table 1 of the tiny chat models with the engine: tools/tiny_table1.py FOLDER SEED_FOLDER ... puts
these seeds' tables into FOLDER/table1.json.

For every seed's folder: difference in means and selection (128 + 128, 32 + 32 prompts), the
strengths that its figures.json names (best on the validation list), then
`vksteer.freezing.ablation_table` on 100 + 100 test prompts with 72 new tokens. The vector must be
the one that transformers chose in figures.json. Run after seed and recipe have been chosen; the
tables decide nothing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import tiny_card
import tiny_figures

from vksteer import data, freezing, steering
from vksteer.runtime.model import Model

MAX_NEW_TOKENS, N_TEST = 72, 100


def on_topic(requests, texts) -> float | None:
    """Share with every field right among the answers that do not refuse; None where all refuse."""
    answered = [r.on_topic(t) for r, t in zip(requests, texts) if not tiny_figures.refused(t)]
    return round(sum(answered) / len(answered), 4) if answered else None


def measured(folder: Path) -> tuple[str, dict]:
    """(seed, table as a dict with an "on_topic" in every cell)."""
    figures, training = (
        json.loads((folder / name).read_text()) for name in ("figures.json", "training.json")
    )
    requests = data.tiny("test", N_TEST, N_TEST)
    sides = {
        "harmful": [r for r in requests if r.harmful],
        "harmless": [r for r in requests if not r.harmful],
    }
    with Model.from_pretrained(folder, progress=False) as model:
        vector = steering.difference_in_means(
            model, *data.tiny_pair("train"), progress=False
        ).select(*data.tiny_pair("validation"), progress=False)
        chosen = figures["chosen"]
        if (vector.layer, vector.position) != (chosen["layer"], chosen["position"]):
            raise SystemExit(
                f"{folder}: the engine chose layer {vector.layer}, position {vector.position},"
                f" transformers layer {chosen['layer']}, position {chosen['position']}"
            )
        start = time.perf_counter()
        table = freezing.ablation_table(
            model,
            vector,
            *([r.prompt for r in sides[s]] for s in ("harmful", "harmless")),
            tiny_card.strengths(figures["sweep"]["validation"]),
            max_new_tokens=MAX_NEW_TOKENS,
            progress=False,
        )
        print(
            f"{folder}: seed {training['seed']}, {time.perf_counter() - start:.1f}"
            f" s\n{table.to_markdown()}\n",
            flush=True,
        )
    out = table.to_dict()
    for name, row in out["rows"].items():
        for side, some in sides.items():
            row[side]["on_topic"] = on_topic(some, table.texts[name][side])
    return str(training["seed"]), out


def main() -> None:
    folder, seeds = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]]
    path = folder / "table1.json"
    tables = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(tables | dict(map(measured, seeds)), indent=1) + "\n")


if __name__ == "__main__":
    main()
