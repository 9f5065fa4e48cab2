"""Cosines between vectors, and those of kinds of prompts on a model."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from vksteer.reliability import cosines, cosines_of_prompts


def test_cosines_equal_the_formula(rng):
    arrays = {name: rng.standard_normal(33) * 10.0**i for i, name in enumerate("abcd")}
    found = cosines(arrays)
    assert found.names == tuple("abcd") and len(found) == 4
    for i, a in enumerate(arrays.values()):
        for j, b in enumerate(arrays.values()):
            value = float(np.dot(a, b)) / np.sqrt(float(np.dot(a, a)) * float(np.dot(b, b)))
            assert found.values[i, j] == pytest.approx(value, abs=1e-10)
    assert (found.values == found.values.T).all() and (np.diag(found.values) == 1).all()
    first, second, least = found.lowest
    assert least == found[first, second] == found.values.min()


def test_steering_vectors_are_compared_as_they_are(rng):
    u, v = (vs.SteeringVector(rng.standard_normal(7), layer=2) for _ in range(2))
    found = cosines({"u": u, "v": v, "-3u": -3 * u})
    assert found["u", "v"] == pytest.approx(u.cosine(v), abs=1e-10)
    assert found["u", "-3u"] == pytest.approx(-1, abs=1e-12) and found.lowest[:2] == ("u", "-3u")
    assert found.vectors["v"] is v


def test_how_it_shows_itself(rng):
    found = cosines({"a|b": np.array([1.0, 0.0]), "<c>": np.array([0.0, 2.0])})
    assert "| a\\|b | 1.000 | 0.000 |" in found.to_markdown()
    html = found._repr_html_()
    assert html.startswith("<table>") and "&lt;c&gt;" in html and "<c>" not in html
    assert found.to_dict()["values"] == [[1.0, 0.0], [0.0, 1.0]]
    figure = found.plot()
    ax = figure.axes[0]
    np.testing.assert_array_equal(ax.images[0].get_array(), found.values)
    assert [t.get_text() for t in ax.texts] == ["1.00", "0.00", "0.00", "1.00"]
    with pytest.raises(KeyError, match=r"no vector 'x'"):
        found["x", "<c>"]


V = np.array([1.0, 2.0])


@pytest.mark.parametrize(
    "vectors, message",
    [
        ({}, "at least two"),
        ({"a": V}, "at least two"),
        ({"a": V, "b": np.ones(3)}, "one width: 'a' 2, 'b' 3"),
        ({"a": V, "b": np.zeros(2)}, "'b' must be numbers"),
        ({"a": V, "b": np.array([1.0, np.nan])}, "'b' must be numbers"),
        ({"a": V, "b": np.ones((2, 2))}, "'b' must be numbers"),
        (
            {"a": vs.SteeringVector(V, layer=1), "b": vs.SteeringVector(V, layer=2)},
            "one layer: 'a' 1, 'b' 2",
        ),
    ],
)
def test_refusals(vectors, message):
    with pytest.raises(ValueError, match=message):
        cosines(vectors)


@pytest.fixture
def kinds(rng):
    def rows(n, lengths):
        return [rng.integers(3, 200, k).tolist() for k in lengths[:n]]

    return {
        "plain": (rows(3, (9, 5, 7)), rows(3, (6, 8, 5))),
        "wordy": (rows(4, (12, 14, 9, 11)), rows(4, (12, 10, 13, 9))),
        "short": (rows(2, (4, 4)), rows(2, (5, 3))),
    }


@pytest.mark.parametrize("position", [-1, -3])
def test_kinds_equal_the_means_of_captures(zoo, kinds, position):
    model = zoo.engine("llama3")
    found = cosines_of_prompts(model, kinds, layer=2, position=position, progress=False)
    site = "blocks.2.hook_resid_pre"
    vectors = []
    for pair in kinds.values():
        pos, neg = (
            np.stack(
                [model.run(p, capture=[site], logits=None)[site][0, position] for p in side]
            ).astype(np.float64)
            for side in pair
        )
        vectors.append(pos.mean(axis=0) - neg.mean(axis=0))
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            value = float(a @ b) / (np.linalg.norm(a) * np.linalg.norm(b))
            assert found.values[i, j] == pytest.approx(value, abs=1e-10)
    assert found.names == ("plain", "wordy", "short")
    vector = found.vectors["wordy"]
    assert (vector.layer, vector.position) == (2, position)
    np.testing.assert_array_equal(vector.direction, vectors[1].astype(np.float32))
    assert len(set(found.meta["prompts_hash"].values())) == 3


def test_kinds_are_refused_by_name(zoo, kinds):
    model = zoo.engine("llama3")

    def refused(message, given, **options):
        with pytest.raises(ValueError, match=message):
            cosines_of_prompts(model, given, **({"layer": 2} | options), progress=False)

    refused("kind 'short':.*reaches before its start", kinds, position=-4)
    refused("kind 'plain': layers: 99", kinds, layer=99)
    refused("kind 'plain': .*count back", kinds, position=0)
    refused("kind 'x':", kinds | {"x": ([[1, 2]], [[3, 4]])})
    refused("kind 'x':", kinds | {"x": [[1, 2]]})
    refused("at least two kinds", {"plain": kinds["plain"]})
    same = ([[5, 6, 7], [8, 9, 7]], [[1, 2, 7], [3, 4, 7]])  # layer 0 sees the last token only
    refused("kind 'x': both means are equal", kinds | {"x": same}, layer=0)
