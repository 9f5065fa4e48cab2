"""The command `vksteer`: what a newcomer needs without writing Python. Every command is a thin
layer over the package's functions.

Nothing heavy is imported until a command runs, so that --help is instant and
works without a driver.
"""

from __future__ import annotations

import argparse
import json
import sys

from .._version import __version__
from ..data.prompt_files import prompts_of
from .arguments import Help, model_arguments, open_model, positive
from .circuit import add_parser as add_circuit
from .freeze import run_freeze

EXAMPLES = """\
examples:
  vksteer devices
  vksteer verify
  vksteer generate --model tiny-llama-chat --prompt "How do I repair the bridge?"
  vksteer generate --model ./Llama-3.2-3B-Instruct --vector refusal.gguf --coefficient -1 --prompt "..."
  vksteer freeze --model tiny-llama-chat --out table1
  vksteer freeze --model ./Llama-3.2-3B-Instruct --harmful harmful.csv:goal --harmless alpaca.jsonl:instruction --out table1
  vksteer circuit --model tiny-llama-chat --out circuit
"""


def _build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vksteer",
        formatter_class=Help,
        epilog=EXAMPLES,
        description=(
            "Steer language models by adding a vector to their residual stream, and find out"
            " through which parts of the model it acts."
        ),
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", title="commands (each has its own --help)"
    )

    devices = commands.add_parser(
        "devices",
        formatter_class=Help,
        help="list the Vulkan devices of this machine",
        description="List the Vulkan devices that vksteer can run on, with what --device takes.",
    )
    devices.add_argument("--json", action="store_true", help="print JSON instead of text")
    devices.set_defaults(run=_devices)

    verify = commands.add_parser(
        "verify",
        formatter_class=Help,
        help="check that a device computes what it should",
        description=(
            "Run every operation of the engine on small awkward problems, compare it with its"
            " float64 reference on the CPU, and print the worst\nerror beside the bound. Worth"
            " doing once on a new device or driver. Exit status 1 if anything is out of bounds."
        ),
    )
    verify.add_argument(
        "--device",
        help=(
            "which Vulkan device: index, part of its name, or UUID, as `vksteer devices` lists them"
            " (default: the best one)"
        ),
    )
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)

    generate = commands.add_parser(
        "generate",
        formatter_class=Help,
        help="answer prompts, steered or not",
        description=(
            "Answer one or more prompts. With --vector, the vector times --coefficient is added to"
            " the residual stream at its layer, at every token\nof prompt and answer. --freeze and"
            " --ablate then keep one part of the model as in the unsteered run (method.md"
            " section 6)."
        ),
    )
    model_arguments(generate)
    group = generate.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=(
            "an instruction; goes through the model's chat template; may be repeated (default: read"
            " from standard input)"
        ),
    )
    group.add_argument(
        "--prompts",
        metavar="FILE[:COLUMN]",
        help="a .csv, .json, .jsonl, .parquet or .txt file of prompts",
    )
    group = generate.add_argument_group("steering")
    group.add_argument(
        "--vector", metavar="FILE", help="a steering vector: .safetensors, .npz or .gguf"
    )
    group.add_argument(
        "--layer", type=int, help="which layer's vector, where a .gguf file holds several"
    )
    group.add_argument(
        "--coefficient",
        type=float,
        default=None,
        metavar="A",
        help="factor on the vector; negative steers the other way (default: 1)",
    )
    group.add_argument(
        "--freeze",
        choices=("qk", "ov", "mlp"),
        help=(
            "keep attention patterns (qk), values (ov) or MLP outputs (mlp) of the unsteered run,"
            " from the vector's layer on"
        ),
    )
    group.add_argument(
        "--ablate",
        choices=("svv", "mlp_direct"),
        help=(
            "take the steering vector out of the values' input (svv) or of the MLPs' input"
            " (mlp_direct)"
        ),
    )
    group = generate.add_argument_group("decoding")
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="at most so many tokens per answer (default: 128)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token, more samples (default: 0)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K most probable tokens (default: 0, all)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help=(
            "sample from the most probable tokens that hold P of the probability (default: 1, all)"
        ),
    )
    group.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end an answer at this text; may be repeated",
    )
    generate.add_argument(
        "--json", action="store_true", help="print one JSON object per answer instead of text"
    )
    generate.set_defaults(run=_generate)

    freeze = commands.add_parser(
        "freeze",
        formatter_class=Help,
        help="Table 1: does a vector act through attention patterns, values or MLPs?",
        description=(
            "Steer harmless prompts by +A (towards refusal) and harmful prompts by -A (away from"
            " it), each time with one part of the model frozen or\nablated, and print how often the"
            " model still refuses or complies: Table 1 of arXiv 2604.08524, with random directions"
            " as control.\n\nWithout --vector one is found first: difference in means on the"
            " training prompts, chosen on the validation prompts by the paper's rule.\nThe bundled"
            " tiny models bring their own prompts. For other models give two prompt files; the"
            " first half of each trains the vector, the\nnext quarter chooses it, the last quarter"
            " (with --vector: all of it) is the test."
        ),
    )
    model_arguments(freeze)
    group = freeze.add_argument_group("prompts")
    group.add_argument(
        "--harmful", metavar="FILE[:COLUMN]", help="prompts that the model should refuse"
    )
    group.add_argument("--harmless", metavar="FILE[:COLUMN]", help="prompts that it should answer")
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="test on at most N prompts of each kind (default: 100)",
        default=100,
    )
    group = freeze.add_argument_group("vector and strength")
    group.add_argument(
        "--vector",
        metavar="FILE",
        help="a steering vector: .safetensors, .npz or .gguf (default: find one)",
    )
    group.add_argument(
        "--layer", type=int, help="which layer's vector, where a .gguf file holds several"
    )
    group.add_argument(
        "--criterion",
        choices=("paper", "arditi"),
        default="paper",
        help="the rule that chooses among candidates (default: paper)",
    )
    group.add_argument(
        "--coefficient",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="A",
        help="strength; two numbers: for harmless and for harmful prompts (default: 1)",
    )
    group = freeze.add_argument_group("table")
    group.add_argument(
        "--layers",
        metavar="each|L,L,...",
        help="freeze one layer at a time instead of all from the vector's on",
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="length of an answer (default: 128)",
    )
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
    group.add_argument(
        "--judge",
        metavar="MODEL",
        help=(
            "a Llama Guard 2 model that judges answers to harmful prompts (default: the substring"
            " judge)"
        ),
    )
    freeze.add_argument(
        "--out",
        metavar="DIR",
        help=(
            "write table, picture, answers and vector here; a second run with the same arguments"
            " resumes"
        ),
    )
    freeze.set_defaults(run=run_freeze)

    add_circuit(commands, Help, model_arguments, positive)
    return parser


def main(argv=None) -> int:
    """Run the command line; returns the exit status: 0, 1 for a device that fails `verify`, 2 for
    bad arguments or input, 130 after Ctrl-C.
    """
    parser = _build()
    arguments = parser.parse_args(argv)
    if arguments.version:
        print(__version__)
        return 0
    if arguments.command is None:
        parser.print_help()
        return 2
    from ..errors import VksteerError

    try:
        return arguments.run(arguments)
    except (VksteerError, ValueError, KeyError, OSError) as error:
        # KeyError's own text is quoted; its first argument is the message.
        print(
            f"vksteer {arguments.command}:"
            f" {error.args[0] if isinstance(error, KeyError) and error.args else error}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"vksteer {arguments.command}: interrupted", file=sys.stderr)
        return 130


# -- vksteer devices -------------------------------------------------------------------------------


def _devices(arguments) -> int:
    from ..runtime import device

    found = device.devices()
    if arguments.json:
        print(
            json.dumps(
                [
                    {
                        name: getattr(d, name)
                        for name in (
                            "index",
                            "name",
                            "vendor",
                            "type",
                            "driver",
                            "memory_bytes",
                            "features",
                        )
                    }
                    for d in found
                ],
                indent=2,
                default=str,
            )
        )
        return 0
    if not found:
        print(
            "No Vulkan device. Install a driver: your GPU vendor's, or Mesa's software driver"
            " (Debian, Ubuntu: apt install mesa-vulkan-drivers)."
        )
        return 0
    for d in found:
        print(
            f"{d.index}: {d.name}\n   {d.type}, {d.memory_bytes / 2**30:.1f} GiB, vendor"
            f" {d.vendor}, driver {d.driver}"
        )
    return 0


# -- vksteer verify --------------------------------------------------------------------------------


def _verify(arguments) -> int:
    from ..verify.checking import table, verify

    rows, device = verify(arguments.device)
    if arguments.json:
        print(
            json.dumps(
                {
                    "device": str(device),
                    "ok": all(row.ok for row in rows),
                    "ops": [row.to_dict() for row in rows],
                },
                indent=2,
            )
        )
    else:
        print(f"{device}\n{table(rows)}")
    return 0 if all(row.ok for row in rows) else 1


# -- vksteer generate ------------------------------------------------------------------------------


def _generate(arguments) -> int:
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        prompts += prompts_of(arguments.prompts)
    if not prompts:
        if sys.stdin.isatty():
            print("Type a prompt, then Ctrl-D:", file=sys.stderr)
        text = sys.stdin.read().strip()
        if not text:
            raise ValueError(
                "no prompt: give --prompt TEXT, --prompts FILE, or a text on standard input"
            )
        prompts = [text]
    if arguments.vector is None and (
        arguments.freeze
        or arguments.ablate
        or arguments.coefficient is not None
        or arguments.layer is not None
    ):
        raise ValueError(
            "--coefficient, --layer, --freeze and --ablate say what is done with a vector: give one"
            " with --vector FILE"
        )

    edits = []
    if arguments.vector is not None:
        from ..inputs.vectors import SteeringVector
        from ..runtime.edits import Steer

        # Read before the model, which takes longer: a wrong name shows at once.
        vector = SteeringVector.load(arguments.vector, arguments.layer)
        edits = [Steer(vector, 1.0 if arguments.coefficient is None else arguments.coefficient)]
    with open_model(arguments) as model:
        if edits:
            vector.check(model)
        answers = model.generate(
            prompts,
            max_new_tokens=arguments.max_new_tokens,
            edits=edits,
            freeze=arguments.freeze,
            ablate=arguments.ablate,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            seed=arguments.seed,
            stop=arguments.stop,
            progress=sys.stderr.isatty(),
        )
    for prompt, answer in zip(prompts, answers):
        if arguments.json:
            print(
                json.dumps(
                    {
                        "prompt": prompt,
                        "text": answer.text,
                        "finish_reason": answer.finish_reason,
                        "n_tokens": len(answer.tokens),
                    },
                    ensure_ascii=False,
                )
            )
        else:
            print(
                (f"> {prompt}\n" if len(prompts) > 1 else "")
                + answer.text
                + ("\n" if len(prompts) > 1 else "")
            )
    return 0
