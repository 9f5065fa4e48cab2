"""`python -m vksteer.demo --real` (make demo-real): the study's first table on
Qwen2.5-Coder-0.5B-Instruct.

Vector by difference in means, chosen among three layers by the paper's rule, a sweep of strengths,
Table 1 on 64 + 64 test prompts. The written prompts are mild ones that a chat model tends to
decline, each with a harmless twin of the same form; no act of the training prompts occurs in the
test. Answers are kept in the output folder only (they let an interrupted run go on); `--results`
writes figures without any text.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from . import report as demo

QWEN = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf"
LAYERS, POSITIONS = (12, 14, 16), (-4, -2, -1)  # where this model can be steered both ways
STRENGTHS = (1.0, 2.0, 3.0)
NEW_TOKENS = 40
VECTOR = "qwen_refusal.gguf"


def prompts(arguments) -> dict[str, tuple[list[str], list[str]]]:
    """{"train", "validation", "test"}: (harmful, harmless). Written ones: of every eight acts three
    train, one validates, four test.
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
    pairs = [
        tuple(w["forms"][i // 2 % len(w["forms"])].format(act) for act in pair)
        for i, pair in enumerate(w["acts"])
    ]
    chosen = {"train": (1, 3, 5), "validation": (7,), "test": (0, 2, 4, 6)}
    return {
        split: tuple(
            list(side) for side in zip(*(p for i, p in enumerate(pairs) if i % 8 in where))
        )
        for split, where in chosen.items()
    }


def choose(cands, validation, progress):
    """(vector, how): the paper's rule over LAYERS; where its filters leave none, the least bypass
    minus induce, and it is said.
    """
    from .. import steering

    table = cands.evaluate(*validation, layers=LAYERS, progress=progress)
    try:
        p, l = steering.choose(table.bypass, table.induce, table.kl)
        how = "paper's rule"
    except ValueError as error:
        p, l = np.unravel_index(np.nanargmin(table.bypass - table.induce), table.induce.shape)
        how = (
            f"no candidate passes the paper's filters ({str(error).splitlines()[0]}); taken: least"
            " bypass - induce"
        )
    return cands.vector(int(cands.positions[p]), int(l)), how


def run(arguments) -> int:
    from ..runtime.model import Model

    path = demo.fetched(QWEN, "qwen")
    if path is None:
        return 1
    start, progress = time.perf_counter(), sys.stderr.isatty()
    demo.heading(
        "Qwen2.5-Coder-0.5B-Instruct, "
        + ("its vector taken apart" if arguments.inside else "Table 1 on a real model")
    )
    splits = prompts(arguments)
    demo.say(
        "; ".join(
            f"{name}: {len(pair[0])} + {len(pair[1])} prompts" for name, pair in splits.items()
        )
    )
    lap = lambda what: demo.say(f"[{time.perf_counter() - start:5.0f} s] {what}")
    kept = arguments.out / "qwen.json"
    if arguments.inside and not kept.exists():
        raise ValueError(
            f"--inside goes on from what `make demo-real` found, and {kept} is not there: run that"
            " first, or name its folder with --out"
        )
    with Model.from_pretrained(path, device=arguments.device, progress=progress) as model:
        lap(f"loaded on {model.device}")
        if arguments.inside:
            _inside(
                model,
                arguments,
                splits,
                json.loads(kept.read_text(encoding="utf-8")),
                lap,
                progress,
            )
        else:
            _table(model, path, arguments, splits, lap, progress)
    return 0


def _table(model, path, arguments, splits, lap, progress):
    """Vector, strengths and Table 1; everything into arguments.out, figures
    into arguments.results.
    """
    from .. import freezing, steering

    start, out = time.perf_counter(), arguments.out
    test = tuple(side[: arguments.test or 64] for side in splits["test"])
    cands = steering.difference_in_means(
        model, *splits["train"], positions=POSITIONS, progress=progress
    )
    vector, how = choose(cands, splits["validation"], progress)
    (out / "qwen_candidates.md").write_text(cands.table.to_markdown() + "\n", encoding="utf-8")
    vector.save(out / VECTOR)
    lap(f"vector: layer {vector.layer}, position {vector.position}, norm {vector.norm:.1f}: {how}")
    demo.say(cands.table.to_markdown())
    sweep = steering.sweep(
        model, vector, STRENGTHS, *splits["validation"], max_new_tokens=32, progress=progress
    )
    lap("strengths, on the validation prompts")
    demo.say(sweep.to_markdown())
    pair = demo.strengths(sweep, (STRENGTHS[1],) * 2)
    before = time.perf_counter()
    table = freezing.ablation_table(
        model,
        vector,
        *test,
        pair,
        max_new_tokens=NEW_TOKENS,
        random_control=arguments.random,
        out=out / "qwen_answers.json",
        progress=progress,
    )
    seconds = time.perf_counter() - before
    lap("Table 1")
    demo.say(table.to_markdown())
    picture = demo.plot(table, out / "qwen_table1.png")
    result = {
        "model": path.stem,
        "prompts": "from files" if arguments.harmful else "written (demo_prompts.json)",
        "n_train": [len(s) for s in splits["train"]],
        "n_validation": [len(s) for s in splits["validation"]],
        "chosen": {
            "layer": vector.layer,
            "position": vector.position,
            "norm": vector.norm,
            "how": how,
        },
        "candidates": cands.table.to_dict(),
        "sweep": sweep.to_dict(),
        "table1": table.to_dict(),
        "table1_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - start, 1),
        **demo.environment(model),
    }
    demo.write_json(out / "qwen.json", result)
    demo.say(
        f"\nWritten to {out}/: qwen_candidates.md, {VECTOR}, qwen_answers.json (answers, for"
        f" resuming), {picture}qwen.json"
    )
    _publish(arguments, "", result, report(result, cands, sweep, table))


def _inside(model, arguments, splits, found, lap, progress):
    """Lens, sparsity and a learned vector (demo_real_inside.py), from the vector and strengths that
    an earlier run left in arguments.out.
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


def _publish(arguments, suffix, result, text):
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        name = f"qwen2.5-coder-0.5b{suffix}-{result['date']}"
        demo.write_json(arguments.results / f"{name}.json", result)
        (arguments.results / f"{name}.md").write_text(text, encoding="utf-8")
        demo.say(f"Figures, without texts: {arguments.results / name}.json and .md")


def report(result, cands, sweep, table) -> str:
    d, c = result["device"], result["chosen"]
    return f"""# Table 1 on {result["model"]}

Made by `make demo-real ARGS="--results docs/results"` on {result["date"]}: vksteer {result["vksteer"]}, {d["name"]} ({d["type"]}, {d["driver"]}),
{result["cpu"]}, {result["cores"]} cores; {result["seconds"] / 60:.0f} minutes in all, {result["table1_seconds"] / 60:.0f} for the table. Prompts: {result["prompts"]}; {result["n_train"][0]} + {result["n_train"][1]} to train,
{result["n_validation"][0]} + {result["n_validation"][1]} to choose the vector and the strength. Judge: substrings, so "ASR" is the share of answers that do not refuse. No answer texts are kept here.

Vector: layer {c["layer"]}, position {c["position"]}, norm {c["norm"]:.2f} ({c["how"]}).

## Candidates

{cands.table.to_markdown()}

## Strengths, on the validation prompts

{sweep.to_markdown()}

## Table 1

{table.to_markdown()}
"""


def report_inside(result, text) -> str:
    d, c = result["device"], result["chosen"]
    return f"""# The vector of {result["model"]}, taken apart

Made by `make demo-real ARGS="--inside --results docs/results"` on {result["date"]}: vksteer {result["vksteer"]}, {d["name"]} ({d["type"]}, {d["driver"]}),
{result["cpu"]}, {result["cores"]} cores; {result["seconds"] / 60:.0f} minutes. Prompts: {result["prompts"]}. The vector of layer {c["layer"]}, position {c["position"]}, norm {c["norm"]:.2f},
used with +{result["strengths"][0]:g} and -{result["strengths"][1]:g}, is the one of the table beside this file. Gradients for the sparsity curve: {result["samples"]}.
Judge: substrings, so "ASR" is the share of answers that do not refuse. No answer texts are kept here.

{text}
"""
