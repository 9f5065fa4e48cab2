"""`vs.steering.compare`: rates and cosines on a scripted stand-in, circuits through stand-ins for
attribution and evaluation; then a real model.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from standin import ScriptedModel
from vksteer import Model, SteeringVector, circuits, data, patching, steering

HARMFUL, HARMLESS = ["a bomb", "make one bomb", "bomb it now"], ["a cake", "bake one"]


@pytest.fixture
def model():
    model = ScriptedModel({"random": 0.2}, n_ctx=128)
    model.config.n_heads, model.config.n_kv_heads = 2, 1
    return model


@pytest.fixture
def vectors(rng):
    draw = lambda scale, method: SteeringVector(scale * rng.standard_normal(12), 3, method=method)
    return {"dim": draw(1.0, "dim"), "ntp": draw(3.0, "ntp"), "chance": draw(1.0, "random")}


def test_rates_and_cosines(model, vectors):
    c = steering.compare(
        model,
        vectors,
        HARMFUL,
        HARMLESS,
        {"dim": 1, "ntp": (0.6, 0.4), "chance": 1},
        circuits=False,
        progress=False,
    )
    rates = {r.name: (r.harmless.asr, r.harmful.asr, r.harmless.ended) for r in c}
    assert rates == {"dim": (0.0, 1.0, 1.0), "ntp": (0.0, 0.0, 1.0), "chance": (1.0, 0.0, 1.0)}
    assert (c.unsteered[0].asr, c.unsteered[1].asr) == (1.0, 0.0)
    for i, a in enumerate(vectors.values()):
        for j, b in enumerate(vectors.values()):
            assert abs(c.cosines[i, j] - a.cosine(b)) < 1e-6
    assert [round(r.norm / vectors["dim"].norm, 6) for r in c] == [1, 1, 1] and c[
        "ntp"
    ].coefficient == (0.6, 0.4)
    own = steering.compare(
        model, vectors, HARMFUL, HARMLESS, circuits=False, normalize=False, progress=False
    )
    assert abs(own["ntp"].norm - vectors["ntp"].norm) < 1e-9
    assert (
        np.isnan(c.overlaps).all()
        and np.isnan(c.cross).all()
        and c.notes == []
        and c["dim"].circuit is None
    )
    text = c.to_markdown()
    assert (
        "| ntp | 3 |" in text
        and "| none |" in text
        and "| cosine |" in text
        and "overlap" not in text
    )
    assert json.loads(json.dumps(c.to_dict(), allow_nan=False))["vectors"]["ntp"][
        "coefficient"
    ] == [0.6, 0.4]
    with pytest.raises(KeyError):
        c["po"]


@pytest.fixture
def standins(model, vectors, monkeypatch):
    """Attribution and evaluation whose results depend on the vector."""
    graph = patching.graph(SimpleNamespace(n_layers=5, n_heads=2, n_kv_heads=1), 3)
    asked = SimpleNamespace(samples=[], evaluated=[])
    which = lambda v: next(name for name in vectors if v.method == vectors[name].method)
    shift = {"dim": 0, "ntp": 4, "chance": 8}

    def make_samples(model, prompts, vector, coefficient, **options):
        asked.samples.append(
            (which(vector), len(prompts), coefficient, options["responses"], options["keep"])
        )
        return [] if asked.__dict__.get("none") == which(vector) else [which(vector)] * len(prompts)

    def attribute(model, samples, vector, coefficient, *, clean, steps, progress):
        assert set(samples) == {which(vector)} and clean == "steered" and steps == 7
        return SimpleNamespace(
            graph=graph,
            circuit=lambda n: circuits.Circuit(graph, np.arange(n) + shift[which(vector)]),
        )

    def minimum_faithful(scores, model, samples, vector, coefficient, *, threshold, progress):
        if which(vector) == "chance":
            raise ValueError("no size reaches it")
        return scores.circuit(8 if which(vector) == "dim" else 10)

    def evaluate(some, model, samples, vector, coefficient, *, progress):
        asked.evaluated.append((which(vector), len(some)))
        return [
            {"logit_diff": SimpleNamespace(faithfulness=len(c) / 10 + shift[which(vector)])}
            for c in some
        ]

    for module, function in (
        (patching, make_samples),
        (patching, attribute),
        (circuits, minimum_faithful),
        (circuits, evaluate),
    ):
        # setattr fails where the module has no such name.
        monkeypatch.setattr(module, function.__name__, function)
    return asked


def test_circuits(model, vectors, standins):
    done = []
    c = steering.compare(
        model,
        vectors,
        HARMFUL,
        HARMLESS,
        (0.7, 0.9),
        n_samples=2,
        steps=7,
        progress=lambda n, total: done.append((n, total)),
    )
    assert standins.samples == [
        (name, 2, -0.9, "steered", "flipped") for name in vectors
    ] and standins.evaluated == [(name, 3) for name in vectors]
    assert (
        [len(r.circuit) for r in c] == [8, 10, c["dim"].circuit.graph.n_edges // 10]
        and "chance" in c.notes[0]
        and len(c.notes) == 1
    )
    assert c.overlaps[0, 1] == c.overlaps[1, 0] == 4 / 8 and c.overlaps[0, 0] == 1
    assert (
        c.cross[0].tolist() == [0.8, 4.8, 8.8]
        and abs(sum(c["ntp"].distribution.values()) - 1) < 1e-12
        and c["ntp"].n_samples == 2
    )
    text = c.to_markdown()
    assert (
        "| circuit of | samples |" in text
        and "| overlap |" in text
        and "circuit under" in text
        and "Left out: the minimum" in text
    )
    assert done[-1][0] == done[-1][1] and json.dumps(c.to_dict(), allow_nan=False)
    standins.none = "ntp"
    some = steering.compare(
        model,
        vectors,
        HARMFUL,
        HARMLESS,
        n_samples=9,
        steps=7,
        size=5,
        side="harmless",
        progress=False,
    )
    assert (
        some["ntp"].circuit is None
        and np.isnan(some.overlaps[1]).all()
        and np.isnan(some.cross[:, 1]).all()
        and "none of whose 2 prompts" in some.notes[0]
    )
    assert len(some["dim"].circuit) == 5 and standins.samples[-1][:3] == ("chance", 2, 1.0)


def test_circuits_by_every_word(model, vectors, standins):
    """True and "auto" mean the same; False makes no samples."""
    true, auto = (
        steering.compare(model, vectors, HARMFUL, HARMLESS, steps=7, circuits=word, progress=False)
        for word in (True, "auto")
    )
    assert (
        true.to_dict() == auto.to_dict()
        and not np.isnan(true.cross).any()
        and not np.isnan(true.overlaps).any()
    )
    asked = len(standins.samples)
    assert asked == 2 * len(vectors)
    steering.compare(model, vectors, HARMFUL, HARMLESS, circuits=False, progress=False)
    assert len(standins.samples) == asked


def test_plot(model, vectors, tmp_path):
    c = steering.compare(model, vectors, HARMFUL, HARMLESS, circuits=False, progress=False)
    c.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 5000


def test_bad_arguments(model, vectors):
    v = vectors["dim"]
    for message, call in (
        ("at least one", lambda: steering.compare(model, {}, HARMFUL, HARMLESS)),
        ("at least one", lambda: steering.compare(model, v, HARMFUL, HARMLESS)),
        ("SteeringVector", lambda: steering.compare(model, {"a": 1}, HARMFUL, HARMLESS)),
        ("zero", lambda: steering.compare(model, {"a": v * 0}, HARMFUL, HARMLESS)),
        (
            "width",
            lambda: steering.compare(
                model, {"a": SteeringVector(np.ones(3), 1)}, HARMFUL, HARMLESS
            ),
        ),
        (
            "strength of 'ntp'",
            lambda: steering.compare(model, vectors, HARMFUL, HARMLESS, {"dim": 1}),
        ),
        ("magnitude", lambda: steering.compare(model, vectors, HARMFUL, HARMLESS, -1)),
        ("side", lambda: steering.compare(model, vectors, HARMFUL, HARMLESS, side="x")),
        ("circuits", lambda: steering.compare(model, vectors, HARMFUL, HARMLESS, circuits=3)),
        ("harmful", lambda: steering.compare(model, vectors, [], HARMLESS)),
        ("size", lambda: steering.compare(model, vectors, HARMFUL, HARMLESS, size=0)),
        ("n_samples", lambda: steering.compare(model, vectors, HARMFUL, HARMLESS, n_samples=0)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not model.generations


def test_on_the_bundled_model():
    """Real attribution, few prompts: circuits of a given size, overlaps and
    shares of edges by type.
    """
    harmful, harmless = data.tiny_pair("validation", 8)
    with Model.from_pretrained("tiny-gemma-chat", progress=False) as model:
        cands = steering.difference_in_means(model, *data.tiny_pair("train", 16), progress=False)
        v, other = cands.vector(-5, 4), cands.vector(-4, 4)
        c = steering.compare(
            model,
            {"-5": v, "-4": other},
            harmful,
            harmless,
            (0.5, 0.8),
            size=40,
            n_samples=3,
            steps=2,
            max_new_tokens=40,
            progress=False,
        )
    kept = [r for r in c if r.circuit is not None]
    assert kept and all(
        len(r.circuit) >= 40 and r.n_samples <= 3 and abs(sum(r.distribution.values()) - 1) < 1e-12
        for r in kept
    )
    assert c["-5"].harmful.asr > 0.5 and "| circuit of |" in c.to_markdown()
