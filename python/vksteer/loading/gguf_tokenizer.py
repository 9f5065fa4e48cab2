"""Building a `tokenizers.Tokenizer` from the vocabulary that a GGUF file carries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..base.checks import first_repeated
from ..errors import ModelError
from .gguf_file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: tokenizer.ggml.pre -> (split pattern; "digits" = GPT-2's after single digits, "gpt2" = GPT-2's
#: own; whether whole words skip the merges)
PRE_TOKENIZERS = {
    "smollm": ("digits", False),
    "qwen2": (_QWEN2, False),
    "deepseek-r1-qwen": (_QWEN2, False),
    "llama-bpe": (_LLAMA3, True),
    "llama3": (_LLAMA3, True),
    "llama-v3": (_LLAMA3, True),
    "tekken": (_TEKKEN, True),
    "gpt-2": ("gpt2", False),
    "default": ("gpt2", False),
}


def build(file: GGUFFile) -> tuple[Tokenizer, bool]:
    """(tokenizers.Tokenizer without a post-processor, whether texts begin with the BOS token unless
    the file says otherwise).
    """
    md = file.metadata
    kind = md.get("tokenizer.ggml.model")
    tokens = _strings(file, "tokenizer.ggml.tokens")
    types = md.get("tokenizer.ggml.token_type")
    if types is None:
        types = np.full(len(tokens), _NORMAL)
    if not isinstance(types, np.ndarray) or len(types) != len(tokens):
        raise ModelError(
            f"{file.path}: metadata 'tokenizer.ggml.token_type' must have one entry for each of"
            f" {len(tokens):,} tokens"
        )
    types = types.tolist()
    if kind == "gpt2":
        return _byte_level(file, tokens, types)
    if kind == "llama":
        gemma = str(md.get("general.architecture", "")).startswith("gemma")
        return (_gemma if gemma else _sentencepiece)(file, tokens, types), True
    raise ModelError(f"{file.path}: tokenizer model {kind!r} is not supported (gpt2 and llama are)")


def _byte_level(file: GGUFFile, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = file.metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{file.path}: pre-tokenizer {pre!r} is not known; known: {', '.join(PRE_TOKENIZERS)}"
        )
    pattern, ignore_merges = PRE_TOKENIZERS[pre]
    spelling = _byte_spelling()
    alphabet = set(spelling.values())
    # A few tokens are stored as plain text instead of in the byte alphabet.
    spelled = [
        t if alphabet.issuperset(t) else "".join(spelling[b] for b in t.encode("utf-8"))
        for t in tokens
    ]
    vocab = _vocabulary(file, spelled)
    merges = [m.split(" ", 1) for m in _strings(file, "tokenizer.ggml.merges")]
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
            ignore_merges=ignore_merges,
        )
    )
    if pattern == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pattern == "digits":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    # A control token outside the byte alphabet is a mislabelled ordinary one: it
    # was respelled above.
    _add_marked(tokenizer, tokens, types, control=alphabet.issuperset)
    return tokenizer, pre in ("llama-bpe", "llama3", "llama-v3", "tekken")


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
    _add_marked(tokenizer, tokens, types, control=lambda t: True)
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
    prefix = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
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
    _add_marked(tokenizer, tokens, types, control=lambda t: True)
    return tokenizer


def _add_marked(
    tokenizer: Tokenizer,
    tokens: list[str],
    types: list[int],
    control: Callable[[str], bool],
) -> None:
    """Control tokens become special; user-defined ones are matched whole but are ordinary text."""
    from tokenizers import AddedToken

    special = [
        AddedToken(t, normalized=False, special=True)
        for t, kind in zip(tokens, types)
        if kind == _CONTROL and t and control(t)
    ]
    tokenizer.add_special_tokens(special)
    whole = [
        t
        for t, kind in zip(tokens, types)
        if kind == _USER_DEFINED and t and tokenizer.token_to_id(t) is not None
    ]
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in whole])


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
