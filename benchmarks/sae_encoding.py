"""Encoding with a sparse autoencoder beside the matrix kernel's own rate.

    sae_encoding.py [--tokens 1000] [--features 16384] [--width 2304] [--rounds N] [--out FILE.json]

Features are summed over segments of tokens and the largest of each token are kept, as
`vs.sae.target_atoms` and `vs.sae.features` do, on random weights; uploading them is measured
by itself. The matrix kernel's rate is that of a product of 256 rows by 8,192 x width, with weights
of the same type. Rates are floating point operations of the product W_enc alone over processor time
of this process, which other load on a shared machine changes less than wall time. The share is the
median over rounds of (encoding's rate / the kernel's rate), both measured in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
from run import commit, machine
from timing import at_least, row

import vksteer as vs
from vksteer.sae.encoding import COLUMNS, Encoder

KERNEL_ROWS = 256
#: Products that one call of measure_linear runs: nine, and one that compiles the kernel.
PRODUCTS = 10


def used(call) -> tuple[float, float]:
    """(processor seconds, wall seconds) of one call."""
    start = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def autoencoder(width: int, features: int) -> vs.sae.SAE:
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)
    return vs.sae.SAE(
        normal(width, features) / np.float32(np.sqrt(width)),
        np.zeros(features),
        normal(features, width),
        np.zeros(width),
        np.full(features, 2.0),
    )


def measured(model: vs.Model, tokens: int, features: int, width: int, rounds: int) -> list[dict]:
    sae = autoencoder(width, features)
    h = np.random.default_rng(1).standard_normal((tokens, width), dtype=np.float32)
    made: list[Encoder] = []
    load = used(lambda: made.append(Encoder(model, sae)))
    encoder = made[0]
    segments = np.array_split(h, max(1, tokens // 25))
    n_out = min(COLUMNS, features)
    calls = {
        "sums": lambda: encoder.sums(segments),
        "top": lambda: encoder.top(h, 10),
        "kernel": lambda: model._engine.measure_linear(KERNEL_ROWS, n_out, width),
    }
    flops = dict.fromkeys(("sums", "top"), 2.0 * tokens * features * width)
    flops["kernel"] = 2.0 * PRODUCTS * KERNEL_ROWS * n_out * width
    encoder.sums(segments[:1])
    encoder.top(h[:1], 10)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    walls: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            processor, wall = used(call)
            rates[name].append(flops[name] / processor / 1e9)
            walls[name].append(flops[name] / wall / 1e9)
    size = f"{tokens} tokens, {features} features, width {width}"
    rows = [
        row(
            f"matrix kernel, {KERNEL_ROWS} x {n_out} x {width}",
            statistics.median(rates["kernel"]),
            "GFLOP/s of processor time",
            wall=statistics.median(walls["kernel"]),
        )
    ]
    for name, what in (("sums", "sums over segments"), ("top", "10 largest features")):
        shares = [a / b for a, b in zip(rates[name], rates["kernel"])]
        rows.append(
            at_least(
                f"encoding, {what}, {size}: share of the matrix kernel's rate",
                statistics.median(shares),
                0.5,
                "",
                shares=shares,
                gflops=statistics.median(rates[name]),
                wall=statistics.median(walls[name]),
            )
        )
    rows.append(
        row(f"handing the encoder over, {features} x {width}", load[0], "processor seconds")
    )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("tokens", 1000), ("features", 16384), ("width", 2304), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with vs.Model.from_pretrained("tiny-llama-chat", dtype="float32", progress=False) as model:
        rows = measured(model, given.tokens, given.features, given.width, given.rounds)
        result = {
            "commit": commit(),
            "machine": machine(None),
            "kernels": list(model.kernels),
            "rows": rows,
        }
    for r in rows:
        print(f"{r['what']}: {r['value']:.3g} {r['unit']}")
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
