"""Frozen decoding: seconds of one token for the engine's frozen and plain steps, and for the way of
the study's code, which runs the whole sequence twice in PyTorch for every token.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
from peers import waiting
from timing import summary

FROZEN = ("qk", "ov", "mlp")


def seconds_of_a_step(model, prompt: list[int], vector, n_rows: int, new: int, **options) -> float:
    """Median seconds of one decoding step of n_rows equal rows, without the prefill."""
    import vksteer as vs

    times: list[float] = []
    model.generate(
        [prompt] * n_rows,
        edits=[vs.Steer(vector)],
        max_new_tokens=new,
        ignore_eos=True,
        progress=False,
        on_token=lambda row, token, piece: (
            times.append(time.perf_counter()) if row == n_rows - 1 else None
        ),
        **options,
    )
    return statistics.median(np.diff(times).tolist())


def steps(model, prompt: list[int], peers: dict, rounds: int, device: str, new: int = 24) -> dict:
    """{name: summary of seconds a token} after `prompt`, in turns, after one warm-up turn of each:
    "plain 2" (our plain decoding of two rows), "qk", "ov", "mlp" (a frozen pair of rows), and two
    full passes of each PyTorch model of `peers`, which lie on `device` ("cpu" or "cuda").
    """
    import torch

    import vksteer as vs

    vector = vs.SteeringVector(
        np.random.default_rng(1).standard_normal(model.config.d_model) * 2,
        model.config.n_layers // 2,
    )
    ids = torch.tensor([prompt], device=device)

    def passes(peer) -> float:
        start = time.perf_counter()
        # The base run, whose parts are kept, and the steered run.
        call = lambda: [peer(input_ids=ids, use_cache=False, logits_to_keep=1) for _ in range(2)]
        waiting(call, device)()
        return time.perf_counter() - start

    calls = {"plain 2": lambda: seconds_of_a_step(model, prompt, vector, 2, new)}
    for name in FROZEN:
        calls[name] = lambda name=name: seconds_of_a_step(
            model, prompt, vector, 1, new, freeze=name
        )
    for name, peer in peers.items():
        calls[name] = lambda peer=peer: passes(peer)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            seconds = call()
            if turn:
                times[name].append(seconds)
    return {name: summary(t) for name, t in times.items()}


def slowest(summaries: dict) -> float:
    """Median seconds of the slowest kind of frozen step."""
    return max(summaries[name]["median_s"] for name in FROZEN)
