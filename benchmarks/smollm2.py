"""SmolLM2-135M on the engine, PyTorch and llama.cpp: prefill, decoding, frozen decoding. All hold
the same weights and take turns.
"""

from __future__ import annotations

import frozen
import numpy as np
import peers
from timing import at_least, at_most, row, summary, take_turns

from vksteer.demo.smollm2 import decode_step
from vksteer.runtime import ceilings

PROMPT, NEW, CONTEXT = 128, 64, 256


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1000, 20_000, n).tolist()


def host_read(megabytes: int = 256) -> float:
    """Bytes per second that all cores read from the machine's memory, measured with PyTorch's sum.
    A software device shares this bandwidth.
    """
    import torch

    x = torch.ones((megabytes << 20) // 4)
    return x.numel() * 4 / min(take_turns({"sum": x.sum}, 7)["sum"])


def prefill(model, fp32, rounds: int) -> list[dict]:
    prompt = tokens(PROMPT)
    ours_logits, theirs_logits = (
        model.run([prompt], logits="last").logits[0],
        peers.last_logits(fp32, prompt)().numpy().reshape(-1),
    )
    error = float(np.abs(ours_logits - theirs_logits).max() / np.abs(theirs_logits).max())
    if error > 2e-3:
        raise RuntimeError(
            f"the two sides do not compute the same: logits differ by {error:.2g} of the largest"
        )
    times = take_turns(
        {
            "ours": lambda: model.run([prompt], logits="last"),
            "torch": peers.last_logits(fp32, prompt),
        },
        rounds,
    )
    ours, theirs = summary(times["ours"]), summary(times["torch"])
    read = ceilings.measure(model, 5)
    rate = ceilings.prefill_operations(model, PROMPT) / ours["median_s"]
    return [
        at_least(
            f"prefill {PROMPT} tokens, last logits, against PyTorch float32",
            theirs["median_s"] / ours["median_s"],
            0.4,
            ours=ours,
            peer=theirs,
            ours_tokens_per_s=PROMPT / ours["median_s"],
            peer_tokens_per_s=PROMPT / theirs["median_s"],
            largest_difference=error,
        ),
        row(
            "prefill's share of the matrix kernel's own peak",
            100 * rate / read.matrix,
            "%",
            gflops=rate / 1e9,
            matrix_peak_gflops=read.matrix / 1e9,
        ),
    ]


def decode(model, fp32, bf16, rounds: int) -> tuple[list[dict], float]:
    """(rows, our tokens/s at batch 1). Both sides are timed for 64 tokens after 16, prefill
    included.
    """
    prompt = tokens(16)
    generate = lambda rows: (
        lambda: model.generate([prompt] * rows, max_new_tokens=NEW, ignore_eos=True, progress=False)
    )
    times = take_turns(
        {
            "ours": generate(1),
            "float32": peers.greedy(fp32, prompt, NEW),
            "bfloat16": peers.greedy(bf16, prompt, NEW),
            "ours 8": generate(8),
        },
        rounds,
    )
    s = {name: summary(t) for name, t in times.items()}
    faster = min(("float32", "bfloat16"), key=lambda name: s[name]["median_s"])
    rate = NEW / s["ours"]["median_s"]
    read, host = ceilings.measure(model, 5).read, host_read()
    # The target is a share of what a kernel that only reads reaches on this device; the bandwidth
    # of the host's own code is recorded beside it.
    step = decode_step(model, [prompt], NEW)
    bytes_a_second = ceilings.decode_bytes(model, 16 + NEW / 2) / step
    share = bytes_a_second / read
    return [
        at_least(
            f"decoding, batch 1, against transformers.generate ({faster}, the faster)",
            s[faster]["median_s"] / s["ours"]["median_s"],
            2,
            ours=s["ours"],
            peer=s[faster],
            float32=s["float32"],
            bfloat16=s["bfloat16"],
            ours_tokens_per_s=rate,
            peer_tokens_per_s=NEW / s[faster]["median_s"],
        ),
        at_least(
            "decoding, batch 1, share of the plain read bandwidth",
            100 * share,
            60,
            "%",
            gbytes_per_s=bytes_a_second / 1e9,
            read_gbytes_per_s=read / 1e9,
            host_read_gbytes_per_s=host / 1e9,
        ),
        at_least(
            "decoding, batch 8 over batch 1, tokens/s",
            8 * s["ours"]["median_s"] / s["ours 8"]["median_s"],
            2.5,
            tokens_per_s=8 * NEW / s["ours 8"]["median_s"],
            ours=s["ours 8"],
        ),
    ], rate


def llama_cpp(decode_rate: float, prefill_rate: float, rounds: int) -> list[dict]:
    peer = peers.llama_cpp(rounds)
    note = "" if peer["how"].startswith("measured") else " (quoted figure)"
    return [
        at_least(
            f"decoding, batch 1, against llama.cpp CPU F16{note}",
            decode_rate / peer["decode_tokens_per_s"],
            0.5,
            ours_tokens_per_s=decode_rate,
            peer=peer,
        ),
        at_least(
            f"prefill {PROMPT} tokens, against llama.cpp CPU F16{note}",
            prefill_rate / peer["prefill_tokens_per_s"],
            0.25,
            ours_tokens_per_s=prefill_rate,
            peer=peer,
        ),
    ]


def frozen_decoding(model, fp32, rounds: int) -> list[dict]:
    """A frozen pair after 256 tokens against our plain decoding of two rows, and against two full
    re-runs for each token in PyTorch.
    """
    s = frozen.steps(model, tokens(CONTEXT), {"authors": fp32}, rounds, "cpu")
    slowest = frozen.slowest(s)
    return [
        at_least(
            f"frozen decoding at {CONTEXT} tokens against two full PyTorch re-runs a token (slowest"
            " of qk, ov, mlp)",
            s["authors"]["median_s"] / slowest,
            20,
            steps=s,
        ),
        at_most(
            "frozen decoding over own plain decoding at batch 2 (slowest of qk, ov, mlp)",
            slowest / s["plain 2"]["median_s"],
            1.5,
            "times",
            steps=s,
        ),
    ]


def run(rounds: int, device):
    """Yields rows as they are measured."""
    import vksteer as vs

    folder = peers.safetensors_folder()
    fp32, bf16 = peers.torch_model(folder, "float32"), peers.torch_model(folder, "bfloat16")
    with vs.Model.from_pretrained(folder, device=device, progress=False) as model:
        rows = prefill(model, fp32, 3 * rounds)
        prefill_rate = rows[0]["ours_tokens_per_s"]
        yield from rows
        rows, rate = decode(model, fp32, bf16, rounds)
        yield from rows
        yield from frozen_decoding(model, fp32, rounds)
        yield from llama_cpp(rate, prefill_rate, rounds)
