"""The engine beside PyTorch on one real GPU, both on that card: random weights in the shapes of
real models, so that nothing is downloaded.

    gpu.py [--shapes smollm2 qwen-0.5b llama-3b] [--device D] [--rounds N] [--out FILE.json]

Needs PyTorch with CUDA or ROCm, transformers and vksteer in one Python. Both sides hold the same
bfloat16 weights, and the engine computes in float32. It is compared with PyTorch in float32 on the
same weights (TF32 off: the same arithmetic) and in bfloat16 (less exact, on the matrix units). A
ratio is the peer's time divided by ours. The results of both sides are compared first, in float32.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import frozen
import numpy as np
from peers import waiting
from run import commit, machine
from shapes import SHAPES
from smollm2 import tokens
from timing import row, summary, take_turns

from vksteer.demo.smollm2 import decode_step
from vksteer.runtime import ceilings

PROMPT, NEW, CONTEXT = 128, 32, 256

on_card = partial(waiting, device="cuda")


def made(shape: str, folder: Path):
    """Writes a random Llama of this shape, bfloat16, and returns it on the card."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(folder)
    return model


def passes(ours, peers: dict, rounds: int) -> list[dict]:
    """Forward passes: last logits of 1 x 128, 1 x 512 and 32 x 128 tokens."""
    import torch

    rows = []
    for n_rows, n in ((1, PROMPT), (1, 512), (32, PROMPT)):
        batch = [tokens(n, seed) for seed in range(n_rows)]
        ids = torch.tensor(batch, device="cuda")
        logits = ours.run(batch, logits="last").logits
        with torch.inference_mode():
            want = (
                peers["float32"](input_ids=ids, use_cache=False, logits_to_keep=1)
                .logits[:, -1]
                .cpu()
                .numpy()
            )
        error = float(np.abs(logits - want).max() / np.abs(want).max())
        if not error < 2e-3:
            raise RuntimeError(
                f"the two sides do not compute the same: logits differ by {error:.2g} of the"
                " largest"
            )
        calls = {"ours": lambda: ours.run(batch, logits="last")}
        calls |= {
            name: on_card(lambda peer=peer: peer(input_ids=ids, use_cache=False, logits_to_keep=1))
            for name, peer in peers.items()
        }
        s = {name: summary(t) for name, t in take_turns(calls, rounds, warm_up=2).items()}
        operations = n_rows * ceilings.prefill_operations(ours, n)
        rows.append(
            row(
                f"pass over {n_rows} x {n} tokens against PyTorch float32",
                s["float32"]["median_s"] / s["ours"]["median_s"],
                "x",
                steps=s,
                largest_difference=error,
                against_bfloat16=s["bfloat16"]["median_s"] / s["ours"]["median_s"],
                tflops=operations / s["ours"]["median_s"] / 1e12,
            )
        )
    return rows


def decoding(ours, peers: dict, rounds: int) -> list[dict]:
    """32 tokens after 16, prefill included, with 1, 8 and 32 rows, against transformers.generate in
    bfloat16, the faster of its two types.
    """
    import torch

    rows, read = [], ceilings.measure(ours, 3).read
    for n_rows in (1, 8, 32):
        batch = [tokens(16, seed) for seed in range(n_rows)]
        ids = torch.tensor(batch, device="cuda")
        calls = {
            "ours": lambda: ours.generate(
                batch, max_new_tokens=NEW, ignore_eos=True, progress=False
            )
        }
        calls["bfloat16"] = on_card(
            lambda: peers["bfloat16"].generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                pad_token_id=0,
            )
        )
        s = {name: summary(t) for name, t in take_turns(calls, rounds).items()}
        step = decode_step(ours, batch, NEW)
        share = ceilings.decode_bytes(ours, 16 + NEW / 2, n_rows) / step / read
        rows.append(
            row(
                f"decoding, {n_rows} rows, against transformers.generate in bfloat16",
                s["bfloat16"]["median_s"] / s["ours"]["median_s"],
                "x",
                steps=s,
                step_s=step,
                ours_tokens_per_s=n_rows * NEW / s["ours"]["median_s"],
                share_of_read_percent=100 * share,
                read_gbytes_per_s=read / 1e9,
            )
        )
    return rows


def frozen_decoding(ours, peers: dict, rounds: int) -> list[dict]:
    """A frozen pair after 256 tokens: against our plain decoding of two rows, and two whole runs
    for each token in PyTorch.
    """
    s = frozen.steps(ours, tokens(CONTEXT), peers, rounds, "cuda")
    slowest = frozen.slowest(s)
    return [
        row(
            f"frozen decoding at {CONTEXT} tokens against two PyTorch float32 re-runs a token"
            " (slowest of qk, ov, mlp)",
            s["float32"]["median_s"] / slowest,
            "x",
            steps=s,
            against_bfloat16=s["bfloat16"]["median_s"] / slowest,
            over_own_plain=slowest / s["plain 2"]["median_s"],
        )
    ]


def attribution(ours, fp32, rounds: int) -> list[dict]:
    """All edges of one sample of 32 + 96 tokens, 10 steps, from the middle layer: against PyTorch's
    passes alone (attribution.py says what they are).
    """
    import attribution as bench

    import vksteer as vs

    bench.LAYER = ours.config.n_layers // 2
    vector = vs.SteeringVector(
        np.random.default_rng(1).standard_normal(ours.config.d_model) / 2, bench.LAYER
    )
    return bench.against_pytorch(ours, fp32, vector, rounds)[:1]


def products(ours) -> list[dict]:
    """The matrix kernels alone, and PyTorch's product of the same sizes in float32."""
    import torch

    c, rows = ours.config, []
    torch.backends.cuda.matmul.allow_tf32 = False
    for m in (1, 8, 128, 512, 2048):
        n, k = 2 * c.d_mlp, c.d_model
        # The best of 9, each with submission and wait, as PyTorch's.
        rate, read = ours._engine.measure_linear(m, n, k)
        x, w = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
        call = on_card(lambda: x @ w.T)
        theirs = 2.0 * m * n * k / min(take_turns({"torch": call}, 9)["torch"])
        rows.append(
            row(
                f"product of {m} x {k} by {n} x {k}, against PyTorch float32",
                rate / theirs,
                "x",
                tflops=rate / 1e12,
                peer_tflops=theirs / 1e12,
                gbytes_per_s=read / 1e9,
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["smollm2", "llama-3b"])
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import torch

    import vksteer as vs

    where, content = machine(arguments.device), []
    where["peer_device"] = torch.cuda.get_device_name()
    print(
        f"{where['device']['name']} ({where['device']['driver']}); PyTorch {torch.__version__} on"
        f" {where['peer_device']}",
        flush=True,
    )
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            bf16 = made(shape, Path(folder))
            start = time.perf_counter()
            ours = vs.Model.from_pretrained(folder, device=arguments.device, progress=False)
            first = time.perf_counter() - start
        with ours:
            peers = {"float32": copy.deepcopy(bf16).float(), "bfloat16": bf16}
            groups = [
                lambda: [row("load", first, "s", kernels=ours._engine.kernels)],
                lambda: products(ours),
                lambda: passes(ours, peers, arguments.rounds),
                lambda: decoding(ours, peers, min(2, arguments.rounds)),
                lambda: frozen_decoding(ours, peers, arguments.rounds),
                lambda: attribution(ours, peers["float32"], min(2, arguments.rounds)),
            ]
            for group in groups:
                for r in group():
                    r["what"] = f"{shape}: {r['what']}"
                    content.append(r)
                    extra = ", ".join(
                        f"{k} {v:.3g}"
                        for k, v in r.items()
                        if isinstance(v, float) and k != "value"
                    )
                    print(f"  {r['what']}: {r['value']:.3g} {r['unit']}  ({extra})", flush=True)
                    if arguments.out:
                        arguments.out.write_text(
                            json.dumps(
                                {
                                    "machine": where,
                                    "commit": commit(),
                                    "rounds": arguments.rounds,
                                    "rows": content,
                                },
                                indent=1,
                            )
                            + "\n"
                        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
