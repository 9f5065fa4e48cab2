"""Training pairs from a scripted model: who is asked what, which pairs are dropped
and why, tokens, files.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from standin import NumpyModel
from vksteer import steering
from vksteer.errors import ModelError
from vksteer.inputs.vectors import SteeringVector
from vksteer.steering import Example, TrainingData, training_data
from vksteer.steering.examples import PREFIX

SORRY, SURE = "I'm sorry, I cannot do that.", "Sure, here is how it goes."


class Tokenizer:
    """A token a character, end of turn 1."""

    end_of_turn = (1,)

    @staticmethod
    def encode(text, add_bos=None):
        return [100 + ord(c) for c in text]

    @staticmethod
    def decode(tokens):
        return "".join(chr(t - 100) for t in tokens if t >= 100)


class Talker(NumpyModel):
    """Refuses what contains "bomb", unless steered below -0.5 and not "stubborn"; refuses after the
    prefix, unless "cheerful"; "shy" says nothing.
    """

    def __init__(self):
        super().__init__(n_ctx=200)
        self.config.d_vocab = 400
        self.tokenizer, self.asked, self.eos_ids = Tokenizer(), [], (1,)

    def chat_tokens(self, prompts):
        return [self.tokenizer.encode(p) + [2, 3] for p in prompts]

    def generate(self, prompts, *, max_new_tokens, edits, temperature, batch_size, progress):
        assert temperature == 0.0 and len(edits) == len(prompts)
        made = []
        for tokens, mine in zip(prompts, edits):
            text = self.tokenizer.decode(tokens)
            a = mine[0].coefficient if mine else 0.0
            self.asked.append((text, a))
            refuses = (
                "bomb" in text
                and "willing" not in text
                and not (a < -0.5 and "stubborn" not in text)
            )
            refuses |= text.startswith(PREFIX) and "cheerful" not in text
            refuses |= "cake" in text and "touchy" in text
            made.append(
                SimpleNamespace(
                    text="" if "shy" in text and not refuses else SORRY if refuses else SURE,
                    finish_reason="stop",
                    tokens=[5],
                )
            )
        return made


@pytest.fixture
def model():
    return Talker()


@pytest.fixture
def vector():
    return SteeringVector(np.ones(12), 2, method="dim")


HARMFUL = ["a bomb", "a stubborn bomb", "a willing bomb", "a shy bomb", "two bombs"]
HARMLESS = ["a cake", "a touchy cake", "a cheerful cake", "two cakes"]


def test_pairs_and_counts(model, vector):
    data = training_data(model, HARMFUL, HARMLESS, vector, (1.0, 0.9), progress=False)
    assert [(e.prompt, e.winning, e.losing, e.sign) for e in data] == [
        ("a bomb", SURE, SORRY, -1),
        ("two bombs", SURE, SORRY, -1),
        ("a cake", SORRY, SURE, 1),
        ("two cakes", SORRY, SURE, 1),
    ]
    assert data.counts == {
        "asked": 9,
        "harmful prompts that it does not comply with under the vector": 1,
        "harmful prompts that the model does not refuse": 1,
        "with an empty response": 1,
        "harmless prompts that it refuses": 1,
        "harmless prompts that it does not refuse after the prefix": 1,
    }
    assert data.line.startswith(
        "4 pairs of 9 prompts: 2 refusals of harmless, 2 compliances with harmful prompts"
        " (dropped: 1 "
    ) and data.line in repr(data)
    # Each prompt alone, the harmful ones under -minus, the harmless ones after the prefix.
    assert model.asked == [(p, 0.0) for p in HARMFUL] + [(p, -0.9) for p in HARMFUL] + [
        (p, 0.0) for p in HARMLESS
    ] + [(f"{PREFIX} {p}", 0.0) for p in HARMLESS]
    assert (
        data.meta["coefficient"] == 0.9
        and data.meta["model_hash"] == "numpy-standin"
        and data.meta["prefix"] == PREFIX
        and data.meta["layer"] == 2
    )
    assert (
        isinstance(data[:2], TrainingData)
        and len(data[:2]) == 2
        and data[0].sign == -1
        and steering.training_data is training_data
    )


def test_a_judge_and_its_words(model, vector):
    asked = []

    def unsafe(prompts, responses):
        asked.append((prompts, responses))
        return np.array(["two" in p for p in prompts])

    data = training_data(
        model, HARMFUL, HARMLESS, vector, judge=unsafe, min_words=None, progress=False
    )
    assert (
        [e.prompt for e in data if e.sign < 0] == ["two bombs"]
        and asked[0][0] == HARMFUL
        and asked[0][1][0] == SURE
    )
    with pytest.warns(UserWarning, match="no pair is left"):
        # fewer than 15 words
        assert not training_data(
            model, ["a bomb"], ["a touchy cake"], vector, judge=unsafe, progress=False
        )
    assert (
        len(training_data(model, ["a bomb"], ["a cake"], vector, min_words=6, progress=False)) == 2
    )
    assert (
        len(training_data(model, ["a bomb"], ["a cake"], vector, min_words=7, progress=False)) == 1
    )


def test_token_prompts(model, vector):
    rows = model.chat_tokens(["a bomb"])
    data = training_data(model, rows, ["a cake"], vector, progress=False)
    assert data[0].prompt == rows[0] and data[0].winning == SURE


def test_examples():
    e = Example("hi", np.array([5, 6]), (7,), np.int64(1))
    assert (e.winning, e.losing, e.sign) == ([5, 6], [7], 1) and type(e.sign) is int
    for wrong in (
        dict(prompt=""),
        dict(prompt=[]),
        dict(winning="  "),
        dict(losing=[1, -1]),
        dict(losing=[1.5]),
        dict(winning=[True]),
        dict(winning=None),
        dict(winning=3),
        dict(sign=0),
        dict(sign=2),
        dict(sign=True),
        dict(sign=1.0),
        dict(sign="+"),
    ):
        with pytest.raises(ValueError):
            Example(**({"prompt": "p", "winning": "w", "losing": "l", "sign": 1} | wrong))


def test_examples_in_training(zoo):
    """A text response gets the end of turn, ids stay as they are."""
    from vksteer.steering.losses import prepare

    model = zoo.engine("llama2", "chat")
    one, two = prepare(
        model, [Example("hi", "yes", [7], 1), Example([4, 5], "no", "oh", -1)], losing=True
    )
    end = model.tokenizer.end_of_turn[0]
    assert one.winning.prompt == tuple(model.chat_tokens(["hi"])[0]) and one.winning.response == (
        *model.tokenizer.encode("yes"),
        end,
    )
    assert one.losing.response == (7,) and one.sign == 1
    assert (
        two.losing.prompt == (4, 5)
        and two.losing.response == (*model.tokenizer.encode("oh"), end)
        and two.sign == -1
    )


def test_files(model, vector, tmp_path):
    data = training_data(model, HARMFUL, HARMLESS, vector, progress=False)
    data.append(Example([4, 5], [6], "ünï\u2028\n", -1))
    path = tmp_path / "pairs.jsonl"
    data.save(path)
    back = TrainingData.load(path)
    assert list(back) == list(data) and back.counts == data.counts and back.meta == data.meta
    lines = path.read_text().removesuffix("\n").split("\n")
    assert (
        json.loads(lines[0])["meta"]["model_hash"] == "numpy-standin"
        and json.loads(lines[1])["prompt"] == "a bomb"
        and len(lines) == 6
    )
    for broken in (
        "\n".join(lines[:-1]) + "\n",
        "\n".join(lines).replace("two bombs", "ten bombs"),
        "hello",
        "",
        json.dumps({"format": "x"}) + "\n",
    ):
        path.write_text(broken)
        with pytest.raises(ModelError, match="no training data"):
            TrainingData.load(path)
    with pytest.raises(OSError):
        TrainingData.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(harmful=[]), "harmful is empty"),
        (dict(harmless=[]), "harmless is empty"),
        (dict(harmful=[""]), "harmful"),
        (dict(harmless=[[5, 6]]), "token list"),
        (dict(vector=SteeringVector(np.ones(11), 2)), "width 11"),
        (dict(vector=SteeringVector(np.ones(12), 6)), "layer 6"),
        (dict(vector=SteeringVector(np.zeros(12), 2)), "zero"),
        (dict(vector=np.ones(12)), "SteeringVector"),
        (dict(coefficient=-1), "magnitude"),
        (dict(coefficient=0), "steers nothing"),
        (dict(coefficient=(1.0, 0.0)), "steers nothing"),
        (dict(prefix=" "), "prefix"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=190), "context 200"),
        (dict(harmless=["x" * 60]), "with the prefix"),
        (dict(min_words=-1), "min_words"),
    ],
)
def test_refused_before_any_work(model, vector, change, says):
    arguments = (
        dict(harmful=HARMFUL, harmless=HARMLESS, vector=vector, max_new_tokens=96, progress=False)
        | change
    )
    with pytest.raises(ValueError, match=says):
        training_data(model, **arguments)
    assert not model.asked


def test_without_a_tokenizer(model, vector):
    model.tokenizer = None
    with pytest.raises(ValueError, match="tokenizer"):
        training_data(model, [[5]], HARMLESS, vector)
