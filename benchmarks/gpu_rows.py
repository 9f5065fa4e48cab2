"""The comparisons of gpu.py: the engine beside PyTorch, both on one device with the same weights.

Each function yields rows (timing.row), so that those of a part that is cut are kept.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import frozen
import numpy as np
from peers import waiting
from shapes import SHAPES
from smollm2 import tokens
from timing import row, summary, take_turns

from vksteer.demo.smollm2 import decode_step
from vksteer.runtime import ceilings

#: The shape of the trial on a CPU. Its vocabulary holds the tokens that smollm2.tokens draws.
TINY_SHAPE = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=20_480,
    tie_word_embeddings=True,
)


@dataclass(frozen=True)
class Sizes:
    """How much work each comparison does: counts of tokens, rows, vectors and turns."""

    prompt: int = 128
    long: int = 512
    batch: int = 32
    decoding_rows: tuple[int, ...] = (1, 8, 32)
    before: int = 16  # tokens before those that are decoded
    new: int = 32
    context: int = 256  # tokens before those of frozen decoding
    frozen_new: int = 24
    attributed: tuple[int, int] = (32, 96)  # prompt and response
    steps: int = 10
    top: int = 20
    products: tuple[int, ...] = (1, 8, 128, 512, 2048)
    square: int = 4096  # rows, inputs and outputs of one more product
    rounds: int = 3


TINY = Sizes(16, 32, 4, (1, 3), 4, 5, 16, 4, (8, 16), 2, 5, (1, 8), 32, 1)


@dataclass
class Pair:
    """A model of random weights on both sides: the engine's, which holds them in bfloat16 as
    stored, and PyTorch's in float32 and in bfloat16.
    """

    ours: object
    peers: dict
    sizes: Sizes
    on: str  # PyTorch's device, "cuda" or "cpu"
    load_seconds: float

    def waiting(self, call):
        return waiting(call, self.on)


def scratch(numbers: int) -> str | None:
    """A folder in memory where twice the weights fit; None: the default one, on the disk."""
    memory = Path("/dev/shm")
    return str(memory) if memory.exists() and shutil.disk_usage(memory).free > 4 * numbers else None


@contextmanager
def pair(shape: str, sizes: Sizes, on: str, device: str | None) -> Iterator[Pair]:
    """A random Llama of this shape, written in bfloat16 and loaded on both sides."""
    import torch
    import transformers

    import vksteer as vs

    config = transformers.LlamaConfig(
        **(TINY_SHAPE if shape == "tiny" else SHAPES[shape]),
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device(on):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with tempfile.TemporaryDirectory(dir=scratch(model.num_parameters())) as folder:
        model.save_pretrained(folder)
        start = time.perf_counter()
        ours = vs.Model.from_pretrained(folder, device=device, progress=False)
        seconds = time.perf_counter() - start
    with ours:
        peers = {"float32": copy.deepcopy(model).float(), "bfloat16": model}
        yield Pair(ours, peers, sizes, on, seconds)


def loading(p: Pair) -> Iterator[dict]:
    peaks = ceilings.measure(p.ours, 3)
    yield row(
        "load",
        p.load_seconds,
        "s",
        kernels=list(p.ours.kernels),
        matrix_tflops=peaks.matrix / 1e12,
        read_gbytes_per_s=peaks.read / 1e9,
    )


def products(p: Pair) -> Iterator[dict]:
    """The matrix kernels alone, and PyTorch's product of the same sizes in float32 and bfloat16."""
    import torch

    c, square = p.ours.config, p.sizes.square
    shapes = [(m, 2 * c.d_mlp, c.d_model) for m in p.sizes.products]
    for m, n, k in (*shapes, (square, square, square)):
        # The best of 9, each with submission and wait, as PyTorch's.
        rate, read = p.ours._engine.measure_linear(m, n, k)
        calls = {}
        for name in p.peers:
            x, w = (torch.randn(s, k, device=p.on, dtype=getattr(torch, name)) for s in (m, n))
            calls[name] = p.waiting(lambda x=x, w=w: x @ w.T)
        theirs = {
            name: 2.0 * m * n * k / min(times) for name, times in take_turns(calls, 9).items()
        }
        yield row(
            f"product of {m} x {k} by {n} x {k}, against PyTorch float32",
            rate / theirs["float32"],
            "x",
            against_bfloat16=rate / theirs["bfloat16"],
            tflops=rate / 1e12,
            peer_tflops=theirs["float32"] / 1e12,
            bfloat16_tflops=theirs["bfloat16"] / 1e12,
            gbytes_per_s=read / 1e9,
        )


def passes(p: Pair, most: float = 2e-3) -> Iterator[dict]:
    """Forward passes with the logits of the last position. most: by how much of the largest logit
    the two sides may differ.
    """
    import torch

    sizes = p.sizes
    for n_rows, n in ((1, sizes.prompt), (sizes.batch, sizes.prompt), (1, sizes.long)):
        batch = [tokens(n, seed) for seed in range(n_rows)]
        ids = torch.tensor(batch, device=p.on)
        last = lambda peer, ids=ids: peer(input_ids=ids, use_cache=False, logits_to_keep=1)
        logits = p.ours.run(batch, logits="last").logits
        with torch.inference_mode():
            want = last(p.peers["float32"]).logits[:, -1].cpu().numpy()
        error = float(np.abs(logits - want).max() / np.abs(want).max())
        if not error < most:
            raise RuntimeError(
                f"the two sides do not compute the same: logits differ by {error:.2g} of the"
                " largest"
            )
        calls = {"ours": lambda batch=batch: p.ours.run(batch, logits="last")}
        calls |= {name: p.waiting(partial(last, peer)) for name, peer in p.peers.items()}
        s = {name: summary(t) for name, t in take_turns(calls, sizes.rounds, warm_up=2).items()}
        yield row(
            f"pass over {n_rows} x {n} tokens against PyTorch float32",
            s["float32"]["median_s"] / s["ours"]["median_s"],
            "x",
            steps=s,
            largest_difference=error,
            against_bfloat16=s["bfloat16"]["median_s"] / s["ours"]["median_s"],
            tflops=n_rows * ceilings.prefill_operations(p.ours, n) / s["ours"]["median_s"] / 1e12,
        )


def fast(p: Pair) -> Iterator[dict]:
    """On matrix units: passes and products again, as one product in float16 each."""
    engine = p.ours._engine
    if engine.kernels != "matrix":
        return
    engine.fast = True
    try:
        for r in (*passes(p, 0.05), *products(p)):
            yield r | {"what": f"fast {r['what']}"}
    finally:
        engine.fast = False


def decoding(p: Pair) -> Iterator[dict]:
    """Greedy tokens after a short prompt, its prefill included, against transformers.generate."""
    import torch

    sizes, read = p.sizes, ceilings.measure(p.ours, 3).read
    for n_rows in sizes.decoding_rows:
        batch = [tokens(sizes.before, seed) for seed in range(n_rows)]
        ids = torch.tensor(batch, device=p.on)
        made = lambda peer, ids=ids: peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sizes.new,
            min_new_tokens=sizes.new,
            do_sample=False,
            pad_token_id=0,
        )
        calls = {
            "ours": lambda batch=batch: p.ours.generate(
                batch, max_new_tokens=sizes.new, ignore_eos=True, progress=False
            )
        }
        calls |= {name: p.waiting(partial(made, peer)) for name, peer in p.peers.items()}
        s = {name: summary(t) for name, t in take_turns(calls, min(2, sizes.rounds)).items()}
        step = decode_step(p.ours, batch, sizes.new)
        moved = ceilings.decode_bytes(p.ours, sizes.before + sizes.new / 2, n_rows)
        yield row(
            f"decoding, {n_rows} rows, against transformers.generate in bfloat16",
            s["bfloat16"]["median_s"] / s["ours"]["median_s"],
            "x",
            steps=s,
            peer=s["bfloat16"],  # the faster of the two in the tables
            against_float32=s["float32"]["median_s"] / s["ours"]["median_s"],
            step_s=step,
            ours_tokens_per_s=n_rows * sizes.new / s["ours"]["median_s"],
            share_of_read_percent=100 * moved / step / read,
            read_gbytes_per_s=read / 1e9,
        )


def frozen_decoding(p: Pair) -> Iterator[dict]:
    """A frozen pair of rows: against our plain decoding of two rows, and two whole runs for each
    token in PyTorch.
    """
    sizes = p.sizes
    s = frozen.steps(
        p.ours, tokens(sizes.context), p.peers, sizes.rounds, p.on, new=sizes.frozen_new
    )
    slowest = frozen.slowest(s)
    yield row(
        f"frozen decoding at {sizes.context} tokens against two PyTorch float32 re-runs a token"
        " (slowest of qk, ov, mlp)",
        s["float32"]["median_s"] / slowest,
        "x",
        steps=s,
        against_bfloat16=s["bfloat16"]["median_s"] / slowest,
        over_own_plain=slowest / s["plain 2"]["median_s"],
    )


def attribution(p: Pair) -> Iterator[dict]:
    """All edges of one sample from the middle layer, against PyTorch's passes alone
    (attribution.py says what they are): in float32, whose scores are compared, and in bfloat16.
    """
    import attribution as bench

    import vksteer as vs

    bench.LAYER, bench.STEPS = p.ours.config.n_layers // 2, p.sizes.steps
    bench.PROMPT, bench.RESPONSE = p.sizes.attributed
    vector = vs.SteeringVector(
        np.random.default_rng(1).standard_normal(p.ours.config.d_model) / 2, bench.LAYER
    )
    rounds = min(2, p.sizes.rounds)
    try:
        found = bench.against_pytorch(p.ours, p.peers["float32"], vector, rounds)[0]
        half = bench.Peer(p.peers["bfloat16"], bench.sample(sum(p.sizes.attributed)), vector)
        times = summary(take_turns({"bfloat16": half.core}, rounds)["bfloat16"])
    finally:
        for peer in p.peers.values():  # hooks that steer
            peer.model.layers[bench.LAYER]._forward_pre_hooks.clear()
    yield found | {
        "bfloat16": times,
        "against_bfloat16": times["median_s"] / found["ours"]["median_s"],
    }


def lens(p: Pair) -> Iterator[dict]:
    """The logit lens of as many vectors as the model has heads, against PyTorch's norm, product and
    ranking of the same vectors.
    """
    import torch

    from vksteer import ov

    c, top = p.ours.config, p.sizes.top
    vectors = np.random.default_rng(2).standard_normal((c.n_layers * c.n_heads, c.d_model))
    calls = {"ours": lambda: ov.logit_lens(p.ours, vectors, top, progress=False)}
    found = calls["ours"]()
    for name, peer in p.peers.items():
        x = torch.tensor(vectors, device=p.on, dtype=getattr(torch, name))
        ranked = lambda x=x, peer=peer: peer.lm_head(peer.model.norm(x)).topk(top).values.cpu()
        calls[name] = p.waiting(ranked)
        if name == "float32":
            with torch.inference_mode():
                want = ranked().numpy()
            error = float(np.abs(found.values - want).max() / np.abs(want).max())
            if not error < 2e-3:
                raise RuntimeError(f"the two sides do not rank the same: {error:.2g} apart")
    s = {name: summary(t) for name, t in take_turns(calls, p.sizes.rounds).items()}
    yield row(
        f"lens of {len(vectors)} vectors over {c.d_vocab:,} tokens, top {top}, against PyTorch"
        " float32",
        s["float32"]["median_s"] / s["ours"]["median_s"],
        "x",
        steps=s,
        largest_difference=error,
        against_bfloat16=s["bfloat16"]["median_s"] / s["ours"]["median_s"],
    )


def profiles(p: Pair) -> Iterator[dict]:
    """What every kernel costs in a pass, a larger pass and decoding, by the device's own clock."""
    sizes = p.sizes
    before, one, many = (
        [tokens(n, seed) for seed in range(n_rows)]
        for n_rows, n in ((1, sizes.before), (1, sizes.prompt), (sizes.batch, sizes.prompt))
    )
    decode = partial(p.ours.generate, max_new_tokens=sizes.new, ignore_eos=True, progress=False)
    calls = {
        f"a pass over 1 x {sizes.prompt} tokens": lambda: p.ours.run(one, logits="last"),
        f"a pass over {sizes.batch} x {sizes.prompt} tokens": lambda: p.ours.run(
            many, logits="last"
        ),
        f"decoding {sizes.new} tokens, 1 row": lambda: decode(before),
    }
    for what, call in calls.items():
        call()
        with p.ours.profile() as spent:
            call()
        yield row(f"profile of {what}", spent.to_dict()["seconds"], "s", profile=spent.to_dict())


#: name -> (function, seconds it may take on an H200 with a model of 3B)
COMPARISONS = {
    "load": (loading, 10),
    "passes": (passes, 25),
    "decoding": (decoding, 35),
    "frozen": (frozen_decoding, 25),
    "attribution": (attribution, 30),
    "lens": (lens, 10),
    "products": (products, 10),
    "fast": (fast, 20),
    "profiles": (profiles, 10),
}
