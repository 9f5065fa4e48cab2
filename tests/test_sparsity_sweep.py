"""The sparsity sweep on a scripted model: what is measured, resumed and refused."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from standin import ScriptedModel
from vksteer import sparsify
from vksteer.base.provenance import digest
from vksteer.inputs.vectors import SteeringVector
from vksteer.sparsify.sweeping import METHODS, TAUS

HARMFUL, HARMLESS = (
    ["how to bomb", "a bomb", "make one bomb now", "bomb it"],
    ["how to bake", "a cake", "make one cake soon"],
)


class Along(ScriptedModel):
    """Steering acts by the part of the direction that lies along `true`."""

    def __init__(self, true):
        super().__init__({})
        self.true = true.direction.astype(np.float64)

    def generate(self, prompts, *, edits=(), **options):
        acting = (
            [
                [
                    SimpleNamespace(
                        coefficient=e.coefficient
                        * float(e.vector.direction @ self.true)
                        / float(self.true @ self.true),
                        vector=SimpleNamespace(method=""),
                    )
                    for e in row
                ]
                for row in edits
            ]
            if edits
            else ()
        )
        return super().generate(prompts, edits=acting, **options)


@pytest.fixture
def setting(rng):
    """A vector with a few strong dimensions, the gradient that finds them, and a
    model that goes by it.
    """
    direction = np.full(12, 0.1)
    direction[[2, 7, 9]] = 2.0, -3.0, 1.0
    gradient = np.full(12, 0.01)
    gradient[[2, 7, 9]] = 1.0, 1.2, 0.6
    v = SteeringVector(direction, 2, method="dim")
    return v, v.direction * gradient, Along(v)


def run(model, v, scores, **more):
    return sparsify.sweep(
        model, v, scores, HARMFUL, HARMLESS, max_new_tokens=9, progress=False, **more
    )


def test_sweep(setting):
    v, ie, model = setting
    sw = run(model, v, ie)
    assert [r.method for r in sw][:5] == ["unsteered", *METHODS] and sw.vectors == ["dim"]
    for tau in TAUS:
        rows = [r for r in sw if r.tau == tau]
        try:
            kept = sparsify.by_gradient(v, ie, tau).kept
        except ValueError:
            assert not rows and any(f"tau {tau:g}" in reason for reason in sw.setting["left_out"])
            continue
        assert [r.method for r in rows] == list(METHODS) and {r.k for r in rows} == {
            int((~kept).sum())
        }
        assert all(r.sparsity == r.k / 12 for r in rows)
        if 0 < tau <= 0.5:  # the three dimensions carry it
            assert (rows[0].harmless.asr, rows[0].harmful.asr) == (0.0, 1.0) and rows[0].k == 9
    dense, control = sw.curve("dim", "gradient")[0], sw.curve("dim", "random direction")[0]
    assert (
        dense.k == 0
        and (dense.harmless.asr, dense.harmful.asr) == (0.0, 1.0)
        and (dense.harmful.ended, dense.harmful.repetition) == (1.0, 0.0)
    )
    assert (control.harmless.asr, control.harmful.asr) == (1.0, 0.0) and (
        sw.rows[0].harmless.asr,
        sw.rows[0].harmful.asr,
    ) == (1.0, 0.0)
    # Equal directions are run once: tau 0 is one run, whatever the method.
    distinct = {digest(p.direction) for tau in sw.setting["taus"] for p in _all(v, ie, tau)}
    assert len(model.generations) == len(distinct) + 2
    assert len(sw) == 2 + 4 * len({r.tau for r in sw if r.tau is not None})
    with pytest.raises(KeyError, match="gradient"):
        sw.curve("dim", "nothing")


def _all(v, ie, tau):
    try:
        k = int((~sparsify.by_gradient(v, ie, tau).kept).sum())
    except ValueError:
        return []
    return [
        sparsify.by_gradient(v, ie, tau),
        sparsify.by_effect(v, ie, k),
        sparsify.by_magnitude(v, k),
        sparsify.by_random(v, k, 0),
    ]


def test_sweep_of_several_vectors(setting, tmp_path):
    v, ie, model = setting
    u = SteeringVector(v.direction[::-1], 2, method="ntp")
    sw = run(
        model,
        {"dim": v, "ntp": u},
        {"dim": ie, "ntp": ie[::-1]},
        coefficient={"dim": (1.0, 0.8), "ntp": 2.0},
        taus=[0, 0.3],
        methods=["gradient", "random"],
        random_control=2,
    )
    assert sw.vectors == ["dim", "ntp"] and len(sw) == 1 + 2 * (2 * 2 + 2)
    assert sw.setting["vectors"]["dim"]["coefficient"] == [1.0, 0.8] and sw.setting["vectors"][
        "ntp"
    ]["coefficient"] == [2.0, 2.0]
    d = json.loads(json.dumps(sw.to_dict()))
    assert (
        d["rows"][1]["vector"] == "dim"
        and d["rows"][1]["harmful"]["asr"] == 1.0
        and d["setting"]["model_hash"] == "numpy-standin"
    )
    text = sw.to_markdown()
    assert (
        text == repr(sw)
        and len(text.splitlines()) == 4 + len(sw)
        and "| dim | gradient | 0 | 0 | 0.0 % | 0.000 [" in text
    )
    figure = sw.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10000 and len(figure.axes) == 12


def test_sweep_resumes(setting, tmp_path):
    v, ie, model = setting
    out, seen = tmp_path / "answers.jsonl", []

    def stop_after_three(done, total):
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    call = lambda m, **more: sparsify.sweep(
        m, v, ie, HARMFUL, HARMLESS, max_new_tokens=9, out=out, **{"progress": False, **more}
    )
    with pytest.raises(KeyboardInterrupt):
        call(model, progress=stop_after_three)
    assert (
        seen[:2] == [(7, seen[0][1]), (14, seen[0][1])]
        and len(model.generations) == 3
        and len(out.read_text().splitlines()) == 4
    )
    out.write_bytes(out.read_bytes()[:-40])  # killed in the middle of a line
    again = Along(v)
    sw = call(again)
    n = seen[0][1] // 7
    assert len(again.generations) == n - 2
    assert sw.to_dict() == run(Along(v), v, ie).to_dict()
    third = Along(v)
    assert call(third).to_dict() == sw.to_dict() and not third.generations
    more = call(third, taus=[*TAUS, 0.2])  # another tau joins the same file
    assert len(third.generations) <= 4 and len(more) == len(sw) + 4
    with pytest.raises(ValueError, match="another model or other prompts"):
        sparsify.sweep(
            third, v, ie, HARMFUL[:2], HARMLESS, max_new_tokens=9, out=out, progress=False
        )
    for content in ('{"format": "other", "key": "x"}\n', "not json\n", '{"key": 3}\n'):
        out.write_text(content)
        with pytest.raises(ValueError, match="no file of a sparsity sweep"):
            call(third)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(taus=[]), "at least one tau"),
        (dict(taus=[-1]), "taus"),
        (dict(taus=[math.nan]), "taus"),
        (dict(taus=[1, 1]), "none twice"),
        (dict(methods=[]), "methods"),
        (dict(methods=["best"]), "methods"),
        (dict(methods=["random", "random"]), "methods"),
        (dict(scores=np.ones(11)), "width 12"),
        (dict(scores=np.zeros(12)), "zero"),
        (dict(scores={"other": np.ones(12)}), "scores must name"),
        (dict(coefficient=-1.0), "magnitude"),
        (dict(coefficient={"x": 1.0}), "coefficient must name"),
        (dict(random_control=-1), "random_control"),
        (dict(seed=1.5), "seed"),
        (dict(harmful=[]), "harmful is empty"),
        (dict(harmless=[]), "harmless is empty"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=60), "context 64"),
        (dict(vectors=SteeringVector(np.ones(11), 2)), "width 11"),
        (dict(vectors=SteeringVector(np.ones(12), 5)), "layer 5"),
        (dict(vectors=SteeringVector(np.zeros(12), 2)), "zero"),
        (dict(vectors={}), "vectors must name"),
        (dict(vectors={"a": np.ones(12)}), "SteeringVector"),
        (
            dict(
                vectors={"a": SteeringVector(np.ones(12), 2), "b": SteeringVector(np.ones(12), 2)}
            ),
            "one for each of a, b",
        ),
        (dict(out="/nowhere/x.jsonl"), "folder /nowhere"),
        (dict(min_words=-3), "min_words"),
        (dict(progress=3), "progress"),
    ],
)
def test_sweep_refuses_before_any_work(setting, change, says):
    v, ie, model = setting
    arguments = (
        dict(
            vectors=v,
            scores=ie,
            harmful=HARMFUL,
            harmless=HARMLESS,
            max_new_tokens=9,
            progress=False,
        )
        | change
    )
    with pytest.raises(ValueError, match=says):
        sparsify.sweep(model, **arguments)
    assert not model.generations
