"""`python -m vksteer.demo` (make demo): a steering vector found, tried out and taken apart on the
bundled chat model, then the same engine on a real model.

Part 1, tiny-llama-chat: refusal as a direction, its candidates, texts steered both ways, Table 1
with a picture, the circuit that carries it, what its value vectors promote, and how sparse it may
become (demo_inside.py).
Part 2, SmolLM2-135M-Instruct, fetched as a Python package where that can be done: verse against
prose, speed as shares of what the device can do. `--real` (make demo-real): the study's first table
on Qwen2.5-Coder-0.5B-Instruct; see demo_real.py. Everything is written to a folder.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from .report import fetched, say
from .smollm2 import SMOLLM2, real
from .tiny import bundled

# -- part 1: the bundled model ---------------------------------------------------------------------


# -- part 2: a real model --------------------------------------------------------------------------


def main(argv=None) -> int:
    """Returns the exit status: 0 when at least one part ran, 1 when none could, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m vksteer.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", default="demo_out", type=Path, help="folder for what is found (default: demo_out)"
    )
    parser.add_argument("--device", help="which Vulkan device: index, part of its name, or UUID")
    parser.add_argument(
        "--part",
        choices=("tiny", "smollm2", "both"),
        default="both",
        help="which part to run (default: both)",
    )
    parser.add_argument(
        "--test",
        type=int,
        default=None,
        metavar="N",
        help="test prompts of each kind for Table 1 (default: 100; --real: 64)",
    )
    parser.add_argument(
        "--random",
        type=int,
        default=3,
        metavar="N",
        help="rows of random directions in Table 1 (default: 3)",
    )
    parser.add_argument(
        "--real",
        action="store_true",
        help="Table 1 on Qwen2.5-Coder-0.5B-Instruct instead (half an hour and more on two cores)",
    )
    parser.add_argument(
        "--inside",
        action="store_true",
        help=(
            "with --real: take apart the vector that an earlier run left in --out (lens, sparsity,"
            " a learned one)"
        ),
    )
    parser.add_argument(
        "--harmful",
        metavar="FILE[:COLUMN]",
        help="with --real: prompts that the model declines, instead of the written ones",
    )
    parser.add_argument(
        "--harmless", metavar="FILE[:COLUMN]", help="with --real: prompts that it answers"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help=(
            "with --real: also write the figures (no texts) into this folder, for example"
            " docs/results"
        ),
    )
    arguments = parser.parse_args(argv)
    if not arguments.real and (arguments.harmful or arguments.harmless):
        arguments.real = True  # prompts of one's own are for a real model
    from ..errors import DeviceError, ModelError

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.real:
            from . import qwen as demo_real

            return demo_real.run(arguments)
        return parts(arguments)
    except (DeviceError, ModelError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def parts(arguments) -> int:
    ran = 0
    with warnings.catch_warnings():
        # the device is printed in each part
        warnings.filterwarnings("ignore", message="no GPU found")
        if arguments.part != "smollm2":
            if (
                Path(__file__).parents[1] / "models" / "tiny-llama-chat" / "model.safetensors"
            ).exists():
                bundled(
                    arguments.out,
                    arguments.test or 100,
                    arguments.random,
                    arguments.device,
                    sys.stderr.isatty(),
                )
                ran += 1
            else:
                say("The bundled model tiny-llama-chat is not in this tree: part 1 is left out.")
        if arguments.part != "tiny":
            path = fetched(SMOLLM2, "smollm2")
            if path:
                real(path, arguments.out, arguments.device, progress=sys.stderr.isatty())
                ran += 1
            else:
                say("Part 2, the real model, is left out.")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
