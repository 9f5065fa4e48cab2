"""Added and special tokens that a tokenizer's folder declares outside tokenizer.json, in
tokenizer_config.json, special_tokens_map.json or added_tokens.json, added to the tokenizer as
transformers does at load.

The order of the files and the rules for flags are those of transformers 5.24
(`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.json_files import read_json
from ..errors import ModelError
from .library_errors import adds_first

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_BYTES = 256 << 20

_said: set[str] = set()  # folders whose contradiction about BOS a warning has named

SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Declared:
    """What the files declare. Tokens are texts or tokenizers.AddedToken."""

    #: name -> token: the seven of SPECIAL_NAMES, then names of one model ("image_token", ...)
    named: dict[str, Any] = field(default_factory=dict)
    extra: list[Any] = field(default_factory=list)
    by_id: dict[int, tokenizers.AddedToken] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        """Name -> text of the named tokens, as chat templates read them."""
        return {name: text_of(token) for name, token in self.named.items() if text_of(token)}


def optional_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no file."""
    return read_json(path, limit=TOKENIZER_BYTES) if path.exists() else {}


def text_of(token: Any) -> str:
    """The text of a token that is a text or a tokenizers.AddedToken."""
    return token if isinstance(token, str) else str(token.content)


def add_declared_tokens(
    backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]
) -> Declared:
    """Adds the tokens that the folder's files declare to the tokenizer of its tokenizer.json.

    settings: tokenizer_config.json. Raises ModelError where a file is malformed, and where a token
    would not get the id under which it is listed.
    """
    declared = _declared(backend, folder, settings)
    # a token that tokenizer.json has keeps its id there, whatever the other files say
    new = {i: t for i, t in declared.by_id.items() if backend.token_to_id(t.content) is None}
    _add(backend, declared)
    for index, token in new.items():
        if backend.token_to_id(token.content) != index:
            raise ModelError(
                f"{folder}: token {token.content!r} is listed as {index}, but would be"
                f" {backend.token_to_id(token.content)}"
            )
    backend.encode_special_tokens = settings.get("split_special_tokens") is True
    return declared


def declared_add_bos(
    backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any], bos: str | None
) -> bool | None:
    """`add_bos_token` of tokenizer_config.json, None where it says nothing.

    transformers 5 ignores the key beside a tokenizer.json, transformers 4 followed it: a
    contradiction to tokenizer.json's post-processor is said with a warning.
    """
    add_bos = settings.get("add_bos_token")
    if not isinstance(add_bos, bool):
        return None
    index = None if bos is None else backend.token_to_id(bos)
    begins = adds_first(backend)
    if index is not None and (begins == [index]) != add_bos and str(folder) not in _said:
        _said.add(str(folder))
        warnings.warn(
            f"{folder}: tokenizer_config.json has add_bos_token = {str(add_bos).lower()}, and the"
            " post-processor of tokenizer.json does the opposite; the former is followed for plain"
            " texts, where transformers 5 follows the latter (choose with encode(text,"
            " add_bos=...)). Chat templates write BOS themselves",
            stacklevel=3,
        )
    return add_bos


def _declared(backend: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any]) -> Declared:
    where = folder / "tokenizer_config.json"
    values = dict(settings)
    if "additional_special_tokens" in values and not values.get("extra_special_tokens"):
        values["extra_special_tokens"] = values.pop("additional_special_tokens")
    others = {
        key: values.pop(key)
        for key in list(values)
        if key.endswith("_token") and key not in SPECIAL_NAMES and isinstance(values[key], str)
    }
    if isinstance(values.get("extra_special_tokens"), Mapping):
        others.update(values.pop("extra_special_tokens"))
    by_id: dict[int, tokenizers.AddedToken] = {}
    listed = values.get("added_tokens_decoder")
    if listed is not None:
        if not isinstance(listed, Mapping):
            raise ModelError(f"{where}: 'added_tokens_decoder' must be an object")
        for index, entry in listed.items():
            if not index.isdigit():
                raise ModelError(f"{where}: 'added_tokens_decoder' has the id {index[:40]!r}")
            by_id[int(index)] = _token(entry, where)
    else:
        _merge_special_tokens_map(values, others, folder / "special_tokens_map.json")
        by_id.update(_listed_by_text(values, folder / "added_tokens.json"))
        by_id.update(backend.get_added_tokens_decoder())
    by_text = {token.content: token for token in by_id.values()}
    named = {}
    for key, value in {**{k: values.get(k) for k in SPECIAL_NAMES}, **others}.items():
        if value is not None and value != "":
            token = value if isinstance(value, str) else _token(value, where)
            named[key] = by_text.get(text_of(token), token) if key in SPECIAL_NAMES else token
    return Declared(named, _extra(values, where), by_id)


def _extra(values: Mapping[str, Any], where: Path) -> list[Any]:
    extra = values.get("extra_special_tokens")
    if extra is None and "extra_special_tokens" not in values:
        extra = values.get("additional_special_tokens")  # of special_tokens_map.json
    if extra is None:
        return []
    if not isinstance(extra, list):
        raise ModelError(f"{where}: 'extra_special_tokens' must be a list or an object")
    return [token if isinstance(token, str) else _token(token, where) for token in extra]


def _merge_special_tokens_map(values: dict[str, Any], others: dict[str, Any], path: Path) -> None:
    """Takes over special_tokens_map.json, whose entries replace those of tokenizer_config.json."""
    for key, value in optional_json(path).items():
        if key == "extra_special_tokens" and isinstance(value, Mapping):
            others.update(value)
            continue
        if isinstance(value, Mapping):
            values[key] = _token({**value, "special": True}, path)
        elif key == "extra_special_tokens" and isinstance(value, list):
            known = values.get("extra_special_tokens") or []
            values[key] = [*known, *(token for token in value if token not in known)]
        else:
            values[key] = value


def _listed_by_text(values: Mapping[str, Any], path: Path) -> dict[int, tokenizers.AddedToken]:
    """The tokens of added_tokens.json ({text: id}); special ones are those that another file
    names.
    """
    special = {
        text_of(_token(values[key], path)) for key in SPECIAL_NAMES if values.get(key) is not None
    }
    special.update(text_of(_token(t, path)) for t in values.get("extra_special_tokens") or [])
    found = {}
    for text, index in optional_json(path).items():
        if isinstance(index, bool) or not isinstance(index, int) or index < 0 or not text:
            raise ModelError(f"{path}: token {text[:200]!r} has the id {index!r}")
        known = text in special
        found[index] = _made(text, path, normalized=not known, special=known)
    return found


def _token(value: Any, where: Path) -> tokenizers.AddedToken:
    """A token of a JSON file: a text, or an object with content and flags."""
    from tokenizers import AddedToken

    if isinstance(value, (str, AddedToken)):
        return _made(value, where, special=True) if isinstance(value, str) else value
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise ModelError(
            f"{where}: a token must be a text, or an object with 'content', not {str(value)[:200]}"
        )
    flags = {name: value[name] for name in _FLAGS if isinstance(value.get(name), bool)}
    return _made(value["content"], where, **flags)


def _made(text: str, where: Path | str, **flags: bool) -> tokenizers.AddedToken:
    from tokenizers import AddedToken

    try:
        return AddedToken(text, **flags)
    except UnicodeEncodeError as error:
        raise ModelError(
            f"{where}: the token {text[:200]!a} has a lone surrogate, which is half a character"
        ) from error


def _add(backend: tokenizers.Tokenizer, declared: Declared) -> None:
    present = backend.get_added_tokens_decoder().values()
    same = {repr(token) for token in present}
    tokens: list[Any] = [t for _, t in sorted(declared.by_id.items()) if repr(t) not in same]
    texts = {token.content for token in present} | {text_of(token) for token in tokens}
    for token in (*declared.named.values(), *declared.extra):
        if text_of(token) not in texts and token not in tokens:
            tokens.append(token)
    named = set(declared.texts.values())
    where = "the tokenizer's settings"
    added = [_made(t, where, special=True) if isinstance(t, str) else t for t in tokens]
    for token in added:
        if token.content in named:
            token.special = True
    if added:
        backend.add_tokens(added)
