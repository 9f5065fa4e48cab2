"""Trains a small sparse autoencoder on the residual stream of a bundled model.

    .venv/bin/python tools/train_sae.py [--model tiny-llama-chat] [--layer 7] [--out FOLDER]

BatchTopK in PyTorch, float32, on the CPU: of a batch of tokens the k * batch largest max(u, 0) are
kept, so that k features are active at a token on average. What training measured as the smallest
kept activation becomes the one threshold, and the result is stored as a JumpReLU autoencoder in the
form of SAELens: cfg.json and sae_weights.safetensors. Features that have not been active for
a while predict what the others leave (the auxiliary loss of Gao et al., 2024).

The stream comes from the engine: requests of the village's training split, each with an answer that
complies and one that refuses. The first token of a text is left out. Activations are divided by
their root mean square for training; the factor is folded into the arrays afterwards. report.json
beside the weights says seed, recipe, losses and the figures on the test split. Minutes on a core.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "python"))

import vksteer as vs  # noqa: E402  found through sys.path above
from vksteer.data import world  # noqa: E402

RECIPE = {
    "seed": 1,
    "features": 512,
    "k": 12,
    "requests": 800,
    "batch": 1024,
    "steps": 1600,
    "lr": 2e-3,
    "warmup": 100,
    "decay_from": 1200,
    "dead_after": 40,
    "auxiliary": 1 / 32,
    "auxiliary_features": 64,
}


def texts(split: str, n: int, seed: int) -> tuple[list[str], list[str]]:
    """(prompts, responses): each request with an answer that complies and one that refuses."""
    rng = random.Random(f"sae {split} {seed}")
    prompts, responses = [], []
    while len(prompts) < 2 * n:
        request = world.draw_request(rng, split)
        if request.kind != "howto":
            prompts.append(request.prompt)
            responses.append(world.comply(request, rng))
            continue
        prompts += [request.prompt] * 2
        responses += [world.comply(request, rng), world.refuse(request, rng)]
    return prompts, responses


def stream(model: vs.Model, site: str, prompts: list[str], responses: list[str]) -> np.ndarray:
    """Activations of all tokens but each text's first, [tokens, D]."""
    parts = []
    for first in range(0, len(prompts), 64):
        some = slice(first, first + 64)
        run = model.run(prompts[some], responses[some], capture=[site], logits=None)
        keep = run.mask.copy()
        keep[np.arange(len(keep)), run.mask.argmax(axis=1)] = False
        parts.append(run[site][keep])
    return np.concatenate(parts)


def batch_top_k(u: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(u with all but the n largest set to 0, the smallest one kept)."""
    z = torch.relu(u)
    least = torch.topk(z.flatten(), n, sorted=True).values[-1]
    return torch.where(z >= least, z, 0), least


def train(x: torch.Tensor, recipe: dict, log: list) -> tuple[dict[str, torch.Tensor], float]:
    """(W_enc, b_enc, W_dec, b_dec of activations of unit root mean square, threshold)."""
    torch.manual_seed(recipe["seed"])
    d, f = x.shape[1], recipe["features"]
    w_dec = torch.nn.functional.normalize(torch.randn(f, d), dim=1)
    p = {"W_enc": w_dec.T.clone(), "b_enc": torch.zeros(f), "W_dec": w_dec, "b_dec": x.mean(0)}
    for tensor in p.values():
        tensor.requires_grad_()
    optimiser = torch.optim.Adam(p.values(), lr=recipe["lr"], betas=(0.9, 0.99))
    idle, thresholds = torch.zeros(f), []
    for step in range(recipe["steps"]):
        left = (recipe["steps"] - step) / (recipe["steps"] - recipe["decay_from"])
        optimiser.param_groups[0]["lr"] = recipe["lr"] * min(1, (step + 1) / recipe["warmup"], left)
        h = x[torch.randint(len(x), (recipe["batch"],))]
        u = (h - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
        z, least = batch_top_k(u, recipe["k"] * len(h))
        rest = h - (z @ p["W_dec"] + p["b_dec"])
        loss = total = rest.square().mean()
        idle = torch.where((z > 0).any(0), 0, idle + 1)
        dead = idle > recipe["dead_after"]
        if dead.any():
            n = min(recipe["auxiliary_features"], int(dead.sum()))
            found = torch.relu(u[:, dead]).topk(n, dim=1)
            more = torch.zeros(len(h), int(dead.sum())).scatter(1, found.indices, found.values)
            total = (
                loss
                + recipe["auxiliary"] * (more @ p["W_dec"][dead] - rest.detach()).square().mean()
            )
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        with torch.no_grad():
            p["W_dec"].copy_(torch.nn.functional.normalize(p["W_dec"], dim=1))
        if step >= recipe["steps"] - 300:
            thresholds.append(float(least.detach()))
        if step % 250 == 0 or step == recipe["steps"] - 1:
            entry = {"step": step, "loss": round(float(loss.detach()), 6), "dead": int(dead.sum())}
            log.append(entry)
            print(entry, flush=True)
    return {name: tensor.detach() for name, tensor in p.items()}, float(np.mean(thresholds))


def figures(model: vs.Model, sae: vs.sae.SAE, prompts: list[str], responses: list[str]) -> dict:
    """L0, explained variance, and how far next-token distributions of the responses move when the
    stream is replaced by its reconstruction, or by its mean.
    """
    h = stream(model, sae.site, prompts, responses)
    z = sae.encode(h)
    rest = h - sae.decode(z)
    mean = h.mean(0)
    # every token but the first
    moved = {"reconstruction": [], "mean": []}
    for first in range(0, len(prompts), 16):
        some = slice(first, first + 16)
        base = model.run(prompts[some], responses[some], capture=[sae.site])
        length = base.mask.sum(1)
        n_prompt = [len(row) for row in model.chat_tokens(prompts[some])]
        log_p = torch.log_softmax(torch.from_numpy(base.logits), -1)
        for how in moved:
            values = [row[-n + 1 :] for row, n in zip(base[sae.site], length)]
            made = [
                sae.decode(sae.encode(v)) if how == "reconstruction" else np.tile(mean, (len(v), 1))
                for v in values
            ]
            edits = [[vs.Set(sae.site, m, positions=slice(1, None))] for m in made]
            other = model.run(prompts[some], responses[some], edits=edits)
            log_q = torch.log_softmax(torch.from_numpy(other.logits), -1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
            moved[how] += [row[-n + m - 1 :].mean() for row, n, m in zip(kl, length, n_prompt)]
    return {
        "tokens": len(h),
        "L0": round(float((z != 0).sum(1).mean()), 3),
        "explained_variance": round(1 - float(rest.var(0).sum() / h.var(0).sum()), 5),
        "features_never_active": int((z == 0).all(0).sum()),
        "kl_of_responses": {how: round(float(np.mean(v)), 4) for how, v in moved.items()},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-llama-chat")
    parser.add_argument("--layer", type=int, default=7, help="whose input is encoded")
    parser.add_argument("--out", type=Path)
    for name, value in RECIPE.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    recipe = {name: given[name] for name in RECIPE}
    model, start = vs.Model.from_pretrained(given["model"], progress=False), time.time()
    site = f"blocks.{given['layer'] - 1}.hook_resid_post"
    x = stream(model, site, *texts("train", recipe["requests"], recipe["seed"]))
    scale = float(1 / np.sqrt((x.astype(np.float64) ** 2).mean()))
    print(
        f"{len(x)} tokens of width {x.shape[1]}, scale {scale:.4f}, {time.time() - start:.0f} s",
        flush=True,
    )
    log: list[dict] = []
    arrays, threshold = train(torch.from_numpy(x * np.float32(scale)), recipe, log)
    stored = {name: tensor.numpy().copy() for name, tensor in arrays.items()}
    # decoder rows keep length 1: features have the unit of the stream
    stored["b_enc"], stored["b_dec"] = stored["b_enc"] / scale, stored["b_dec"] / scale
    stored["threshold"] = np.full(recipe["features"], threshold / scale)
    stored = {name: np.ascontiguousarray(a, np.float32) for name, a in stored.items()}
    out = given["out"] or ROOT / "python/vksteer/models" / given["model"] / "sae"
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / "sae_weights.safetensors")
    config = {
        "architecture": "jumprelu",
        "d_in": x.shape[1],
        "d_sae": recipe["features"],
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"model_name": given["model"], "hook_name": site},
    }
    (out / "cfg.json").write_text(json.dumps(config, indent=1) + "\n")
    measured = figures(model, vs.sae.load(out), *texts("test", 100, recipe["seed"]))
    report = {
        "made_by": "tools/train_sae.py",
        "model": given["model"],
        "recipe": recipe,
        "train_tokens": len(x),
        "train_log": log,
        "test": measured,
        "torch": torch.__version__,
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(measured), f"{time.time() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
