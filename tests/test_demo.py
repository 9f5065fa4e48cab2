"""The parts of the demo, its prompts, and the example in README.md: what a new user runs first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from vksteer import data
from vksteer.demo import __main__ as demo
from vksteer.demo import qwen as demo_real
from vksteer.demo import qwen_inside as demo_real_inside
from vksteer.demo import report, smollm2

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2 = ROOT / ".models" / smollm2.SMOLLM2
README = (ROOT / "README.md").read_text()


# -- prompts ---------------------------------------------------------------------------------------


def test_written_prompts():
    w = report.written()
    acts = [act for pair in w["acts"] for act in pair]
    assert len(w["acts"]) == 128 and len(set(acts)) == 256 and len(set(w["topics"])) == 24
    assert all(act == act.strip() and not act.endswith((".", "?")) for act in acts)
    assert not [p for p in w["to_steer"] if any(t.split()[-1] in p for t in w["topics"])], (
        "shown prompts are not among those the vector was made of"
    )


def test_splits_share_no_act():
    splits = demo_real.prompts(SimpleNamespace(harmful=None, harmless=None))
    assert {name: len(pair[0]) for name, pair in splits.items()} == {
        "train": 48,
        "validation": 16,
        "test": 64,
    }
    everything = [p for pair in splits.values() for side in pair for p in side]
    assert len(set(everything)) == len(everything) == 256
    for harmful, harmless in zip(*splits["test"]):  # the prompts of a pair have one form
        assert harmful.split()[:2] == harmless.split()[:2]


def test_own_prompts(tmp_path):
    for name in ("bad", "good"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {i}" for i in range(16)))
    splits = demo_real.prompts(
        SimpleNamespace(harmful=str(tmp_path / "bad.txt"), harmless=str(tmp_path / "good.txt"))
    )
    assert [len(pair[0]) for pair in splits.values()] == [8, 4, 4]
    with pytest.raises(ValueError, match="belong together"):
        demo_real.prompts(SimpleNamespace(harmful="x", harmless=None))


# -- parts -----------------------------------------------------------------------------------------


def test_side_by_side():
    text = report.side_by_side(["left", "right"], ["one two three", "a\nb"], width=31)
    lines = text.splitlines()
    assert (
        lines[0].startswith("left")
        and "| right" in lines[0]
        and len(lines) == 4
        and lines[3].endswith("| b")
    )


def test_bad_input_is_said(tmp_path, capsys):
    arguments = ["--real", "--out", str(tmp_path), "--harmful", "no/such/file.txt"]
    missing = ["--harmless", "no/such/file.txt"]
    for more, message in (([], "belong together"), (missing, "no/such/file.txt")):
        assert demo.main([*arguments, *more]) == 2
        assert message in capsys.readouterr().err


def test_bundled_part(tmp_path, capsys):
    assert (
        demo.main(["--part", "tiny", "--test", "4", "--random", "1", "--out", str(tmp_path)]) == 0
    )
    said = capsys.readouterr().out
    assert "| MLP direct |" in said and "Chosen: layer" in said
    result = json.loads((tmp_path / "tiny.json").read_text())
    assert "texts" not in result["table1"] and result["table1"]["rows"]["none"]["harmful"]["n"] == 4
    assert {
        "candidates.md",
        "refusal.safetensors",
        "table1.md",
        "table1.png",
        "tiny.json",
        "circuit.md",
        "circuit.png",
        "curve.png",
        "lens.md",
        "sparsity.md",
        "sparsity.png",
    } == {p.name for p in tmp_path.iterdir()}
    assert (
        0 < result["circuit"]["smallest"] <= result["circuit"]["edges"]
        and result["lens"]["largest"]
        and result["sparsity"]["rows"]
    )


def test_real_part(tmp_path, capsys, monkeypatch):
    assert SMOLLM2.exists(), (
        f"{SMOLLM2} is not there: run .venv/bin/python tools/fetch_model.py smollm2"
        " (make test does it)"
    )
    few = report.written()
    monkeypatch.setattr(
        smollm2,
        "written",
        lambda: few | {"topics": few["topics"][:3], "to_steer": few["to_steer"][:1]},
    )
    monkeypatch.setattr(
        smollm2,
        "speed",
        lambda model, new_tokens, speed=smollm2.speed: speed(model, 24, new_tokens),
    )
    smollm2.real(SMOLLM2, tmp_path, None, new_tokens=4)
    said = capsys.readouterr().out
    assert "+1 (verse)" in said and "| decoding, 1 row |" in said
    arrays = np.load(tmp_path / "smollm2_activations.npz")
    assert (
        arrays["plus/blocks.20.hook_resid_post"].shape
        == arrays["unsteered/blocks.20.hook_resid_post"].shape
    )
    steered, plain = (
        arrays[f"{k}/blocks.{smollm2.LAYER}.hook_resid_post"] for k in ("plus", "unsteered")
    )
    assert not np.array_equal(steered, plain)
    before = f"blocks.{smollm2.LAYER - 1}.hook_resid_post"
    assert np.array_equal(arrays[f"plus/{before}"], arrays[f"unsteered/{before}"])
    speed = json.loads((tmp_path / "smollm2.json").read_text())["speed"]
    assert speed["decode_8"]["tokens_per_s"] > speed["decode_1"]["tokens_per_s"] > 0


def test_table_and_inside_of_a_real_model(tmp_path, capsys, monkeypatch):
    """`make demo-real` and its --inside with a bundled model in place of the real one: they publish
    figures without texts, and --inside goes on from what the first run left.
    """
    bundled = Path(demo.__file__).parents[1] / "models" / "tiny-llama-chat"
    splits = {
        name: data.tiny_pair(name, n) for name, n in (("train", 12), ("validation", 6), ("test", 4))
    }
    monkeypatch.setattr(report, "fetched", lambda *_: bundled)
    monkeypatch.setattr(demo_real, "prompts", lambda _: splits)
    monkeypatch.setattr(demo_real, "LAYERS", (6, 7))
    monkeypatch.setattr(demo_real, "STRENGTHS", (0.7, 1.0))
    for name, value in (
        ("SAMPLES", 2),
        ("SPARSITY_PROMPTS", 2),
        ("TAUS", (1.0,)),
        ("EPOCHS", 1),
        ("BATCH", 4),
    ):
        monkeypatch.setattr(demo_real_inside, name, value)
    arguments = [
        "--real",
        "--out",
        str(tmp_path / "out"),
        "--results",
        str(tmp_path / "results"),
        "--random",
        "0",
    ]
    assert demo.main([*arguments, "--inside"]) == 2
    assert "run that first" in capsys.readouterr().err
    assert demo.main(arguments) == 0
    assert demo.main([*arguments, "--inside"]) == 0
    said = capsys.readouterr().out
    assert "| MLP direct |" in said and "## What it promotes" in said and "| NTP |" in said
    table, inside = (
        json.loads(p.read_text())
        for p in sorted((tmp_path / "results").glob("*.json"), key=lambda p: "inside" in p.name)
    )
    assert (
        table["table1"]["rows"]["none"]["harmful"]["n"] == 4
        and inside["sparsity"]["rows"]
        and inside["lens"]["largest"]
        and inside["ntp"]["compared"]["vectors"]
    )
    answers = [
        a
        for g in json.loads((tmp_path / "out" / "qwen_answers.json").read_text())["rows"].values()
        for side in g.values()
        for a in side
    ]
    published = "".join(p.read_text() for p in (tmp_path / "results").iterdir())
    assert answers and not [a for a in answers if len(a["text"]) > 20 and a["text"] in published]


def test_nothing_to_run(tmp_path, monkeypatch, capsys):
    """Without a model the demo says so and fails."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert demo.main(["--part", "smollm2", "--out", str(tmp_path / "out")]) == 1
    assert "Part 2, the real model, is left out" in capsys.readouterr().out


# -- README ----------------------------------------------------------------------------------------


def example() -> str:
    """The first Python block of the README."""
    return re.search(r"```python\n(.*?)```", README, re.S)[1]


def test_readme_example_is_short():
    lines = [line for line in example().splitlines() if line.strip()]
    assert len(lines) <= 12


def test_readme_example_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    said = capsys.readouterr().out
    assert "| MLP direct |" in said and "(1, " in said


def test_tables_are_made_from_code():
    """After a measurement or a change of the families, `.venv/bin/python benchmarks/table.py
    --write` fills in the tables.
    """
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import table
    finally:
        sys.path.pop(0)
    for page in table.PAGES:
        text = (ROOT / page).read_text()
        assert table.filled(text, page) == text, page


def test_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z-]+)", README)) | set(
        re.findall(r"^make ([a-z-]+)", README, re.M)
    )
    assert named and not [t for t in named if not re.search(rf"^{t}:", makefile, re.M)]
