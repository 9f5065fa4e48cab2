"""Makes, or goes on with, the study of Qwen2.5-Coder-0.5B-Instruct of docs/results in OUT.

    study_qwen.py OUT [--budget 107m] [--plan]

Prompts: the 128 pairs of acts of the demo, in written forms. Of every eight acts three train (the
first 16 of these in a second form too), one validates and four test: 64 + 64, 16 + 16 and 64 + 64.
The model comes from `fetch_model.py qwen`.
"""

import argparse
from pathlib import Path

from fetch_model import FOLDER, MODELS

import vksteer as vs
from vksteer.demo.report import written

SPLITS = {"train": (1, 3, 5), "validation": (7,), "test": (0, 2, 4, 6)}  # of every eight acts
AGAIN = 16  # so many of the training acts are asked in two forms


def splits(side: int) -> dict[str, list[str]]:
    """Prompts of one kind by split; side 0: harmful, 1: harmless."""
    prompts = written()
    forms, acts = prompts["forms"], [pair[side] for pair in prompts["acts"]]

    def asked(split: str, shift: int) -> list[str]:
        chosen = [i for i in range(len(acts)) if i % 8 in SPLITS[split]]
        return [forms[(i // 2 + shift) % len(forms)].format(acts[i]) for i in chosen]

    found = {split: asked(split, 0) for split in SPLITS}
    found["train"] += asked("train", 1)[:AGAIN]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--budget", default="107m")
    parser.add_argument("--plan", action="store_true", help="only say what would run")
    args = parser.parse_args()
    model = str(FOLDER / MODELS["qwen"].file)
    study = vs.study.run(
        model, splits(0), splits(1), args.out, budget=args.budget, plan_only=args.plan
    )
    print(study.plan() if args.plan else study)


if __name__ == "__main__":
    main()
