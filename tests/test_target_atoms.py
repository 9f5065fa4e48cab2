"""Steering target atoms: the choice of features, and the whole call against the definition
written out in float64.
"""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs

FAMILIES = ("gpt2", "llama3", "gemma2", "qwen3")
INF = np.inf


def made_pairs(rng, vocabulary, n=6):
    """Pairs of token lists of many lengths."""
    draw = lambda: rng.integers(3, vocabulary, rng.integers(1, 9)).tolist()
    return [(draw(), draw(), draw()) for _ in range(n)]


def random_sae(rng, d, f, layer=2, **more):
    options = dict(threshold=rng.uniform(0.1, 0.5, f), site=f"blocks.{layer - 1}.hook_resid_post")
    return vs.sae.SAE(
        rng.standard_normal((d, f)) / np.sqrt(d),
        np.zeros(f),
        rng.standard_normal((f, d)),
        rng.standard_normal(d),
        **{**options, **more},
    )


def answers(model, pairs, site):
    """Activations of the answer tokens, float64, (chosen, rejected) of each pair, run one by
    one.
    """
    out = []
    for prompt, *both in pairs:
        some = []
        for answer in both:
            h = model.run([prompt + answer], capture=[site], logits=None)[site][0]
            some.append(h[len(prompt) :].astype(np.float64))
        out.append(some)
    return out


def atoms(model, sae, pairs, **options):
    return vs.sae.target_atoms(model, sae, pairs, progress=False, **options)


# -- the choice ------------------------------------------------------------------------------------


def test_six_features_by_hand():
    """Feature 1 has amplitude and frequency of different signs, 2 and 3 tie, 5 never fired.

    Scaled frequencies: 3/4, -1, 1/2, 1/2, 1/4, 0; feature 1's score is 0.
    """
    amplitude = np.array([4.0, 3.0, 2.0, 2.0, -0.5, 0.0])
    frequency = np.array([3.0, -4.0, 2.0, 2.0, -1.0, 0.0])
    found = vs.sae.select(amplitude, frequency, keep=0.5)  # rank 3
    np.testing.assert_allclose(found.score, [0.75, 0, 0.5, 0.5, -0.25, 0])
    assert (found.t_f, found.t_a, found.n_nonzero) == (0.25, 2.0, 4)
    assert found.kept.tolist() == [True, False, True, True, False, False]
    found = vs.sae.select(amplitude, frequency, keep=0.2)  # rank 1
    assert (found.t_f, found.t_a) == (0.5, 3.0)
    assert np.flatnonzero(found.kept).tolist() == [0]
    much = vs.sae.select(amplitude, frequency, keep=0.2, by="amplitude").kept
    often = vs.sae.select(amplitude, frequency, keep=0.2, by="frequency").kept
    assert np.flatnonzero(much).tolist() == [0, 1] and np.flatnonzero(often).tolist() == [0, 2, 3]


def test_the_zero_trap():
    """Rank 5 of 8 scores lies among the zeros: all pass with the authors' rule, so that amplitude
    alone decides, and none of the zeros with the strict one.
    """
    amplitude = np.array([5.0, -4.0, 3.0, 2.5, 2.0, 1.5, 0.0, 0.0])
    frequency = np.array([2.0, -2.0, -1.0, 0.0, 0.0, 1.0, 0.0, 0.0])
    strict = vs.sae.select(amplitude, frequency, keep=0.65)
    authors = vs.sae.select(amplitude, frequency, keep=0.65, ties="authors")
    assert strict.t_f == authors.t_f == 0 and strict.t_a == authors.t_a == 1.5
    assert strict.n_nonzero == authors.n_nonzero == 3
    assert np.flatnonzero(strict.kept).tolist() == [0, 1, 5]
    assert np.flatnonzero(authors.kept).tolist() == [0, 1, 2, 3, 4, 5]
    for by, n in (("both", 3), ("frequency", 3), ("amplitude", 6)):
        assert vs.sae.select(amplitude, frequency, 0.9, by=by).kept.sum() == n
        assert vs.sae.select(amplitude, frequency, 0.9, "authors", by=by).kept.sum() == 8


def test_all_are_kept_by_1_and_equal_ones_have_no_score():
    for ties in ("strict", "authors"):
        found = vs.sae.select(np.zeros(4), np.arange(4), keep=1, ties=ties)
        assert found.kept.all() and found.n_nonzero == 0
    assert vs.sae.select([2.0, -2.0], [1, -1], keep=0.5).kept.sum() == 0


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(keep=0), "keep must be"),
        (dict(keep=1.1), "keep must be"),
        (dict(keep=True), "keep must be"),
        (dict(ties="first"), "ties='first'"),
        (dict(by="product"), "by='product'"),
        (dict(amplitude=[1.0]), "must be"),
        (dict(frequency=[np.nan, 1]), "not finite"),
        (dict(amplitude=[], frequency=[]), "must be"),
    ],
)
def test_refusals_of_the_choice(change, message):
    with pytest.raises(ValueError, match=message):
        vs.sae.select(**{**dict(amplitude=[1.0, 2], frequency=[1.0, 2]), **change})


# -- the vector ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_an_orthonormal_dictionary_gives_the_plain_difference(zoo, rng, name):
    model = zoo.engine(name)
    d, n_layers = model.config.d_model, model.config.n_layers
    q = np.linalg.qr(rng.standard_normal((d, d)))[0]
    pairs = made_pairs(rng, model.config.d_vocab)
    for layer in (1, n_layers):
        site = f"blocks.{layer - 1}.hook_resid_post"
        sae = vs.sae.SAE(q.T, np.zeros(d), q, np.zeros(d), -INF, site=site)
        plain = np.mean([c.mean(0) - r.mean(0) for c, r in answers(model, pairs, site)], axis=0)
        for ties in ("strict", "authors"):
            v = atoms(model, sae, pairs, keep=1, ties=ties)
            assert v.layer == layer and v.meta["atoms"]["n_kept"] == d
            scale = np.abs(plain).max()
            np.testing.assert_allclose(v.direction, plain, atol=2e-6 * scale)  # 5e-7
            assert v.norm == pytest.approx(np.linalg.norm(plain), rel=2e-6)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("name", FAMILIES)
def test_against_the_definition(zoo, rng, name, kind):
    model = zoo.engine(name)
    sae = random_sae(rng, model.config.d_model, 60)
    if kind == "topk":
        arrays = sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec
        sae = vs.sae.SAE(*arrays, kind="topk", k=7, site=sae.site)
    pairs = made_pairs(rng, model.config.d_vocab)
    runs = answers(model, pairs, sae.site)
    means = np.array([[sae.encode(h).astype(np.float64).mean(0) for h in pair] for pair in runs])
    amplitude = means[:, 0].mean(0) - means[:, 1].mean(0)
    frequency = (means[:, 0] > 0).sum(0) - (means[:, 1] > 0).sum(0)
    plain = np.mean([c.mean(0) - r.mean(0) for c, r in runs], axis=0)
    for options in (dict(keep=0.3), dict(keep=0.3, ties="authors"), dict(keep=0.3, residual=True)):
        chosen = vs.sae.select(amplitude, frequency, 0.3, options.get("ties", "strict"))
        want = amplitude[chosen.kept] @ sae.W_dec[chosen.kept].astype(np.float64)
        if "residual" in options:
            want += plain - amplitude @ sae.W_dec.astype(np.float64)
        v = atoms(model, sae, pairs, **options)
        found = v.meta["atoms"]
        assert found["features"] == np.flatnonzero(chosen.kept).tolist() and v.method == "sta"
        np.testing.assert_allclose(found["coefficients"], amplitude[chosen.kept], atol=1e-5)
        assert (found["n_kept"], found["n_nonzero"]) == (chosen.kept.sum(), chosen.n_nonzero)
        assert found["t_f"] == chosen.t_f and found["t_a"] == pytest.approx(chosen.t_a, rel=1e-4)
        assert found["norm"] == pytest.approx(np.linalg.norm(want), rel=1e-5)
        want *= np.linalg.norm(plain) / np.linalg.norm(want)
        np.testing.assert_allclose(v.direction, want, atol=1e-5 * np.abs(want).max())  # 1e-6


def test_twice_the_amplitude_is_the_same_vector(zoo, rng):
    model = zoo.engine("llama3")
    sae = random_sae(rng, 36, 60)
    arrays = 2 * sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, 2 * sae.threshold
    double = vs.sae.SAE(*arrays, site=sae.site)
    pairs = made_pairs(rng, 257)
    one, two = atoms(model, sae, pairs), atoms(model, double, pairs)
    assert one.meta["atoms"]["features"] == two.meta["atoms"]["features"]
    assert two.meta["atoms"]["norm"] == pytest.approx(2 * one.meta["atoms"]["norm"], rel=1e-6)
    np.testing.assert_allclose(two.direction, one.direction, rtol=1e-6)


def test_batches_and_memory_change_nothing(zoo, rng, monkeypatch):
    model = zoo.engine("gemma2")
    sae = random_sae(rng, model.config.d_model, 200)
    pairs = made_pairs(rng, model.config.d_vocab, 9)
    seen = []
    v = vs.sae.target_atoms(model, sae, pairs, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1] == (18, 18)
    monkeypatch.setattr("vksteer.sae.atoms.GROUP_TOKENS", 5)
    monkeypatch.setattr("vksteer.inputs.dosing.PASS_TOKENS", 7)
    few = atoms(model, sae, pairs, max_memory=12_000)
    assert few.direction.tobytes() == v.direction.tobytes() and few.meta == v.meta


def test_the_vector_steers_saves_and_reads_texts(zoo, rng, tmp_path):
    model = zoo.engine("llama3", "chat")
    sae = random_sae(rng, 36, 60)
    pairs = [("a question", "yes I can", "no"), ("b", "yes", [5, 9])]
    v = atoms(model, sae, pairs, keep=0.8)
    v.check(model)
    rows = model.chat_tokens(["a question", "b"])
    given = [
        (rows[0], *(model.tokenizer.encode(t, add_bos=False) for t in pairs[0][1:])),
        (rows[1], model.tokenizer.encode("yes", add_bos=False), [5, 9]),
    ]
    np.testing.assert_array_equal(atoms(model, sae, given, keep=0.8).direction, v.direction)
    for ending in ("safetensors", "npz", "gguf"):
        v.save(tmp_path / f"v.{ending}")
        read = vs.SteeringVector.load(tmp_path / f"v.{ending}")
        np.testing.assert_array_equal(read.direction, v.direction)
    assert vs.SteeringVector.load(tmp_path / "v.npz").meta["atoms"] == v.meta["atoms"]
    plain = model.generate(["a question"], max_new_tokens=4, progress=False)
    model.generate(["a question"], max_new_tokens=4, edits=[vs.Steer(v, 3.0)], progress=False)
    off = model.generate(["a question"], max_new_tokens=4, edits=[vs.Steer(v, 0.0)], progress=False)
    assert off[0].tokens.tolist() == plain[0].tokens.tolist()


def test_an_interrupt_leaves_the_model_usable(zoo, rng, monkeypatch):
    model = zoo.engine("llama3")
    sae = random_sae(rng, 36, 60)
    pairs = made_pairs(rng, 257)
    before = atoms(model, sae, pairs).direction

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.sae.target_atoms(model, sae, pairs, progress=stop)
    np.testing.assert_array_equal(atoms(model, sae, pairs).direction, before)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(d=35), {}, "width 35, the model has width 36"),
        (dict(layer=9), {}, r"blocks\.8\.hook_resid_post.*4 layers"),
        (dict(site=None), {}, "does not say what it encodes"),
        (dict(site="blocks.1.hook_mlp_out"), {}, "between blocks"),
        ({}, dict(pairs=[]), "pairs is empty"),
        ({}, dict(pairs=[([5], [6])]), r"pairs\[0\] must be"),
        ({}, dict(pairs=[([5], [6], [])]), r"pairs\[0\] rejected\[0\] is \[\]"),
        ({}, dict(pairs=[([5], [6], "text")]), "no tokenizer"),
        ({}, dict(pairs=[([], [6], [7])]), "prompts of pairs"),
        ({}, dict(pairs=[([5] * 9000, [6], [7])]), "context"),
        ({}, dict(pairs=[([5], [6] * 9000, [7])]), "pairs.0. chosen.*context"),
        ({}, dict(keep=2), "keep must be"),
        ({}, dict(ties=None), "ties=None"),
        ({}, dict(max_memory=1), "give at least"),
        ({}, dict(pairs=[([5], [6], [6])]), "the same mean activation"),
        (dict(threshold=INF), {}, "no feature passed: 0 kept of 20, 0 scores"),
    ],
)
def test_refusals(zoo, rng, change, options, message):
    sae = random_sae(rng, change.pop("d", 36), 20, **change)
    pairs = options.pop("pairs", [([5], [6, 7], [8])])
    with pytest.raises(ValueError, match=message):
        atoms(zoo.engine("llama3"), sae, pairs, **options)
