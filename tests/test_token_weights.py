"""Weights of tokens in NTP: each weighting against its definition in float64, gradients with the
weights held fixed, and what trainings with them promise.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oracle.reference import Steer, Vector
from vksteer import SteeringVector, steering
from vksteer.steering import losses, weighting

KINDS = ["gpt2", "llama3", "gemma2", "qwen3"]
#: Of the weights, which are about 1.
BOUND = 1e-3  # met on lavapipe: 1.1e-5


@pytest.fixture
def case(zoo, rng):
    def make(name, layer=1):
        model, ref = zoo.engine(name), zoo.reference(name)
        draw = lambda n: rng.integers(0, ref.facts.d_vocab, n).tolist()
        examples = [
            SimpleNamespace(prompt=draw(p), winning=draw(n), sign=sign)
            for p, n, sign in ((5, 9, 1), (3, 1, -1), (8, 70, -1), (6, 4, 1))
        ]
        direction = rng.standard_normal(ref.facts.d_model)
        vector = SteeringVector(4 * direction / np.linalg.norm(direction), layer)
        return SimpleNamespace(model=model, ref=ref, examples=examples, vector=vector, layer=layer)

    return make


def forward(c, example, coefficient, limit=64, **options):
    """(the float64 run of one example, steered; positions whose logits predict its response; the
    response).
    """
    said = example.winning[:limit]
    row = example.prompt + said[:-1]
    steer = Steer(Vector(c.vector.direction, c.layer), coefficient * example.sign)
    run = c.ref.forward(
        row, edits=[steer] if coefficient else [], prompt_length=len(row), **options
    )
    return run, len(example.prompt) - 1 + np.arange(len(said)), said


def effects(c, kind, example, a):
    if kind == "effect":
        with torch.no_grad():
            runs = [forward(c, example, x) for x in (a, 0.0)]
        p, q = (torch.log_softmax(run.logits[at], -1) for run, at, _ in runs)
        return (p.exp() * (p - q)).sum(-1).numpy()
    if kind == "attention":
        with torch.no_grad():
            run, at, _ = forward(c, example, a)
        names = [f"blocks.{l}.attn.hook_pattern" for l in range(c.layer, c.ref.facts.n_layers)]
        return torch.stack([run.sites[n][:, -1] for n in names]).mean((0, 1))[at].numpy()
    site, leaf = f"blocks.{c.layer}.hook_resid_pre", lambda x: x.detach().requires_grad_()
    run, at, said = forward(c, example, a, hooks={site: leaf})
    scalar = torch.log_softmax(run.logits[at], -1)[range(len(said)), said].sum()
    slope = torch.autograd.grad(scalar, run.sites[site])[0][at].numpy()
    return np.abs(a * slope @ c.vector.direction.astype(np.float64))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("kind", ["effect", "exchange", "attention"])
def test_weightings(case, name, kind):
    c = case(name)
    found = steering.token_weights(c.model, c.examples, c.vector, 0.7, kind)
    for example, w in zip(c.examples, found, strict=True):
        n = min(64, len(example.winning))
        assert w.shape == (n,) and w.dtype == np.float64 and abs(w.sum() - n) <= 1e-9 * n
        want = weighting.from_effects(effects(c, kind, example, 0.7))
        assert np.abs(w - want).max() <= BOUND, f"{np.abs(w - want).max():.2e}"
    assert found[1].tolist() == [1.0]


def test_an_exchange_is_what_patching_one_position_changes(case):
    """The estimate is exact to first order: for a weak vector it agrees with taking the steering
    away at one position in float64.
    """
    c, a = case("llama3"), 1e-3
    example = c.examples[0]
    (found,) = weighting._exchange(
        c.model,
        [losses.prepare(c.model, [example], losing=False)[0].winning],
        [SimpleSteer(c.vector, a)],
    )
    with torch.no_grad():

        def metric(positions):
            steer = Steer(Vector(c.vector.direction, c.layer), a, positions)
            row = example.prompt + example.winning[:-1]
            logits = c.ref.forward(row, edits=[steer], prompt_length=len(row)).logits
            at = len(example.prompt) - 1 + np.arange(len(example.winning))
            said = torch.log_softmax(logits[at], -1)
            return float(said[range(len(at)), example.winning].sum())

        everywhere = list(range(len(example.prompt) + len(example.winning) - 1))
        start, whole = len(example.prompt) - 1, metric(everywhere)
        exact = [
            abs(whole - metric([p for p in everywhere if p != start + t]))
            for t in range(len(example.winning))
        ]
    assert np.abs(found - exact).max() <= 1e-2 * np.max(exact)


def SimpleSteer(vector, coefficient):
    import vksteer as vs

    return vs.Steer(vector, coefficient)


def test_from_effects():
    w = weighting.from_effects(np.array([0.0, 0.0, 1.0, 0.0]))
    assert w[2] == w.max() and w[0] == w[1] == w[3] > 0 and abs(w.sum() - 4) < 1e-12
    # T e / sum e = (20, 0, ...), clipped to (10, 0.1, ...), then scaled to a sum of 20
    w = weighting.from_effects(np.eye(20)[0])
    assert np.allclose(w[0] / w[1:], 100) and abs(w.sum() - 20) < 1e-12
    assert weighting.from_effects(np.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert weighting.from_effects(np.array([7.0])).tolist() == [1.0]


def objective(c, kind, layer=1):
    prepared = losses.prepare(c.model, c.examples, losing=False)
    made = losses.Objective(losses.LogProbs(c.model, layer))
    made.weights = weighting.weigh(c.model, prepared, kind, layer, c.vector.direction, 0.7)
    return prepared, made


@pytest.mark.parametrize("name", ["gpt2", "gemma2"])
def test_the_gradient_holds_weights_fixed(case, rng, name):
    """The gradient against central differences of the float64 loss with these weights."""
    c = case(name)
    prepared, made = objective(c, "effect")
    value, gradient = made(prepared, c.vector.direction, [0.7] * 4)

    def loss(direction):
        total = []
        for e, p in zip(c.examples, prepared):
            steered = SimpleNamespace(**{**vars(c), "vector": SimpleNamespace(direction=direction)})
            run, at, said = forward(steered, e, 0.7)
            log_p = torch.log_softmax(run.logits[at], -1)[range(len(said)), said].numpy()
            total.append(-(made.weights[p] * log_p).mean())
        return np.array(total)

    with torch.no_grad():
        start = c.vector.direction.astype(np.float64)
        assert np.abs(loss(start) - value).max() <= 1e-5 * value.max()
        for _ in range(3):
            move = rng.standard_normal(len(start))
            slope = (loss(start + 1e-4 * move) - loss(start - 1e-4 * move)) / 2e-4
            assert np.abs(slope - gradient @ move).max() <= 1e-3 * np.abs(gradient @ move).max()


def same(a, b):
    assert a.losses == b.losses and np.array_equal(a.vectors, b.vectors)


def test_trainings(case, tmp_path):
    """Uniform weights leave every bit; an interruption, a refresh and the order of examples within
    a batch change nothing; res.token_weights are the weights.
    """
    c = case("llama3")
    train = lambda examples=c.examples, **more: steering.train_ntp(
        c.model,
        examples,
        **({"layer": 1, "epochs": 5, "batch_size": 4, "progress": False} | more),
    )
    plain, uniform = train(), train(token_weights="uniform")
    same(plain, uniform)
    assert [w.tolist() for w in uniform.token_weights] == [[1.0] * n for n in (9, 1, 64, 4)]
    assert "token_weights" not in plain.vector.meta["training"]
    weighted = train(token_weights="effect", reference=c.vector)
    want = steering.token_weights(c.model, c.examples, c.vector, 1.0, "effect")
    for mine, theirs in zip(weighted.token_weights, want):
        assert np.array_equal(mine, theirs)
    assert weighted.losses != plain.losses
    backwards = train(c.examples[::-1], token_weights="effect", reference=c.vector)
    assert np.allclose(backwards.losses[0], weighted.losses[0], rtol=1e-12)
    assert np.array_equal(backwards.token_weights[3], weighted.token_weights[0])
    kept = dict(token_weights="exchange", refresh=2, checkpoint_every=1)
    whole = train(**kept)  # under the difference in means of the examples' prompts

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, **kept | {"progress": stop})
    same(whole, train(checkpoint=path, **kept))
    with pytest.raises(ValueError, match="another training"):
        train(checkpoint=path, **kept | {"token_weights": "attention"})


def test_where_only_one_token_carries_the_behaviour(case, monkeypatch):
    """A distribution that steering changes at one position alone gives that token the largest
    weight.
    """
    c = case("qwen3")
    real = c.model.run

    def run(rows, edits=(), **options):
        found = real(rows, **options)
        if edits:
            found.logits[0, -9 + 3, 7] += 5  # predicts token 3 of the first example
        return found

    monkeypatch.setattr(c.model, "run", run, raising=False)
    with pytest.warns(UserWarning, match="2 of 4 responses show no effect"):
        found = steering.token_weights(c.model, c.examples, c.vector, 0.7, "effect")
    assert found[0].argmax() == 3 and found[3].tolist() == [1.0] * 4


def test_refusals(case):
    c = case("llama3")
    train = lambda examples=c.examples, **more: steering.train_ntp(
        c.model, examples, layer=1, epochs=1, progress=False, **more
    )
    for change, says in (
        (dict(token_weights="loud"), "'uniform', 'effect', 'exchange', 'attention'"),
        (dict(refresh=2), "belong to a weighting"),
        (dict(token_weights="effect", refresh=0), "refresh"),
        (dict(token_weights="effect", reference=3), "SteeringVector"),
        (
            dict(token_weights="effect", reference=SteeringVector(c.vector.direction, 2)),
            "reference has layer 2",
        ),
        (dict(token_weights="effect", examples=c.examples[:1]), "no example has sign -1"),
    ):
        with pytest.raises(ValueError, match=says):
            train(**change)
    both = [SimpleNamespace(**{**vars(c.examples[0]), "sign": s}) for s in (1, -1)]
    with pytest.raises(ValueError, match="same prompts"):
        train(both, token_weights="effect")
