"""Whole experiments: difference in means with selection, and Table 1, on the bundled models; on
request the former on Qwen 0.5B beside PyTorch.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import peers
from timing import at_least, at_most, seconds

from vksteer import data, freezing, steering
from vksteer.demo import qwen as demo_real
from vksteer.loading import model_files as source
from vksteer.runtime.model import Model


def tiny(device) -> list[dict]:
    """Time of difference in means over all candidates and selection (64 + 64, 32 + 32 prompts), and
    of Table 1 (100 + 100, 72 tokens), on both bundled models.
    """
    train, validation, test = (
        data.tiny_pair("train", 64),
        data.tiny_pair("validation", 32),
        data.tiny_pair("test", 100),
    )
    rows = []
    for name in source.BUNDLED:
        if not (Path(source.__file__).parent / "models" / name / "model.safetensors").exists():
            print(f"{name} is not in this tree: its rows are left out")
            continue
        with Model.from_pretrained(name, device=device, progress=False) as model:
            model.generate(train[0][:2], max_new_tokens=4, progress=False)  # kernels are compiled
            start = time.perf_counter()
            cands = steering.difference_in_means(model, *train, progress=False)
            means = time.perf_counter() - start
            vector = cands.select(*validation, progress=False)
            selection = time.perf_counter() - start
            strengths = strengths_of(name)
            table = seconds(
                lambda: freezing.ablation_table(
                    model, vector, *test, strengths, max_new_tokens=72, progress=False
                )
            )
        rows += [
            at_most(
                f"difference in means and selection, {name}, 64 + 64 and 32 + 32 prompts",
                selection,
                20,
                "s",
                means_s=means,
                layer=vector.layer,
                position=vector.position,
            ),
            at_most(
                f"Table 1, {name}, 100 + 100 prompts, 72 tokens, 10 rows",
                table,
                60,
                "s",
                coefficient=strengths,
            ),
        ]
    return rows


def strengths_of(name: str) -> tuple[float, float]:
    """(plus, minus) of the bundled model's own Table 1. Stronger steering breaks the texts, which
    then run to the last token and take longer.
    """
    folder = Path(source.__file__).parent / "models" / name
    seed = json.loads((folder / "training.json").read_text())["seed"]
    return tuple(
        json.loads((folder / "table1.json").read_text())[str(seed)]["setting"]["coefficient"]
    )


def qwen(device, n_train: int = 16, n_validation: int = 4) -> list[dict]:
    """Means and scores of three layers of candidates on Qwen 0.5B, beside a PyTorch loop that runs
    whole forward passes for every candidate.
    """
    from types import SimpleNamespace

    import torch

    splits = demo_real.prompts(SimpleNamespace(harmful=None, harmless=None))
    cut = lambda pair, n: tuple(side[:n] for side in pair)
    train, validation = cut(splits["train"], n_train), cut(splits["validation"], n_validation)
    path = peers.MODELS / demo_real.QWEN
    with Model.from_pretrained(path, device=device, progress=False) as model:
        rows = [model.chat_tokens(list(side)) for side in (*train, *validation)]
        ids = [int(np.argmax(model.run([rows[0][0]], logits="last").logits[0]))]
        start = time.perf_counter()
        cands = steering.difference_in_means(
            model, *train, positions=demo_real.POSITIONS, progress=False
        )
        scores = cands.evaluate(
            *validation, refusal_tokens=ids, layers=demo_real.LAYERS, progress=False
        )
        ours = time.perf_counter() - start
    peer = (
        peers.quiet()
        .AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        .eval()
    )
    start = time.perf_counter()
    kept = Loop(peer).bypass(rows, ids)
    theirs = time.perf_counter() - start
    ours_bypass = scores.bypass[:, list(demo_real.LAYERS)]
    return [
        at_least(
            f"three layers of candidates on Qwen 0.5B against a PyTorch loop ({n_train} +"
            f" {n_train}, {n_validation} + {n_validation} prompts)",
            theirs / ours,
            1,
            ours_s=ours,
            peer_s=theirs,
            largest_difference_of_bypass=float(np.abs(ours_bypass - kept).max()),
        )
    ]


class Loop:
    """What a straightforward PyTorch script does: hooks, padded batches, whole forward passes."""

    def __init__(self, peer):
        import torch

        self.torch, self.peer, self.blocks = torch, peer, peer.model.layers

    def logits(self, rows, hooks=()):
        """Last logits [n, V] of left-padded rows, in batches of 16. hooks: (module, hook, whether
        it runs before the module).
        """
        torch = self.torch
        handles = [
            module.register_forward_pre_hook(h) if pre else module.register_forward_hook(h)
            for module, h, pre in hooks
        ]
        out = []
        with torch.inference_mode():
            for i in range(0, len(rows), 16):
                part = rows[i : i + 16]
                width = max(map(len, part))
                ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in part])
                mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in part])
                made = self.peer(
                    input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False
                )
                out.append(made.logits[:, -1].double())
        for handle in handles:
            handle.remove()
        return torch.cat(out)

    def mean(self, rows):
        """Mean residual streams [P, len(LAYERS), D] of some rows, float64."""
        layers, positions = demo_real.LAYERS, demo_real.POSITIONS
        shape = len(positions), len(layers), self.peer.config.hidden_size
        sums = self.torch.zeros(shape, dtype=self.torch.float64)

        def keep(j):
            def hook(module, args, kwargs=None):
                sums[:, j] += args[0][:, list(positions)].double().sum(0)

            return hook

        self.logits(rows, [(self.blocks[l], keep(j), True) for j, l in enumerate(layers)])
        return sums / len(rows)

    def steer(self, layer: int, v):
        """Hooks that add v before one layer."""
        return [(self.blocks[layer], lambda module, args: (args[0] + v, *args[1:]), True)]

    def ablate(self, v):
        """Hooks that remove the direction of v before every layer, and from what it writes."""
        u = v / v.norm()
        project = lambda x: x - (x @ u)[..., None] * u
        first = lambda out: (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)
        hooks = [(b, lambda m, args: (project(args[0]), *args[1:]), True) for b in self.blocks]
        parts = [part for b in self.blocks for part in (b.self_attn, b.mlp)]
        return hooks + [(part, lambda m, args, out: first(out), False) for part in parts]

    def odds(self, logits, refusal) -> float:
        """Mean log odds of the refusal tokens."""
        logsumexp = self.torch.logsumexp
        others = [i for i in range(logits.shape[1]) if i not in refusal]
        return float((logsumexp(logits[:, refusal], -1) - logsumexp(logits[:, others], -1)).mean())

    def bypass(self, rows, refusal) -> np.ndarray:
        """Bypass scores [P, len(LAYERS)]; all other scores of a candidate are computed too."""
        difference = (self.mean(rows[0]) - self.mean(rows[1])).float()
        harmful, harmless = rows[2], rows[3]
        log_p = lambda logits: self.torch.log_softmax(logits, -1)
        base = log_p(self.logits(harmless))
        self.logits(harmful)
        found = np.zeros(difference.shape[:2])
        for p, j in np.ndindex(found.shape):
            layer, v = demo_real.LAYERS[j], difference[p, j]
            ablate = self.ablate(v)
            found[p, j] = self.odds(self.logits(harmful, self.steer(layer, -v)), refusal)
            self.odds(self.logits(harmless, self.steer(layer, v)), refusal)
            (base.exp() * (base - log_p(self.logits(harmless, ablate)))).sum(-1).mean()
            self.odds(self.logits(harmful, ablate), refusal)
        return found
