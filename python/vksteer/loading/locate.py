"""Finds a model: a folder, a GGUF file, a bundled name, or a name on the hub, which is downloaded
into the hub client's own cache.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..base.hub_errors import is_of_client
from ..base.types import PathLike
from ..errors import ModelError
from .gguf_parts import first_part

BUNDLED = ("tiny-llama-chat", "tiny-gemma-chat")

#: What is downloaded from the hub: weights in safetensors, and the small files that say what they
#: mean. Never pickles.
CONFIG_PATTERNS = ["config.json", "generation_config.json"]
MODEL_PATTERNS: list[str] = [
    *CONFIG_PATTERNS,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "adapter_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*.safetensors",
]


def is_bundled(source: object) -> bool:
    """Whether a source names a bundled model, which brings its own prompts. A folder of that name
    in the working directory comes first, and is the reader's own.
    """
    return source in BUNDLED and not os.path.isdir(str(source))


def locate(
    source: PathLike, *, revision: str | None = None, patterns: list[str] = MODEL_PATTERNS
) -> Path:
    """The folder or file that a source names; a name on the hub is downloaded first.

    Raises ModelError where there is no such model, TypeError for a source that is no path or name.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a model source must be a path or a name, got {type(source).__name__}")
    text = os.fspath(source)
    if not isinstance(text, str) or "\0" in text or not text:
        raise ModelError(f"{text!r} is not a path or a name")
    if is_bundled(text):
        path = Path(__file__).parents[1] / "models" / text
        if not (path / "config.json").exists():
            raise ModelError(
                f"the bundled model {text!r} is missing from this installation ({path}); reinstall"
                " vksteer"
            )
        return path
    path = Path(os.path.expanduser(text))
    # os.path's tests say False, rather than raise, for names that no file can have
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        if path.suffix == ".json" or is_gguf(path):
            return path
        raise ModelError(f"{path} is neither a folder, a GGUF file nor a config.json")
    if os.path.exists(path):
        raise ModelError(f"{path} is not a regular file or folder")
    if (
        not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", text)
        or text.endswith((".gguf", ".json", ".safetensors"))
        or ".." in text
    ):
        raise ModelError(f"there is no file or folder {text!r}")
    return _download(text, revision, patterns)


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"there is no folder {name!r}, and fetching it from the hub needs huggingface_hub: pip"
            " install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    # huggingface_hub's errors derive from these; they carry the reason
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{name!r} is neither a folder nor a bundled model ({', '.join(BUNDLED)}), and the hub"
            f" did not give it: {reason}"
        ) from error
    except Exception as error:
        # The HTTP client's own errors (its library has changed between releases) mean
        # the same to the user.
        if not is_of_client(error):
            raise
        raise ModelError(
            f"{name!r} is neither a folder nor a bundled model, and the hub cannot be reached:"
            f" {error}"
        ) from error


def is_gguf(path: Path) -> bool:
    """Whether a file is read as GGUF: it begins as GGUF files do, or is called so."""
    if path.suffix == ".gguf":
        return True
    try:
        with open(path, "rb") as stream:
            return stream.read(4) == b"GGUF"
    except OSError:
        return False


def only_gguf(folder: Path) -> Path | None:
    """The one GGUF model of a folder, for a split one its first part; None where there is none or
    more than one. Projectors of vision models ("mmproj") do not count.
    """
    found = sorted(p for p in folder.glob("*.gguf") if "mmproj" not in p.name.lower())
    if not found:
        found = sorted(p for p in folder.iterdir() if p.is_file() and is_gguf(p))
    return found[0] if len(found) == 1 else first_part(found)
