"""`vksteer screen` and `vksteer sweep` on a bundled model."""

from __future__ import annotations

import json

import numpy as np
import pytest

import vksteer as vs
from vksteer.cli import commands as cli
from vksteer.data.prompt_files import tiny_pair


def lines(path, prompts):
    path.write_text("\n".join(prompts) + "\n")
    return str(path)


@pytest.fixture
def prompts(tmp_path):
    harmful, harmless = tiny_pair("test")
    return [
        "--harmful",
        lines(tmp_path / "harmful.txt", harmful[:5]),
        "--harmless",
        lines(tmp_path / "harmless.txt", harmless[:4]),
    ]


def test_screen(prompts, tmp_path, capsys):
    out = tmp_path / "out"
    given = [*prompts, "--positions", "-1", "-2", "--out", str(out)]
    with pytest.raises(SystemExit) as error:
        cli.main(["screen", "--help"])
    assert error.value.code == 0 and "mean cosine" in capsys.readouterr().out
    assert cli.main(["screen", "--model", "tiny-llama-chat", *given]) == 0
    text = capsys.readouterr().out
    assert "5 and 4 prompts: the first 4 of each are paired" in text and "verdict" in text
    content = json.loads((out / "screen.json").read_text())
    assert len(content["rows"]) == 2 * 10 and content["rows"][0]["n"] == 4
    assert (out / "screen.md").exists() and (out / "screen.png").exists()


def test_screen_takes_the_prompts_of_a_bundled_model(capsys):
    assert cli.main(["screen", "--model", "tiny-llama-chat"]) == 0
    assert "likely steerable" in capsys.readouterr().out


def test_sweep(prompts, tmp_path, capsys):
    width = vs.Config.from_pretrained("tiny-llama-chat").d_model
    vector, out = tmp_path / "v.npz", tmp_path / "out"
    vs.SteeringVector(np.ones(width), 3).save(vector)
    given = [*prompts, "--vector", str(vector), "--coefficients", "0.5", "2", "--out", str(out)]
    options = ["--max-new-tokens", "4", "--limit", "3"]
    assert cli.main(["sweep", "--model", "tiny-llama-chat", *given, *options]) == 0
    assert "| 0.5 |" in capsys.readouterr().out
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["coefficient"] for row in rows] == [0.5, 2.0]
    assert rows[1]["dose"] == pytest.approx(4 * rows[0]["dose"]) and rows[0]["harmful"]["n"] == 3


@pytest.mark.parametrize(
    "command, message",
    [
        (["screen", "--model", "somewhere"], "give prompts with --harmful"),
        (["screen", "--model", "tiny-llama-chat", "--harmful", "x"], "belong together"),
        (["sweep", "--model", "tiny-llama-chat", "--vector", "missing.npz"], "missing.npz"),
    ],
)
def test_errors_are_one_line(capsys, command, message):
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_sweep_with_a_prompting_baseline_and_calibration(prompts, tmp_path, capsys):
    width = vs.Config.from_pretrained("tiny-llama-chat").d_model
    vector, out = tmp_path / "v.npz", tmp_path / "out"
    vs.SteeringVector(np.ones(width), 3).save(vector)
    given = ["--model", "tiny-llama-chat", *prompts, "--vector", str(vector), "--out", str(out)]
    given += ["--max-new-tokens", "4", "--limit", "3"]
    baseline = ["--coefficients", "1", "--prompt-baseline", "Refuse.", "Answer."]
    assert cli.main(["sweep", *given, *baseline]) == 0
    assert "| prompt |" in capsys.readouterr().out and (out / "sweep.png").exists()
    assert cli.main(["sweep", *given, "--calibrate"]) == 0
    assert "Harmless prompts under +a:" in capsys.readouterr().out
    assert json.loads((out / "calibration.json").read_text())["setting"]["n_harmful"] == 3
    assert (out / "calibration.png").exists()
