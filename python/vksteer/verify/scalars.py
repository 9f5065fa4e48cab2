"""Problems for the gradients of scalars of the logits, as `verify` has them for the other backward
operations.
"""

from __future__ import annotations

import numpy as np

from .problems import (
    SCALARS,
    Problem,
    beside,
    logit_biases,
    nothing,
    numbers,
    padded,
    row_stride,
)

#: The largest error of each op; see checking.BOUNDS.
BOUNDS = {
    "pair_grad": 1e-6,  # 1.9e-7
    "logit_grad": 3.5e-6,  # 8.3e-7
}


def pair_grad(rng, rows, width, softcap=0.0, bias=False) -> Problem:
    """bias: of an unembedding with 50 rows."""
    stride = row_stride(width)
    buffers = {
        "normed": padded(numbers(rng, rows, width), stride),
        "rows": padded(numbers(rng, 2 * rows, width, scale=width**-0.5), stride),
        "weights": numbers(rng, rows),
        "dnormed": nothing(rows, stride),
        "logits": nothing(rows, 2),
    }
    pairs = np.abs(buffers["rows"][:, :width].astype(np.float64)).reshape(rows, 2, width)
    logits = np.einsum("rd,rid->ri", np.abs(buffers["normed"][:, :width]), pairs) + softcap
    if bias:
        more, sizes = logit_biases(rng, rows)
        buffers |= more
        logits += sizes
    return Problem(
        "pair_grad",
        f"{rows} x {width}{' capped' if softcap else ''}{' bias' if bias else ''}",
        {name: name for name in buffers}
        | {
            "width": width,
            "stride": stride,
            "n_rows": rows,
            "softcap": softcap,
            "has_bias": int(bias),
        },
        buffers,
        {
            "logits": logits,
            "dnormed": beside(
                np.abs(buffers["weights"])[:, None] * pairs.sum(1), buffers["dnormed"]
            ),
        },
    )


def logit_grad(
    rng, rows, width, kind=0, softcap=0.0, spread=3.0, reference_softcap=None
) -> Problem:
    """reference_softcap: of the reference and the other; the logits' own without it.
    Units: of a gradient, the row's weight (probabilities are at most 1); of a scalar, the
    largest logarithm in it.
    """
    stride = row_stride(width)
    draw = lambda: padded(numbers(rng, rows, width, scale=spread), stride)
    buffers = {"logits": draw(), "weights": numbers(rng, rows), "values": nothing(rows)}
    if SCALARS[kind] == "log_prob":
        buffers["targets"] = rng.integers(0, width, rows).astype(np.uint32)
    else:
        buffers["reference"] = draw()
    if SCALARS[kind] == "directional_kl":
        buffers["other"] = draw()
    unit = (
        np.log(width)
        + 2
        * max(
            (
                np.abs(array[:, :width]).max(initial=0)
                for name, array in buffers.items()
                if name in ("logits", "reference", "other")
            ),
            default=0,
        )
        + 1
    )
    return Problem(
        "logit_grad",
        f"{SCALARS[kind]} {rows} x {width}{' capped' if softcap else ''}",
        {name: name for name in buffers}
        | {
            "width": width,
            "stride": stride,
            "kind": kind,
            "softcap": softcap,
            "n_rows": rows,
            "reference_softcap": softcap if reference_softcap is None else reference_softcap,
        },
        buffers,
        {
            "logits": np.broadcast_to(np.abs(buffers["weights"])[:, None], (rows, stride)),
            "values": unit,
        },
    )
