"""Reading a tokenizer's files: tokenizer.json, the tokens that tokenizer_config.json adds, and the
chat template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.json_files import read_json
from ..errors import ModelError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_BYTES = 256 << 20


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json."""
    import tokenizers

    if path.stat().st_size > TOKENIZER_BYTES:
        raise ModelError(
            f"{path}: {path.stat().st_size:,} bytes is too large for a tokenizer (limit"
            f" {TOKENIZER_BYTES:,})"
        )
    # Its threads do not survive fork(), and this library encodes one text at a time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(f"{path}: cannot be read as a tokenizer: {error}") from error


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file."""
    return read_json(path, limit=TOKENIZER_BYTES) if path.exists() else {}


def token_text(value: Any) -> str | None:
    """The text of a special token, which a file gives as text or as an object with its content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def add_missing_tokens(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], path: Path
) -> None:
    """Adds the tokens that tokenizer_config.json (`path`) lists and tokenizer.json lacks.

    Raises ModelError where one would not get the id under which it is listed.
    """
    from tokenizers import AddedToken

    listed = settings.get("added_tokens_decoder")
    if not isinstance(listed, Mapping):
        return
    missing = [
        (int(k), v)
        for k, v in listed.items()
        if k.isdigit() and (text := token_text(v)) and backend.token_to_id(text) is None
    ]
    for index, value in sorted(missing, key=lambda item: item[0]):
        backend.add_tokens(
            [
                AddedToken(
                    value["content"],
                    special=bool(value.get("special")),
                    normalized=bool(value.get("normalized")),
                    lstrip=bool(value.get("lstrip")),
                    rstrip=bool(value.get("rstrip")),
                )
            ]
        )
        if backend.token_to_id(value["content"]) != index:
            raise ModelError(
                f"{path}: token {value['content']!r} is listed as {index}, but would be"
                f" {backend.token_to_id(value['content'])}"
            )


def folder_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template of a folder, from the newest of the three places where it may be."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot read {file}: {error}") from error
    value = settings.get("chat_template")
    if value is None:
        value = optional_json(folder / "chat_template.json").get("chat_template")
    if isinstance(value, list):  # several by name; the default one is for chats without tools
        named: dict[Any, Any] = {
            v.get("name"): v.get("template") for v in value if isinstance(v, Mapping)
        }
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ModelError(
            f"{folder / 'tokenizer_config.json'}: 'chat_template' must be text, or a list with one"
            " named 'default'"
        )
    return value or None
