"""EAP-IG over whole responses: scores of edges, nodes and dimensions, from the engine's own
gradients (docs/method.md section 5).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np

from ..base.bytes import memory_bytes
from ..base.progress import Progress
from ..base.provenance import digest, identity_for, kernel_names
from ..base.store import Store
from ..base.types import Float32Array, PathLike, ProgressLike
from ..inputs.samples import check_samples, check_steering, samples_hash
from ..runtime import finite
from ..runtime.edits import Steer
from .attribution_layout import Layout, group_samples, layout
from .attribution_pooling import SampleScores, pool
from .attribution_runs import AttributionRuns, Settings
from .edge_scores import EdgeScores, score_provenance

if TYPE_CHECKING:
    from ..inputs.samples import Sample
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model


def attribute(
    model: Model,
    samples: Sequence[Sample],
    vector: SteeringVector,
    coefficient: float,
    *,
    clean: str = "steered",
    steps: int = 10,
    rule: str = "midpoint",
    metric: str = "logit_diff",
    threshold: float = 0.0,
    at: str = "pre_norm",
    capped: bool = True,
    dims: str = "steer",
    per_position: bool = False,
    per_sample: bool = False,
    max_memory: int | str | None = None,
    progress: ProgressLike = True,
    checkpoint: PathLike | None = None,
) -> EdgeScores:
    """EAP-IG scores of all edges, nodes and dimensions (docs/method.md section 5).

    samples: prompts with whole responses, teacher forced. clean: "steered" or "base"; the
    integration path always runs from base to steered, in `steps` steps by `rule` ("midpoint",
    "left", "right"). metric: "logit_diff" (where the greedy tokens of the two runs differ; ignores
    threshold), "directional_kl" or "kl" (where KL(P_steer || P_base) > threshold, in nats).
    capped: logits after the final softcap. at: gradients with respect to inputs before their norm
    ("pre_norm") or after it ("normed"). dims: "steer" for scores.dims [1, D], "all" for [N, D].
    per_position: scores.positions, [E, S] of each sample. per_sample: scores.sample_edges [n, E]
    and sample_nodes [n, N]. max_memory: device bytes beside the weights (int or "2GiB"; default 1
    GiB or half of what is free); results are bit-identical whatever it is. progress: in steps.
    checkpoint: a file; a call that was interrupted goes on from it, with bit-identical results.
    Raises ValueError and TypeError before any work; DeviceError.
    """
    model._check_open()
    samples = check_samples(model, samples)
    coefficient = check_steering(model, vector, coefficient)
    settings = Settings(
        steps, rule, metric, threshold, at, clean, capped, dims, per_position
    ).checked()
    return _attribute(
        model, samples, vector, coefficient, settings, per_sample, max_memory, progress, checkpoint
    )


def _attribute(
    model: Model,
    samples: list[Sample],
    vector: SteeringVector,
    coefficient: float,
    settings: Settings,
    per_sample: bool,
    max_memory: int | str | None,
    progress: ProgressLike,
    checkpoint: PathLike | None,
) -> EdgeScores:
    budget = memory_bytes(max_memory)
    lengths, steps = [len(s) for s in samples], settings.steps
    normed, distributions = settings.at == "normed", settings.metric != "logit_diff"
    plan = layout(model, vector.layer, lengths, steps, normed, distributions, budget)
    if progress is True:
        print(_announcement(plan, lengths, steps), file=sys.stderr)
    provenance = score_provenance(model, vector, coefficient)
    store, found = _checkpoint(
        checkpoint,
        digest(
            asdict(settings),
            identity_for(checkpoint, model),
            kernel_names(model),  # others round otherwise
            [vector.layer, float(coefficient), vector.direction],
            samples_hash(samples),
        ),
    )
    runs = AttributionRuns(model, vector, coefficient, settings, plan)
    with Progress(progress, steps * len(samples), "attribute") as bar:
        if found:
            bar.step(steps * len(found))
        missing = [i for i in range(len(samples)) if i not in found]
        for group in group_samples(missing, lengths, plan):
            part = [samples[i] for i in group]
            inputs = layer_inputs(model, [s.tokens for s in part], vector.layer)
            new = dict(zip(group, runs.group(part, inputs, bar.step), strict=True))
            found.update(new)
            for i, result in new.items():
                _check_finite(model, samples[i], i, vector, coefficient, result)
                store.put(str(i), result)
    return pool(
        runs.graph,
        samples,
        [found[i] for i in range(len(samples))],
        asdict(settings),
        provenance,
        per_sample,
        (runs.dims_rows, model.config.d_model),
    )


def _check_finite(
    model: Model,
    sample: Sample,
    index: int,
    vector: SteeringVector,
    coefficient: float,
    result: SampleScores,
) -> None:
    """Raises ValueError where a sample's scores hold NaN or infinity, with the layer and site of
    the steered run where that begins. Scores that are all zero are examined, too: an overflow in a
    norm makes its output zero.
    """
    if result is None:
        return
    scores = [np.asarray(x) for x in result[1:]]
    good = all(map(finite.all_finite, scores))
    if good and any(x.any() for x in scores):
        return
    n = len(sample.prompt_tokens)
    why = finite.explain(model, sample.tokens, n, [Steer(vector, coefficient)], None)
    if why is not None or not good:
        raise ValueError(
            f"samples[{index}]: scores are not finite;"
            f" {why or 'base and steered run are finite, so the gradients overflow float32'}"
        )


def _announcement(plan: Layout, lengths: Sequence[int], steps: int) -> str:
    kept = "activations kept" if plan.keep_inside else "activations computed twice"
    return (
        f"vksteer: attribution of {len(lengths)} samples, {sum(lengths)} tokens, {steps} steps:"
        f" {plan.bytes / 1e6:.0f} MB beside the weights, {plan.n_sample_tokens} tokens at a time,"
        f" {kept}"
    )


def layer_inputs(model: Model, rows: Sequence[Sequence[int]], layer: int) -> list[Float32Array]:
    """The unsteered residual stream that enters `layer`, float32 [tokens, D] of each token row.
    Layers from `layer` on are not run.
    """
    site = f"blocks.{layer}.hook_resid_pre"
    run = model.run([list(r) for r in rows], capture=[site], logits=None)
    return [np.ascontiguousarray(x[-len(r) :]) for r, x in zip(rows, run[site])]


def _checkpoint(path: PathLike | None, key: str) -> tuple[Store, dict[int, SampleScores]]:
    """The store of finished samples and what it holds: (weight, edges, nodes, dims), or None for a
    sample without metric positions.
    """
    store = Store(
        path,
        format="vksteer.attribution",
        key=key,
        argument="checkpoint",
        what="checkpoint of an attribution",
        other="another attribution (model, vector, samples or settings differ)",
        field=None,
    )
    try:
        return store, {int(i): None if store[i] is None else tuple(store[i]) for i in store}
    except (TypeError, ValueError) as error:
        store.refuse(error)
