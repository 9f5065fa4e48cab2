"""The options of `vksteer circuit`, and what its --help says."""

from __future__ import annotations

from .arguments import (
    CRITERIA,
    Group,
    Help,
    Subparsers,
    judge_argument,
    model_arguments,
    positive,
    prompt_file_arguments,
)
from .circuit import circuit

DESCRIPTION = """\
Which heads and MLPs carry the effect of a steering vector over whole answers?
(arXiv 2604.08524, section 5)

  1. answers  The model answers each prompt with and without steering; the prompts whose behaviour
              steering changes are kept (samples.json).
  2. scores   Every edge between heads and MLPs above the steering layer gets an estimated effect,
              by integrated gradients between the unsteered and the steered run on the same tokens
              (scores.safetensors, top_edges.md).
  3. curve    Circuits of the strongest edges, small to large, are run with everything else as in
              the unsteered run: how much of the steering effect is left? Random circuits of twice
              the size are the control (curve.json, curve.md, curve.png).
  4. circuit  The smallest circuit that carries 85 % of the effect (circuit.json, circuit.png).

Harmful prompts are steered by -A (away from refusal), harmless ones by +A (towards it). With
several --vector, overlaps.md shows how far the circuits overlap and how well each one carries the
other vectors; each vector then has a folder of its own in DIR. Without --vector one is found as in
`vksteer freeze`. The bundled tiny models bring their own prompts, other models need prompt files.
"""


def add_parser(commands: Subparsers) -> None:
    """Adds the command to the parser of `vksteer`."""
    parser = commands.add_parser(
        "circuit",
        formatter_class=Help,
        help="which heads and MLPs carry a vector's effect, and how few are enough",
        description=DESCRIPTION,
    )
    model_arguments(parser)
    _prompts(parser.add_argument_group("prompts"))
    _vectors(parser.add_argument_group("vectors and strength"))
    _samples(parser.add_argument_group("samples"))
    _scores(parser.add_argument_group("scores"))
    _circuits(parser.add_argument_group("circuits"))
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help=(
            "the folder for all results; a second run with the same arguments continues from what"
            " is there"
        ),
    )
    parser.set_defaults(run=circuit)


def _prompts(group: Group) -> None:
    prompt_file_arguments(group)
    group.add_argument(
        "--side",
        choices=("harmful", "harmless"),
        default="harmful",
        help="the prompts that the samples are made from (default: harmful, steered by -A)",
    )
    group.add_argument(
        "--limit",
        type=positive,
        default=32,
        metavar="N",
        help="at most N prompts of that side (default: 32)",
    )


def _vectors(group: Group) -> None:
    group.add_argument(
        "--vector",
        action="append",
        metavar="FILE",
        help="a steering vector: .safetensors, .npz or .gguf; may be repeated (default: find one)",
    )
    group.add_argument(
        "--layer", type=int, help="which layer's vector, where a .gguf file holds several"
    )
    group.add_argument("--criterion", **CRITERIA)
    group.add_argument(
        "--coefficient",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="A",
        help="strength, without sign; one number, or one for each vector (default: 1)",
    )


def _samples(group: Group) -> None:
    group.add_argument(
        "--responses",
        choices=("steered", "base"),
        default="steered",
        help="the model whose answers the samples hold (default: steered)",
    )
    group.add_argument(
        "--keep",
        choices=("flipped", "all"),
        default="flipped",
        help="which prompts are kept (default: those whose behaviour steering changes)",
    )
    group.add_argument(
        "--max-new-tokens",
        type=positive,
        default=64,
        metavar="N",
        help="length of an answer (default: 64)",
    )
    judge_argument(group)


def _scores(group: Group) -> None:
    group.add_argument(
        "--steps",
        type=positive,
        default=10,
        metavar="T",
        help="steps of the integration from unsteered to steered (default: 10)",
    )
    group.add_argument(
        "--rule",
        choices=("midpoint", "left", "right"),
        default="midpoint",
        help="where in a step the gradient is taken (default: midpoint)",
    )
    group.add_argument(
        "--metric",
        choices=("logit_diff", "directional_kl", "kl"),
        default="logit_diff",
        help="the metric on which an edge's effect is measured (default: logit_diff)",
    )
    group.add_argument(
        "--kl-threshold",
        type=float,
        default=0.0,
        metavar="X",
        help="for the two KL metrics: positions where KL(steered || base) is above X (default: 0)",
    )
    group.add_argument(
        "--clean",
        choices=("steered", "base"),
        default="steered",
        help="the run whose values are patched in (default: steered)",
    )
    group.add_argument(
        "--at",
        choices=("pre_norm", "normed"),
        default="pre_norm",
        help=(
            "gradients before the norms of the inputs, or after them as in the paper's code"
            " (default: pre_norm)"
        ),
    )
    group.add_argument(
        "--max-memory",
        metavar="SIZE",
        help="for activations and gradients, for example 6GiB (default: as the device allows)",
    )


def _circuits(group: Group) -> None:
    group.add_argument(
        "--method",
        choices=("pruned", "top", "greedy_backward", "greedy_forward"),
        default="pruned",
        help=(
            "how edges become a circuit (default: pruned, the strongest edges that lie on a path"
            " from the steering vector to the logits)"
        ),
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=0.85,
        metavar="X",
        help="share of the effect that a faithful circuit carries (default: 0.85)",
    )
    group.add_argument(
        "--sizes",
        metavar="N,N,...",
        help="sizes on the curve (default: 0.2 %% to 100 %% of all edges)",
    )
    group.add_argument(
        "--random",
        type=int,
        default=3,
        metavar="N",
        help="random circuits for each size (default: 3)",
    )
    group.add_argument(
        "--halves",
        action="store_true",
        help="find the curve's circuits on one half of the samples and measure them on the other",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of random circuits, halves and intervals (default: 0)",
    )
    group.add_argument(
        "--eap-ig",
        action="store_true",
        help="also write eap_ig.json, which Graph.from_json of hannamw/EAP-IG reads",
    )
