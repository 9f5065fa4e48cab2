"""Questions with two lettered answers, in which neither letter is the right one more often than the
other, and how much of steering the letter explains.

Source: Tan et al. (arXiv 2407.12404), whose questions alternate the letter of the positive answer.
Here the letters are drawn with equal numbers, and a question can be asked in both orders.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..base.types import Array, BoolArray, Float64Array, IntArray
from .choices import Choice
from .curves import Curves

#: How a question and its two answers are worded.
TEMPLATE = "{question}\n\nChoices:\n (A) {a}\n (B) {b}"
LETTERS = ("(A)", "(B)")


@dataclass(frozen=True)
class LetterBias:
    """What the letter of the positive answer does to steering, question by question.

    content: float64 [questions], the mean over both orders. letter: float64 [questions], half the
    difference (positive is A) - (positive is B): content + letter and content - letter are the two
    orders. question_share, letter_share, rest_share: shares of the variance over all items that the
    questions, the letter, and the two together (other letters in other questions) explain; they sum
    to 1, and are NaN where nothing varies.
    """

    content: Float64Array
    letter: Float64Array
    question_share: float
    letter_share: float
    rest_share: float


@dataclass(frozen=True, eq=False)
class LetterChoices(Sequence[Choice]):
    """Choices for `steerability`, and for each which letter the positive answer has.

    items: Choices. positive_is_a: bool [items]. question: int [items], the question's index.
    """

    items: tuple[Choice, ...]
    positive_is_a: BoolArray
    question: IntArray

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, at: Any) -> Any:
        return self.items[at]

    def __iter__(self) -> Iterator[Choice]:
        return iter(self.items)

    def bias(self, values: Curves | Array) -> LetterBias:
        """Takes apart what the letter and what the question explains.

        values: curves of these items (their slopes are taken), or numbers [items]. Raises
        ValueError for another length, values that are not finite, and items that do not ask every
        question in both orders.
        """
        found = np.asarray(values.slope if isinstance(values, Curves) else values, np.float64)
        if found.shape != (len(self),):
            raise ValueError(f"values must be one number for each of {len(self)} items")
        if not np.isfinite(found).all():
            raise ValueError("values must be finite")
        if len(self) != 2 * len(set(self.question.tolist())):
            raise ValueError(
                "the letter can be taken apart only where every question is asked in both orders:"
                " make the items with both_orders=True"
            )
        a, b = found[self.positive_is_a], found[~self.positive_is_a]
        content, letter = (a + b) / 2, (a - b) / 2
        whole = float(((found - found.mean()) ** 2).sum())
        parts = (
            2 * float(((content - content.mean()) ** 2).sum()),
            2 * len(letter) * float(letter.mean()) ** 2,
            2 * float(((letter - letter.mean()) ** 2).sum()),
        )
        shares = [part / whole if whole > 0 else float("nan") for part in parts]
        return LetterBias(content, letter, *shares)


def letter_choices(
    questions: Sequence[str],
    positives: Sequence[str],
    negatives: Sequence[str],
    *,
    seed: int = 0,
    both_orders: bool = False,
    template: str = TEMPLATE,
) -> LetterChoices:
    """Items for `steerability` that ask for one of two lettered answers.

    questions, positives, negatives: texts, as many of each: answer i of both belongs to question i.
    The positive answer is (A) in half of the items and (B) in the others (an odd one by the seed),
    which ones by `seed`. both_orders: every question twice, with the positive answer as (A) and as
    (B), which `LetterChoices.bias` needs. template: holds {question}, {a} and {b}.

    A Choice's prompt is the template's text, its answers are "(A)" and "(B)".
    Raises ValueError for lists of unequal length, empty ones, texts that are empty, equal answers
    of a question, and a template without one of the three places.
    """
    sides = {"questions": questions, "positives": positives, "negatives": negatives}
    texts = {name: _texts(name, given) for name, given in sides.items()}
    lengths = {name: len(given) for name, given in texts.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"questions and answers belong together: {lengths}")
    rows = list(zip(*texts.values(), strict=True))
    for i, (_, positive, negative) in enumerate(rows):
        if positive.strip() == negative.strip():
            raise ValueError(f"question {i}: both answers are {positive!r}")
    _check_template(template)
    flags = _flags(len(rows), require_int(seed, "seed"))
    asked = [
        (i, first)
        for i, flag in enumerate(flags)
        for first in ((True, False) if both_orders else (flag,))
    ]
    items = []
    for i, first in asked:
        question, positive, negative = rows[i]
        a, b = (positive, negative) if first else (negative, positive)
        own, other = LETTERS if first else LETTERS[::-1]
        items.append(Choice(template.format(question=question, a=a, b=b), own, other))
    return LetterChoices(
        tuple(items),
        np.array([first for _, first in asked], dtype=bool),
        np.array([i for i, _ in asked], dtype=np.int64),
    )


def _texts(name: str, given: Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        raise ValueError(f"{name} is empty: give at least one text")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name}[{i}] is {text!r}, not a text")
    return texts


def _check_template(template: str) -> None:
    marks = {"question": "\0q", "a": "\0a", "b": "\0b"}
    try:
        text = template.format(**marks)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"template {template!r} cannot be filled: {error!r}") from None
    missing = [name for name, mark in marks.items() if mark not in text]
    if missing:
        raise ValueError(f"template {template!r} has no place {{{missing[0]}}}")


def _flags(n: int, seed: int) -> list[bool]:
    """Whether the positive answer is A, for as many questions as not, give or take one."""
    draws = random.Random(f"letters {seed}")
    odd = draws.random() < 0.5
    flags = [(i % 2 == 0) == odd for i in range(n)]
    draws.shuffle(flags)
    return flags
