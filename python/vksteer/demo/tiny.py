"""Part 1 of the demo: a bundled model declines, is steered, and Table 1 says through what."""

from __future__ import annotations

import time
from pathlib import Path

from .report import (
    candidates_table,
    environment,
    heading,
    plot,
    say,
    side_by_side,
    strengths,
    write_json,
)

STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)  # tried on the bundled model


def bundled(out: Path, n_test: int, n_random: int, device, progress: bool) -> dict:
    """Refusal in tiny-llama-chat: candidates, the chosen vector, texts, Table 1."""
    from .. import data, freezing, steering
    from ..runtime.edits import Steer
    from ..runtime.model import Model
    from .tiny_inside import inside

    start = time.perf_counter()
    heading("1. Refusal in the bundled model tiny-llama-chat")
    say(
        "A chat model of a village world: it helps with safe requests and declines dangerous ones"
        " (all of them invented and harmless)."
    )
    with Model.from_pretrained("tiny-llama-chat", device=device, progress=False) as model:
        c = model.config
        say(
            f"{model.device}\n{c.architecture}: {c.n_layers} layers, width {c.d_model}, {c.n_heads}"
            f" heads, vocabulary {c.d_vocab}"
        )
        cands = steering.difference_in_means(model, *data.tiny_pair("train", 64), progress=progress)
        vector = cands.select(*data.tiny_pair("validation", 32), progress=progress)
        say(
            f"\nDifference in means, declined minus answered, at {len(cands.positions)} positions x"
            f" {c.n_layers} layers; best by the paper's rule first:\n"
        )
        say(candidates_table(cands))
        (out / "candidates.md").write_text(
            cands.table.to_markdown()
            + "\n\nRemoved by a filter:\n\n"
            + "\n".join(f"- {r}" for r in cands.rejected)
            + "\n"
        )
        vector.save(out / "refusal.safetensors")
        say(
            f"\nChosen: layer {vector.layer}, position {vector.position}, norm {vector.norm:.2f}."
            f" Refusal tokens: {cands.table.refusal_tokens}"
        )

        sweep = steering.sweep(
            model,
            vector,
            STRENGTHS,
            *data.tiny_pair("validation", 16),
            max_new_tokens=72,
            progress=progress,
        )
        plus, minus = strengths(sweep, (1.0, 1.0))

        harmful, harmless = data.tiny_pair("test", n_test)
        shown = harmful[:2] + harmless[:2]
        rows = [p for p in shown for _ in range(3)]
        edits = [[Steer(vector, a)] if a else [] for _ in shown for a in (-minus, 0, plus)]
        made = model.generate(rows, edits=edits, max_new_tokens=72, progress=False)
        for i, prompt in enumerate(shown):
            say(f"\n> {prompt}")
            say(
                side_by_side(
                    [
                        f"-{minus:g} (away from refusal)",
                        "unsteered",
                        f"+{plus:g} (towards refusal)",
                    ],
                    [g.text for g in made[3 * i : 3 * i + 3]],
                )
            )

        before = time.perf_counter()
        table = freezing.ablation_table(
            model,
            vector,
            harmful,
            harmless,
            (plus, minus),
            max_new_tokens=72,
            random_control=n_random,
            progress=progress,
        )
        seconds = time.perf_counter() - before
        say(
            "\nTable 1: what is left of steering when one part of the model is kept as in the"
            f" unsteered run ({seconds:.0f} s)\n"
        )
        say(table.to_markdown())
        (out / "table1.md").write_text(table.to_markdown() + "\n")
        picture = plot(table, out / "table1.png")
        heading("Inside")
        within = inside(model, vector, plus, minus, harmful[:16], harmless[:16], out, say, progress)
        result = {
            "chosen": {"layer": vector.layer, "position": vector.position, "norm": vector.norm},
            "candidates": cands.table.to_dict(),
            "sweep": sweep.to_dict(),
            "table1": table.to_dict(),
            "table1_seconds": seconds,
            **within,
            "seconds": time.perf_counter() - start,
            **environment(model),
        }
    write_json(out / "tiny.json", result)
    say(
        f"\n{result['seconds']:.0f} s. Written to {out}/: candidates.md, refusal.safetensors,"
        f" table1.md, {picture}tiny.json"
    )
    return result
