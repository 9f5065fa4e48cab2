"""Activation patching between two prompts, against a patched run for each value."""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs

CLEAN, CORRUPT = [5, 9, 7, 30, 2, 11], [5, 9, 8, 30, 3, 11]


def log_softmax(x):
    x = x.astype(np.float64)
    return (
        x
        - x.max(-1, keepdims=True)
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))[..., None]
    )


def metric_of(of, logits):
    if isinstance(of, vs.LogitDiff):
        return float(logits[of.position, of.a]) - float(logits[of.position, of.b])
    logp = log_softmax(logits[list(of.positions)])
    if isinstance(of, vs.LogProb):
        return sum(row[t] for row, t in zip(logp, of.tokens))
    reference = log_softmax(of.reference_logits)
    return float((np.exp(reference) * (reference - logp)).sum())


@pytest.fixture
def reference_logits(zoo):
    return zoo.engine("qwen3").run([CLEAN], logits="all").logits[0][[2, -1]]


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3"])
@pytest.mark.parametrize("site", ["hook_resid_pre", "hook_mlp_out", "hook_resid_mid"])
def test_every_position_equals_a_patched_run(zoo, name, site):
    model, of = zoo.engine(name), vs.LogitDiff(-1, 3, 50)
    found = vs.patching.heatmap(model, CLEAN, CORRUPT, of=of, site=site, progress=False)
    assert found.values.shape == (model.config.n_layers, len(CLEAN))
    base = metric_of(of, model.run([CORRUPT], logits="all").logits[0])
    for l in range(model.config.n_layers):
        full = f"blocks.{l}.{site}"
        clean = model.run([CLEAN], capture=[full], logits=None)[full][0]
        for p in range(len(CLEAN)):
            edit = vs.Set(full, clean[p : p + 1], [p])
            patched = model.run([CORRUPT], edits=[edit], logits="all").logits[0]
            # bit-identical logits, so the same float64 difference
            assert found.values[l, p] == metric_of(of, patched) - base, (l, p)


@pytest.mark.parametrize("site", ["attn.hook_z", "attn.hook_v", "attn.hook_pattern"])
def test_every_head_equals_a_patched_run(zoo, site):
    model, of = zoo.engine("qwen3"), vs.LogitDiff(-1, 3, 50)
    found = vs.patching.heatmap(model, CLEAN, CORRUPT, of=of, site=site, progress=False)
    c = model.config
    n = c.n_kv_heads if site == "attn.hook_v" else c.n_heads
    assert found.values.shape == (c.n_layers, n) and len(found.columns) == n
    base = metric_of(of, model.run([CORRUPT], logits="all").logits[0])
    full = f"blocks.1.{site}"
    clean = model.run([CLEAN], capture=[full], logits=None)[full][0]
    for h in range(n):
        part = clean[h : h + 1] if "pattern" in site else clean[:, h : h + 1]
        edit = vs.Set(full, part, heads=[h])
        patched = model.run([CORRUPT], edits=[edit], logits="all").logits[0]
        assert found.values[1, h] == metric_of(of, patched) - base, h


def test_other_metrics_and_positions_in_the_middle(zoo, reference_logits):
    model = zoo.engine("qwen3")
    for of in (
        vs.LogitDiff(2, 3, 50),
        vs.LogProb([1, -1], [7, 9]),
        vs.KL(reference_logits, [2, -1]),
    ):
        found = vs.patching.heatmap(model, CLEAN, CORRUPT, of=of, progress=False)
        base = metric_of(of, model.run([CORRUPT], logits="all").logits[0])
        full = "blocks.1.hook_resid_pre"
        clean = model.run([CLEAN], capture=[full], logits=None)[full][0]
        for p in range(len(CLEAN)):
            edit = vs.Set(full, clean[p : p + 1], [p])
            patched = metric_of(of, model.run([CORRUPT], edits=[edit], logits="all").logits[0])
            assert found.values[1, p] == pytest.approx(patched - base, abs=1e-6), (of, p)
        assert found.corrupt[0] == pytest.approx(base, abs=1e-6)
    later = vs.patching.heatmap(model, CLEAN, CORRUPT, of=vs.LogitDiff(2, 3, 50), progress=False)
    assert not later.values[:, 3:].any()  # a later token cannot change an earlier logit


@pytest.mark.parametrize("site", ["hook_resid_pre", "attn.hook_z"])
def test_long_prompts_whose_metric_is_read_early(zoo, rng, site):
    """What lies after the metric's position is not needed, but the length of the prompt decides
    its rotation tables (longrope).
    """
    model, of, l = zoo.engine("phi3_long"), vs.LogitDiff(9, 3, 50), 1
    n = model.config.rope_switch + 5
    clean, corrupt = (rng.integers(0, model.config.d_vocab, n).tolist() for _ in range(2))
    found = vs.patching.heatmap(model, clean, corrupt, of=of, site=site, progress=False)
    base, good = (
        metric_of(of, model.run([row], logits="all").logits[0]) for row in (corrupt, clean)
    )
    short = metric_of(of, model.run([corrupt[:10]], logits="all").logits[0])
    assert found.corrupt[0] == base and found.clean[0] == good and abs(base - short) > 1e-3
    full = f"blocks.{l}.{site}"
    values = model.run([clean], capture=[full], logits=None)[full][0]
    if site == "attn.hook_z":
        edits = [vs.Set(full, values[:, h : h + 1], heads=[h]) for h in range(model.config.n_heads)]
    else:
        edits = [vs.Set(full, values[p : p + 1], [p]) for p in range(10)]
        assert found.values.shape == (model.config.n_layers, n) and not found.values[:, 10:].any()
    for i, edit in enumerate(edits):
        patched = metric_of(of, model.run([corrupt], edits=[edit], logits="all").logits[0])
        assert found.values[l, i] == patched - base, i


def test_the_whole_stream_of_the_last_token_restores_all(zoo):
    model, of = zoo.engine("qwen3"), vs.LogitDiff(-1, 3, 50)
    found = vs.patching.heatmap(
        model, CLEAN, CORRUPT, of=of, site="hook_resid_post", progress=False
    )
    assert found.restored[-1, -1] == pytest.approx(1, abs=1e-6)
    ((layer, column, value),) = found.top(1)
    assert found.values[layer, column] == value and abs(value) == np.abs(found.values).max()
    assert "<table>" in found._repr_html_()
    assert len(found.plot().axes) == 2


def test_means_over_pairs(zoo):
    model = zoo.engine("llama3")
    metrics = [vs.LogitDiff(-1, 3, 50), vs.LogitDiff(-1, 4, 60)]
    pairs = [(CLEAN, CORRUPT), (CORRUPT, CLEAN)]
    together = vs.patching.heatmap(
        model, [p[0] for p in pairs], [p[1] for p in pairs], of=metrics, progress=False
    )
    each = [
        vs.patching.heatmap(model, a, b, of=m, progress=False).values
        for (a, b), m in zip(pairs, metrics)
    ]
    np.testing.assert_array_equal(together.values, np.mean(each, axis=0))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(clean=[1, 2]), "must have one length"),
        (dict(clean=[CLEAN, CLEAN]), "are pairs: 2 and 1"),
        (dict(clean=[CLEAN, [1]], corrupt=[CORRUPT, [2]]), "means over pairs need one length"),
        (dict(site="blocks.0.hook_resid_pre"), "without its layer"),
        (dict(site="hook_nothing"), "hook_nothing"),
        (dict(of=vs.LogitDiff(99, 1, 2)), "position 99 lies outside"),
        (dict(of=vs.LogitDiff(0, 1, 99999)), "99999 is no token id"),
        (dict(of=[vs.LogitDiff(0, 1, 2)] * 3), "one for each of 1 pairs"),
        (dict(of="logits"), "must be vs.LogitDiff"),
        (dict(of=vs.LogProb([1, 2], [3])), "2 token ids"),
        (dict(of=vs.LogProb([], [])), r"position \(none\)"),
        (dict(of=vs.KL(np.zeros((1, 7)), [2])), r"must be \[1 positions, "),
    ],
)
def test_refusals(zoo, changes, message):
    given = dict(clean=CLEAN, corrupt=CORRUPT, of=vs.LogitDiff(-1, 3, 50)) | changes
    with pytest.raises(ValueError, match=message):
        vs.patching.heatmap(zoo.engine("llama3"), **given, progress=False)
