"""Steerability curves and the reliability screen on SmolLM2, by wall and by processor time.

    reliability.py [--rounds N] [--items N] [--device D] [--name NAME]

- `steerability` over 7 coefficients, 2 answers and 40 items, against a loop in transformers whose
  forward hook adds each row's multiple of the vector, 32 rows at a time, and against one plain pass
  of the engine over the same 560 rows, without shared prefixes;
- `screen` over all layers with 64 + 64 prompts, against one pass that captures the same layers.

All take turns in one process and hold the same weights; figures are medians of the ratios of a
round.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import contrasts
import numpy as np
import peers
from layer_kinds import measured
from timing import at_least, at_most

import vksteer as vs
from vksteer.reliability.choices import COEFFICIENTS

LAYER, ROWS, PAIRS = 12, 32, 64
#: The two sides must compute the same: propensities may differ by this much. Largest measured 7e-5.
SAME = 1e-3
RESULTS = Path(__file__).resolve().parent / "results" / "neighbours"


def choices(n: int) -> list[contrasts.Choice]:
    """At most 40 items: a question with two answers."""
    train, test = contrasts.items("letter A / letter B")
    return (train + test)[:n]


def token_rows(model, items) -> tuple[list[list[int]], list[int]]:
    """(prompt with each answer, item by item, positive first; tokens before the answers)."""
    rows, first = [], []
    for item in items:
        for answer in (item.positive, item.negative):
            (row,) = model.chat_tokens([item.prompt], response=[answer])
            rows.append([int(t) for t in row])
            (prompt,) = model.chat_tokens([item.prompt])
            first.append(len(prompt))
    return rows, first


def transformers_loop(torch_model, rows, first, direction, coefficients):
    """Propensities [items, coefficients] by a loop over batches of padded rows."""
    import torch

    jobs = [
        (row, start, a)
        for i in range(0, len(rows), 2)
        for a in coefficients
        for row, start in zip(rows[i : i + 2], first[i : i + 2], strict=True)
    ]
    v, strength = torch.tensor(direction), {}

    def add(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden += strength["a"][:, None, None] * v
        return output

    handle = torch_model.model.layers[LAYER - 1].register_forward_hook(add)
    sums = []
    try:
        with torch.no_grad():
            for at in range(0, len(jobs), ROWS):
                some = jobs[at : at + ROWS]
                width = max(len(row) for row, _, _ in some)
                ids = torch.zeros((len(some), width), dtype=torch.long)
                mask = torch.zeros_like(ids)
                for i, (row, _, _) in enumerate(some):
                    ids[i, : len(row)] = torch.tensor(row)
                    mask[i, : len(row)] = 1
                strength["a"] = torch.tensor([a for _, _, a in some])
                logits = torch_model(input_ids=ids, attention_mask=mask).logits
                for i, (row, start, _) in enumerate(some):
                    logp = torch.log_softmax(logits[i, start - 1 : len(row) - 1].double(), -1)
                    sums.append(float(logp[range(len(row) - start), row[start:]].sum()))
    finally:
        handle.remove()
    pairs = np.array(sums).reshape(-1, len(coefficients), 2)
    return pairs[..., 0] - pairs[..., 1]


def in_turns(calls: dict, rounds: int) -> dict[str, list[tuple[float, float]]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(measured(call))
    return times


def ratio(times: dict, over: str, under: str, kind: int) -> float:
    """The median of the rounds' ratios. kind: 0 wall time, 1 processor time."""
    return statistics.median(
        a[kind] / b[kind] for a, b in zip(times[over], times[under], strict=True)
    )


def seconds(times: dict) -> dict:
    return {
        name: {
            "wall_s": statistics.median(t[0] for t in some),
            "processor_s": statistics.median(t[1] for t in some),
        }
        for name, some in times.items()
    }


def steerability(model, torch_model, rounds: int, n: int) -> list[dict]:
    items = choices(n)
    rows, first = token_rows(model, items)
    direction = np.random.default_rng(0).standard_normal(model.config.d_model)
    vector = vs.SteeringVector(direction.astype(np.float32), LAYER)

    def ours():
        model._layer_inputs._kept.clear()  # every round runs the layers below again
        model._layer_inputs._bytes = 0
        return vs.reliability.steerability(model, items, vector, progress=False).propensity

    def theirs():
        return transformers_loop(torch_model, rows, first, vector.direction, COEFFICIENTS)

    model.run(rows[:2], logits="last")  # kernels are compiled at first use
    many = [row for i in range(0, len(rows), 2) for _ in COEFFICIENTS for row in rows[i : i + 2]]
    difference = float(np.abs(ours() - theirs()).max())
    if difference > SAME:
        raise RuntimeError(f"the two sides do not compute the same: {difference:.2g} apart")
    calls = {
        "steerability": ours,
        "transformers": theirs,
        "plain": lambda: model.run(many, logits="last"),
    }
    times = in_turns(calls, rounds)
    details = dict(
        rows=len(many),
        tokens=sum(map(len, many)),
        largest_difference=difference,
        seconds=seconds(times),
        n=rounds,
    )
    what = f"steerability, {len(COEFFICIENTS)} coefficients x 2 answers x {len(items)} items"
    found = []
    for name, over, under, bound, limit in (
        (f"{what}, against transformers", "transformers", "steerability", at_least, 3),
        (f"{what}, over one plain pass", "steerability", "plain", at_most, 2),
    ):
        wall, used = (ratio(times, over, under, kind) for kind in (0, 1))
        found.append(bound(name, used, limit, "x", wall_time_ratio=wall, **details))
    return found


def screen(model, rounds: int) -> list[dict]:
    pairs = []
    for name in ("good / bad review", "French / English"):
        train, test = contrasts.items(name)
        pairs += train + test
    pairs = pairs[:PAIRS]
    sides = [contrasts.answered(model, pairs, name) for name in ("positive", "negative")]
    sites = [f"blocks.{l}.hook_resid_pre" for l in range(model.config.n_layers)]
    calls = {
        "screen": lambda: vs.reliability.screen(model, *sides, progress=False),
        "captured pass": lambda: model.run(sides[0] + sides[1], capture=sites, logits=None),
    }
    vs.reliability.screen(model, *(side[:4] for side in sides), progress=False)
    model.run(sides[0][:2], capture=sites, logits=None)  # kernels are compiled at first use
    times = in_turns(calls, rounds)
    wall, used = (ratio(times, "screen", "captured pass", kind) for kind in (0, 1))
    what = f"screen of {len(sites)} layers, {PAIRS} + {PAIRS} prompts, over one captured pass"
    details = dict(wall_time_ratio=wall, seconds=seconds(times), n=rounds)
    return [at_most(what, used, 1.1, "x", **details)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--device")
    parser.add_argument("--only", nargs="+", default=["steerability", "screen"])
    parser.add_argument("--name", help="write benchmarks/results/neighbours/NAME.json")
    arguments = parser.parse_args()
    folder = str(peers.safetensors_folder())
    rows = []
    with vs.Model.from_pretrained(folder, device=arguments.device, progress=False) as model:
        if "screen" in arguments.only:
            rows += screen(model, arguments.rounds)
        if "steerability" in arguments.only:
            peer = peers.torch_model(folder, "float32")
            rows += steerability(model, peer, arguments.rounds, arguments.items)
        result = {"device": model.device.name, "version": vs.__version__, "rows": rows}
    print(json.dumps(result, indent=1))
    if arguments.name:
        (RESULTS / f"{arguments.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
