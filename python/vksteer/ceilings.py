"""What a device can do at most, measured in a few hundred milliseconds, and what a model asks of it: the two halves of "a share of the peak".

Two ceilings: the rate of the engine's own matrix kernel on a large batch of rows, and the rate at which memory is read.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Ceilings:
    """matrix: float operations a second, of the engine's best matrix kernel. read: bytes a second. read_by: how the latter was measured."""

    matrix: float
    read: float
    read_by: str

    def to_dict(self) -> dict:
        return asdict(self)


def _best(call, seconds: float) -> float:
    """Seconds of the fastest of several calls, after one that is not counted; at least two, then as many as fit."""
    call()
    best, until, n = float("inf"), time.perf_counter() + seconds, 0
    while n < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        best, n = min(best, time.perf_counter() - start), n + 1
    return best


def host_read(seconds: float = 0.1, megabytes: int = 256) -> float:
    """Bytes a second that all cores together read from main memory (NumPy's float maximum over parts far larger than the caches)."""
    from concurrent.futures import ThreadPoolExecutor

    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parts = [np.ones((megabytes << 20) // 4 // n, np.float32) for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:
        return sum(p.nbytes for p in parts) / _best(lambda: list(pool.map(np.max, parts)), seconds)


def measure(model, seconds: float = 0.1) -> Ceilings:
    """The ceilings of the device that holds `model`; each of three measurements takes about `seconds`, and a warm-up.

    The matrix rate is the best of the model's MLP products over a full chunk of rows, with the transfer of inputs and results that goes with them.
    The read rate is that of the unembedding times one row (the largest matrix, read once); on a software device, whose memory is the machine's,
    the machine's own read rate where that is higher.
    """
    from .device import _engine

    engine, rows, random = model._engine, _engine().CHUNK, np.random.default_rng(0)
    c = model.config
    matrix = 0.0
    for name, columns, outputs in (("gate_up", c.d_model, 2 * c.d_mlp), ("down", c.d_mlp, c.d_model)):
        x = random.standard_normal((rows, columns), dtype=np.float32)
        matrix = max(matrix, 2 * rows * columns * outputs / _best(lambda: engine.apply(name, 0, x), seconds / 2))
    name = "embed" if c.tied else "unembed"
    x = random.standard_normal((1, c.d_model), dtype=np.float32)
    product = c.d_vocab * c.d_model * weight_size(model) / _best(lambda: engine.apply(name, -1, x), seconds)
    host = host_read(seconds) if model.device.type == "software" else 0.0
    return Ceilings(matrix, max(product, host), "all cores, NumPy" if host > product else "matrix-vector product")


# -- what a model asks ------------------------------------------------------------------------------------------------------------------------------


def weight_size(model) -> float:
    """Bytes of one weight on the device, from the engine's own plan."""
    c = model.config
    numbers = matrix_weights(model) + (0 if c.tied else c.d_vocab * c.d_model)
    return 2 if model._engine.plan()["weights"] < 3 * numbers else 4


def matrix_weights(model) -> int:
    """Weights that every token is multiplied with, the unembedding included."""
    c = model.config
    layer = c.d_model * c.d_head * (2 * c.n_heads + 2 * c.n_kv_heads) + 3 * c.d_model * c.d_mlp
    return c.n_layers * layer + c.d_vocab * c.d_model


def prefill_operations(model, tokens: int, logits: int = 1) -> float:
    """Float operations of one row of `tokens` tokens with `logits` of its positions unembedded: matrices, and scores and mixing of attention."""
    c = model.config
    matrices = 2 * tokens * (matrix_weights(model) - c.d_vocab * c.d_model) + 2 * logits * c.d_vocab * c.d_model
    return matrices + c.n_layers * 2 * tokens * (tokens + 1) * c.n_heads * c.d_head


def decode_bytes(model, context: float, rows: int = 1) -> float:
    """Bytes that one decoding step reads: every weight once, and each row's keys and values."""
    return matrix_weights(model) * weight_size(model) + rows * context * model._engine.plan()["cache_per_token"]
