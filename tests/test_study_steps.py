"""`vs.study` before any work: steps and their keys, prompts, arguments, the folder. No device
needed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import vksteer as vs
from vksteer.base.store import Store
from vksteer.cli import commands as cli
from vksteer.study import steps as study_steps
from vksteer.study.prompts import of_lists
from vksteer.study.settings import Settings
from vksteer.study.store import FORCED, Finished, StudyStore, plain


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


@pytest.mark.parametrize(
    "name",
    ["behaviour", "table1", "attribution", "attribution_learned", "rerouting", "sparsity"],
)
def test_steps_on_test_prompts_follow_them(name):
    """The steps before them see the prompts of training and validation only."""
    one, inputs = study_steps.STEPS[name], inputs_of(name)
    settings = replace(Settings.of("tiny"), data_hash="a")
    assert one.key("model", settings, inputs) != one.key(
        "model", replace(settings, data_hash="b"), inputs
    )


def test_a_forced_step_goes_on_after_a_kill(tmp_path):
    store = StudyStore(tmp_path)
    folder = store.begin("screen", "key", anew=False)
    (folder / "item").write_text("1")
    assert store.begin("screen", "key", anew=True) == folder and not (folder / "item").exists()
    (folder / "item").write_text("2")  # then it is killed, and the call is given again
    store.begin("screen", "key", anew=True)
    assert (folder / "item").read_text() == "2"
    store.finish("screen", folder, {}, ["item"])
    store.begin("screen", "key", anew=True)  # a finished one begins again
    assert not (folder / "item").exists()


def finished(tmp_path):
    """A store with a finished step of three files and the work from which they were made."""
    store = StudyStore(tmp_path)
    folder = store.begin("attribution", "key", anew=False)
    for name in ("one", "two", "work.jsonl"):
        (folder / name).write_text(name)
    store.finish("attribution", folder, {"a": 1}, ["one", "two"])
    assert isinstance(store.find("attribution", "key"), Finished)
    return store, folder


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_text("changed")])
def test_a_lost_file_takes_nothing_else_with_it(tmp_path, lose):
    store, folder = finished(tmp_path)
    (folder / ".ipynb_checkpoints").mkdir()
    lose(folder / "one")
    assert store.find("attribution", "key") in ("one is missing", "one was changed")
    store.begin("attribution", "key", anew=False)
    left = {path.name for path in folder.iterdir() if path.is_file()}
    assert left == {"two", "work.jsonl", "result.json"}
    assert store.find("attribution", "key") == "partial"
    store.begin("attribution", "key", anew=True)
    assert [path.name for path in folder.iterdir() if path.is_file()] == [FORCED]


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1", b"\xff" * 99])
def test_what_is_no_safetensors_file_any_more(tmp_path, content):
    store = StudyStore(tmp_path)
    folder = store.begin("candidates", "key", anew=False)
    vs.SteeringVector(np.ones(8, np.float32), 1).save(folder / "dim.safetensors")
    store.finish("candidates", folder, {}, ["dim.safetensors"])
    (folder / "dim.safetensors").write_bytes(content)
    assert StudyStore(tmp_path).find("candidates", "key") == "dim.safetensors was changed"


def test_items_whose_files_were_lost(tmp_path):
    items = Store(tmp_path / "items.jsonl", format="x", key=1, argument="out", what="x", other="y",
                  field=None)  # fmt: skip
    context = study_steps.Context(None, None, None, tmp_path, {}, False, items)
    made = []

    def make():
        made.append(1)
        (tmp_path / "file").write_text("")
        return {"size": len(made)}

    assert [context.once("a", make, "file")["size"] for _ in range(2)] == [1, 1]
    (tmp_path / "file").unlink()
    assert context.once("a", make, "file")["size"] == 2
    assert context.once("b", lambda: {"why": "none"}, "other") == {"why": "none"}
    assert context.once("b", make, "other") == {"why": "none"}  # it has no file


def test_keys_of_the_prompts():
    """Other test prompts change what is tested only; what was changed to fit them is in results."""
    settings = replace(Settings.of("tiny"), data_hash="a", chosen_by="x")
    other = replace(settings, data_hash="b")
    for name, same in (("screen", True), ("candidates", True), ("texts", False)):
        one, inputs = study_steps.STEPS[name], inputs_of(name)
        assert (one.key("m", settings, inputs) == one.key("m", other, inputs)) is same
    harmful, harmless = ([f"{kind} {i}" for i in range(60)] for kind in ("take", "give"))
    first = {"train": harmful[:36], "test": harmful[36:48]}
    made = of_lists(first, harmless, settings)
    tested = of_lists(first | {"test": harmful[48:]}, harmless, settings)
    assert made.chosen_by == tested.chosen_by and made.hash != tested.hash
    noted = of_lists(first | {"train": harmful[:48]}, harmless, settings)
    assert noted.notes and noted.harmful["test"] == made.harmful["test"]
    assert noted.hash != made.hash


def test_steps_that_are_chosen():
    names = list(study_steps.STEPS)
    assert study_steps.chosen(None, None) == names
    assert study_steps.chosen(["values"], None) == ["prompts", "candidates", "values"]
    left = study_steps.chosen(None, ["pairs"])
    assert not {"pairs", "ntp", "po", "behaviour", "circuits"} & set(left)
    assert {"table1", "attribution", "values"} <= set(left)
    with pytest.raises(ValueError, match="no step 'circuit'; there are: prompts, screen"):
        study_steps.chosen(["circuit"], None)
    once = study_steps.chosen(only=iter(["circuits", "values"]), skip=iter(["screen"]))
    assert once == study_steps.chosen(["circuits", "values"], ["screen"]) and "exact" not in once
    with pytest.raises(ValueError, match=r"'circuits', which skip='candidates' .* needs that"):
        study_steps.chosen(["circuits"], ["candidates"])
    with pytest.raises(ValueError, match="only names no step"):
        study_steps.chosen([], None)


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
    with pytest.raises(ValueError, match="each split needs at least 4"):
        of_lists(harmful[:15], harmless, settings)
    with pytest.raises(ValueError, match=r"1 prompts are both .*'give 0'"):
        of_lists([*harmful, "give 0"], harmless, settings)
    with pytest.raises(ValueError, match=r"harmful='harmful.csv' is one text: give a list"):
        of_lists("harmful.csv", harmless, settings)
    with pytest.raises(ValueError, match=r"harmful\[0\] is \[1, 2\]: a study takes prompts as"):
        of_lists([[1, 2]], harmless, settings)
    with pytest.raises(ValueError, match=r"harmless\[1\] is ' '"):
        of_lists(harmful, ["x", " "], settings)


def test_prompts_with_splits_of_their_own():
    """What the test uses is not trained on, also where both are drawn from one list."""
    settings = Settings.of("tiny")  # 24, 12, 12
    harmful, harmless = ([f"{kind} {i}" for i in range(60)] for kind in ("take", "give"))
    other = [f"steal {i}" for i in range(20)]
    made = of_lists(
        {"train": harmful, "test": other}, {"train": harmless, "test": harmless}, settings
    )
    assert list(made.harmful) == ["train", "validation", "test"]
    assert [len(made.harmless[s]) for s in made.harmless] == [24, 12, 12]
    assert set(made.harmful["test"]) < set(other)
    assert set(made.harmful["train"]) | set(made.harmful["validation"]) < set(harmful)
    assert len({t for part in made.harmless.values() for t in part}) == 48
    assert made.notes == ("12 harmless prompts of train are used in a later split, not there",)
    three = {"train": harmful[:24], "validation": harmful[24:36], "test": harmful[36:48]}
    whole = of_lists(three, harmless, settings)
    assert {s: sorted(part) for s, part in whole.harmful.items()} == {
        s: sorted(part) for s, part in three.items()
    }
    short = of_lists(three | {"test": harmful[36:40]}, harmless, settings)
    assert "4 harmful prompts are fewer than the 12" in short.notes[0]
    with pytest.raises(ValueError, match="harmful has the splits 'train', 'dev'"):
        of_lists({"train": harmful, "dev": other}, harmless, settings)
    with pytest.raises(ValueError, match=r"harmful\['test'\]='a.csv' is one text"):
        of_lists({"train": harmful, "test": "a.csv"}, harmless, settings)
    with pytest.raises(ValueError, match=r"3 harmful prompts are fewer .*: test 3; give more"):
        of_lists({"train": harmful, "test": other[:3]}, harmless, settings)
    with pytest.raises(ValueError, match=r"20 prompts are both .*'steal 0'"):
        of_lists({"train": harmful, "test": other}, [*harmless, *other], settings)


def test_files_of_test_prompts(tmp_path, monkeypatch, capsys):
    def stop(model, harmful, harmless, *rest, **options):
        raise ValueError(json.dumps([harmful, harmless]))

    monkeypatch.setattr(vs.study.running, "run", stop)
    monkeypatch.setattr(vs.study.running, "check", lambda *a, **k: None)  # they are too few
    command = ["study", "--model", "tiny-llama-chat", "--out", str(tmp_path / "out")]
    for option, name in (("--harmful", "a"), ("--harmless", "b"), ("--harmful-test", "c")):
        (tmp_path / name).with_suffix(".txt").write_text(f"{name} 0\n{name} 1\n")
        command += [option, str((tmp_path / name).with_suffix(".txt"))]
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    given = json.loads(said[said.index("[{") :])
    assert given == [{"train": ["a 0", "a 1"], "test": ["c 0", "c 1"]}, ["b 0", "b 1"]]


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
    with pytest.raises(ValueError, match="only the bundled tiny models"):
        vs.study.run("tiny-foo", out=tmp_path)
    with pytest.raises(ValueError, match="no step 'x'"):
        vs.study.run("tiny-llama-chat", out=tmp_path, force=["x"])
    with pytest.raises(ValueError, match="force names 'screen', which this call leaves out"):
        vs.study.run("tiny-llama-chat", out=tmp_path, only=["values"], force=["screen"])
    monkeypatch.setattr(vs.Model, "from_pretrained", lambda *a, **k: pytest.fail("loads"))
    command = ["study", "--model", "tiny-llama-chat", "--out", str(tmp_path), "--only", "x"]
    assert cli.main(command) == 2 and "no step 'x'" in capsys.readouterr().err
    assert cli.main([*command[:5], "--seed", "-1"]) == 2 and "seed" in capsys.readouterr().err
    assert cli.main([*command[:5], "--only", "values", "--force", "screen"]) == 2
    assert "force names 'screen'" in capsys.readouterr().err
    assert cli.main([*command[:5], "--harmless-test", "x"]) == 2
    assert "--harmless-test belongs to --harmless" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write to the study's folder .*file/x"):
        vs.study.run("tiny-llama-chat", out=tmp_path / "file/x")


def test_a_folder_with_the_name_of_a_bundled_model(tmp_path, monkeypatch, capsys):
    """It is the reader's own model, of which nothing is known."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny-llama-chat", "tiny-foo"):
        (tmp_path / name).mkdir()
        with pytest.raises(ValueError, match="only the bundled tiny models"):
            vs.study.run(name, out=tmp_path / "study")
        for command in (["study", "--out", "study"], ["freeze", "--out", "table"]):
            assert cli.main([*command, "--model", name]) == 2
            assert "only the bundled tiny models" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def writes_to(folder):
    """What another user of the machine is told, in a process of its own."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        if os.geteuid() == 0:  # no mode stops this user
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            StudyStore(folder)
        except ValueError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read) as file:
        return file.read()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_read_only_folder():
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # the parents of tmp_path are closed to others
    try:
        folder.chmod(0o555)
        said = writes_to(folder)
        assert said.startswith(f"cannot write to the study's folder {folder}: Permission denied")
        folder.chmod(0o777)
        assert not writes_to(folder) and (folder / "steps").is_dir()
    finally:
        shutil.rmtree(folder)
