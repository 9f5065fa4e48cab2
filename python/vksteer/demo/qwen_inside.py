"""`make demo-real ARGS=--inside`: the real model's steering vector taken apart. What its value
vectors promote, how sparse it may become, and a vector learned by next-token prediction beside it.
Every part goes on where it was interrupted; figures carry no text of an answer.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..base.provenance import digest
from . import report as demo

#: Samples that gradients are taken on; prompts a side, new tokens and thresholds
#: of the sparsity curve.
SAMPLES, SPARSITY_PROMPTS, SPARSITY_TOKENS, TAUS = 6, 12, 24, (0.7, 1.5)
#: Training: prompts a side and tokens of their responses, few epochs, a high rate (method.md
#: section 2 gives .01 to .04); test prompts a side.
TRAINING_PROMPTS, RESPONSE, EPOCHS, BATCH, LR, TEST = 24, 48, 2, 6, 0.04, 24
LARGEST, TOP = 12, 8


def inside(
    model,
    vector,
    strengths,
    splits,
    out: Path,
    say,
    lap,
    progress: bool,
    new_tokens: int,
    candidates=(1.0, 2.0, 3.0),
) -> tuple[dict, str]:
    """(figures for JSON, the same as Markdown). strengths: (plus, minus); splits: as
    `demo_real.prompts`; candidates: strengths tried for the learned vector.
    """
    parts = {"lens": _lens(model, vector, progress)}
    lap("value vectors and their lens")
    scores, line = _scores(
        model,
        vector,
        strengths[1],
        splits["validation"][0] + splits["train"][0],
        out,
        progress,
        new_tokens,
    )
    lap(f"gradients: {line}")
    if scores is not None:
        parts["sparsity"] = _sparsity(
            model, vector, scores, strengths, splits["test"], out, progress
        )
        lap("sparsity")
    parts["ntp"] = _trained(
        model, vector, strengths, splits, out, progress, new_tokens, candidates, lap
    )
    figures = {name: part[0] for name, part in parts.items()}
    text = "\n\n".join(part[1] for part in parts.values())
    say("\n" + text)
    return {"samples": line, **figures}, text


def _lens(model, vector, progress):
    from .. import ov

    start = time.perf_counter()
    values = ov.steering_value_vectors(model, vector)
    lens = ov.logit_lens(model, values, top=TOP, progress=progress)
    seconds = time.perf_counter() - start
    whole = ov.logit_lens(
        model, [vector, -vector], top=TOP, labels=[["the vector", "its negative"]], progress=False
    )
    largest = [tuple(map(int, place)) for place in values.largest(LARGEST)]
    at = [(l - vector.layer, h) for l, h in largest]
    heads = ov.logit_lens(
        model,
        [values[place] for place in largest],
        top=TOP,
        labels=[[f"{lens.label(i)}, norm {values.norms[i]:.3g}" for i in at]],
        progress=False,
    )
    text = "\n".join(
        [
            (
                f"## What it promotes\n\n{values.norms.size} value vectors (layers {vector.layer}"
                f" on) read through the lens in {seconds:.1f} s; the {LARGEST} largest:\n"
            ),
            heads.to_markdown(),
            "",
            whole.to_markdown(),
        ]
    )
    return {"seconds": round(seconds, 2), "largest": largest, "tokens": lens.to_dict()}, text


def _scores(model, vector, minus, harmful, out, progress, new_tokens):
    from .. import patching

    samples = patching.make_samples(
        model, harmful, vector, -minus, max_new_tokens=new_tokens, progress=False
    )
    if not len(samples):
        return (
            None,
            f"steering flips none of {len(harmful)} prompts: no gradients, no sparsity curve",
        )
    samples = samples[:SAMPLES]
    scores = patching.attribute(
        model,
        samples,
        vector,
        -minus,
        steps=10,
        dims="steer",
        checkpoint=out / "inside_scores.jsonl",
        progress=progress,
    )
    return scores, f"{len(samples)} answers that steering flips, {scores.graph.n_edges} edges"


def _sparsity(model, vector, scores, strengths, test, out, progress):
    from .. import sparsify

    harmful, harmless = (side[:SPARSITY_PROMPTS] for side in test)
    table = sparsify.sweep(
        model,
        vector,
        scores,
        harmful,
        harmless,
        strengths,
        taus=TAUS,
        max_new_tokens=SPARSITY_TOKENS,
        out=out / "inside_sparsity.jsonl",
        progress=progress,
    )
    demo.plot(table, out / "qwen_sparsity.png")
    return table.to_dict(), f"## How sparse it may become\n\n{table.to_markdown()}"


def _trained(model, vector, strengths, splits, out, progress, new_tokens, candidates, lap):
    from .. import steering

    kept = out / "inside_pairs.jsonl"
    pairs = steering.TrainingData.load(kept) if kept.exists() else None
    if pairs is None or pairs.meta["vector_hash"] != digest(vector.direction):
        pairs = steering.training_data(
            model,
            *(side[:TRAINING_PROMPTS] for side in splits["train"]),
            vector,
            strengths,
            max_new_tokens=RESPONSE,
            progress=progress,
        )
        pairs.save(kept)
    lap(f"training data: {pairs.line}")
    if len(pairs) < BATCH:
        return {
            "pairs": pairs.counts
        }, f"## A learned vector\n\n{pairs.line}: too few to learn from."
    start = time.perf_counter()
    training = steering.train_ntp(
        model,
        pairs,
        layer=vector.layer,
        coefficient=1.0,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=LR,
        limit=RESPONSE,
        checkpoint=out / "inside_ntp.json",
        progress=progress,
    )
    learned = training.normalized_to(vector)
    learned.save(out / "qwen_ntp.safetensors")
    lap(f"NTP: {len(training.losses)} steps, {time.perf_counter() - start:.0f} s")
    harmful, harmless = splits["validation"]
    sweep = steering.sweep(
        model,
        learned,
        candidates,
        harmful,
        harmless,
        max_new_tokens=SPARSITY_TOKENS,
        progress=progress,
    )
    pair = sweep.best_pair or strengths
    compared = steering.compare(
        model,
        {"DIM": vector, "NTP": learned},
        *(side[:TEST] for side in splits["test"]),
        {"DIM": strengths, "NTP": pair},
        max_new_tokens=new_tokens,
        n_samples=SAMPLES,
        circuits=False,
        progress=progress,
    )
    lap("NTP beside DIM")
    text = "\n\n".join(
        [
            (
                f"## A learned vector beside it\n\nNext-token prediction on {pairs.line}; {EPOCHS}"
                f" epochs of batches of {BATCH}, lr {LR}, the norm of the other one "
                "when used; strength chosen on the validation"
                f" prompts{'' if sweep.best_pair else ' (none of them works both ways: those of the other vector)'}."
            ),
            training.to_markdown(),
            compared.to_markdown(),
        ]
    )
    return {
        "pairs": pairs.counts,
        "training": training.to_dict(),
        "strengths": sweep.to_dict(),
        "compared": compared.to_dict(),
    }, text
