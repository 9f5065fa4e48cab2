"""Building a `tokenizers.Tokenizer` from the vocabulary that a GGUF file carries.

Tokens of the types control, user-defined and unknown are literal text, matched before the text is
split. In a byte-level vocabulary all other tokens are spelled in GPT-2's alphabet of bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import first_repeated
from ..errors import ModelError
from . import gguf_pre_tokenizers
from .gguf_file import GGUFFile, end_tokens
from .gguf_pre_tokenizers import FALLBACK, LLAMA3, PRE_TOKENIZERS, Rule

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_LITERAL = (_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED)

#: The expressions by which most files are split.
_LLAMA3, _QWEN2 = gguf_pre_tokenizers.LLAMA3_WORDS, gguf_pre_tokenizers.QWEN2_WORDS

_PRE = "tokenizer.ggml.pre"
_LLAMA3_BOS = "<|begin_of_text|>"
#: Llama 4 begins texts alike, but splits them otherwise and has none of these.
_LLAMA3_TURNS = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
#: How many merges are compared with a split rule that a file does not name.
_MERGES_COMPARED = 4096


def arguments(file: GGUFFile, d_vocab: int | None) -> dict[str, Any] | None:
    """The arguments of `Tokenizer` for an open file.

    None where the file carries no vocabulary, and with a warning where it names a kind of
    tokenizer or a pre-tokenizer that is not known. d_vocab: the embedding's rows.
    Raises ModelError for a vocabulary that is damaged or does not fit the embedding.
    """
    md = file.metadata
    kind = md.get("tokenizer.ggml.model")
    none = isinstance(kind, str) and kind in ("none", "no_vocab")
    if md.get("tokenizer.ggml.tokens") is None or none:
        return None
    unknown = _unknown_kind(md)
    if unknown is not None:
        warnings.warn(
            f"{file.path}: {unknown}; the model is loaded without a tokenizer: pass token lists",
            stacklevel=5,
        )
        return None
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = _types(file, tokens)
    if d_vocab is not None and len(tokens) > d_vocab:
        if not _has_vision(file):
            raise ModelError(
                f"{file.path}: {len(tokens):,} tokens do not fit an embedding of {d_vocab:,} rows"
            )
        # Ollama's files list the tokens of images, which have no row.
        tokens, types = tokens[:d_vocab], types[:d_vocab]
    if md.get("tokenizer.ggml.add_eos_token") is True:
        warnings.warn(
            f"{file.path}: metadata 'tokenizer.ggml.add_eos_token' is set; texts are prompts here"
            " and are encoded without it",
            stacklevel=5,
        )
    special = _special_texts(md, tokens)
    if kind == "gpt2":
        rule = _rule(file, tokens)
        backend, adds_bos = _byte_level(file, tokens, types, rule), rule.add_bos
        if rule is LLAMA3 and "bos_token" not in special and _LLAMA3_BOS in tokens:
            special["bos_token"] = _LLAMA3_BOS
    else:
        gemma = str(md.get("general.architecture", "")).startswith("gemma")
        backend = (_gemma if gemma else _sentencepiece)(file, tokens, types)
        adds_bos = True
    first = "tokenizer.chat_template"
    templates = {
        key[len(first) + 1 :] or "default": value
        for key, value in md.items()
        if (key == first or key.startswith(first + ".")) and isinstance(value, str) and value
    }
    return {
        "backend": backend,
        "special": special,
        "chat_template": templates.get("default"),
        "named_templates": templates,
        "add_bos": _flag(file, "tokenizer.ggml.add_bos_token", adds_bos),
        "eos_ids": end_tokens(md),
    }


def _unknown_kind(md: Mapping[str, Any]) -> str | None:
    """What makes a tokenizer unreadable here, as a clause; None where it can be read."""
    kind = md.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in ("gpt2", "llama"):
        return f"tokenizer model {_short(kind)} is not supported (gpt2 and llama are)"
    pre = md.get(_PRE, "default")
    known = isinstance(pre, str) and (pre in ("", "default") or pre in PRE_TOKENIZERS)
    if kind == "gpt2" and not known:
        return f"metadata {_PRE!r} names {_short(pre)}, which is not known"
    return None


def _short(value: object) -> str:
    return repr(value)[:80]


def _has_vision(file: GGUFFile) -> bool:
    return any(name.startswith(("v.", "mm.")) for name in file.tensors)


def _types(file: GGUFFile, tokens: list[str]) -> list[int]:
    types = file.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.full(len(tokens), _NORMAL)
    integers = isinstance(types, np.ndarray) and types.dtype.kind in "iu"
    if not integers or len(types) != len(tokens):
        raise ModelError(
            f"{file.path}: metadata 'tokenizer.ggml.token_type' must have one integer for each of"
            f" {len(tokens):,} tokens"
        )
    return [int(kind) for kind in types.tolist()]


def _special_texts(md: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    keys = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
    }
    special = {}
    for name, key in keys.items():
        index = md.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(index, int) and 0 <= index < len(tokens):
            special[name] = tokens[index]
    return special


def _rule(file: GGUFFile, tokens: list[str]) -> Rule:
    """The split rule of a byte-level file; a warning where it is a guess."""
    pre = file.metadata.get(_PRE)
    if pre not in (None, "", "default"):
        return PRE_TOKENIZERS[pre]
    if _is_llama3(file, tokens):
        return LLAMA3
    said = "is missing" if not pre else f"is {pre!r}"
    warnings.warn(
        f"{file.path}: metadata {_PRE!r} {said}; texts are split by the rule that llama.cpp falls"
        " back to, which is not the model's own: convert the model anew, or pass token lists",
        stacklevel=6,
    )
    return FALLBACK


def _is_llama3(file: GGUFFile, tokens: list[str]) -> bool:
    """Whether a vocabulary is Llama 3's: its special tokens, and merges that stay inside the pieces
    that its rule makes.
    """
    names = set(tokens)
    if _LLAMA3_BOS not in names or names.isdisjoint(_LLAMA3_TURNS):
        return False
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_LLAMA3), "isolated")
    merges = _strings(file, "tokenizer.ggml.merges")[:_MERGES_COMPARED]
    byte_of = {char: byte for byte, char in _byte_spelling().items()}
    for merge in merges:
        joined = merge.replace(" ", "")
        try:
            text = bytes(byte_of[c] for c in joined).decode("utf-8")
        except (KeyError, UnicodeDecodeError):  # no whole character: it says nothing
            continue
        if len(split.pre_tokenize_str(text)) > 1 and not text.isspace():
            return False
    return True


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int], rule: Rule) -> Tokenizer:
    from tokenizers import Tokenizer, models

    merges = [m.split(" ", 1) for m in _strings(file, "tokenizer.ggml.merges")]
    types = _with_special_types(file.metadata, tokens, types, {"".join(m) for m in merges})
    spelling = _byte_spelling()
    alphabet, present = set(spelling.values()), set(tokens)
    spelled = list(tokens)
    for i, (token, kind) in enumerate(zip(tokens, types)):
        # A few ordinary tokens are stored as plain text instead of in the byte alphabet.
        if kind not in _LITERAL and not alphabet.issuperset(token):
            bytewise = "".join(spelling[b] for b in token.encode("utf-8"))
            if bytewise not in present:
                spelled[i] = bytewise
    vocab = _vocabulary(file, spelled)
    bad = next((m for m in merges if not _joins(m, vocab)), None)
    if bad is not None:
        raise ModelError(
            f"{file.path}: metadata 'tokenizer.ggml.merges' joins {tuple(bad)!r}, which the"
            " vocabulary does not have"
        )
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for left, right in merges],
            fuse_unk=False,
            ignore_merges=rule.ignore_merges,
        )
    )
    gguf_pre_tokenizers.apply(rule, tokenizer)
    _add_marked(tokenizer, tokens, types)
    return tokenizer


def _with_special_types(
    md: Mapping[str, Any], tokens: list[str], types: list[int], made: Container[str]
) -> list[int]:
    """Token types in which the tokens that begin and end texts are control tokens, whatever the
    file marks them as, unless merges make them (`made`) or they are single characters.
    """
    ids = [*end_tokens(md), md.get("tokenizer.ggml.bos_token_id")]
    types = list(types)
    for index in ids:
        if isinstance(index, int) and 0 <= index < len(tokens):
            token = tokens[index]
            if types[index] != _CONTROL and len(token) > 1 and token not in made:
                types[index] = _CONTROL
    return types


def _joins(merge: list[str], vocab: dict[str, int]) -> bool:
    """Whether a merge is of two tokens of the vocabulary and makes a third."""
    return len(merge) == 2 and all(part in vocab for part in (*merge, "".join(merge)))


def _gemma(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE as Gemma's tokenizer.json has it: no prefix space, merges in the
    order of the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    # Runs of spaces are stored as they are; inside the tokenizer a space is always U+2581.
    spelled = ["\u2581" * len(t) if t and not t.strip(" ") else t for t in tokens]
    vocab = _vocabulary(file, spelled)
    merges: list[tuple[str, str]] = []
    # in file order, longest left part first: Gemma's scores do not follow its merges,
    # the file's order does
    for token in vocab:
        for i in range(len(token) - 1, 0, -1):  # spelled out: half a million merges
            left = token[:i]
            if left in vocab:
                right = token[i:]
                if right in vocab:
                    merges.append((left, right))
    unknown = _token(file, tokens, "tokenizer.ggml.unknown_token_id")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token=unknown)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_marked(tokenizer, tokens, types)
    return tokenizer


def _sentencepiece(file: GGUFFile, tokens: list[str], types: list[int]) -> Tokenizer:
    """SentencePiece BPE of Llama 2 and Mistral: merges sorted by score, a space before the text
    unless the file says otherwise.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise ModelError(
            f"{file.path}: metadata 'tokenizer.ggml.scores' must have one entry for each of"
            f" {len(tokens):,} tokens"
        )
    vocab = _vocabulary(file, tokens)
    score = dict(zip(tokens, scores.tolist()))
    merges: list[tuple[float, int, int, str, str]] = []
    for token in vocab:
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in vocab and token[i:] in vocab
        ]
        pairs.sort(key=lambda p: (vocab[p[0]], vocab[p[1]]))
        merges.extend((score[token], len(left), len(right), left, right) for left, right in pairs)
    merges.sort(key=lambda m: m[:3], reverse=True)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for *_, left, right in merges],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = _flag(file, "tokenizer.ggml.add_space_prefix", True)
    # As sentencepiece does it, and these families' own tokenizer.json: always one more space, also
    # before a text that begins with one, and after a special token. (transformers reads such GGUF
    # files with Metaspace, which leaves a text that begins with a space alone.)
    escape = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("\u2581"), escape]) if prefix else escape
    )
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(
        steps + ([decoders.Strip(content=" ", left=1)] if prefix else [])
    )
    _add_marked(tokenizer, tokens, types, file.metadata.get("general.architecture"))
    return tokenizer


#: Marked tokens of Phi 3 that leave the spaces behind them.
_PHI3_PLAIN = ("<unk>", "<s>", "<|endoftext|>")


def _add_marked(
    tokenizer: Tokenizer, tokens: list[str], types: list[int], arch: object = None
) -> None:
    """Control tokens and the unknown token become special; user-defined ones are matched whole but
    are ordinary text.

    arch: `general.architecture`. The marked tokens of Phi 3's SentencePiece vocabulary take the
    spaces and newlines behind them along, which a GGUF file does not say: llama.cpp knows it by the
    model's name, tokenizer.json says "rstrip".
    """
    from tokenizers import AddedToken

    marked = [(t, kind) for t, kind in zip(tokens, types) if t]
    takes = {t for t, _ in marked if t not in _PHI3_PLAIN} if arch == "phi3" else set()
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True, rstrip=t in takes)
            for t, kind in marked
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(t, normalized=False, special=False, rstrip=t in takes)
            for t, kind in marked
            if kind == _USER_DEFINED and tokenizer.token_to_id(t) is not None
        ]
    )


def _flag(file: GGUFFile, key: str, default: bool) -> bool:
    value = file.metadata.get(key, default)
    if not isinstance(value, (bool, int)):
        raise ModelError(f"{file.path}: metadata {key!r} = {_short(value)} must be true or false")
    return bool(value)


def _strings(file: GGUFFile, key: str) -> list[str]:
    value = file.metadata.get(key)
    if not isinstance(value, list) or not value:
        raise ModelError(f"{file.path}: metadata {key!r} is missing or not a list of strings")
    return value


def _vocabulary(file: GGUFFile, spelled: Sequence[str]) -> dict[str, int]:
    vocab = {t: i for i, t in enumerate(spelled)}
    if len(vocab) != len(spelled):
        twice = str(first_repeated(spelled))[:40]
        raise ModelError(f"{file.path}: metadata 'tokenizer.ggml.tokens' has {twice!r} twice")
    return vocab


def _token(file: GGUFFile, tokens: list[str], key: str) -> str | None:
    index = file.metadata.get(key)
    return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else None


def _byte_spelling() -> dict[int, str]:
    """GPT-2's table: every byte as a printable character (printable Latin-1 as itself, the
    rest from U+0100 on).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {b: chr(b) for b in printable}
    for b in range(256):
        if b not in table:
            table[b] = chr(0x100 + len(table) - len(printable))
    return table
