"""`vs.scaling` against a float64 implementation by autograd, and what its trainings promise.

Bound of gradients: 1e-4 of the largest of the call.
"""

from __future__ import annotations

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import vksteer as vs
from oracle.compare import assert_same_bits
from oracle.reference import Scale
from vksteer.errors import ModelError

KINDS = ["gpt2", "gpt_neox", "llama3", "gemma2", "qwen3"]
SITES = ("hook_attn_out", "hook_mlp_out")
BOUND = 1e-4  # met on lavapipe: 6.9e-6
T = 7


@pytest.fixture
def case(zoo, rng):
    def make(name, lengths=(T, T, T)):
        ref, model = zoo.reference(name), zoo.engine(name)
        prompts = [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in lengths]
        answers = np.array([rng.permutation(ref.facts.d_vocab)[:2] for _ in prompts])
        return SimpleNamespace(
            ref=ref,
            model=model,
            prompts=prompts,
            a=answers[:, 0].tolist(),
            b=answers[:, 1].tolist(),
            layers=ref.facts.n_layers,
            width=ref.facts.d_model,
        )

    return make


def edits_of(parameters, sites, beta, dynamic, first):
    """The edits of one beta, with torch tensors in them."""
    found = []
    for s, site in enumerate(sites):
        for l in range(parameters.shape[1]):
            name, row = f"blocks.{l}.{site}", parameters[s, l]
            if dynamic:
                found.append(vs.DynamicScale(name, row, beta, positions=slice(first, None)))
            else:
                where = list(range(first, len(row)))
                found.append(Scale(name, (1 + beta * row[first:])[:, None], positions=where))
    return found


def in_float64(
    c, parameters, sites=SITES, dynamic=False, margin=1.0, faith=1.0, sparse=0.01, first=1
):
    """The loss in float64, and what it consists of."""
    hinge, divergence = [], []
    for prompt, a, b in zip(c.prompts, c.a, c.b):
        rest = [t for t in range(c.ref.facts.d_vocab) if t not in (a, b)]
        with torch.no_grad():
            base = torch.log_softmax(c.ref.forward(prompt, keep=False).logits[-1][rest], 0)
        for beta in (1.0, -1.0):
            edits = edits_of(parameters, sites, beta, dynamic, first)
            logits = c.ref.forward(prompt, edits=edits, keep=False).logits[-1]
            hinge.append(torch.relu(margin - beta * (logits[a] - logits[b])))
            scaled = torch.log_softmax(logits[rest], 0)
            divergence.append((base.exp() * (base - scaled)).sum())
    n_free = parameters.numel() if dynamic else parameters[:, :, first:].numel()
    kept = parameters if dynamic else parameters[:, :, first:]
    smallness = kept.abs().sum() / n_free
    return (
        torch.stack(hinge).sum() / len(c.prompts)
        + faith * torch.stack(divergence).mean()
        + sparse * smallness
    )


def compare(c, parameters, **options):
    given = torch.tensor(parameters, requires_grad=True)
    want = in_float64(c, given, **options)
    slope = torch.autograd.grad(want, given)[0].numpy()
    value, gradient = vs.scaling.loss(c.model, c.prompts, c.a, c.b, parameters, **options)
    assert gradient.shape == parameters.shape and gradient.dtype == np.float64
    assert abs(value - want.item()) <= 2e-5 * max(1.0, abs(want.item()))
    error = np.abs(gradient - slope).max() / np.abs(slope).max()
    assert error <= BOUND, f"{error:.2e}"
    return gradient


@pytest.mark.parametrize("name", KINDS)
def test_gradients(case, rng, name):
    c = case(name)
    alpha = 0.2 * rng.standard_normal((2, c.layers, T))
    gradient = compare(c, alpha)
    assert not gradient[:, :, 0].any()
    compare(c, 0.3 * rng.standard_normal((2, c.layers, c.width)), dynamic=True)


def test_gradients_at_other_sites_and_weights(case, rng):
    c = case("llama3")
    sites = ("hook_resid_post", "hook_resid_mid", "hook_resid_pre")
    alpha = 0.1 * rng.standard_normal((3, c.layers, T))
    compare(c, alpha, sites=sites, margin=0.25, faith=3.0, sparse=0.5)
    c = case("gemma2", (3, 9, 5))
    compare(c, rng.standard_normal((2, c.layers, c.width)), dynamic=True, faith=0.0, sparse=1.0)


def test_differences_and_the_identity(case, rng):
    """Central differences of the float64 loss at five places, and d L / d alpha = beta <h, g>."""
    c = case("qwen3")
    alpha = 0.2 * rng.standard_normal((2, c.layers, T))
    _, gradient = vs.scaling.loss(c.model, c.prompts, c.a, c.b, alpha)
    for _ in range(5):
        at = (rng.integers(2), rng.integers(c.layers), rng.integers(1, T))
        move = np.zeros_like(alpha)
        move[at] = 1e-5
        with torch.no_grad():
            up, down = (float(in_float64(c, torch.tensor(alpha + s * move))) for s in (1, -1))
        assert abs((up - down) / 2e-5 - gradient[at]) <= BOUND * np.abs(gradient).max()
    # at alpha = 0, the hinge of both signs within its margin
    first = vs.scaling.first_order(c.model, c.prompts, c.a, c.b)
    names = [f"blocks.{l}.{s}" for s in SITES for l in range(c.layers)]
    run = c.model.run(c.prompts, capture=names, logits=None)
    of = [vs.LogitDiff(-1, a, b) for a, b in zip(c.a, c.b)]
    grads = c.model.gradients(c.prompts, of=of, at=names, progress=False)
    want = np.stack([(run[n].astype(np.float64) * grads[n]).sum(-1).mean(0) for n in names])
    want[:, 0] = 0
    assert np.abs(first.reshape(want.shape) - want).max() <= 1e-5 * np.abs(want).max()
    _, at_zero = vs.scaling.loss(
        c.model, c.prompts, c.a, c.b, 0 * alpha, margin=1e3, faith=0.0, sparse=0.0
    )
    assert np.abs(at_zero + 2 * first).max() <= 1e-5 * np.abs(first).max()


@pytest.mark.parametrize("dynamic", [False, True])
def test_zero_changes_nothing(case, rng, dynamic):
    c = case("gemma2")
    plain = c.model.run(c.prompts).logits
    n = c.width if dynamic else T
    some = vs.scaling.Scaling(rng.standard_normal((2, c.layers, n)), SITES, dynamic)
    none = vs.scaling.Scaling(np.zeros((2, c.layers, n)), SITES, dynamic)
    for scaling, beta in ((some, 0.0), (none, 0.7)):
        assert_same_bits("logits", c.model.run(c.prompts, edits=scaling.edits(beta)).logits, plain)
    found = none.evaluate(c.model, c.prompts, c.a, c.b)
    assert found.differences[0] == found.differences[2]
    assert abs(found.faithfulness) <= 1e-9  # the soft cap of the run and of the loss differ


@pytest.fixture
def linear(zoo, tmp_path):
    """A model of one layer whose final norm hardly norms: the stream is so small beside epsilon
    that logits are linear in it.
    """
    eps = 0.9
    folder = tmp_path / "linear"
    shutil.copytree(zoo.variant("llama2", "eps", rms_norm_eps=eps, num_hidden_layers=1), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: x for n, x in tensors.items() if ".layers." not in n or ".layers.0." in n}
    for name in tensors:
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
            tensors[name] = tensors[name] * np.float32(1e-4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = vs.Model.from_pretrained(folder, progress=False)
    yield model, eps
    model.close()


def test_a_linear_model(linear, rng):
    """D(beta) = D(0) + beta alpha <h, W_a - W_b>, and the loss is 0 from alpha = (m + |D0|) / |c|
    on.
    """
    model, eps = linear
    prompt = rng.integers(0, model.config.d_vocab, T).tolist()
    L, last = model.config.n_layers, model.config.n_layers - 1
    site = f"blocks.{last}.hook_resid_post"
    h = model.run([prompt], capture=[site])[site][0, -1].astype(np.float64)
    a, b = 3, 8
    unembed = model._engine.rows("unembed", 0, 0, model.config.d_vocab).astype(np.float64)
    gain = model._engine.vector("ln_final", 0).astype(np.float64)
    c = float((h * gain / math.sqrt(eps)) @ (unembed[a] - unembed[b]))
    scale = 1 / abs(c)
    for alpha in (0.5, -2.5, 3.5):
        values = np.zeros((1, L, T))
        values[0, last, -1] = alpha
        ask = dict(sites="hook_resid_post", faith=0.0, sparse=0.0, margin=4 * abs(c))
        value, gradient = vs.scaling.loss(model, [prompt], a, b, values, **ask)
        plus, minus = c + alpha * c, c - alpha * c  # D(0) is c itself
        want = max(0, 4 * abs(c) - plus) + max(0, 4 * abs(c) + minus)
        assert abs(value - want) * scale <= 1e-4
        slope = -c * (plus < 4 * abs(c)) - c * (minus > -4 * abs(c))
        assert abs(gradient[0, last, -1] - slope) * scale <= 1e-4
    found = vs.scaling.train(
        model,
        [prompt],
        a,
        b,
        sites="hook_resid_post",
        faith=0.0,
        sparse=0.0,
        margin=0.5 * abs(c),
        lr=0.05,
        steps=60,
        progress=False,
    )
    assert found.losses[-1] * scale <= 1e-6 and found.effectiveness == 1.0


def test_a_larger_weight_of_minimality_leaves_fewer_factors(case):
    c = case("gpt2")
    counts = [
        vs.scaling.train(
            c.model, c.prompts, c.a, c.b, sparse=sparse, lr=0.02, steps=40, progress=False
        ).l0
        for sparse in (0.0, 0.1, 1.0, 10.0)
    ]
    assert counts == sorted(counts, reverse=True) and counts[-1] < counts[0], counts


def test_dynamic_factors_by_hand(case, rng):
    """At two lengths, the dynamic form is the static one with factors w . h / sqrt(D)."""
    c = case("llama3", (4, 9))
    w = np.zeros((1, c.layers, c.width))
    w[0, 1] = rng.standard_normal(c.width)
    scaling = vs.scaling.Scaling(w, ("hook_mlp_out",), True)
    site = "blocks.1.hook_mlp_out"
    for prompt in c.prompts:
        h = c.model.run([prompt], capture=[site])[site][0].astype(np.float64)
        alpha = np.zeros((1, c.layers, len(prompt)))
        alpha[0, 1] = h @ w[0, 1] / math.sqrt(c.width)
        alpha[0, 1, 0] = 0
        by_hand = vs.scaling.Scaling(alpha, ("hook_mlp_out",), False)
        one, two = (c.model.run([prompt], edits=s.edits(0.6)).logits for s in (scaling, by_hand))
        assert np.abs(one - two).max() <= 1e-5 * np.abs(two).max()


@pytest.mark.parametrize("dynamic", [False, True])
def test_edits_do_what_was_trained(case, dynamic):
    """The edits give the differences that were measured, alone and in company, and a scaling from
    a file gives the same bits; pruning leaves the strongest.
    """
    c = case("qwen3")
    s = vs.scaling.train(
        c.model, c.prompts, c.a, c.b, dynamic=dynamic, steps=12, lr=0.05, progress=False
    )
    assert s.losses.shape == (12,) and s.losses[-1] < s.losses[0]
    rows = np.arange(len(c.prompts))
    for beta, want in zip((-1.0, 0.0, 1.0), s.differences):
        logits = c.model.run(c.prompts, edits=s.edits(beta), logits="last").logits
        found = (logits[rows, c.a] - logits[rows, c.b]).mean()
        assert abs(found - want) <= 1e-5 * max(1, abs(want))
        alone = c.model.run([c.prompts[1]], edits=s.edits(beta), logits="last").logits
        assert_same_bits("a row alone", alone[0], logits[1])
    few = s.prune(3, c.model, c.prompts, c.a, c.b)
    size = few.strength()
    assert (size > 0).sum() == 3 and size[size > 0].min() >= np.sort(s.strength(), None)[-3]
    assert few.faithfulness >= 0 and "plot" in dir(few) and "<table>" in few._repr_html_()
    few.plot()


def test_tokens_beyond_the_trained_length(case, rng):
    """Static factors leave decoded tokens alone: they are those of a run whose prompt is scaled.
    Dynamic ones scale them, too.
    """
    c = case("llama3")
    alpha = rng.standard_normal((2, c.layers, T))
    for dynamic, parameters in (
        (False, alpha),
        (True, rng.standard_normal((2, c.layers, c.width))),
    ):
        s = vs.scaling.Scaling(parameters, SITES, dynamic)
        made = c.model.generate(
            c.prompts, max_new_tokens=5, edits=s.edits(0.8), ignore_eos=True, progress=False
        )
        for prompt, generation in zip(c.prompts, made):
            exact = edits_of(torch.tensor(parameters), SITES, 0.8, dynamic, 1)
            assert generation.tokens.tolist() == c.ref.generate(prompt, 5, edits=exact)[0]


@pytest.mark.parametrize("ending", [".npz", ".safetensors"])
def test_files(case, tmp_path, ending):
    c = case("gpt2")
    s = vs.scaling.train(c.model, c.prompts, c.a, c.b, steps=3, progress=False)
    path = tmp_path / f"s{ending}"
    s.save(path)
    back = vs.scaling.Scaling.load(path)
    assert np.array_equal(back.alpha, s.alpha.astype(np.float32)) and back.sites == s.sites
    assert back.meta == s.meta and back.meta["model_hash"] and back.effectiveness == s.effectiveness
    assert {"data_hash", "seed"} <= set(back.meta["training"]) and back.meta["versions"]
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError):
        vs.scaling.Scaling.load(path)
    with pytest.raises(ValueError, match="saved as"):
        s.save(tmp_path / "s.gguf")


def test_an_interrupted_training_goes_on(case, tmp_path):
    c = case("gpt2")
    train = lambda **more: vs.scaling.train(
        c.model, c.prompts, c.a, c.b, **({"steps": 8, "progress": False} | more)
    )
    whole = train()
    path = tmp_path / "checkpoint"

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(checkpoint=path, progress=stop)
    said = []
    rest = train(checkpoint=path, progress=lambda done, total: said.append((done, total)))
    assert said[0] == (5, 8) and said[-1] == (8, 8)
    assert np.array_equal(rest.alpha, whole.alpha) and np.array_equal(rest.losses, whole.losses)
    with pytest.raises(ValueError, match="another training: margin"):
        train(checkpoint=path, margin=2.0)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            dict(prompts=[[1, 2, 3], [4, 5]]),
            r"prompts\[0\] has 3 tokens and prompts\[1\] has 2.*dynamic",
        ),
        (dict(a=7, b=7), "same token 7"),
        (dict(a=[1, 2, 3]), "3 answers for 2 prompts"),
        (dict(a=10**6), "an answer is a token id below"),
        (dict(prompts=[]), "empty"),
        (dict(prompts=[[1], [2]]), "skip_first=False"),
        (dict(sites=()), "sites is empty"),
        (dict(sites=("hook_mlp_out", "hook_mlp_out")), "twice"),
        (dict(sites="blocks.0.hook_mlp_out"), "without their layer"),
        (dict(sites="mlp.hook_post"), "width"),
        (dict(sites="attn.hook_z"), "width"),
        (dict(margin=-1.0), "margin"),
        (dict(faith=np.nan), "faith"),
        (dict(lr=0.0), "lr"),
        (dict(steps=0), "steps"),
        (dict(dynamic="yes"), "dynamic"),
    ],
)
def test_refusals(zoo, change, says):
    model = zoo.engine("gpt_neox")
    call = dict(prompts=[[1, 2, 3], [4, 5, 6]], a=7, b=9) | change
    with pytest.raises(ValueError, match=says):
        vs.scaling.train(model, call.pop("prompts"), call.pop("a"), call.pop("b"), **call)


def test_notes(zoo):
    """Answers of several tokens; what an output is in parallel and in post-norm layers."""
    model = zoo.engine("gpt_neox")
    with pytest.warns(UserWarning, match="several tokens"):
        s = vs.scaling.train(model, [[1, 2]], [[5, 6]], 9, steps=1, progress=False)
    assert any("several tokens" in n for n in s.notes) and any("parallel" in n for n in s.notes)
    with pytest.raises(KeyError, match="hook_resid_mid"):
        vs.scaling.train(model, [[1, 2]], 5, 9, sites="hook_resid_mid", progress=False)
    s = vs.scaling.train(zoo.engine("gemma2"), [[1, 2]], 5, 9, steps=1, progress=False)
    assert any("post-norm" in n for n in s.notes)
    with pytest.raises(ValueError, match="beta"):
        s.edits(np.inf)
    with pytest.raises(ValueError, match="shape"):
        vs.scaling.loss(model, [[1, 2]], 5, 9, np.zeros((1, 2, 3)))
