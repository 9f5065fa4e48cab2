"""Prompts as callers give them, checked: texts that can be encoded, and lists of token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..base.checks import is_int


def refuse_surrogates(text: str) -> None:
    """Raises ValueError for a text with a lone surrogate, which no encoding can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"the text has a lone surrogate (U+{code:04X}) at character {error.start}, which is"
            " half a character: read the file as UTF-8, or repair the text with"
            " text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')"
        ) from None


def prompt_list(prompts: Any) -> list[str | list[int]]:
    """One prompt or several, as a list whose items are str or lists of int.

    Raises TypeError and ValueError that say which item is wrong.
    """
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, (Sequence, np.ndarray)):
        raise TypeError(
            "prompts must be a str, a list of ints, or a list of these; got"
            f" {type(prompts).__name__}"
        )
    if isinstance(prompts, np.ndarray) and prompts.dtype != object:
        if prompts.ndim == 1 and prompts.dtype.kind in "iu":
            return [_token_list(prompts, "the prompt")]
        if prompts.ndim == 2 and prompts.dtype.kind in "iu":
            return [_token_list(row, f"prompt {i}") for i, row in enumerate(prompts)]
        if prompts.dtype.kind != "U":
            raise TypeError(
                f"an array of prompts must hold ints of one or two dimensions, got {prompts.dtype}"
                f" {prompts.shape}"
            )
        prompts = prompts.tolist()
    items = list(prompts)
    if not items:
        raise ValueError("no prompts: pass at least one")
    if all(map(is_int, items)):
        return [_token_list(items, "the prompt")]
    return [
        item if isinstance(item, str) else _token_list(item, f"prompt {i}")
        for i, item in enumerate(items)
    ]


def _token_list(item: Any, what: str) -> list[int]:
    if isinstance(item, (bytes, str, Mapping)) or not isinstance(item, (Sequence, np.ndarray)):
        raise TypeError(f"{what} must be a str or a list of token ids, got {type(item).__name__}")
    values = item.tolist() if isinstance(item, np.ndarray) else list(item)
    if not values:
        raise ValueError(f"{what} is empty")
    bad = next((v for v in values if not is_int(v)), None)
    if bad is not None:
        raise TypeError(f"{what} holds {bad!r}, which is not a token id")
    if min(values) < 0:
        raise ValueError(f"{what} holds {min(values)}, which is not a token id")
    return [int(v) for v in values]
