"""The base run and the steered run of samples, kept as little as metrics need: normed final rows at
the positions where a metric may be read.

Positions P - 1 to S - 1 of a sample (P prompt tokens, S in all): the logits at p
predict the token at p + 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..base.progress import Progress
from ..runtime.batch import Batch
from ..runtime.edits import Steer
from ..runtime.gradients import pack

#: Tokens that are run together.
BATCH_TOKENS = 2048


@dataclass
class FinalRows:
    """One sample. base, steered: float32 [n, D], the final norm's output at positions first, ...,
    first + n - 1. targets: uint32 [n], the next token (0 after the last). For every row: `kl_base`,
    KL(P_steer||P_base); `kl_steered`, KL(P_base||P_steer); greedy tokens and log p(target) of both.
    """

    first: int
    base: np.ndarray
    steered: np.ndarray
    targets: np.ndarray
    kl_base: np.ndarray
    kl_steered: np.ndarray
    greedy_base: np.ndarray
    greedy_steered: np.ndarray
    logprob_base: np.ndarray
    logprob_steered: np.ndarray


def request(softcap, a=None, b=None, reference=None, other=None, targets=None, logits=False):
    """What the engine's measure and Circuits.forward read of final rows
    (csrc/analysis/read_logits.h).
    """
    as_ids = lambda x: None if x is None else np.ascontiguousarray(x, np.uint32)
    as_rows = lambda x: None if x is None else np.ascontiguousarray(x, np.float32)
    return (
        float(softcap),
        as_ids(a),
        as_ids(b),
        as_rows(reference),
        as_rows(other),
        as_ids(targets),
        bool(logits),
    )


def _rows(model, samples, vector, coefficient, site, gain):
    """Final rows of both runs of some samples: two lists of float32 [n, D]."""
    rows = [list(s.tokens) for s in samples]
    lengths = [len(r) for r in rows]
    n, width = len(rows), max(lengths)
    inputs = model._layer_inputs.get([tuple(r) for r in rows], vector.layer)
    edits = [[Steer(vector, coefficient)] if i % 2 else [] for i in range(2 * n)]
    double = lambda values: [v for v in values for _ in range(2)]
    batch = Batch(
        model,
        double([len(s.prompt_tokens) for s in samples]),
        double(lengths),
        (edits, False),
        None,
    )
    cache, slots = model._run_cache(double(lengths), 1)
    _, captured = batch.forward(
        cache,
        double(rows),
        slots=slots,
        columns=double([width - t for t in lengths]),
        n_columns=width,
        capture=[site],
        first_layer=vector.layer,
        inputs=double(inputs),
    )
    normed = captured[site]
    parts = [
        normed[i, width - t + len(s.prompt_tokens) - 1 :] * gain
        for i, (s, t) in enumerate(zip(double(samples), double(lengths)))
    ]
    return parts[0::2], parts[1::2]


def final_rows(
    model, samples, vector, coefficient, *, capped=True, progress=False
) -> list[FinalRows]:
    """Both runs of every sample from the kept input of the steering layer on."""
    from ..runtime.device import _engine

    site = model._sites.by_name["ln_final.hook_normalized"].key
    gain = model._engine.vector("ln_final", 0)
    softcap = model.config.final_softcap if capped else 0.0
    found = []
    groups = pack([2 * len(s) for s in samples], BATCH_TOKENS)
    with Progress(progress, len(samples), "base and steered runs") as bar:
        for group in groups:
            some = [samples[i] for i in group]
            base, steered = _rows(model, some, vector, coefficient, site, gain)
            targets = [np.array([*s.response_tokens, 0], np.uint32) for s in some]
            both = np.stack([np.concatenate(steered), np.concatenate(base)])
            _, whole, _ = _engine().measure(
                model._engine,
                both,
                both.shape[1],
                request(softcap, reference=both[0], other=both[1], targets=np.concatenate(targets)),
            )
            ends = np.cumsum([len(t) for t in targets])
            for s, b, st, t, end in zip(some, base, steered, targets, ends):
                x, y = (whole[i, end - len(t) : end].astype(np.float64) for i in (0, 1))
                found.append(
                    FinalRows(
                        len(s.prompt_tokens) - 1,
                        b,
                        st,
                        t,
                        y[:, 0],
                        x[:, 1],
                        y[:, 3].astype(np.int64),
                        x[:, 3].astype(np.int64),
                        y[:, 2],
                        x[:, 2],
                    )
                )
            bar.step(len(some))
    return found
