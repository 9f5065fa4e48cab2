"""Weights of the tokens of a response in next-token prediction (docs/token-weights.md): training
spends its effort where a token matters for the behaviour, an idea inspired by control-aware
prediction objectives (McAllister et al., arXiv 2204.13319).

Position t of a response is the one whose logits predict its token t. Everything is computed under
a steered model and then held fixed: no gradient passes through the weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.distributions import log_softmax
from ..base.types import Float32Array, Float64Array
from ..inputs.vectors import SteeringVector
from ..runtime.edits import Steer
from ..runtime.gradients import BATCH_TOKENS, LogProb, pack
from .losses import LIMIT, Continuation, Examples, Prepared, check_number, check_vector, prepare

if TYPE_CHECKING:
    from ..runtime.model import Model

KINDS = ("uniform", "effect", "exchange", "attention")
#: Bounds of a weight, before the weights of a response are scaled to their sum once more.
LEAST, MOST = 0.1, 10.0
#: Added to every effect, as a share of their mean, so that no weight is undefined.
EPSILON = 1e-6


def check_kind(kind: object) -> str:
    """The weighting's name. Raises ValueError for an unknown one."""
    if kind not in KINDS:
        raise ValueError(f"token_weights={kind!r}: use one of {', '.join(map(repr, KINDS))}")
    return str(kind)


def from_effects(effects: Float64Array) -> Float64Array:
    """Weights w_t of mean 1 from sizes e_t >= 0, float64 [T]: T (e + eps) / sum(e + eps) with eps =
    1e-6 mean e, then clipped to [0.1, 10], then scaled so that they sum to T again. All ones where
    every e is 0, and for one token.
    """
    n = len(effects)
    mean = float(effects.mean())
    if n == 1 or mean == 0:
        return np.ones(n)
    raised = effects + EPSILON * mean
    clipped = np.clip(n * raised / raised.sum(), LEAST, MOST)
    scaled: Float64Array = n * clipped / clipped.sum()
    return scaled


def weigh(
    model: Model,
    prepared: Sequence[Prepared],
    kind: str,
    layer: int,
    direction: Float32Array,
    coefficient: float,
) -> dict[Prepared, Float64Array]:
    """Weights of every different example's winning response; empty for "uniform". Warns where all
    effects of a response are 0.
    """
    if kind == "uniform":
        return {}
    examples = list(dict.fromkeys(prepared))
    vector = SteeringVector(direction, layer)
    steers = [Steer(vector, coefficient * e.sign) for e in examples]
    sequences = [e.winning for e in examples]
    measure = {"effect": _effect, "exchange": _exchange, "attention": _attention}[kind]
    effects = measure(model, sequences, steers)
    none = [i for i, e in enumerate(effects) if len(e) > 1 and not e.any()]
    if none:
        warnings.warn(
            f"token_weights={kind!r}: {len(none)} of {len(effects)} responses show no effect at"
            " all; their tokens are weighted alike",
            stacklevel=3,
        )
    return {e: from_effects(x) for e, x in zip(examples, effects, strict=True)}


def _effect(
    model: Model, sequences: Sequence[Continuation], steers: Sequence[Steer]
) -> list[Float64Array]:
    """KL(P_steered || P_base) of each predicted token, nats."""
    room = max(1, (1 << 23) // model.config.d_vocab)  # tokens whose logits are held together
    found: list[Float64Array] = []
    for group in pack([len(s.tokens) for s in sequences], room):
        rows = [list(sequences[i].tokens) for i in group]
        steered, base = (
            model.run(rows, edits=edits).logits for edits in ([[steers[i]] for i in group], [])
        )
        assert steered is not None and base is not None
        for row, i in enumerate(group):
            n = len(sequences[i].response)
            p, q = (log_softmax(x[row, -n:]) for x in (steered, base))
            # rounding can leave a divergence of nothing just below zero
            found.append(np.maximum(0.0, (np.exp(p) * (p - q)).sum(axis=-1)))
    return found


def _exchange(
    model: Model, sequences: Sequence[Continuation], steers: Sequence[Steer]
) -> list[Float64Array]:
    """|<h_steered - h_base, d m / d h>| at each position, m the log probability of the whole
    response under steering: to first order, how much m changes when the steered residual stream at
    this position alone is exchanged for the unsteered one. At the vector's layer the difference of
    the two is what steering adds.
    """
    site = f"blocks.{steers[0].vector.layer}.hook_resid_pre"
    found = model.gradients(
        [list(s.tokens) for s in sequences],
        of=[LogProb(s.predicting.tolist(), list(s.response)) for s in sequences],
        at=[site],
        edits=[[steer] for steer in steers],
        progress=False,
    )[site]
    return [
        np.abs(
            found[i, -len(s.response) :].astype(np.float64)
            @ steer.vector.direction.astype(np.float64)
            * steer.coefficient
        )
        for i, (s, steer) in enumerate(zip(sequences, steers, strict=True))
    ]


def _attention(
    model: Model, sequences: Sequence[Continuation], steers: Sequence[Steer]
) -> list[Float64Array]:
    """Attention from the last position to each one, the mean over heads of the layers from the
    vector's on, under steering.
    """
    layers = range(steers[0].vector.layer, model.config.n_layers)
    sites = [f"blocks.{l}.attn.hook_pattern" for l in layers]
    found: list[Float64Array] = []
    # patterns are [heads, tokens, tokens] for each layer: few rows at once
    for group in pack([len(s.tokens) for s in sequences], BATCH_TOKENS // 4):
        run = model.run(
            [list(sequences[i].tokens) for i in group],
            edits=[[steers[i]] for i in group],
            capture=sites,
            logits=None,
        )
        for row, i in enumerate(group):
            last = np.stack([run[site][row, :, -1] for site in sites]).astype(np.float64)
            found.append(last.mean(axis=(0, 1))[-len(sequences[i].response) :])
    return found


def default_reference(model: Model, prepared: Sequence[Prepared], layer: int) -> SteeringVector:
    """The difference in means of the examples' prompts at their last token and this layer: of those
    that the vector is subtracted from (sign -1, harmful in `training_data`) minus those that it is
    added to.

    Raises ValueError where one sign is missing, or the two means are the same.
    """
    means = []
    for sign in (-1, 1):
        rows = sorted({e.winning.prompt for e in prepared if e.sign == sign})
        if not rows:
            raise ValueError(
                f"no example has sign {sign:+d}, so there is no difference in means to weight"
                " tokens under: give reference=, a SteeringVector of this layer"
            )
        total = np.zeros(model.config.d_model)
        for group in pack([len(r) for r in rows], BATCH_TOKENS):
            found = model._layer_inputs.get([rows[i] for i in group], layer, every_layer=False)
            for row in found:
                total += row[-1]
        means.append(total / len(rows))
    direction: Any = means[0] - means[1]
    if not direction.any():
        raise ValueError(
            "the examples of both signs have the same prompts, so their means do not differ: give"
            " reference=, a SteeringVector of this layer"
        )
    return SteeringVector(direction, layer, method="difference_in_means")


def token_weights(
    model: Model,
    examples: Examples,
    vector: SteeringVector,
    coefficient: float,
    kind: str = "effect",
    *,
    limit: int = LIMIT,
) -> list[Float64Array]:
    """How much each token of the winning responses matters under a vector: for each example float64
    [tokens summed], of mean 1, as `train_ntp(token_weights=kind)` uses them.

    kind: "effect" (KL divergence of the steered next-token distribution from the unsteered one),
    "exchange" (first-order change of the response's log probability when steering is taken away at
    this position alone), "attention" (from the last position, layers from the vector's on) or
    "uniform". Raises ValueError before any work as `ntp_loss`, and for an unknown kind.
    """
    model._check_open()
    check_vector(model, vector)
    kind, coefficient = check_kind(kind), check_number(coefficient, "coefficient")
    prepared = prepare(model, examples, losing=False, limit=limit)
    found = weigh(model, prepared, kind, vector.layer, vector.direction, coefficient)
    return [found[e].copy() if found else np.ones(len(e.winning.response)) for e in prepared]
