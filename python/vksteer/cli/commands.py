"""The command line program `vksteer`: the common tasks without writing Python. Every command is a
thin layer over the package's functions.

Nothing heavy is imported until a command runs, so --help is instant and needs no driver.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from .._version import __version__
from . import bench, circuit_options, freeze, generate, strength, study
from .arguments import Help, device_argument

EXAMPLES = """\
examples:
  vksteer devices
  vksteer verify
  vksteer bench    --model tiny-llama-chat
  vksteer generate --model tiny-llama-chat --prompt "How do I repair the bridge?"
  vksteer generate --model ./Llama-3.2-3B-Instruct --vector refusal.gguf --coefficient -1 \\
                   --prompt "..."
  vksteer freeze   --model tiny-llama-chat --out table1
  vksteer freeze   --model ./Llama-3.2-3B-Instruct --harmful harmful.csv:goal \\
                   --harmless alpaca.jsonl:instruction --out table1
  vksteer circuit  --model tiny-llama-chat --out circuit
  vksteer screen   --model tiny-llama-chat
  vksteer sweep    --model tiny-llama-chat --coefficients 0.5 1 2
  vksteer study    --model tiny-llama-chat --out study --size tiny
"""


def _build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vksteer",
        formatter_class=Help,
        epilog=EXAMPLES,
        description=(
            "Steer language models by adding a vector to their residual stream, and find out"
            " through\nwhich parts of the model it acts."
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
        description=(
            "List the Vulkan devices that vksteer can run on. --device of the other commands takes"
            " an index,\npart of a name, or a UUID."
        ),
    )
    devices.add_argument("--json", action="store_true", help="print JSON instead of text")
    devices.set_defaults(run=_devices)
    verify = commands.add_parser(
        "verify",
        formatter_class=Help,
        help="check that a device computes correctly",
        description=(
            "Run every operation of the engine on small problems of awkward shapes, compare it"
            " with its\nfloat64 reference on the CPU, and print the largest error beside its bound."
            " Worth running once\non a new device or driver. The exit status is 1 if any error is"
            " out of bounds."
        ),
    )
    device_argument(verify)
    verify.add_argument("--json", action="store_true", help="print JSON instead of a table")
    verify.set_defaults(run=_verify)
    bench.add_parser(commands)
    generate.add_parser(commands)
    freeze.add_parser(commands)
    circuit_options.add_parser(commands)
    strength.add_parser(commands)
    study.add_parsers(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 1 for a device that fails `verify`,
    2 for bad arguments or input, 130 after Ctrl-C.
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
        status: int = arguments.run(arguments)
        return status
    except (VksteerError, ValueError, KeyError, OSError, ImportError) as error:
        # The text of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"vksteer {arguments.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vksteer {arguments.command}: interrupted", file=sys.stderr)
        return 130


# -- vksteer devices -------------------------------------------------------------------------------


def _devices(arguments: argparse.Namespace) -> int:
    from ..runtime import device

    found = device.devices()
    if arguments.json:
        shown = ("index", "name", "vendor", "type", "driver", "memory_bytes", "features")
        content = [{name: getattr(d, name) for name in shown} for d in found]
        print(json.dumps(content, indent=2, default=str))
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


def _verify(arguments: argparse.Namespace) -> int:
    from ..verify.checking import table, verify

    rows, device = verify(arguments.device)
    if arguments.json:
        content = {
            "device": str(device),
            "ok": all(row.ok for row in rows),
            "ops": [row.to_dict() for row in rows],
        }
        print(json.dumps(content, indent=2))
    else:
        print(f"{device}\n{table(rows)}")
    return 0 if all(row.ok for row in rows) else 1
