"""Tokenizers and chat templates against transformers and sentencepiece."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from model_writers import TINY, write_folder
from tokenizer_texts import (
    TEMPLATES,
    TEXTS,
    random_texts,
    reference,
    train,
)
from vksteer.errors import ModelError
from vksteer.loading import model_files as source
from vksteer.loading.tokenizer import Tokenizer, prompt_list

# ---- folders ----


def test_texts_equal_transformers(tmp_path):
    folder = train(tmp_path)
    ours, theirs = Tokenizer.from_folder(folder), reference(folder)
    assert len(ours) == len(theirs) and ours.add_bos
    for text in TEXTS + random_texts(200, 1) + ["<|im_end|> in a text <eos>", "a<bos>b"]:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] and ours.encode(text, add_bos=False) == ids[1:]
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(np.array(ids[1:], dtype=np.int32)) == ours.decode(ids[1:])


@pytest.mark.parametrize("style", TEMPLATES)
def test_templates_equal_transformers(tmp_path, style):
    template, end, takes_system = TEMPLATES[style]
    folder = train(tmp_path, template)
    ours, theirs = Tokenizer.from_folder(folder), reference(folder)
    for text in [*TEXTS[:6], "  spaces  around  ", "multi\nline\n", "{{ bos_token }} {% raw %}"]:
        for system in (None, "Be brief.") if takes_system else (None,):
            messages = ([] if system is None else [{"role": "system", "content": system}]) + [
                {"role": "user", "content": text}
            ]
            expected = theirs.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False, date_string="26 Jul 2024"
            )
            assert ours.chat_tokens(text, system=system) == [expected]
            longer = messages + [{"role": "assistant", "content": "Sure."}]
            assert ours.render(longer, add_generation_prompt=False) == theirs.apply_chat_template(
                longer, tokenize=False, date_string="26 Jul 2024"
            )
    assert [ours.token(i) for i in ours.end_of_turn] == [end]
    assert ours.eos_ids == tuple(dict.fromkeys([ours.id("<eos>"), ours.id(end)]))
    expected_suffix = {
        "llama3": "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "llama2": " [/INST]",
        "gemma": "<end_of_turn>\n<start_of_turn>model\n",
        "chatml": "<|im_end|>\n<|im_start|>assistant\n",
        "qwen3": "<|im_end|>\n<|im_start|>assistant\n",
    }
    if style in expected_suffix:
        assert ours.decode(ours.post_instruction_tokens) == expected_suffix[style]
        for text in ("anything", "Odd ending…"):
            assert (
                tuple(ours.chat_tokens(text)[0][-len(ours.post_instruction_tokens) :])
                == ours.post_instruction_tokens
            )


def test_template_reasons_reach_the_user(tmp_path):
    ours = Tokenizer.from_folder(train(tmp_path, TEMPLATES["gemma"][0]))
    with pytest.raises(ValueError, match="System role not supported"):
        ours.chat_tokens("Hi", system="Be brief.")
    for broken in (
        "{% if %}",
        "{{ messages[0]['content'].upper(1) }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{{ undefined_function() }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ):
        ours.chat_template = broken
        with pytest.raises(ValueError, match="chat template"):
            ours.chat_tokens("Hi")


def test_the_date_is_fixed(tmp_path):
    now = "{{ strftime_now('%Y-%m-%d %B') }}{{ messages[0].content }}"
    ours = Tokenizer.from_folder(train(tmp_path, now))
    assert ours.render([{"role": "user", "content": "x"}]) == "2024-07-26 Julyx"
    assert (
        ours.render([{"role": "user", "content": "x"}], date="1 Jan 2025") == "2025-01-01 Januaryx"
    )
    assert ours.chat_tokens("x") != ours.chat_tokens("x", date="1 Jan 2025")
    for wrong in ("tomorrow", "2024-07-26", "31 Feb 2024", 3):
        with pytest.raises(ValueError, match="26 Jul 2024"):
            ours.chat_tokens("x", date=wrong)


def test_bos_is_there_once(tmp_path):
    ours = Tokenizer.from_folder(train(tmp_path / "a", TEMPLATES["llama3"][0]))
    ids = ours.chat_tokens("Hello")[0]
    assert ids.count(ours.bos_id) == 1 and ids[0] == ours.bos_id
    assert (
        ours.encode("Hello")[0] == ours.bos_id
        and ours.encode("<bos>Hello", add_bos=False)[0] == ours.bos_id
    )
    with pytest.raises(ValueError, match="already begins with '<bos>'"):
        ours.encode("<bos>Hello")
    with pytest.raises(ValueError, match="prompt 1 begins with '<bos>' twice"):
        ours.chat_tokens([[5], [ours.bos_id, ours.bos_id, 5]])
    twice = Tokenizer.from_folder(
        train(tmp_path / "b", "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}")
    )
    with pytest.raises(ValueError, match="twice"):
        twice.chat_tokens("Hello")
    for settings, expected in (
        ({}, True),
        ({"add_bos_token": False}, False),
        ({"add_bos_token": True}, True),
    ):
        assert Tokenizer.from_folder(train(tmp_path / "c", **settings)).add_bos == expected
    assert Tokenizer.from_folder(train(tmp_path / "d", bos_from="nothing")).add_bos is False
    assert (
        Tokenizer.from_folder(train(tmp_path / "e", bos_from="nothing", add_bos_token=True)).encode(
            "x"
        )[0]
        == ours.bos_id
    )
    none = Tokenizer.from_folder(
        train(tmp_path / "f", bos_from="nothing", bos_token=None), bos_id=None
    )
    assert none.bos_id is None and none.encode("x") == none.encode("x", add_bos=False)
    with pytest.raises(ValueError, match="no beginning-of-sequence"):
        none.encode("x", add_bos=True)


def test_chat_tokens_takes_what_the_api_says(tmp_path):
    ours = Tokenizer.from_folder(train(tmp_path, TEMPLATES["chatml"][0]))
    one = ours.chat_tokens("Hello")[0]
    assert ours.chat_tokens(["Hello", [3, 4], np.array([5, 6])]) == [one, [3, 4], [5, 6]]
    assert ours.chat_tokens([3, 4]) == [[3, 4]] and ours.chat_tokens(
        np.array([[3, 4], [5, 6]])
    ) == [[3, 4], [5, 6]]
    answer = ours.encode("Sure, 12", add_bos=False)
    assert ours.chat_tokens(["Hello", "Hello"], response="Sure, 12") == [one + answer] * 2
    assert ours.chat_tokens(["Hello", [3]], response=["Sure, 12", [9]]) == [one + answer, [3, 9]]
    assert ours.chat_tokens("Hello", response=[9, 8]) == [one + [9, 8]]
    with pytest.raises(ValueError, match="2 responses for 3 prompts"):
        ours.chat_tokens(["a", "b", "c"], response=["x", "y"])


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (3, TypeError, "int"),
        (None, TypeError, "NoneType"),
        (b"x", TypeError, "bytes"),
        ({"a": 1}, TypeError, "dict"),
        ([], ValueError, "no prompts"),
        ([[]], ValueError, "prompt 0 is empty"),
        (["a", 3], TypeError, "prompt 1"),
        ([[1, 2.5]], TypeError, "2.5"),
        ([[1, -2]], ValueError, "-2"),
        ([[True]], TypeError, "True"),
        (np.zeros((2, 2)), TypeError, "float64"),
        (np.zeros((1, 1, 1), int), TypeError, "dimensions"),
        (["a", b"b"], TypeError, "prompt 1"),
    ],
)
def test_wrong_prompts(wrong, error, message):
    with pytest.raises(error, match=message):
        prompt_list(wrong)


def test_base_models_say_what_to_pass(tmp_path):
    ours = Tokenizer.from_folder(train(tmp_path))
    for call in (lambda: ours.chat_tokens("Hello"), lambda: ours.post_instruction_tokens):
        with pytest.raises(ValueError, match=r"no chat template.*pass token lists"):
            call()
    assert (
        ours.chat_tokens([[1, 2]]) == [[1, 2]]
        and ours.end_of_turn == ()
        and ours.eos_ids == (ours.id("<eos>"),)
    )


def test_where_templates_come_from(tmp_path):
    folder = train(
        tmp_path,
        [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}],
    )
    assert (
        Tokenizer.from_folder(folder).chat_template
        == "default"
        == reference(folder).get_chat_template()
    )
    (folder / "chat_template.jinja").write_text("from the file")
    assert (
        Tokenizer.from_folder(folder).chat_template
        == "from the file"
        == reference(folder).get_chat_template()
    )
    train(folder, [{"name": "rag", "template": "x"}])
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer.from_folder(folder).chat_template is None
    (folder / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert Tokenizer.from_folder(train(folder)).chat_template == "processor"
    train(folder, 3)
    with pytest.raises(ModelError, match="chat_template"):
        Tokenizer.from_folder(folder)


def test_ends_of_a_folder(tmp_path):
    train(tmp_path, TEMPLATES["gemma"][0])
    write_folder(tmp_path, {**TINY, "vocab_size": 440, "eos_token_id": 2})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    tokenizer = source.open_model(tmp_path).tokenizer()
    assert tokenizer.eos_ids == (7, 2, tokenizer.id("<eos>"), tokenizer.id("<end_of_turn>"))
    (tmp_path / "tokenizer.json").unlink()
    assert source.open_model(tmp_path).tokenizer() is None


@pytest.mark.parametrize("text", [b"", b"{", b'{"model": {"type": "BPE"}}', b"[]", b"\xff\xfe"])
def test_damaged_tokenizer_json(tmp_path, text):
    (tmp_path / "tokenizer.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"tokenizer.json"):
        Tokenizer.from_folder(tmp_path)


def test_added_tokens_that_only_the_config_lists(tmp_path):
    size = len(Tokenizer.from_folder(train(tmp_path)))
    train(tmp_path, added_tokens_decoder={str(size): {"content": "<late>", "special": True}})
    ours = Tokenizer.from_folder(tmp_path)
    assert (
        ours.id("<late>") == size
        and size in ours.special_ids
        and ours.encode("a<late>")[-1] == size
    )
    train(tmp_path, added_tokens_decoder={str(size + 3): {"content": "<late>", "special": True}})
    with pytest.raises(ModelError, match="<late>"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(KeyError, match="<never>"):
        ours.id("<never>")


def test_streaming_equals_decoding(tmp_path):
    ours = Tokenizer.from_folder(train(tmp_path))
    rng = random.Random(3)
    samples = [ours.encode(t) for t in TEXTS] + [
        [rng.randrange(len(ours)) for _ in range(rng.randint(1, 40))] for _ in range(300)
    ]
    for skip in (True, False):
        for ids in samples:
            stream = ours.stream(skip)
            pieces = [stream.push(i) for i in ids] + [stream.flush()]
            assert "".join(pieces) == ours.decode(ids, skip)
    stream = ours.stream()
    pieces = [stream.push(i) for i in ours.encode("日本")]
    assert not any("\ufffd" in p for p in pieces) and "".join(pieces) == "日本"


def test_tokenizer_and_config_are_public():
    import json

    import vksteer as vs

    folder = Path(vs.__file__).parent / "models" / "tiny-llama-chat"
    tokenizer = vs.Tokenizer.from_folder(folder)
    ids = tokenizer.encode("hello", add_bos=True)
    assert ids[0] == tokenizer.bos_id and ids[1:] == tokenizer.encode("hello", add_bos=False)
    assert tokenizer.decode(ids, skip_special=True) == "hello"
    assert len(tokenizer.chat_tokens("hello")) == 1
    config = vs.Config.from_hf(json.loads((folder / "config.json").read_text()))
    assert config == vs.Config.from_pretrained("tiny-llama-chat")
