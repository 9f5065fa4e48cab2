"""`make demo-real ARGS=--inside`: analysis of the real model's steering vector. The tokens that its
value vectors promote, how sparse it can be, and a vector learned by next-token prediction for
comparison. Every part continues where it was interrupted; figures contain no text of an answer.
"""

from __future__ import annotations

import time
from pathlib import Path

from ..base.provenance import digest
from . import report as demo

#: Samples for the gradients; prompts of each kind, new tokens and thresholds of the sparsity curve.
SAMPLES, SPARSITY_PROMPTS, SPARSITY_TOKENS, TAUS = 6, 12, 24, (0.7, 1.5)
#: Training: prompts of each kind, tokens of a response, few epochs and a high learning rate
#: (docs/method.md section 2 gives 0.01 to 0.04); test prompts of each kind.
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
    """(figures for JSON, the same as Markdown). strengths: (plus, minus); splits: as `qwen.prompts`
    returns them; candidates: the strengths to try for the learned vector.
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
    full = ov.logit_lens(
        model, [vector, -vector], top=TOP, labels=[["the vector", "its negative"]], progress=False
    )
    largest = values.largest(LARGEST)
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
                f"## What it promotes\n\n{values.norms.size} value vectors (from layer"
                f" {vector.layer} on) read through the logit lens in {seconds:.1f} s; the {LARGEST}"
                " largest:\n"
            ),
            heads.to_markdown(),
            "",
            full.to_markdown(),
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
    chosen = samples[:SAMPLES]
    scores = patching.attribute(
        model,
        chosen,
        vector,
        -minus,
        steps=10,
        dims="steer",
        checkpoint=out / "inside_scores.jsonl",
        progress=progress,
    )
    return scores, f"{len(chosen)} answers that steering flips, {scores.graph.n_edges} edges"


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
    demo.picture(table.plot, out / "qwen_sparsity.png")
    return table.to_dict(), f"## How sparse it can be\n\n{table.to_markdown()}"


def _training_pairs(model, vector, strengths, harmful, harmless, out, progress):
    """The model's own answers, steered and unsteered, as training data; kept in `out`."""
    from .. import steering

    kept = out / "inside_pairs.jsonl"
    pairs = steering.TrainingData.load(kept) if kept.exists() else None
    if pairs is None or pairs.meta["vector_hash"] != digest(vector.direction):
        pairs = steering.training_data(
            model,
            harmful[:TRAINING_PROMPTS],
            harmless[:TRAINING_PROMPTS],
            vector,
            strengths,
            max_new_tokens=RESPONSE,
            progress=progress,
        )
        pairs.save(kept)
    return pairs


def _trained(model, vector, strengths, splits, out, progress, new_tokens, candidates, lap):
    from .. import steering

    harmful, harmless = splits["train"]
    pairs = _training_pairs(model, vector, strengths, harmful, harmless, out, progress)
    lap(f"training data: {pairs.line}")
    if len(pairs) < BATCH:
        text = f"## A learned vector\n\n{pairs.line}: too few to learn from."
        return {"pairs": pairs.counts}, text
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
    sweep, compared = _compared(
        model, vector, learned, strengths, splits, progress, new_tokens, candidates
    )
    lap("NTP beside DIM")
    none = " (none of them works in both directions: those of the other vector)"
    text = (
        f"## A learned vector beside it\n\nNext-token prediction on {pairs.line}; {EPOCHS} epochs"
        f" of batches of {BATCH}, lr {LR}, used at the norm of the other vector; strength chosen on"
        f" the validation prompts{'' if sweep.best_pair else none}."
    )
    return {
        "pairs": pairs.counts,
        "training": training.to_dict(),
        "strengths": sweep.to_dict(),
        "compared": compared.to_dict(),
    }, "\n\n".join([text, training.to_markdown(), compared.to_markdown()])


def _compared(model, vector, learned, strengths, splits, progress, new_tokens, candidates):
    """(sweep of the learned vector's strength, comparison of both vectors)."""
    from .. import steering

    validation = splits["validation"]
    harmful, harmless = (side[:TEST] for side in splits["test"])
    sweep = steering.sweep(
        model, learned, candidates, *validation, max_new_tokens=SPARSITY_TOKENS, progress=progress
    )
    compared = steering.compare(
        model,
        {"DIM": vector, "NTP": learned},
        harmful,
        harmless,
        {"DIM": strengths, "NTP": sweep.best_pair or strengths},
        max_new_tokens=new_tokens,
        n_samples=SAMPLES,
        circuits=False,
        progress=progress,
    )
    return sweep, compared
