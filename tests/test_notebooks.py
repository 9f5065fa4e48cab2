"""The notebooks run from top to bottom, without network, and are kept without outputs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Pictures that each notebook shows at least.
PICTURES = {"01": 1, "02": 2, "03": 3, "04": 2, "05": 7, "06": 2, "07": 1}
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert [p.name for p in NOTEBOOKS] == [
        "01_first_look.ipynb",
        "02_what_steering_acts_through.ipynb",
        "03_circuits.ipynb",
        "04_inside_ov_and_sparsity.ipynb",
        "05_strength_and_reliability.ipynb",
        "06_neighbours.ipynb",
        "07_study.ipynb",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_kept_without_outputs(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count"), (
            "strip outputs: jupyter nbconvert --clear-output --inplace"
        )


def marked(path):
    """The first notebook and the study always run; the others with the long tests."""
    marks = () if path.name[:2] in ("01", "07") else pytest.mark.long
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
def test_runs(path, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    start = time.perf_counter()
    nbclient.NotebookClient(
        notebook,
        timeout=240,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    seconds = time.perf_counter() - start
    print(f"{path.name}: {seconds:.0f} s")
    pictures = [
        o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= PICTURES[path.stem[:2]]
    errors = [
        o for c in notebook.cells for o in c.get("outputs", []) if o["output_type"] == "error"
    ]
    assert not errors
