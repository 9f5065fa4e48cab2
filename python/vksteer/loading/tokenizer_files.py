"""Reading a tokenizer's files: tokenizer.json and the chat templates."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.lfs import lfs_pointer
from ..errors import ModelError
from .added_tokens import TOKENIZER_BYTES, optional_json
from .library_errors import library_errors

if TYPE_CHECKING:
    import tokenizers


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json."""
    import tokenizers

    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)
    if path.stat().st_size > TOKENIZER_BYTES:
        raise ModelError(
            f"{path}: {path.stat().st_size:,} bytes is too large for a tokenizer (limit"
            f" {TOKENIZER_BYTES:,})"
        )
    # Its threads do not survive fork(), and this library encodes one text at a time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with library_errors(f"{path}: cannot be read as a tokenizer"):
        return tokenizers.Tokenizer.from_file(str(path))


def folder_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a folder by name, from the newest of the three places where they may
    be; one without a name is "default".
    """
    file = folder / "chat_template.jinja"
    files = {"default": file} if file.exists() else {}
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files.update({path.stem: path for path in more})
    if files:
        return {name: _template_text(path) for name, path in files.items()}
    value, where = settings.get("chat_template"), folder / "tokenizer_config.json"
    if value is None:
        where = folder / "chat_template.json"
        value = optional_json(where).get("chat_template")
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        return {"default": value}
    pairs: list[tuple[Any, Any]] = [(None, None)]
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, list) and all(isinstance(v, Mapping) for v in value):
        pairs = [(v.get("name"), v.get("template")) for v in value]
    if not all(isinstance(x, str) for pair in pairs for x in pair):
        raise ModelError(
            f"{where}: 'chat_template' must be text, a list of objects with 'name' and 'template',"
            " or an object of templates by name"
        )
    return {name: template for name, template in pairs if template}


def _template_text(path: Path) -> str:
    pointer = lfs_pointer(path)
    if pointer is not None:
        raise ModelError(pointer)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
