"""The prompts of a study, cut into training, validation and test."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.provenance import digest
from ..data.prompt_files import tiny_pair
from .settings import Settings

SPLITS = ("train", "validation", "test")
LEAST = 4  # prompts of one kind that a split needs


@dataclass(frozen=True)
class Prompts:
    """harmful, harmless: {split: texts}. notes: what was changed to fit the lists."""

    harmful: dict[str, list[str]]
    harmless: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        return digest(self.harmful, self.harmless)

    def pair(self, split: str) -> tuple[list[str], list[str]]:
        """(harmful, harmless) of a split."""
        return self.harmful[split], self.harmless[split]


def of_world(settings: Settings) -> Prompts:
    """Prompts of the bundled toy world, whose splits share no verb and object."""
    counts = {split: getattr(settings, split) for split in SPLITS}
    pairs = {split: tiny_pair(split, n, settings.seed) for split, n in counts.items()}
    return Prompts({s: p[0] for s, p in pairs.items()}, {s: p[1] for s, p in pairs.items()})


def of_lists(harmful: Sequence[str], harmless: Sequence[str], settings: Settings) -> Prompts:
    """Both lists without repetitions, shuffled by the seed and cut into the three splits.

    A list that is shorter than the size wants is cut in the same proportions, and a note says so.
    Raises ValueError for lists that leave a split with fewer than 4 prompts, for anything but
    texts, and for a prompt that stands in both lists.
    """
    sides, notes = {}, []
    for name, given in (("harmful", harmful), ("harmless", harmless)):
        if isinstance(given, str):
            raise ValueError(
                f"{name}={given!r} is one text: give a list of prompts, for example"
                f" vs.data.load({given!r}) for a file"
            )
        for i, text in enumerate(given):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name}[{i}] is {text!r}: a study takes prompts as texts")
        texts = list(dict.fromkeys(given))
        random.Random(f"{settings.seed} {name}").shuffle(texts)
        asked = [getattr(settings, split) for split in SPLITS]
        counts = asked
        if len(texts) < sum(asked):
            counts = [n * len(texts) // sum(asked) for n in asked]
            notes.append(
                f"{len(texts)} {name} prompts are fewer than the {sum(asked)} of size"
                f" {settings.size!r}: {', '.join(map(str, counts))} of them train, validate and"
                " test"
            )
        if min(counts) < LEAST:
            raise ValueError(
                f"{len(texts)} {name} prompts leave {counts} for training, validation and test:"
                f" each needs at least {LEAST}; give more prompts"
            )
        ends = [sum(counts[: i + 1]) for i in range(3)]
        sides[name] = {
            split: texts[end - n : end] for split, n, end in zip(SPLITS, counts, ends, strict=True)
        }
    both = set(harmful) & set(harmless)
    if both:
        raise ValueError(
            f"{len(both)} prompts are both harmful and harmless, the first is {min(both)!r}"
        )
    return Prompts(sides["harmful"], sides["harmless"], tuple(notes))
