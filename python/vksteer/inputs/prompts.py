"""From prompts as users give them (texts, requests of the toy world, tokens) to token lists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from ..base.checks import is_int

if TYPE_CHECKING:
    from ..runtime.model import Model


def _is_tokens(prompt: Any) -> TypeGuard[Sequence[int]]:
    kinds = (list, tuple, np.ndarray)
    return isinstance(prompt, kinds) and len(prompt) > 0 and all(map(is_int, prompt))


def is_single(prompts: Any) -> bool:
    """Whether this is one prompt (a text, a request, token ids) and not a list of prompts."""
    return isinstance(prompts, str) or hasattr(prompts, "prompt") or _is_tokens(prompts)


def as_list(prompts: Any, what: str) -> list[str | list[int]]:
    """A list of prompts, each a str or a list of ints. One prompt alone counts as a list of one;
    requests of `vksteer.data.world` become their texts.

    Raises ValueError naming `what` (the argument) for an empty list, an empty prompt, and
    anything that is no prompt.
    """
    if is_single(prompts):
        prompts = [prompts]
    try:
        prompts = list(prompts)
    except TypeError:
        raise ValueError(f"{what} must be a list of prompts, not {prompts!r}") from None
    if not prompts:
        raise ValueError(f"{what} is empty: give at least one prompt")
    out: list[str | list[int]] = []
    for i, given in enumerate(prompts):
        prompt = getattr(given, "prompt", given)
        if isinstance(prompt, str) and prompt.strip():
            out.append(prompt)
        elif _is_tokens(prompt):
            out.append([int(t) for t in prompt])
        else:
            raise ValueError(
                f"{what}[{i}] is {prompt!r}: a prompt is a text that is not blank, or a list of"
                " token ids that is not empty"
            )
    return out


def as_tokens(model: Model, prompts: Any, what: str, *, room: int = 0) -> list[list[int]]:
    """Every prompt as token ids: texts go through the model's chat template, token lists stay as
    they are.

    room: how many more tokens each row must have place for. Raises ValueError as `as_list`, and for
    a prompt that is too long for the context.
    """
    prompts = as_list(prompts, what)
    texts = [i for i, prompt in enumerate(prompts) if isinstance(prompt, str)]
    rows: list[Any] = list(prompts)
    if texts:
        for i, tokens in zip(texts, model.chat_tokens([prompts[i] for i in texts])):
            rows[i] = [int(t) for t in tokens]
    longest = getattr(model.config, "n_ctx", None)
    for i, row in enumerate(rows):
        if longest and len(row) + room > longest:
            more = f" and {room} new ones" if room else ""
            raise ValueError(
                f"{what}[{i}] has {len(row)} tokens{more}, the model's context {longest}: shorten"
                " or drop it"
            )
    return rows


def refuse_equal_classes(harmful: Sequence[Any], harmless: Sequence[Any]) -> None:
    """Raises ValueError where both classes hold the same prompts, in any order: their difference
    is zero.
    """

    def plain(prompts: Sequence[Any]) -> list[str]:
        return sorted(repr(p) for p in prompts)

    if plain(harmful) == plain(harmless):
        raise ValueError(
            f"harmful and harmless are the same {len(harmful)} prompts, so nothing tells the two"
            " classes apart: was one list given twice?"
        )


def token_text(model: Model, token: int) -> str:
    """One token as text, control tokens included; its number where the model has no tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    return str(token) if tokenizer is None else tokenizer.token(int(token))


def batches(rows: Sequence[Sequence[int]], *, tokens: int, most: int) -> Iterator[slice]:
    """Slices of `rows` in order, each with about `tokens` tokens and at most `most` rows, never
    empty.
    """
    start = n = 0
    for i, row in enumerate(rows):
        if i > start and (n + len(row) > tokens or i - start >= most):
            yield slice(start, i)
            start, n = i, 0
        n += len(row)
    if start < len(rows):
        yield slice(start, len(rows))
