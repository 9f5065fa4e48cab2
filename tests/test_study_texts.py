"""What a study shows for reading: answers side by side, scores by token, and a report without any
text.
"""

from __future__ import annotations

import html
import json

import numpy as np

import vksteer as vs
from test_study import copy, model, study  # noqa: F401  the fixtures of a whole study
from vksteer.cli import commands as cli
from vksteer.study.shown import input_layers


def test_answers_side_by_side(study, model):
    """What differs first, token by token, from the answers that Table 1 counted."""
    results = study.results["steps"]
    (table,) = study.folder.glob("steps/table1/*/answers.json")
    (path,) = study.folder.glob("steps/texts/*/texts.json")
    rows, shown = json.loads(table.read_text())["rows"], json.loads(path.read_text())["sides"]
    for side in ("harmless", "harmful"):
        assert len(shown[side]) == results["texts"]["kept"][side] == 12
        for name, answers in rows.items():
            same = [a["text"] == b["text"] for a, b in zip(answers[side], rows["none"][side])]
            assert results["texts"]["alike"][side][name]["steered"] == np.mean(same)
            for i, one in enumerate(shown[side]):
                found, steered = one["answers"][name], one["answers"]["none"]["text"]
                assert found["text"] == answers[side][i]["text"]
                assert (found["steered"] is None) == same[i]
                if found["steered"] is not None:
                    at, start, _ = found["steered"]
                    a, b = (model.tokenizer.encode(t, False) for t in (found["text"], steered))
                    assert a[:at] == b[:at] and a[at : at + 1] != b[at : at + 1]
                    assert found["text"][:start] == model.tokenizer.decode(a[:at])
    text = study.report.read_text()
    assert "differs from unsteered at token" in text and "the same as steered" in text


def test_scores_by_token(study):
    """Sums over positions are the scores of the samples alone, which `attribution` keeps: equal to
    1e-6 of the sum of sizes (measured 1.5e-8; positions are float32, and one position a tile).
    """
    found = study.results["steps"]["positions"]
    (path,) = study.folder.glob("steps/attribution/*/harmful.steered.scores.safetensors")
    scores = vs.patching.EdgeScores.load(path)
    ends = input_layers(scores.graph)[scores.graph.downstream]
    names = np.array(scores.graph.input_names)[scores.graph.downstream]
    assert {n for n, l in zip(names, ends) if l == scores.graph.depth} == {"logits"}
    assert all(n[1:].startswith(f"{scores.graph.layer}") for n, l in zip(names, ends) if l == 0)
    samples = vs.patching.Samples.load(path.with_name("harmful.steered.samples.json"))
    for i, one in zip(found["samples"], found["shown"], strict=True):
        edges = scores.sample_edges[i]
        layers = [edges[ends == l].sum() for l in range(scores.graph.depth + 1)]
        scale = np.abs(edges).sum()
        assert np.abs(np.sum(one["layers"], axis=1) - layers).max() < 1e-6 * scale
        steer = edges[scores.graph.upstream == 0].sum()
        assert abs(np.sum(one["tokens"]) - steer) < 1e-6 * scale
        assert len(one["metric"]) == scores.weights[i] and one["steered"] == [0, len(samples[i])]
        assert one["prompt"] == len(samples[i].prompt_tokens)


def test_a_report_without_texts(study, tmp_path):
    """No prompt, answer or token of a sample stands in it, and all figures do."""
    folder = copy(study, tmp_path)
    command = ["report", str(folder), "--no-texts"]
    assert cli.main(command) == 0
    text, whole = (folder / "report-no-texts.html").read_text(), study.report.read_text()
    (path,) = folder.glob("steps/texts/*/texts.json")
    said = [
        t
        for side in json.loads(path.read_text())["sides"].values()
        for one in side
        for t in (one["prompt"], *(a["text"] for a in one["answers"].values()))
        if t
    ]
    assert len(said) > 100 and not [t for t in said if html.escape(t) in text]
    assert sum(html.escape(t, quote=True).replace("&#x27;", "&#39;") in whole for t in said) >= 48
    assert "drawn without texts" in text and "response 1" in text
    assert text.count("<figure") == whole.count("<figure")
