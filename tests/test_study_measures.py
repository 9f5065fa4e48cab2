"""What a study measures for its claims: how far circuits agree, and what value vectors mean."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vksteer as vs
from vksteer.circuits.graph import Graph
from vksteer.inputs.samples import Sample, Samples
from vksteer.patching.edge_scores import EdgeScores
from vksteer.study import agreeing
from vksteer.study.agreeing import agreement
from vksteer.study.meaning import is_related, meaning, related_words

GRAPH = Graph(6, 6, 2, 1)  # 891 edges
N = 16


def vector(seed, own=0.3, noise=1.0, index=range(N)):
    """(scores, samples) of a vector: edges that all vectors share, a part of its own, and noise of
    prompts and of samples.
    """
    shared = np.random.default_rng(0).standard_normal(GRAPH.n_edges) ** 3
    prompts = np.random.default_rng([1, seed // 10]).standard_normal((N, GRAPH.n_edges))
    rng = np.random.default_rng([2, seed])
    part = np.random.default_rng([3, seed % 10]).standard_normal(GRAPH.n_edges)
    edges = shared + own * part + noise * prompts + noise / 2 * rng.standard_normal(prompts.shape)
    kept = edges[list(index)]
    scores = EdgeScores(
        GRAPH, kept.mean(axis=0), sample_edges=kept, weights=[3] * len(index), settings={}
    )
    return scores, Samples([Sample((1,), (2,)) for _ in index], index=index)


def test_agreement():
    found = agreement({"a": vector(1), "b": vector(2), "c": vector(3, index=range(4, N))}, 0)
    assert found == agreement(
        {"a": vector(1), "b": vector(2), "c": vector(3, index=range(4, N))}, 0
    )
    assert [pair[:2] for pair in found["pairs"]] == [["a", "b"], ["a", "c"], ["b", "c"]]
    for a, b, value, low, high in found["pairs"]:
        assert 0 <= low < value < high <= 1, (a, b)
    circuit = vector(1)[0].circuit(GRAPH.n_edges // 10)
    other = vector(2)[0].circuit(GRAPH.n_edges // 10)
    assert found["pairs"][0][2] == circuit.overlap(other)
    assert found["samples"] == {"a": 16, "b": 16, "c": 12} and found["draws"] == agreeing.DRAWS
    assert found["chance"] == 89 / 891 and all(0 < own <= 1 for own in found["own"].values())
    json.dumps(found)


def test_the_overlap_of_a_vector_with_itself():
    first, second = agreeing.halves_of(*vector(1), 0)
    scores = vector(1)[0]
    halves = [scores.of_samples(half).circuit(89) for half in (first, second)]
    found = agreement({"a": vector(1), "b": vector(2)}, 0)
    assert found["own"]["a"] == pytest.approx(halves[0].overlap(halves[1]))


def test_too_few_for_an_interval():
    assert "fewer than two vectors" in agreement({"a": vector(1)}, 0)["why"]
    few = agreement({"a": vector(1), "b": vector(2, index=range(7))}, 0)
    assert few == {"why": "7 samples of one vector: intervals need 8"}


@pytest.mark.long
def test_the_width_of_the_intervals():
    """They may be too wide but not much too narrow. The width over Student's quantile is 0.8 to 3
    times the standard deviation over 12 sets of fresh samples: pruning makes the overlap jump.
    """
    for noise in (0.5, 1.0, 3.0):
        values, widths = [], []
        for s in range(12):
            found = agreement({n: vector(10 * s + i, noise=noise) for i, n in enumerate("ab")}, 0)
            _, _, value, low, high = found["pairs"][0]
            values.append(value)
            widths.append(max(high - value, value - low) / agreeing._student(0.975, N))
        ratio = np.mean(widths) / np.std(values)
        assert 0.7 < ratio < 4, (noise, ratio)


def test_student():
    """2.131 with 15 and 2.365 with 7 degrees of freedom (any table of the distribution)."""
    for n, expected in ((16, 2.1314), (8, 2.3646)):
        assert agreeing._student(0.975, n) / np.sqrt(n / (n - 1)) == pytest.approx(
            expected, abs=2e-3
        )


def test_related_tokens():
    harmful = ["Burn the bridge!", "How do I burn a Bridge?", "Flood the mill."]
    harmless = ["How do I paint the mill?", "Paint a bridge"]
    words = related_words(harmful, harmless)
    assert {"burn", "sorry", "cannot", "apologize", "unable"} <= words
    assert not words & {"bridge", "flood", "mill", "paint", "the"}
    for text in (" burning", "Burn", " apologi", " Sorry", "I"):
        assert is_related(text, {"I"}, words), text
    for text in ("i", " I", "bur", "xburn", "burn!", " ", "", "\ufffd", "bridge"):
        assert not is_related(text, {"I"}, words), text


@pytest.fixture(scope="module")
def model():
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as opened:
        yield opened


def test_meaning(model):
    """Every share again from the tokens that the lens names, one vector at a time."""
    steered = vs.SteeringVector(np.random.default_rng(0).standard_normal(128) * 3, 7)
    prompts = vs.data.tiny_pair("train", 24)
    found = meaning(model, steered, prompts, ["I"], seed=0, progress=False)
    words = related_words(*prompts)

    def share(direction):
        texts = []
        for sign in (1, -1):
            texts += vs.ov.logit_lens(model, sign * direction, top=20, progress=False).text()
        return sum(is_related(t, ["I"], words) for t in texts) / len(texts)

    svv = vs.ov.steering_value_vectors(model, steered)
    assert [tuple(place) for place in found["heads"]] == svv.largest(8)
    assert found["shares"].tolist() == [share(svv[place]) for place in svv.largest(8)]
    assert found["vector"] == share(steered.direction)
    random = vs.freezing.random_vector(steered, 0, 3)
    through = vs.ov.steering_value_vectors(model, random)
    assert found["random_vectors"][3] == share(random.direction)
    assert found["random"][3] == pytest.approx(np.mean([share(through[p]) for p in svv.largest(8)]))
    assert found["excess"]["vector"][0] == pytest.approx(found["share"] - found["vector"])
    assert found["excess"]["random"][0] == pytest.approx(found["share"] - found["random"].mean())
    for value, low, high in (
        (found["share"], found["low"], found["high"]),
        *found["excess"].values(),
    ):
        assert low <= value <= high
    tokens = model.tokenizer.tokens(range(len(model.tokenizer)))
    expected = np.mean([is_related(t, ["I"], words) for t in tokens])
    assert found["vocabulary"] == pytest.approx(expected) and found["words"] == len(words)
