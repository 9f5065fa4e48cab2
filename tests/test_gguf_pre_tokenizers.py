"""Every pre-tokenizer that GGUF files name, on 2,000 texts each, against the tokenizer.json (or the
tokenizer class of transformers) that the same vocabulary would have in its family.
"""

from __future__ import annotations

import importlib
import json
import re
import unicodedata
from functools import cache

import pytest

from gguf_vocabularies import MARKED, add_marked, texts, trained, write_vocabulary
from tokenizer_recipes import (
    BEGIN_WITH_BOS,
    CLASSES,
    LLAMA_CPP,
    LLAMA_CPP_WHOLE,
    RECIPES,
    llama_cpp_pieces,
)
from vksteer.loading import gguf_pre_tokenizers as table
from vksteer.loading.tokenizer import Tokenizer

COUNT = 2000


@cache
def all_texts():
    return texts(COUNT, 7)


def from_recipe(recipe):
    """The tokenizers library's reading of a tokenizer.json."""
    from tokenizers import Tokenizer as Backend

    tokens, merges = trained()
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokens) + i,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind == 3,
            }
            for i, (text, kind) in enumerate(MARKED.items())
        ],
        "normalizer": recipe["normalizer"],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": recipe["pre_tokenizers"]},
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": recipe["ignore_merges"],
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [list(m) for m in merges],
        },
    }
    return Backend.from_str(json.dumps(spec))


def from_class(module, name):
    """The backend that a class of transformers builds around the vocabulary."""
    tokens, merges = trained()
    cls = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    vocab = {token: i for i, token in enumerate([*tokens, *MARKED])}
    made = cls(
        vocab=vocab,
        merges=list(merges),
        unk_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        cls_token="<|endoftext|>",
        sep_token="<|endoftext|>",
        mask_token="<|endoftext|>",
    )
    return add_marked(made.backend_tokenizer)


def by_llama_cpp(name):
    """Text -> tokens by llama.cpp's expressions, Python's regex module and plain merging."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    tokens, merges = trained()
    vocab = {token: i for i, token in enumerate(tokens)}
    whole = name in LLAMA_CPP_WHOLE
    bpe = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    marked = re.compile(f"({'|'.join(map(re.escape, sorted(MARKED, key=len, reverse=True)))})")
    number = {text: len(tokens) + i for i, text in enumerate(MARKED)}

    def encode(text):
        ids = []
        for part in marked.split(text):
            if part in number:
                ids.append(number[part])
            else:
                pieces = llama_cpp_pieces(part, LLAMA_CPP[name])
                ids += [i for piece in pieces for i in bpe.encode(piece).ids]
        return ids

    return encode


def reference(name):
    if name in CLASSES:
        backend = from_class(*CLASSES[name])
    elif name in RECIPES:
        backend = from_recipe(RECIPES[name])
    else:
        return by_llama_cpp(name)
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def test_every_name_has_a_reference():
    assert set(table.PRE_TOKENIZERS) == (set(CLASSES) | set(RECIPES) | set(LLAMA_CPP)) - {"default"}


@pytest.mark.filterwarnings("ignore:.*tokenizer.ggml.pre.* is 'default'")
@pytest.mark.parametrize("name", [*table.PRE_TOKENIZERS, "default"])
def test_pre_tokenizer(tmp_path, name):
    n = len(trained()[0])
    ours = Tokenizer.from_gguf(
        write_vocabulary(tmp_path / "m.gguf", name, bos_token_id=n + 1, eos_token_id=n)
    )
    theirs = reference(name)
    wrong = [
        (text, got, want)
        for text in all_texts()
        if (got := ours.encode(text, add_bos=False)) != (want := theirs(text))
    ]
    assert not wrong, f"{len(wrong)} of {COUNT} differ; {wrong[0][0]!r}: {wrong[0][1:]}"
    assert ours.add_bos == (name in BEGIN_WITH_BOS)


def test_the_texts_tell_rules_apart():
    """The comparison can fail: each pair of different rules differs somewhere on the texts."""
    some = all_texts()[:600]
    names = [
        "smaug-bpe",
        "llama-bpe",
        "deepseek-r1-qwen",
        "tekken",
        "gpt-4o",
        "smollm",
        "falcon",
        "jais",
        "deepseek-coder",
        "deepseek-v3",
        "bloom",
        "kimi-k2",
        "seed-coder",
    ]
    seen = {
        tuple(tuple(backend.encode(t, add_special_tokens=False).ids) for t in some)
        for backend in (from_recipe(RECIPES[name]) for name in names)
    }
    assert len(seen) == len(names)


def test_deepseek_letters():
    """DeepSeek LLM's list holds letters with case only, and all of them that Unicode 3.2 had in
    Latin, Greek, Cyrillic and Armenian.
    """
    import regex

    inside = regex.compile(f"[{table._CASED}]")
    found = {chr(c) for c in range(0x20000) if inside.fullmatch(chr(c))}
    assert {unicodedata.category(c) for c in found} <= {
        "Lu",
        "Ll",
        "Lt",
        "Lo",
        "Lm",
        "Cn",
        "So",
        "Mn",
        "Nl",
    }
    old = unicodedata.ucd_3_2_0
    scripts = ("LATIN", "GREEK", "CYRILLIC", "ARMENIAN")
    must = {
        chr(c)
        for c in range(0x250)
        if old.category(chr(c)) in ("Lu", "Ll", "Lt") and old.name(chr(c)).startswith(scripts)
    }
    assert must <= found
