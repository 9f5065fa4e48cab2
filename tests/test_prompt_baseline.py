"""An instruction before each prompt instead of a vector: a row of ablation tables, sweeps and
comparisons, on a model that follows a script.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from standin import ScriptedModel
from vksteer.base.distributions import log_softmax
from vksteer.freezing import ablation_table
from vksteer.inputs.vectors import SteeringVector
from vksteer.steering import compare, sweep
from vksteer.steering.scores import kl_divergence

HARMFUL, HARMLESS = (
    ["how to bomb", "a bomb", "make one bomb now", "bomb it"],
    ["how to bake", "a cake", "make one cake soon"],
)
#: The model refuses what has the word "bomb" in it.
BEFORE = "bomb first,"
OPTIONS = dict(max_new_tokens=9, progress=False, prompt_baseline=BEFORE)


@pytest.fixture
def model():
    model = ScriptedModel({}, n_ctx=128)
    model.config.n_heads, model.config.n_kv_heads = 2, 1
    return model


@pytest.fixture
def vector():
    return SteeringVector(np.ones(12), 2)


def test_a_row_of_the_ablation_table(model, vector, tmp_path):
    out = tmp_path / "answers.json"
    call = lambda **more: ablation_table(
        model, vector, HARMFUL, HARMLESS, 1.0, random_control=1, **(OPTIONS | {"out": out} | more)
    )
    t = call()
    assert [row.name for row in t][-3:] == ["random 0", "prompt", "unsteered"]
    assert (t["prompt"].harmless.asr, t["prompt"].harmful.asr) == (0.0, 0.0)
    assert (t["unsteered"].harmless.asr, t["none"].harmful.asr) == (1.0, 1.0)
    assert "| prompt |" in t.to_markdown() and t.setting["prompt_baseline"] == BEFORE
    assert json.loads(json.dumps(t.to_dict()))["rows"]["prompt"]["change_harmful"] == -1.0
    assert "prompt" in [x.get_text() for x in t.plot().axes[0].get_xticklabels()]
    n = len(model.generations)
    assert call().to_dict() == t.to_dict() and len(model.generations) == n  # all from the file
    with pytest.raises(ValueError, match="other prompts"):
        call(prompt_baseline="another")


def test_a_row_of_the_sweep(model, vector):
    sides = BEFORE, "please:"
    call = lambda **more: sweep(model, vector, [0.25, 1.0], HARMFUL, HARMLESS, **(OPTIONS | more))
    plain, s = call(prompt_baseline=None), call(prompt_baseline=sides)
    assert plain.prompted is None and s.rows == plain.rows and s.unsteered == plain.unsteered
    assert (s.prompted.harmless.asr, s.prompted.harmful.asr) == (0.0, 0.0)
    assert s.prompted.verdict == "induces only" and s.prompted.dose == 0.0

    def logits(before):
        rows = model.chat_tokens([before + prompt for prompt in HARMLESS])
        return model.run(rows, logits="last").logits

    base = log_softmax(logits(""))
    assert s.prompted.kl == kl_divergence(base, logits(BEFORE + " ")).mean() > 0
    assert s.prompted.kl_side == kl_divergence(base, logits("please: ")).mean() > 0
    assert "| prompt | 0.000 |" in s.to_markdown()
    assert s.to_markdown().replace("\n| prompt", "\n\n| prompt").count("\n\n") == 1
    assert json.loads(json.dumps(s.to_dict()))["prompted"]["verdict"] == "induces only"
    # two rates, and the two of the instruction
    assert [len(x.plot().axes[0].lines) for x in (plain, s)] == [2, 4]


def test_a_row_of_the_comparison(model, vector):
    call = lambda **more: compare(
        model, {"v": vector}, HARMFUL, HARMLESS, circuits=False, **(OPTIONS | more)
    )
    plain, c = call(prompt_baseline=None), call()
    assert plain.prompted is None and "| prompt |" not in plain.to_markdown()
    assert (c.prompted[0].asr, c.prompted[1].asr) == (0.0, 0.0)
    assert "| prompt | | | | | 0.00" in c.to_markdown()
    assert json.loads(json.dumps(c.to_dict()))["prompted"]["harmless"]["asr"] == 0.0
    assert [x.get_text() for x in c.plot().axes[0].get_xticklabels()] == ["v", "prompt"]


@pytest.mark.parametrize(
    "baseline, prompts, message",
    [
        ("  ", HARMLESS, "a text that is not blank"),
        (("a", "b", "c"), HARMLESS, "or two"),
        (3, HARMLESS, "must be a text"),
        (BEFORE, [[5, 6, 7]], r"harmless\[0\] is a list of tokens"),
        (BEFORE * 20, HARMLESS, r"prompt_baseline with harmless\[0\] has"),
    ],
)
def test_refusals(model, vector, baseline, prompts, message):
    options = dict(max_new_tokens=9, progress=False, prompt_baseline=baseline)
    calls = [
        lambda: ablation_table(model, vector, HARMFUL, prompts, 1.0, **options),
        lambda: sweep(model, vector, [1.0], HARMFUL, prompts, **options),
        lambda: compare(model, {"v": vector}, HARMFUL, prompts, **options),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert not model.generations
