"""The plan of memory and work from a configuration alone, and the report of agreement between
estimates and exact patches.
"""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle.more_families import MORE_FAMILIES
from vksteer import patching
from vksteer.circuits.graph import Graph, graph
from vksteer.patching.edge_scores import EdgeScores
from vksteer.patching.memory_plan import (
    attribution_split,
    contraction_operations,
    layouts,
    memory_bytes,
    memory_parts,
    plan,
)
from vksteer.patching.rank_agreement import agreement, average_ranks
from vksteer.runtime.memory_plan import layer_weights, row_stride

LLAMA_3B = dict(
    n_layers=28,
    n_heads=24,
    n_kv_heads=8,
    d_model=3072,
    d_head=128,
    d_mlp=8192,
    d_vocab=128256,
    n_ctx=131072,
    post_norms=False,
    attn_softcap=0.0,
    tied=True,
    window=(0,) * 28,
)
LLAMA_8B = dict(
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    d_model=4096,
    d_head=128,
    d_mlp=14336,
    d_vocab=128256,
    n_ctx=8192,
    post_norms=False,
    attn_softcap=0.0,
    tied=False,
    window=(0,) * 32,
)
TINY = dict(
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    d_model=6,
    d_head=5,
    d_mlp=7,
    d_vocab=11,
    n_ctx=64,
    post_norms=True,
    attn_softcap=0.0,
    tied=False,
    window=(0, 3, 0),
)


#: Facts that the configurations above have in common.
USUAL = dict(pre_norms=True, parallel=False, gated=True, norm_bias=False, pos_embed=False)


def config(facts, **changes):
    return SimpleNamespace(**{**USUAL, **facts, **changes})


@pytest.mark.parametrize(
    "facts, layer, parameters", [(LLAMA_3B, 12, 3.212e9), (LLAMA_8B, 12, 8.030e9)]
)
def test_big_models(facts, layer, parameters):
    p = plan(config(facts), layer, 512)
    # the sizes that the models are named after
    assert p.weights == pytest.approx(2 * parameters, rel=1e-3)
    assert p.n_edges == graph(config(facts), layer).n_edges and p.mode == "kept" and p.fits
    # Sanity of scale: a step costs about what a forward and a backward pass over the layers above
    # cost, 4 operations a weight and token.
    above = (facts["n_layers"] - layer) * layer_weights(config(facts))
    assert 0.9 < p.backward / (10 * 2 * 512 * above) < 1.3 and p.contraction < 0.1 * p.work
    text = str(p)
    assert (
        "512 positions" in text
        and f"{p.n_edges} edges" in text
        and "TFLOP" in text
        and "GB" in text
    )
    assert (
        json.loads(json.dumps(p.to_dict()))["total"] == p.total and p.seconds(1e12) == p.work / 1e12
    )


def test_memory_is_the_sum_of_its_parts():
    """By hand: D 6, H 4, G 2, dh 5, F 7, post-norms, two layers; every row takes a
    multiple of 16 floats.
    """
    c = config(TINY)
    assert [row_stride(n) for n in (1, 16, 17, 1024, 2048)] == [16, 16, 32, 1040, 2064]
    parts = lambda c, *arguments: memory_parts(c, 32 << 20, 18, 9, 9, 1, 9, 10, *arguments)
    working, tape, sums, rows = parts(c, False, True)
    d, q, qkv, gate_up, mlp, scores = 16, 32, 48, 16, 16, 4 * 4 * 16
    assert working == (
        4 * 18 * (4 * d + qkv + q + gate_up + mlp + 1)
        + (13 << 20)
        + 18 * scores
        + (1 << 20)  # uploads
        + 2 * 2 * 18 * 2 * 5 * 4  # keys and values
        + 9 * 2 * 4 * (d + 16)  # final rows and logits of both runs
    )
    assert (
        tape
        == 4 * 9 * (2 * d + 2 * (d + 2 * qkv + gate_up + 2 * d) + 3 * d + qkv + q + gate_up + mlp)
        + 9 * scores
    )
    assert sums == 4 * 9 * (2 * d + 2 * (q + qkv + 4 * d + 10 * (8 + d)))
    assert rows == 4 * 32 * ((1 + 2 * 5 + 9) * d + 4 * q + 8 * qkv)
    less = parts(c, True, False)
    assert less[1] == tape - 4 * 9 * (d + 2 * qkv + gate_up + 2 * d) and less[
        2
    ] == sums - 4 * 9 * 2 * 10 * (8 + d)
    for changes, floats in (
        # parallel layers: heads and MLP share the gradient of the residual stream
        (dict(post_norms=False, parallel=True), -9 * 2 * d),
        (dict(pre_norms=False), -9 * 2 * 10 * (8 + d)),
        (dict(post_norms=False, norm_bias=True), 2 * qkv),
    ):
        other = parts(config(TINY, **changes), False, True)
        assert (other[2] - sums, other[3]) == (4 * floats, rows)
    assert parts(config(TINY, post_norms=False), False, True)[1] == tape - 4 * 9 * 4 * d
    assert parts(config(TINY, attn_softcap=5.0), False, True)[1] == tape + 9 * scores
    # queries beyond the scratch memory take turns, at least a tile of them together
    small = lambda scratch: memory_parts(c, scratch, 18, 9, 9, 1, 9, 10, False, True)[0]
    assert working - small(10 * scores) == 8 * scores
    assert working - small(1) == 10 * scores
    p = plan(c, 1, 9)
    assert (p.step_tokens, p.slots, p.parts) == (90, 9, 1) and (
        p.working,
        p.tape,
        p.accumulators,
        p.contracted,
    ) == memory_parts(c, 32 << 20, 90, 90, 9, 1, 9, 10, False, True)
    assert p.total == p.working + p.tape + p.accumulators + p.contracted
    assert (
        p.weights == 2 * (2 * 11 * 6 + 3 * layer_weights(c))
        and layer_weights(c) == 6 * 5 * (4 + 2 + 2 + 4) + 3 * 6 * 7
    )
    assert plan(c, 1, 9, weight_bytes=4).weights == 2 * p.weights
    plain = config(TINY, gated=False, pos_embed=True)  # no gate, a table of 64 positions
    assert plan(plain, 1, 9).weights == p.weights + 2 * (64 * 6 - 3 * 6 * 7)


@pytest.mark.parametrize(
    "name", ["llama3", "gemma2", "qwen2", "qwen3", "llama_bias", *sorted(MORE_FAMILIES)]
)
def test_memory_is_the_engine_s(zoo, name):
    """Byte for byte."""
    from vksteer import _engine

    model = zoo.engine(name)
    sizes = (
        (18, 9, 9, 9, 10),
        (512, 512, 51, 512, 10),
        (1024, 512, 512, 32, 3),
        (2000, 1000, 1000, 500, 1),
    )
    layers = (0, 1, model.config.n_layers - 1)
    scratch = model._engine.plan()["scratch"]
    for layer, (capacity, step_capacity, longest, slots, steps), normed, kept in itertools.product(
        layers, sizes, (False, True), (False, True)
    ):
        arguments = (capacity, step_capacity, longest, layer, slots, steps)
        found = _engine.attribution_bytes(model._engine, *arguments, normed, kept)
        assert found == (
            sum(memory_parts(model.config, scratch, *arguments, normed, kept)),
            attribution_split(model.config, *arguments),
        )


@pytest.mark.parametrize(
    "name",
    ["llama3", "gemma2", "qwen2", "qwen3", "llama_bias", "gpt2", "gpt_neox", "olmo2", "phi"],
)
def test_layouts_are_those_of_attribute_s_own_choice(zoo, name):
    from vksteer.patching.attribution_layout import layout

    model = zoo.engine(name)
    modes = set()
    for n, metric in ((9, "logit_diff"), (100, "kl"), (300, "logit_diff")):
        largest = plan(model.config, 1, n, metric=metric).total
        for limit in np.unique(
            np.geomspace(largest / 20, largest, 20).astype(int).tolist() + [largest - 1, largest]
        ).tolist():
            choose = lambda: layout(
                model,
                1,
                [n],
                steps=10,
                normed=False,
                distributions=metric != "logit_diff",
                max_memory=limit,
            )
            p = plan(model.config, 1, n, metric=metric, max_memory=limit)
            if not p.fits:
                with pytest.raises(ValueError, match="max_memory"):
                    choose()
                continue
            chosen = choose()
            assert (p.step_tokens, p.slots, p.mode == "kept", p.total) == (
                chosen.step_capacity,
                chosen.n_sample_tokens,
                chosen.keep_inside,
                chosen.bytes,
            )
            modes.add((p.mode, p.parts > 1))
    assert len(modes) >= 2


def test_layouts_go_down_to_a_tile():
    assert layouts(9, 10) == [(90, 9, True), (9, 9, True), (9, 9, False), (9, 32, False)]
    # on a GPU, in passes of 2,048 tokens first
    assert [wide for wide, _, kept in layouts(128, 10, None, 2048) if kept] == [1280, 512, 128]
    assert layouts(9, 100, 12, 2048)[:3] == [(900, 12, True), (512, 12, True), (900, 9, True)]
    assert [slots for _, slots, _ in layouts(300, 10)] == [300, 300, 300, 160, 96, 64, 32]


def test_work_by_hand():
    c, S, T = config(TINY), 9, 10
    pairs = [45, sum(min(i, 3) for i in range(1, 10)), 45]  # the middle layer has a window of 3
    layers = [2 * S * layer_weights(c) + 4 * n * 4 * 5 for n in pairs]
    logits = 2 * 4 * 11 * 6
    p = plan(c, 1, S, response=4)
    assert p.forward == layers[0] + 12 * (layers[1] + layers[2]) + 2 * logits
    assert p.backward == 10 * (2 * 2 * S * layer_weights(c) + 2.5 * 4 * 20 * (pairs[1] + pairs[2]))
    other = plan(c, 1, S, response=4, metric="kl")
    assert other.forward == p.forward + 10 * logits and other.backward == p.backward + 10 * logits
    again = plan(c, 1, S, response=4, max_memory=1)
    assert (
        again.mode == "recomputed"
        and again.forward == p.forward + 10 * (layers[1] + layers[2])
        and not again.fits
        and "too small" in str(again)
    )
    # In parts: runs and steps once for each; the layers below once.
    long, small = plan(c, 1, 64), plan(c, 1, 64, max_memory=1)
    assert small.slots == 32 and small.parts == 2 and small.backward == 2 * long.backward
    # Edges: one product of width D; norms: the stream of every step off every q, k and v input.
    g = graph(c, 1)
    made = 2 * 2 * 6 * 5 * (4 + 8)
    assert contraction_operations(c, g, S, T) == S * (made + 2 * 6 * g.n_edges + T * 2 * 6 * 2 * 8)
    assert contraction_operations(c, g, S, T, "normed") == S * (made + 2 * 6 * g.n_edges)


def test_mode_follows_memory():
    c = config(LLAMA_3B)
    whole = plan(c, 12, 512)
    assert plan(c, 12, 512, max_memory=whole.total).mode == "kept"
    less = plan(c, 12, 512, max_memory=whole.total - 1)
    assert (
        less.mode == "recomputed"
        and less.total < whole.total
        and less.work > whole.work
        and less.fits
        and plan(c, 12, 512, max_memory="2GiB").max_memory == 2 << 30
    )
    assert (
        plan(c, 12, 128).accumulators * 4 == whole.accumulators
        and whole.work > 4 * plan(c, 12, 128).work
    )


def test_from_a_config_file(tmp_path):
    import vksteer

    released = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(released))
    c = vksteer.Config.from_pretrained(tmp_path / "config.json")
    assert (
        vksteer.patching.plan(c, 12, 512)
        == plan(config(LLAMA_3B), 12, 512)
        == plan(SimpleNamespace(config=c), 12, 512)
    )


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(layer=28), "0 to 27"),
        (dict(positions=0), "positions"),
        (dict(positions=10**6), "context"),
        (dict(steps=0), "steps"),
        (dict(dims="some"), "dims"),
        (dict(at="here"), "at"),
        (dict(response=600), "600"),
        (dict(metric="accuracy"), "metric"),
        (dict(max_memory="much"), "much"),
        (dict(max_memory=0), "max_memory"),
        (dict(weight_bytes=0), "weight_bytes"),
        (dict(device_memory="much"), "device_memory='much'"),
        (dict(kernels="fast"), "broadcast, texels, tiled, matrix"),
    ],
)
def test_plan_refuses(change, says):
    with pytest.raises(ValueError, match=says):
        plan(**{**dict(config=config(LLAMA_3B), layer=12, positions=512), **change})


@pytest.mark.parametrize(
    "text, want",
    [
        ("6GiB", 6 << 30),
        ("500 MB", 500_000_000),
        ("1.5G", 3 << 29),
        (" 12kB ", 12_000),
        ("17", 17),
        (17, 17),
        (2e9, 2_000_000_000),
        (None, None),
        (np.int64(5), 5),
    ],
)
def test_memory_texts(text, want):
    assert memory_bytes(text) == want


@pytest.mark.parametrize("bad", ["", "GiB", "-1GB", "1XB", 0, -5, 1.5, True, [1]])
def test_bad_memory_texts(bad):
    with pytest.raises(ValueError, match="max_memory"):
        memory_bytes(bad)


# -- agreement -------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.sampled_from([2, 5, 10**6]))
def test_correlations_are_scipy_s(seed, n, levels):
    from scipy import stats

    rng = np.random.default_rng(seed)
    x, y = rng.integers(-levels, levels, n) / levels, rng.integers(-levels, levels, n) / levels
    np.testing.assert_array_equal(average_ranks(x), stats.rankdata(x))
    a = agreement(x, y)
    if np.ptp(x) and np.ptp(y):
        assert a.pearson == pytest.approx(
            stats.pearsonr(x, y)[0], abs=1e-9
        ) and a.spearman == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-9)
    else:
        assert np.isnan(a.pearson) and np.isnan(a.spearman)
    json.dumps(a.to_dict(), allow_nan=False)


def test_agreement_in_numbers():
    x = np.array([5.0, -4, 3, 2, -1, 0])
    y = np.array([10.0, -8, 1, -6, 0, 0])
    a = patching.agreement(x, y, k=[1, 3])
    assert (
        a.n == 6
        and a.overlap == {1: 1.0, 3: 2 / 3}
        and a.sign == 3 / 5
        and a.slope == pytest.approx(x @ y / (x @ x))
        and a.worst == (3, 2.0, -6.0)
    )
    assert (
        agreement(x, 2 * x).pearson == pytest.approx(1) == agreement(x, 2 * x).spearman
        and agreement(x, 2 * x).slope == 2
        and agreement(x, -x).sign == 0
    )
    assert agreement(x, y).overlap == {3: 2 / 3} and list(
        agreement(np.arange(400.0), np.arange(400.0)).overlap
    ) == [10, 30, 100, 300]
    assert (
        "Pearson" in str(a)
        and "top 3: 0.67" in str(a)
        and a.to_dict()["overlap"] == {"1": 1.0, "3": 2 / 3}
    )


def test_agreement_of_scores(rng):
    g = Graph(2, 2, 1, 0)
    s = EdgeScores(
        g, rng.standard_normal(g.n_edges), rng.standard_normal(g.n_upstream), n_positions=1
    )
    assert agreement(s, s.edges).pearson == pytest.approx(1) == agreement(s, s.nodes).pearson


@pytest.mark.parametrize(
    "x, y, k, says",
    [
        ([1.0], [1.0], None, "two"),
        ([1, 2, 3.0], [1, 2.0], None, "3 estimates but 2"),
        ([1, np.nan], [1, 2], None, r"estimate\[1\]"),
        ([1, 2], [np.inf, 2], None, "exact"),
        ([1, 2], [1, 2], 3, "3 of 2"),
        ([1, 2], [1, 2], 0, "k"),
    ],
)
def test_agreement_refuses(x, y, k, says):
    with pytest.raises(ValueError, match=says):
        agreement(x, y, k)


def test_agreement_picture(tmp_path, rng):
    x = rng.standard_normal(50)
    agreement(x, x + 0.1 * rng.standard_normal(50)).plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 3000
