"""The rule that chooses a candidate, on tables written by hand: filters at their bounds, strict and
not, NaN, ties, no candidate left.
"""

from __future__ import annotations

import numpy as np
import pytest

from vksteer.steering import choose
from vksteer.steering.rule import best_of, examine, layer_allowed

NAN = np.nan


def tables(P=2, L=10):
    """Every candidate passes the filters and none is good: bypass 0, induce 0.5, KL 0.01."""
    return np.zeros((P, L)), np.full((P, L), 0.5), np.full((P, L), 0.01)


def test_paper_minimises_sigmoid_bypass_minus_sigmoid_induce():
    bypass, induce, kl = tables()
    bypass[0, 3], induce[0, 3] = -1.0, 0.5  # sigmoid: 0.269 - 0.622 = -0.353
    bypass[1, 4], induce[1, 4] = 0.0, 9.0  # 0.5 - 1 = -0.5
    bypass[1, 5], induce[1, 5] = -2.0, 0.1  # 0.119 - 0.525 = -0.406
    assert choose(bypass, induce, kl) == (1, 4)
    assert choose(bypass, induce, kl, criterion="arditi") == (1, 5)  # the smallest bypass alone
    assert all(type(i) is int for i in choose(bypass, induce, kl))


def test_against_an_exhaustive_search(rng):
    for _ in range(200):
        P, L = int(rng.integers(1, 6)), int(rng.integers(1, 12))
        bypass, induce, kl = (
            rng.normal(0, 3, (P, L)),
            rng.normal(1, 2, (P, L)),
            rng.uniform(0, 0.2, (P, L)),
        )
        bypass[rng.random((P, L)) < 0.2] = NAN
        for criterion in ("paper", "arditi"):
            best, want = np.inf, None
            for p in range(P):
                for l in range(L):
                    b, i, k = bypass[p, l], induce[p, l], kl[p, l]
                    if np.isnan(b) or i < 0 or k > 0.1 or l >= int(0.8 * L):
                        continue
                    value = (
                        b if criterion == "arditi" else 1 / (1 + np.exp(-b)) - 1 / (1 + np.exp(-i))
                    )
                    if value < best:
                        best, want = value, (p, l)
            if want is None:
                with pytest.raises(ValueError, match="no candidate is left"):
                    choose(bypass, induce, kl, criterion)
            else:
                assert choose(bypass, induce, kl, criterion) == want


@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 10, 15, 18, 24, 26, 28, 30, 35, 36, 42, 80, 100])
def test_layer_filter_is_the_codes_or_the_papers(L):
    """The two differ at one layer, and only where 0.8 L is not a whole number."""
    code = [l for l in range(L) if layer_allowed(l, L, strict=False)]
    paper = [l for l in range(L) if layer_allowed(l, L, strict=True)]
    assert code == list(range(int(0.8 * L)))
    assert paper == [l for l in range(L) if 10 * l < 8 * L]
    assert paper[len(code) :] == ([] if L % 5 == 0 else [int(0.8 * L)])


def test_the_one_layer_where_strict_and_code_differ():
    bypass, induce, kl = tables(L=26)
    bypass[
        0, 20
    ] = -5.0  # 0.8 * 26 = 20.8: the paper's inequality holds, but int(20.8) leaves it out
    bypass[1, 19] = -2.0
    assert choose(bypass, induce, kl) == (1, 19)
    assert choose(bypass, induce, kl, strict=True) == (0, 20)
    bypass[0, 21] = -9.0
    assert choose(bypass, induce, kl, strict=True) == (0, 20)


def test_edges_of_induce_and_kl():
    bypass, induce, kl = tables()
    bypass[0, 1], induce[0, 1] = -4.0, 0.0
    bypass[0, 2], kl[0, 2] = -3.0, 0.1
    bypass[0, 3] = -2.0
    bypass[0, 4], induce[0, 4] = -8.0, -1e-9
    bypass[0, 5], kl[0, 5] = -8.0, 0.1 + 1e-9
    assert choose(bypass, induce, kl, "arditi") == (0, 1)
    assert choose(bypass, induce, kl, "arditi", strict=True) == (0, 3)


@pytest.mark.parametrize("table", [0, 1, 2])
def test_nan_is_no_candidate(table):
    t = tables()
    t[0][1, 2], t[0][0, 5] = -9.0, -1.0
    t[table][1, 2] = NAN
    assert choose(*t) == (0, 5)


def test_infinite_scores_are_scores():
    bypass, induce, kl = tables()
    bypass[1, 3], induce[1, 3] = -np.inf, np.inf  # the model is certain
    kl[0, 0] = np.inf
    assert choose(bypass, induce, kl) == (1, 3)
    assert choose(bypass, induce, kl, "arditi") == (1, 3)


def test_ties_go_to_the_first_position_then_the_lowest_layer():
    bypass, induce, kl = tables(P=3)
    for candidate in [(2, 1), (1, 6), (1, 4)]:
        bypass[candidate], induce[candidate] = -800.0, 800.0  # saturated: all three are -1 exactly
    bypass[2, 1] = -900.0
    assert choose(bypass, induce, kl) == (1, 4)
    assert choose(bypass, induce, kl, "arditi") == (2, 1)
    assert choose(*tables()) == (0, 0)


def test_saturated_values_still_differ_where_they_can():
    bypass, induce, _kl = tables(P=1, L=5)
    bypass[:], induce[:] = -40.0, 0.0
    bypass[0, 2] = -41.0
    assert best_of([(0, 0), (0, 2)], bypass, np.full((1, 5), -1e6), "paper") == (0, 2)


def test_none_left_names_filters_and_the_closest():
    bypass, induce, kl = tables(P=2, L=5)
    induce[:] = -3.0
    induce[1, 2] = -0.25
    kl[0, 1], induce[0, 1] = 0.4, 1.0
    bypass[0, 3] = NAN
    with pytest.raises(ValueError) as error:
        choose(bypass, induce, kl)
    text = str(error.value)
    assert (
        "of 10" in text
        and "layer: 2" in text
        and "undefined: 1" in text
        and "induce: 6" in text
        and "kl: 1" in text
    )
    assert "position index 1, layer 2" in text and "-0.25" in text
    with pytest.raises(ValueError, match="every cell is NaN"):
        choose(np.full((1, 5), NAN), np.zeros((1, 5)), np.zeros((1, 5)))
    with pytest.raises(ValueError, match=r"layer: 1.*None was measured"):
        choose([[0.0]], [[1.0]], [[0.0]])  # int(0.8) = 0: no layer passes


def test_rejections_carry_filter_value_and_position():
    bypass, induce, kl = tables(P=2, L=5)
    induce[0, 1], kl[1, 0] = -2.0, 0.3
    eligible, rejected = examine(bypass, induce, kl, positions=[-2, -1])
    assert eligible == [(0, 0), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    assert [(r.position, r.layer, r.filter) for r in rejected] == [
        (-2, 1, "induce"),
        (-2, 4, "layer"),
        (-1, 0, "kl"),
        (-1, 4, "layer"),
    ]
    assert str(
        rejected[0]
    ) == "position -2, layer 1: induce -2, needed >= 0 (KL 0.01)" and rejected[
        2
    ].shortfall == pytest.approx(2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: choose([1.0], [1.0], [1.0]),
        lambda: choose([[1.0]], [[1.0, 2.0]], [[1.0]]),
        lambda: choose(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 3))),
        lambda: choose(*tables(), criterion="mine"),
        lambda: choose(*tables()[:2], "x"),
    ],
)
def test_bad_arguments(call):
    with pytest.raises(ValueError):
        call()
