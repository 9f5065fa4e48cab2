"""Arguments that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, TypeAlias

from ..data.prompt_files import prompts_of, split, tiny_pair

if TYPE_CHECKING:
    from ..runtime.model import Model

    Group: TypeAlias = argparse._ArgumentGroup
    Subparsers: TypeAlias = argparse._SubParsersAction[argparse.ArgumentParser]
else:
    Group = Subparsers = Any

#: The keyword arguments of --criterion.
CRITERIA: dict[str, Any] = {
    "choices": ("paper", "arditi"),
    "default": "paper",
    "help": "the rule that chooses among candidates (default: paper)",
}


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their line breaks; each help text names its default itself."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=100)


def positive(text: str) -> int:
    """The type of an option that takes a whole number from 1 on."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def device_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--device",
        help=(
            "the Vulkan device: index, part of its name, or UUID, as `vksteer devices` lists them"
            " (default: the best one)"
        ),
    )


def model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help=(
            "a folder (config.json, *.safetensors, tokenizer.json), a .gguf file, a name on the"
            " Hugging Face hub, or a bundled model: tiny-llama-chat, tiny-gemma-chat"
        ),
    )
    device_argument(group)
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="the type of the weights on the device (default: auto, as in the file)",
    )


def prompt_file_arguments(group: Group) -> None:
    group.add_argument(
        "--harmful", metavar="FILE[:COLUMN]", help="prompts that the model should refuse"
    )
    group.add_argument("--harmless", metavar="FILE[:COLUMN]", help="prompts that it should answer")


def judge_argument(group: Group) -> None:
    group.add_argument(
        "--judge",
        metavar="MODEL",
        help=(
            "a Llama Guard 2 model that judges answers to harmful prompts (default: the substring"
            " judge)"
        ),
    )


def open_model(arguments: argparse.Namespace, source: str | None = None) -> Model:
    """The model of --model, or `source`, on the chosen device."""
    from ..runtime.model import Model

    return Model.from_pretrained(
        source or arguments.model, device=arguments.device, dtype=arguments.dtype
    )


def freeze_prompts(arguments: argparse.Namespace) -> tuple[Any, Any, tuple[list[str], ...]]:
    """The pairs (harmful, harmless) of prompts for training, validation and test. With --vector
    the first two are None.
    """
    if (arguments.harmful is None) != (arguments.harmless is None):
        raise ValueError("--harmful and --harmless belong together: give both")
    if arguments.harmful is None:
        if not arguments.model.startswith("tiny-"):
            raise ValueError(
                "give prompts with --harmful FILE and --harmless FILE (only the bundled tiny models"
                " bring their own)"
            )
        need = ("test",) if arguments.vector else ("train", "validation", "test")
        pairs = [tiny_pair(split) for split in need]
    else:
        harmful, harmless = prompts_of(arguments.harmful), prompts_of(arguments.harmless)
        pairs = (
            [(harmful, harmless)]
            if arguments.vector
            else list(zip(split(harmful, "harmful"), split(harmless, "harmless")))
        )
    test = tuple(side[: arguments.limit] for side in pairs[-1])
    return (*([None, None] if len(pairs) == 1 else pairs[:2]), test)
