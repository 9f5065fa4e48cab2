"""Contrastive prompts: chats with solved examples, worked out in the positive prompt and answered
without steps in the negative one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..base.checks import is_int, require_int
from ..loading.chat_template import holds

if TYPE_CHECKING:
    from ..loading.tokenizer import Tokenizer
    from ..runtime.model import Model


def contrastive_prompts(
    model: Model,
    questions: Sequence[str],
    steps: Sequence[str],
    answers: Sequence[str],
    *,
    n_shot: int = 5,
    choose: str | Sequence[Sequence[int]] = "random",
    seed: int = 0,
    system: str | None = None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Pairs of chat prompts for `extract` (Belitsky et al., arXiv 2507.08799;
    docs/cache-steering.md).

    Pair i ends in question i and the generation prompt. Before it stand solved examples, the same
    questions in the same order in both prompts; in the positive one the assistant's turn holds the
    steps, a line break and the answer, in the negative one the answer alone.

    questions, steps, answers: texts, one of each for every question. n_shot: examples of a pair.
    choose: "random", drawn without repetition from the other questions by `seed`; or the examples'
    numbers, one list for each question. The authors take the questions whose sentence embeddings
    are nearest; vksteer has no embedding model, so give the numbers to do that. system: a system
    message.

    Returns (positive, negative), token lists, one of each for every question. Raises ValueError
    for lists of different lengths, blank texts, too few questions, numbers that are no other
    question, and a chat template that leaves a turn out.
    """
    tokenizer = model._need_tokenizer("contrastive prompts")
    n = _check(questions, steps, answers)
    if isinstance(choose, str):
        if choose != "random":
            raise ValueError(f"choose={choose!r}: use 'random' or one list of numbers a question")
        n_shot = require_int(n_shot, "n_shot", 1)
        if n_shot >= n:
            raise ValueError(
                f"n_shot={n_shot} examples beside each of {n} questions: give at least"
                f" {n_shot + 1} questions"
            )
        rng = np.random.default_rng(seed)
        chosen = [rng.permutation(np.delete(np.arange(n), i))[:n_shot].tolist() for i in range(n)]
    else:
        chosen = [list(numbers) for numbers in choose]
        _check_chosen(chosen, n)
    worked = [f"{step}\n{answer}" for step, answer in zip(steps, answers, strict=True)]
    positive, negative = (
        [_chat(tokenizer, system, questions, turns, i, chosen[i]) for i in range(n)]
        for turns in (worked, answers)
    )
    return positive, negative


def _check(questions: Sequence[str], steps: Sequence[str], answers: Sequence[str]) -> int:
    lists = {"questions": questions, "steps": steps, "answers": answers}
    for name, texts in lists.items():
        if isinstance(texts, str) or not all(isinstance(t, str) and t.strip() for t in texts):
            raise ValueError(f"{name} must be a list of texts, none of them blank")
    if not len(questions) == len(steps) == len(answers):
        raise ValueError(
            f"{len(questions)} questions, {len(steps)} steps and {len(answers)} answers: give one"
            " of each for every question"
        )
    if not questions:
        raise ValueError("questions is empty: give at least two questions")
    return len(questions)


def _check_chosen(chosen: Sequence[Sequence[int]], n: int) -> None:
    if len(chosen) != n:
        raise ValueError(f"choose has {len(chosen)} lists of examples for {n} questions")
    for i, numbers in enumerate(chosen):
        if not numbers or not all(is_int(k) and 0 <= k < n and k != i for k in numbers):
            raise ValueError(
                f"choose[{i}]={list(numbers)!r}: name other questions by number, 0 to {n - 1}"
            )


def _chat(
    tokenizer: Tokenizer,
    system: str | None,
    questions: Sequence[str],
    turns: Sequence[str],
    question: int,
    examples: Sequence[int],
) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for k in examples:
        messages.append({"role": "user", "content": questions[k]})
        messages.append({"role": "assistant", "content": turns[k]})
    messages.append({"role": "user", "content": questions[question]})
    rendered = tokenizer.render(messages)
    for message in messages:
        if not holds(rendered, message["content"]):
            raise ValueError(
                f"the model's chat template leaves out a turn of the {message['role']}:"
                f" {message['content'][:60]!r}. Render the prompts yourself and give token lists"
            )
    ids = tokenizer.encode(rendered, add_bos=False)
    tokenizer.refuse_double_bos(ids)
    return ids
