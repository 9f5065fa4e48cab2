"""Texts, templates and small trained tokenizers that the tokenizer's tests share."""

from __future__ import annotations

import json
import random

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
