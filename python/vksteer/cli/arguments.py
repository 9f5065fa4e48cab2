"""Arguments that several commands share, and what is made of them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

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


def key_and_json(text: str) -> tuple[str, Any]:
    """The type of an option KEY=JSON: the key and the value."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=JSON")
    try:
        return key, json.loads(value, parse_constant=_not_json)
    except (ValueError, RecursionError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: {value!r} is not JSON; a text needs its quotes, as in {key}='\"...\"'"
        ) from None


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)  # Python's reader takes NaN and Infinity, which JSON does not have


def _dictionary(pairs: list[tuple[str, Any]] | None, option: str) -> dict[str, Any] | None:
    """What a repeated option KEY=JSON says; None without it. Raises ValueError for a key that is
    given twice.
    """
    if pairs is None:
        return None
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{option} gives {twice} more than once")
    return found


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
    group.add_argument(
        "--config-override",
        action="append",
        type=key_and_json,
        metavar="KEY=JSON",
        help=(
            "replace a key of config.json, for example rope_scaling=null; may be repeated. Written"
            " into results"
        ),
    )
    group.add_argument(
        "--template-option",
        action="append",
        type=key_and_json,
        metavar="KEY=JSON",
        help=(
            "a variable for the chat template, for example enable_thinking=false; may be repeated."
            " Written into results"
        ),
    )


def prompt_file_arguments(group: Group) -> None:
    group.add_argument(
        "--harmful",
        metavar="FILE[:COLUMN]",
        help=(
            "prompts that the model should refuse: a file, or a public set by its name, such as"
            " advbench or jailbreakbench (docs/prompt-sets.md)"
        ),
    )
    group.add_argument(
        "--harmless",
        metavar="FILE[:COLUMN]",
        help="prompts that it should answer, likewise, such as alpaca or jailbreakbench:benign",
    )


def vector_arguments(group: Group) -> None:
    """--vector, --layer, and the rule for finding a vector where none is given."""
    group.add_argument(
        "--vector",
        metavar="FILE",
        help="a steering vector: .safetensors, .npz or .gguf (default: find one)",
    )
    group.add_argument("--layer", type=int, help="which layer's vector, where a file holds several")
    group.add_argument("--criterion", **CRITERIA)


def limit_argument(group: Group, default: int) -> None:
    group.add_argument(
        "--limit",
        type=positive,
        default=default,
        metavar="N",
        help=f"test on at most N prompts of each kind (default: {default})",
    )


def new_tokens_argument(group: Group, default: int) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=default,
        metavar="N",
        help=f"length of an answer (default: {default})",
    )


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
    """The model of --model on the chosen device, or `source`: another model, a judge, to which
    --config-override and --template-option do not apply.

    Raises ValueError for a key that one of these options gives twice, before the model is loaded.
    """
    from ..runtime.model import Model

    overrides = _dictionary(arguments.config_override, "--config-override")
    options = _dictionary(arguments.template_option, "--template-option")
    own = source is None
    return Model.from_pretrained(
        arguments.model if source is None else source,
        device=arguments.device,
        dtype=arguments.dtype,
        config_overrides=overrides if own else None,
        template_options=options if own else None,
    )


def _prompt_files(arguments: argparse.Namespace) -> tuple[list[str], list[str]] | None:
    """All prompts of --harmful and --harmless; None without them, where the model brings its own.

    Raises ValueError for one without the other, and where there are none.
    """
    if (arguments.harmful is None) != (arguments.harmless is None):
        raise ValueError("--harmful and --harmless belong together: give both")
    if arguments.harmful is not None:
        return prompts_of(arguments.harmful), prompts_of(arguments.harmless)
    from ..loading.locate import is_bundled

    if not is_bundled(arguments.model):
        raise ValueError(
            "give prompts with --harmful FILE and --harmless FILE (only the bundled tiny models"
            " bring their own)"
        )
    return None


def whole_prompts(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """All prompts of the two files, or the training prompts of a bundled model."""
    return _prompt_files(arguments) or tiny_pair("train")


def freeze_prompts(arguments: argparse.Namespace) -> tuple[Any, Any, tuple[list[str], ...]]:
    """The pairs (harmful, harmless) of prompts for training, validation and test. With --vector
    the first two are None.
    """
    files = _prompt_files(arguments)
    if files is None:
        need = ("test",) if arguments.vector else ("train", "validation", "test")
        pairs = [tiny_pair(split) for split in need]
    else:
        harmful, harmless = files
        pairs = (
            [(harmful, harmless)]
            if arguments.vector
            else list(zip(split(harmful, "harmful"), split(harmless, "harmless")))
        )
    test = tuple(side[: arguments.limit] for side in pairs[-1])
    return (*([None, None] if len(pairs) == 1 else pairs[:2]), test)
