"""Chat templates as people have them, against transformers: switches, several templates, templates
over content parts, and templates that leave the instruction out.
"""

from __future__ import annotations

import json
import warnings

import pytest

import vksteer as vs
from model_writers import TINY, write_folder
from tokenizer_texts import TEMPLATES, reference, train
from vksteer.base.provenance import provenance
from vksteer.errors import ModelError
from vksteer.loading.tokenizer import Tokenizer

CHATML, QWEN3 = TEMPLATES["chatml"][0], TEMPLATES["qwen3"][0]
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{% if part.type =="
    " 'text' %}{{ part.text }}{% elif part.type == 'image' %}<image>{% endif %}{% endfor %}<|im_end"
    "|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_PART = "{% for m in messages %}<|im_start|>{{ m.content[0]['text'] }}<|im_end|>{% endfor %}"
EITHER = (
    "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text }}{% endif %}<|im_end|>{% endfor %}"
)
SWITCH = (
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}{% if mode is defined"
    " %}{{ mode }}{% endif %}"
)


def theirs(folder, messages, parts=False, **variables):
    if parts:
        messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    return reference(folder).apply_chat_template(
        messages,
        add_generation_prompt=True,
        return_dict=False,
        date_string="26 Jul 2024",
        **variables,
    )


def user(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_switches(tmp_path, options):
    folder = train(tmp_path, QWEN3)
    ours = Tokenizer.from_folder(folder, template_options=options)
    want = theirs(folder, user("Hello"), **options)
    assert ours.chat_tokens("Hello") == [want]
    assert ours.post_instruction_tokens == tuple(want[-len(ours.post_instruction_tokens) :])
    assert len(ours.post_instruction_tokens) > 3
    other = Tokenizer.from_folder(folder)
    assert (ours.fingerprint == other.fingerprint) == (not options)
    # a call's own variable takes precedence
    assert ours.chat_tokens("Hello", enable_thinking=False) == [
        theirs(folder, user("Hello"), enable_thinking=False)
    ]


def test_options_reach_every_rendering_of_a_model(tmp_path):
    folder = train(tmp_path / "m", QWEN3)
    write_folder(folder, {**TINY, "vocab_size": 512})
    options = {"enable_thinking": False}
    with vs.Model.from_pretrained(folder, template_options=options, progress=False) as model:
        want = theirs(folder, user("Hello"), **options)
        assert model.template_options == options
        assert model.chat_tokens("Hello") == [want]
        assert model.run("Hello").tokens[0].tolist() == want
        made = model.generate("Hello", max_new_tokens=1, progress=False)[0]
        assert made.prompt_tokens.tolist() == want
        of = vs.LogitDiff(-1, 3, 4)
        got = model.gradients("Hello", of=of, at="hook_embed", progress=False)
        assert got.tokens[0].tolist() == want
        found = provenance(model)
        assert found["template_options"] == options
        assert found["tokenizer_hash"] == model.tokenizer.fingerprint
        harmful, harmless = ["Hello", "a river"], ["you", "user please"]
        means = vs.steering.difference_in_means(model, harmful, harmless, progress=False)
        assert means.meta["template_options"] == options
        length = model.post_instruction_length
    with vs.Model.from_pretrained(folder, progress=False) as model:
        assert model.template_options == {} and "template_options" not in provenance(model)
        assert model.chat_tokens("Hello") == [theirs(folder, user("Hello"))] != [want]
        assert model.post_instruction_length < length


def test_options_are_checked(tmp_path):
    folder = train(tmp_path, SWITCH)
    for wrong in ([1], "a", {1: 2}):
        with pytest.raises(TypeError, match="template_options"):
            Tokenizer.from_folder(folder, template_options=wrong)
    for wrong in ({"messages": []}, {"add_generation_prompt": False}, {"a": {1, 2}}):
        with pytest.raises(ValueError, match="template_options"):
            Tokenizer.from_folder(folder, template_options=wrong)
    with pytest.warns(UserWarning, match=r"does not read 'modus'.*it reads 'messages', 'mode'"):
        Tokenizer.from_folder(folder, template_options={"modus": "x"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.from_folder(folder, template_options={"mode": "x"})
    plain = train(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no effect.*no chat template"):
        Tokenizer.from_folder(plain, template_options={"mode": "x"})


# ---- several templates ----


@pytest.mark.parametrize("style", ["list", "object"])
def test_several_templates(tmp_path, style):
    def write(names):
        pairs = {
            name: {"default": CHATML, "rag": SWITCH, "tool_use": QWEN3}[name] for name in names
        }
        entries = [{"name": n, "template": t} for n, t in pairs.items()]
        return train(tmp_path / "-".join(names), entries if style == "list" else pairs)

    folder = write(["rag", "default"])
    ours = Tokenizer.from_folder(folder)
    assert ours.chat_template == CHATML
    if style == "list":
        assert ours.chat_tokens("Hello") == [theirs(folder, user("Hello"))]
    folder = write(["rag", "tool_use"])
    ours = Tokenizer.from_folder(folder)  # token lists and plain text work
    assert ours.encode("Hello") and ours.end_of_turn == ()
    with pytest.raises(ValueError, match=r"'rag', 'tool_use'.*template_options"):
        ours.chat_tokens("Hello")
    chosen = Tokenizer.from_folder(folder, template_options={"chat_template": "tool_use"})
    assert chosen.chat_template == QWEN3
    if style == "list":
        want = theirs(folder, user("Hello"), chat_template="tool_use")
        assert chosen.chat_tokens("Hello") == [want]
    with pytest.raises(ValueError, match=r"no chat template 'raga'; there are 'rag'"):
        Tokenizer.from_folder(folder, template_options={"chat_template": "raga"})


def test_additional_templates(tmp_path):
    folder = train(tmp_path, SWITCH)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(QWEN3)
    ours = Tokenizer.from_folder(folder, template_options={"chat_template": "tool_use"})
    assert ours.chat_tokens("Hello") == [theirs(folder, user("Hello"), chat_template=QWEN3)]
    with pytest.raises(ValueError, match=r"'tool_use'.*template_options"):
        Tokenizer.from_folder(folder).chat_tokens("Hello")
    (folder / "chat_template.jinja").write_text(CHATML)
    assert Tokenizer.from_folder(folder).chat_tokens("Hello") == [theirs(folder, user("Hello"))]


@pytest.mark.parametrize("value", [3, ["x"], [{"name": "default"}], {"default": 3}, [{"a": "b"}]])
def test_damaged_templates(tmp_path, value):
    folder = train(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": value}))
    with pytest.raises(ModelError, match="chat_template"):
        Tokenizer.from_folder(folder)


# ---- content parts, and instructions that are left out ----


@pytest.mark.parametrize("template, parts", [(PARTS, True), (FIRST_PART, True), (EITHER, False)])
def test_content_parts(tmp_path, template, parts):
    folder = train(tmp_path, template)
    ours = Tokenizer.from_folder(folder)
    for text in ("Hello there", "  spaces\nand lines ", "{'type': 'text'}", "😀"):
        assert ours.chat_tokens(text) == [theirs(folder, user(text), parts)]
    messages = [{"role": "system", "content": "Be brief."}, *user("Hello")]
    assert ours.chat_tokens("Hello", system="Be brief.") == [theirs(folder, messages, parts)]
    assert [ours.token(i) for i in ours.end_of_turn] == ["<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "<|im_start|>user<|im_end|>",
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.text }}<|im_end|>{% endfor %}",
        "{% for m in messages %}{{ m.content[:3] if m.content is string }}<|im_end|>{% endfor %}",
    ],
)
def test_an_instruction_that_is_left_out_is_refused(tmp_path, template):
    ours = Tokenizer.from_folder(train(tmp_path, template))
    with pytest.raises(ValueError, match=r"leaves the instruction out.*'Hello there'.*token lists"):
        ours.chat_tokens("Hello there")
    assert ours.chat_tokens([[5, 6]]) == [[5, 6]]


def test_a_system_message_that_is_left_out_is_refused(tmp_path):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}"
    )
    ours = Tokenizer.from_folder(train(tmp_path, template))
    assert ours.chat_tokens("Hello") == [theirs(tmp_path, user("Hello"))]
    with pytest.raises(ValueError, match="leaves the system message out"):
        ours.chat_tokens("Hello", system="Be brief.")


@pytest.mark.parametrize(
    "form", ["m.content | trim", "m.content | tojson", "m.content | upper", "m.content | e"]
)
def test_templates_that_quote_or_trim_are_accepted(tmp_path, form):
    template = "{% for m in messages %}<|im_start|>{{ " + form + " }}<|im_end|>{% endfor %}"
    folder = train(tmp_path, template)
    ours = Tokenizer.from_folder(folder)
    for text in ('  Say "Hello" & <b>é</b>\n', "Is it raining?"):
        assert ours.chat_tokens(text) == [theirs(folder, user(text))]


# ---- lone surrogates ----


@pytest.mark.parametrize("text", ["\ud83d", "Hello \udcff there", "😀\ude00"])
def test_lone_surrogates_are_refused(tmp_path, text):
    ours = Tokenizer.from_folder(train(tmp_path, CHATML))
    calls = (
        lambda: ours.encode(text),
        lambda: ours.chat_tokens(text),
        lambda: ours.chat_tokens("Hello", system=text),
        lambda: ours.chat_tokens("Hello", response=text),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"lone surrogate \(U\+[DF0-9A-F]{4}\) at character"):
            call()
