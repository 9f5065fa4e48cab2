"""How steering moves attention patterns, against float64 runs and captured patterns."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import vksteer as vs
from oracle.reference import Steer, Vector
from vksteer.ov import attention_change

PROMPTS = [[5, 9, 7, 30, 2, 11, 4], [8, 2, 7], [11, 40, 3, 6, 9, 21, 77, 30, 2, 1, 15]]
#: Of a total variation, at most 1. Largest measured 3e-7 (float32 engine).
BOUND = 1e-5


def patterns(model, rows, edits):
    names = [f"blocks.{l}.attn.hook_pattern" for l in range(model.config.n_layers)]
    run = model.run(rows, edits=edits, capture=names, logits=None)
    return [run[name] for name in names]


@pytest.mark.parametrize("name", ["gpt_neox", "llama3", "gemma2", "qwen3"])
def test_distances_against_float64(zoo, rng, name):
    model, ref = zoo.engine(name), zoo.reference(name)
    c = model.config
    direction = (2 * rng.standard_normal(c.d_model)).astype(np.float32)
    found = vs.ov.rerouting(model, PROMPTS, vs.SteeringVector(direction, 1), 1.5, progress=False)
    assert found.distance.shape == (c.n_layers, c.n_heads) and found.each.shape[0] == 3
    total = np.zeros((c.n_layers, c.n_heads))
    for i, row in enumerate(PROMPTS):
        steer = [Steer(Vector(direction.astype(np.float64), 1), 1.5)]
        base, steered = (ref.forward(row, edits=e).sites for e in ([], steer))
        for l in range(c.n_layers):
            site = f"blocks.{l}.attn.hook_pattern"
            moved = np.abs(np.asarray(steered[site]) - np.asarray(base[site]))
            sums = moved.sum(axis=(1, 2)) / 2
            assert np.abs(found.each[i, l] - sums / len(row)).max() < BOUND
            total[l] += sums
    want = total / sum(map(len, PROMPTS))
    assert np.abs(found.distance - want).max() < BOUND and want.max() > 0.05
    assert not found.distance[0].any()  # below the vector's layer


def test_largest_changes(zoo, rng):
    model = zoo.engine("qwen3")
    vector = vs.SteeringVector(3 * rng.standard_normal(model.config.d_model), 0)
    found = vs.ov.rerouting(model, PROMPTS, vector, -1.0, progress=False)
    listed = []
    for i, row in enumerate(PROMPTS):
        base, steered = (patterns(model, [row], e) for e in ([], [vs.Steer(vector, -1.0)]))
        mine = [
            (abs(float(b) - float(a)), l, h, q, k, float(a))
            for l, (x, y) in enumerate(zip(base, steered))
            for (h, q, k), a in np.ndenumerate(x[0])
            for b in [y[0, h, q, k]]
        ]
        listed += mine
        best = sorted(mine, key=lambda e: -e[0])[0]
        (top,) = found.top(1, prompt=i)
        assert top[:4] == best[1:5] and top.before == best[5]
        assert abs(top.after - top.before) == pytest.approx(best[0], abs=1e-7)
    sizes = sorted((e[0] for e in listed), reverse=True)[:20]
    np.testing.assert_allclose([abs(c.after - c.before) for c in found.top(20)], sizes, atol=1e-7)
    assert "<table>" in found._repr_html_() and "3 prompts" in repr(found)
    assert len(found.plot().axes) == 2
    with pytest.raises(ValueError, match="100 largest"):
        found.top(101)
    with pytest.raises(ValueError, match="from 1 on"):
        found.top(0)
    with pytest.raises(ValueError, match="there are 3 prompts"):
        found.top(1, prompt=3)


def test_a_prompt_alone_and_no_steering(zoo, rng):
    model = zoo.engine("gemma2")
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    together = vs.ov.rerouting(model, PROMPTS, vector, 2.0, progress=False)
    for i, row in enumerate(PROMPTS):
        alone = vs.ov.rerouting(model, [row], vector, 2.0, progress=False)
        np.testing.assert_array_equal(alone.distance, together.each[i])
        assert alone.changes[0] == together.changes[i]
    nothing = vs.ov.rerouting(model, PROMPTS, vector, 0.0, progress=False)
    assert not nothing.distance.any() and nothing.top(5) == []


@pytest.mark.parametrize("name", ["gemma2", "phi3_long"])
def test_long_prompts_take_bounded_memory(zoo, rng, name, monkeypatch):
    """Parts of layers and of queries give the same bits; where rows are too long for that (their
    length decides the rotation), parts of layers.
    """
    model = zoo.engine(name)
    n = 150 if name == "gemma2" else model.config.rope_switch + 20
    prompts = [rng.integers(0, model.config.d_vocab, n).tolist(), PROMPTS[0]]
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), 1)
    whole = vs.ov.rerouting(model, prompts, vector, 2.0, progress=False)
    done = []
    monkeypatch.setattr(attention_change, "PATTERN_BYTES", 40_000)
    tracemalloc.start()
    parts = vs.ov.rerouting(model, prompts, vector, 2.0, progress=lambda *a: done.append(a))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # sums over queries in parts are rounded otherwise
    np.testing.assert_allclose(parts.distance, whole.distance, rtol=1e-12, atol=1e-15)
    assert [c[:4] for c in parts.top(50)] == [c[:4] for c in whole.top(50)]
    assert done[-1] == (2 * (model.config.n_layers - 1),) * 2
    if name == "gemma2":
        layer = 8 * model.config.n_heads * n * n
        assert peak < 3e6 and layer > 10 * 40_000


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(coefficient=float("nan")), "must be a finite number"),
        (dict(prompts=[]), "prompts is empty"),
        (dict(vector=(16, 1)), "width 16"),
        (dict(vector=(None, "last")), "output of the last block"),
    ],
)
def test_refusals(zoo, changes, message):
    model = zoo.engine("llama3")
    width, layer = changes.get("vector", (None, 1))
    layer = model.config.n_layers if layer == "last" else layer
    vector = vs.SteeringVector(np.ones(width or model.config.d_model), layer)
    given = dict(prompts=PROMPTS, coefficient=1.0) | changes | {"vector": vector}
    with pytest.raises(ValueError, match=message):
        vs.ov.rerouting(model, **given, progress=False)
