"""`python -m vksteer.demo` (make demo): the study of a bundled chat model, told while it runs, then
the same engine on a real model.

Part 1: the study (vs.study.run) finds the vector that makes the model decline, and what comes of
it: answers steered both ways, Table 1, the circuit that carries it, the paper's five claims, and a
report for the browser.
Part 2, SmolLM2-135M-Instruct, fetched as a Python package where that is possible: verse against
prose, and the speed as shares of what the device can do.
--real (make demo-real): the study's first table on Qwen2.5-Coder-0.5B-Instruct instead.
Everything is written to a folder. An interrupted demo goes on where it stopped when it is called
again, and what is complete is told again without being computed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .bundled import MODEL, bundled
from .report import fetched, say
from .smollm2 import SMOLLM2, real

if TYPE_CHECKING:
    from ..study import Study


def _build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vksteer.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="demo_out", type=Path, help="folder for all results (default: demo_out)"
    )
    parser.add_argument("--device", help="the Vulkan device: index, part of its name, or UUID")
    parser.add_argument(
        "--part",
        choices=("study", "smollm2", "both"),
        default="both",
        help="which part to run (default: both)",
    )
    parser.add_argument(
        "--size",
        choices=("tiny", "demo", "small", "full"),
        default="demo",
        help="sample counts of the study (default: demo)",
    )
    _real_arguments(parser.add_argument_group("a larger real model"))
    return parser


def _real_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--real",
        action="store_true",
        help="Table 1 on Qwen2.5-Coder-0.5B-Instruct instead (over half an hour on two cores)",
    )
    group.add_argument(
        "--inside",
        action="store_true",
        help=(
            "with --real: analyse the vector that an earlier run left in --out (logit lens,"
            " sparsity, a learned vector)"
        ),
    )
    group.add_argument(
        "--harmful",
        metavar="FILE[:COLUMN]",
        help="with --real: prompts that the model declines, instead of the written ones",
    )
    group.add_argument(
        "--harmless", metavar="FILE[:COLUMN]", help="with --real: prompts that it answers"
    )
    group.add_argument(
        "--test",
        type=int,
        default=64,
        metavar="N",
        help="with --real: test prompts of each kind for Table 1 (default: 64)",
    )
    group.add_argument(
        "--random",
        type=int,
        default=3,
        metavar="N",
        help="with --real: rows of random directions in Table 1 (default: 3)",
    )
    group.add_argument(
        "--results",
        type=Path,
        help=(
            "with --real: also write the figures (no texts) into this folder, for example"
            " docs/results"
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and returns the exit status: 0 if at least one part ran, 1 if none could, 2 for
    bad input, 130 after Ctrl-C.
    """
    arguments = _build().parse_args(argv)
    if arguments.harmful or arguments.harmless:  # prompt files are for the real model
        arguments.real = True
    from ..errors import DeviceError, ModelError

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.real:
            from . import qwen

            return qwen.run(arguments)
        return parts(arguments)
    except (DeviceError, ModelError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def parts(arguments: argparse.Namespace) -> int:
    """Runs the parts whose models are there; the exit status."""
    weights = Path(__file__).parents[1] / "models" / MODEL / "model.safetensors"
    show, ran = sys.stderr.isatty(), 0
    study: Study | None = None
    with warnings.catch_warnings():
        # Each part prints its device, so the warning would repeat that.
        warnings.filterwarnings("ignore", message="no GPU found")
        if arguments.part != "smollm2":
            if weights.exists():
                study = bundled(arguments.out, arguments.size, arguments.device, show)
                ran += 1
            else:
                say(f"The bundled model {MODEL} is not in this tree: part 1 is left out.")
        if arguments.part != "study":
            path = fetched(SMOLLM2, "smollm2")
            if path:
                real(path, arguments.out, arguments.device, progress=show)
                ran += 1
            else:
                say("Part 2, the real model, is left out.")
            if study is not None:  # what part 2 printed stands between here and its path
                say(f"\nThe report of the study (part 1): {study.report}")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
