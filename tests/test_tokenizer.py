"""Tokenizers and chat templates against transformers and sentencepiece."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from model_writers import TINY, gguf_model, write_folder, write_gguf
from vksteer.errors import ModelError
from vksteer.loading import model_files as source
from vksteer.loading.tokenizer import Tokenizer, prompt_list

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Tell me about rivers and bridges, please.",
    "naïve café, 日本語のテキスト 12345 and 67",
    "def f(x):\n    return x ** 2\n\n",
    "I can't, we'll, they're; IT'S 3.14!",
    "You are a helpful assistant. user system model",
] * 4
TEXTS = [
    "Hello world",
    "  leading",
    "trailing  ",
    "a\n\n\nb\t\tc",
    "naïve café — “quotes” … ß",
    "日本語テキスト 한국어 العربية",
    "👩‍👩‍👧 🎉🎉",
    "x=1;y=22;z=3333",
    "don't can't WE'LL I'm",
    "a    b     c      d",
    "",
    " ",
    "\n",
    "1234567890 12 345",
    "def f(x):\n    return x**2\n",
    "𝔘𝔫𝔦 \u0000\ufffd",
]
SPECIAL = [
    "<pad>",
    "<bos>",
    "<eos>",
    "<|im_start|>",
    "<|im_end|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "<think>",
    "</think>",
]


def random_texts(count, seed):
    rng = random.Random(seed)
    alphabet = "abc XYZ 012 \n\t .,!?'\"éß日本👍\ufffd\u2581_-<>|"
    return ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 60))) for _ in range(count)]


TEMPLATES = {
    "llama3": (
        (
            "{{- bos_token }}\n{%- if not date_string is defined %}\n    {%- if strftime_now is"
            ' defined %}\n        {%- set date_string = strftime_now("%d %b %Y") %}\n    {%- else'
            ' %}\n        {%- set date_string = "26 Jul 2024" %}\n    {%- endif %}\n{%- endif'
            " %}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system_message ="
            " messages[0]['content']|trim %}\n    {%- set messages = messages[1:] %}\n{%- else %}\n"
            '    {%- set system_message = "" %}\n{%- endif %}\n{{-'
            ' "<|start_header_id|>system<|end_header_id|>\\n\\n" }}\n{%- if tools is not none'
            ' %}\n    {{- "Environment: ipython\\n" }}\n{%- endif %}\n{{- "Today Date: " +'
            ' date_string + "\\n\\n" }}\n{{- system_message }}\n{{- "<|eot_id|>" }}\n{%- for'
            " message in messages %}\n    {{- '<|start_header_id|>' + message['role'] +"
            " '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}\n{%- endfor"
            " %}\n{%- if add_generation_prompt %}\n    {{-"
            " '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n"
        ),
        "<|eot_id|>",
        True,
    ),
    "llama2": (
        (
            "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set"
            " system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages"
            " %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if"
            " (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{"
            " raise_exception('Conversation roles must alternate') }}{% endif %}{% if loop.index0"
            " == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message +"
            " '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content ="
            " message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token +"
            " '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant'"
            " %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
        ),
        "<eos>",
        True,
    ),
    "gemma": (
        (
            "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role"
            " not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] =="
            " 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{%"
            " endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim +"
            " '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt"
            " %}{{'<start_of_turn>model\n'}}{% endif %}"
        ),
        "<end_of_turn>",
        False,
    ),
    "chatml": (
        (
            "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{"
            " '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif"
            " %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' +"
            " '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%"
            " endif %}"
        ),
        "<|im_end|>",
        True,
    ),
    "qwen3": (
        (
            "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\\n' +"
            " messages[0].content + '<|im_end|>\\n' }}\n{%- endif %}\n{%- set ns ="
            " namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n{%- for"
            " message in messages[::-1] %}\n    {%- set index = (messages|length - 1) - loop.index0"
            ' %}\n    {%- if ns.multi_step_tool and message.role == "user" %}\n        {%- set'
            " ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n   "
            " {%- endif %}\n{%- endfor %}\n{%- for message in messages %}\n    {%- if"
            " message.content is string %}\n        {%- set content = message.content %}\n    {%-"
            " else %}\n        {%- set content = '' %}\n    {%- endif %}\n    {%- if (message.role"
            ' == "user") or (message.role == "system" and not loop.first) %}\n        {{-'
            " '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n    {%-"
            " elif message.role == \"assistant\" %}\n        {{- '<|im_start|>' + message.role +"
            " '\\n' }}\n        {% generation %}{{- content + '<|im_end|>' }}{% endgeneration %}\n "
            "       {{- '\\n' }}\n    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt"
            " %}\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and"
            " enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%-"
            " endif %}\n{%- endif %}"
        ),
        "<|im_end|>",
        True,
    ),
    "oddities": (
        (
            "{%- for m in messages %}\n  {%- if m.role == 'nobody' %}{% continue %}{% endif %}\n{{"
            " m | tojson }}\n{{ dict(a=1) | tojson(indent=2) }}{{ '<b>&' | tojson }}\n   {% if true"
            " %}  kept {% endif %}\n  {{ 'é' | tojson }}<|im_end|>\n{%- endfor %}{% if"
            " add_generation_prompt %}<|im_start|>{% endif %}"
        ),
        "<|im_end|>",
        True,
    ),
}


def train(folder, template=None, *, bos_from="processor", **settings):
    """A byte-level BPE folder as transformers would save it."""
    from tokenizers import (
        AddedToken,
        Regex,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from tokenizers import (
        Tokenizer as Backend,
    )

    backend = Backend(models.BPE())
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    if bos_from == "processor":
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A",
            pair="<bos> $A <bos>:1 $B:1",
            special_tokens=[("<bos>", backend.token_to_id("<bos>"))],
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": {"content": "<eos>", "__type": "AddedToken"},
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        **settings,
    }
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def reference(folder):
    import transformers

    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


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
        with pytest.raises(ValueError, match="no chat template.*pass token lists"):
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
    with pytest.raises(ModelError, match="tokenizer.json"):
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


# ---- GGUF vocabularies ----


def gguf_with(path, metadata):
    write_gguf(path, {"general.architecture": "llama", **metadata}, [])
    from vksteer.loading.gguf_file import GGUFFile

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
        ({"tokenizer.ggml.model": "bert"}, "bert"),
        ({"tokenizer.ggml.pre": "jais"}, "pre-tokenizer 'jais'"),
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


# ---- the three real models ----

MODELS = Path(__file__).resolve().parent.parent / ".models"
REAL = {
    "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    "gemma3": "gemma-3-270m.Q4_K_M.gguf",
}


def real(name):
    path = MODELS / REAL[name]
    assert path.exists(), (
        f"{path} is not there: run .venv/bin/python tools/fetch_model.py {name} (make test fetches"
        " smollm2, make test-all all of them)"
    )
    return path


def test_smollm2_by_heart():
    """Its system message and five post-instruction tokens, without transformers."""
    files = source.open_model(real("smollm2"))
    ours = files.tokenizer()
    assert ours.decode(ours.post_instruction_tokens) == "<|im_end|>\n<|im_start|>assistant\n"
    assert (
        ours.decode(ours.chat_tokens("Hi")[0])
        == "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging"
        " Face<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ours.eos_ids == (2,) and not ours.add_bos
    # digits stand alone
    assert ours.encode("Hello world 12  34") == [19556, 905, 216, 33, 34, 256, 35, 36]


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_equal_transformers(name):
    import transformers
    from tokenizers import pre_tokenizers

    path = real(name)
    ours = source.open_model(path).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if name == "smollm2":
        # transformers 5 has no entry for the pre-tokenizer "smollm" and splits like GPT-2; the
        # model was trained with single digits, which differs where several spaces or newlines
        # stand before a digit.
        theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    for text in (
        TEXTS
        + random_texts(2000, 4)
        + ["<|im_end|> inside <eos> <bos>text", "<table><tr>\n\n\n\n</tr>"]
    ):
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode("Hi") == theirs("Hi")["input_ids"]
    if ours.chat_template is None:
        return
    for system in (None, "Be brief."):
        for text in ("What  is 2+2?", "multi\nline\n", " x "):
            messages = ([] if system is None else [{"role": "system", "content": system}]) + [
                {"role": "user", "content": text}
            ]
            assert ours.chat_tokens(text, system=system)[0] == theirs.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=False
            )


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["smollm2", "qwen", "gemma3"])
def test_real_weights_equal_transformers(name):
    """Every tensor of the real files, in float32, as transformers dequantises it; and the facts as
    its config has them.
    """
    import torch
    import transformers

    from vksteer.loading.config import Config
    from vksteer.loading.tensor_names import hf_name

    path = real(name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    files = source.open_model(path, dtype="float32")
    state = theirs.state_dict()
    gemma = files.config.model_type.startswith("gemma")
    for t in files.tensors:
        expected = state[hf_name(t.name, files.config, "model.", "lm_head.weight")].numpy()
        got = t.array()
        if gemma and got.ndim == 1:
            got = got - np.float32(1)  # transformers stores w, the file 1 + w
        np.testing.assert_array_equal(got, expected, err_msg=t.name)
    hf = Config.from_hf(
        {
            **theirs.config.to_dict(),
            "architectures": [files.config.architecture],
            "eos_token_id": None,
            "bos_token_id": None,
            "quantization_config": None,
        }
    )
    assert (
        files.config.replace(
            norm_offset=hf.norm_offset, eos_ids=(), bos_id=None, norm_eps=hf.norm_eps
        )
        == hf
    )
    assert files.config.norm_eps == pytest.approx(hf.norm_eps, rel=1e-6)
