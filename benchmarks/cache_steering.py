"""Cache-steered generation beside plain generation of the same prompts, in turns.

    PYTHONPATH=python python benchmarks/cache_steering.py --out benchmarks/results/neighbours

The edit takes 2 L small dispatches once, after the prompt, so that a generation may take at most
2 % longer. Both are timed in turns; a round's ratio is steered over plain, and the result is the
median over rounds, of wall time and of processor time. On a loaded machine these ratios scatter by
more than the edit takes, so it is timed by itself, too: edit and wait for the device, fastest of
many, as a share of the fastest plain generation.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import time
from pathlib import Path

import numpy as np
import peers
from timing import at_most

from vksteer import kv
from vksteer.runtime import cache_edits
from vksteer.runtime.batch import first_tokens
from vksteer.runtime.device import _engine
from vksteer.runtime.model import Model

#: Name: (source, prompts, tokens of a prompt, new tokens).
MODELS = {
    "tiny-llama-chat": ("tiny-llama-chat", 16, 64, 64),
    "SmolLM2-135M-Instruct": (peers.MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf", 4, 64, 32),
}
MOST = 1.02


def measure(name: str, device, rounds: int) -> list[dict]:
    """Rows of one model: ratios of wall and processor time."""
    source, n_prompts, length, new = MODELS[name]
    with Model.from_pretrained(source, device=device, progress=False) as model:
        rng = np.random.default_rng(0)
        c = model.config
        prompts = [rng.integers(0, c.d_vocab, length).tolist() for _ in range(n_prompts)]
        shape = (c.n_layers, c.n_kv_heads, c.d_head)
        vector = kv.CacheVector(0.1 * rng.standard_normal(shape), 0.1 * rng.standard_normal(shape))
        edit = kv.CacheSteer(vector, key=0.2, value=4.0)
        variants = {"plain": (), "steered": [edit]}
        run = lambda edits: model.generate(
            prompts, max_new_tokens=new, ignore_eos=True, cache_edits=edits, progress=False
        )
        for edits in variants.values():
            run(edits)
        times = {key: {"wall": [], "processor": []} for key in variants}
        for i in range(rounds):
            order = list(variants.items())
            for key, edits in order if i % 2 else order[::-1]:
                start = time.perf_counter(), time.process_time()
                run(edits)
                times[key]["wall"].append(time.perf_counter() - start[0])
                times[key]["processor"].append(time.process_time() - start[1])
        alone = edit_alone(model, edit, prompts)
        kernels, used = model.kernels, model.device.name
    rows = [
        at_most(
            f"the edit by itself over plain generation, {name}, {n_prompts} prompts of {length}"
            f" tokens, {new} new tokens, {kind} time, fastest of each",
            alone[kind] / min(times["plain"][kind]),
            MOST - 1,
            "x",
            edit_s=alone[kind],
            plain_s=min(times["plain"][kind]),
            device=used,
            kernels=list(kernels),
        )
        for kind in alone
    ]
    for kind in ("wall", "processor"):
        plain, steered = times["plain"][kind], times["steered"][kind]
        ratios = [s / p for s, p in zip(steered, plain, strict=True)]
        rows.append(
            at_most(
                f"cache-steered over plain generation, {name}, {n_prompts} prompts of {length}"
                f" tokens, {new} new tokens, {kind} time",
                statistics.median(ratios),
                MOST,
                "x",
                plain_s=statistics.median(plain),
                steered_s=statistics.median(steered),
                ratios=ratios,
                rounds=rounds,
                device=used,
                kernels=list(kernels),
            )
        )
    return rows


def edit_alone(model: Model, edit: kv.CacheSteer, prompts: list[list[int]]) -> dict[str, float]:
    """Seconds of one edit of all rows, device included, without what waiting alone takes."""
    rows = cache_edits.row_cache_edits(model, [edit], [list(p) for p in prompts], 1)
    slots = first_tokens([len(p) for p in prompts]).astype(np.uint32)
    one = np.zeros(1, np.uint32)
    found = {"wall": [], "processor": []}
    waits = {"wall": [], "processor": []}
    for _ in range(50):
        cache = _engine().Cache(model._engine, sum(map(len, prompts)))
        cache.read(one)
        for times, call in (
            (waits, lambda: None),
            (
                found,
                lambda: cache_edits.add_to_cache(
                    model,
                    cache,
                    rows,
                    list(slots[:, None]),
                    [False] * len(rows),
                ),
            ),
        ):
            start = time.perf_counter(), time.process_time()
            call()
            cache.read(one)
            times["wall"].append(time.perf_counter() - start[0])
            times["processor"].append(time.process_time() - start[1])
    return {kind: max(0.0, min(found[kind]) - min(waits[kind])) for kind in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None, help="as in Model.from_pretrained")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON file")
    arguments = parser.parse_args()
    rows = [
        row
        for name in arguments.models
        for row in measure(name, arguments.device, arguments.rounds)
    ]
    for row in rows:
        print(f"{row['value']:.4f} {row['target']} {row['what']}")
    if arguments.out is not None:
        date = dt.date.today().isoformat()
        path = arguments.out / f"cache-steering-{date}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"date": date, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
