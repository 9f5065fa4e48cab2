"""Choosing dimensions against NumPy, the hypergeometric tail against scipy and exact fractions, the
sweep on a scripted model.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from standin import ScriptedModel
from vksteer import sparsify
from vksteer.base.provenance import digest
from vksteer.circuits.graph import graph
from vksteer.inputs.vectors import SteeringVector
from vksteer.sparsify.choosing import log_tail
from vksteer.sparsify.sweeping import METHODS, TAUS

HARMFUL, HARMLESS = (
    ["how to bomb", "a bomb", "make one bomb now", "bomb it"],
    ["how to bake", "a cake", "make one cake soon"],
)


def vector(rng, width=37, **more):
    return SteeringVector(
        rng.standard_normal(width), 2, position=-1, method="dim", meta={"model": "m"}, **more
    )


# -- choosing dimensions ---------------------------------------------------------------------------


def check(sparse, original, kept):
    """The mask, zeros outside, direction inside, norm, provenance."""
    assert isinstance(sparse, SteeringVector) and sparse.kept.dtype == bool
    np.testing.assert_array_equal(sparse.kept, kept)
    assert not sparse.direction[~kept].any() and sparse.direction.dtype == np.float32
    want = np.where(kept, original.direction.astype(np.float64), 0)
    want *= np.linalg.norm(original.direction.astype(np.float64)) / np.linalg.norm(want)
    np.testing.assert_allclose(sparse.direction, want, rtol=1e-6)
    assert sparse.norm == pytest.approx(original.norm, rel=1e-6)
    assert (sparse.layer, sparse.position, sparse.method) == (
        original.layer,
        original.position,
        original.method,
    )
    assert (
        sparse.meta["sparsified"]["of"] == digest(original.direction)
        and sparse.meta["model"] == "m"
    )
    assert sparse.sparsity == pytest.approx(1 - kept.mean())


@pytest.mark.parametrize("tau", TAUS)
def test_by_gradient(rng, tau):
    for width in (1, 7, 257):
        v, ie = vector(rng, width), rng.standard_normal(width).astype(np.float32)
        if width > 1:
            v = SteeringVector(
                np.where(np.arange(width) == 1, 0, v.direction),
                2,
                position=-1,
                method="dim",
                meta={"model": "m"},
            )
        x, s = np.abs(ie.astype(np.float64)), np.abs(v.direction.astype(np.float64))
        kept = x / np.linalg.norm(x) >= tau * s / np.linalg.norm(s)
        if not (kept & (s > 0)).any():
            with pytest.raises(ValueError, match="keeps no dimension"):
                sparsify.by_gradient(v, ie, tau)
            continue
        check(sparsify.by_gradient(v, ie, tau), v, kept)
        check(sparsify.by_gradient(v, -3 * ie, tau), v, kept)  # sign and scale play no part
    assert sparsify.by_gradient(vector(rng), rng.standard_normal(37), 0).kept.all()


def test_the_gradient_is_effect_over_value(rng):
    """IE = s * gradient: a gradient alike in all dimensions keeps all up to
    tau 1 and none above.
    """
    v = vector(rng)
    assert sparsify.by_gradient(v, v.direction * np.float32(0.25), 1 - 1e-6).kept.all()
    with pytest.raises(ValueError, match=r"largest \|r_i\| is 1"):
        sparsify.by_gradient(v, v.direction * np.float32(0.25), 1.001)
    gradient = rng.standard_normal(37)
    r = sparsify.gradient_ratio(v, v.direction * gradient)
    np.testing.assert_allclose(
        r, np.abs(gradient) * v.norm / np.linalg.norm(v.direction * gradient), rtol=1e-6
    )


@pytest.mark.parametrize("k", [0, 1, 5, 36])
def test_by_effect_magnitude_random(rng, k):
    v, ie = vector(rng), rng.standard_normal(37)
    smallest = lambda x: np.isin(np.arange(37), sorted(range(37), key=lambda i: (abs(x[i]), i))[:k])
    check(sparsify.by_effect(v, ie, k), v, ~smallest(ie))
    check(sparsify.by_magnitude(v, k), v, ~smallest(v.direction))
    check(sparsify.by_random(v, k, 7), v, sparsify.by_random(v, k, 7).kept)
    assert (~sparsify.by_random(v, k, 7).kept).sum() == k
    if k == 5:
        assert len({tuple(sparsify.by_random(v, k, seed).kept) for seed in range(20)}) > 15
    assert k or np.array_equal(sparsify.by_magnitude(v, 0).direction, v.direction)


def test_ties_go_by_index(rng):
    v = SteeringVector(np.ones(8), 2, position=-1, method="dim", meta={"model": "m"})
    for sparse in (
        sparsify.by_magnitude(v, 3),
        sparsify.by_effect(v, np.ones(8), 3),
        sparsify.by_effect(v, [-2, 2, -2, 2, 2, -2, 2, 2], 3),
    ):
        check(sparse, v, np.arange(8) >= 3)
    check(
        sparsify.by_effect(v, [1, 0, 1, 2, 1, 0, 1, 1], 4), v, np.isin(np.arange(8), [3, 4, 6, 7])
    )


def test_scores_of_attribute(rng):
    """EdgeScores with dims [1, D] or [N, D], whose steering node is found by name."""
    from vksteer.patching import EdgeScores

    g = graph(SimpleNamespace(n_layers=3, n_heads=2, n_kv_heads=1, d_model=37), 1)
    v, dims = vector(rng), rng.standard_normal((g.n_upstream, 37)).astype(np.float32)
    want = sparsify.by_gradient(v, dims[0], 0.5).kept
    one = EdgeScores(
        g,
        np.zeros(g.n_edges),
        dims=dims[:1],
        n_positions=1,
        provenance={"vector_hash": digest(v.direction)},
    )
    every = EdgeScores(g, np.zeros(g.n_edges), dims=dims, n_positions=1)
    for scores in (one, every, dims[:1], dims[0].tolist()):
        np.testing.assert_array_equal(sparsify.by_gradient(v, scores, 0.5).kept, want)
        np.testing.assert_array_equal(
            sparsify.by_effect(v, scores, 9).kept, sparsify.by_effect(v, dims[0], 9).kept
        )
    moved = SimpleNamespace(dims=np.stack([dims[1], dims[0]]), node_names=("m1", "steer"))
    np.testing.assert_array_equal(sparsify.by_gradient(v, moved, 0.5).kept, want)
    with pytest.warns(UserWarning, match="another steering vector"):
        sparsify.by_gradient(vector(rng), one, 0.1)
    for wrong in (EdgeScores(g, np.zeros(g.n_edges), n_positions=1), dims):
        with pytest.raises(ValueError, match="dims='steer'|steering node"):
            sparsify.by_gradient(v, wrong, 0.5)


def test_a_sparse_vector_stays_one(rng, tmp_path):
    sparse = sparsify.by_magnitude(vector(rng), 20)
    for other in (
        -sparse,
        2.0 * sparse,
        sparse / 4,
        sparse.with_norm(3.0),
        pickle.loads(pickle.dumps(sparse)),
        copy.deepcopy(sparse),
    ):
        np.testing.assert_array_equal(other.kept, sparse.kept)
        assert (
            isinstance(other, sparsify.SparseVector)
            and other.meta["sparsified"] == sparse.meta["sparsified"]
        )
    assert "17 of 37" in repr(sparse)
    with pytest.raises(ValueError):
        sparse.kept[0] = True
    for name in ("v.npz", "v.safetensors", "v.gguf"):
        sparse.save(tmp_path / name)
        back = SteeringVector.load(tmp_path / name)
        np.testing.assert_array_equal(sparsify.kept_of(back), sparse.kept)
        np.testing.assert_array_equal(back.direction, sparse.direction)
    with pytest.raises(ValueError, match="kept"):
        sparsify.SparseVector(np.ones(3), 0, kept=[True, False, True])


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda v, x: sparsify.by_gradient(v, x, -0.1), "tau"),
        (lambda v, x: sparsify.by_gradient(v, x, math.nan), "tau"),
        (lambda v, x: sparsify.by_gradient(v, x, math.inf), "tau"),
        (lambda v, x: sparsify.by_gradient(v, x, "1"), "tau"),
        (lambda v, x: sparsify.by_gradient(v, x, True), "tau"),
        (lambda v, x: sparsify.by_gradient(v, x, 1e9), "keeps no dimension"),
        (lambda v, x: sparsify.by_gradient(v, x[:-1], 1), "width 37"),
        (lambda v, x: sparsify.by_gradient(v, 0 * x, 1), "zero"),
        (lambda v, x: sparsify.by_gradient(v, x * math.nan, 1), "finite"),
        (lambda v, x: sparsify.by_gradient(v, "x", 1), "numbers"),
        (lambda v, x: sparsify.by_gradient(v, None, 1), "dims"),
        (lambda v, x: sparsify.by_effect(v, x, -1), "k must"),
        (lambda v, x: sparsify.by_effect(v, x, 37), "at most 36"),
        (lambda v, x: sparsify.by_effect(v, x, 1.0), "k must"),
        (lambda v, x: sparsify.by_effect(v, x[None, None], 1), "width 37"),
        (lambda v, x: sparsify.by_magnitude(v, 37), "at most 36"),
        (lambda v, x: sparsify.by_magnitude(v, True), "k must"),
        (lambda v, x: sparsify.by_random(v, 38, 0), "at most 36"),
        (lambda v, x: sparsify.by_random(v, 3, -1), "seed"),
        (lambda v, x: sparsify.by_random(v, 3, 0.5), "seed"),
        (lambda v, x: sparsify.by_magnitude(v.direction, 3), "SteeringVector"),
        (lambda v, x: sparsify.by_magnitude(SteeringVector(np.zeros(5), 0), 1), "zero"),
        (
            lambda v, x: sparsify.by_effect(SteeringVector([1, 0, 0], 0), [1, 2, 3], 1),
            "no dimension",
        ),
        (lambda v, x: sparsify.iou(v, x[:-1]), "widths"),
        (lambda v, x: sparsify.iou([0, 0], [0, 0]), "neither"),
        (lambda v, x: sparsify.iou(v, 3), "mask"),
        (lambda v, x: sparsify.overlap_test(v, x[:-1]), "widths"),
        (lambda v, x: sparsify.overlap_test([], []), "mask"),
    ],
)
def test_refused(rng, call, says):
    with pytest.raises(ValueError, match=says):
        call(vector(rng), rng.standard_normal(37))


# -- overlap ---------------------------------------------------------------------------------------


def test_iou(rng):
    a, b = rng.random(50) < 0.4, rng.random(50) < 0.6
    assert (
        sparsify.iou(a, b)
        == (a & b).sum() / (a | b).sum()
        == sparsify.iou(b.astype(int), a.astype(float))
    )
    v = vector(rng)
    u = sparsify.by_magnitude(v, 20)
    assert (
        sparsify.iou(u, u) == 1 and sparsify.iou(u, ~u.kept) == 0 and sparsify.iou(v, u) == 17 / 37
    )
    assert sparsify.overlap_test(u, u) == pytest.approx(1 / math.comb(37, 17), rel=1e-10)
    assert sparsify.overlap_test(u, ~u.kept) == 1.0 and sparsify.overlap_test(v, u) == 1.0


def masks(rng, total, marked, drawn, shared):
    """Two masks of these sizes."""
    order = rng.permutation(total)
    a, b = np.zeros(total, bool), np.zeros(total, bool)
    a[order[:marked]] = True
    b[order[:shared]] = True
    b[order[marked : marked + drawn - shared]] = True
    return a, b


def cases(n, seed=0):
    """(total, marked, drawn, shared): random ones, and every extreme: nothing, everything,
    least and most shared.
    """
    rng = np.random.default_rng(seed)
    for i in range(n):
        total = int(rng.choice([1, 2, 10, 100, 576, 2304, 4096]))
        draw = lambda: int(
            rng.choice([0, total, rng.integers(0, total + 1), min(total, rng.integers(0, 40))])
        )
        marked, drawn = draw(), draw()
        least, most = max(0, marked + drawn - total), min(marked, drawn)
        shared = int(
            rng.choice(
                [
                    least,
                    most,
                    min(most, least + 1),
                    rng.integers(least, most + 1),
                    min(most, max(least, round(marked * drawn / total))),
                ]
            )
        )
        yield total, marked, drawn, shared


def test_overlap_against_scipy(rng):
    from scipy import stats

    for i, (total, marked, drawn, shared) in enumerate(cases(1000)):
        got = sparsify.overlap_test(*masks(rng, total, marked, drawn, shared))
        # scipy sums terms of the mass function, itself good to about 1e-10 here.
        want = float(stats.hypergeom.sf(shared - 1, total, marked, drawn))
        assert got == pytest.approx(want, rel=2e-8, abs=1e-300), (total, marked, drawn, shared)
        if i % 4 == 0 and shared > 0 and 0 < want < 1:
            logs = stats.hypergeom.logsf(shared - 1, total, marked, drawn)
            mine = sparsify.overlap_test(*masks(rng, total, marked, drawn, shared), log=True)
            if want > 1e-280:  # below, scipy's own logarithm gives up
                assert mine == pytest.approx(logs, rel=1e-7, abs=1e-10)


def test_overlap_against_exact_fractions(rng):
    for total, marked, drawn, shared in cases(150, seed=1):
        top = sum(
            math.comb(marked, i) * math.comb(total - marked, drawn - i)
            for i in range(shared, min(marked, drawn) + 1)
        )
        exact = Fraction(top, math.comb(total, drawn))
        log = sparsify.overlap_test(*masks(rng, total, marked, drawn, shared), log=True)
        want = math.log(exact.numerator) - math.log(exact.denominator)
        assert log == pytest.approx(want, rel=1e-9, abs=1e-10), (total, marked, drawn, shared)


def test_log_tail_far_out():
    """Smaller than any float64: its logarithm still is right."""
    log = log_tail(2000, 4096, 2000, 2000)
    assert (
        log
        == pytest.approx(-(math.lgamma(4097) - math.lgamma(2001) - math.lgamma(2097)), rel=1e-12)
        and math.exp(log) == 0.0
    )
    assert log_tail(5, 10, 4, 4) == -math.inf and log_tail(0, 10, 4, 4) == 0.0
    for wrong in ((1, 10, 11, 4), (1, 10, 4, 11), (1, 10, -1, 4)):
        with pytest.raises(ValueError):
            log_tail(*wrong)


# -- the sweep -------------------------------------------------------------------------------------


class Along(ScriptedModel):
    """Steering acts by the part of the direction that lies along `true`."""

    def __init__(self, true):
        super().__init__({})
        self.true = true.direction.astype(np.float64)

    def generate(self, prompts, *, edits=(), **options):
        acting = (
            [
                [
                    SimpleNamespace(
                        coefficient=e.coefficient
                        * float(e.vector.direction @ self.true)
                        / float(self.true @ self.true),
                        vector=SimpleNamespace(method=""),
                    )
                    for e in row
                ]
                for row in edits
            ]
            if edits
            else ()
        )
        return super().generate(prompts, edits=acting, **options)


@pytest.fixture
def setting(rng):
    """A vector with a few strong dimensions, the gradient that finds them, and a
    model that goes by it.
    """
    direction = np.full(12, 0.1)
    direction[[2, 7, 9]] = 2.0, -3.0, 1.0
    gradient = np.full(12, 0.01)
    gradient[[2, 7, 9]] = 1.0, 1.2, 0.6
    v = SteeringVector(direction, 2, method="dim")
    return v, v.direction * gradient, Along(v)


def run(model, v, scores, **more):
    return sparsify.sweep(
        model, v, scores, HARMFUL, HARMLESS, max_new_tokens=9, progress=False, **more
    )


def test_sweep(setting):
    v, ie, model = setting
    sw = run(model, v, ie)
    assert [r.method for r in sw][:5] == ["unsteered", *METHODS] and sw.vectors == ["dim"]
    for tau in TAUS:
        rows = [r for r in sw if r.tau == tau]
        try:
            kept = sparsify.by_gradient(v, ie, tau).kept
        except ValueError:
            assert not rows and any(f"tau {tau:g}" in reason for reason in sw.setting["left_out"])
            continue
        assert [r.method for r in rows] == list(METHODS) and {r.k for r in rows} == {
            int((~kept).sum())
        }
        assert all(r.sparsity == r.k / 12 for r in rows)
        if 0 < tau <= 0.5:  # the three dimensions carry it
            assert (rows[0].harmless.asr, rows[0].harmful.asr) == (0.0, 1.0) and rows[0].k == 9
    dense, control = sw.curve("dim", "gradient")[0], sw.curve("dim", "random direction")[0]
    assert (
        dense.k == 0
        and (dense.harmless.asr, dense.harmful.asr) == (0.0, 1.0)
        and (dense.harmful.ended, dense.harmful.repetition) == (1.0, 0.0)
    )
    assert (control.harmless.asr, control.harmful.asr) == (1.0, 0.0) and (
        sw.rows[0].harmless.asr,
        sw.rows[0].harmful.asr,
    ) == (1.0, 0.0)
    # Equal directions are run once: tau 0 is one run, whatever the method.
    distinct = {digest(p.direction) for tau in sw.setting["taus"] for p in _all(v, ie, tau)}
    assert len(model.generations) == len(distinct) + 2
    assert len(sw) == 2 + 4 * len({r.tau for r in sw if r.tau is not None})
    with pytest.raises(KeyError, match="gradient"):
        sw.curve("dim", "nothing")


def _all(v, ie, tau):
    try:
        k = int((~sparsify.by_gradient(v, ie, tau).kept).sum())
    except ValueError:
        return []
    return [
        sparsify.by_gradient(v, ie, tau),
        sparsify.by_effect(v, ie, k),
        sparsify.by_magnitude(v, k),
        sparsify.by_random(v, k, 0),
    ]


def test_sweep_of_several_vectors(setting, tmp_path):
    v, ie, model = setting
    u = SteeringVector(v.direction[::-1], 2, method="ntp")
    sw = run(
        model,
        {"dim": v, "ntp": u},
        {"dim": ie, "ntp": ie[::-1]},
        coefficient={"dim": (1.0, 0.8), "ntp": 2.0},
        taus=[0, 0.3],
        methods=["gradient", "random"],
        random_control=2,
    )
    assert sw.vectors == ["dim", "ntp"] and len(sw) == 1 + 2 * (2 * 2 + 2)
    assert sw.setting["vectors"]["dim"]["coefficient"] == [1.0, 0.8] and sw.setting["vectors"][
        "ntp"
    ]["coefficient"] == [2.0, 2.0]
    d = json.loads(json.dumps(sw.to_dict()))
    assert (
        d["rows"][1]["vector"] == "dim"
        and d["rows"][1]["harmful"]["asr"] == 1.0
        and d["setting"]["model_hash"] == "numpy-standin"
    )
    text = sw.to_markdown()
    assert (
        text == repr(sw)
        and len(text.splitlines()) == 4 + len(sw)
        and "| dim | gradient | 0 | 0 | 0.0 % | 0.000 [" in text
    )
    figure = sw.plot(tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 10000 and len(figure.axes) == 12


def test_sweep_resumes(setting, tmp_path):
    v, ie, model = setting
    out, seen = tmp_path / "answers.jsonl", []

    def stop_after_three(done, total):
        seen.append((done, total))
        if len(seen) == 3:
            raise KeyboardInterrupt

    call = lambda m, **more: sparsify.sweep(
        m, v, ie, HARMFUL, HARMLESS, max_new_tokens=9, out=out, **{"progress": False, **more}
    )
    with pytest.raises(KeyboardInterrupt):
        call(model, progress=stop_after_three)
    assert (
        seen[:2] == [(7, seen[0][1]), (14, seen[0][1])]
        and len(model.generations) == 3
        and len(out.read_text().splitlines()) == 4
    )
    out.write_bytes(out.read_bytes()[:-40])  # killed in the middle of a line
    again = Along(v)
    sw = call(again)
    n = seen[0][1] // 7
    assert len(again.generations) == n - 2
    assert sw.to_dict() == run(Along(v), v, ie).to_dict()
    third = Along(v)
    assert call(third).to_dict() == sw.to_dict() and not third.generations
    more = call(third, taus=[*TAUS, 0.2])  # another tau joins the same file
    assert len(third.generations) <= 4 and len(more) == len(sw) + 4
    with pytest.raises(ValueError, match="another model or other prompts"):
        sparsify.sweep(
            third, v, ie, HARMFUL[:2], HARMLESS, max_new_tokens=9, out=out, progress=False
        )
    for content in ('{"format": "other", "key": "x"}\n', "not json\n", '{"key": 3}\n'):
        out.write_text(content)
        with pytest.raises(ValueError, match="no file of a sparsity sweep"):
            call(third)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(taus=[]), "at least one tau"),
        (dict(taus=[-1]), "taus"),
        (dict(taus=[math.nan]), "taus"),
        (dict(taus=[1, 1]), "none twice"),
        (dict(methods=[]), "methods"),
        (dict(methods=["best"]), "methods"),
        (dict(methods=["random", "random"]), "methods"),
        (dict(scores=np.ones(11)), "width 12"),
        (dict(scores=np.zeros(12)), "zero"),
        (dict(scores={"other": np.ones(12)}), "scores must name"),
        (dict(coefficient=-1.0), "magnitude"),
        (dict(coefficient={"x": 1.0}), "coefficient must name"),
        (dict(random_control=-1), "random_control"),
        (dict(seed=1.5), "seed"),
        (dict(harmful=[]), "harmful is empty"),
        (dict(harmless=[]), "harmless is empty"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=60), "context 64"),
        (dict(vectors=SteeringVector(np.ones(11), 2)), "width 11"),
        (dict(vectors=SteeringVector(np.ones(12), 5)), "layer 5"),
        (dict(vectors=SteeringVector(np.zeros(12), 2)), "zero"),
        (dict(vectors={}), "vectors must name"),
        (dict(vectors={"a": np.ones(12)}), "SteeringVector"),
        (
            dict(
                vectors={"a": SteeringVector(np.ones(12), 2), "b": SteeringVector(np.ones(12), 2)}
            ),
            "one for each of a, b",
        ),
        (dict(out="/nowhere/x.jsonl"), "folder /nowhere"),
        (dict(min_words=-3), "min_words"),
        (dict(progress=3), "progress"),
    ],
)
def test_sweep_refuses_before_any_work(setting, change, says):
    v, ie, model = setting
    arguments = (
        dict(
            vectors=v,
            scores=ie,
            harmful=HARMFUL,
            harmless=HARMLESS,
            max_new_tokens=9,
            progress=False,
        )
        | change
    )
    with pytest.raises(ValueError, match=says):
        sparsify.sweep(model, **arguments)
    assert not model.generations
