"""`out=` of sweeps and comparisons: finished answers are taken from the file."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs

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
