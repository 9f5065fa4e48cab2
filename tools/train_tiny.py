"""Trains the bundled tiny chat models on the village world (`vksteer.data.world`), on the CPU, in
minutes.

    .venv/bin/python tools/train_tiny.py --model gemma --seed 1 --out out/gemma-1
    .venv/bin/python tools/train_tiny.py --figures out/gemma-1   # only measures an existing folder

Writes an ordinary Hugging Face folder (bf16 weights, tokenizer, chat template), `training.json`
(recipe, seed, loss log) and `figures.json`: unsteered accuracy, the steering vector that the
paper's filters choose, and steering in both directions for several coefficients. Nothing here
freezes or ablates a component: seed and recipe are chosen by these figures alone. The measurement
is in `tools/tiny_figures.py`; it uses transformers and the stored bf16 weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import time
from pathlib import Path

import tiny_figures
import torch
import torch.nn.functional as F
from tiny_net import Net, save
from tiny_recipe import RECIPES, Recipe
from tiny_samples import Sampler, collate
from tiny_tokenizer import build_tokenizer
from tiny_world import world
from torch import nn


class Log:
    """The loss log: means over the steps since the last entry."""

    def __init__(self):
        self.entries, self.started, self.n_tokens = [], time.time(), 0
        self._clear()

    def _clear(self) -> None:
        self.running = []
        # Loss of the one token that decides: ln 2 until the exclusive-or is learnt.
        self.deciding = {"verdict": [], "refusal": []}

    def add(self, loss: float, losses, weights, samples, places) -> None:
        """losses, weights: [B, S], of each target; places: of each sample, as `collate` gives."""
        self.n_tokens += int((weights > 0).sum())
        self.running.append(loss)
        for x, (row, at) in zip(samples, places):
            if x.decides:
                kind = "refusal" if x.chat else "verdict"
                self.deciding[kind].append(losses[row, at + x.decides - 1].item())

    def write(self, step: int, penalty: float) -> None:
        """Ends an entry after `step` steps and prints it."""
        entry = {
            "step": step,
            "loss": round(sum(self.running) / len(self.running), 4),
            **{k: round(sum(v) / max(1, len(v)), 4) for k, v in self.deciding.items()},
            "penalty": round(penalty, 4),
            "seconds": round(time.time() - self.started, 1),
            "tokens": self.n_tokens,
        }
        self.entries.append(entry)
        self._clear()
        print(json.dumps(entry), flush=True)


def optimizer(net: Net, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    decayed = [p for p in net.parameters() if p.dim() == 2]
    rest = [p for p in net.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(0.9, 0.95),
        fused=True,
    )


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    return recipe.lr * (
        min(1.0, (step + 1) / recipe.warmup)
        * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps)))
    )


def train(recipe: Recipe, seed: int, out: Path) -> None:
    """Trains a model and writes its folder: weights, tokenizer, configuration, training.json."""
    torch.manual_seed(seed)
    random.seed(seed)
    tok = build_tokenizer(recipe.family, recipe.vocab, out)
    sampler = Sampler(tok, recipe, random.Random(f"samples {seed}"))
    net = Net(recipe)
    n_params = sum(p.numel() for p in net.parameters())
    opt, log = optimizer(net, recipe), Log()
    print(
        f"{recipe.family}: {n_params:,} parameters, seed {seed}, after-instruction tokens"
        f" {sampler.encode(sampler.after)}",
        flush=True,
    )
    for step, samples in enumerate(sampler.batches(recipe.steps)):
        tokens, targets, weights, positions, visible, places = collate(samples, tok.pad_token_id)
        for group in opt.param_groups:
            group["lr"] = learning_rate(recipe, step)
        net.jolts = recipe.jolt > 0 and step >= recipe.jolt_from
        logits, penalty = net(tokens, positions, visible)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
            targets.shape
        )
        loss = (losses * weights).sum() / weights.sum()
        (loss + recipe.size_penalty * penalty).backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        opt.step()
        opt.zero_grad(set_to_none=True)
        log.add(loss.item(), losses, weights, samples, places)
        if step % 100 == 99 or step == recipe.steps - 1:
            log.write(step + 1, penalty.item())
    save(net.eval(), tok, out)
    content = {
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "parameters": n_params,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "log": log.entries,
    }
    (out / "training.json").write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", choices=RECIPES)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--out", type=Path)
    p.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one entry of the recipe",
    )
    p.add_argument("--threads", type=int, default=1)
    p.add_argument(
        "--figures", type=Path, metavar="FOLDER", help="measure this folder again; trains nothing"
    )
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.figures:
        tiny_figures.write(args.figures, world)
        return
    if not (args.model and args.out):
        p.error("--model and --out are needed")
    changes = {}
    for item in args.set:
        name, value = item.split("=")
        changes[name] = type(getattr(RECIPES[args.model], name))(value)
    train(dataclasses.replace(RECIPES[args.model], **changes), args.seed, args.out)
    tiny_figures.write(args.out, world)


if __name__ == "__main__":
    main()
