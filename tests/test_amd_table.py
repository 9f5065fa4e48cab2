"""AMD's real compiler for chips that are not present: no kernel spills, and none gets worse than
the committed table says.
"""

from __future__ import annotations

import copy
import sys

import pytest

from child import ROOT, tool

sys.path.insert(0, str(ROOT / "tools"))
import amd_table


@pytest.mark.timeout(280)
@pytest.mark.parametrize("chip", amd_table.CHIPS)
def test_no_kernel_spills_or_gets_worse(chip):
    assert tool("radeon_icd")
    mesa, reported = amd_table.report(chip)
    assert len(reported) > 100
    for name, statistics in reported.items():
        assert statistics["VGPRs"] > 0 and statistics["Code size"] > 0, f"{name}: no statistics"
    assert not amd_table.spilled(chip, reported)
    table = amd_table.stored()
    if mesa != table["mesa"]:
        pytest.skip(f"nothing spills; the table is of Mesa {table['mesa']}, and this is {mesa}")
    assert not amd_table.worse(table, chip, reported), "better or justified: amd_table.py write"


def test_what_counts_as_worse():
    table = amd_table.stored()
    same = {
        kernel: dict(zip(amd_table.STATISTICS, rows["navi31"]))
        for kernel, rows in table["kernels"].items()
        if "navi31" in rows
    }
    assert not amd_table.worse(table, "navi31", same)
    for name, factor, is_worse in (
        ("Latency", 1.2, True),
        ("Latency", 1.05, False),
        ("Latency", 0.5, False),
        ("Subgroups per SIMD", 0.5, True),
        ("Subgroups per SIMD", 2, False),
        ("VGPRs", 2, True),
    ):
        changed = copy.deepcopy(same)
        changed["linear_f32_1"][name] *= factor
        found = amd_table.worse(table, "navi31", changed)
        assert len(found) == is_worse, (name, factor, found)
        assert all(f.startswith(f"linear_f32_1 on navi31: {name} was ") for f in found)
    changed = same | {"new": same["norm"]}
    del changed["rope"]
    assert len(amd_table.worse(table, "navi31", changed)) == 2


def test_the_page_shows_the_table():
    table = amd_table.stored()
    assert amd_table.TABLE.read_text() == amd_table.text(table)
    assert amd_table.PAGE.read_text() == amd_table.page(table)
