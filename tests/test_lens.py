"""The logit lens against float64: values within 1e-3 of the largest (worst met on lavapipe:
1.0e-6), indices equal but for named ties, on random models of every family.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from oracle.compare import assert_same_bits
from oracle.families import FAMILIES

BOUND = 1e-3
#: Tokens whose float64 values differ by less, as a share of the largest value, may change places.
TIE = 1e-5


def reference(zoo, name):
    """(final gain [D] times the logits' factor, W_U [V, D], eps, whether the final norm takes the
    mean out) in float64.
    """
    ref = zoo.reference(name)
    return (
        ref.facts.logit_scale * (ref.w["model.norm.weight"] + ref.facts.norm_offset).numpy(),
        ref.unembed.numpy(),
        ref.facts.eps,
        ref.facts.norm == "layer",
    )


def scores(vectors, gain, unembed, eps, by, centred=False):
    """The value of every token: float64 [n, V]. Biases, the same for all vectors, are left out."""
    x = vectors.astype(np.float64)
    x = x - x.mean(-1, keepdims=True) if centred else x
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain
    logits = normed @ unembed.T
    return (
        logits
        if by == "logit"
        else logits
        / np.linalg.norm(normed, axis=-1, keepdims=True)
        / np.linalg.norm(unembed, axis=-1)
    )


def agree(what, lens, want):
    """Compares values, order and indices; near ties are reported as a warning."""
    tokens, values = (
        lens.tokens.reshape(-1, lens.tokens.shape[-1]),
        lens.values.reshape(-1, lens.tokens.shape[-1]),
    )
    top, largest = tokens.shape[1], np.abs(want).max()
    order = np.argsort(-want, axis=1, kind="stable")[:, :top]
    assert (np.diff(values, axis=1) <= 0).all() and all(
        len(set(row)) == top for row in tokens.tolist()
    )
    error = np.abs(values - np.take_along_axis(want, order, 1)).max() / largest
    assert error <= BOUND, f"{what}: values differ by {error:.2g} of the largest"
    ties = []
    for i, rank in np.argwhere(tokens != order):
        apart = abs(want[i, tokens[i, rank]] - want[i, order[i, rank]]) / largest
        assert apart < TIE, (
            f"{what}: vector {i}, rank {rank}: token {tokens[i, rank]}, expected {order[i, rank]},"
            f" {apart:.3g} apart"
        )
        ties.append((int(i), int(rank), int(tokens[i, rank]), int(order[i, rank]), float(apart)))
    if ties:
        warnings.warn(
            f"{what}: near ties (vector, rank, engine, oracle, apart): {ties}", stacklevel=2
        )
    return error


@pytest.mark.parametrize("by", ["logit", "cosine"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(zoo, rng, name, by):
    import vksteer as vs

    gain, unembed, eps, centred = reference(zoo, name)
    model = zoo.engine(name)
    V, D = unembed.shape
    for n, top in ((1, 1), (3, 20), (17, V), (2, 40)):
        vectors = (rng.standard_normal((n, D)) * 10.0 ** rng.uniform(-2, 3, (n, 1))).astype(
            np.float32
        )
        lens = vs.ov.logit_lens(model, vectors, top, by)
        assert (
            lens.tokens.shape == lens.values.shape == (n, top)
            and lens.tokens.dtype == np.int32
            and lens.values.dtype == np.float32
        )
        want = scores(vectors, gain, unembed, eps, by, centred)
        agree(f"{name}, {n} vectors, {by}", lens, want)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi", "gptj", "opt"])
def test_biases_are_left_out(zoo, rng, name):
    """A vector is read as a direction: what it promotes, its opposite suppresses, and the mean of
    its entries, which LayerNorm takes away, changes nothing.
    """
    import vksteer as vs

    model = zoo.engine(name)
    c = model.config
    assert c.norm_bias and model._engine.vector("b_ln_final", -1).any()
    vector = rng.standard_normal(c.d_model).astype(np.float32)
    some = [vs.ov.logit_lens(model, v, c.d_vocab) for v in (vector, -vector, vector + 3)]
    values = [np.empty(c.d_vocab, np.float32) for _ in some]
    for lens, by_token in zip(some, values):
        by_token[lens.tokens] = lens.values
    largest = np.abs(values[0]).max()
    np.testing.assert_array_equal(values[1], -values[0])
    np.testing.assert_allclose(values[2], values[0], atol=1e-5 * largest)
    for what in (np.ones(c.d_model), -0.25 * np.ones((2, 3, c.d_model))):
        with pytest.raises(ValueError, match="LayerNorm leaves nothing"):
            vs.ov.logit_lens(model, what)
        with pytest.raises(ValueError, match="LayerNorm subtracts their mean"):
            vs.ov.steering_value_vectors(model, vs.SteeringVector(what.flat[: c.d_model], 1))


@pytest.mark.parametrize("by", ["logit", "cosine"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_wide_vocabulary_and_stored_weights(zoo, rng, dtype, by):
    """The reference takes the weights from the engine, which rounded them once."""
    import vksteer as vs

    model = zoo.engine("wide", dtype=dtype)
    c = model.config
    unembed = model._engine.rows("unembed", -1, 0, c.d_vocab).astype(np.float64)
    vectors = rng.standard_normal((4, 5, c.d_model)).astype(np.float32)
    lens = vs.ov.logit_lens(model, vectors, 20, by)
    assert lens.tokens.shape == (4, 5, 20)
    agree(
        f"{dtype}, {by}",
        lens,
        scores(
            vectors.reshape(20, -1),
            model._engine.vector("ln_final", -1).astype(np.float64),
            unembed,
            c.norm_eps,
            by,
        ),
    )


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """A model whose vocabulary takes several tiles (8192 columns each), the last one short."""
    import torch
    import transformers

    import vksteer as vs

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiles")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=32,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            vocab_size=20011,
            num_hidden_layers=1,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).save_pretrained(folder)
    with vs.Model.from_pretrained(str(folder), progress=False) as model:
        yield model


def test_many_vectors_over_several_tiles(tiles, rng):
    """More vectors than the engine takes at once; each is bit-identical alone."""
    import vksteer as vs

    vectors, seen = rng.standard_normal((2500, 32)).astype(np.float32), []
    lens = vs.ov.logit_lens(tiles, vectors, 30, progress=lambda *a: seen.append(a))
    assert seen == [(1024, 2500), (2048, 2500), (2500, 2500)]
    unembed = tiles._engine.rows("unembed", -1, 0, 20011).astype(np.float64)
    gain = tiles._engine.vector("ln_final", -1).astype(np.float64)
    some = np.r_[0:60, 1000:1060, 2440:2500]
    agree(
        "180 of 2500 vectors",
        vs.ov.Lens(tiles, lens.tokens[some], lens.values[some], "logit", [list(map(str, some))]),
        scores(vectors[some], gain, unembed, tiles.config.norm_eps, "logit"),
    )
    for at in (slice(0, 1), slice(1023, 1025), slice(2000, 2007)):
        alone = vs.ov.logit_lens(tiles, vectors[at], 30)
        np.testing.assert_array_equal(alone.tokens, lens.tokens[at])
        assert_same_bits("values", alone.values, lens.values[at])
    assert_same_bits(
        "again", vs.ov.logit_lens(tiles, vectors, 30, progress=False).values, lens.values
    )
    for by in ("logit", "cosine"):
        long = vs.ov.logit_lens(tiles, vectors[:5], 512, by)
        agree(
            f"512 tokens by {by}",
            long,
            scores(vectors[:5], gain, unembed, tiles.config.norm_eps, by),
        )
        np.testing.assert_array_equal(
            vs.ov.logit_lens(tiles, vectors[:5], 20, by).tokens, long.tokens[:, :20]
        )


def test_memory_of_a_lens_is_given_back_and_nothing_is_whole(tiles, rng):
    import vksteer as vs

    device = tiles._engine_device
    vs.ov.logit_lens(tiles, rng.standard_normal((1, 32)), 5, "cosine")  # the row norms stay
    held = device.allocated_bytes
    vs.ov.logit_lens(tiles, rng.standard_normal((2500, 32)), 5, "cosine", progress=False)
    assert device.allocated_bytes == held


def test_an_interrupt_ends_a_long_lens(tiles, rng):
    """A SIGINT raises KeyboardInterrupt soon, and the model goes on working."""
    import os
    import signal
    import threading
    import time

    import vksteer as vs

    vectors, pressed = rng.standard_normal((4000, 32)).astype(np.float32), []
    want = vs.ov.logit_lens(tiles, vectors[:3])
    timer = threading.Timer(
        0.3, lambda: (pressed.append(time.process_time()), os.kill(os.getpid(), signal.SIGINT))
    )
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        vs.ov.logit_lens(tiles, vectors, 512, progress=False)
    # Seconds of processor time, about one second on two idle cores, so that load does not matter.
    assert time.process_time() - pressed[0] < 2.5
    assert_same_bits("afterwards", vs.ov.logit_lens(tiles, vectors[:3]).values, want.values)


def test_what_may_be_read(zoo, rng):
    """Arrays of any leading shape, vectors, lists of vectors, value vectors with their labels,
    float64, lists of lists.
    """
    import vksteer as vs

    model = zoo.engine("gemma2")
    D = model.config.d_model
    x = rng.standard_normal((2, 3, D))
    whole = vs.ov.logit_lens(model, x, 5)
    assert whole.tokens.shape == (2, 3, 5) and whole.labels == [["0", "1"], ["0", "1", "2"]]
    one = vs.ov.logit_lens(model, x[1, 2], 5)
    assert one.tokens.shape == (5,) and one.labels == [] and one.label(()) == ""
    np.testing.assert_array_equal(one.tokens, whole.tokens[1, 2])
    np.testing.assert_array_equal(vs.ov.logit_lens(model, x.tolist(), 5).tokens, whole.tokens)
    v, u = vs.SteeringVector(x[0, 0], 1, method="dim"), vs.SteeringVector(x[0, 1], 2)
    np.testing.assert_array_equal(vs.ov.logit_lens(model, v, 5).tokens, whole.tokens[0, 0])
    both = vs.ov.logit_lens(model, [v, u], 5)
    np.testing.assert_array_equal(both.tokens, whole.tokens[0, :2])
    assert both.labels == [["dim", "vector 1"]]
    svv = vs.ov.steering_value_vectors(model, v)
    lens = vs.ov.logit_lens(model, svv, 5)
    assert lens.label((1, 2)) == "L2 H2"
    np.testing.assert_array_equal(lens.tokens, vs.ov.logit_lens(model, svv.values, 5).tokens)
    # A negated value vector puts the tokens in the opposite order.
    np.testing.assert_array_equal(
        vs.ov.logit_lens(model, svv.negated, 257).tokens[0, 0],
        vs.ov.logit_lens(model, svv, 257).tokens[0, 0][::-1],
    )


# -- texts -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat(zoo):
    return zoo.engine("llama2", "chat")


def test_texts_and_search(chat, rng):
    import vksteer as vs

    lens = vs.ov.logit_lens(
        chat, rng.standard_normal((3, 5, 40)), 20, labels=[["a", "b", "c"], list("vwxyz")]
    )
    texts = lens.text()
    assert np.shape(texts) == (3, 5, 20) and texts[1][2][3] == chat.tokenizer.token(
        int(lens.tokens[1, 2, 3])
    )
    sought = texts[1][2][3]
    hits = lens.find(sought.upper())
    assert (
        hits
        and all(sought.lower() in hit.text.lower() for hit in hits)
        and hits == sorted(hits, key=lambda hit: (hit.index, hit.rank))
    )
    mine = [hit for hit in hits if hit.index == (1, 2)]
    assert any(
        (hit.rank, hit.token, hit.label) == (4, lens.tokens[1, 2, 3], "b x")
        and hit.value == lens.values[1, 2, 3]
        for hit in mine
    )
    brute = [
        (n, h, r) for n, h, r in np.ndindex(3, 5, 20) if sought.lower() in texts[n][h][r].lower()
    ]
    assert [(*hit.index, hit.rank - 1) for hit in hits] == brute
    assert lens.find("no such token") == []
    for wrong in ("", 5, None):
        with pytest.raises(ValueError):
            lens.find(wrong)


def test_markdown(chat, zoo, rng):
    import vksteer as vs

    lens = vs.ov.logit_lens(
        chat,
        rng.standard_normal((3, 5, 40)),
        20,
        labels=[["L1", "L2", "L3"], [f"H{i}" for i in range(5)]],
    )
    lines = lens.to_markdown().splitlines()
    assert (
        lines[0] == "| | H0 | H1 | H2 | H3 | H4 |"
        and len(lines) == 5
        and lines[3].startswith("| L2 | ")
    )
    assert all(line.replace("\\|", "").count("|") == 7 for line in lines)
    first = lens.text()[0][0][0]
    assert "**" in lens.to_markdown(mark=first) and "**" not in lens.to_markdown(
        mark="no such token"
    )
    assert lens.to_markdown(3).count(", ") == 3 * 5 * 2
    one = vs.ov.logit_lens(chat, rng.standard_normal(40)).to_markdown(2)
    assert len(one.splitlines()) == 3 and "| vector |" in one
    # Without a tokenizer, tokens are shown as numbers.
    assert (
        len(
            vs.ov.logit_lens(zoo.engine("llama2"), rng.standard_normal((4, 40)))
            .to_markdown()
            .splitlines()
        )
        == 6
    )
    for wrong in (0, 21, 1.5):
        with pytest.raises(ValueError):
            lens.to_markdown(wrong)
    import json

    d = json.loads(json.dumps(lens.to_dict()))
    assert (
        d["texts"] == lens.text()
        and d["tokens"] == lens.tokens.tolist()
        and np.shape(d["values"]) == (3, 5, 20)
    )


def test_readable():
    from vksteer.ov.lens import readable

    assert (
        readable(" a|b\n") == "\u2423a\\|b\\n"
        and readable("") == "(nothing)"
        and readable("\x00*") == "\\u0000\\*"
    )


def test_plot(chat, rng, tmp_path):
    import vksteer as vs

    lens = vs.ov.logit_lens(chat, rng.standard_normal((3, 5, 40)), 20)
    figure = lens.plot(tmp_path / "map.png", mark=lens.text()[0][0][0])
    assert (
        (tmp_path / "map.png").stat().st_size > 5000
        and figure.axes[0].patches
        and len(figure.axes[0].texts) == 15
    )
    for vectors in (rng.standard_normal(40), rng.standard_normal((6, 40))):
        vs.ov.logit_lens(chat, vectors).plot(tmp_path / "bars.png")
        assert (tmp_path / "bars.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="two leading axes"):
        vs.ov.logit_lens(chat, rng.standard_normal((2, 2, 2, 40))).plot()


# -- refused, before any work ----------------------------------------------------------------------

ONES = np.ones(40, np.float32)


@pytest.mark.parametrize(
    "vectors, options, says",
    [
        (np.ones(41), {}, "width 40"),
        (np.ones((2, 39)), {}, "width 40"),
        (5.0, {}, "width 40"),
        ([np.ones(40), np.ones(41)], {}, "different widths"),
        ([np.ones(40), 3.0], {}, "different widths"),
        (np.zeros(40), {}, "zero"),
        (np.stack([ONES, 0 * ONES]), {}, r"\[1\] is zero"),
        (np.stack([ONES, np.nan * ONES]), {}, r"\[1\] is not finite"),
        (np.full(40, 1e39), {}, "not finite"),
        (np.ones((0, 40)), {}, "no vectors"),
        ([], {}, "width 40"),
        ("sorry", {}, "numbers"),
        (None, {}, "width 40"),
        (ONES, dict(top=0), "top"),
        (ONES, dict(top=102), "at most 101"),
        (ONES, dict(top=2.0), "top"),
        (ONES, dict(by="dot"), "by='dot'"),
        (ONES[None], dict(labels=[["a", "b"]]), "labels"),
        (ONES[None], dict(labels=[]), "labels"),
        (ONES, dict(progress="yes"), "progress"),
    ],
)
def test_refused(zoo, vectors, options, says):
    import vksteer as vs

    model = zoo.engine("llama2")
    before = model._engine.dispatches
    with pytest.raises(ValueError, match=says):
        vs.ov.logit_lens(model, vectors, **options)
    assert model._engine.dispatches == before


def test_the_engines_own_limits(zoo):
    engine = zoo.engine("llama2")._engine
    for k in (0, 513):
        with pytest.raises(ValueError):
            engine.lens(ONES, k)
    for call in (
        lambda: engine.lens(ONES[:39], 5),
        lambda: engine.lens(ONES, 102),
        lambda: engine.value_vectors(ONES[:39].copy(), 0),
        lambda: engine.value_vectors(ONES, 3),
        lambda: engine.rows("qkv", 0, 0, 91),
        lambda: engine.rows("o", 0, 40, 1),
        lambda: engine.rows("o", 0, 2**32 - 1, 2),
    ):
        with pytest.raises(ValueError):
            call()
    with pytest.raises(KeyError):
        engine.rows("nothing", 0, 0, 1)
    assert engine.rows("o", 0, 40, 0).shape == (0, 30) and engine.lens(ONES[:0], 5)[0].shape == (
        0,
        5,
    )
