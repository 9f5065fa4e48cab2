"""Samples of multi-token patching: what a sample is, which prompts are kept and why, files; on a
model that answers by a rule.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from standin import NumpyModel
from vksteer.errors import ModelError
from vksteer.inputs.samples import (
    EMPTY,
    SAME,
    Sample,
    Samples,
    check_samples,
    make_samples,
    samples_hash,
)
from vksteer.inputs.vectors import SteeringVector

END = 4


class Answers(NumpyModel):
    """Refuses where the effect is above 0.5, complies below -0.5; else "bomb" decides. "mute" gets
    nothing but the end token when steered.
    """

    eos_ids = (END,)

    def __init__(self):
        super().__init__(n_ctx=128)
        self.calls = []
        self.tokenizer = SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))

    def generate(self, prompts, *, max_new_tokens, edits, temperature, batch_size, progress):
        self.calls.append(
            SimpleNamespace(
                rows=[list(p) for p in prompts],
                push=[sum(e.coefficient for e in mine) for mine in edits],
                new=max_new_tokens,
            )
        )
        assert (
            temperature == 0.0
            and len(edits) == len(prompts)
            and all(isinstance(e, list) for e in edits)
        )
        bomb, mute = (self.chat_tokens([w])[0][1:-2] for w in ("bomb", "mute"))
        has = lambda row, word: any(row[i : i + len(word)] == word for i in range(len(row)))
        made = []
        for row, push in zip(self.calls[-1].rows, self.calls[-1].push):
            refuses = push > 0.5 or (push >= -0.5 and has(row, bomb))
            text, tokens = (
                ("I cannot do so.", [7, 8, END])
                if refuses
                else ("Sure, here is how.", [9, 10, 11, END])
            )
            if push and has(row, mute):
                text, tokens = "", [END]
            finished = len(tokens) <= max_new_tokens
            made.append(
                SimpleNamespace(
                    text=text,
                    tokens=np.array(tokens[:max_new_tokens], np.int32),
                    finish_reason="stop" if finished else "length",
                )
            )
        return made


PROMPTS = ["bomb a", "bomb mute", "cake", "bomb c"]


@pytest.fixture
def model():
    return Answers()


@pytest.fixture
def vector(rng):
    return SteeringVector(rng.standard_normal(12), 2)


# -- a sample --------------------------------------------------------------------------------------


def test_sample_is_frozen_and_plain():
    s = Sample(np.array([1, 2], np.int32), [np.int64(3)])
    assert (
        s.prompt_tokens == (1, 2)
        and s.response_tokens == (3,)
        and s.tokens == (1, 2, 3)
        and len(s) == 3
        and type(s.tokens[0]) is int
    )
    assert (
        s == Sample((1, 2), (3,)) and hash(s) == hash(Sample([1, 2], [3])) and "2 prompt" in repr(s)
    )
    with pytest.raises(AttributeError):
        s.prompt_tokens = ()


@pytest.mark.parametrize(
    "prompt, response, says",
    [
        ([1], [], "response_tokens is empty"),
        ([], [1], "prompt_tokens is empty"),
        ([1], [1.0], r"response_tokens\[0\] is 1.0"),
        ([True], [1], "True"),
        ([1], [-1], "-1"),
        ("text", [1], "text"),
        ([1], 3, "3"),
        ([[1]], [1], r"\[1\]"),
    ],
)
def test_bad_samples_are_refused(prompt, response, says):
    with pytest.raises(ValueError, match=says):
        Sample(prompt, response)


def test_check_samples(model):
    one = Sample([1, 2], [3])
    assert check_samples(model, one) == [one] and check_samples(model.config, (one, one)) == [
        one,
        one,
    ]
    for bad, says in (
        ([], "empty"),
        ([one, [1]], r"samples\[1\]"),
        ([Sample([1], [40])], r"samples\[0\], position 1: token 40.*40"),
        ([Sample([1] * 125, [2] * 5)], "125 prompt and 5 response.*128"),
    ):
        with pytest.raises(ValueError, match=says):
            check_samples(model, bad)
    assert (
        samples_hash([one])
        == samples_hash([Sample((1, 2), (3,))])
        != samples_hash([Sample([1], [2, 3])])
    )


# -- making them -----------------------------------------------------------------------------------


def test_flipped_ones_are_kept(model, vector):
    made = make_samples(model, PROMPTS, vector, -1.0, max_new_tokens=8, progress=False)
    # "bomb mute" ends at once, "cake" is answered either way.
    assert (
        isinstance(made, list)
        and made.index == [0, 3]
        and made.dropped == {EMPTY: 1, SAME: 1}
        and made.asked == 4
    )
    # the steered response with its end token
    assert made[0] == Sample(model.chat_tokens(["bomb a"])[0], [9, 10, 11, END])
    assert made.texts == {"base": ["I cannot do so."] * 2, "steered": ["Sure, here is how."] * 2}
    assert (
        made.line == f"2 samples of 4 prompts (dropped: 1 {EMPTY}, 1 {SAME})"
        and made.line in repr(made)
    )
    assert (
        len(model.calls) == 1
        and model.calls[0].push == [0] * 4 + [-1.0] * 4
        and model.calls[0].rows[:4] == model.calls[0].rows[4:]
    )
    assert (
        made.setting["responses"] == "steered"
        and made.setting["judge"] == "substring"
        and made.setting["model_hash"] == "numpy-standin"
    )


def test_base_responses(model, vector):
    made = make_samples(model, PROMPTS, vector, -1.0, responses="base", progress=False)
    # "bomb mute" has a base response, and an empty steered one: the judge's verdict flips.
    assert (
        made.index == [0, 1, 3]
        and made[0].response_tokens == (7, 8, END)
        and made.dropped == {SAME: 1}
    )


def test_all_are_kept_without_a_judge(model, vector):
    never = lambda *a: pytest.fail("the judge was asked")
    made = make_samples(model, PROMPTS, vector, -1.0, keep="all", judge=never, progress=False)
    assert (
        made.index == [0, 2, 3] and made.dropped == {EMPTY: 1} and model.calls[0].push == [-1.0] * 4
    )
    made = make_samples(
        model, [[5, 6], [7, 8, 9]], vector, 1.0, keep="all", responses="base", progress=False
    )
    assert (
        [s.prompt_tokens for s in made] == [(5, 6), (7, 8, 9)]
        and model.calls[1].push == [0, 0]
        and not made.dropped
        and "dropped" not in made.line
    )
    del model.tokenizer.decode
    model.tokenizer = None
    assert len(make_samples(model, [[5, 6]], vector, 1.0, keep="all", progress=False)) == 1
    with pytest.raises(ValueError, match="keep='all'"):
        make_samples(model, [[5, 6]], vector, 1.0, progress=False)


def test_a_judge_decides(model, vector):
    asked = []

    def judge(prompts, responses):
        asked.append((prompts, responses))
        return ["Sure" in r for r in responses]

    made = make_samples(
        model, [*PROMPTS, [5, 6]], vector, -1.0, judge=judge, min_words=None, progress=False
    )
    assert (
        made.index == [0, 3]
        and asked[0][0] == [*PROMPTS, "5 6"]
        and len(asked) == 2
        and made.setting["judge"] == "function"
    )
    # four words are no success under the 15-word rule
    with pytest.warns(UserWarning, match="no sample is left"):
        made = make_samples(model, PROMPTS, vector, -1.0, judge=judge, progress=False)
    assert made == [] and made.dropped == {EMPTY: 1, SAME: 3}


def test_cut_off_responses_have_no_end_token(model, vector):
    made = make_samples(model, ["bomb"], vector, -1.0, max_new_tokens=2, progress=False)
    assert made[0].response_tokens == (9, 10)


def test_says_how_many_were_dropped(model, vector, capsys):
    make_samples(model, PROMPTS, vector, -1.0, progress=True)
    assert "2 samples of 4 prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(prompts=[]), "prompts is empty"),
        (dict(prompts=["x" * 140]), "prompts.0. has 143 tokens"),
        (dict(max_new_tokens=125), "context"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(responses="mine"), "mine"),
        (dict(keep="some"), "some"),
        (dict(coefficient=np.nan), "nan"),
        (dict(coefficient="1"), "'1'"),
        (dict(coefficient=True), "True"),
        (dict(vector=SteeringVector(np.zeros(12), 2)), "zero"),
        (dict(vector=SteeringVector(np.ones(11), 2)), "width"),
        (dict(vector=SteeringVector(np.ones(12), 5)), "layer 5"),
        (dict(min_words=-1), "min_words"),
    ],
)
def test_refuses_before_any_work(model, vector, change, says):
    with pytest.raises(ValueError, match=says):
        make_samples(
            **{
                **dict(
                    model=model, prompts=PROMPTS, vector=vector, coefficient=-1.0, progress=False
                ),
                **change,
            }
        )
    assert not model.calls


# -- files -----------------------------------------------------------------------------------------


def test_round_trip(model, vector, tmp_path):
    made = make_samples(model, PROMPTS, vector, -1.0, progress=False)
    made.save(tmp_path / "s.json")
    again = Samples.load(tmp_path / "s.json")
    assert (
        again == made
        and again.line == made.line
        and again.texts == made.texts
        and again.index == made.index
        and again.setting == made.setting
    )
    whole = (tmp_path / "s.json").read_text()
    content = json.loads(whole)
    for damaged in (
        whole[:-20],
        whole[:40],
        json.dumps({**content, "samples": content["samples"][:1]}),
        json.dumps({**content, "format": "x"}),
        "[]",
    ):
        (tmp_path / "s.json").write_text(damaged)
        with pytest.raises(ModelError):
            Samples.load(tmp_path / "s.json")
    Samples([Sample([1], [2])]).save(tmp_path / "s.json")
    assert Samples.load(tmp_path / "s.json") == [Sample([1], [2])]
