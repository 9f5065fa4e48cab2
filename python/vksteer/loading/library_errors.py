"""What the tokenizers library raises, as ModelError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    import tokenizers


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns what the library raises into ModelError: a plain Exception, and for some damaged files
    a Rust panic, which is no Exception.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise ModelError(f"{what}: {error}") from error
        raise


def adds_first(backend: tokenizers.Tokenizer) -> list[int]:
    """What the post-processor puts in front of a text, at most one token. ModelError where it
    fails, because it names tokens that it does not define.
    """
    with library_errors("the tokenizer's post-processor fails"):
        return backend.encode("", add_special_tokens=True).ids[:1]
