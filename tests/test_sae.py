"""Sparse autoencoders: what they compute, their files, and encoding on the device."""

from __future__ import annotations

import json
import warnings
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

import vksteer as vs
from op_bench import same_bits
from vksteer.sae.encoding import Encoder

KINDS = ("jumprelu", "relu", "topk", "batchtopk", "gated")


def made(rng, d, f, kind="jumprelu", site="blocks.1.hook_resid_post", **more):
    """A random autoencoder whose features fire for about a quarter of normal inputs."""
    options = {
        "jumprelu": dict(threshold=rng.uniform(0.3, 1, f)),
        "batchtopk": dict(threshold=0.6),
        "topk": dict(k=min(f, 5)),
        "gated": dict(r_mag=rng.standard_normal(f) / 4, b_mag=rng.standard_normal(f) / 4),
        "relu": {},
    }[kind]
    return vs.sae.SAE(
        W_enc=rng.standard_normal((d, f)) / np.sqrt(d),
        b_enc=rng.standard_normal(f) / 4 - 0.3,
        W_dec=rng.standard_normal((f, d)) / np.sqrt(d),
        b_dec=rng.standard_normal(d) / 4,
        kind=kind,
        site=site,
        **{**options, **more},
    )


def expected(sae, h):
    """The features in float64, written from the papers' equations."""
    x = np.asarray(h, np.float64) - (sae.b_dec if sae.subtract_b_dec else 0)
    product = x @ sae.W_enc.astype(np.float64)
    u = product + sae.b_enc
    if sae.kind == "relu":
        return np.maximum(u, 0)
    if sae.kind == "gated":
        return (u > 0) * np.maximum(product * np.exp(sae.r_mag.astype(np.float64)) + sae.b_mag, 0)
    if sae.kind == "topk":
        kth = np.sort(u, axis=-1)[..., -sae.k, None]
        return np.where(u >= kth, np.maximum(u, 0), 0)
    return np.where(u > sae.threshold, u, 0)


def summed(sae, model, h, counts, **more):
    segments = np.split(h, np.cumsum(counts)[:-1])
    return Encoder(model, sae, **more).sums(segments)


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_and_decode(rng, kind, subtract):
    sae = made(rng, 12, 40, kind, subtract_b_dec=subtract)
    h = rng.standard_normal((3, 5, 12)).astype(np.float32)
    z = sae.encode(h)
    assert z.shape == (3, 5, 40) and z.dtype == np.float32
    np.testing.assert_allclose(z, expected(sae, h), atol=2e-6)  # 4e-7
    np.testing.assert_allclose(
        sae.decode(z), z.astype(np.float64) @ sae.W_dec + sae.b_dec, atol=2e-6
    )
    assert sae.encode(h[0, 0]).shape == (40,)


def test_a_value_at_the_threshold_is_0():
    sae = vs.sae.SAE(np.eye(4), np.zeros(4), np.eye(4), np.zeros(4), [0.5, 0.5, -1, -np.inf])
    assert sae.encode([0.5, 0.25, -0.5, -3]).tolist() == [0, 0, -0.5, -3]


def test_encode_in_tiles_gives_the_same(rng, monkeypatch):
    sae = made(rng, 12, 40)
    h = rng.standard_normal((50, 12)).astype(np.float32)
    whole = sae.encode(h)
    monkeypatch.setattr("vksteer.sae.autoencoder.TILE_BYTES", 7 * 4 * 40)
    np.testing.assert_allclose(sae.encode(h), whole, atol=1e-6)  # BLAS may sum otherwise


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(kind="vector quantised"), "kind="),
        (dict(W_dec=np.ones((5, 3))), r"W_dec must be \[F, D\]"),
        (dict(b_enc=np.ones(3)), "b_enc must be"),
        (dict(b_dec=np.ones(4)), "b_dec must be"),
        (dict(threshold=np.ones(3)), "threshold must be"),
        (dict(threshold=None), "needs threshold"),
        (dict(kind="relu"), "has no threshold"),
        (dict(kind="topk", threshold=None), "needs k"),
        (dict(kind="topk", threshold=None, k=5), "has 4 features"),
        (dict(kind="gated", threshold=None), "needs r_mag"),
        (dict(W_enc=np.full((3, 4), np.nan)), "W_enc holds 12 values"),
        (dict(threshold=np.nan), "threshold holds"),
        (dict(site="layer 3"), "is no site"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(change, message):
    arrays = dict(
        W_enc=np.ones((3, 4)),
        b_enc=np.ones(4),
        W_dec=np.ones((4, 3)),
        b_dec=np.ones(3),
        threshold=np.ones(4),
    )
    with pytest.raises(ValueError, match=message):
        vs.sae.SAE(**{**arrays, **change})


# -- files -----------------------------------------------------------------------------------------

ARRAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def saved_npz(path, sae, **change):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(sae, name) for name in ARRAYS}
    np.savez(path, **{name: a for name, a in {**arrays, **change}.items() if a is not None})
    return path


def saved_folder(folder, sae, config=None, **change):
    """A folder as SAELens writes it."""
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec", "b_enc": "b_enc"}
    if sae.kind == "gated":
        names |= {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
    if sae.threshold is not None:
        names["threshold"] = "threshold"
    tensors = {to: np.array(getattr(sae, name)) for name, to in names.items()} | change
    tensors = {name: array for name, array in tensors.items() if array is not None}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    architecture = {"relu": "standard"}.get(sae.kind, sae.kind)
    cfg = dict(
        architecture=architecture,
        d_in=sae.width,
        d_sae=sae.n_features,
        dtype="float32",
        apply_b_dec_to_input=sae.subtract_b_dec,
        normalize_activations="none",
        reshape_activations="none",
        metadata={"hook_name": sae.site, "model_name": "tiny", "prepend_bos": True},
    )
    if sae.k is not None:
        cfg["k"] = sae.k
    cfg |= config or {}
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if v != "absent"}))
    return folder


def same(a, b):
    assert (a.kind, a.site, a.subtract_b_dec, a.k) == (b.kind, b.site, b.subtract_b_dec, b.k)
    for name in (*ARRAYS, "r_mag", "b_mag"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None)
        if x is not None:
            assert same_bits(x, y)


def test_gemma_scope(rng, tmp_path):
    sae = made(rng, 6, 9, site="blocks.20.hook_resid_post")
    folder = tmp_path / "gemma-scope-9b-it-res/layer_20/width_16k/average_l0_91"
    path = saved_npz(folder / "params.npz", sae)
    same(vs.sae.load(path), sae)
    same(vs.sae.load(path.parent), sae)
    bare = saved_npz(tmp_path / "other.npz", sae)
    assert vs.sae.load(bare).site is None
    same(vs.sae.load(bare, site=sae.site), sae)
    with pytest.raises(ValueError, match=r"encodes blocks\.20\.hook_resid_post"):
        vs.sae.load(path, site="blocks.19.hook_resid_post")
    attention = saved_npz(tmp_path / "gemma-scope-2b-pt-att/layer_20/a/params.npz", sae)
    assert vs.sae.load(attention).site is None
    half = saved_npz(tmp_path / "half.npz", sae, W_enc=np.asfortranarray(sae.W_enc, np.float16))
    np.testing.assert_array_equal(vs.sae.load(half).W_enc, sae.W_enc.astype(np.float16))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(W_dec=np.ones((8, 6))), r"W_dec must be"),
        (dict(threshold=None), "threshold missing"),
        (dict(extra=np.ones(3)), "extra would be ignored"),
        (dict(W_enc=np.array([{}], dtype=object)), "damaged npz file"),
        (dict(W_enc=np.array(["text"])), "not a matrix"),
    ],
)
def test_gemma_scope_refusals(rng, tmp_path, change, message):
    path = saved_npz(tmp_path / "params.npz", made(rng, 6, 9), **change)
    with pytest.raises((ValueError, vs.ModelError), match=message):
        vs.sae.load(path)


def test_damaged_npz_files_are_refused(rng, tmp_path):
    """Every byte of the headers changed, every length cut: an error of ours or the same arrays'
    shapes, never another exception.
    """
    path = saved_npz(tmp_path / "params.npz", made(rng, 2, 3))
    data = path.read_bytes()
    damaged = [data[:n] for n in range(0, len(data), 61)]
    for at in range(0, len(data), 3):
        damaged.append(data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :])
    refused = 0
    for case in damaged:
        path.write_bytes(case)
        try:
            vs.sae.load(path)
        except (ValueError, vs.ModelError):
            refused += 1
    assert refused > len(damaged) * 0.7 and len(damaged) > 400
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("W_enc.npy", bytes(50 << 20))
    with pytest.raises(vs.ModelError, match="claims 52,428,800 bytes"):
        vs.sae.load(path)


@pytest.mark.parametrize("subtract", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saelens_folders(rng, tmp_path, kind, subtract):
    sae = made(rng, 6, 9, kind, subtract_b_dec=subtract)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(vs.sae.load(saved_folder(tmp_path / kind, sae)), sae)


def test_old_keys_of_saelens(rng, tmp_path):
    """hook_point, activation_fn topk in a standard architecture, no field for b_dec (which means
    that it is subtracted), one threshold for all.
    """
    sae = made(rng, 6, 9, "topk", subtract_b_dec=True)
    config = dict(architecture="standard", activation_fn_str="topk")
    config |= dict(activation_fn_kwargs={"k": 5}, k="absent", apply_b_dec_to_input="absent")
    config |= dict(metadata="absent", hook_point=sae.site, hook_point_layer=1, lr=0.1)
    same(vs.sae.load(saved_folder(tmp_path / "a", sae, config)), sae)
    sae = made(rng, 6, 9, "batchtopk")
    change = dict(threshold=None, topk_threshold=np.float32([0.6]))
    same(vs.sae.load(saved_folder(tmp_path / "b", sae, **change)), sae)


def test_factors_are_folded_in(rng, tmp_path):
    sae = made(rng, 6, 9, "topk")
    h = rng.standard_normal((7, 6)).astype(np.float32)
    rescaled = saved_folder(tmp_path / "a", sae, dict(rescale_acts_by_decoder_norm=True))
    norms = np.linalg.norm(sae.W_dec, axis=1)
    u = (h @ sae.W_enc + sae.b_enc) * norms
    read = vs.sae.load(rescaled)
    z = np.where(u >= np.sort(u, axis=1)[:, -5, None], np.maximum(u, 0), 0)
    np.testing.assert_allclose(read.encode(h), z, atol=2e-6)
    np.testing.assert_allclose(read.decode(z), z / norms @ sae.W_dec + sae.b_dec, atol=2e-6)
    averaged = saved_folder(
        tmp_path / "b", sae, dict(normalize_activations="expected_average_only_in")
    )
    with pytest.raises(ValueError, match="Give it as scale="):
        vs.sae.load(averaged)
    read = vs.sae.load(averaged, scale=3.0)
    np.testing.assert_allclose(read.encode(h), sae.encode(3 * h), atol=3e-6)
    np.testing.assert_allclose(read.decode(z), sae.decode(z) / 3, atol=1e-6)


@pytest.mark.parametrize(
    "config, change, message",
    [
        (dict(architecture="transcoder"), {}, "architecture 'transcoder' is not known"),
        (dict(architecture=["topk"]), {}, "is not known"),
        (dict(activation_fn="tanh-relu"), {}, "activation_fn 'tanh-relu'"),
        (dict(normalize_activations="layer_norm"), {}, "normalize_activations='layer_norm'"),
        (
            dict(normalize_activations="constant_norm_rescale"),
            {},
            "normalize_activations='constant_norm_rescale'",
        ),
        (dict(finetuning_scaling_factor=True), {}, "finetuning_scaling_factor=True"),
        (dict(reshape_activations="hook_z"), {}, "reshape_activations='hook_z'"),
        (dict(metadata={"hook_name": "x", "hook_head_index": 3}), {}, "hook_head_index=3"),
        (dict(rescale_acts_by_decoder_norm=True), {}, "for topk only"),
        (dict(d_in=7), {}, "d_in=7"),
        (dict(d_sae=7), {}, "d_sae=7"),
        (dict(apply_b_dec_to_input="yes"), {}, "must be true or false"),
        (dict(hook_layer=3), {}, "hook_layer=3 contradicts"),
        (dict(metadata=[1]), {}, "metadata must be an object"),
        ({}, dict(threshold=None), "threshold missing"),
        ({}, dict(scaling_factor=np.ones(9, np.float32)), "scaling_factor would be ignored"),
        ({}, dict(b_enc=np.ones(8, np.float32)), "b_enc must be"),
        ({}, dict(W_enc=np.ones((6, 9))), "F64"),
    ],
)
def test_saelens_refusals(rng, tmp_path, config, change, message):
    folder = saved_folder(tmp_path / "sae", made(rng, 6, 9), config, **change)
    with pytest.raises((ValueError, vs.ModelError), match=message):
        vs.sae.load(folder)


def test_unknown_keys_and_missing_files(rng, tmp_path):
    folder = saved_folder(tmp_path / "sae", made(rng, 6, 9), dict(whitening=2, sparkle=None))
    with pytest.warns(UserWarning, match="whitening not known"):
        vs.sae.load(folder)
    with pytest.raises(ValueError, match="are not normalised"):
        vs.sae.load(folder, scale=2)
    (folder / "sae_weights.safetensors").write_bytes(b"\x10")
    with pytest.raises(vs.ModelError):
        vs.sae.load(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(vs.ModelError, match="is missing"):
        vs.sae.load(folder)
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(vs.ModelError, match="there is no autoencoder"):
            vs.sae.load(path)


# -- the device ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_sums_on_the_device(zoo, rng, kind):
    """Segments that end inside, at and behind a tile's end; tiles of all columns and of few."""
    model = zoo.engine("llama3")
    sae = made(rng, 36, 75, kind, subtract_b_dec=kind == "gated")
    counts = (3, 17, 1, 40, 29)
    h = rng.standard_normal((sum(counts), 36)).astype(np.float32)
    z = np.split(expected(sae, h), np.cumsum(counts)[:-1])
    want = np.stack([part.sum(axis=0) for part in z])
    found = [summed(sae, model, h, counts, max_memory=m) for m in (256 << 20, 20_000, 9_000)]
    np.testing.assert_allclose(found[0], want, atol=2e-5)  # 3e-6
    for other in found[1:]:
        np.testing.assert_array_equal(other, found[0])
    alone = summed(sae, model, h[20:21], (1,))
    np.testing.assert_array_equal(alone[0], found[0][2])


@pytest.mark.parametrize("kind", KINDS)
def test_largest_features_on_the_device(zoo, rng, kind):
    model = zoo.engine("llama3")
    sae = made(rng, 36, 75, kind)
    h = rng.standard_normal((50, 36)).astype(np.float32)
    z = expected(sae, h)
    for top in (1, 8, 75, 80):
        values, features = Encoder(model, sae).top(h, top)
        assert values.shape == (50, top)
        n = min(top, 75)
        for row, v, f in zip(z, values, features):
            order = np.argsort(-row, kind="stable")[:n]
            order = order[row[order] != 0]
            np.testing.assert_allclose(v[: len(order)], row[order], atol=5e-6)
            assert (np.diff(v[: len(order)]) <= 0).all()
            np.testing.assert_allclose(row[f[: len(order)]], v[: len(order)], atol=5e-6)
            assert (f[len(order) :] == -1).all() and (v[len(order) :] == 0).all()
        few = Encoder(model, sae, 9_000).top(h, top)
        assert same_bits(few[0], values)
        np.testing.assert_array_equal(few[1], features)


def test_memory_is_bounded(zoo, rng):
    """3,000 tokens of 4,096 features would take 49 MB; the device holds at most 2 MB beside the
    encoder, the host no more.
    """
    import tracemalloc

    model = zoo.engine("llama3")
    sae = made(rng, 36, 4096)
    h = rng.standard_normal((3000, 36)).astype(np.float32)
    before = model._engine_device.allocated_bytes
    encoder = Encoder(model, sae, 2 << 20)
    held = model._engine_device.allocated_bytes - before - 4 * 4096 * (48 + 3)
    assert 0 < held < 1 << 20
    tracemalloc.start()
    encoder.sums([h[:1700], h[1700:]])
    encoder.top(h, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * h.nbytes < 2 << 20
    with pytest.raises(ValueError, match="give at least"):
        Encoder(model, sae, 10_000)
    with pytest.raises(ValueError, match="at most 512"):
        Encoder(model, made(rng, 36, 600, "topk", k=600))


def test_the_bundled_autoencoder(rng):
    """What its report says of the test split, on a part of it."""
    from vksteer.data import world

    sae = vs.sae.load("tiny-llama-chat")
    assert (sae.width, sae.n_features, sae.layer, sae.kind) == (128, 512, 7, "jumprelu")
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as model:
        prompts = [r.prompt for r in world.tiny("test", 6, 6)]
        run = model.run(prompts, capture=[sae.site], logits=None)
        found = vs.sae.features(model, prompts, sae, top=40, progress=False)
    keep = run.mask.copy()
    keep[np.arange(len(keep)), keep.argmax(axis=1)] = False  # training left the first token out
    h = run[sae.site][keep]
    z = sae.encode(h)
    left = ((h - sae.decode(z)).var(axis=0).sum()) / h.var(axis=0).sum()
    assert left < 0.1 and 6 < (z != 0).sum(axis=1).mean() < 20  # 0.060, 12.9
    assert (found.features[keep] >= 0).sum() == (z != 0).sum()


# -- features of a text ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama3", "gemma2", "qwen3"])
@pytest.mark.parametrize("site", ["blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out"])
def test_features_of_every_token(zoo, rng, name, site):
    model = zoo.engine(name)
    sae = made(rng, model.config.d_model, 64, site=site)
    prompts = [[5, 9, 7, 30], [8, 2], list(range(3, 20))]
    found = vs.sae.features(model, prompts, sae, top=6, progress=False)
    assert found.features.shape == found.values.shape == (3, 17, 6)
    assert (
        len(found) == 3 and not found.mask[0, :13].any() and found.tokens[1, -2:].tolist() == [8, 2]
    )
    h = model.run(prompts, capture=[site], logits=None)[site]
    z = expected(sae, h)
    largest = -np.sort(-z, axis=-1)[..., :6]
    np.testing.assert_allclose(
        found.values[found.mask], largest[found.mask], rtol=2e-5, atol=2e-5 * np.abs(z).max()
    )
    assert (found.features[~found.mask] == -1).all()
    for i, prompt in enumerate(prompts):
        alone = vs.sae.features(model, [prompt], sae, top=6, progress=False)
        assert same_bits(alone.values[0], found.values[i, -len(prompt) :])
    feature = int(found.features[1, -1, 0])
    hits = found.of(feature)
    assert len(hits) == (found.features == feature).sum()
    for b, s, value in hits:
        column = 17 - len(prompts[b]) + s
        assert value == found.values[b, column, found.features[b, column] == feature]


def test_views_of_features(zoo, rng):
    model = zoo.engine("llama3", "chat")
    sae = made(rng, 36, 20)
    found = vs.sae.features(model, ["a <b>", "c"], sae, top=3, progress=False)
    page = found._repr_html_()
    n = int(found.mask.sum())
    assert page.count("<table>") == 2 and page.count("<tr>") == n and "<b>" not in page
    assert page.count("<td") == int((found.features >= 0).sum())
    assert found.to_markdown(1, top=1).count("\n") == 1 + int(found.mask[1].sum())
    assert len(json.dumps(found.to_dict())) > 100 and "top=3" in repr(found)
    axes = found.plot(0).axes[0]
    assert axes.get_images()[0].get_array().shape[1] == found.mask[0].sum()


def test_steering_by_a_feature(zoo, rng):
    model = zoo.engine("llama3")
    sae = made(rng, 36, 20)
    v = sae.vector(7)
    assert v.layer == sae.layer == 2 and v.meta["feature"] == 7
    np.testing.assert_array_equal(v.direction, sae.W_dec[7])
    assert sae.vector(7, norm=3.0).norm == pytest.approx(3, rel=1e-6)
    plain = model.run([[5, 9]], logits="last").logits
    steered = model.run([[5, 9]], edits=[vs.Steer(v, 4.0)], logits="last").logits
    assert np.abs(plain - steered).max() > 0.01
    for feature, norm in ((20, None), (-1, None), (1, 0)):
        with pytest.raises(ValueError):
            sae.vector(feature, norm)


@pytest.mark.parametrize(
    "change, options, message",
    [
        (dict(site=None), {}, "does not say what it encodes"),
        (dict(site="blocks.4.hook_resid_pre"), {}, r"blocks\.4\.hook_resid_pre.*4 layers"),
        (dict(d=35), {}, "width 35, the model has width 36"),
        (dict(site="blocks.1.attn.hook_z"), {}, "without heads"),
        (dict(site="blocks.1.attn.hook_result"), {}, "without heads"),
        (dict(site="blocks.1.mlp.hook_post"), {}, "without heads"),
        ({}, dict(top=0), "top"),
        ({}, dict(top=513), "at most 512"),
        ({}, dict(prompts=[]), "prompts is empty"),
    ],
)
def test_refusals_of_features(zoo, rng, change, options, message):
    sae = made(rng, change.pop("d", 36), 20, **change)
    arguments = dict(prompts=[[5]], sae=sae) | options
    with pytest.raises(ValueError, match=message):
        vs.sae.features(zoo.engine("llama3"), progress=False, **arguments)
