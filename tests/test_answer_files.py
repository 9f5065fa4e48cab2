"""`out=` of sweeps, comparisons, candidates and training data: what is finished is taken from the
file.
"""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from vksteer.steering import candidates, examples, scores

COUNTS = {"max_new_tokens": 8, "progress": False}


@pytest.fixture(scope="module")
def model():
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as opened:
        yield opened


@pytest.fixture
def calls(monkeypatch):
    """A list that grows with every call of `generate`."""
    made, generate = [], vs.Model.generate

    def counted(self, *given, **options):
        made.append(options)
        return generate(self, *given, **options)

    monkeypatch.setattr(vs.Model, "generate", counted)
    return made


def vector(seed=0, scale=20.0):
    direction = np.random.default_rng(seed).standard_normal(128)
    return vs.SteeringVector(scale * direction / np.linalg.norm(direction), 6)


def test_sweep(model, calls, tmp_path):
    prompts = vs.data.tiny_pair("validation", 3)
    whole = vs.steering.sweep(model, vector(), [0.5, 1.0], *prompts, **COUNTS)
    assert len(calls) == 3
    out = tmp_path / "answers.jsonl"
    vs.steering.sweep(model, vector(), 0.5, *prompts, **COUNTS, out=out)
    assert len(calls) == 5
    again = vs.steering.sweep(model, vector(), [0.5, 1.0], *prompts, **COUNTS, out=out)
    assert len(calls) == 6  # coefficient 1 alone
    assert again.to_dict() == whole.to_dict()
    vs.steering.sweep(model, vector(seed=1), 0.5, *prompts, **COUNTS, out=out)
    assert len(calls) == 7  # another vector; the unsteered answers are the same
    vs.steering.sweep(model, vector(), 0.5, *prompts, max_new_tokens=9, progress=False, out=out)
    assert len(calls) == 9


def test_compare(model, calls, tmp_path):
    prompts, out = vs.data.tiny_pair("validation", 3), tmp_path / "answers.jsonl"
    options = {**COUNTS, "circuits": False, "out": out, "prompt_baseline": "Please refuse."}
    first = vs.steering.compare(model, {"a": vector()}, *prompts, **options)
    assert len(calls) == 3
    both = vs.steering.compare(model, {"a": vector(), "b": vector(1)}, *prompts, **options)
    assert len(calls) == 4
    for part in ("unsteered", "prompted"):
        assert both.to_dict()[part] == first.to_dict()[part]
    assert both["a"].harmless == first["a"].harmless
    with out.open("ab") as file:
        file.write(b'{"item": ')  # the process was killed while it appended
    vs.steering.compare(model, {"a": vector()}, *prompts, **options)
    assert len(calls) == 4


def test_a_file_of_another_model(model, tmp_path):
    prompts, out = vs.data.tiny_pair("validation", 2), tmp_path / "answers.jsonl"
    vs.steering.sweep(model, vector(), 0.5, *prompts, **COUNTS, out=out)
    with vs.Model.from_pretrained("tiny-gemma-chat", progress=False) as other:
        direction = np.ones(other.config.d_model, np.float32)
        with pytest.raises(ValueError, match="belongs to another model"):
            vs.steering.sweep(
                other, vs.SteeringVector(direction, 3), 0.5, *prompts, **COUNTS, out=out
            )


class Stopped(Exception):
    """Stands for a killed process."""


def stopping(monkeypatch, where, name, after):
    """The function at `where` ends the call after so many calls; returns the list of its calls."""
    made, function = [], getattr(where, name)

    def counted(*given, **options):
        if len(made) == after:
            raise Stopped
        made.append(given)
        return function(*given, **options)

    monkeypatch.setattr(where, name, counted)
    return made


def test_sums_of_activations(model, tmp_path, monkeypatch):
    harmful, harmless = vs.data.tiny_pair("train", 12)
    harmful = harmful[:9]
    find = vs.steering.difference_in_means
    whole = find(model, harmful, harmless, progress=False)
    monkeypatch.setattr(candidates, "KEPT_TOKENS", 64)
    for after in (1, 4, 7):
        out = tmp_path / f"{after}.json"
        with monkeypatch.context() as m:
            first = stopping(m, candidates, "layer_inputs", after)
            with pytest.raises(Stopped):
                find(model, harmful, harmless, out=out, progress=False)
        with monkeypatch.context() as m:
            rest = stopping(m, candidates, "layer_inputs", 99)
            seen = []
            again = find(model, harmful, harmless, out=out, progress=lambda *a: seen.append(a))
        prompts = [row for _, rows, *_ in first + rest for row in rows]
        assert len(first) == after and len(prompts) == 21  # none twice
        assert seen[-1] == (21, 21) and again.vectors.tobytes() == whole.vectors.tobytes()
    with monkeypatch.context() as m:
        assert not stopping(m, candidates, "layer_inputs", 0)
        assert np.array_equal(find(model, harmful, harmless, out=out).vectors, whole.vectors)
    with pytest.raises(ValueError, match="another model, other prompts or other positions"):
        find(model, harmful, harmless[1:], out=out)


def test_scores_of_candidates(model, tmp_path, monkeypatch):
    found = vs.steering.difference_in_means(model, *vs.data.tiny_pair("train", 12), progress=False)
    prompts = vs.data.tiny_pair("validation", 4)
    whole = found.select(*prompts, progress=False)
    table = found.table.to_dict()
    with monkeypatch.context() as m:
        calls = stopping(m, scores.Scorer, "measure", 999)
        found.select(*prompts, progress=False)
    total = len(calls)
    parts = (1, total // 3, total // 3)
    for after in parts:
        with monkeypatch.context() as m:
            stopping(m, scores.Scorer, "measure", after)
            with pytest.raises(Stopped):
                found.select(*prompts, out=tmp_path / "scores.jsonl", progress=False)
    with monkeypatch.context() as m:
        rest = stopping(m, scores.Scorer, "measure", 999)
        again = found.select(*prompts, out=tmp_path / "scores.jsonl", progress=False)
    assert sum(parts) + len(rest) == total and found.table.to_dict() == table
    assert again.direction.tobytes() == whole.direction.tobytes() and again.meta == whole.meta
    with pytest.raises(ValueError, match="other candidates or other prompts"):
        found.select(prompts[0][1:], prompts[1], out=tmp_path / "scores.jsonl")
    with pytest.raises(ValueError, match="other candidates or other prompts"):
        found.select(*prompts, refusal_tokens=[3], out=tmp_path / "scores.jsonl")


def test_responses_to_learn_from(model, tmp_path, monkeypatch):
    prompts = vs.data.tiny_pair("train", 5)
    make = vs.steering.training_data
    whole = make(model, *prompts, vector(), **COUNTS)
    monkeypatch.setattr(examples, "KEPT", 3)
    out = tmp_path / "responses.jsonl"
    with monkeypatch.context() as m:
        stopping(m, vs.Model, "generate", 4)
        with pytest.raises(Stopped):
            make(model, *prompts, vector(), **COUNTS, out=out)
    with monkeypatch.context() as m:
        rest = stopping(m, vs.Model, "generate", 99)
        again = make(model, *prompts, vector(), **COUNTS, out=out)
    assert len(rest) == 3  # 20 rows, 3 at once
    assert list(again) == list(whole) and again.counts == whole.counts and again.meta == whole.meta
    with pytest.raises(ValueError, match="another model, vector, coefficient or other prompts"):
        make(model, *prompts, vector(1), **COUNTS, out=out)
