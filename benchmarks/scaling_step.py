"""One step of activation scaling against one gradient call, on SmolLM2.

    scaling_step.py [--rounds N] [--prompts N] [--length N] [--device D] [--name NAME]

A step runs every prompt twice, once for each sign of beta. It is compared with `model.gradients` of
the same rows at the same sites, for the difference of two logits and for a KL divergence, and with
the difference of two logits for every prompt once. All take turns in one process; figures are
medians of the ratios of a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
from layer_kinds import measured
from timing import at_most, row

import vksteer as vs
from vksteer.scaling.objective import Objective
from vksteer.scaling.task import SITES, Weights, make_task

RESULTS = Path(__file__).resolve().parent / "results" / "neighbours"
MODEL = Path(__file__).resolve().parent.parent / ".models" / "smollm2-bf16"


def calls(model, prompts, a: int, b: int, dynamic: bool) -> dict:
    """Name -> call without arguments."""
    task = make_task(model, prompts, a, b, SITES, dynamic, True)
    objective = Objective(model, task, Weights(1.0, 1.0, 0.01))
    rng = np.random.default_rng(0)
    parameters = 0.01 * rng.standard_normal(task.shape(model.config.d_model))
    both = [p for p in prompts for _ in range(2)]
    logits = model.run(prompts, logits="last").logits
    kl = [vs.KL(logits[i], [-1]) for i in range(len(prompts)) for _ in range(2)]
    sites = [f"blocks.*.{site}" for site in SITES]
    gradients = lambda rows, of: model.gradients(rows, of=of, at=sites, progress=False)
    pair = vs.LogitDiff(-1, a, b)
    return {
        "step": lambda: objective(parameters),
        "gradients": lambda: gradients(both, pair),
        "gradients of a KL": lambda: gradients(both, kl),
        "gradients, prompts once": lambda: gradients(prompts, pair),
    }


def compare(model, prompts, rounds: int, dynamic: bool) -> list[dict]:
    made = calls(model, prompts, 5, 9, dynamic)
    for call in made.values():
        call()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, call in made.items():
            seconds[name].append(measured(call))
    form = "dynamic" if dynamic else "static"
    found = []
    for clock, index in (("wall", 0), ("processor", 1)):
        for name in list(made)[1:]:
            ratios = [
                ours[index] / theirs[index]
                for ours, theirs in zip(seconds["step"], seconds[name], strict=True)
            ]
            what = f"{form} step / {name}, {clock} time"
            value = statistics.median(ratios)
            details = {"ratios": ratios}
            if name == "gradients, prompts once":
                found.append(row(what, value, "x", **details))
            else:
                found.append(at_most(what, value, 1.3, "x", **details))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--length", type=int, default=16)
    parser.add_argument("--device")
    parser.add_argument("--name", default="scaling-step")
    given = parser.parse_args()
    model = vs.Model.from_pretrained(MODEL, device=given.device, progress=False)
    rng = np.random.default_rng(0)
    prompts = rng.integers(10, model.config.d_vocab, (given.prompts, given.length)).tolist()
    rows = [r for dynamic in (False, True) for r in compare(model, prompts, given.rounds, dynamic)]
    for r in rows:
        print(f"{r['what']:60} {r['value']:.3f} {r['target']}")
    result = {
        "device": model.device.name,
        "driver": model.device.driver,
        "kernels": list(model.kernels),
        "version": vs.__version__,
        "prompts": given.prompts,
        "length": given.length,
        "rounds": given.rounds,
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{given.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
