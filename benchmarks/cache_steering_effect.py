"""What cache steering does to two small models (docs/cache-steering.md).

    PYTHONPATH=python python benchmarks/cache_steering_effect.py --out benchmarks/results/neighbours

tiny-llama-chat: pairs of a request that the model answers and one that it refuses; how often
requests of either kind are answered under the edit, in both directions. SmolLM2-135M-Instruct:
worked examples against answers alone, on small sums in words; length of the answers, steps in them,
and how many are right.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import re
from pathlib import Path

import numpy as np
import peers

from vksteer import data, judge, kv
from vksteer.runtime.model import Model

#: Questions and their steps.
STORIES = {
    "Tom has {a} apples. He buys {b} more and eats {c}. How many apples does Tom have?": (
        "Tom starts with {a} apples. {a} + {b} = {s}. Without {c} there are {s} - {c} = {r}."
    ),
    "A bus carries {a} people. {b} get on and {c} get off. How many people are on the bus?": (
        "The bus starts with {a} people. {a} + {b} = {s}. Without {c} there are {s} - {c} = {r}."
    ),
    "Mia has {a} beads and finds {b} more. She gives {c} away. How many beads are left?": (
        "Mia starts with {a} beads. {a} + {b} = {s}. Without {c} there are {s} - {c} = {r}."
    ),
    "A shelf holds {a} books. Ann adds {b} and takes {c} away. How many books does it hold?": (
        "The shelf starts with {a} books. {a} + {b} = {s}. Without {c} there are {s} - {c} = {r}."
    ),
}


def sums(n: int, seed: int) -> list[tuple[str, str, str, int]]:
    """(question, steps, answer, result) of n small sums in words."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        a, b = (int(x) for x in rng.integers(2, 20, 2))
        numbers = {"a": a, "b": b, "c": int(rng.integers(1, a)), "s": a + b}
        numbers["r"] = a + b - numbers["c"]
        question, steps = list(STORIES.items())[i % len(STORIES)]
        answer = f"The answer is {numbers['r']}."
        found.append((question.format(**numbers), steps.format(**numbers), answer, numbers["r"]))
    return found


def smollm2(device, n_pairs: int = 16, n_test: int = 24) -> dict:
    with Model.from_pretrained(
        peers.MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf", device=device, progress=False
    ) as model:
        questions, steps, answers, _ = zip(*sums(n_pairs, 0), strict=True)
        pairs = kv.contrastive_prompts(model, questions, steps, answers, n_shot=3, seed=0)
        vector = kv.extract(model, *pairs, progress=False)
        test = sums(n_test, 1)
        prompts = [row[0] for row in test]
        rows = []
        for value in (0.0, 1.0, 2.0, 4.0, 8.0):
            edit = kv.CacheSteer(vector, value=value, append="\n")
            gens = model.generate(prompts, max_new_tokens=64, cache_edits=[edit], progress=False)
            texts = [g.text for g in gens]
            right = [
                bool(numbers := re.findall(r"\d+", text)) and int(numbers[-1]) == row[3]
                for text, row in zip(texts, test, strict=True)
            ]
            rows.append(
                {
                    "value": value,
                    "mean_tokens": float(np.mean([len(g.tokens) for g in gens])),
                    "with_steps": float(np.mean(["=" in text or "+" in text for text in texts])),
                    "right": float(np.mean(right)),
                    "texts": texts[:4],
                }
            )
        return {
            "model": model.name.rpartition("/")[2],
            "n_pairs": n_pairs,
            "n_test": n_test,
            "append": "\n",
            "max_new_tokens": 64,
            "rows": rows,
        }


def tiny(device, n_pairs: int = 64, n_test: int = 64) -> dict:
    with Model.from_pretrained("tiny-llama-chat", device=device, progress=False) as model:
        harmful, harmless = data.tiny_pair("train", n_pairs)
        vector = kv.extract(model, harmless, harmful, progress=False)
        asked = dict(zip(("refused", "answered"), data.tiny_pair("test", n_test), strict=True))
        rows = []
        for append in (None, "\n"):
            for value in (-16.0, -8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0, 16.0):
                edit = kv.CacheSteer(vector, value=value, append=append)
                row = {"append": append, "value": value}
                for kind, prompts in asked.items():
                    gens = model.generate(
                        prompts, max_new_tokens=48, cache_edits=[edit], progress=False
                    )
                    texts = [g.text for g in gens]
                    row[kind] = float(judge.attack_success_rate(texts))
                    row[f"{kind}_ended"] = float(np.mean([g.finish_reason == "stop" for g in gens]))
                    row[f"{kind}_texts"] = texts[:2]
                rows.append(row)
        return {"model": "tiny-llama-chat", "n_pairs": n_pairs, "n_test": n_test, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="as in Model.from_pretrained")
    parser.add_argument("--only", choices=["tiny", "smollm2"], default=None)
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    found = {
        name: experiment(arguments.device)
        for name, experiment in (("tiny", tiny), ("smollm2", smollm2))
        if arguments.only in (None, name)
    }
    for result in found.values():
        for row in result["rows"]:
            print({key: value for key, value in row.items() if "texts" not in key})
            print("   ", next(value for key, value in row.items() if "texts" in key))
    if arguments.out is not None:
        date = dt.date.today().isoformat()
        path = arguments.out / f"cache-steering-effect-{date}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"date": date, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
