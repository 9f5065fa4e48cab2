"""Arguments that several commands share, and what they mean."""

from __future__ import annotations

import argparse

from ..data.prompt_files import prompts_of, split, tiny_pair


class Help(argparse.RawDescriptionHelpFormatter):
    """Descriptions keep their line breaks; defaults are named in the help texts themselves."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=110)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 on")
    return value


def model_arguments(parser):
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        required=True,
        help=(
            "a folder (config.json, *.safetensors, tokenizer.json), a .gguf file, a name on the"
            " Hugging Face hub, or a bundled model: tiny-llama-chat, tiny-gemma-chat"
        ),
    )
    group.add_argument(
        "--device",
        help=(
            "which Vulkan device: index, part of its name, or UUID, as `vksteer devices` lists them"
            " (default: the best one)"
        ),
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="how weights are held on the device (default: auto, as stored)",
    )


def open_model(arguments, source=None):
    from ..runtime.model import Model

    return Model.from_pretrained(
        source or arguments.model, device=arguments.device, dtype=arguments.dtype
    )


def freeze_prompts(arguments):
    """Three pairs (harmful, harmless) of prompts: train, validation, test; the first
    two None with --vector.
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
