"""Two trees beside each other: is this one slower than that one?

Runs the same work in both, in turns, each turn in a process of its own, and prints for every kind
of work the median over the rounds of (time here / time there), by wall and by processor time.
Single times of a shared machine mean little; a ratio of neighbours in time means more.

    python benchmarks/paired.py OTHER_TREE [--rounds N] [--model MODEL] [--out FILE.json]

OTHER_TREE: a checkout in which `make engine` has run, for example of the commit before a change
(`git worktree add ../before COMMIT`). Both trees are driven by this Python with their own package
on the path; only calls of the public API are used, so that trees of different layout compare.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"

#: What a child does: prints {work: [wall seconds, processor seconds]}.
WORK = """
import json, sys, time
t = time.perf_counter(), time.process_time()
import vksteer as vs
took = {"import": [time.perf_counter() - t[0], time.process_time() - t[1]]}
import numpy as np


def measure(name, call, times):
    call()
    start = time.perf_counter(), time.process_time()
    for _ in range(times):
        call()
    took[name] = [
        (time.perf_counter() - start[0]) / times,
        (time.process_time() - start[1]) / times,
    ]


start = time.perf_counter(), time.process_time()
model = vs.Model.from_pretrained(sys.argv[1], progress=False)
took["load"] = [time.perf_counter() - start[0], time.process_time() - start[1]]
random = np.random.default_rng(0)
prompt = random.integers(3, model.config.d_vocab, 128).tolist()
measure("prefill of 128 tokens", lambda: model.run([prompt], logits="last"), 3)


def decode(rows, **options):
    model.generate(
        [prompt[:16]] * rows, max_new_tokens=32, ignore_eos=True, progress=False, **options
    )


layer = model.config.n_layers // 2
vector = vs.SteeringVector(random.standard_normal(model.config.d_model), layer)
measure("decoding, 1 row", lambda: decode(1), 2)
measure("decoding, 8 rows", lambda: decode(8), 2)
frozen = {"edits": [vs.Steer(vector, 1.0)], "freeze": "qk"}
measure("frozen decoding, 1 row", lambda: decode(1, **frozen), 2)
samples = [vs.patching.Sample(prompt[:40], prompt[40:64])]
options = {"steps": 5, "progress": False}
measure("attribution", lambda: vs.patching.attribute(model, samples, vector, 1.0, **options), 2)
model.close()
print(json.dumps(took))
"""


def child(tree: Path, model: str) -> dict[str, list[float]]:
    """One turn in one tree."""
    env = os.environ | {"PYTHONPATH": str(tree / "python")}
    env.setdefault("VKSTEER_KERNELS", "texels")
    command = [sys.executable, "-W", "ignore", "-c", WORK, model]
    done = subprocess.run(command, env=env, cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: {done.stderr}")
    return json.loads(done.stdout)


def turns(other: Path, model: str, rounds: int) -> list[dict[str, tuple[float, float]]]:
    """For every round the ratios here / there; the order changes from round to round."""
    child(ROOT, model), child(other, model)  # compiled kernels are stored by the first run
    found = []
    for i in range(rounds):
        order = (ROOT, other) if i % 2 else (other, ROOT)
        took = {tree: child(tree, model) for tree in order}
        found.append(
            {
                name: tuple(a / b for a, b in zip(took[ROOT][name], took[other][name], strict=True))
                for name in took[ROOT]
            }
        )
        print(f"round {i + 1} of {rounds}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the speed of two trees, in turns.")
    parser.add_argument("other", type=Path, help="a built checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--model", default=None, help="default: SmolLM2, where it was fetched")
    parser.add_argument("--out", type=Path, help="also write the ratios as JSON")
    arguments = parser.parse_args()
    model = arguments.model or (str(SMOLLM2) if SMOLLM2.exists() else "tiny-llama-chat")
    found = turns(arguments.other.resolve(), model, arguments.rounds)
    medians = {
        name: [statistics.median(r[name][i] for r in found) for i in (0, 1)] for name in found[0]
    }
    print("| work | wall, here / there | processor time, here / there |\n|:---|---:|---:|")
    for name, (wall, processor) in medians.items():
        print(f"| {name} | {wall:.2f}x | {processor:.2f}x |")
    if arguments.out:
        content = {"model": Path(model).name, "medians": medians, "rounds": found}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
