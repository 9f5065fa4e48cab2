"""`vs.study`: steps and their keys, the folder, results and report."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

import vksteer as vs
from file_lock import file_lock
from test_study_budget import RATES
from vksteer.circuits.faithfulness import halves_of
from vksteer.study import comparing, rates
from vksteer.study import steps as study_steps
from vksteer.study import store as study_store
from vksteer.study.claims import claims
from vksteer.study.report import page, write_report
from vksteer.study.settings import SIZES, Settings
from vksteer.study.store import DONE

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = ROOT / "python/vksteer/study/results.schema.json"
#: Words that a file which is equal for equal settings must not hold.
VARYING = ("/tmp", "/home", "llvmpipe", "seconds", "2026-", "python")


@pytest.fixture(scope="module")
def model():
    with vs.Model.from_pretrained("tiny-llama-chat", progress=False) as opened:
        yield opened


@pytest.fixture(scope="module", autouse=True)
def known_rates():
    """Plans take these rates; test_study_budget.py measures them."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(rates, "measure", lambda *_: RATES)
        yield


@pytest.fixture(scope="module")
def study(model, zoo):
    """A whole study of the smallest size, made without interruption; one for all test processes."""
    folder = zoo.root.parent / "tiny_study"
    with file_lock(folder.with_suffix(".lock")):
        return vs.study.run(model, out=folder, size="tiny", progress=False)


def copy(study, to):
    return Path(shutil.copytree(study.folder, to / "copy"))


def again(model, folder, **options):
    return vs.study.run(model, out=folder, size="tiny", progress=False, **options)


# -- a whole study ---------------------------------------------------------------------------------


def test_results(study):
    text = (study.folder / "results.json").read_text()
    results = json.loads(text)
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert results == study.results and study.complete
    assert list(study_steps.STEPS) == [p.name for p in study.planned]
    assert not [word for word in VARYING if word in text]
    run = json.loads((study.folder / "run.json").read_text())
    assert set(run["steps"]) == set(study_steps.STEPS) and run["model"] == "tiny-llama-chat"
    assert "<title>Why the steering vector works: tiny-llama-chat" in study.report.read_text()
    assert all(s["device_bytes"] > 0 and s["device"] for s in run["steps"].values())


def test_circuits_are_judged_on_other_samples(model, study):
    """Found again on the first half, and measured again on the second."""
    found = study.results["steps"]["circuits"]
    vector = vs.SteeringVector.load(*study.folder.glob("steps/candidates/*/dim.safetensors"))
    plus, minus = study.results["steps"]["strength"]["coefficient"]
    for name, a in (("harmful.steered", -minus), ("harmless.base", plus)):
        (path,) = study.folder.glob(f"steps/attribution/*/{name}.scores.safetensors")
        scores = vs.patching.EdgeScores.load(path)
        samples = vs.patching.Samples.load(path.with_name(f"{name}.samples.json"))
        halves = halves_of(scores, samples, seed=0)
        first, second = ([samples[i] for i in half] for half in halves)
        said = found["smallest"][name]
        assert (said["samples_found"], said["samples_judged"]) == (len(first), len(second))
        assert not set(halves[0]) & set(halves[1]) and said["samples_judged"] >= 2
        (path,) = study.folder.glob(f"steps/circuits/*/{name}.circuit.json")
        circuit = vs.circuits.Circuit.load(path)
        own = scores.of_samples(halves[0]).circuit(circuit.meta["n"])
        assert circuit == own and said["size"] == len(circuit)
        for half, key in ((first, "faithfulness_found"), (second, "faithfulness")):
            again = circuit.evaluate(model, half, vector, a, progress=False)["logit_diff"]
            assert said[key] == again.faithfulness
        assert said["faithfulness_found"] >= 0.85 and said["low"] <= said["faithfulness"]
    names = found["overlap"]["names"]
    assert set(names) == {n for n, said in found["smallest"].items() if "size" in said}


PUBLISHED = sorted((ROOT / "docs/results/studies").glob("*/results.json"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.parent.name)
def test_published_results_are_those_of_today(path):
    """They follow the schema, every interval holds its value, and the verdicts follow from them."""
    results = json.loads(path.read_text())
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert results["claims"] == claims(results["steps"])
    for rate in rates_in(results["steps"]):
        assert rate["low"] <= rate["asr"] <= rate["high"], rate
    page(results, {"steps": {}}, None)


def rates_in(value):
    """Every rate in a result, at any depth."""
    if isinstance(value, dict):
        if {"asr", "low", "high"} <= set(value):
            yield value
        for one in value.values():
            yield from rates_in(one)
    elif isinstance(value, list):
        for one in value:
            yield from rates_in(one)


def test_the_schema_refuses_other_content(study):
    schema, steps = json.loads(SCHEMA.read_text()), study.results["steps"]
    holds = study.results["claims"][1] | {"verdict": "holds", "value": None}
    rows = steps["table1"]["rows"]
    too_high = rows["QK"] | {"harmful": rows["QK"]["harmful"] | {"asr": 17}}
    for change in (
        {"claims": [holds] * 5},
        {"settings": study.results["settings"] | {"seed": "now"}},
        {"settings": study.results["settings"] | {"folder": "x"}},
        {"steps": {"table1": steps["table1"] | {"rows": {}}}},
        {"steps": {"table1": steps["table1"] | {"rows": rows | {"QK": too_high}}}},
        {"steps": {"exact": steps["sparsity"]}},
        {"steps": {"sparsity": {"why": 1}}},
        {"steps": {"values": steps["values"] | {"seconds": 1.5}}},
        {"steps": {"ntp": {"trained": True}}},
        {"schema_version": 2},
        {"claims": study.results["claims"][:4]},
        {"steps": {"unknown": {}}},
        {"model": {}},
        {"model": study.results["model"] | {"precision": "float32"}},
        {"steps": {"circuits": study.results["steps"]["circuits"] | {"agreement": {}}}},
        {"steps": {"values": study.results["steps"]["values"] | {"meaning": {}}}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(study.results | change, schema)


def test_a_second_call_computes_nothing(model, study, tmp_path, monkeypatch):
    folder = copy(study, tmp_path)  # copied elsewhere
    for name in ("generate", "run"):
        monkeypatch.setattr(type(model), name, lambda *a, **k: pytest.fail("computes"))
    done = again(model, folder)
    assert {p.reason for p in done.planned} == {"done"}
    assert (folder / "results.json").read_bytes() == (study.folder / "results.json").read_bytes()


def test_every_file_is_hashed_once_a_call(model, study, tmp_path, monkeypatch):
    folder, read, hashed = copy(study, tmp_path), [], study_store.file_hash
    monkeypatch.setattr(study_store, "file_hash", lambda path: read.append(path) or hashed(path))
    again(model, folder)
    done = [json.loads(path.read_text())["files"] for path in folder.glob(f"steps/*/*/{DONE}")]
    assert len(read) == len(set(read)) == sum(map(len, done))
    (path,) = folder.glob("steps/values/*/result.json")
    stat = path.stat()
    path.write_text(path.read_text().replace("heads", "hands"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # another call does not trust times
    reasons = {p.name: p.reason for p in again(model, folder, plan_only=True).planned}
    assert reasons["values"] == "result.json was changed"


def test_a_changed_option_runs_what_depends_on_it(model, study, tmp_path, monkeypatch):
    folder = copy(study, tmp_path)
    monkeypatch.setitem(vs.study.run.__globals__, "run_step", None)  # a plan runs nothing
    changed = {"controls": 2}
    monkeypatch.setattr(
        Settings,
        "of",
        classmethod(lambda cls, size, seed=0: replace(original(size, seed), **changed)),
    )
    planned = again(model, folder, plan_only=True).planned
    reasons = {"table1": "input changed", "texts": "waits for table1"}
    assert {p.name: p.reason for p in planned if p.runs} == reasons
    changed.clear()
    changed["epochs"] = 2
    planned = {p.name: p.reason for p in again(model, folder, plan_only=True).planned if p.runs}
    waits = {
        n: planned.pop(n) for n in ("behaviour", "attribution_learned", "circuits", "sparsity")
    }
    assert planned == {"ntp": "input changed", "po": "input changed"}
    assert waits["behaviour"] == "waits for ntp"


original = Settings.of


@pytest.mark.filterwarnings("ignore:template_options")
def test_a_model_that_reads_prompts_otherwise_runs_again(model, study, tmp_path):
    """Its weights are the same; its chat template's variables are not."""
    folder = copy(study, tmp_path)
    options = dict(template_options={"date_string": "1 Jan 2020"}, progress=False)
    with vs.Model.from_pretrained("tiny-llama-chat", **options) as other:
        assert other.fingerprint == model.fingerprint
        planned = {p.name: p.reason for p in again(other, folder, plan_only=True).planned}
    assert planned["prompts"] == "input changed" and "done" not in planned.values()
    assert {p.reason for p in again(model, folder, plan_only=True).planned} == {"done"}


def test_too_long_a_prompt_is_refused_before_any_step(model, tmp_path):
    lists = [[f"{kind} the box {i}" for i in range(60)] for kind in ("open", "break")]
    lists[1][7] = "break the box " * 160
    with pytest.raises(
        ValueError, match="the harmless prompt that begins with 'break the box break"
    ):
        vs.study.run(model, *lists, tmp_path, size="tiny", progress=False)
    assert not list(tmp_path.glob("steps/*"))


def test_a_lost_circuit_is_found_again(model, study, tmp_path):
    folder = copy(study, tmp_path)
    (lost,) = folder.glob("steps/circuits/*/harmful.steered.circuit.json")
    was = lost.read_bytes()
    lost.unlink()
    (lost.parent / "harmful.base.circuit.json").unlink()
    assert again(model, folder).results == study.results
    assert lost.read_bytes() == was


def test_a_damaged_step_runs_again(model, study, tmp_path):
    folder = copy(study, tmp_path)
    (removed,) = folder.glob("steps/candidates/*/dim.safetensors")
    removed.unlink()
    (changed,) = folder.glob("steps/values/*/result.json")
    changed.write_text(changed.read_text().replace("heads", "hands"))
    (broken,) = folder.glob(f"steps/exact/*/{DONE}")
    broken.write_text("{")
    planned = {p.name: p.reason for p in again(model, folder, plan_only=True).planned}
    assert planned["candidates"] == "dim.safetensors is missing"
    assert planned["strength"] == "waits for candidates" and planned["screen"] == "done"
    done = again(model, folder, only=["candidates", "exact", "values"])
    assert done.results["steps"]["values"] == study.results["steps"]["values"]
    assert (folder / "steps/candidates" / removed.parent.name / "dim.safetensors").exists()
    reasons = {p.name: p.reason for p in again(model, folder, plan_only=True).planned}
    assert set(reasons.values()) == {"done"}  # the same values: nothing above changed


def test_force_and_skip(model, study, tmp_path):
    folder = copy(study, tmp_path)
    done = again(model, folder, skip=["strength"], force=["screen"])
    assert {p.name: p.reason for p in done.planned} == {
        "prompts": "done", "screen": "forced", "candidates": "done", "range": "done",
        "values": "done",
    }  # fmt: skip
    assert done.results["steps"]["screen"] == study.results["steps"]["screen"]
    assert done.complete and done.results == study.results  # what was left out had finished


def test_a_part_of_a_study(model, tmp_path):
    done = again(model, tmp_path, only=["screen"])
    assert not done.complete and "2 of 19 steps" in repr(done)
    assert all(c["why"] == "has not run" for c in done.results["claims"])


def test_a_step_that_fails_leaves_the_others(model, tmp_path, monkeypatch):
    def fails(_):
        raise ValueError("no candidate is left")

    failing = replace(study_steps.STEPS["candidates"], function=fails)
    monkeypatch.setitem(study_steps.STEPS, "candidates", failing)
    with pytest.raises(ValueError, match="no candidate is left"):
        again(model, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["steps"]) == {"prompts", "screen"} and (tmp_path / "report.html").exists()


def test_files_of_steps(study):
    vector = vs.SteeringVector.load(study.file("candidates", "dim.safetensors"))
    assert vector.layer == study.results["steps"]["candidates"]["layer"]
    with pytest.raises(KeyError, match=r"made no file 'x'; there are: .*dim.safetensors"):
        study.file("candidates", "x")
    with pytest.raises(KeyError, match=r"'nothing' has not finished; finished: .*candidates"):
        study.file("nothing", "x")


# -- report ----------------------------------------------------------------------------------------


def test_report(study, tmp_path):
    text = study.report.read_text()
    assert len(text) < 3_000_000
    assert "src=" not in text and "<link" not in text and "@import" not in text
    assert [part for part in text.split('href="')[1:] if part.startswith("http")] == [
        part for part in text.split('href="')[1:] if part.startswith("https://arxiv.org/abs/")
    ]
    for claim in study.results["claims"]:
        assert claim["verdict"] in text
    for title in ("Table 1: parts frozen", "Faithful circuits", "Steering value vectors"):
        assert title in text
    folder = copy(study, tmp_path)
    (folder / "report.html").unlink()
    assert write_report(folder).read_text() == text


def test_the_circuits_of_the_viewer(study):
    """A prefix of the viewer's edges up to the entry of the n-th is the circuit of size n."""
    text = study.report.read_text()
    embedded = text.split('id="circuit-data">')[1].split("</script>")[0]
    data = json.loads(embedded)
    assert [c["name"] for c in data["circuits"]] == [
        "harmful.steered", "harmful.base", "harmless.steered", "harmless.base", "ntp", "po",
    ]  # fmt: skip
    for circuit in data["circuits"]:
        scores = vs.patching.EdgeScores.load(study.folder / circuit["file"])
        edges = circuit["edges"]
        for n in (1, 5, 19, 60, scores.graph.n_edges):
            shown = {
                f"{data['nodes'][u]}->{data['inputs'][d]}"
                for u, d, _, e in edges
                if e <= edges[n - 1][3]
            }
            assert shown == scores.circuit(n).edge_names
        assert circuit["left_out"] == 0 and data["total"] == scores.graph.n_edges
    assert set(data["tokens"]) == {n for n in data["nodes"] if n.startswith("a")}


def test_texts_cannot_leave_their_place():
    """What a model wrote is text in the report, whatever it holds."""
    evil = "</script><script>alert(1)</script>"
    results = json.loads(json.dumps({
        "model": {"architecture": evil, "n_layers": 1, "d_model": 1, "n_heads": 1, "n_kv_heads": 1,
                  "hash": "x"},
        "settings": {"size": "tiny", "seed": 0, "data_hash": evil},
        "steps": {}, "claims": [], "vksteer": "0",
    }))  # fmt: skip
    viewer = {"tokens": {"a0.h0": [evil]}}
    answer = {"text": evil, "base": [1, 2, 9], "steered": None}
    alike = {"QK": {"base": 0.0, "steered": 1.0}}
    results["steps"] = {
        "texts": {"kept": {"harmless": 1, "harmful": 1}, "prompts": {"harmless": 1, "harmful": 1},
                  "alike": {"harmless": alike, "harmful": alike}},
        "positions": {
            "samples": [0], "of": 1, "layer": 0, "coefficient": 1.0, "prompt_share": [1.0],
            "shown": [{"prompt": 1, "steered": [0, 2], "metric": [1], "tokens": [1.0, -1.0],
                       "layers": [[1.0, 0.0], [0.0, -1.0]]}],
        },
    }  # fmt: skip
    answers = dict.fromkeys(("unsteered", "none", "QK"), answer)
    sides = {side: [{"prompt": evil, "answers": answers}] for side in ("harmless", "harmful")}
    texts = {"texts": {"sides": sides}, "positions": {"tokens": [[evil, evil]]}}
    text = page(results, {"steps": {}}, viewer, texts)
    assert evil not in text and "\\u003c/script>" in text and "alert(1)" in text


@pytest.mark.parametrize(
    "name, tried",
    [
        ("tiny-llama-chat", (0.01, 0.02)),  # neither works
        ("tiny-gemma-chat", (0.4, 0.6)),  # half of the harmful prompts stay refused under -0.6
    ],
)
def test_larger_coefficients_where_steering_is_weak(name, tried, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES["tiny"], "coefficients", tried)
    study = vs.study.run(name, out=tmp_path, size="tiny", only=["strength"], progress=False)
    found = study.results["steps"]["strength"]
    assert [row["coefficient"] for row in found["rows"]] == [*tried, 1.5, 2.0, 3.0]
    answers = study.file("strength", "answers.jsonl").read_text().splitlines()
    assert len(answers) == 1 + 6, "a head and six rows: none is answered twice"


def test_compare(study, tmp_path):
    other = copy(study, tmp_path)
    table = vs.study.compare([study.folder, other], tmp_path / "table.md")
    assert table.count("\n") >= 15 and (tmp_path / "table.md").read_text() == table + "\n"
    assert f"| layer | {study.results['steps']['candidates']['layer']} |" in table
    for row in ("MLP direct ablated", "types of the strongest tenth", "overlap of the tenths"):
        line = next(line for line in table.splitlines() if line.startswith(f"| {row}"))
        assert "–" not in line
    rate = study.results["steps"]["table1"]["rows"]["MLP direct"]["average_change"]
    assert f"| MLP direct ablated: average change | {100 * rate:.1f} % |" in table
    with pytest.raises(ValueError, match="at least two"):
        vs.study.compare([study.folder])
    with pytest.raises(vs.ModelError, match="cannot read"):
        vs.study.compare([study.folder, tmp_path])
    beside = vs.study.compare([study.folder], paper=True).splitlines()
    cells = [line.count("|") for line in beside]
    assert "Gemma 2 2B" in beside[0] and set(cells) == {5}
    titles = {line.split("|")[1].strip() for line in beside}
    assert set(comparing.PAPER) < titles
    # Table 1's averages over both models (docs/method.md section 6) follow from these columns
    for row, average in (("QK frozen", 8.75), ("OV frozen", 71.75), ("MLP direct ablated", 44.5)):
        both = comparing.PAPER[f"{row}: average change"]
        assert sum(float(cell.split()[0]) for cell in both) == 2 * average
