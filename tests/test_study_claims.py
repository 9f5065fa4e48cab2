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

    # the other side changes by 0 +- w; both widths are added in squares, and halved
    def width(p, n, q, m, upper):
        a, b = rate(p, n), rate(q, m)
        ends = (a["high"] - p, q - b["low"]) if upper else (p - a["low"], b["high"] - q)
        return math.hypot(*ends)

    assert 0.2 - width(0.8, 70, 0.6, 80, False) == pytest.approx(0.0524, abs=1e-4)
    assert 0.2 + width(0.8, 70, 0.6, 80, True) == pytest.approx(0.3339, abs=1e-4)
    high = math.hypot(width(0.8, 70, 0.6, 80, True), width(0.5, 70, 0.5, 80, True)) / 2
    low = math.hypot(width(0.8, 70, 0.6, 80, False), width(0.5, 70, 0.5, 80, False)) / 2
    assert found["high"] == pytest.approx(0.1 + high)
    assert found["low"] == pytest.approx(max(0.0, 0.1 - low))


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
    return {"rows": rows, "overlaps": overlaps, "setting": {"n_harmless": n, "n_harmful": n}}


def of_sparsity(found):
    return claims({"sparsity": found})[4]


def test_sparsity_holds_only_where_methods_agree():
    claim = of_sparsity(sparse())
    assert claim["verdict"] == HOLDS and claim["value"] == 0.95 and "1e-06" in claim["why"]
    assert of_sparsity(sparse(p=1.0))["verdict"] == FAILS
    assert of_sparsity(sparse(n=29))["verdict"] == UNKNOWN
    alone = sparse() | {"overlaps": {}}
    assert of_sparsity(alone)["verdict"] == UNKNOWN
    dense = sparse()
    dense["rows"] = [r for r in dense["rows"] if r["tau"] != 1.5]
    assert of_sparsity(dense)["verdict"] == FAILS and of_sparsity(dense)["value"] == 0.6
    weak = copy.deepcopy(sparse())
    for r in weak["rows"]:
        r["harmless"], r["harmful"] = rate(1.0), rate(0.0)
    assert of_sparsity(weak)["verdict"] == UNKNOWN and "0 % only" in of_sparsity(weak)["why"]
    assert of_sparsity({"why": "steering flips no prompt"})["why"] == "steering flips no prompt"


@pytest.mark.parametrize(
    "train, vector, heads, verdict",
    [
        (64, ["a"], [["I", "b"], ["c", "d"]], HOLDS),
        (64, ["a"], [["e", "b"], ["c", "d"]], FAILS),
        (64, ["I"], [["I", "b"], ["c", "d"]], UNKNOWN),
        (24, ["a"], [["I", "b"], ["c", "d"]], UNKNOWN),
    ],
)
def test_what_value_vectors_mean(train, vector, heads, verdict):
    steps = {
        "prompts": {"counts": {"train": [train, train]}},
        "candidates": {"table": {"refusal_token_texts": ["I"]}},
        "values": {"heads": heads, "vector": vector, "negated": ["z"]},
    }
    assert claims(steps)[3]["verdict"] == verdict


@pytest.mark.parametrize(
    "least, samples, verdict", [(0.9, 8, HOLDS), (0.7, 8, FAILS), (0.9, 7, UNKNOWN)]
)
def test_shared_circuits(least, samples, verdict):
    names = ["harmful.steered", "harmless.base", "ntp"]
    steps = {
        "circuits": {"overlap_of_tenths": {
            "names": names, "values": [[1, 0.1, least], [0.1, 1, 0.1], [least, 0.1, 1]],
        }},
        "attribution": {"data_sets": {"harmful.steered": {"samples": 16}}},
        "attribution_learned": {"vectors": {"ntp": {"samples": samples}}},
    }  # fmt: skip
    found = claims(steps)[0]
    assert found["verdict"] == verdict and found["value"] == least


def test_nothing_has_run():
    assert {(c["verdict"], c["why"]) for c in claims({})} == {(UNKNOWN, "has not run")}
