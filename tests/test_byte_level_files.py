"""Folders with vocab.json and merges.txt instead of tokenizer.json, against transformers."""

from __future__ import annotations

import json
import shutil

import pytest

import vksteer as vs

TEXTS = [
    "Hello world",
    " two  spaces and\na line\r\n\r\nmore\t tabs ",
    "It's 12345 o'clock, I'LL go; don't.",
    "naïve café, cafe\u0301, Straße, 東京 и Москва, नमस्ते",
    "emoji 👩‍👩‍👧 \U0001f600 and <|endoftext|> inside, </s> too",
    "",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """vocab.json and merges.txt of a small byte-level BPE."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = ByteLevelBPETokenizer()
    text = "the cat and the dog, it's 123 and 2024; naïve café. Hello world! \n\n 東京 Москва"
    tokenizer.train_from_iterator(
        [text, *TEXTS] * 20, 400, special_tokens=["<|endoftext|>", "</s>", "<pad>"]
    )
    tokenizer.save_model(str(folder))
    return folder


def folder(trained, to, config, settings=None, special=None):
    shutil.copytree(trained, to)
    (to / "config.json").write_text(json.dumps(config))
    if settings is not None:
        (to / "tokenizer_config.json").write_text(json.dumps(settings))
    if special is not None:
        (to / "special_tokens_map.json").write_text(json.dumps(special))
    return to


CASES = {
    "gpt2": (dict(model_type="gpt2"), dict(tokenizer_class="GPT2Tokenizer"), None),
    "gpt2 by its model type": (dict(model_type="gpt2"), None, None),
    "gpt2, prefix space": (
        dict(model_type="gpt2"),
        dict(tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
        None,
    ),
    "opt": (
        dict(model_type="opt"),
        dict(
            tokenizer_class="GPT2Tokenizer",
            add_bos_token=True,
            bos_token="</s>",
            eos_token="</s>",
            unk_token="</s>",
            pad_token="<pad>",
            errors="replace",
        ),
        None,
    ),
    "opt, tokens in special_tokens_map.json": (
        dict(model_type="opt"),
        dict(tokenizer_class="GPT2Tokenizer", add_bos_token=True),
        dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>"),
    ),
    "qwen2": (dict(model_type="qwen2"), dict(tokenizer_class="Qwen2Tokenizer"), None),
}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_transformers(trained, tmp_path, case):
    from transformers import AutoTokenizer

    path = folder(trained, tmp_path / "model", *CASES[case])
    theirs = AutoTokenizer.from_pretrained(path)
    ours = vs.Tokenizer.from_folder(path)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        plain = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_bos=False) == plain, text
        assert ours.decode(plain) == theirs.decode(plain, clean_up_tokenization_spaces=False)
    assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("vocab.json", "{}", "vocabulary is empty"),
        ("vocab.json", '{"a": "b"}', "has the id"),
        ("vocab.json", "[1]", "vocab.json"),
        ("merges.txt", "a b c\n", "line 1 is 'a b c'"),
        ("merges.txt", "a \n", "not two tokens"),
        ("merges.txt", "zz qq\n", "cannot be read as a tokenizer"),
    ],
)
def test_damaged_files_are_refused(trained, tmp_path, file, content, message):
    path = folder(trained, tmp_path / "model", dict(model_type="gpt2"))
    (path / file).write_text(content)
    with pytest.raises(vs.ModelError, match=message):
        vs.Tokenizer.from_folder(path)


def test_an_unknown_class_has_no_tokenizer(trained, tmp_path):
    settings = dict(tokenizer_class="SomethingTokenizer")
    path = folder(trained, tmp_path / "model", dict(model_type="gpt2"), settings)
    assert vs.Tokenizer.from_folder(path) is None
