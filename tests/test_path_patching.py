"""Path patching between two prompts, against the independent float64 implementation in which every
input is a tensor of its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vksteer as vs
from oracle.separated import Separated, edge_names

CLEAN, CORRUPT = [5, 9, 7, 30, 2, 11, 4], [5, 9, 8, 30, 3, 11, 4]
#: Of the largest effect or metric. Largest measured 6e-6 (float32 engine).
BOUND = 1e-3


class Reference:
    """Both prompts in float64: the corrupt run with one clean difference added to one input."""

    def __init__(self, zoo, name, clean=CLEAN, corrupt=CORRUPT):
        ref = zoo.reference(name)
        site = "blocks.0.hook_resid_pre"
        good, bad = (ref.forward(list(t)).sites[site] for t in (clean, corrupt))
        self.net, self.facts = Separated(ref, corrupt, good - bad, 0), ref.facts
        self.clean, self.corrupt = self.net.run([1.0]), self.net.run([0.0])
        whole = ref.forward(list(clean)).logits
        assert torch.allclose(self.clean.logits[0], whole, atol=1e-9)  # it is the clean prompt

    def path(self, metric, edges):
        targets = [e.replace("embed->", "steer->").split("->") for e in edges]

        def at_input(name, x, outputs):
            x = x.clone()
            for r, (u, v) in enumerate(targets):
                if v == name:
                    x[r] += self.clean.outputs[u][0] - self.corrupt.outputs[u][0]
            return x

        runs = self.net.run([0.0] * len(targets), at_input=at_input)
        base = metric(self.corrupt.logits[0])
        return np.array([float(metric(x) - base) for x in runs.logits])


METRICS = {
    "logit difference": (vs.LogitDiff(-1, 3, 50), lambda x: x[-1, 3] - x[-1, 50]),
    "log probability": (
        vs.LogProb([-1, 3], [7, 9]),
        lambda x: torch.log_softmax(x, -1)[[-1, 3], [7, 9]].sum(),
    ),
}


def close(found, want):
    assert np.abs(found - want).max() < BOUND * max(1.0, np.abs(want).max())


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "qwen3"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_edge(zoo, name, metric):
    model, reference = zoo.engine(name), Reference(zoo, name)
    of, formula = METRICS[metric]
    edges = edge_names(reference.facts, 0)
    assert tuple(edges) == vs.patching.graph(model, 0).edge_names
    some = edges[:: 1 if metric == "logit difference" else 7]
    found = vs.patching.path(model, CLEAN, CORRUPT, of=of, edges=some, progress=False)
    want = reference.path(formula, some)
    assert found.shape == (len(some),) and np.abs(want).max() > 1e-2
    close(found, want)


def test_names_pairs_and_memory(zoo, rng):
    """Numbers and the name "embed"; pairs together are pairs alone, bit for bit, also where memory
    holds few patches.
    """
    model = zoo.engine("llama3")
    of, edges = vs.LogitDiff(-1, 3, 50), ["embed->a1.h2<q>", "a0.h1->m1", "m1->logits"]
    found = vs.patching.path(model, CLEAN, CORRUPT, of=of, edges=edges, progress=False)
    numbers = vs.patching.graph(model, 0).find(["steer->a1.h2<q>", *edges[1:]]).tolist()
    same = vs.patching.path(model, CLEAN, CORRUPT, of=of, edges=numbers, progress=False)
    np.testing.assert_array_equal(found, same)
    others = [CORRUPT, CLEAN], [CLEAN, CORRUPT]
    both = vs.patching.path(model, *others, of=of, edges=edges, progress=False)
    assert both.shape == (2, 3)
    np.testing.assert_array_equal(both[1], found)
    steps = []
    small = vs.patching.path(
        model,
        *others,
        of=of,
        edges=edges,
        max_memory=90_000_000,
        progress=lambda done, total: steps.append((done, total)),
    )
    np.testing.assert_array_equal(small, both)
    assert steps[-1] == (6, 6)
    assert vs.patching.path(model, CLEAN, CORRUPT, of=of, edges=[], progress=False).shape == (0,)


def test_lists_of_texts_are_pairs():
    """As lists of tokens are; one text is one prompt."""
    given = dict(of=vs.LogitDiff(-1, 3, 50), edges=["m0->logits", "a1.h0->m2"], progress=False)
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        by_length: dict[int, list[str]] = {}
        for request in vs.data.tiny("train"):
            by_length.setdefault(len(model.chat_tokens(request.prompt)[0]), []).append(request)
        clean, other, corrupt, last = next(r for r in by_length.values() if len(r) > 3)[:4]
        sides = [clean.prompt, other.prompt], [corrupt.prompt, last.prompt]
        found = vs.patching.path(model, *sides, **given)
        tokens = vs.patching.path(model, *(model.chat_tokens(side) for side in sides), **given)
        np.testing.assert_array_equal(found, tokens)
        assert found.shape == (2, 2) and found[0].tolist() != found[1].tolist()
        one = vs.patching.path(model, sides[0][0], sides[1][0], **given)
        np.testing.assert_array_equal(one, found[0])
        listed = vs.patching.path(model, sides[0][:1], sides[1][:1], **given)
        np.testing.assert_array_equal(listed, found[:1])


def test_equal_prompts_and_late_differences_change_nothing(zoo):
    model = zoo.engine("qwen3")
    edges = list(vs.patching.graph(model, 0).edge_names)[::5]
    of = vs.LogitDiff(-1, 3, 50)
    found = vs.patching.path(model, CLEAN, CLEAN, of=of, edges=edges, progress=False)
    close(found, np.zeros(len(edges)))
    early = vs.LogitDiff(1, 3, 50)  # before the first token that differs
    found = vs.patching.path(model, CLEAN, CORRUPT, of=early, edges=edges, progress=False)
    close(found, np.zeros(len(edges)))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(clean=[1, 2]), ValueError, "must have one length"),
        (dict(clean=[CLEAN, CLEAN]), ValueError, "are pairs: 2 and 1"),
        (dict(of=vs.LogitDiff(99, 1, 2)), ValueError, "position 99 lies outside"),
        (dict(of="logits"), ValueError, "must be vs.LogitDiff"),
        (dict(of=vs.KL(np.zeros((1, 256)), [1, 2])), ValueError, r"must be \[2 positions, "),
        (dict(edges=["a9.h0->m9"]), KeyError, "a9.h0->m9"),
        (dict(edges=[-1]), ValueError, "edge -1 is not one of"),
        (dict(max_memory=1000), ValueError, "max_memory=1000 is too small"),
    ],
)
def test_refusals(zoo, changes, error, message):
    given = dict(clean=CLEAN, corrupt=CORRUPT, of=vs.LogitDiff(-1, 3, 50), edges=["m0->logits"])
    with pytest.raises(error, match=message):
        vs.patching.path(zoo.engine("llama3"), **(given | changes), progress=False)
