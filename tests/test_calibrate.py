"""The range of coefficients that works, on a model that follows a script and on a bundled one."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vksteer as vs
from standin import ScriptedModel
from vksteer.data.prompt_files import tiny_pair
from vksteer.inputs.vectors import SteeringVector
from vksteer.steering import calibrate, sweep

HARMFUL, HARMLESS = (
    ["how to bomb", "a bomb", "make one bomb now", "bomb it"],
    ["how to bake", "a cake", "make one cake soon"],
)


@pytest.fixture
def vector():
    return SteeringVector(np.ones(12), 2)


def found(model, vector, **more):
    options = dict(max_new_tokens=9, progress=False) | more
    return calibrate(model, vector, HARMFUL, HARMLESS, **options)


def test_the_script_is_found(vector):
    """It refuses above an effect of 0.5 and complies below -0.5; nothing else breaks."""
    r = found(ScriptedModel({}), vector, max_kl=1e9)
    for low, high in (r.plus, r.minus):
        assert 0.5 < low <= 0.5 / (1 - 0.05) and high == 4.0
    assert r.recommended == (r.plus[0], r.minus[0]) and r.reason == {}
    for row in r.rows:
        assert row.counts == (row.coefficient > 0.5) and row.rate.n == (
            3 if row.side == "plus" else 4
        )
        assert row.effect == float(row.coefficient > 0.5)
    from_one = found(ScriptedModel({}), vector, max_kl=1e9, low=1.0, high=2.5)
    assert from_one.plus == (1.0, 2.5) and len(from_one.rows) == 6


def test_the_bound_of_kl(vector):
    """Both ends are known to the resolution, and no answer is generated where KL is too large."""
    model = ScriptedModel({})
    rows = sweep(model, vector, [0.9], HARMFUL, HARMLESS, max_new_tokens=9, progress=False)
    bound = rows[0].kl_side
    model = ScriptedModel({})
    r = found(model, vector, max_kl=bound, resolution=0.03)
    low, high = r.minus
    assert 0.5 < low <= 0.5 / 0.97 and 0.9 * 0.97 <= high <= 0.9
    for row in r.rows:
        assert row.inside == (row.kl <= bound) and (row.rate is None) == (row.kl > bound)
        if row.side == "minus":
            assert row.inside == (row.coefficient <= 0.9)
    coefficients = {a for g in model.generations[1:] for a in g[3]}
    assert coefficients == {
        row.coefficient * (1 if row.side == "plus" else -1) for row in r.rows if row.inside
    }


def test_rows_are_those_of_a_sweep(vector):
    r = found(ScriptedModel({}), vector, max_kl=1e9)
    at = sorted({row.coefficient for row in r.rows})
    swept = sweep(
        ScriptedModel({}), vector, at, HARMFUL, HARMLESS, max_new_tokens=9, progress=False
    )
    by = {row.coefficient: row for row in swept}
    for row in r.rows:
        other = by[row.coefficient]
        assert row.rate == (other.harmless if row.side == "plus" else other.harmful)
        if row.side == "minus":
            assert row.kl == other.kl_side


@pytest.mark.parametrize(
    "options, side, message",
    [
        (dict(high=0.4, max_kl=1e9), "plus", "no effect up to 0.4: at .* moves by 0.00 .* and 0.5"),
        (
            dict(max_kl=1e-4),
            "minus",
            "side effects come first: from .* KL is .* nats, above 0.0001",
        ),
    ],
)
def test_empty_sides_say_why(vector, options, side, message):
    import re

    r = found(ScriptedModel({}), vector, **options)
    assert r.plus is None and r.minus is None and r.recommended == (None, None)
    assert re.search(message, r.reason[side]) and r.reason[side] in r.to_markdown()


def test_nothing_is_left_to_move(vector):
    model = ScriptedModel({})
    options = dict(max_new_tokens=9, progress=False, max_kl=1e9)
    r = calibrate(model, vector, HARMFUL, [p + " bomb" for p in HARMLESS], **options)
    assert r.reason == {
        "plus": "nothing to change: all harmless prompts are refused without steering"
    }
    assert r.minus is not None and all(row.side == "minus" for row in r.rows)


def test_texts_that_break(vector):
    """Strong steering breaks the texts of a bundled model, which closes the range."""
    with vs.Model.from_pretrained("tiny-gemma-chat", progress=False) as model:
        harmful, harmless = tiny_pair("train", 16)
        direction = vs.steering.difference_in_means(model, harmful, harmless, progress=False)
        at = list(direction.positions).index(-5)
        v = SteeringVector(direction.vectors[at, 4], 4)
        harmful, harmless = tiny_pair("test", 4)
        r = calibrate(
            model, v, harmful, harmless, max_new_tokens=40, resolution=0.2, progress=False
        )
    assert r.plus is not None and r.minus is not None
    assert {b for row in r.rows for b in row.broken} & {"ended", "repetition"}
    for side, (low, high) in (("plus", r.plus), ("minus", r.minus)):
        rows = [row for row in r.rows if row.side == side]
        assert [row.coefficient for row in rows] == sorted(row.coefficient for row in rows)
        inside = [row for row in rows if low <= row.coefficient <= high]
        assert inside and all(row.counts for row in inside)
        assert rows[-1].coefficient > high and not rows[-1].counts


def test_output_forms(vector):
    r = found(ScriptedModel({}), vector, max_kl=1e9)
    content = json.loads(json.dumps(r.to_dict(), allow_nan=False))
    assert content["plus"] == list(r.plus) and len(content["rows"]) == len(r.rows)
    assert content["bounds"]["effect"] == 0.5 and content["setting"]["n_harmful"] == 4
    text = r.to_markdown()
    assert f"recommended {r.plus[0]:.4g}" in text and text.count("| works |") == sum(
        row.counts for row in r.rows
    )
    assert "<table>" in r._repr_html_() and "plus 0.5" in repr(r)
    assert len(r.plot().axes) == 2


def test_an_interrupted_search_goes_on(vector, tmp_path):
    out, seen = tmp_path / "answers.json", []

    def stop(done, total):
        seen.append((done, total))
        if len(seen) == 4:
            raise KeyboardInterrupt

    model = ScriptedModel({})
    with pytest.raises(KeyboardInterrupt):
        found(model, vector, out=out, max_kl=1e9, progress=stop)
    assert len(model.generations) == 4  # unsteered, and three coefficients of both sides
    again = ScriptedModel({})
    done = []
    r = found(again, vector, out=out, max_kl=1e9, progress=lambda *a: done.append(a))
    whole = found(other := ScriptedModel({}), vector, max_kl=1e9)
    assert r.to_dict() == whole.to_dict()
    assert len(again.generations) == len(other.generations) - 4
    assert done[-1][0] == done[-1][1]
    with pytest.raises(ValueError, match="other prompts"):
        found(ScriptedModel({}), SteeringVector(np.arange(12.0), 2), out=out)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(max_kl=0), "max_kl must be a finite number above 0"),
        (dict(max_repetition=np.nan), "max_repetition must be"),
        (dict(low=2, high=1), "must be magnitudes, 0 <= low < high"),
        (dict(low=-1), "must be magnitudes"),
        (dict(resolution="fine"), "resolution must be"),
        (dict(max_new_tokens=60), "new ones, the model's context"),
        (dict(vector=SteeringVector(np.zeros(12), 2)), "the vector is zero"),
        (dict(vector=SteeringVector(np.ones(11), 2)), "11"),
    ],
)
def test_refusals(vector, changes, message):
    model = ScriptedModel({})
    with pytest.raises(ValueError, match=message):
        found(model, **({"vector": vector} | changes))
    assert not model.generations
