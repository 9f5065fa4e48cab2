"""`vksteer screen` and `vksteer sweep`: will a vector work, and how strong must it be?"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import (
    Help,
    Subparsers,
    freeze_prompts,
    judge_argument,
    limit_argument,
    model_arguments,
    new_tokens_argument,
    open_model,
    prompt_file_arguments,
    vector_arguments,
    whole_prompts,
)
from .vector_choice import find_vector

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

SCREEN = """\
Predict from activations alone whether a difference in means will steer: mean cosine, d', AUC and
stability at every layer and position, with a verdict (docs/reliability.md). Nothing is steered.

The two prompt files are pairs: line i of both is the same question with the matching and the
non-matching answer. Where one file is longer, its last prompts are left out. The bundled tiny
models bring their own prompts."""

SWEEP = """\
Steer harmless prompts by +A and harmful prompts by -A at several strengths, and print for each how
often the model refuses or complies, the dose (the length of what is added over the length of the
residual stream), side effects on the next token, and whether the answers stay readable. With
--calibrate the strengths are searched: the lowest and the highest that work, both ways.

Without --vector one is found first, as `vksteer freeze` does."""


def add_parser(commands: Subparsers) -> None:
    """Adds both commands to the parser of `vksteer`."""
    parser = commands.add_parser(
        "screen",
        formatter_class=Help,
        help="will a vector work? predictors from activations, before steering",
        description=SCREEN,
    )
    model_arguments(parser)
    prompt_file_arguments(parser.add_argument_group("prompts"))
    group = parser.add_argument_group("screen")
    group.add_argument(
        "--positions",
        type=int,
        nargs="+",
        default=[-1],
        metavar="P",
        help="counted back from the prompt's end (default: -1)",
    )
    group.add_argument(
        "--leave-one-out",
        action="store_true",
        help="cosine of each sample with the mean of the others",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    _out(parser)
    parser.set_defaults(run=run_screen)
    _add_sweep(commands)


def _add_sweep(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "sweep",
        formatter_class=Help,
        help="how strong must steering be? several coefficients with a verdict each",
        description=SWEEP,
    )
    model_arguments(parser)
    group = parser.add_argument_group("prompts")
    prompt_file_arguments(group)
    limit_argument(group, 32)
    group = parser.add_argument_group("vector and strength")
    vector_arguments(group)
    group.add_argument(
        "--coefficients",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 1.0, 1.5, 2.0],
        metavar="A",
        help="strengths (default: 0.25 0.5 1 1.5 2)",
    )
    group.add_argument(
        "--calibrate",
        action="store_true",
        help="find the coefficients that work by doubling and bisection instead of a list",
    )
    group.add_argument(
        "--prompt-baseline",
        nargs="+",
        metavar="TEXT",
        help="also put this text before each prompt instead of steering; two texts: before harmless"
        " and before harmful prompts",
    )
    group = parser.add_argument_group("answers")
    new_tokens_argument(group, 64)
    judge_argument(group)
    _out(parser)
    parser.set_defaults(run=run_sweep)


def _out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", metavar="DIR", help="write the table as Markdown and JSON, and a picture, here"
    )


def run_screen(arguments: argparse.Namespace) -> int:
    """Runs `vksteer screen`; the exit status."""
    from ..reliability import screen

    positive, negative = whole_prompts(arguments)
    n = min(len(positive), len(negative))
    if len(positive) != len(negative):
        print(f"{len(positive)} and {len(negative)} prompts: the first {n} of each are paired")
    with open_model(arguments) as model:
        table = screen(
            model,
            positive[:n],
            negative[:n],
            positions=arguments.positions,
            leave_one_out=arguments.leave_one_out,
            seed=arguments.seed,
            progress=sys.stderr.isatty(),
        )
    print(table.to_markdown())
    _write(arguments.out, "screen", table)
    return 0


def run_sweep(arguments: argparse.Namespace) -> int:
    """Runs `vksteer sweep`; the exit status."""
    from ..inputs.vectors import SteeringVector
    from ..judge import LlamaGuard

    show = sys.stderr.isatty()
    train, validation, (harmful, harmless) = freeze_prompts(arguments)
    vector = SteeringVector.load(arguments.vector, arguments.layer) if arguments.vector else None
    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_model(arguments))
        if vector is None:
            vector = find_vector(model, train, validation, arguments.criterion, None, show)
        judge = None
        if arguments.judge:
            judge = LlamaGuard(opened.enter_context(open_model(arguments, arguments.judge)))
        options = {
            "max_new_tokens": arguments.max_new_tokens,
            "judge": judge,
            "progress": show,
        }
        if arguments.calibrate:
            return _calibrate(arguments, model, vector, harmful, harmless, options)
        return _sweep(arguments, model, vector, harmful, harmless, options)


def _calibrate(
    arguments: argparse.Namespace,
    model: Model,
    vector: SteeringVector,
    harmful: list[str],
    harmless: list[str],
    options: dict[str, Any],
) -> int:
    from ..steering import calibrate

    found = calibrate(model, vector, harmful, harmless, **options)
    print(found.to_markdown())
    _write(arguments.out, "calibration", found)
    return 0


def _sweep(
    arguments: argparse.Namespace,
    model: Model,
    vector: SteeringVector,
    harmful: list[str],
    harmless: list[str],
    options: dict[str, Any],
) -> int:
    from ..steering import sweep

    texts = arguments.prompt_baseline
    baseline = texts[0] if texts and len(texts) == 1 else texts
    table = sweep(
        model,
        vector,
        arguments.coefficients,
        harmful,
        harmless,
        prompt_baseline=baseline,
        **options,
    )
    print(table.to_markdown())
    best = table.best_pair
    if best is None:
        print("\nNo coefficient works in both directions without breaking the text.")
    else:
        print(f"\nBest: +{best[0]:g} on harmless prompts, -{best[1]:g} on harmful ones.")
    _write(arguments.out, "sweep", table)
    return 0


def _write(out: str | None, name: str, table: Any) -> None:
    """Writes a table, and its picture where it has one, to the folder."""
    if out is None:
        return
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(table.to_markdown() + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(table.to_dict(), indent=2), encoding="utf-8")
    if hasattr(table, "plot"):
        try:
            table.plot().savefig(folder / f"{name}.png", dpi=150)
        except ImportError as error:
            print(f"No picture: {error}", file=sys.stderr)
    print(f"\nWritten to {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
