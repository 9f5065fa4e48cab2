"""Candidates, scores, selection and the sweep on a NumPy stand-in, against the
definitions written out again.
"""

from __future__ import annotations

import numpy as np
import pytest

from standin import NumpyModel, ScriptedModel
from vksteer import steering
from vksteer.base.distributions import log_softmax
from vksteer.inputs.vectors import SteeringVector
from vksteer.runtime.edits import Ablate, Steer
from vksteer.steering import choose, difference_in_means, scores

HARMFUL, HARMLESS = (
    ["how to bomb", "a bomb", "make one bomb now", "bomb it"],
    ["how to bake", "a cake", "make one cake soon"],
)


@pytest.fixture
def model():
    return NumpyModel()


@pytest.fixture
def cands(model):
    return difference_in_means(model, HARMFUL, HARMLESS, progress=False)


def residuals(model, prompts, position):
    """[prompt, layer, D], one prompt at a time, by the stand-in's own row."""
    out = []
    for tokens in model.chat_tokens(prompts):
        sites = {}
        model._row(tokens, [], sites)
        out.append(
            [sites[f"blocks.{l}.hook_resid_pre"][position] for l in range(model.config.n_layers)]
        )
    return np.array(out, dtype=np.float32).astype(np.float64)


def test_difference_in_means(model, cands):
    assert (
        cands.vectors.shape == (2, 5, 12)
        and cands.vectors.dtype == np.float32
        and cands.vectors.flags.c_contiguous
    )
    assert cands.positions.tolist() == [-2, -1] and cands.position_texts == ["<2>", "<3>"]
    for p, position in enumerate((-2, -1)):
        want = residuals(model, HARMFUL, position).mean(0) - residuals(
            model, HARMLESS, position
        ).mean(0)
        np.testing.assert_allclose(cands.vectors[p], want, atol=1e-6)
    assert not cands.vectors[:, 0].any()  # layer 0 sees the template's tokens alone: exactly zero
    v = cands.vector(-2, 3)
    assert (
        (v.layer, v.position, v.method) == (3, -2, "dim")
        and v.meta["n_prompts"] == [4, 3]
        and v.meta["model_hash"] == "numpy-standin"
    )
    np.testing.assert_array_equal(v.direction, cands.vectors[0, 3])
    for wrong in (
        lambda: cands.vector(-3, 1),
        lambda: cands.vector(-1, 5),
        lambda: cands.vector(-1, True),
    ):
        with pytest.raises(ValueError):
            wrong()


def test_positions_and_token_prompts(model):
    rows = model.chat_tokens(HARMFUL), model.chat_tokens(HARMLESS)
    some = difference_in_means(model, *rows, positions=[-1, -3], progress=False)
    assert some.positions.tolist() == [-3, -1]
    np.testing.assert_array_equal(
        some.vectors[1], difference_in_means(model, HARMFUL, HARMLESS, progress=False).vectors[1]
    )


def test_batches_change_no_bit(model, cands, monkeypatch):
    table = cands.evaluate(HARMFUL, HARMLESS, [5, 9], progress=False)
    calls = model.calls
    monkeypatch.setattr(scores, "BATCH_TOKENS", 30)
    monkeypatch.setattr("vksteer.steering.candidates.CAPTURE_BYTES", 1)
    again = difference_in_means(model, HARMFUL, HARMLESS, progress=False)
    np.testing.assert_array_equal(again.vectors, cands.vectors)
    other = again.evaluate(HARMFUL, HARMLESS, [5, 9], progress=False)
    assert model.calls > 3 * calls
    for name in ("bypass", "induce", "kl", "bypass_ablation"):
        np.testing.assert_array_equal(getattr(other, name), getattr(table, name))


def metric(logits, tokens):
    p = np.exp(logits.astype(np.float64))
    p = p / p.sum()
    return np.log(p[tokens].sum() / (1 - p[tokens].sum()))


def test_evaluate_against_the_definitions(model, cands):
    tokens = [5, 9, 17]
    table = cands.evaluate(HARMFUL, HARMLESS, tokens, layers=[1, 3], progress=False)
    last = lambda prompt, edits: np.float32(
        model._row(model.chat_tokens([prompt])[0], edits, {})[-1]
    )
    for p, l in np.ndindex(2, 5):
        cell = [t[p, l] for t in (table.bypass, table.induce, table.kl, table.bypass_ablation)]
        if l not in (1, 3):
            assert np.isnan(cell).all()
            continue
        v = cands._at(p, l)
        kl = []
        for prompt in HARMLESS:
            a, b = (np.exp(last(prompt, e).astype(np.float64)) for e in ([], [Ablate(v)]))
            a, b = a / a.sum(), b / b.sum()
            kl.append((a * np.log(a / b)).sum())
        want = [
            np.mean([metric(last(x, [Steer(v, -1.0)]), tokens) for x in HARMFUL]),
            np.mean([metric(last(x, [Steer(v, 1.0)]), tokens) for x in HARMLESS]),
            np.mean(kl),
            np.mean([metric(last(x, [Ablate(v)]), tokens) for x in HARMFUL]),
        ]
        np.testing.assert_allclose(cell, want, rtol=1e-9, atol=1e-9)
    assert table.bypass.dtype == np.float64 and cands.table is table
    text = table.to_markdown()
    assert text.count("\n| -") == 4 and "'<5>' (5)" in text
    assert table.to_dict()["kl"][0][0] is None and table.to_dict()["refusal_tokens"] == tokens


def test_a_zero_vector_changes_nothing(model, cands):
    table = cands.evaluate(HARMFUL, HARMLESS, [5], layers=[0], progress=False)
    assert (
        (table.kl[:, 0] == 0).all()
        and (table.bypass[:, 0] == table.unsteered[0]).all()
        and (table.induce[:, 0] == table.unsteered[1]).all()
    )
    assert (table.bypass_ablation[:, 0] == table.unsteered[0]).all()


def test_refusal_metric_and_kl_at_their_ends():
    logits = np.array([[400.0, 0.0, -400.0], [0.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(scores.refusal_metric(logits, [0]), [400, np.log(1 / 2)])
    np.testing.assert_allclose(scores.refusal_metric(logits, [2]), [-800, np.log(1 / 2)])
    np.testing.assert_allclose(scores.refusal_metric(logits, [0, 1]), [800, np.log(2)])
    logp = log_softmax(logits)
    np.testing.assert_allclose(scores.kl_divergence(logp, logits), [0, 0], atol=1e-15)
    assert scores.kl_divergence(logp[:1], logits[:1, ::-1])[0] == pytest.approx(800)


def test_refusal_tokens_are_derived_from_answers(model):
    def logp(first):
        p = np.full((4, 40), 0.1 / 40)
        for row, tokens in zip(p, first):
            for t in tokens:
                row[t] += 0.9 / len(tokens)
        return np.log(p / p.sum(1, keepdims=True))

    found = scores.refusal_tokens_from(
        model, logp([[7], [7], [7, 8], [7]]), logp([[20], [21], [20], [9]])
    )
    assert (
        found.ids == (7, 8)
        and found.texts == ("<7>", "<8>")
        and found.on_harmful[0] > 0.7 > 0.1 > found.on_harmless[0]
    )
    assert "'<7>' (7; mean probability 0.79" in str(found)
    with pytest.raises(ValueError, match="refusal_tokens="):
        scores.refusal_tokens_from(model, logp([[7]] * 4), logp([[7]] * 4))


def test_derived_tokens_are_used_and_told(model, cands, capsys):
    derived = steering.derive_refusal_tokens(model, HARMFUL, HARMLESS)
    a = cands.evaluate(HARMFUL, HARMLESS, layers=[2], progress=True)
    b = cands.evaluate(
        HARMFUL, HARMLESS, refusal_tokens=list(derived.ids), layers=2, progress=False
    )
    assert a.refusal_tokens == derived
    np.testing.assert_array_equal(a.bypass, b.bypass)
    assert f"refusal tokens: {derived}" in capsys.readouterr().err


@pytest.mark.parametrize("criterion", ["paper", "arditi"])
@pytest.mark.parametrize("strict", [False, True])
def test_select_is_choose_on_the_whole_table(model, cands, criterion, strict, monkeypatch):
    # the stand-in is coarse: a candidate must survive
    monkeypatch.setattr("vksteer.steering.rule.MAX_KL", 2.0)
    found = 0
    for seed in range(12):
        # half the vocabulary: the metric lies around 0
        tokens = np.random.default_rng(seed).permutation(40)[:20].tolist()
        full = cands.evaluate(HARMFUL, HARMLESS, tokens, progress=False)
        # zero vectors are no candidates
        nan = lambda table: np.where(np.arange(5) == 0, np.nan, table)
        rows = model.rows_run
        try:
            want = choose(
                nan(full.bypass_ablation if criterion == "arditi" else full.bypass),
                full.induce,
                full.kl,
                criterion,
                strict,
            )
        except ValueError:
            with pytest.raises(ValueError, match="no candidate is left of 10"):
                cands.select(HARMFUL, HARMLESS, criterion, strict, tokens, progress=False)
            continue
        v = cands.select(HARMFUL, HARMLESS, criterion, strict, tokens, progress=False)
        found += 1
        assert (cands.positions.tolist().index(v.position), v.layer) == want
        assert (
            v.meta["selection"]["induce"] == full.induce[want]
            and v.meta["selection"]["refusal_tokens"] == tokens
        )
        # What was measured is bit for bit the full table, and what a filter
        # excluded was not measured.
        for name in scores.Scorer.SCORES:
            some = getattr(cands.table, name)
            seen = ~np.isnan(some)
            np.testing.assert_array_equal(some[seen], getattr(full, name)[seen])
        unwanted = cands.table.bypass if criterion == "arditi" else cands.table.bypass_ablation
        assert np.isnan(unwanted).all() and np.isnan(cands.table.induce[:, 4]).all()
        kl_seen = ~np.isnan(cands.table.kl)
        assert (cands.table.induce[kl_seen] >= 0).all() and model.rows_run - rows < 80
        assert (
            len(cands.rejected)
            + sum(
                ~np.isnan(
                    getattr(cands.table, "bypass_ablation" if criterion == "arditi" else "bypass")
                ).ravel()
            )
            == 10
        )
    assert found >= 3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_rejected_says_why(model, cands):
    with pytest.raises(ValueError, match="no candidate is left of 10"):
        cands.select(HARMFUL, HARMLESS, refusal_tokens=[6], progress=False)
    by_layer = {(r.position, r.layer): r for r in cands.rejected}
    assert by_layer[-1, 4].filter == "layer" and "0.8 * 5" in by_layer[-1, 4].reason
    assert by_layer[-2, 0].filter == "undefined" and "zero" in by_layer[-2, 0].reason
    measured = [r for r in cands.rejected if np.isfinite(r.shortfall)]
    assert (
        len(measured) == 6
        and cands.closest in measured
        and cands.closest.shortfall == min(r.shortfall for r in measured)
    )


@pytest.mark.parametrize("criterion", ["paper", "arditi"])
def test_select_relaxed(model, cands, criterion, monkeypatch, tmp_path):
    """Where induce leaves nobody, the rule without it chooses; elsewhere nothing changes."""
    monkeypatch.setattr("vksteer.steering.rule.MAX_KL", 2.0)
    relaxed = 0
    for seed in range(12):
        tokens = np.random.default_rng(seed).permutation(40)[:20].tolist()
        full = cands.evaluate(HARMFUL, HARMLESS, tokens, progress=False)
        nan = lambda table: np.where(np.arange(5) == 0, np.nan, table)
        bypass = nan(full.bypass_ablation if criterion == "arditi" else full.bypass)
        seen = []
        select = lambda **options: cands.select(
            HARMFUL, HARMLESS, criterion, refusal_tokens=tokens, relax=True, **options
        )
        v = select(progress=lambda *a: seen.append(a), out=tmp_path / f"{seed}.jsonl")
        try:
            want = choose(bypass, full.induce, full.kl, criterion)
        except ValueError:
            value = bypass if criterion == "arditi" else sigmoid(bypass) - sigmoid(full.induce)
            allowed = np.where((full.kl <= 2.0) & (np.arange(5) < 4), value, np.nan)
            want = np.unravel_index(np.nanargmin(allowed), allowed.shape)
            relaxed += 1
            assert v.meta["selection"]["relaxed"] and len(cands.rejected) == 10
        else:
            assert not v.meta["selection"]["relaxed"]
        assert (cands.positions.tolist().index(v.position), v.layer) == want
        assert all(done <= total for done, total in seen) and seen[-1][0] == seen[-1][1]
        again = select(progress=False, out=tmp_path / f"{seed}.jsonl")
        np.testing.assert_array_equal(again.direction, v.direction)
    assert 0 < relaxed < 12
    monkeypatch.setattr("vksteer.steering.rule.MAX_KL", -1.0)
    with pytest.raises(ValueError, match="no candidate is left of 10"):
        select(progress=False)


def test_progress_reaches_its_total(model):
    seen = []
    cands = difference_in_means(model, HARMFUL, HARMLESS, progress=lambda *a: seen.append(a))
    assert seen[-1] == (7, 7)
    cands.evaluate(HARMFUL, HARMLESS, [5], progress=lambda *a: seen.append(a))
    assert seen[-1] == (2 * 10 * 7, 2 * 10 * 7)
    with pytest.raises(ValueError, match="no candidate is left"):
        cands.select(HARMFUL, HARMLESS, refusal_tokens=[5], progress=lambda *a: seen.append(a))
    assert seen[-1] == (6 * 10, 6 * 10)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, c: difference_in_means(m, [], HARMLESS),
        lambda m, c: difference_in_means(m, HARMFUL, []),
        lambda m, c: difference_in_means(m, [""], HARMLESS),
        lambda m, c: difference_in_means(m, HARMFUL, [[]]),
        lambda m, c: difference_in_means(m, HARMFUL, HARMLESS, positions=[0]),
        lambda m, c: difference_in_means(m, HARMFUL, HARMLESS, positions=[-1, -1]),
        lambda m, c: difference_in_means(m, HARMFUL, HARMLESS, positions=[]),
        lambda m, c: difference_in_means(m, [[1, 2]], [[1, 2]], positions=[-3]),
        lambda m, c: difference_in_means(m, ["x" * 80], HARMLESS),
        lambda m, c: difference_in_means(m, HARMFUL, [3.5]),
        lambda m, c: difference_in_means(m, HARMFUL, HARMLESS, progress="yes"),
        lambda m, c: c.evaluate([], HARMLESS),
        lambda m, c: c.evaluate(HARMFUL, HARMLESS, layers=[5]),
        lambda m, c: c.evaluate(HARMFUL, HARMLESS, layers=[]),
        lambda m, c: c.evaluate(HARMFUL, HARMLESS, [40]),
        lambda m, c: c.evaluate(HARMFUL, HARMLESS, []),
        lambda m, c: c.evaluate(HARMFUL, HARMLESS, ["I"]),
        lambda m, c: c.select(HARMFUL, HARMLESS, "best"),
        lambda m, c: c.select(HARMFUL, []),
    ],
)
def test_bad_arguments_are_refused_before_any_work(model, cands, call):
    calls = model.calls
    with pytest.raises(ValueError) as error:
        call(model, cands)
    assert len(str(error.value)) > 15 and model.calls == calls


# -- the sweep -------------------------------------------------------------------------------------


def test_sweep_and_its_verdicts():
    model = ScriptedModel({})
    v = SteeringVector(np.ones(12), 2)
    sw = steering.sweep(
        model, v, [0.25, 1.0, 2], HARMFUL, HARMLESS, max_new_tokens=9, progress=False
    )
    assert (
        [row.verdict for row in sw] == ["no effect", "both ways", "both ways"]
        and sw.best == 1.0
        and len(sw) == 3
    )
    assert (sw[1].harmless.asr, sw[1].harmful.asr) == (0.0, 1.0) and (
        sw.unsteered.harmless.asr,
        sw.unsteered.harmful.asr,
    ) == (1.0, 0.0)
    assert (
        model.generations[0] == (None, None, None, None)
        and model.generations[2][3] == [1.0] * 3 + [-1.0] * 4
    )
    assert sw[1].kl > 0 and sw[1].kl_side > 0 and sw[2].kl > sw[0].kl
    rows = model.chat_tokens(HARMLESS)
    logits = [model.run(rows, edits=e, logits="last").logits for e in ([], [Steer(v, 1.0)])]
    assert sw[1].kl == scores.kl_divergence(log_softmax(logits[0]), logits[1]).mean()
    assert (
        sw.to_markdown().count("\n") == 5
        and sw.to_dict()["best"] == 1.0
        and sw.best_pair == (1.0, 1.0)
    )


def test_sweep_verdicts_one_way_and_broken():
    from vksteer.judge import Rate
    from vksteer.steering.sweeping import _verdict

    rate = lambda asr, ended=1.0, repetition=0.0: Rate(asr, 0, 1, 10, ended, repetition, 1.5)
    base = {"harmless": rate(1.0), "harmful": rate(0.0)}
    assert _verdict(rate(0.4), rate(0.1), base) == "induces only"
    assert _verdict(rate(0.9), rate(0.5), base) == "bypasses only"
    assert _verdict(rate(0.0), rate(1.0, ended=0.7), base) == "breaks the text"
    assert _verdict(rate(0.0, repetition=0.3), rate(1.0), base) == "breaks the text"
    # Answers that the limit of tokens cuts off where refusals end: steered away from refusal, texts
    # are to look like those.
    cut_off = {"harmless": rate(1.0, ended=0.0), "harmful": rate(0.5, ended=0.4)}
    assert _verdict(rate(0.0, ended=0.9), rate(1.0, ended=0.0), cut_off) == "both ways"
    # A model that refuses nothing cannot be seen to be bypassed.
    assert (
        _verdict(rate(0.0), rate(1.0), {"harmless": rate(1.0), "harmful": rate(1.0)})
        == "induces only"
    )


def test_sweep_best_pair():
    """Each way has its own coefficient; what breaks one side's texts does not
    count against the other.
    """
    from vksteer.judge import Rate
    from vksteer.steering.sweeping import Sweep, SweepRow, _verdict, _works

    rate = lambda asr, ended=1.0, repetition=0.0: Rate(asr, 0, 1, 10, ended, repetition, 1.5)
    base = {"harmless": rate(1.0), "harmful": rate(0.0)}

    def made(*rows):
        out = []
        for a, harmless, harmful in rows:
            moved, intact = _works(harmless, harmful, base)
            out.append(
                SweepRow(
                    a,
                    harmless,
                    harmful,
                    0.0,
                    0.0,
                    _verdict(harmless, harmful, base),
                    moved[0] and intact[0],
                    moved[1] and intact[1],
                )
            )
        return Sweep(out, SweepRow(0.0, base["harmless"], base["harmful"], 0.0, 0.0, "unsteered"))

    sw = made(
        (0.5, rate(0.1), rate(0.3)),
        (0.7, rate(0.0, 0.6, 0.4), rate(0.9)),
        (0.8, rate(0.0, 0.5), rate(1.0)),
        (1.0, rate(0.0, 0.1), rate(1.0)),
        (1.2, rate(0.0, 0.0), rate(1.0, 0.4)),
    )
    assert (
        sw.best is None and sw.best_pair == (0.5, 0.8) and sw.to_dict()["best_pair"] == (0.5, 0.8)
    )
    assert made((1.0, rate(0.2), rate(0.8)), (2.0, rate(0.1, 0.95, 0.15), rate(0.9))).best_pair == (
        1.0,
        2.0,
    ), "repetition that costs more than it moves is not taken"
    assert (
        made((1.0, rate(0.2), rate(0.1))).best_pair is None
        and made((-1.0, rate(0.2), rate(0.9))).best_pair is None
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda m, v: steering.sweep(m, v, [], HARMFUL, HARMLESS),
        lambda m, v: steering.sweep(m, v, [np.nan], HARMFUL, HARMLESS),
        lambda m, v: steering.sweep(m, v, [1], [], HARMLESS),
        lambda m, v: steering.sweep(m, v, [1], HARMFUL, HARMLESS, max_new_tokens=60),
        lambda m, v: steering.sweep(m, SteeringVector(np.ones(11), 2), [1], HARMFUL, HARMLESS),
        lambda m, v: steering.sweep(m, SteeringVector(np.ones(12), 5), [1], HARMFUL, HARMLESS),
        lambda m, v: steering.sweep(m, v, ["1"], HARMFUL, HARMLESS),
    ],
)
def test_sweep_refuses(call):
    model = ScriptedModel({})
    with pytest.raises(ValueError):
        call(model, SteeringVector(np.ones(12), 2))
    assert not model.generations and not model.calls
