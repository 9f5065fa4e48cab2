"""Trains NTP and PO vectors on a bundled model and compares their rates in both directions with
those of the difference in means (docs/method.md section 2).

    .venv/bin/python tools/trained_vectors.py tiny-gemma-chat [--out FOLDER]
    [--prompts 192] [--factors]

Training and validation data are the model's own answers (`vs.steering.training_data`). Strengths
are chosen on the validation split. The table is made on 100 + 100 test prompts with 72 new tokens,
with all vectors at the norm of the difference. One seed and one setting for each method: see the
arguments.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import vksteer as vs
from vksteer import data, steering
from vksteer.inputs.prompt_pair import PromptPair

NEW_TOKENS = 72
STRENGTHS = (0.35, 0.45, 0.5, 0.55, 0.6, 0.7, 0.85, 1.0)
ENDED = 0.9


def rates(prompts: PromptPair, vector, plus: float, minus: float):
    """(harmless at +plus, harmful at -minus)."""
    found = prompts.rates(prompts.run(vector, plus, minus))
    return found["harmless"], found["harmful"]


def strengths(prompts: PromptPair, vector):
    """The best (plus, minus) on the validation split among those with enough ended answers; None
    where there are none.
    """
    rows = [(a, *rates(prompts, vector, a, a)) for a in STRENGTHS]
    plus = [(harmless.asr, a) for a, harmless, _ in rows if harmless.ended >= ENDED]
    minus = [(-harmful.asr, a) for a, _, harmful in rows if harmful.ended >= ENDED]
    return (min(plus)[1], min(minus)[1]) if plus and minus else None


def arguments_of_the_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, help="vectors and data go here")
    parser.add_argument("--prompts", type=int, default=192, help="training prompts of each kind")
    parser.add_argument("--lr", type=float, default=0.04)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument(
        "--factors",
        action="store_true",
        help="a strength from 2, 4, ..., 20 drawn per sample, as the authors do",
    )
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of_the_command()
    model = vs.Model.from_pretrained(arguments.model)
    dim = steering.difference_in_means(model, *data.tiny_pair("train", 64)).select(
        *data.tiny_pair("validation", 32)
    )
    validation = PromptPair.of(model, *data.tiny_pair("validation", 48), NEW_TOKENS)
    test = PromptPair.of(model, *data.tiny_pair("test", 100), NEW_TOKENS)
    pair = strengths(validation, dim)
    if pair is None:
        raise SystemExit("the difference in means has no strength whose answers end")
    examples = steering.training_data(
        model, *data.tiny_pair("train", arguments.prompts), dim, pair, max_new_tokens=NEW_TOKENS
    )
    held_out = steering.training_data(
        model, *data.tiny_pair("validation", 32), dim, pair, max_new_tokens=NEW_TOKENS
    )
    print(examples.line, held_out.line, sep="\n")
    settings = dict(
        layer=dim.layer,
        validation=held_out,
        lr=arguments.lr,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
    )
    if arguments.factors:
        settings["factors"] = tuple(range(2, 21, 2))
    vectors = {
        "DIM": dim,
        "NTP": steering.train_ntp(model, examples, **settings).normalized_to(dim),
        "PO": steering.train_po(model, examples, **settings).normalized_to(dim),
    }
    print(
        "\n| vector | +a / -a | harmless ASR / ended | harmful ASR / ended | cosine with DIM"
        " |\n|---|---|---:|---:|---:|"
    )
    for name, vector in vectors.items():
        best = pair if name == "DIM" else strengths(validation, vector)
        if best is None:
            print(f"| {name} | none: answers do not end | | | {vector.cosine(dim):.2f} |")
            continue
        harmless, harmful = rates(test, vector, *best)
        print(
            f"| {name} | {best[0]:g} / {best[1]:g} | {harmless.asr:.2f} / {harmless.ended:.2f} |"
            f" {harmful.asr:.2f} / {harmful.ended:.2f} | {vector.cosine(dim):.2f} |"
        )
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        for name, vector in vectors.items():
            vector.save(arguments.out / f"{name.lower()}.safetensors")
        examples.save(arguments.out / "examples.jsonl")


if __name__ == "__main__":
    main()
