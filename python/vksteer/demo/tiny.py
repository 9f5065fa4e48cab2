"""Part 1 of the demo: a bundled model that refuses is steered, and Table 1 shows through which
parts of the model the vector acts.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model
    from ..steering.scores import Scores

NEW_TOKENS = 72
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)  # tried on the bundled model


def bundled(
    out: Path, n_test: int, n_random: int, device: str | None, progress: bool
) -> dict[str, Any]:
    """Refusal in tiny-llama-chat: candidates, the chosen vector, answers, Table 1.

    Returns what is written to tiny.json.
    """
    from .. import data, steering
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
        table, vector = _find(model, out, progress)
        prompts = data.tiny_pair("validation", 16)
        sweep = steering.sweep(
            model, vector, STRENGTHS, *prompts, max_new_tokens=NEW_TOKENS, progress=progress
        )
        plus, minus = strengths(sweep, (1.0, 1.0))
        harmful, harmless = data.tiny_pair("test", n_test)
        _answers(model, vector, plus, minus, harmful[:2] + harmless[:2])
        ablations, picture = _table1(
            model, vector, (plus, minus), harmful, harmless, n_random, out, progress
        )
        heading("Inside")
        within = inside(model, vector, plus, minus, harmful[:16], harmless[:16], out, say, progress)
        result = {
            "chosen": {"layer": vector.layer, "position": vector.position, "norm": vector.norm},
            "candidates": table.to_dict(),
            "sweep": sweep.to_dict(),
            **ablations,
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


def _find(model: Model, out: Path, progress: bool) -> tuple[Scores, SteeringVector]:
    """(Scores of all candidates, the difference in means that the paper's rule chooses)."""
    from .. import data, steering

    cands = steering.difference_in_means(model, *data.tiny_pair("train", 64), progress=progress)
    vector = cands.select(*data.tiny_pair("validation", 32), progress=progress)
    table = cands.table
    assert table is not None  # select fills it
    say(
        f"\nDifference in means, declined minus answered, at {len(cands.positions)} positions x"
        f" {model.config.n_layers} layers; best by the paper's rule first:\n"
    )
    say(candidates_table(cands))
    removed = "\n".join(f"- {r}" for r in cands.rejected)
    (out / "candidates.md").write_text(
        f"{table.to_markdown()}\n\nRemoved by a filter:\n\n{removed}\n"
    )
    vector.save(out / "refusal.safetensors")
    say(
        f"\nChosen: layer {vector.layer}, position {vector.position}, norm {vector.norm:.2f}."
        f" Refusal tokens: {table.refusal_tokens}"
    )
    return table, vector


def _answers(
    model: Model, vector: SteeringVector, plus: float, minus: float, prompts: list[str]
) -> None:
    """Prints the answers to some prompts with -minus, unsteered and with +plus side by side."""
    from ..runtime.edits import Steer

    titles = [f"-{minus:g} (away from refusal)", "unsteered", f"+{plus:g} (towards refusal)"]
    edits = [[Steer(vector, a)] if a else [] for a in (-minus, 0, plus)]
    made = model.generate(
        [p for p in prompts for _ in edits],
        edits=edits * len(prompts),
        max_new_tokens=NEW_TOKENS,
        progress=False,
    )
    for i, prompt in enumerate(prompts):
        say(f"\n> {prompt}")
        say(side_by_side(titles, [g.text for g in made[3 * i : 3 * i + 3]]))


def _table1(
    model: Model,
    vector: SteeringVector,
    coefficient: tuple[float, float],
    harmful: list[str],
    harmless: list[str],
    n_random: int,
    out: Path,
    progress: bool,
) -> tuple[dict[str, Any], str]:
    """(Table 1 for JSON, the name of its picture for a list of files)."""
    from .. import freezing

    before = time.perf_counter()
    table = freezing.ablation_table(
        model,
        vector,
        harmful,
        harmless,
        coefficient,
        max_new_tokens=NEW_TOKENS,
        random_control=n_random,
        progress=progress,
    )
    seconds = time.perf_counter() - before
    say(
        "\nTable 1: how much of the effect of steering is left when one part of the model is kept"
        f" as in the unsteered run ({seconds:.0f} s)\n"
    )
    say(table.to_markdown())
    (out / "table1.md").write_text(table.to_markdown() + "\n")
    picture = plot(table, out / "table1.png")
    return {"table1": table.to_dict(), "table1_seconds": seconds}, picture
