"""`vksteer study`, `vksteer report` and `vksteer compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import (
    Help,
    Subparsers,
    model_arguments,
    open_model,
    prompt_file_arguments,
)

if TYPE_CHECKING:
    from ..study.prompts import Given

STUDY = """\
Run every experiment of the method on one model, in one folder: reliability, candidates and choice,
strength, learned vectors, Table 1, edge scores, circuits, value vectors and sparsity, and draw
them as DIR/report.html. DIR/results.json holds every number, DIR/run.json times and devices.

The command may be killed at any moment: given again, it goes on where it was. The bundled tiny
models bring their own prompts; other models need two prompt files, which are shuffled by the seed
and cut into training, validation and test. Test prompts may come from files of their own."""

REPORT = """\
Draw DIR/report.html again from the results that a study has left in DIR. Nothing is computed."""

COMPARE = """\
Put the results of several studies side by side: the five claims, the chosen vectors, the attack
success rates and the circuits, as a table in Markdown."""


def add_parsers(commands: Subparsers) -> None:
    """Adds the three commands to the parser of `vksteer`."""
    _add_study(commands)
    parser = commands.add_parser(
        "report",
        formatter_class=Help,
        help="draw the report of a study again",
        description=REPORT,
    )
    parser.add_argument("folder", metavar="DIR", help="the folder of a study")
    parser.add_argument(
        "--no-texts",
        action="store_true",
        help="leave out prompts, answers and tokens, for a report that is published",
    )
    parser.set_defaults(run=run_report)
    parser = commands.add_parser(
        "compare",
        formatter_class=Help,
        help="put studies side by side",
        description=COMPARE,
    )
    parser.add_argument("folders", metavar="DIR", nargs="+", help="folders of studies")
    parser.add_argument("--out", metavar="FILE", help="write the table here (default: print it)")
    parser.add_argument(
        "--paper", action="store_true", help="add the figures of the paper's two models"
    )
    parser.set_defaults(run=run_compare)


def _add_study(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "study",
        formatter_class=Help,
        help="every experiment of the method on one model, resumable, with a report",
        description=STUDY,
    )
    model_arguments(parser)
    prompts = parser.add_argument_group("prompts")
    prompt_file_arguments(prompts)
    for kind in ("harmful", "harmless"):
        prompts.add_argument(
            f"--{kind}-test",
            metavar="FILE[:COLUMN]",
            help=f"{kind} prompts of the test (default: a part of --{kind})",
        )
    group = parser.add_argument_group("study")
    group.add_argument("--out", metavar="DIR", required=True, help="the folder of the study")
    group.add_argument(
        "--size",
        choices=("tiny", "demo", "small", "full"),
        help=(
            "how many samples: tiny takes a minute on the bundled models (default: small, or what a"
            " budget has chosen in this folder)"
        ),
    )
    group.add_argument(
        "--budget",
        metavar="TIME",
        help=(
            "choose as many samples as this device can work through in TIME, such as 90s, 30m or"
            " 1h30m, where nothing else runs"
        ),
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of splits, training and controls (default: 0)"
    )
    group.add_argument(
        "--plan",
        action="store_true",
        help="print which steps would run, why, and what they would take, and stop",
    )
    group.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="run the steps on a dask.distributed cluster, for example tcp://host:8786",
    )
    for option, text in (
        ("--only", "run these steps and what they need"),
        ("--skip", "leave out these steps and those that need them"),
        ("--force", "run these steps again"),
    ):
        group.add_argument(option, nargs="+", metavar="STEP", help=text)
    parser.set_defaults(run=run_study)


def run_study(arguments: argparse.Namespace) -> int:
    """Runs `vksteer study`; the exit status."""
    from ..study.claims import shown
    from ..study.running import check, run

    harmful, harmless = _prompts(arguments)
    check(  # before the model is loaded
        harmful,
        harmless,
        arguments.out,
        size=arguments.size,
        budget=arguments.budget,
        seed=arguments.seed,
        only=arguments.only,
        skip=arguments.skip,
        force=arguments.force,
    )
    with open_model(arguments) as model:
        study = run(
            model,
            harmful,
            harmless,
            arguments.out,
            size=arguments.size,
            budget=arguments.budget,
            seed=arguments.seed,
            only=arguments.only,
            skip=arguments.skip,
            force=arguments.force,
            plan_only=arguments.plan,
            scheduler=arguments.scheduler,
            progress=sys.stderr.isatty() or (lambda done, total: None),  # lines, but no bars
        )
    if arguments.plan:
        print(study.plan())
        return 0
    for claim in study.results["claims"]:
        print(f"{claim['claim']}\n    {claim['verdict']}: {shown(claim)}")
    print(f"\n{study.report}")
    return 0


def _prompts(arguments: argparse.Namespace) -> tuple[Given | None, Given | None]:
    """(Harmful, harmless) prompts of the files; None for both where a bundled model brings its own.

    Raises ValueError for options that need others.
    """
    from ..data.prompt_files import prompts_of
    from ..loading.locate import is_bundled

    files = {name: getattr(arguments, name) for name in ("harmful", "harmless")}
    tests = {name: getattr(arguments, f"{name}_test") for name in files}
    for name, file in files.items():
        if file is None and tests[name] is not None:
            raise ValueError(f"--{name}-test belongs to --{name}: give both")
    if (files["harmful"] is None) != (files["harmless"] is None):
        raise ValueError("--harmful and --harmless belong together: give both")
    if files["harmful"] is None:
        if not is_bundled(arguments.model):
            raise ValueError(
                "give prompts with --harmful FILE and --harmless FILE (only the bundled tiny models"
                " bring their own)"
            )
        return None, None
    found: list[Given] = [
        prompts_of(file)
        if tests[name] is None
        else {"train": prompts_of(file), "test": prompts_of(tests[name])}
        for name, file in files.items()
    ]
    return found[0], found[1]


def run_report(arguments: argparse.Namespace) -> int:
    """Runs `vksteer report`; the exit status."""
    from ..study.report import write_report

    print(write_report(arguments.folder, texts=not arguments.no_texts))
    return 0


def run_compare(arguments: argparse.Namespace) -> int:
    """Runs `vksteer compare`; the exit status."""
    from ..study.comparing import compare

    text = compare(arguments.folders, paper=arguments.paper)
    if arguments.out is None:
        print(text)
    else:
        Path(arguments.out).write_text(text + "\n", encoding="utf-8")
        print(arguments.out)
    return 0
