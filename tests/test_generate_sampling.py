"""Sampling on random models: its distribution, seeds, and options that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from test_generate import setting

# -- sampling --------------------------------------------------------------------------------------


def chi_square_p(counts, probabilities):
    from scipy.stats import chi2

    expected = probabilities * counts.sum()
    assert not counts[probabilities == 0].any(), (
        f"tokens of probability 0 were drawn: {np.flatnonzero((probabilities == 0) & (counts > 0))}"
    )
    order = np.argsort(-expected)
    expected, counts = expected[order], counts[order]
    large = expected >= 5
    e = np.append(expected[large], expected[~large].sum())
    c = np.append(counts[large], counts[~large].sum())
    if e[-1] < 1e-9:
        e, c = e[:-1], c[:-1]
    return chi2.sf(((c - e) ** 2 / e).sum(), max(len(e) - 1, 1))


def filtered(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities after temperature, then the top_k most likely, then the fewest most likely that
    together reach top_p.
    """
    p = torch.softmax(logits / temperature, -1).numpy()
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    if top_p < 1:
        before = np.cumsum(p[order]) - p[order]
        p[order[before >= top_p]] = 0
    return p / p.sum()


def draw(model, prompt, n, seeds, **options):
    """The first new tokens of n rows of the same prompt, for every seed."""
    first = []
    for seed in seeds:
        gens = model.generate(
            [prompt] * n, max_new_tokens=1, ignore_eos=True, seed=seed, progress=False, **options
        )
        first += [int(g.tokens[0]) for g in gens]
    return np.array(first)


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=1.0),
        dict(temperature=2.5),
        dict(temperature=0.6),
        dict(temperature=2.0, top_k=7),
        dict(temperature=2.0, top_p=0.7),
        dict(temperature=3.0, top_k=20, top_p=0.5),
        dict(temperature=2.0, top_k=1000),
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_sampling_is_distributed_right(zoo, options):
    rng = np.random.default_rng(3)
    ref, model, (prompt,) = setting(zoo, "llama2", rng, (3,))
    with torch.no_grad():
        p = filtered(ref.forward(prompt, keep=False).logits[-1], **options)
    first = draw(model, prompt, 256, range(4), **options)
    if options.get("temperature", 1) >= 1:
        assert len(set(first.tolist())) > 3
    p_value = chi_square_p(np.bincount(first, minlength=len(p)), p)
    assert p_value > 1e-4, f"chi-square p = {p_value:.2g} over {len(first)} draws"


def test_rows_and_steps_are_independent(zoo):
    """Equal prompts in one call draw independently, and so does every step."""
    rng = np.random.default_rng(4)
    ref, model, (prompt,) = setting(zoo, "llama2", rng, (3,))
    gens = [
        g
        for seed in range(3)
        for g in model.generate(
            [prompt] * 256,
            max_new_tokens=2,
            ignore_eos=True,
            temperature=2.0,
            seed=seed,
            progress=False,
        )
    ]
    pairs = np.array([g.tokens.tolist() for g in gens])
    common = np.bincount(pairs[:, 0]).argmax()
    second = pairs[pairs[:, 0] == common, 1]
    with torch.no_grad():
        p = filtered(ref.forward(prompt + [int(common)], keep=False).logits[-1], temperature=2.0)
    assert chi_square_p(np.bincount(second, minlength=len(p)), p) > 1e-4


def test_seeds(zoo, rng):
    _ref, model, prompts = setting(zoo, "qwen3", rng)
    texts = lambda **o: [
        g.tokens.tolist()
        for g in model.generate(prompts, max_new_tokens=16, ignore_eos=True, progress=False, **o)
    ]
    a = texts(temperature=1.5, seed=1)
    assert a == texts(temperature=1.5, seed=1) and a != texts(temperature=1.5, seed=2)
    greedy = texts()
    assert greedy == texts(seed=9) == texts(temperature=0.0, seed=3), (
        "at temperature 0 the seed has no effect"
    )
    assert (
        greedy
        == texts(temperature=1.5, top_k=1, seed=4)
        == texts(temperature=1.5, top_p=1e-6, seed=4)
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=-1.0),
        dict(temperature=float("nan")),
        dict(top_p=0.0, temperature=1.0),
        dict(top_p=1.5, temperature=1.0),
        dict(top_k=-2, temperature=1.0),
        dict(max_new_tokens=-1),
        dict(batch_size=0),
        dict(max_new_tokens=100_000),
    ],
    ids=str,
)
def test_bad_options_are_refused(zoo, options):
    with pytest.raises(ValueError) as error:
        zoo.engine("llama2").generate([[1, 2, 3]], progress=False, **options)
    assert len(str(error.value)) > 15
