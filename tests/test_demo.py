"""The parts of the demo, its prompts, and the example in README.md: what a new user runs first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vksteer as vs
from vksteer import data, freezing
from vksteer.demo import __main__ as demo
from vksteer.demo import bundled, report, smollm2
from vksteer.demo import qwen as demo_real
from vksteer.demo import qwen_inside as demo_real_inside
from vksteer.study import steps
from vksteer.study.settings import SIZES

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


def test_bundled_part(tmp_path, capsys, monkeypatch):
    """The study is told while it runs. Interrupted, it goes on where it stopped, and a complete one
    is told again without a step being run.
    """
    arguments = ["--part", "study", "--size", "tiny", "--out", str(tmp_path)]
    counts = {"train": 16, "validation": 6, "test": 4, "taus": (0.0, 0.5)}
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | counts)  # for half of the time

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(freezing, "ablation_table", interrupt)
        assert demo.main(arguments) == 130
    first = capsys.readouterr()
    assert "the same command goes on from here" in first.err and "Traceback" not in first.err
    assert "(towards refusal)" in first.out and "Table 1" not in first.out
    early = made(tmp_path, "candidates") | made(tmp_path, "strength")
    assert early

    assert demo.main(arguments) == 0
    said = capsys.readouterr().out
    assert re.search(r"An earlier run left \d+ of \d+ steps", said)
    assert early == made(tmp_path, "candidates") | made(tmp_path, "strength")
    told_whole_study(tmp_path, said)

    everything = made(tmp_path, "*")
    monkeypatch.setattr(steps, "_run", interrupt)  # nothing runs any more
    assert demo.main(arguments) == 0
    again = capsys.readouterr().out
    assert "is complete: nothing is computed again" in again and "from the earlier run" in again
    assert (
        again[again.index("The vector\n") :].split("The study is complete")[0]
        == (said[said.index("The vector\n") :].split("The study is complete")[0])
    )
    assert everything == made(tmp_path, "*")


def made(folder, step):
    """{file of a step: (bytes' hash, time of modification)}"""
    files = folder.glob(f"study/steps/{step}/*/*")
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()}


def told_whole_study(folder, said):
    """What the demo said is what the study found, with a circuit that has something to see."""
    study = folder / "study"
    results = json.loads((study / "results.json").read_text())
    rows = results["steps"]["table1"]["rows"]
    assert f"| attention values (OV) | {rows['OV']['harmless']['asr']:.2f} [" in said
    for claim in results["claims"]:
        assert claim["claim"] in said and f"{claim['verdict']}: " in said
    circuit = results["steps"]["circuits"]["smallest"]["harmful.steered"]
    # Size tiny finds 45 edges of 343 over four layers; in tiny-llama-chat four of 190 are enough.
    assert 12 <= circuit["size"] < circuit["edges"] / 2
    assert f"The first {circuit['size']} of them by their scores, over" in said
    report = (study / "report.html").resolve()
    assert report.exists() and f"{report.as_uri()}#circuit:n={circuit['size']}" in said
    pictures = {p.name for p in folder.iterdir() if p.is_file()}
    assert pictures == {"table1.png", "circuit.png", "curve.png"}
    assert all((folder / name).stat().st_size > 5000 for name in pictures)


def test_no_circuit_is_said(tmp_path, capsys):
    smallest = {"harmful.steered": {"why": "no circuit reaches it"}}
    found = {"circuits": {"smallest": smallest, "curve": {}}}
    bundled._circuit(SimpleNamespace(results={"steps": found}), tmp_path)
    assert "There is no faithful circuit: no circuit reaches it" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


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

    def refuse(*_, **__):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(vs.Model, "from_pretrained", refuse)
    smollm2.real(SMOLLM2, tmp_path, None, new_tokens=4)
    again = capsys.readouterr().out
    assert "From the run of" in again
    for text in ("\n> ", "| decoding, 1 row |"):  # the answers and the speed of that run
        line = said[said.index(text) :].splitlines()[1 if text == "\n> " else 0]
        assert line in again
    with pytest.raises(AssertionError, match="a model is loaded"):
        smollm2.real(SMOLLM2, tmp_path, None, new_tokens=5)


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


def test_the_path_of_the_report_comes_last(tmp_path, monkeypatch, capsys):
    """Part 2 prints a screen and more, so the path is said again after it."""
    told = SimpleNamespace(report=tmp_path / "study" / "report.html")
    monkeypatch.setattr(demo, "bundled", lambda *_: told)
    monkeypatch.setattr(demo, "fetched", lambda *_: tmp_path)
    monkeypatch.setattr(demo, "real", lambda *_, **__: print("part 2"))
    assert demo.main(["--out", str(tmp_path)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"The report of the study (part 1): {told.report}"


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
