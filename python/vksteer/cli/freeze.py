"""`vksteer freeze`: Table 1 for a model (docs/method.md section 6)."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    Group,
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
)
from .vector_choice import find_vector

if TYPE_CHECKING:
    from ..freezing import AblationTable
    from ..inputs.vectors import SteeringVector

DESCRIPTION = """\
Steer harmless prompts by +A (towards refusal) and harmful prompts by -A (away from it), each time
with one part of the model frozen or ablated, and print how often the model refuses or complies:
Table 1 of arXiv 2604.08524, with random directions as control.

Without --vector one is found first: difference in means on the training prompts, chosen on the
validation prompts by the paper's rule. The bundled tiny models bring their own prompts. For other
models give two prompt files: the first half of each trains the vector, the next quarter chooses it,
and the last quarter (with --vector: all of it) is the test."""


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the parser of `vksteer`."""
    parser = commands.add_parser(
        "freeze",
        formatter_class=Help,
        help="Table 1: does a vector act through attention patterns, values or MLPs?",
        description=DESCRIPTION,
    )
    model_arguments(parser)
    group = parser.add_argument_group("prompts")
    prompt_file_arguments(group)
    limit_argument(group, 100)
    _vector(parser.add_argument_group("vector and strength"))
    _table(parser.add_argument_group("table"))
    parser.add_argument(
        "--out",
        metavar="DIR",
        help=(
            "write table, picture, answers and vector here; a second run with the same arguments"
            " resumes"
        ),
    )
    parser.set_defaults(run=run_freeze)


def _vector(group: Group) -> None:
    vector_arguments(group)
    group.add_argument(
        "--coefficient",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="A",
        help="strength; two numbers: for harmless and for harmful prompts (default: 1)",
    )


def _table(group: Group) -> None:
    group.add_argument(
        "--layers",
        metavar="each|L,L,...",
        help="freeze one layer at a time instead of all from the vector's on",
    )
    new_tokens_argument(group, 128)
    group.add_argument(
        "--random",
        type=int,
        default=3,
        metavar="N",
        help="rows with random directions of the same norm (default: 3)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="seed of the random directions (default: 0)"
    )
    judge_argument(group)


def _layers(text: str | None) -> str | list[int] | None:
    """What --layers says: None for all at once, "each", or a list of layers."""
    if text is None or text == "each":
        return text
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers takes 'each' or numbers with commas, not {text!r}") from None


def run_freeze(arguments: argparse.Namespace) -> int:
    """Runs the command; the exit status."""
    from ..freezing import ablation_table
    from ..inputs.vectors import SteeringVector
    from ..judge import LlamaGuard

    strengths = arguments.coefficient
    if len(strengths) > 2:
        raise ValueError(f"--coefficient takes one or two numbers, not {len(strengths)}")
    layers, show = _layers(arguments.layers), sys.stderr.isatty()
    train, validation, (harmful, harmless) = freeze_prompts(arguments)
    vector = SteeringVector.load(arguments.vector, arguments.layer) if arguments.vector else None
    out = Path(arguments.out) if arguments.out else None
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as opened:
        model = opened.enter_context(open_model(arguments))
        if vector is None:
            vector = find_vector(model, train, validation, arguments.criterion, out, show)
        judge = None
        if arguments.judge:
            judge = LlamaGuard(opened.enter_context(open_model(arguments, arguments.judge)))
        table = ablation_table(
            model,
            vector,
            harmful,
            harmless,
            strengths[0] if len(strengths) == 1 else tuple(strengths),
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


def _write(table: AblationTable, vector: SteeringVector, out: Path) -> None:
    """Writes table, picture and vector to the folder."""
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
