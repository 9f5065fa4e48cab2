"""The verdicts of a study and the sentences of its report, from results made by hand."""

from __future__ import annotations

import copy
import math

import pytest

from vksteer.study.claims import FAILS, HOLDS, UNKNOWN, claims
from vksteer.study.sections import sections


def rate(asr, n=100):
    """A rate with its 95 % Wilson interval."""
    z = 1.959963984540054
    middle = (asr + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(asr * (1 - asr) / n + z * z / (4 * n * n))
    return {"asr": asr, "low": middle - half, "high": middle + half, "n": n}


def row(harmless, harmful, n=100):
    return {"harmless": rate(harmless, n), "harmful": rate(harmful, n), "average_change": 0.0}


def table(n=100, **rows):
    """Table 1 of a vector that works: harmless prompts are refused, harmful ones answered."""
    given = {"none": (0.0, 1.0), "QK": (0.05, 0.95), "OV": (1.0, 0.0), "unsteered": (1.0, 0.0)}
    made = {name: row(*rates, n) for name, rates in (given | rows).items()}
    for one in made.values():
        moved = [abs(one[s]["asr"] - made["none"][s]["asr"]) for s in ("harmless", "harmful")]
        one["average_change"] = sum(moved) / 2
    setting = {
        "n_harmless": n, "n_harmful": n, "coefficient": [1.0, 1.0], "dose": [0.5, 0.75],
    }  # fmt: skip
    return {"table1": {"rows": made, "setting": setting}}


def frozen(steps):
    """The claims about patterns and values."""
    return claims(steps)[1:3]


def test_the_interval_of_a_change():
    """Newcombe's interval of two rates: 56 of 70 against 48 of 80 is 0.2 [0.0524, 0.3339] (Newcombe
    1998, table II, method 10).
    """
    rows = {"none": row(48 / 80, 0.5, 80), "QK": row(56 / 70, 0.5, 70), "unsteered": row(1, 0)}
    steps = table()
    steps["table1"]["rows"] |= rows
    found = frozen(steps)[0]
    assert found["value"] == pytest.approx(0.1)

    # the other side changes by 0 +- w, a size of 0 to w; widths are added in squares, and halved
    def width(p, n, q, m, upper):
        a, b = rate(p, n), rate(q, m)
        ends = (a["high"] - p, q - b["low"]) if upper else (p - a["low"], b["high"] - q)
        return math.hypot(*ends)

    assert 0.2 - width(0.8, 70, 0.6, 80, False) == pytest.approx(0.0524, abs=1e-4)
    assert 0.2 + width(0.8, 70, 0.6, 80, True) == pytest.approx(0.3339, abs=1e-4)
    high = math.hypot(width(0.8, 70, 0.6, 80, True), width(0.5, 70, 0.5, 80, True)) / 2
    assert found["high"] == pytest.approx(0.1 + high)
    assert found["low"] == pytest.approx(0.1 - width(0.8, 70, 0.6, 80, False) / 2)


def test_the_interval_of_a_change_downward():
    """The size of a fall has the interval of the rise that mirrors it."""
    up, down = table(), table()
    up["table1"]["rows"] |= {"none": row(0.6, 0.6, 80), "QK": row(0.8, 0.8, 70)}
    down["table1"]["rows"] |= {"none": row(0.8, 0.8, 70), "QK": row(0.6, 0.6, 80)}
    up, down = frozen(up)[0], frozen(down)[0]
    for name in ("value", "low", "high"):
        assert up[name] == pytest.approx(down[name])
    # each side is 0.2 [0.0524, 0.3339], see above
    assert up["low"] == pytest.approx(0.2 - math.hypot(0.1476, 0.1476) / 2, abs=1e-4)
    assert up["high"] == pytest.approx(0.2 + math.hypot(0.1339, 0.1339) / 2, abs=1e-4)


def test_only_what_undoes_steering_counts_for_values():
    """A part whose freezing makes steering stronger does not carry its effect."""
    steps = table(none=(0.4, 0.6), OV=(0.0, 1.0), unsteered=(1.0, 0.0))
    steps["table1"]["rows"]["none"] = row(0.3, 0.9)
    claim = frozen(steps)[1]
    assert claim["value"] == pytest.approx(-0.2) and claim["verdict"] == FAILS


def test_verdicts_of_frozen_parts():
    patterns, values = frozen(table())
    assert patterns["verdict"] == values["verdict"] == HOLDS
    assert values["value"] == 1 and values["high"] == 1  # a change is never more than all
    patterns, values = frozen(table(QK=(1.0, 0.0), OV=(0.0, 1.0)))
    assert patterns["verdict"] == values["verdict"] == FAILS
    patterns, values = frozen(table(QK=(0.2, 0.8), OV=(0.5, 0.5)))  # on the thresholds
    assert patterns["verdict"] == values["verdict"] == UNKNOWN
    assert {c["verdict"] for c in frozen(table(n=29))} == {UNKNOWN}


def test_a_vector_without_effect_has_no_verdict():
    """Nothing changes when a part is frozen, because there was nothing to change."""
    steps = table(none=(1.0, 0.0), QK=(1.0, 0.0), OV=(1.0, 0.0))
    for claim in frozen(steps):
        assert claim["verdict"] == UNKNOWN and "by 0 % only" in claim["why"]
    ((_, (figure,)),) = sections(steps)
    assert "too little to tell through what it acts" in figure.sentence


def test_few_prompts_are_said():
    ((_, (figure,)),) = sections(table(n=29))
    assert "through OV, as far as 29 prompts of each kind can tell." in figure.sentence


@pytest.mark.parametrize(
    "rows, words",
    [
        ({}, "the vector acts through OV."),
        (dict(QK=(0.4, 0.6)), "acts through OV more than through QK"),
        (dict(QK=(1.0, 0.0)), "acts through QK as well"),
        (dict(QK=(1.0, 0.0), OV=(0.05, 0.95)), "acts through QK more than through OV"),
        (dict(OV=(0.02, 0.98)), "the vector hardly needs either"),
        (dict(QK=(0.2, 0.8), OV=(0.25, 0.75)), "these samples cannot tell"),
    ],
)
def test_what_the_report_says_of_table_1(rows, words):
    ((_, (figure,)),) = sections(table(**rows))
    assert words in figure.sentence and "dose 0.50" in figure.note and "dose 0.75" in figure.note


def sparse(n=100, p=1e-6):
    def of(method, tau, sparsity, harmless, harmful):
        return {"method": method, "tau": tau, "sparsity": sparsity} | row(harmless, harmful)

    rows = [
        of("unsteered", None, 0.0, 1.0, 0.0),
        of("gradient", 0.0, 0.0, 0.0, 1.0),
        of("gradient", 0.5, 0.6, 0.0, 1.0),
        of("gradient", 1.5, 0.95, 0.1, 0.9),
        of("gradient", 2.0, 0.99, 0.9, 0.1),
        of("random", 1.5, 0.95, 1.0, 0.0),
    ]
    overlaps = {"0.5": [["dim", "ntp", 0.6, 1.0]], "1.5": [["dim", "ntp", 0.4, p]]}
    setting = {"n_harmless": n, "n_harmful": n}
    return {"rows": rows, "overlaps": overlaps, "setting": setting, "vectors": ["dim", "ntp"]}


def of_sparsity(found):
    return claims({"sparsity": found})[4]


def test_sparsity_holds_only_where_methods_agree():
    claim = of_sparsity(sparse())
    assert claim["verdict"] == HOLDS and claim["value"] == 0.95 and "1e-06" in claim["why"]
    assert (claim["low"], claim["high"]) == (0.95, 0.99)
    assert of_sparsity(sparse(p=1.0))["verdict"] == UNKNOWN  # no evidence is none against it
    assert of_sparsity(sparse(n=29))["verdict"] == UNKNOWN
    alone = sparse() | {"overlaps": {}}
    assert of_sparsity(alone)["verdict"] == UNKNOWN
    without = of_sparsity(sparse() | {"vectors": ["dim", "ntp", "po"]})
    assert without["verdict"] == UNKNOWN and "po cannot be compared" in without["why"]
    weak = copy.deepcopy(sparse())
    for r in weak["rows"]:
        r["harmless"], r["harmful"] = rate(1.0), rate(0.0)
    assert of_sparsity(weak)["verdict"] == UNKNOWN and "0 % only" in of_sparsity(weak)["why"]
    assert of_sparsity({"why": "steering flips no prompt"})["why"] == "steering flips no prompt"


def changed(tau, **fields):
    """The sweep with other fields in the row of one threshold."""
    found = sparse()
    (at,) = [r for r in found["rows"] if r["method"] == "gradient" and r["tau"] == tau]
    at |= fields
    return found


def test_a_limit_between_two_thresholds_is_not_told():
    """60 % may go and 99 % may not: nothing was measured near 90 %."""
    found = sparse()
    found["rows"] = [r for r in found["rows"] if r["tau"] != 1.5]
    claim = of_sparsity(found)
    assert claim["verdict"] == UNKNOWN and claim["value"] == 0.6
    assert (claim["low"], claim["high"]) == (0.6, 0.99)
    lost = changed(0.5, sparsity=0.9, **row(0.6, 0.4))
    assert of_sparsity(lost)["verdict"] == FAILS and "90 % are too many" in of_sparsity(lost)["why"]


def test_many_thresholds_do_not_refute_by_chance():
    """28 of 100 lost both ways is a loss of at least 21.9 % with the interval of one test, and of
    at least 19.1 % with that of ten.
    """
    one, ten = changed(0.5, **row(0.28, 0.72)), changed(0.5, **row(0.28, 0.72))
    assert of_sparsity(one)["verdict"] == FAILS and "60 % are too many" in of_sparsity(one)["why"]
    (kept,) = [r for r in ten["rows"] if r["method"] == "gradient" and r["tau"] == 0.0]
    ten["rows"] += [kept | {"tau": 0.01 * i, "sparsity": 0.01 * i} for i in range(1, 10)]
    assert of_sparsity(ten)["verdict"] == HOLDS


def test_a_loss_that_may_be_noise_is_not_told():
    """85 of 100 both ways lose 15 % of the effect; the interval passes the threshold of 20 %."""
    claim = of_sparsity(changed(1.5, **row(0.15, 0.85)))
    assert claim["verdict"] == UNKNOWN and claim["value"] == 0.95 and claim["low"] == 0.6


def test_no_effect_chooses_the_vector_that_is_tested():
    """The densest of the vectors in range decides, not the best of them."""
    found = changed(1.5, **row(0.5, 0.5))
    found["rows"] = [
        r | row(0.0, 1.0) if r["method"] == "gradient" and r["tau"] == 2.0 else r
        for r in found["rows"]
    ]
    claim = of_sparsity(found)
    assert claim["value"] == 0.99 and claim["verdict"] == UNKNOWN


def means(train=64, vector=0.0, excess=(0.1, 0.05, 0.15), over_vector=(0.12, 0.06, 0.2), p=1 / 21):
    found = {
        "heads": [[7, 0], [7, 1]], "share": 0.12, "vector": vector, "random": [0.02] * 20,
        "random_vectors": [0.01] * 20, "p": p,
        "excess": {"vector": list(over_vector), "random": list(excess)},
    }  # fmt: skip
    steps = {"prompts": {"counts": {"train": [train, train]}}, "values": {"meaning": found}}
    return claims(steps)[3]


def test_what_value_vectors_mean():
    claim = means()
    assert (claim["value"], claim["low"], claim["high"]) == (0.1, 0.05, 0.15)
    assert claim["verdict"] == HOLDS and "12.0 % of the top tokens of 2 heads" in claim["why"]
    assert means(p=2 / 21)["verdict"] == UNKNOWN
    assert means(excess=(0.03, -0.01, 0.07))["verdict"] == UNKNOWN
    assert means(excess=(0.01, -0.01, 0.04))["verdict"] == FAILS
    assert means(over_vector=(0.0, -0.1, 0.01))["verdict"] == FAILS
    assert means(excess=(0.025, 0.01, 0.04))["verdict"] == UNKNOWN  # above 0, below 5 points
    # One interval reaches down to 0, the other lies below 5 points: neither does both.
    assert means(excess=(0.1, -0.02, 0.22), over_vector=(0.02, 0.01, 0.04))["verdict"] == UNKNOWN
    few = means(train=24)
    assert few["verdict"] == UNKNOWN and "fewer than 30 prompts" in few["why"]
    both = means(vector=0.07)
    assert both["verdict"] == UNKNOWN and "the vector itself means something" in both["why"]


def shared(least=0.9, half=0.05, own=0.9):
    names = ["harmful.steered", "harmless.base", "ntp"]
    overlap = {"names": names, "values": [[1, 0.1, least], [0.1, 1, 0.1], [least, 0.1, 1]]}
    agreement = {
        "pairs": [["harmful.steered", "ntp", least, least - half, least + half]],
        "own": {"harmful.steered": own, "ntp": 0.95}, "chance": 0.1,
        "samples": {"harmful.steered": 16, "ntp": 12}, "draws": 200,
    }  # fmt: skip
    return {
        "overlap": overlap | {"values": [[1, 0.1, 0.5], [0.1, 1, 0.1], [0.5, 0.1, 1]]},
        "overlap_of_tenths": overlap,
        "agreement": agreement,
    }


@pytest.mark.parametrize(
    "found, verdict",
    [
        (shared(), HOLDS),
        (shared(half=0.15), UNKNOWN),
        (shared(least=0.7), FAILS),
        (shared(least=0.7, half=0.15), UNKNOWN),
        (shared(least=0.7, own=0.75), UNKNOWN),  # nor do its own halves agree
    ],
)
def test_shared_circuits(found, verdict):
    claim = claims({"circuits": found})[0]
    assert claim["verdict"] == verdict
    pair = found["agreement"]["pairs"][0]
    assert [claim["value"], claim["low"], claim["high"]] == pair[2:]
    assert "smallest faithful circuits overlap by 0.50" in claim["why"]


def test_too_few_samples_for_an_interval():
    found = shared() | {"agreement": {"why": "7 samples of one vector: intervals need 8"}}
    claim = claims({"circuits": found})[0]
    assert claim["verdict"] == UNKNOWN and claim["value"] == 0.9 and claim["low"] is None
    assert claim["why"].startswith("7 samples")


def test_nothing_has_run():
    assert {(c["verdict"], c["why"]) for c in claims({})} == {(UNKNOWN, "has not run")}
