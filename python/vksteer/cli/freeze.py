"""`vksteer freeze`: Table 1 for a model."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from .arguments import freeze_prompts, open_model


def _layers(text):
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers takes 'each' or numbers with commas, not {text!r}") from None


def run_freeze(arguments) -> int:
    from .. import steering
    from ..freezing import ablation_table
    from ..inputs.vectors import SteeringVector
    from ..judge import LlamaGuard

    if len(arguments.coefficient) > 2:
        raise ValueError(
            f"--coefficient takes one or two numbers, not {len(arguments.coefficient)}"
        )
    layers, show = _layers(arguments.layers), sys.stderr.isatty()
    train, validation, test = freeze_prompts(arguments)
    vector = SteeringVector.load(arguments.vector, arguments.layer) if arguments.vector else None
    out = Path(arguments.out) if arguments.out else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_model(arguments))
        if vector is None:
            candidates = steering.difference_in_means(model, *train, progress=show)
            print(
                f"Candidates: {len(candidates.positions)} positions"
                f" ({', '.join(f'{p} {t!r}' for p, t in zip(candidates.positions, candidates.position_texts))})"
                f" x {model.config.n_layers} layers"
            )
            try:
                vector = candidates.select(
                    *validation, criterion=arguments.criterion, progress=show
                )
            finally:
                if out is not None and candidates.table is not None:
                    removed = "\n".join(f"- {r}" for r in candidates.rejected)
                    (out / "candidates.md").write_text(
                        f"{candidates.table.to_markdown()}\n\nRemoved by a filter:\n\n{removed}\n",
                        encoding="utf-8",
                    )
            chosen = vector.meta["selection"]
            score = "bypass_ablation" if arguments.criterion == "arditi" else "bypass"
            print(f"Refusal tokens: {candidates.table.refusal_tokens}")
            print(
                f"Chosen: layer {vector.layer}, position {vector.position} ({score}"
                f" {chosen[score]:.2f}, induce {chosen['induce']:.2f}, KL {chosen['kl']:.3f};"
                f" {len(candidates.rejected)} of"
                f" {candidates.vectors.shape[0] * candidates.vectors.shape[1]} candidates removed"
                " by filters)\n"
            )
        judge = (
            LlamaGuard(opened.enter_context(open_model(arguments, arguments.judge)))
            if arguments.judge
            else None
        )
        coefficient = (
            arguments.coefficient[0]
            if len(arguments.coefficient) == 1
            else tuple(arguments.coefficient)
        )
        table = ablation_table(
            model,
            vector,
            *test,
            coefficient,
            max_new_tokens=arguments.max_new_tokens,
            judge=judge,
            layers=layers,
            random_control=arguments.random,
            seed=arguments.seed,
            out=None if out is None else out / "answers.json",
            progress=show,
        )
    print(table.to_markdown())
    if out is not None:
        _write(table, vector, out)
    return 0


def _write(table, vector, out: Path):
    (out / "table.md").write_text(table.to_markdown() + "\n", encoding="utf-8")
    (out / "table.json").write_text(json.dumps(table.to_dict(), indent=2), encoding="utf-8")
    vector.save(out / "vector.safetensors")
    if vector.layer >= 2:
        vector.save(out / "vector.gguf")
    try:
        table.plot(out / "table.png")
    except ImportError as error:
        print(f"No picture: {error}", file=sys.stderr)
    print(f"\nWritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
