"""`vs.study`: steps and their keys, the folder, resuming after kills, results and report."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import vksteer as vs
from test_study_budget import RATES
from vksteer.circuits.faithfulness import halves_of
from vksteer.cli import commands as cli
from vksteer.study import rates
from vksteer.study import steps as study_steps
from vksteer.study.prompts import of_lists
from vksteer.study.report import page, write_report
from vksteer.study.settings import Settings
from vksteer.study.store import DONE, Finished, StudyStore, plain

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
def study(model, tmp_path_factory):
    """A whole study of the smallest size, made without interruption."""
    return vs.study.run(model, out=tmp_path_factory.mktemp("study"), size="tiny", progress=False)


def copy(study, to):
    return Path(shutil.copytree(study.folder, to / "copy"))


def again(model, folder, **options):
    return vs.study.run(model, out=folder, size="tiny", progress=False, **options)


# -- steps, without a device -----------------------------------------------------------------------


def inputs_of(name, **hashes):
    return {
        n: Finished(n, Path("."), {}, hashes.get(n, "same")) for n in study_steps.STEPS[name].needs
    }


def test_a_key_follows_what_the_step_uses():
    settings, one = Settings.of("tiny"), study_steps.STEPS["table1"]
    key = one.key("model", settings, inputs_of("table1"))
    assert key == one.key("model", replace(settings, epochs=7), inputs_of("table1"))
    for other in (
        one.key("other", settings, inputs_of("table1")),
        one.key("model", replace(settings, controls=2), inputs_of("table1")),
        one.key("model", settings, inputs_of("table1", strength="other")),
        replace(one, version=2).key("model", settings, inputs_of("table1")),
    ):
        assert other != key


def test_steps_that_are_chosen():
    names = list(study_steps.STEPS)
    assert study_steps.chosen(None, None) == names
    assert study_steps.chosen(["values"], None) == ["prompts", "candidates", "values"]
    left = study_steps.chosen(None, ["pairs"])
    assert not {"pairs", "ntp", "po", "behaviour", "circuits"} & set(left)
    assert {"table1", "attribution", "values"} <= set(left)
    with pytest.raises(ValueError, match="no step 'circuit'; there are: prompts, screen"):
        study_steps.chosen(["circuit"], None)


def test_prompts_of_lists():
    settings = Settings.of("tiny")  # 24, 12, 12
    harmful, harmless = ([f"{kind} {i}" for i in range(60)] for kind in ("take", "give"))
    made = of_lists(harmful, harmless, settings)
    assert [len(made.harmful[s]) for s in made.harmful] == [24, 12, 12] and not made.notes
    every = [t for part in made.harmful.values() for t in part]
    assert len(set(every)) == 48 and set(every) <= set(harmful)
    assert made.hash == of_lists(harmful, harmless, settings).hash
    assert made.hash != of_lists(harmful, harmless, replace(settings, seed=1)).hash
    short = of_lists(harmful[:24], harmless, settings)
    assert [len(short.harmful[s]) for s in short.harmful] == [12, 6, 6]
    assert "24 harmful prompts are fewer than the 48" in short.notes[0]
    with pytest.raises(ValueError, match="each needs at least 4"):
        of_lists(harmful[:15], harmless, settings)
    with pytest.raises(ValueError, match=r"1 prompts are both .*'give 0'"):
        of_lists([*harmful, "give 0"], harmless, settings)
    with pytest.raises(ValueError, match=r"harmless\[1\] is ' '"):
        of_lists(harmful, ["x", " "], settings)


def test_plain_values_are_json():
    value = {"a": np.float32(1.5), 2: (np.int64(3), float("nan")), "c": np.array([[1, np.inf]])}
    assert plain(value) == {"a": 1.5, "2": [3, None], "c": [[1.0, None]]}
    json.dumps(plain(value), allow_nan=False)


def test_bad_arguments_before_any_work(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="size='huge': use 'tiny', 'demo', 'small', 'full'"):
        vs.study.run("tiny-llama-chat", out=tmp_path, size="huge")
    with pytest.raises(ValueError, match="belong together"):
        vs.study.run("tiny-llama-chat", ["a"], out=tmp_path)
    with pytest.raises(ValueError, match="only the bundled tiny models"):
        vs.study.run("some/model", out=tmp_path)
    with pytest.raises(ValueError, match="no step 'x'"):
        vs.study.run("tiny-llama-chat", out=tmp_path, force=["x"])
    with pytest.raises(ValueError, match="force names 'screen', which this call leaves out"):
        vs.study.run("tiny-llama-chat", out=tmp_path, only=["values"], force=["screen"])
    monkeypatch.setattr(vs.Model, "from_pretrained", lambda *a, **k: pytest.fail("loads"))
    command = ["study", "--model", "tiny-llama-chat", "--out", str(tmp_path), "--only", "x"]
    assert cli.main(command) == 2 and "no step 'x'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the study's folder .*file/x"):
        vs.study.run("tiny-llama-chat", out=tmp_path / "file/x")


# -- a whole study ---------------------------------------------------------------------------------


def test_results(study):
    text = (study.folder / "results.json").read_text()
    results = json.loads(text)
    jsonschema.validate(results, json.loads(SCHEMA.read_text()))
    assert results == study.results and study.complete
    assert list(study_steps.STEPS) == [p.name for p in study.planned]
    assert not [word for word in VARYING if word in text]
    run = json.loads((study.folder / "run.json").read_text())
    assert set(run["steps"]) == set(study_steps.STEPS)
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


def test_the_schema_refuses_other_content(study):
    schema = json.loads(SCHEMA.read_text())
    for change in (
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
    assert {p.name: p.reason for p in planned if p.runs} == {"table1": "input changed"}
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
    assert not done.complete and "2 of 17 steps" in repr(done)
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


# -- interruptions ---------------------------------------------------------------------------------

CODE = """
import sys, warnings
warnings.simplefilter("ignore")
import vksteer as vs
vs.study.run("tiny-llama-chat", out=sys.argv[1], size="tiny", progress=False)
"""


def start(folder):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "python"), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", CODE, str(folder)], env=env, stderr=subprocess.PIPE, text=True
    )


def progress_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def kill_at(folder, n_done):
    """Starts a study and kills it while the step after `n_done` finished ones is under way."""
    child = start(folder)
    while len(list(folder.glob(f"steps/*/*/{DONE}"))) < n_done:
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    time.sleep(random.Random(n_done).uniform(0, 0.5))
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()


def test_killed_three_times(model, study, tmp_path):
    folder = tmp_path / "study"
    folder.mkdir()
    for n_done in (2, 8, 11):
        kill_at(folder, n_done)
        assert not (folder / "results.json").exists()
    done = again(model, folder)
    reasons = [p.reason for p in done.planned]
    assert reasons.count("done") >= 11
    assert (folder / "results.json").read_bytes() == (study.folder / "results.json").read_bytes()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_killed_at_twenty_moments(model, study, tmp_path):
    """One study after the other, each killed once at a random moment of its run."""
    expected = (study.folder / "results.json").read_bytes()
    seconds = sum(
        s["seconds"] for s in json.loads((study.folder / "run.json").read_text())["steps"].values()
    )
    rng = random.Random(1)
    for i in range(20):
        folder = tmp_path / str(i)
        folder.mkdir()
        child = start(folder)
        time.sleep(rng.uniform(0.5, seconds))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stderr.close()
        again(model, folder)
        assert (folder / "results.json").read_bytes() == expected, f"kill {i}"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_on_a_cluster(model, study, tmp_path):
    """Two worker processes, one of which is killed while it works."""
    from distributed import Client, LocalCluster

    folder = tmp_path / "study"
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        workers = client.run(os.getpid)
        victim = threading.Thread(
            target=kill_when_two_are_done, args=(folder, min(workers.values()))
        )
        victim.start()
        again(model, folder, scheduler=cluster.scheduler_address)
        victim.join()
        assert set(client.run(os.getpid).values()) != set(workers.values())
    assert (folder / "results.json").read_bytes() == (study.folder / "results.json").read_bytes()


def kill_when_two_are_done(folder, pid):
    while len(list(folder.glob(f"steps/*/*/{DONE}"))) < 2:
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)


def test_two_at_once(tmp_path):
    store = StudyStore(tmp_path)
    with store.lock(), pytest.raises(ValueError, match=f"process {os.getpid()} runs a study"):
        vs.study.run("tiny-llama-chat", out=tmp_path, size="tiny")
    with store.lock():
        pass  # free again


def test_a_full_disk_loses_nothing(model, study, tmp_path, monkeypatch):
    folder = copy(study, tmp_path)
    (step,) = (path.parent for path in folder.glob(f"steps/values/*/{DONE}"))
    shutil.rmtree(step)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(np, "save", full)
        with pytest.raises(OSError, match="No space left"):
            again(model, folder)
    done = again(model, folder)
    assert [p.name for p in done.planned if p.runs] == ["values"]
    assert (folder / "results.json").read_bytes() == (study.folder / "results.json").read_bytes()


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
    (path,) = study.folder.glob("steps/attribution/*/harmful.steered.scores.safetensors")
    scores = vs.patching.EdgeScores.load(path)
    for n in (1, 5, 19, 60, scores.graph.n_edges):
        last = data["edges"][n - 1][3]
        shown = {
            f"{data['nodes'][u]}->{data['inputs'][d]}" for u, d, _, e in data["edges"] if e <= last
        }
        assert shown == scores.circuit(n).edge_names
    assert data["left_out"] == 0 and data["total"] == scores.graph.n_edges


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
    text = page(results, {"steps": {}}, viewer)
    assert evil not in text and "\\u003c/script>" in text


def test_compare(study, tmp_path):
    other = copy(study, tmp_path)
    table = vs.study.compare([study.folder, other], tmp_path / "table.md")
    assert table.count("\n") >= 15 and (tmp_path / "table.md").read_text() == table + "\n"
    assert f"| layer | {study.results['steps']['candidates']['layer']} |" in table
    with pytest.raises(ValueError, match="at least two"):
        vs.study.compare([study.folder])
    with pytest.raises(vs.ModelError, match="cannot read"):
        vs.study.compare([study.folder, tmp_path])
