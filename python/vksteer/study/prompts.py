"""The prompts of a study, cut into training, validation and test."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from ..base.provenance import digest
from ..data.prompt_files import tiny_pair
from .settings import Settings

SPLITS = ("train", "validation", "test")
LEAST = 4  # prompts of one kind that a split needs

#: One list, which is cut into the splits, or {split: list}.
Given: TypeAlias = Sequence[str] | Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Prompts:
    """harmful, harmless: {split: texts}. notes: what was changed to fit the lists."""

    harmful: dict[str, list[str]]
    harmless: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        return digest(self.harmful, self.harmless, self.notes)

    @property
    def chosen_by(self) -> str:
        """The hash of the prompts that find and choose vectors."""
        return digest([self.pair(split) for split in ("train", "validation")])

    def pair(self, split: str) -> tuple[list[str], list[str]]:
        """(harmful, harmless) of a split."""
        return self.harmful[split], self.harmless[split]


def of_world(settings: Settings) -> Prompts:
    """Prompts of the bundled toy world, whose splits share no verb and object."""
    counts = {split: getattr(settings, split) for split in SPLITS}
    pairs = {split: tiny_pair(split, n, settings.seed) for split, n in counts.items()}
    return Prompts({s: p[0] for s, p in pairs.items()}, {s: p[1] for s, p in pairs.items()})


def of_lists(harmful: Given, harmless: Given, settings: Settings) -> Prompts:
    """The prompts of each kind in three splits, without repetitions and shuffled by the seed.

    A list is cut into training, validation and test. A mapping {split: list} keeps its splits
    apart, such as test prompts of another data set; without "validation" its training list is cut
    into both, and what a later split uses is left out of an earlier one, which a note says.
    Lists that are shorter than the size wants are cut in the same proportions, and a note says so.
    Raises ValueError for lists that leave a split with fewer than 4 prompts, for other splits than
    these, for anything but texts, and for a prompt that is both harmful and harmless.
    """
    sides, notes, every = {}, [], []
    for name, given in (("harmful", harmful), ("harmless", harmless)):
        lists = _lists(name, given)
        every.append({text for texts in lists.values() for text in texts})
        found: dict[str, list[str]] = {}
        for splits, texts in reversed(lists.items()):
            taken = {text for part in found.values() for text in part}
            left = [text for text in dict.fromkeys(texts) if text not in taken]
            if n := len(set(texts)) - len(left):
                notes.append(
                    f"{n} {name} prompts of {splits[0]} are used in a later split, not there"
                )
            random.Random(f"{settings.seed} {name}").shuffle(left)
            found |= _cut(name, splits, left, settings, notes)
        sides[name] = {split: found[split] for split in SPLITS}
    if both := every[0] & every[1]:
        raise ValueError(
            f"{len(both)} prompts are both harmful and harmless, the first is {min(both)!r}"
        )
    return Prompts(sides["harmful"], sides["harmless"], tuple(notes))


def plain_prompts(given: Given) -> list[str] | dict[str, list[str]]:
    """The prompts as they were given, as JSON holds them."""
    if isinstance(given, Mapping):
        return {split: list(texts) for split, texts in given.items()}
    return list(given)


def _lists(name: str, given: Given) -> dict[tuple[str, ...], Sequence[str]]:
    """{splits that the list is cut into: the list}, in the order of SPLITS."""
    found: dict[tuple[str, ...], Sequence[str]] = {SPLITS: given}  # type: ignore[dict-item]
    if isinstance(given, Mapping):
        if not {"train", "test"} <= set(given) <= set(SPLITS):
            raise ValueError(
                f"{name} has the splits {', '.join(map(repr, given))}: a mapping needs 'train' and"
                " 'test', and may have 'validation'"
            )
        first = ("train",) if "validation" in given else ("train", "validation")
        found = {first: given["train"]}
        found |= {(split,): given[split] for split in SPLITS[1:] if split in given}
    for held, texts in found.items():
        where = name if held == SPLITS else f"{name}[{held[0]!r}]"
        if isinstance(texts, str):
            raise ValueError(
                f"{where}={texts!r} is one text: give a list of prompts, for example"
                f" vs.data.load({texts!r}) for a file"
            )
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where}[{i}] is {text!r}: a study takes prompts as texts")
    return found


def _cut(
    name: str, splits: Sequence[str], texts: list[str], settings: Settings, notes: list[str]
) -> dict[str, list[str]]:
    """{split: its part of the texts}; a note is added where they are too few for the size."""
    counts = [getattr(settings, split) for split in splits]
    if len(texts) < (asked := sum(counts)):
        counts = [n * len(texts) // asked for n in counts]
        parts = ", ".join(f"{split} {n}" for split, n in zip(splits, counts, strict=True))
        few = f"{len(texts)} {name} prompts are fewer than the {asked} of size {settings.size!r}"
        if min(counts) < LEAST:
            raise ValueError(f"{few}: {parts}; give more, each split needs at least {LEAST}")
        notes.append(f"{few}: {parts}")
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return {split: texts[end - n : end] for split, n, end in zip(splits, counts, ends, strict=True)}
