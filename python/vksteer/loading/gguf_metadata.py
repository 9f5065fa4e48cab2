"""Typed reads of a GGUF file's metadata below "{architecture}."; errors name the key."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from ..errors import ModelError
from .gguf_file import GGUFFile

#: Keys without influence on the numbers of these architectures.
HARMLESS = frozenset({"tensor_data_layout", "name", "description", "author"})


class Metadata:
    """The metadata of one architecture. more: values for keys that the file does not have."""

    def __init__(self, file: GGUFFile, arch: str, more: Mapping[str, Any]) -> None:
        self.file, self.arch, self.prefix, self.more = file, arch, arch + ".", more

    def own(self) -> dict[str, Any]:
        """The architecture's keys without their prefix."""
        n = len(self.prefix)
        return {k[n:]: v for k, v in self.file.metadata.items() if k.startswith(self.prefix)}

    def raw(self, key: str) -> Any:
        """The value as the file has it; None where it has none."""
        value = self.file.metadata.get(self.prefix + key)
        return self.more.get(key) if value is None else value

    def error(self, key: str, what: str) -> ModelError:
        """A ModelError that names the file, the key and its value."""
        value = self.raw(key)
        shown = "" if value is None else f" = {repr(value)[:80]}"
        return ModelError(f"{self.file.path}: metadata {self.prefix + key!r}{shown} {what}")

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; `default` where there is none (None: it must be there)."""
        value = self.raw(key)
        # one number for each layer is accepted where all are equal
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "must be one integer, the same for all layers")
        return value

    def number(self, key: str, default: float) -> float:
        """A finite number; `default` where there is none."""
        value = self.raw(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise self.error(key, "must be a number")
        return float(value)

    def text(self, key: str) -> str | None:
        """A text; None where there is none."""
        value = self.raw(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, "must be text")
        return value

    def flag(self, key: str) -> bool | None:
        """True or false; None where there is none."""
        value = self.raw(key)
        if value is not None and not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def refuse_unknown(self, known: Collection[str]) -> None:
        """ModelError for a key below "{architecture}." that is neither known nor neutral."""
        for key, value in self.own().items():
            if key in known or key in HARMLESS:
                continue
            neutral = not isinstance(value, (np.ndarray, list)) and value in (0, 0.0, False, "")
            if key == "attention.causal":
                neutral = value is True
            if not neutral:
                raise ModelError(
                    f"{self.file.path}: metadata {self.prefix + key!r} = {repr(value)[:80]} would"
                    " change the numbers and is not understood"
                )
