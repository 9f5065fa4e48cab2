"""Byte-level BPE tokenizers of folders that have vocab.json and merges.txt but no tokenizer.json,
as the repositories of OPT and older GPT-2 models do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from .added_tokens import TOKENIZER_BYTES, optional_json, text_of
from .library_errors import library_errors

if TYPE_CHECKING:
    import tokenizers

VOCABULARY, MERGES = "vocab.json", "merges.txt"


@dataclass(frozen=True)
class _Kind:
    """A tokenizer class of transformers. pattern: how texts are split (None: as GPT-2 does);
    special: its special tokens where no file names them.
    """

    special: Mapping[str, str]
    pattern: str | None = None
    nfc: bool = False


_END = "<|endoftext|>"
_GPT2 = _Kind({"bos_token": _END, "eos_token": _END, "unk_token": _END})
_QWEN = _Kind(
    {"eos_token": _END, "unk_token": _END, "pad_token": _END},
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,
)
#: `tokenizer_class` -> the class, and `model_type` -> the class where no file names one.
_CLASSES = {"GPT2Tokenizer": _GPT2, "Qwen2Tokenizer": _QWEN}
_MODELS = {"gpt2": _GPT2, "opt": _GPT2, "gptj": _GPT2, "qwen2": _QWEN}


def load_byte_level(
    folder: Path, settings: Mapping[str, Any]
) -> tuple[tokenizers.Tokenizer, dict[str, Any]] | None:
    """(tokenizer, settings with the class's special tokens), as transformers builds it.

    settings: tokenizer_config.json. None where the two files are missing or belong to a class of
    tokenizers that is not known. Raises ModelError for files that cannot be read.
    """
    vocabulary, merges = folder / VOCABULARY, folder / MERGES
    kind = _kind(folder, settings)
    if kind is None or not vocabulary.exists() or not merges.exists():
        return None
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    prefix = settings.get("add_prefix_space") is True
    with library_errors(f"{folder}: {VOCABULARY} and {MERGES} cannot be read as a tokenizer"):
        backend = Tokenizer(models.BPE(vocab=_vocabulary(vocabulary), merges=_merges(merges)))
    if kind.pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    else:
        split = pre_tokenizers.Split(Regex(kind.pattern), behavior="isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, rest])
    if kind.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    listed = optional_json(folder / "special_tokens_map.json")
    named = {name: text for name, text in kind.special.items() if name not in listed}
    whole = {**named, **settings}
    _put_bos_first(backend, whole, listed)
    return backend, whole


def _kind(folder: Path, settings: Mapping[str, Any]) -> _Kind | None:
    name = settings.get("tokenizer_class")
    if isinstance(name, str):
        return _CLASSES.get(name.removesuffix("Fast"))
    model_type = optional_json(folder / "config.json").get("model_type")
    return _MODELS.get(model_type) if isinstance(model_type, str) else None


def _vocabulary(path: Path) -> dict[str, int]:
    content = optional_json(path)
    for text, index in content.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < 1 << 31:
            raise ModelError(f"{path}: token {text[:200]!a} has the id {str(index)[:200]}")
    if not content:
        raise ModelError(f"{path}: the vocabulary is empty")
    return dict(content)


def _merges(path: Path) -> list[tuple[str, str]]:
    try:
        if path.stat().st_size > TOKENIZER_BYTES:
            raise ModelError(f"{path}: too large for a list of merges")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    found = []
    for i, line in enumerate(lines):
        if not line.strip() or (i == 0 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2 or not all(parts):
            raise ModelError(f"{path}: line {i + 1} is {line[:200]!r}, not two tokens")
        found.append((parts[0], parts[1]))
    return found


def _put_bos_first(
    backend: tokenizers.Tokenizer, settings: Mapping[str, Any], listed: Mapping[str, Any]
) -> None:
    """BOS before every text, where the class's settings ask for it (OPT)."""
    from tokenizers import AddedToken, processors

    bos = settings.get("bos_token", listed.get("bos_token"))
    if settings.get("add_bos_token") is not True or bos is None:
        return
    text = bos["content"] if isinstance(bos, Mapping) and "content" in bos else bos
    if not isinstance(text, (str, AddedToken)):
        return  # refused where the declared tokens are read
    text = text_of(text)
    index = backend.token_to_id(text)
    if index is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=[text, "$A"], pair=[text, "$A", text, "$B"], special_tokens=[(text, index)]
        )
