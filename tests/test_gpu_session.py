"""benchmarks/gpu.py, the session on a real GPU, tried with tiny sizes: every comparison runs, a
part that is cut or fails loses nothing, and the result is what the tables read.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from child import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def session(tmp_path):
    import gpu

    return gpu.Session(tmp_path / "out.json", 60, {"machine": {}})


@pytest.mark.timeout(300)
def test_every_part_runs_with_tiny_sizes(tmp_path):
    import gpu
    import table

    out = tmp_path / "gpu.json"
    comparisons = list(gpu.gpu_rows.COMPARISONS)
    command = [sys.executable, ROOT / "benchmarks/gpu.py", "--tiny", "--out", out, "--only"]
    done = subprocess.run(
        [*command, *comparisons, "tests"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    content = json.loads(out.read_text())
    parts = ["tiny: making", *(f"tiny: {name}" for name in comparisons), "tests"]
    assert [(p["part"], p["state"]) for p in content["parts"]] == [(p, "done") for p in parts]
    assert content["parts"][-1]["outcomes"]["PASSED"] > 10
    rows = {r["what"]: r for r in content["rows"]}
    for begins in ("pass over", "decoding, 1", "decoding, 3", "frozen", "attribution", "lens"):
        row = next(r for what, r in rows.items() if what.startswith(f"tiny: {begins}"))
        ours, peer = table.sides(row)
        assert row["unit"] == "x" and ours > 0 and row["value"] == pytest.approx(peer / ours)
        assert row.get("largest_difference", 0) < 1e-3
    assert sum("tflops" in r for r in content["rows"]) >= 2 + 3


def test_a_part_that_is_cut_or_fails_loses_nothing(session):
    from timing import row

    def slow(entry):
        yield row("a", 1.0, "s")
        time.sleep(30)
        yield row("b", 1.0, "s")

    def failing(entry):
        yield row("c", 1.0, "s")
        raise RuntimeError("the two sides do not compute the same")

    start = time.perf_counter()
    assert not session.part("slow", 0.2, slow)
    assert not session.part("failing", 5, failing)
    assert session.part("fine", 5, lambda entry: iter([row("d", 1.0, "s")]))
    session.total = 0
    assert not session.part("late", 5, lambda entry: iter([row("e", 1.0, "s")]))
    assert time.perf_counter() - start < 10
    stored = json.loads(session.out.read_text())
    states = {p["part"]: p["state"] for p in stored["parts"]}
    assert states == {"slow": "cut", "failing": "failed", "fine": "done", "late": "cut"}
    assert "do not compute the same" in stored["parts"][1]["error"]
    assert [r["what"] for r in stored["rows"]] == ["a", "c", "d"]


def test_a_program_that_is_cut_is_ended(session, tmp_path):
    import gpu

    mark = tmp_path / "mark"
    code = f"import time; print('begun', flush=True); time.sleep(3); open({str(mark)!r}, 'w')"

    def run(entry):
        for line in gpu.program("-c", code):
            entry["said"] = line.strip()
        yield from ()

    assert not session.part("program", 1, run)
    assert session.content["parts"][0] | {"seconds": 0} == {
        "part": "program", "budget_s": 1, "state": "cut", "said": "begun", "seconds": 0
    }  # fmt: skip
    time.sleep(3)
    assert not mark.exists()


def test_failed_tests_and_wrong_ops_fail_their_part(session, monkeypatch):
    import gpu

    lines = ["tests/test_x.py::a PASSED", "tests/test_x.py::b FAILED [ 50%]", "FAILED tests/test_x"]
    monkeypatch.setattr(gpu, "program", lambda *words: iter(lines))
    assert not session.part("tests", 5, gpu.tests(["test_x.py"]))
    assert session.content["parts"][-1]["outcomes"] == {"PASSED": 1, "FAILED": 1}
    lines[:] = ["no tests ran"]
    assert not session.part("tests", 5, gpu.tests(["test_x.py"]))
    ops = [{"op": "norm", "ok": True}, {"op": "rope", "ok": False}]
    lines[:] = ["a warning\n", json.dumps({"device": "d", "ok": False, "ops": ops})]
    assert not session.part("verify", 5, gpu.verify(None))
    assert session.content["parts"][-1]["wrong"] == ops[1:]
