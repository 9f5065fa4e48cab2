"""A study that is killed, runs on a cluster, meets another study in its folder, or a full disk."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

import vksteer as vs
from source_tree import ROOT
from test_study import again, copy, known_rates, model, study  # noqa: F401  fixtures
from vksteer.study import cluster as study_cluster
from vksteer.study.cluster import Source
from vksteer.study.store import DONE, StudyStore

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
    (last,) = (p for p in folder.glob("steps/*/*") if p.is_dir() and not (p / DONE).exists())
    for place in (folder, last):  # as of a process that was killed while it wrote
        (place / ".result.json.1.tmp").write_text("{")
    done = again(model, folder)
    assert not list(folder.rglob("*.tmp"))
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


def test_workers_in_other_folders_find_the_model(model, tmp_path, monkeypatch):
    source = Source.of(model)
    assert source.name == "tiny-llama-chat"  # bundled, or on the hub: no path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    monkeypatch.setattr(model, "name", "own")
    assert Source.of(model) == replace(source, name=str(tmp_path / "own"))


def test_a_worker_whose_device_fails_opens_the_model_anew(model, tmp_path, monkeypatch):
    models, run = [], []

    def step(*arguments, **options):
        run.append(1)
        if len(run) < 3:
            raise vs.DeviceError("lost")
        return "finished", True

    monkeypatch.setattr(study_cluster, "run_step", step)
    monkeypatch.setattr(study_cluster, "_models", {})
    monkeypatch.setattr(vs.Model, "from_pretrained", lambda *a, **k: models.append(model) or model)
    given = ("screen", str(tmp_path), Source.of(model), None, None, False)
    assert study_cluster.work(*given) == "finished" and len(models) == 3
    monkeypatch.setattr(study_cluster, "run_step", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # what fails for good fails once
        study_cluster.work(*given)


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


def test_two_processes_at_once(model, tmp_path):
    """The second is refused with the first's number; a lock whose process was killed is free."""
    child = start(tmp_path)
    lock = tmp_path / ".lock"
    while not lock.exists() or lock.read_text().strip() != str(child.pid):
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.02)
    with pytest.raises(ValueError, match=f"process {child.pid} runs a study in this folder"):
        again(model, tmp_path)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    assert again(model, tmp_path, plan_only=True).planned


@pytest.mark.parametrize("name, file", [("candidates", "sums.json"), ("strength", "answers.jsonl")])
def test_a_full_disk_loses_nothing(model, study, tmp_path, name, file):
    """A file may not grow to its size: writing fails in the middle of it."""
    folder = copy(study, tmp_path)
    (step,) = (path.parent for path in folder.glob(f"steps/{name}/*/{DONE}"))
    room = (step / file).stat().st_size * 2 // 3
    shutil.rmtree(step)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            again(model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (step / DONE).exists()
    done = again(model, folder)
    assert [p.reason for p in done.planned if p.name == name] == ["partial"]
    assert (folder / "results.json").read_bytes() == (study.folder / "results.json").read_bytes()
