"""`vksteer generate`: answers prompts, steered or not."""

from __future__ import annotations

import argparse
import json
import sys

from ..data.prompt_files import prompts_of
from .arguments import Group, Help, Subparsers, model_arguments, open_model, positive

DESCRIPTION = """\
Answer one or more prompts. With --vector, the vector times --coefficient is added to the residual
stream at its layer, at every token of prompt and answer. --freeze and --ablate then keep one part
of the model as in the unsteered run (docs/method.md section 6)."""


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the parser of `vksteer`."""
    parser = commands.add_parser(
        "generate",
        formatter_class=Help,
        help="answer prompts, steered or not",
        description=DESCRIPTION,
    )
    model_arguments(parser)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help=(
            "an instruction, put into the model's chat template; may be repeated (default: read"
            " from standard input)"
        ),
    )
    group.add_argument(
        "--prompts",
        metavar="FILE[:COLUMN]",
        help="a .csv, .json, .jsonl, .parquet or .txt file of prompts",
    )
    _steering(parser.add_argument_group("steering"))
    _decoding(parser.add_argument_group("decoding"))
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per answer instead of text"
    )
    parser.set_defaults(run=run_generate)


def _steering(group: Group) -> None:
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
        help="factor on the vector; a negative one steers the other way (default: 1)",
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
            "subtract the steering vector from the input of the values (svv) or of the MLPs"
            " (mlp_direct)"
        ),
    )


def _decoding(group: Group) -> None:
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=128,
        metavar="N",
        help="at most N tokens per answer (default: 128)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0 takes the most probable token, above 0 samples (default: 0)",
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


def _prompts(arguments: argparse.Namespace) -> list[str]:
    """The prompts of --prompt and --prompts, or standard input as one prompt."""
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        prompts += prompts_of(arguments.prompts)
    if prompts:
        return prompts
    if sys.stdin.isatty():
        print("Type a prompt, then Ctrl-D:", file=sys.stderr)
    text = sys.stdin.read().strip()
    if not text:
        raise ValueError(
            "no prompt: give --prompt TEXT, --prompts FILE, or a text on standard input"
        )
    return [text]


def run_generate(arguments: argparse.Namespace) -> int:
    """Runs the command; the exit status."""
    prompts = _prompts(arguments)
    without_vector = (
        not arguments.freeze
        and not arguments.ablate
        and arguments.coefficient is None
        and arguments.layer is None
    )
    if arguments.vector is None and not without_vector:
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
            content = {
                "prompt": prompt,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "n_tokens": len(answer.tokens),
            }
            print(json.dumps(content, ensure_ascii=False))
        elif len(prompts) > 1:
            print(f"> {prompt}\n{answer.text}\n")
        else:
            print(answer.text)
    return 0
