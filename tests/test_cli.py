"""The command line on a scripted model: help, arguments, prompts, files written, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from standin import ScriptedModel
from vksteer.cli import commands as cli
from vksteer.errors import DeviceError, ModelError
from vksteer.inputs.vectors import SteeringVector
from vksteer.steering import scores


class Opened(ScriptedModel):
    """Counts how many models are open."""

    open = 0

    def __enter__(self):
        Opened.open += 1
        return self

    def __exit__(self, *error):
        Opened.open -= 1

    def generate(self, prompts, **options):
        if isinstance(prompts[0], str):
            self.last = dict(options, prompts=prompts)
            return [
                SimpleNamespace(text=f"answer to {p}", finish_reason="stop", tokens=np.arange(3))
                for p in prompts
            ]
        return super().generate(prompts, **options)


@pytest.fixture
def model(monkeypatch):

    model = Opened(
        {"qk": 0.9, "ov": 0.0, "svv": 0.3, "mlp_direct": 0.55, "mlp": 0.1, "random": 0.0}
    )
    model.loaded = []

    def from_pretrained(source, *, device, dtype, config_overrides, template_options):
        if source == "missing":
            raise ModelError("there is no model 'missing'")
        model.loaded.append((source, config_overrides, template_options))
        return model

    monkeypatch.setattr(
        "vksteer.runtime.model.Model", SimpleNamespace(from_pretrained=from_pretrained)
    )
    return model


@pytest.fixture
def files(tmp_path):
    SteeringVector(np.ones(12), 2, method="dim").save(tmp_path / "v.npz")
    (tmp_path / "harmful.csv").write_text(
        "id,goal\n" + "".join(f"{i},bomb number {i}\n" for i in range(12))
    )
    (tmp_path / "harmless.txt").write_text("".join(f"cake number {i}\n" for i in range(12)))
    return tmp_path


@pytest.mark.parametrize(
    "command, words",
    [
        ([], ["devices", "generate", "freeze", "examples:"]),
        (["generate"], ["--vector", "--freeze", "chat template"]),
        (["freeze"], ["Table 1", "--layers", "--random", "difference in means"]),
        (["devices"], ["--device"]),
    ],
)
def test_help_explains(capsys, command, words):
    with pytest.raises(SystemExit) as exit:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and all(word in text for word in words)


def test_without_a_command(capsys):
    assert cli.main([]) == 2 and "usage: vksteer" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    """Help is shown without NumPy or any other large package."""
    code = (
        "import sys\nfrom vksteer import cli\ntry: cli.main(['freeze', '--help'])\nexcept"
        " SystemExit as e: assert e.code == 0\nelse: assert False\nheavy = {'numpy', 'torch',"
        " 'transformers', 'matplotlib', 'huggingface_hub', 'tokenizers', 'jinja2', 'pyarrow',"
        " 'gguf', 'scipy'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_generate(model, files, capsys):
    assert cli.main(["generate", "--model", "m", "--prompt", "one"]) == 0
    assert (
        capsys.readouterr().out == "answer to one\n"
        and model.last["edits"] == []
        and model.last["temperature"] == 0.0
    )
    assert (
        cli.main(
            [
                "generate",
                "--model",
                "m",
                "--prompts",
                f"{files / 'harmful.csv'}:goal",
                "--vector",
                str(files / "v.npz"),
                "--coefficient",
                "-1.5",
                "--freeze",
                "ov",
                "--json",
                "--max-new-tokens",
                "5",
                "--stop",
                "x",
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 12 and lines[3] == {
        "prompt": "bomb number 3",
        "text": "answer to bomb number 3",
        "finish_reason": "stop",
        "n_tokens": 3,
    }
    (steer,) = model.last["edits"]
    assert (
        steer.coefficient == -1.5
        and steer.vector.layer == 2
        and model.last["freeze"] == "ov"
        and model.last["stop"] == ["x"]
        and Opened.open == 0
    )


FREEZE = ["--vector", "v.npz", "--harmful", "h.txt", "--harmless", "g.txt"]
CIRCUIT = [*FREEZE, "--out", "o"]


@pytest.mark.parametrize(
    "command", [["generate", "--prompt", "x"], ["freeze", *FREEZE], ["circuit", *CIRCUIT]]
)
def test_overrides_of_the_model(model, files, capsys, monkeypatch, command):
    """Every command that loads a model hands both dictionaries to it, and to no judge."""
    monkeypatch.chdir(files)
    for name in ("h.txt", "g.txt"):
        (files / name).write_text("".join(f"{name} {i}\n" for i in range(4)))

    class Loaded(Exception):
        pass

    def stop(*a, **k):
        raise Loaded

    call = [command[0], "--model", "m", *command[1:]]
    options = [
        "--config-override",
        'rope_scaling={"rope_type": "yarn", "factor": 4.0}',
        "--config-override",
        "sliding_window=null",
        "--template-option",
        "enable_thinking=false",
        "--template-option",
        'chat_template="tool=use"',
    ]
    monkeypatch.setattr(Opened, "__enter__", stop)
    for given, overrides, variables in (
        ([], None, None),
        (
            options,
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "sliding_window": None},
            {"enable_thinking": False, "chat_template": "tool=use"},
        ),
    ):
        model.loaded.clear()
        with pytest.raises(Loaded):
            cli.main([*call, *given])
        assert model.loaded == [("m", overrides, variables)]


def test_overrides_are_not_those_of_the_judge(model, files, capsys):
    call = ["freeze", "--model", "m", "--vector", str(files / "v.npz"), "--judge", "missing"]
    call += ["--harmful", f"{files / 'harmful.csv'}:goal"]
    call += ["--harmless", str(files / "harmless.txt"), "--config-override", "a=1"]
    assert cli.main(call) == 2 and "no model 'missing'" in capsys.readouterr().err
    assert model.loaded == [("m", {"a": 1}, None)]
    call[call.index("missing")] = "guard"
    cli.main(call)
    assert model.loaded[1:] == [("m", {"a": 1}, None), ("guard", None, None)]


@pytest.mark.parametrize("option", ["--config-override", "--template-option"])
@pytest.mark.parametrize("text", ["", "a", "=1", "a=", "a=b", "a={", "a=NaN", "a=[1, -Infinity]"])
def test_an_override_that_is_not_key_and_json(model, capsys, option, text):
    with pytest.raises(SystemExit) as exit:
        cli.main(["generate", "--model", "m", "--prompt", "x", option, text])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and option in error and repr(text) in error
    assert "JSON" in error and model.loaded == []


@pytest.mark.parametrize("option", ["--config-override", "--template-option"])
def test_an_override_that_is_given_twice(model, capsys, option):
    call = ["generate", "--model", "m", "--prompt", "x", option, "a=1", option, "a=2"]
    assert cli.main(call) == 2 and model.loaded == []
    assert f"{option} gives a more than once" in capsys.readouterr().err


def test_generate_from_standard_input(model, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("a question\n"))
    assert (
        cli.main(["generate", "--model", "m"]) == 0
        and capsys.readouterr().out == "answer to a question\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    assert cli.main(["generate", "--model", "m"]) == 2 and "no prompt" in capsys.readouterr().err


def test_freeze_with_a_vector(model, files, capsys):
    out = files / "out"
    call = [
        "freeze",
        "--model",
        "m",
        "--vector",
        str(files / "v.npz"),
        "--harmful",
        f"{files / 'harmful.csv'}:goal",
        "--harmless",
        str(files / "harmless.txt"),
        "--max-new-tokens",
        "9",
        "--limit",
        "5",
        "--random",
        "1",
        "--out",
        str(out),
    ]
    assert cli.main(call) == 0
    text = capsys.readouterr().out
    assert "| MLP direct |" in text and "(5)" in text and "| random 0 |" in text
    names = {p.name for p in out.iterdir()}
    assert {
        "table.md",
        "table.json",
        "answers.json",
        "vector.safetensors",
        "vector.gguf",
    } <= names and "candidates.md" not in names
    assert json.loads((out / "table.json").read_text())["rows"]["OV"]["harmful"]["n"] == 5
    n = len(model.generations)
    # A second call resumes and generates nothing again.
    assert cli.main(call) == 0 and len(model.generations) == n
    assert cli.main([*call[:-2], "--layers", "3,4", "--coefficient", "1", "0.8"]) == 0
    assert "| OV 4 |" in capsys.readouterr().out


def test_freeze_finds_a_vector(model, files, capsys, monkeypatch):
    monkeypatch.setattr("vksteer.steering.rule.MAX_KL", 100.0)  # the stand-in is coarse
    monkeypatch.setattr("vksteer.steering.rule.layer_allowed", lambda l, L, strict: l < 4)
    monkeypatch.setattr(
        "vksteer.steering.scores.refusal_tokens_from",
        lambda model, harmful, harmless: scores.given_refusal_tokens(model, range(3, 30)),
    )
    out = files / "found"
    assert (
        cli.main(
            [
                "freeze",
                "--model",
                "m",
                "--harmful",
                f"{files / 'harmful.csv'}:goal",
                "--harmless",
                str(files / "harmless.txt"),
                "--max-new-tokens",
                "9",
                "--random",
                "0",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert (
        "Candidates: 2 positions (-2 '<2>', -1 '<3>') x 5 layers" in text
        and "Chosen: layer" in text
        and "(3)" in text
    )
    assert "Removed by a filter" in (out / "candidates.md").read_text()
    assert SteeringVector.load(out / "vector.safetensors").meta["n_prompts"] == [6, 6]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["generate", "--model", "missing", "--prompt", "x"], "no model 'missing'"),
        (["generate", "--model", "m", "--prompt", "x", "--freeze", "qk"], "--vector"),
        (["generate", "--model", "m", "--prompt", "x", "--vector", "none.npz"], "none.npz"),
        (["generate", "--model", "m", "--prompts", "none.csv"], "none.csv"),
        (["freeze", "--model", "m"], "--harmful FILE"),
        (["freeze", "--model", "m", "--harmful", "a.csv"], "belong together"),
        (["freeze", "--model", "m", "--coefficient", "1", "2", "3"], "one or two"),
        (["freeze", "--model", "m", "--layers", "x"], "'each'"),
    ],
)
def test_errors_are_one_line_and_status_2(model, capsys, arguments, says):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert (
        says in error and error.startswith(f"vksteer {arguments[0]}: ") and error.count("\n") == 1
    )


def test_devices(monkeypatch, capsys):

    device = SimpleNamespace(
        index=0,
        name="llvmpipe",
        vendor="Mesa",
        type="software",
        driver="25.0.7",
        memory_bytes=8 << 30,
        features=["x"],
    )
    monkeypatch.setattr("vksteer.runtime.device.devices", lambda: [device])
    assert (
        cli.main(["devices"]) == 0
        and "0: llvmpipe\n   software, 8.0 GiB" in capsys.readouterr().out
    )
    assert (
        cli.main(["devices", "--json"]) == 0
        and json.loads(capsys.readouterr().out)[0]["driver"] == "25.0.7"
    )
    monkeypatch.setattr("vksteer.runtime.device.devices", list)
    assert cli.main(["devices"]) == 0 and "mesa-vulkan-drivers" in capsys.readouterr().out


def test_device_errors_and_interrupts(monkeypatch, capsys):

    def fail(error):
        def devices():
            raise error

        return devices

    monkeypatch.setattr("vksteer.runtime.device.devices", fail(DeviceError("lost")))
    assert cli.main(["devices"]) == 2 and "lost" in capsys.readouterr().err
    monkeypatch.setattr("vksteer.runtime.device.devices", fail(KeyboardInterrupt()))
    assert cli.main(["devices"]) == 130
