"""The generated tables of README.md and docs/benchmarks.md.

    table.py            prints the tables
    table.py --write    puts them between their <!-- NAME --> and <!-- /NAME --> marks

families: the table of model configurations in the package. measured: the newest file of
benchmarks/results that is not marked as loaded by other work. gpu: the newest complete file of
benchmarks/results/gpu. speed: a few rows of both. A ratio is the peer's time divided by ours.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"

#: The marks that each page must hold, once each.
PAGES = {"README.md": ("families", "speed"), "docs/benchmarks.md": ("measured", "gpu")}


def newest(folder: Path) -> dict | None:
    """The newest result of a folder without "-busy" (other processes ran) and "-first-run"."""
    paths = [p for p in folder.glob("*.json") if not p.stem.endswith(("-busy", "-first-run"))]
    contents = [json.loads(p.read_text()) for p in sorted(paths)]
    return max(contents, key=lambda c: c["machine"]["date"], default=None)


def number(value: float, unit: str) -> str:
    digits = 3 if abs(value) < 0.1 else 2 if abs(value) < 10 else 0
    text = f"{value:.{digits}f}"
    return f"{text}x" if unit == "x" else f"{text} {unit}"


def duration(seconds: float) -> str:
    """Two significant digits or whole milliseconds, with the unit."""
    if seconds < 0.01:
        return f"{1e3 * seconds:.1f} ms"
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.2g} s"


def heading(content: dict) -> str:
    m = content["machine"]
    device = m["device"]["name"]
    driver = m["device"]["driver"]
    said = (
        f"{m['cpu']}, {m['cores']} cores, {device}, {driver}; "
        f"{m['date'][:10]}, commit {content['commit']}; "
        f"PyTorch {m['versions']['torch']}, transformers {m['versions']['transformers']}. "
        f"Load of other processes before the run: {m['busy_cores_before']:.1f} cores."
    )
    return textwrap.fill(" ".join([said, *content.get("notes", ())]), 100)


def measured() -> str:
    content = newest(RESULTS)
    if content is None:
        return "Nothing measured yet: run `make bench`."
    lines = [heading(content), "", "| what | figure | target | met |", "|:---|---:|---:|:---|"]
    rates = (("ours", "ours_tokens_per_s"), ("theirs", "peer_tokens_per_s"))
    for r in content["rows"]:
        said = ", ".join(f"{name} {r[key]:.0f} tokens/s" for name, key in rates if key in r)
        met = "" if r["met"] is None else "yes" if r["met"] else "**no**"
        what = f"{r['what']}{f' ({said})' if said else ''}"
        lines.append(f"| {what} | {number(r['value'], r['unit'])} | {r['target']} | {met} |")
    return "\n".join(lines)


def sides(row: dict) -> tuple[float, float] | None:
    """(our seconds, the peer's seconds) of a comparison, medians; None for a row without times."""
    steps = row.get("steps", {})
    if "qk" in steps:  # frozen decoding: our slowest kind
        peer = steps.get("float32") or steps["authors"]
        return max(steps[kind]["median_s"] for kind in ("qk", "ov", "mlp")), peer["median_s"]
    ours = row.get("ours") or steps.get("ours")
    peer = row.get("peer") or steps.get("float32") or steps.get("bfloat16")
    if not ours or not peer or "median_s" not in peer:
        return None
    return ours["median_s"], peer["median_s"]


def gpu() -> str:
    content = newest(RESULTS / "gpu")
    if content is None:
        return "Nothing measured yet: run `benchmarks/gpu.py`."
    lines = [heading(content), ""]
    lines += ["| what | ours | peer | ratio | ratio to bfloat16 |", "|:---|---:|---:|---:|---:|"]
    for r in content["rows"]:
        pair = sides(r)
        if pair:
            ours, peer = map(duration, pair)
        elif "tflops" in r:
            ours, peer = f"{r['tflops']:.2g} TFLOP/s", f"{r['peer_tflops']:.2g} TFLOP/s"
        else:
            ours, peer = number(r["value"], r["unit"]), ""
        ratio = number(r["value"], "x") if r["unit"] == "x" else ""
        half = number(r["against_bfloat16"], "x") if "against_bfloat16" in r else ""
        lines.append(f"| {r['what']} | {ours} | {peer} | {ratio} | {half} |")
    return "\n".join(lines)


class Line(NamedTuple):
    """One line of the README's table: a row of a result, found by how its text begins."""

    begins: str
    work: str
    peer: str


TORCH, HALF, RERUNS = "PyTorch float32", "transformers, bfloat16", "two PyTorch re-runs"
FROZEN = "one token of frozen decoding after 256"
CPU_LINES = (
    Line("prefill 128 tokens, last logits, ag", "SmolLM2 135M, one pass over 128 tokens", TORCH),
    Line("decoding, batch 1, against tr", "SmolLM2 135M, decoding 64 tokens", HALF),
    Line("frozen decoding at 256 tokens against", FROZEN, RERUNS),
    Line("NTP step", "one NTP training step, 6 examples", TORCH),
)
GPU_LINES = (
    Line("smollm2: pass over 1 x 128", "SmolLM2's shape, 1 x 128 tokens", TORCH),
    Line("smollm2: pass over 32 x 128", "SmolLM2's shape, 32 x 128 tokens", TORCH),
    Line("smollm2: decoding, 1 rows", "SmolLM2's shape, decoding 32 tokens", HALF),
    Line("smollm2: frozen decoding", FROZEN, RERUNS),
    Line(
        "smollm2: attribution",
        "EAP-IG scores of all edges, 128 tokens, 10 steps",
        "PyTorch's passes alone",
    ),
    Line("llama-3b: pass over 1 x 128", "Llama 3.2 3B's shape, 1 x 128 tokens", TORCH),
    Line("llama-3b: pass over 32 x 128", "Llama 3.2 3B's shape, 32 x 128 tokens", TORCH),
)


def speed() -> str:
    lines = [
        "| machine | work | ours | peer | peer's time | ratio | ratio to PyTorch bfloat16 |",
        "|:---|:---|---:|:---|---:|---:|---:|",
    ]
    for folder, chosen in ((RESULTS, CPU_LINES), (RESULTS / "gpu", GPU_LINES)):
        content = newest(folder)
        if content is None:
            continue
        m = content["machine"]
        software = m["device"]["type"] == "software"
        machine = f"{m['cpu']}, {m['cores']} cores (lavapipe)" if software else m["device"]["name"]
        for line in chosen:
            found = (r for r in content["rows"] if r["what"].startswith(line.begins))
            row = next(found, None)
            if row is None or (pair := sides(row)) is None:
                raise SystemExit(f"{folder}: no times in a row that begins {line.begins!r}")
            ours, peer = pair
            half = number(row["against_bfloat16"], "x") if "against_bfloat16" in row else ""
            times = (duration(ours), line.peer, duration(peer), number(peer / ours, "x"))
            cells = (machine, line.work, *times, half)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def families() -> str:
    from vksteer.loading.families import markdown

    return markdown()


BLOCKS = {"families": families, "speed": speed, "measured": measured, "gpu": gpu}


def filled(text: str, page: str) -> str:
    """The page's text with its tables made anew."""
    for name in PAGES[page]:
        pattern = rf"(<!-- {name}:[^>]*-->\n).*?(<!-- /{name} -->)"
        made = BLOCKS[name]()
        new = lambda m, made=made: f"{m[1]}{made}\n{m[2]}"  # a function: no escapes in it
        text, n = re.subn(pattern, new, text, flags=re.DOTALL)
        if n != 1:
            raise SystemExit(f"{page} has {n} blocks named {name}, not one")
    return text


def main() -> None:
    if "--write" in sys.argv[1:]:
        for page in PAGES:
            (ROOT / page).write_text(filled((ROOT / page).read_text(), page))
    else:
        print("\n\n".join(f"{name}:\n{make()}" for name, make in BLOCKS.items()))


if __name__ == "__main__":
    main()
