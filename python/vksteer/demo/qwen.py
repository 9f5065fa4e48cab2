"""`python -m vksteer.demo --real` (make demo-real): the study's first table on
Qwen2.5-Coder-0.5B-Instruct.

The vector is a difference in means, chosen among three layers by the paper's rule. A sweep over
strengths follows, and Table 1 on 64 + 64 test prompts. The prompts that come with the demo are mild
ones that a chat model tends to decline, each paired with a harmless prompt of the same form; no act
of the training prompts occurs in the test. Answers are kept only in the output folder, from which
an interrupted run continues; `--results` writes figures without any text.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from . import report as demo

if TYPE_CHECKING:
    from ..freezing import AblationTable
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model
    from ..steering.candidates import Candidates
    from ..steering.scores import Scores
    from ..steering.sweeping import Sweep

#: {"train", "validation", "test"}: (harmful, harmless).
Splits: TypeAlias = dict[str, tuple[list[str], list[str]]]

QWEN = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
LAYERS, POSITIONS = (12, 14, 16), (-4, -2, -1)  # where this model can be steered in both directions
STRENGTHS = (1.0, 2.0, 3.0)
NEW_TOKENS = 40
VECTOR = "qwen_refusal.gguf"


def prompts(arguments: Any) -> Splits:
    """The prompts of --harmful and --harmless, or those that come with the demo: of every eight
    acts three are for training, one for validation and four for the test.
    """
    if (arguments.harmful is None) != (arguments.harmless is None):
        raise ValueError("--harmful and --harmless belong together: give both")
    if arguments.harmful:
        from ..data.prompt_files import prompts_of, split

        sides = [
            split(prompts_of(file), name)
            for name, file in (("harmful", arguments.harmful), ("harmless", arguments.harmless))
        ]
        return dict(zip(("train", "validation", "test"), zip(*sides)))
    w = demo.written()
    forms = w["forms"]
    pairs = [
        [forms[i // 2 % len(forms)].format(act) for act in pair] for i, pair in enumerate(w["acts"])
    ]
    chosen = {"train": (1, 3, 5), "validation": (7,), "test": (0, 2, 4, 6)}
    return {
        split: (
            [p[0] for i, p in enumerate(pairs) if i % 8 in where],
            [p[1] for i, p in enumerate(pairs) if i % 8 in where],
        )
        for split, where in chosen.items()
    }


def choose(
    cands: Candidates, validation: tuple[list[str], list[str]], progress: bool
) -> tuple[SteeringVector, str]:
    """(vector, how it was chosen): the paper's rule over LAYERS, or the least bypass minus induce
    where no candidate passes the filters.
    """
    from .. import steering

    table = cands.evaluate(*validation, layers=LAYERS, progress=progress)
    try:
        p, l = steering.choose(table.bypass, table.induce, table.kl)
        how = "paper's rule"
    except ValueError as error:
        least = int(np.nanargmin(table.bypass - table.induce))
        p, l = map(int, np.unravel_index(least, table.induce.shape))
        how = (
            f"no candidate passes the paper's filters ({str(error).splitlines()[0]}); taken: least"
            " bypass - induce"
        )
    return cands.vector(int(cands.positions[p]), int(l)), how


def run(arguments: argparse.Namespace) -> int:
    """Runs `--real`, with or without `--inside`; the exit status."""
    from ..runtime.model import Model

    splits = prompts(arguments)
    path = demo.fetched(QWEN, "qwen")
    if path is None:
        return 1
    start, progress = time.perf_counter(), sys.stderr.isatty()
    demo.heading(
        "Qwen2.5-Coder-0.5B-Instruct, "
        + ("analysis of its vector" if arguments.inside else "Table 1 on a real model")
    )
    demo.say(
        "; ".join(
            f"{name}: {len(pair[0])} + {len(pair[1])} prompts" for name, pair in splits.items()
        )
    )
    lap = lambda what: demo.say(f"[{time.perf_counter() - start:5.0f} s] {what}")
    kept = arguments.out / "qwen.json"
    if arguments.inside and not kept.exists():
        raise ValueError(
            f"--inside continues from what `make demo-real` found, and {kept} is not there: run"
            " that first, or name its folder with --out"
        )
    with Model.from_pretrained(path, device=arguments.device, progress=progress) as model:
        lap(f"loaded on {model.device}")
        if arguments.inside:
            found = json.loads(kept.read_text(encoding="utf-8"))
            _inside(model, arguments, splits, found, lap, progress)
        else:
            _table(model, path, arguments, splits, lap, progress)
    return 0


def _table(
    model: Model,
    path: Path,
    arguments: argparse.Namespace,
    splits: Splits,
    lap: Callable[[str], None],
    progress: bool,
) -> None:
    """Vector, strengths and Table 1. Everything is written to arguments.out, figures also to
    arguments.results.
    """
    from .. import steering

    start, out = time.perf_counter(), arguments.out
    cands = steering.difference_in_means(
        model, *splits["train"], positions=POSITIONS, progress=progress
    )
    vector, how = choose(cands, splits["validation"], progress)
    scores = cands.table
    assert scores is not None  # choose fills it
    (out / "qwen_candidates.md").write_text(scores.to_markdown() + "\n", encoding="utf-8")
    vector.save(out / VECTOR)
    lap(f"vector: layer {vector.layer}, position {vector.position}, norm {vector.norm:.1f}: {how}")
    demo.say(scores.to_markdown())
    sweep = steering.sweep(
        model, vector, STRENGTHS, *splits["validation"], max_new_tokens=32, progress=progress
    )
    lap("strengths, on the validation prompts")
    demo.say(sweep.to_markdown())
    pair = demo.strengths(sweep, (STRENGTHS[1],) * 2)
    before = time.perf_counter()
    table = _table1(model, vector, splits["test"], pair, arguments, progress)
    seconds = time.perf_counter() - before
    lap("Table 1")
    demo.say(table.to_markdown())
    drawn = demo.picture(table.plot, out / "qwen_table1.png")
    chosen = {"layer": vector.layer, "position": vector.position, "norm": vector.norm, "how": how}
    result = {
        "model": path.stem,
        "prompts": "from files" if arguments.harmful else "written (demo/prompts.json)",
        "n_train": [len(s) for s in splits["train"]],
        "n_validation": [len(s) for s in splits["validation"]],
        "chosen": chosen,
        "candidates": scores.to_dict(),
        "sweep": sweep.to_dict(),
        "table1": table.to_dict(),
        "table1_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        **demo.environment(model),
    }
    demo.write_json(out / "qwen.json", result)
    demo.say(
        f"\nWritten to {out}/: qwen_candidates.md, {VECTOR}, qwen_answers.json (answers, for"
        f" resuming), {'qwen_table1.png, ' if drawn else ''}qwen.json"
    )
    _publish(arguments, "", result, report(result, scores, sweep, table))


def _table1(
    model: Model,
    vector: SteeringVector,
    test: tuple[list[str], list[str]],
    pair: tuple[float, float],
    arguments: argparse.Namespace,
    progress: bool,
) -> AblationTable:
    from .. import freezing

    harmful, harmless = (side[: arguments.test] for side in test)
    return freezing.ablation_table(
        model,
        vector,
        harmful,
        harmless,
        pair,
        max_new_tokens=NEW_TOKENS,
        random_control=arguments.random,
        out=arguments.out / "qwen_answers.json",
        progress=progress,
    )


def _inside(
    model: Model,
    arguments: argparse.Namespace,
    splits: Splits,
    found: dict[str, Any],
    lap: Callable[[str], None],
    progress: bool,
) -> None:
    """Lens, sparsity and a learned vector (qwen_inside.py), from the vector and strengths that an
    earlier run left in arguments.out.
    """
    from ..inputs.vectors import SteeringVector
    from .qwen_inside import inside

    start = time.perf_counter()
    vector = SteeringVector.load(arguments.out / VECTOR, layer=found["chosen"]["layer"])
    strengths = tuple(found["table1"]["setting"]["coefficient"])
    figures, text = inside(
        model,
        vector,
        strengths,
        splits,
        arguments.out,
        demo.say,
        lap,
        progress,
        NEW_TOKENS,
        STRENGTHS,
    )
    result = {
        "model": found["model"],
        "prompts": found["prompts"],
        "chosen": found["chosen"],
        "strengths": strengths,
        **figures,
        "seconds": round(time.perf_counter() - start, 1),
        **demo.environment(model),
    }
    demo.write_json(arguments.out / "qwen_inside.json", result)
    _publish(arguments, "-inside", result, report_inside(result, text))


def _publish(arguments: argparse.Namespace, suffix: str, result: dict[str, Any], text: str) -> None:
    """Writes the figures, without any answer, to the folder of --results."""
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        name = f"qwen2.5-coder-0.5b{suffix}-{result['date']}"
        demo.write_json(arguments.results / f"{name}.json", result)
        (arguments.results / f"{name}.md").write_text(text, encoding="utf-8")
        demo.say(f"Figures, without texts: {arguments.results / name}.json and .md")


def _made_by(result: dict[str, Any], options: str) -> str:
    """The command, date, version, device and machine of a report."""
    d = result["device"]
    return (
        f'Made by `make demo-real ARGS="{options}--results docs/results"` on {result["date"]}:'
        f" vksteer {result['vksteer']}, {d['name']} ({d['type']}, {d['driver']}),\n{result['cpu']},"
        f" {result['cores']} cores; {result['seconds'] / 60:.0f} minutes"
    )


NO_TEXTS = (
    'Judge: substrings, so "ASR" is the share of answers that do not refuse. No answer texts are'
    " kept here."
)


def report(result: dict[str, Any], scores: Scores, sweep: Sweep, table: AblationTable) -> str:
    """The Markdown page of `--results`."""
    c, train, validation = result["chosen"], result["n_train"], result["n_validation"]
    return f"""# Table 1 on {result["model"]}

{_made_by(result, "")} in all, {result["table1_seconds"] / 60:.0f} for the table.
Prompts: {result["prompts"]}; {train[0]} + {train[1]} to train,
{validation[0]} + {validation[1]} to choose the vector and the strength. {NO_TEXTS}

Vector: layer {c["layer"]}, position {c["position"]}, norm {c["norm"]:.2f} ({c["how"]}).

## Candidates

{scores.to_markdown()}

## Strengths, on the validation prompts

{sweep.to_markdown()}

## Table 1

{table.to_markdown()}
"""


def report_inside(result: dict[str, Any], text: str) -> str:
    """The Markdown page of `--inside --results`."""
    c, (plus, minus) = result["chosen"], result["strengths"]
    return f"""# Analysis of the vector of {result["model"]}

{_made_by(result, "--inside ")}.
Prompts: {result["prompts"]}. The vector of layer {c["layer"]}, position {c["position"]},
norm {c["norm"]:.2f}, used with +{plus:g} and -{minus:g}, is the one of the table beside this file.
Gradients for the sparsity curve: {result["samples"]}.
{NO_TEXTS}

{text}
"""
