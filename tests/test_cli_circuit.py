"""`vksteer circuit` on scripted parts: the files written, what a second run takes from the folder,
several vectors, refused arguments.
"""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from test_circuit_curves import Result
from test_samples import Answers
from vksteer import patching
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.graph import graph
from vksteer.cli import commands as cli
from vksteer.errors import ModelError
from vksteer.inputs.vectors import SteeringVector
from vksteer.patching.edge_scores import EdgeScores, score_provenance


class Opened(Answers):
    open = 0
    name, post_instruction_length = "m", 2

    def __init__(self):
        super().__init__()
        vars(self.config).update(n_layers=4, n_heads=4, n_kv_heads=2)

    def __enter__(self):
        Opened.open += 1
        return self

    def __exit__(self, *error):
        Opened.open -= 1


class Parts(SimpleNamespace):
    """A model, an attribution and an evaluation that count their calls. The effect of an edge is
    its score.
    """

    def __init__(self):
        model = Opened()
        effects = np.abs(np.random.default_rng(0).standard_normal(graph(model, 2).n_edges))
        super().__init__(model=model, effects=effects, attributed=[], evaluated=[])

    def from_pretrained(self, source, *, device, dtype, config_overrides, template_options):
        if source == "missing":
            raise ModelError("there is no model 'missing'")
        self.model.config_overrides = config_overrides or {}
        self.model.template_options = template_options or {}
        return self.model

    def attribute(
        self,
        model,
        samples,
        vector,
        coefficient,
        *,
        steps,
        rule,
        metric,
        threshold,
        clean,
        at,
        per_sample,
        max_memory,
        progress,
    ):
        n, order = len(samples), np.roll(self.effects, int(10 * vector.norm) % 7)
        asked = dict(coefficient=coefficient, steps=steps, metric=metric, max_memory=max_memory)
        self.attributed.append(SimpleNamespace(n=n, **asked))
        return EdgeScores(
            graph(model, vector.layer),
            order,
            weights=[2] * n,
            sample_edges=np.tile(order, (n, 1)),
            settings={"metric": metric, "steps": steps},
            provenance=score_provenance(model, vector, coefficient),
        )

    def evaluate(self, some, model, samples, vector, coefficient, *, metrics, progress):
        self.evaluated.append(len(some))
        n, full = len(samples), self.effects.sum()

        def one(circuit):
            value = self.effects[circuit.edges].sum()
            parts = dict(value=np.full(n, value), full=np.full(n, full), empty=np.zeros(n))
            per_sample = parts | dict(weight=np.ones(n))
            return Result(value=value, full=full, empty=0.0, per_sample=per_sample)

        return [{m: one(c) for m in metrics} for c in some]


@pytest.fixture
def parts(monkeypatch):
    parts = Parts()
    monkeypatch.setattr(patching, "attribute", parts.attribute)
    model_class = SimpleNamespace(from_pretrained=parts.from_pretrained)
    monkeypatch.setattr("vksteer.runtime.model.Model", model_class)
    monkeypatch.setattr("vksteer.circuits.runs.evaluate", parts.evaluate)
    return parts


@pytest.fixture
def files(tmp_path):
    SteeringVector(np.ones(12), 2, method="dim").save(tmp_path / "v.npz")
    SteeringVector(np.r_[np.ones(11), 3.0], 2, method="ntp").save(tmp_path / "w.npz")
    (tmp_path / "harmful.csv").write_text(
        "id,goal\n" + "".join(f"{i},bomb {i}\n" for i in range(6))
    )
    (tmp_path / "harmless.txt").write_text("".join(f"cake {i}\n" for i in range(6)))
    return tmp_path


def call(files, *more, vectors=("v.npz",)):
    chosen = [x for v in vectors for x in ("--vector", str(files / v))]
    return [
        "circuit",
        "--model",
        "m",
        *chosen,
        "--harmful",
        f"{files / 'harmful.csv'}:goal",
        "--harmless",
        str(files / "harmless.txt"),
        "--max-new-tokens",
        "8",
        "--out",
        str(files / "out"),
        *more,
    ]


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["circuit", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and all(
        word in text
        for word in ("integrated gradients", "--side", "--halves", "smallest circuit", "overlaps")
    )


def test_everything_is_written_and_found_again(parts, files, capsys):
    out = files / "out"
    assert (
        cli.main(
            call(
                files,
                "--limit",
                "4",
                "--steps",
                "5",
                "--max-memory",
                "1GiB",
                "--sizes",
                "5,20,60",
                "--eap-ig",
            )
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "Samples: 4 samples of 4 prompts" in text
        and "harmful prompts steered by -1" in text
        and "Smallest circuit that carries 85% of the effect" in text
    )
    names = {p.name for p in out.iterdir()}
    assert {
        "samples.json",
        "scores.safetensors",
        "curve.json",
        "curve.md",
        "circuit.json",
        "top_edges.md",
        "eap_ig.json",
        "keys.json",
    } <= names and "vector.safetensors" not in names
    assert vars(parts.attributed[0]) == dict(
        n=4, coefficient=-1.0, steps=5, metric="logit_diff", max_memory="1GiB"
    )
    c = Circuit.load(out / "circuit.json", graph(parts.model, 2))
    assert c.meta["faithfulness"] >= 0.85 and c.curve is not None and str(len(c)) in text
    assert json.loads((out / "curve.json").read_text())["sizes"] == [5, 20, 60] and Opened.open == 0
    calls = len(parts.model.calls), len(parts.attributed), len(parts.evaluated)
    assert cli.main(call(files, "--limit", "4", "--steps", "5", "--sizes", "5,20,60")) == 0
    # Nothing is run again.
    assert (len(parts.model.calls), len(parts.attributed), len(parts.evaluated)) == calls
    assert "taken from the folder" in capsys.readouterr().out
    # The same scores, another circuit and curve.
    assert (
        cli.main(call(files, "--limit", "4", "--steps", "5", "--threshold", "0.5", "--halves")) == 0
    )
    assert (
        len(parts.attributed) == 1
        and len(parts.evaluated) > calls[2]
        and "found on 2, judged on 2" in capsys.readouterr().out
    )
    assert len(Circuit.load(out / "circuit.json")) < len(c)


def test_interrupted_runs_go_on(parts, files, monkeypatch):
    from vksteer import circuits

    curve, asked = circuits.faithfulness_curve, []

    def stop_once(*a, **k):
        asked.append(1)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return curve(*a, **k)

    monkeypatch.setattr(circuits, "faithfulness_curve", stop_once)
    assert cli.main(call(files)) == 130 and not (files / "out" / "curve.json").exists()
    assert (
        cli.main(call(files)) == 0
        and len(parts.attributed) == 1
        and (files / "out" / "circuit.json").exists()
    )


def test_overrides_are_part_of_what_files_were_made_from(parts, files, capsys):
    """Prompts are texts, so other template options make other samples of the same prompts."""
    options = ["--template-option", "enable_thinking=false", "--config-override", "a=[1, 2]"]
    assert cli.main(call(files, *options)) == 0
    meta = json.loads((files / "out" / "samples.json").read_text())
    assert '"template_options": {"enable_thinking": false}' in json.dumps(meta)
    assert '"config_overrides": {"a": [1, 2]}' in json.dumps(meta)
    made = len(parts.model.calls), len(parts.attributed)
    assert cli.main(call(files, *options)) == 0  # found again
    assert (len(parts.model.calls), len(parts.attributed)) == made
    capsys.readouterr()
    for other in ([], options[:2], [*options[:2], "--config-override", "a=[1]"]):
        assert cli.main(call(files, *other)) == 2
        assert "was made with another model" in capsys.readouterr().err


def test_results_of_something_else_are_not_overwritten(parts, files, capsys):
    assert cli.main(call(files)) == 0
    for more in (
        ["--steps", "3"],
        ["--side", "harmless"],
        ["--coefficient", "2"],
        ["--responses", "base"],
    ):
        assert cli.main(call(files, *more)) == 2
        assert "made with another model" in capsys.readouterr().err
    assert len(parts.attributed) == 1
    scores = files / "out" / "scores.safetensors"
    scores.write_bytes(scores.read_bytes()[:-3])
    assert cli.main(call(files)) == 2 and "scores.safetensors" in capsys.readouterr().err
    (files / "out" / "keys.json").write_text("{")
    assert cli.main(call(files)) == 2 and "keys.json is damaged" in capsys.readouterr().err
    # what 0.1.0 wrote; the advice is one that leads on
    (files / "out" / "keys.json").write_text(json.dumps({"scores.safetensors": "0" * 64}))
    assert cli.main(call(files)) == 2
    message = capsys.readouterr().err
    assert "format of version 0.1.0" in message and "remove the whole folder" in message
    shutil.rmtree(files / "out")
    assert cli.main(call(files)) == 0


def test_several_vectors(parts, files, capsys):
    assert (
        cli.main(
            call(
                files, "--coefficient", "1", "0.9", "--side", "harmless", vectors=("v.npz", "w.npz")
            )
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        [a.coefficient for a in parts.attributed] == [1.0, 0.9]
        and "Overlaps" in text
        and "v and w 0.90" in text
        and "| under v |" in text
    )
    assert {"v", "w", "overlaps.md"} == {p.name for p in (files / "out").iterdir()} and (
        files / "out" / "w" / "circuit.json"
    ).exists()


def test_finds_a_vector(parts, files, capsys, monkeypatch):
    found = []

    class Candidates:
        def select(self, harmful, harmless, criterion, progress):
            found.append((len(harmful), criterion))
            return SteeringVector(np.ones(12), 2, method="dim")

    monkeypatch.setattr(
        "vksteer.steering.difference_in_means",
        lambda model, harmful, harmless, progress: Candidates(),
    )
    for name, word in (("harmful.csv", "bomb"), ("harmless.txt", "cake")):
        (files / name).write_text(
            "goal\n" * (name == "harmful.csv") + "".join(f"{word} {i}\n" for i in range(16))
        )
    assert (
        cli.main(call(files, vectors=())) == 0
        and found == [(4, "paper")]
        and parts.attributed[0].n == 4
    )
    # The vector is taken from the folder, too.
    assert cli.main(call(files, vectors=())) == 0 and len(found) == 1
    assert "dim: layer 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, says",
    [
        (["--coefficient", "-1"], "sign comes from --side"),
        (["--coefficient", "1", "2"], "2 numbers for 1"),
        (["--sizes", "a"], "--sizes"),
        (["--threshold", "2"], "threshold"),
        (["--model", "missing"], "no model"),
        (["--vector", "none.npz"], "none.npz"),
        (["--random", "-1"], "random"),
        (["--max-memory", "much"], "much"),
    ],
)
def test_refuses_before_any_work(parts, files, capsys, more, says):
    assert cli.main(call(files, *more)) == 2
    assert says in capsys.readouterr().err and not parts.model.calls and not parts.attributed


def test_no_sample_is_left(parts, files, capsys):
    with pytest.warns(UserWarning, match="no sample"):
        assert cli.main(call(files, "--coefficient", "0.1")) == 2
    assert "steering flips none" in capsys.readouterr().err and not parts.attributed
