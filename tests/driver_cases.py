"""A small part of the tests for any driver: the answers of the float64 oracle, computed once, and a
check against them that needs no torch.

`python driver_cases.py FOLDER...` runs the check; each folder holds a model and `expected.npz`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from oracle.compare import BOUND, assert_close, real

LENGTHS, RESPONSES = (17, 1, 70, 5), (3, 4, 0, 2)
#: A greedy token that differs counts as a near tie where the oracle's top-1 margin is smaller.
TIE = 1e-3
NEW_TOKENS = 10


def prompts(d_vocab):
    rng = np.random.default_rng(5)
    draw = lambda n: rng.integers(0, d_vocab, n).tolist()
    return [draw(n) for n in LENGTHS], [draw(n) for n in RESPONSES]


def interventions(facts):
    """{name: (edits, freeze, ablate)}"""
    import vksteer as vs

    rng = np.random.default_rng(6)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    vector = vs.SteeringVector(draw(facts.d_model), 1)
    steer = [vs.Steer(vector, 1.0)]
    return {
        "plain": ([], None, None),
        "steer": (steer, None, None),
        "ablate": ([vs.Ablate(vector)], None, None),
        "several": (
            [
                vs.Scale("blocks.1.attn.hook_pattern", 0.5, positions="response"),
                vs.Add("blocks.0.attn.hook_attn_scores", 1.0, heads=[0]),
                vs.Set("blocks.1.attn.hook_z", draw(facts.n_heads, facts.d_head), positions=[-2]),
                vs.Add("blocks.1.mlp.hook_pre", 0.5),
                vs.MeanAblate("blocks.0.mlp.hook_post", draw(facts.d_mlp), positions=[0, 2]),
                vs.Scale("ln_final.hook_scale", 1.2),
                vs.Add("blocks.1.attn.hook_k", draw(facts.d_head), heads=[0]),
            ],
            None,
            None,
        ),
        "qk": (steer, "qk", None),
        "ov": (steer, "ov", None),
        "mlp": (steer, "mlp", None),
        "svv": (steer, None, "svv"),
        "qk, mlp_direct": (steer, "qk", "mlp_direct"),
    }


def expect(ref, to: Path) -> None:
    """Writes the answers of the oracle: every site of the plain run, the logits of every
    intervention, greedy tokens with their margins.
    """
    import torch

    rows, responses = prompts(ref.facts.d_vocab)
    out = {}
    with torch.no_grad():
        for name, (edits, freeze, ablate) in interventions(ref.facts).items():
            for b, (prompt, response) in enumerate(zip(rows, responses)):
                run = ref.forward(
                    prompt + response,
                    prompt_length=len(prompt),
                    edits=edits,
                    freeze=freeze,
                    ablate=ablate,
                )
                out[f"{name}|{b}|logits"] = run.logits.numpy()
                if name == "plain":
                    out |= {f"{name}|{b}|{s}": run.sites[s].numpy() for s in ref.site_names()}
        for name in ("plain", "qk"):
            edits, freeze, ablate = interventions(ref.facts)[name]
            for b, prompt in enumerate(rows[:2]):
                tokens, margins = ref.generate(
                    prompt, NEW_TOKENS, edits=edits, freeze=freeze, ablate=ablate
                )
                out[f"{name}|{b}|tokens"], out[f"{name}|{b}|margins"] = (
                    np.array(tokens),
                    np.array(margins),
                )
    np.savez(to, **out)


def check(model, expected) -> tuple[int, float]:
    """Compares a model with the answers of the oracle. Returns (number of comparisons, largest
    error as a share of the largest value).
    """
    rows, responses = prompts(model.config.d_vocab)
    worst, n = 0.0, 0
    for name, (edits, freeze, ablate) in interventions(model.config).items():
        sites = list(model.sites) if name == "plain" else []
        run = model.run(rows, responses, edits=edits, freeze=freeze, ablate=ablate, capture=sites)
        for b, row in enumerate(zip(rows, responses)):
            length = sum(map(len, row))
            for site in ["logits", *sites]:
                got = (
                    run.logits[b, -length:]
                    if site == "logits"
                    else real(site, run[site], b, length)
                )
                worst = max(
                    worst,
                    assert_close(f"{name}, row {b}: {site}", got, expected[f"{name}|{b}|{site}"]),
                )
                n += 1
    for name in ("plain", "qk"):
        edits, freeze, ablate = interventions(model.config)[name]
        made = model.generate(
            rows[:2],
            max_new_tokens=NEW_TOKENS,
            edits=edits,
            freeze=freeze,
            ablate=ablate,
            ignore_eos=True,
            progress=False,
        )
        assert len(made) == 2
        for b, generation in enumerate(made):
            want, margins = expected[f"{name}|{b}|tokens"], expected[f"{name}|{b}|margins"]
            differ = np.flatnonzero(generation.tokens != want)
            assert not len(differ) or margins[differ[0]] < TIE, (
                f"{name}, row {b}: token {differ[0]} of {generation.tokens} should be {want}"
            )
            n += 1
    return n, worst


def main(folders) -> None:
    import warnings

    import vksteer as vs

    warnings.filterwarnings("ignore", message="no GPU found")
    for folder in folders:
        # Weights stay as stored, so that float32, bfloat16 and float16 kernels all run.
        with (
            vs.Model.from_pretrained(folder, progress=False) as model,
            np.load(Path(folder) / "expected.npz") as stored,
        ):
            expected = dict(stored)
            for kernels in model._engine.families:
                model._engine.kernels = kernels
                n, worst = check(model, expected)
                print(
                    json.dumps(
                        dict(
                            device=model.device.name,
                            subgroup=model.device.features["subgroup_size"],
                            folder=Path(folder).name,
                            kernels=kernels,
                            comparisons=n,
                            worst=worst,
                            bound=BOUND,
                        )
                    ),
                    flush=True,
                )
                alone = model.run([prompts(model.config.d_vocab)[0][2]], logits="last").logits[0]
                batched = model.run(prompts(model.config.d_vocab)[0], logits="last").logits[2]
                assert np.array_equal(alone, batched), (
                    "a row alone and the same row in a batch must be bit-identical"
                )


if __name__ == "__main__":
    main(sys.argv[1:])
