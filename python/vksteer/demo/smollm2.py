"""Part 2 of the demo: verse against prose in a real model, and how fast it runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..base.json_files import read_json
from ..base.provenance import digest
from .report import environment, heading, say, side_by_side, write_json, written

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Chosen for verse against prose in SmolLM2: layer 10 changes little, and at layer 18 or with
# a = 1.5 the text becomes repetitive.
LAYER, STRENGTH = 14, 1.0
KEPT, ACTIVATIONS, VECTOR = "smollm2.json", "smollm2_activations.npz", "verse.gguf"


def verse_vector(model: Model) -> SteeringVector:
    """Verse minus prose: the difference of the mean residual streams before layer LAYER at the last
    token of the prompts.
    """
    from .. import steering

    w = written()
    verse, prose = ([form.format(t) for t in w["topics"]] for form in (w["verse"], w["prose"]))
    return steering.difference_in_means(model, verse, prose, positions=[-1], progress=False).vector(
        -1, LAYER
    )


def speed(model: Model, prompt_tokens: int = 128, new_tokens: int = 32) -> dict[str, Any]:
    """Prefill and decoding, as rates and as shares of the device's ceilings."""
    from ..runtime import ceilings

    first = ceilings.measure(model)
    random = np.random.default_rng(0)

    def draw(n: int) -> list[int]:
        drawn = random.integers(100, min(10_000, model.config.d_vocab), n)
        return [int(token) for token in drawn]

    prompt = draw(prompt_tokens)
    model.run([prompt], logits="last")
    prefill = min(_seconds(lambda: model.run([prompt], logits="last")) for _ in range(3))
    steps = {
        rows: decode_step(model, [draw(16) for _ in range(rows)], new_tokens) for rows in (1, 8)
    }
    # Measured before and after, so that a short load of the machine does not lower the ceilings.
    again = ceilings.measure(model)
    top = ceilings.Ceilings(max(first.matrix, again.matrix), max(first.read, again.read))
    rate = ceilings.prefill_operations(model, prompt_tokens) / prefill
    out = {
        "ceilings": top.to_dict(),
        "prefill": {
            "tokens": prompt_tokens,
            "tokens_per_s": prompt_tokens / prefill,
            "gflops": rate / 1e9,
            "share_of_matrix_peak": rate / top.matrix,
        },
    }
    for rows, step in steps.items():
        read = ceilings.decode_bytes(model, 16 + new_tokens / 2, rows) / step
        out[f"decode_{rows}"] = {
            "tokens_per_s": rows / step,
            "gbytes_per_s": read / 1e9,
            "share_of_read_peak": read / top.read,
        }
    return out


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decode_step(model: Model, prompts: Sequence[list[int]], new_tokens: int) -> float:
    """Median seconds of one decoding step of this batch, without the prefill."""
    times: list[float] = []
    last = len(prompts) - 1
    model.generate(
        prompts,
        max_new_tokens=new_tokens,
        ignore_eos=True,
        progress=False,
        on_token=lambda row, token, piece: (
            times.append(time.perf_counter()) if row == last else None
        ),
    )
    return float(np.median(np.diff(times)))


def speed_text(s: dict[str, Any]) -> str:
    """The figures of `speed` as a Markdown table."""
    p, d, e, top = s["prefill"], s["decode_1"], s["decode_8"], s["ceilings"]
    return "\n".join(
        [
            "| work | tokens/s | rate | share of what this device can do |",
            "|:---|---:|---:|---:|",
            (
                f"| prefill, {p['tokens']} tokens | {p['tokens_per_s']:.0f} | {p['gflops']:.1f}"
                f" GFLOP/s | {p['share_of_matrix_peak']:.0%} of {top['matrix'] / 1e9:.1f} GFLOP/s,"
                " the matrix kernel's own |"
            ),
            (
                f"| decoding, 1 row | {d['tokens_per_s']:.1f} | {d['gbytes_per_s']:.2f} GB/s |"
                f" {d['share_of_read_peak']:.0%} of {top['read'] / 1e9:.1f} GB/s, its read rate |"
            ),
            (
                f"| decoding, 8 rows | {e['tokens_per_s']:.1f} | {e['gbytes_per_s']:.2f} GB/s |"
                f" {e['share_of_read_peak']:.0%} of {top['read'] / 1e9:.1f} GB/s, its read rate |"
            ),
        ]
    )


def real(
    path: Path,
    out: Path,
    device: str | None,
    new_tokens: int = 56,
    progress: bool = False,
) -> dict[str, Any]:
    """SmolLM2: verse against prose, each prompt answered three ways, speed, activations saved.

    Returns what is written to smollm2.json; where an earlier run with the same file, prompts and
    options has written it, tells that and runs nothing.
    """
    heading("2. Verse against prose in a real model: SmolLM2-135M-Instruct")
    key = _key(path, device, new_tokens)
    result = _kept(out, key)
    if result is not None:
        say(f"From the run of {result['date']}, {out / KEPT}; remove that file to run it again.")
        say(_vector_line(result["norm"]))
        _say_answers(result["answers"])
        say(f"\nSpeed on {result['device']['name']}, measured then:\n")
        say(speed_text(result["speed"]))
        return result
    return _run(path, out, device, new_tokens, progress, key)


def _run(
    path: Path, out: Path, device: str | None, new_tokens: int, progress: bool, key: str
) -> dict[str, Any]:
    """Runs the part, tells it and writes its files, smollm2.json last."""
    from ..runtime.model import Model

    start = time.perf_counter()
    with Model.from_pretrained(path, device=device, progress=progress) as model:
        say(f"{model.device}; loaded in {time.perf_counter() - start:.1f} s")
        vector = verse_vector(model)
        say(_vector_line(vector.norm))
        answers, arrays = _three_ways(model, vector, new_tokens, progress)
        _say_answers(answers)
        np.savez(out / ACTIVATIONS, **arrays)
        vector.save(out / VECTOR)
        say(f"\nSpeed on {model.device.name} (the shares are of ceilings measured just now):\n")
        figures = speed(model, new_tokens=min(32, new_tokens))
        say(speed_text(figures))
        result = {
            "key": key,
            "layer": LAYER,
            "coefficient": STRENGTH,
            "norm": vector.norm,
            "answers": answers,
            "speed": figures,
            "seconds": time.perf_counter() - start,
            **environment(model),
        }
    write_json(out / KEPT, result)
    say(
        f"\n{result['seconds']:.0f} s. Written to {out}/: {ACTIVATIONS} ({len(arrays)} arrays),"
        f" {VECTOR}, {KEPT}"
    )
    return result


def _key(path: Path, device: str | None, new_tokens: int) -> str:
    """A hash of what the part's results depend on."""
    with open(path, "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return digest(__version__, weights, written(), LAYER, STRENGTH, new_tokens, device)


def _kept(out: Path, key: str) -> dict[str, Any] | None:
    """What an earlier run with this key has written; None where a file of it is missing."""
    if not all((out / name).exists() for name in (KEPT, ACTIVATIONS, VECTOR)):
        return None
    found = read_json(out / KEPT, limit=1 << 24)
    return found if found.get("key") == key else None


def _vector_line(norm: float) -> str:
    n = len(written()["topics"])
    return (
        f"Vector: mean of {n} requests for a poem minus mean of {n} for an explanation of the same"
        f" things, layer {LAYER}, last position; norm {norm:.1f}"
    )


def _say_answers(answers: Sequence[dict[str, Any]]) -> None:
    """Prints answers with -a, unsteered and with +a side by side."""
    titles = [f"-{STRENGTH:g} (prose)", "unsteered", f"+{STRENGTH:g} (verse)"]
    for answer in answers:
        say(f"\n> {answer['prompt']}")
        say(side_by_side(titles, answer["texts"]))


def _three_ways(
    model: Model, vector: SteeringVector, new_tokens: int, progress: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(Answers as {"prompt", "texts"}, the texts with -a, unsteered and with +a; the activations of
    the prompts at every layer, and at LAYER while decoding).
    """
    from ..runtime.edits import Steer

    prompts, site = written()["to_steer"], f"blocks.{LAYER}.hook_resid_pre"
    edits = [[Steer(vector, s * STRENGTH)] if s else [] for s in (-1, 0, 1)]
    made = model.generate(
        [p for p in prompts for _ in edits],
        edits=edits * len(prompts),
        max_new_tokens=new_tokens,
        capture=[site],
        progress=progress,
    )
    answers = [
        {"prompt": prompt, "texts": [g.text for g in made[3 * i : 3 * i + 3]]}
        for i, prompt in enumerate(prompts)
    ]
    sites = ["blocks.*.hook_resid_post"]
    runs = [model.run(prompts, edits=e, capture=sites, logits=None) for e in edits]
    arrays = {
        f"{name}/{key}": value
        for name, run in zip(("minus", "unsteered", "plus"), runs)
        for key, value in run.items()
    }
    arrays |= {f"decoded/{i}/{site}": g.captured[site] for i, g in enumerate(made)}
    return answers, arrays | {"tokens": runs[0].tokens, "mask": runs[0].mask}
