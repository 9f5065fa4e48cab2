"""The scientific calls: difference in means with selection, and Table 1, on the bundled models; on
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
    """(plus, minus) with which the bundled model's own Table 1 was made: broken texts would run to
    the last token and take longer.
    """
    folder = Path(source.__file__).parent / "models" / name
    seed = json.loads((folder / "training.json").read_text())["seed"]
    return tuple(
        json.loads((folder / "table1.json").read_text())[str(seed)]["setting"]["coefficient"]
    )


def qwen(device, n_train: int = 16, n_validation: int = 4) -> list[dict]:
    """Means and scores of three layers of candidates on Qwen 0.5B, beside a PyTorch loop that
    recomputes whole forwards (one candidate, all prompts).
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
    kept = _loop(peer, rows, ids)
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


def _loop(peer, rows, refusal) -> np.ndarray:
    """What a straightforward script does: hooks, batches of one length class, every forward whole.
    Returns bypass [P, len(LAYERS)].
    """
    import torch

    layers, positions = demo_real.LAYERS, demo_real.POSITIONS
    blocks = peer.model.layers

    def forward(some, hooks=()):
        """Last logits of left-padded rows, in batches of 16."""
        handles = [
            module.register_forward_pre_hook(h) if pre else module.register_forward_hook(h)
            for module, h, pre in hooks
        ]
        out = []
        with torch.inference_mode():
            for i in range(0, len(some), 16):
                part = some[i : i + 16]
                width = max(map(len, part))
                ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in part])
                mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in part])
                out.append(
                    peer(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
                    .logits[:, -1]
                    .double()
                )
        for handle in handles:
            handle.remove()
        return torch.cat(out)

    def mean(some):
        sums = torch.zeros(
            len(positions), len(layers), peer.config.hidden_size, dtype=torch.float64
        )

        def keep(j):
            def hook(module, args, kwargs=None):
                sums[:, j] += args[0][:, list(positions)].double().sum(0)

            return hook

        forward(some, [(blocks[l], keep(j), True) for j, l in enumerate(layers)])
        return sums / len(some)

    difference = (mean(rows[0]) - mean(rows[1])).float()
    harmful, harmless = rows[2], rows[3]
    metric = lambda logits: float(
        (
            torch.logsumexp(logits[:, refusal], -1)
            - torch.logsumexp(
                logits[:, [i for i in range(logits.shape[1]) if i not in refusal]], -1
            )
        ).mean()
    )
    base = torch.log_softmax(forward(harmless), -1)
    forward(harmful)
    bypass = np.zeros(difference.shape[:2])
    for p in range(len(positions)):
        for j, l in enumerate(layers):
            v = difference[p, j]
            u = v / v.norm()
            steer = lambda a: [(blocks[l], lambda module, args: (args[0] + a * v, *args[1:]), True)]
            project = lambda x: x - (x @ u)[..., None] * u
            first = lambda out: (
                (project(out[0]), *out[1:]) if isinstance(out, tuple) else project(out)
            )
            ablate = [(b, lambda module, args: (project(args[0]), *args[1:]), True) for b in blocks]
            ablate += [
                (m, lambda module, args, out: first(out), False)
                for b in blocks
                for m in (b.self_attn, b.mlp)
            ]
            bypass[p, j] = metric(forward(harmful, steer(-1.0)))
            metric(forward(harmless, steer(1.0)))
            (base.exp() * (base - torch.log_softmax(forward(harmless, ablate), -1))).sum(-1).mean()
            metric(forward(harmful, ablate))
    return bypass
