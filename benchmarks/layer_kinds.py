"""Other kinds of layers beside SmolLM2: GPT-2 124M and Pythia 160M with random weights, as time for
each float operation of a prefill and for each byte that a decoding step reads. The models take
turns in one process.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import at_most

from vksteer.runtime import ceilings

PROMPT, NEW, MOST = 128, 24, 1.15
CLASSES = {
    "gpt2-124m": ("GPT2Config", {}),
    "pythia-160m": (
        "GPTNeoXConfig",
        dict(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            vocab_size=50304,
            max_position_embeddings=2048,
            rotary_pct=0.25,
            tie_word_embeddings=False,
        ),
    ),
}


def build(name: str, folder: Path) -> Path:
    """Random weights of the model's shape, stored as bfloat16."""
    import torch
    import transformers

    cls, arguments = CLASSES[name]
    torch.manual_seed(0)
    config = getattr(transformers, cls)(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / name)
    return folder / name


def measured(call) -> tuple[float, float]:
    """(wall seconds, processor seconds of all threads)."""
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, used


def in_turns(models: dict, work, rounds: int) -> dict[str, list[tuple[float, float]]]:
    for model in models.values():
        work(model)  # kernels are compiled at first use
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(measured(lambda model=model: work(model)))
    return times


def ratios(times: dict, units: dict, name: str) -> tuple[float, float]:
    """Time for each unit over SmolLM2's, by wall and by processor time: medians of the rounds."""
    each = []
    for kind in (0, 1):
        per_round = [
            (mine[kind] / units[name]) / (theirs[kind] / units["smollm2"])
            for mine, theirs in zip(times[name], times["smollm2"], strict=True)
        ]
        each.append(statistics.median(per_round))
    return each[0], each[1]


def run(smollm2: str, rounds: int = 5, device=None) -> list[dict]:
    """Rows of a result: two for each model. smollm2: its folder."""
    import vksteer as vs

    prompt = np.random.default_rng(0).integers(1000, 20_000, PROMPT).tolist()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources = {"smollm2": smollm2} | {n: str(build(n, Path(folder))) for n in CLASSES}
        models = {
            name: vs.Model.from_pretrained(source, device=device, progress=False)
            for name, source in sources.items()
        }
        prefill = in_turns(models, lambda m: m.run([prompt], logits="last"), rounds)
        decode = in_turns(
            models,
            lambda m: m.generate(
                [prompt[:16]], max_new_tokens=NEW, ignore_eos=True, progress=False
            ),
            rounds,
        )
        operations = {n: ceilings.prefill_operations(m, PROMPT) for n, m in models.items()}
        read = {n: ceilings.decode_bytes(m, 16 + NEW / 2) for n, m in models.items()}
        for name in CLASSES:
            for what, times, units in (
                (
                    f"{name}: prefill of {PROMPT} tokens, time per operation over SmolLM2's",
                    prefill,
                    operations,
                ),
                (f"{name}: decoding, time per byte over SmolLM2's", decode, read),
            ):
                wall, used = ratios(times, units, name)
                rows.append(at_most(what, wall, MOST, "x", processor_time_ratio=used, n=rounds))
    return rows


if __name__ == "__main__":
    import argparse
    import json

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("smollm2", help="folder of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(json.dumps(run(arguments.smollm2, arguments.rounds), indent=1))
