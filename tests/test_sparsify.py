"""Choosing dimensions against NumPy, the hypergeometric tail against scipy and exact fractions, the
sweep on a scripted model.
"""

from __future__ import annotations

import copy
import math
import pickle
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from sparse_vector import vector
from vksteer import sparsify
from vksteer.base.provenance import digest
from vksteer.circuits.graph import graph
from vksteer.inputs.vectors import SteeringVector
from vksteer.sparsify.choosing import log_tail
from vksteer.sparsify.sweeping import TAUS

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
        with pytest.raises(ValueError, match=r"dims='steer'|steering node"):
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
    for _i in range(n):
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
