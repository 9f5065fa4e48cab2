"""Tokenizers made from the vocabulary of a GGUF file, against sentencepiece and tokenizers."""

from __future__ import annotations

import json

import pytest

from model_writers import gguf_model, write_gguf
from tokenizer_texts import (
    CORPUS,
    SPECIAL,
    TEMPLATES,
    TEXTS,
    random_texts,
    train,
)
from vksteer.errors import ModelError
from vksteer.loading import model_files as source
from vksteer.loading.gguf_file import GGUFFile
from vksteer.loading.tokenizer import Tokenizer


def gguf_with(path, metadata):
    write_gguf(path, {"general.architecture": "llama", **metadata}, [])
    return GGUFFile(path)


def byte_level_metadata(folder, **extra):
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = {**spec["model"]["vocab"], **{t["content"]: t["id"] for t in spec["added_tokens"]}}
    tokens = sorted(vocab, key=vocab.get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": (
            9,
            b"\x05\0\0\0"
            + len(tokens).to_bytes(8, "little")
            + b"".join((3 if t in SPECIAL else 1).to_bytes(4, "little") for t in tokens),
        ),
        "tokenizer.ggml.bos_token_id": vocab["<bos>"],
        "tokenizer.ggml.eos_token_id": vocab["<eos>"],
        **extra,
    }


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "llama-bpe", "gpt-2"])
def test_gguf_byte_level(tmp_path, pre):
    """The same merges under each split rule, against `tokenizers` set up as the families'
    own tokenizer.json are.
    """
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    folder = train(tmp_path)
    ours = Tokenizer.from_gguf(
        gguf_with(
            tmp_path / "m.gguf",
            byte_level_metadata(
                folder,
                **{
                    "tokenizer.ggml.pre": pre,
                    "tokenizer.chat_template": TEMPLATES["llama3"][0],
                    "tokenizer.ggml.eot_token_id": 7,
                },
            ),
        )
    )
    backend = Backend.from_file(str(folder / "tokenizer.json"))  # as trained: Llama 3's split
    if pre == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    elif pre == "gpt-2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif pre == "qwen2":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    for text in TEXTS + random_texts(200, 2) + ["a<|im_end|>\nb"]:
        ids = ours.encode(text, add_bos=False)
        assert ids == backend.encode(text, add_special_tokens=False).ids, repr(text)
        assert ours.decode(ids, True) == backend.decode(ids, skip_special_tokens=True)
    assert ours.add_bos == (pre == "llama-bpe") and ours.special["bos_token"] == "<bos>"
    assert ours.eos_ids == (ours.id("<eos>"), 7, ours.id("<|eot_id|>"))
    assert ours.special_ids == {ours.id(t) for t in SPECIAL}


@pytest.mark.parametrize("prefix", [True, False])
def test_gguf_sentencepiece_equals_sentencepiece(tmp_path, prefix):
    """Llama 2's kind of vocabulary: merges by score, byte fallback, against
    sentencepiece itself.
    """
    import io

    import sentencepiece as spm

    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        character_coverage=0.98,
        split_digits=True,
        allow_whitespace_only_pieces=True,
    )
    theirs = spm.SentencePieceProcessor(model_proto=model.getvalue())
    count = len(theirs)
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in range(count)
    ]
    ours = Tokenizer.from_gguf(
        gguf_with(
            tmp_path / "m.gguf",
            {
                "tokenizer.ggml.model": "llama",
                "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in range(count)],
                "tokenizer.ggml.scores": [float(theirs.get_score(i)) for i in range(count)],
                "tokenizer.ggml.token_type": (
                    9,
                    b"\x05\0\0\0"
                    + count.to_bytes(8, "little")
                    + b"".join(k.to_bytes(4, "little") for k in kinds),
                ),
                "tokenizer.ggml.bos_token_id": theirs.bos_id(),
                "tokenizer.ggml.eos_token_id": theirs.eos_id(),
                "tokenizer.ggml.unknown_token_id": theirs.unk_id(),
                "tokenizer.ggml.add_space_prefix": prefix,
            },
        )
    )
    assert ours.encode("Hello")[0] == theirs.bos_id() == ours.bos_id
    for text in TEXTS + random_texts(200, 3):
        # sentencepiece's own escape, its end of text; and it gives nothing for nothing
        if "\u2581" in text or "\0" in text or not text:
            continue
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs.encode(text), repr(text)
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tokenizer.ggml.merges": ["a"]}, "merges"),
        ({"tokenizer.ggml.merges": ["zzz qqq"]}, "zzz"),
        ({"tokenizer.ggml.merges": 3}, "merges"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "token_type"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "'a' twice"),
        ({"tokenizer.ggml.tokens": 3}, "tokens"),
        ({"tokenizer.ggml.model": "llama"}, "scores"),
    ],
)
def test_damaged_gguf_vocabularies(tmp_path, change, message):
    md = {**byte_level_metadata(train(tmp_path), **{"tokenizer.ggml.pre": "qwen2"}), **change}
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_gguf(gguf_with(tmp_path / "m.gguf", md))


def test_gguf_vocabulary_and_embedding(tmp_path):
    md = byte_level_metadata(train(tmp_path), **{"tokenizer.ggml.pre": "qwen2"})
    gguf_model(tmp_path / "small.gguf", extra_metadata=md)  # 37 rows
    with pytest.raises(ModelError, match="do not fit an embedding of 37 rows"):
        source.open_model(tmp_path / "small.gguf").tokenizer()
    gguf_model(tmp_path / "none.gguf")
    assert source.open_model(tmp_path / "none.gguf").tokenizer() is None


def test_gguf_named_templates(tmp_path):
    chatml, qwen3 = TEMPLATES["chatml"][0], TEMPLATES["qwen3"][0]
    named = {"tokenizer.chat_template.tool_use": qwen3, "tokenizer.ggml.pre": "smollm"}
    folder = train(tmp_path / "t", qwen3)
    for first, expected in (({"tokenizer.chat_template": chatml}, chatml), ({}, None)):
        with gguf_with(tmp_path / "m.gguf", byte_level_metadata(folder, **named, **first)) as file:
            ours = Tokenizer.from_gguf(file)
            assert ours.chat_template == expected and "tool_use" in ours.named_templates
            options = {"chat_template": "tool_use", "enable_thinking": False}
            chosen = Tokenizer.from_gguf(file, template_options=options)
            theirs = Tokenizer.from_folder(folder, template_options={"enable_thinking": False})
            assert chosen.chat_tokens("Hello") == theirs.chat_tokens("Hello")


PHI3 = {  # the marked tokens of Phi 3's tokenizer.json, and whether they take spaces behind them
    "<unk>": False,
    "<s>": False,
    "</s>": True,
    "<|endoftext|>": False,
    "<|assistant|>": True,
    "<|end|>": True,
    "<|user|>": True,
}


@pytest.mark.parametrize("arch", ["phi3", "llama"])
def test_marked_tokens_of_phi3_take_the_spaces_behind_them(tmp_path, arch):
    from tokenizers import AddedToken

    letters = ["\u2581", "H", "i", "o", "<0x0A>", "\u2581H", "\u2581Hi"]
    tokens = [*PHI3, *letters]
    kinds = [2, 3, 4, 3, 3, 3, 3, 1, 1, 1, 1, 6, 1, 1]
    path = gguf_file(tmp_path, arch, tokens, kinds)
    with GGUFFile(path) as file:
        ours = Tokenizer.from_gguf(file)
    with GGUFFile(gguf_file(tmp_path, "llama", tokens, [1] * len(tokens))) as file:
        theirs = Tokenizer.from_gguf(file).backend
    for token, takes in PHI3.items():
        rstrip = takes and arch == "phi3"
        theirs.add_special_tokens([AddedToken(token, normalized=False, rstrip=rstrip)])
    for text in (
        "<|user|>\nHi<|end|>\n<|assistant|>\n",
        "<s><|user|> \n Hi<|end|>  \n",
        "Hi</s> \n<unk> Hi<|endoftext|>\nHi",
        "<|end|>",
    ):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_bos=False) == expected, text
    newline = tokens.index("<0x0A>")
    assert (newline in ours.encode("<|user|>\nHi", add_bos=False)) == (arch != "phi3")


def gguf_file(folder, arch, tokens, kinds):
    return write_gguf(
        folder / f"{arch}-{len(set(kinds))}.gguf",
        {
            "general.architecture": arch,
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.scores": [0.0] * 8 + [-float(i) for i in range(len(tokens) - 8)],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.unknown_token_id": 0,
        },
        [],
    )
