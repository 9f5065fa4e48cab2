"""Special and added tokens that are declared outside tokenizer.json, against transformers: token
ids, decoded texts, and which tokens are special.
"""

from __future__ import annotations

import json
import random
import warnings

import pytest

from tokenizer_texts import reference, train
from vksteer.errors import ModelError
from vksteer.loading.tokenizer import Tokenizer

NEW = [
    "<|start|>",
    "<|user_1|>",
    "[TOOL]",
    "<ponder>",
    "</ponder>",
    "two words",
    "ʻokina",
    "masked",
]
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def texts(tokens):
    yield "Hello there, how are you?"
    for token in tokens:
        yield f"Hello{token}there {token} you,{token}\n{token}{token} end  {token}"
        yield token


def assert_equal(folder, tokens):
    theirs, ours = reference(folder), Tokenizer.from_folder(folder)
    assert len(ours) == len(theirs)
    for text in texts(tokens):
        want = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, add_bos=False) == want, text
        assert ours.decode(want, True) == theirs.decode(want, skip_special_tokens=True)
        assert ours.decode(want) == theirs.decode(want)
    assert ours.special_ids == {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    for name in ("bos_token", "eos_token", "pad_token", "image_token"):
        assert ours.special.get(name) == getattr(theirs, name, None), name
    return ours


def with_vocabulary(folder, tokens):
    """The tokens as plain entries of the vocabulary in tokenizer.json, which declares none."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    size = max([*content["model"]["vocab"].values(), *(t["id"] for t in content["added_tokens"])])
    for i, token in enumerate(tokens):
        content["model"]["vocab"][token] = size + 1 + i
    path.write_text(json.dumps(content))
    return size + 1


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<|start|>"},
        {"additional_special_tokens": ["<|start|>", "<|user_1|>"]},
        {"extra_special_tokens": ["<|start|>", "[TOOL]"]},
        {"extra_special_tokens": {"image_token": "<|user_1|>"}},
        {"image_token": "<|user_1|>", "eos_token": "<|start|>"},
        {"additional_special_tokens": ["<|user_1|>"], "extra_special_tokens": ["[TOOL]"]},
        {"eos_token": {"__type": "AddedToken", "content": "<|start|>", "rstrip": True}},
        {"pad_token": None, "eos_token": "<|user_1|>"},
        {"split_special_tokens": True, "eos_token": "<|start|>"},
    ],
)
@pytest.mark.parametrize("present", [True, False], ids=["in-vocabulary", "new"])
def test_only_in_tokenizer_config(tmp_path, settings, present):
    folder = train(tmp_path, **settings)
    if present:
        with_vocabulary(folder, NEW)
    assert_equal(folder, NEW)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("value", [True, False])
def test_flags_of_added_tokens_decoder(tmp_path, flag, value):
    folder = train(tmp_path)
    size = len(Tokenizer.from_folder(folder))
    listed = {
        str(size + i): {"content": token, **dict.fromkeys(FLAGS, False), flag: value}
        for i, token in enumerate(NEW)
    }
    train(tmp_path, added_tokens_decoder=listed)
    assert_equal(folder, NEW)


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_that_contradict_tokenizer_json(tmp_path, flag):
    folder = train(tmp_path)
    entries = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    listed = {
        str(t["id"]): {**{k: t[k] for k in (*FLAGS, "content")}, flag: not t[flag]} for t in entries
    }
    train(tmp_path, added_tokens_decoder=listed)
    assert_equal(folder, [t["content"] for t in entries])


@pytest.mark.parametrize("config", [True, False], ids=["with-config", "without"])
def test_added_tokens_json(tmp_path, config):
    folder = train(tmp_path)
    size = len(Tokenizer.from_folder(folder))
    (folder / "added_tokens.json").write_text(
        json.dumps({token: size + i for i, token in enumerate(NEW)})
    )
    (folder / "special_tokens_map.json").write_text(
        json.dumps(
            {
                "eos_token": {"content": NEW[0], "lstrip": True, "rstrip": False},
                "additional_special_tokens": [NEW[1]],
                "pad_token": "<pad>",
            }
        )
    )
    if not config:
        (folder / "tokenizer_config.json").unlink()
    assert_equal(folder, NEW)


def test_special_tokens_map_is_ignored_beside_added_tokens_decoder(tmp_path):
    folder = train(tmp_path)
    size = len(Tokenizer.from_folder(folder))
    train(tmp_path, added_tokens_decoder={str(size): {"content": NEW[0], "special": True}})
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": NEW[1]}))
    (folder / "added_tokens.json").write_text(json.dumps({NEW[2]: size + 9}))
    assert_equal(folder, NEW)


def random_declarations(rng, folder, size):
    """Writes random declarations of NEW into the folder's files."""
    order = rng.sample(NEW, rng.randint(1, len(NEW)))
    flags = lambda: {name: rng.random() < 0.4 for name in rng.sample(FLAGS, rng.randint(0, 5))}
    settings = {}
    if rng.random() < 0.5:
        settings["added_tokens_decoder"] = {
            str(size + i): {"content": token, **flags()} for i, token in enumerate(order)
        }
    elif rng.random() < 0.7:
        listed = {token: size + i for i, token in enumerate(order)}
        (folder / "added_tokens.json").write_text(json.dumps(listed))
    if rng.random() < 0.6:
        settings[rng.choice(["additional_special_tokens", "extra_special_tokens"])] = rng.sample(
            order, rng.randint(0, len(order))
        )
    if rng.random() < 0.5:
        settings["eos_token"] = rng.choice(
            [order[0], {"__type": "AddedToken", "content": order[0], **flags()}]
        )
    if rng.random() < 0.5:
        named = {"content": order[-1], **{k: v for k, v in flags().items() if k != "special"}}
        content = {"pad_token": rng.choice([order[-1], named])}
        if rng.random() < 0.5:
            content["extra_special_tokens"] = rng.sample(order, rng.randint(0, len(order)))
        (folder / "special_tokens_map.json").write_text(json.dumps(content))
    train(folder, **settings)


def test_random_declarations(tmp_path):
    rng = random.Random(3)
    size = len(Tokenizer.from_folder(train(tmp_path / "plain")))
    for i in range(60):
        folder = tmp_path / str(i)
        train(folder)
        random_declarations(rng, folder, size)
        assert_equal(folder, NEW)


@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("value", [True, False])
def test_a_contradiction_about_bos_is_said_once(tmp_path, processor, value):
    folder = train(tmp_path, bos_from="processor" if processor else "nothing", add_bos_token=value)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = Tokenizer.from_folder(folder)
        Tokenizer.from_folder(folder)
    said = [w for w in caught if "add_bos_token" in str(w.message)]
    assert len(said) == (processor != value) and ours.add_bos == value
    theirs = reference(folder)("Hello")["input_ids"]
    assert (ours.encode("Hello") == theirs) == (not said)
    assert ours.encode("Hello", add_bos=processor) == theirs


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("added_tokens.json", {"<late>": 3}, "listed as 3"),
        ("added_tokens.json", {"<late>": "3"}, "id '3'"),
        ("special_tokens_map.json", {"eos_token": {"lstrip": True}}, "'content'"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x'"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"500": 3}}, "'content'"),
        ("tokenizer_config.json", {"extra_special_tokens": "<a>"}, "extra_special_tokens"),
    ],
)
def test_damaged_files(tmp_path, name, content, message):
    folder = train(tmp_path)
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(folder)
