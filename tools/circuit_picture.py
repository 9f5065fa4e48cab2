"""Takes docs/images/circuit.png: the circuit of a study as the viewer of its report draws it.

    .venv/bin/python tools/circuit_picture.py [STUDY [OUT.png]]

STUDY is a study's folder (default: demo_out/study, which `make demo` makes). Chromium takes the
picture; `tools/setup.sh test` installs it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import vksteer as vs

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs/images/circuit.png"
DATA = "harmful.steered"
WIDTH, HEIGHT = 1000, 420


def page_of(study: Path) -> tuple[str, int]:
    """(The viewer as a page, the edges of the smallest faithful circuit) of a study's folder."""
    circuits = json.loads((study / "results.json").read_text())["steps"]["circuits"]
    key = json.loads((study / "run.json").read_text())["steps"]["attribution"]["folder"]
    path = study / "steps/attribution" / key / f"{DATA}.scores.safetensors"
    curve = vs.circuits.FaithfulnessCurve.from_dict(circuits["curve"])
    view = vs.study.view(vs.patching.EdgeScores.load(path), curve, height=HEIGHT)
    return view.to_html(), circuits["smallest"][DATA]["size"]


def main(study: Path, out: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        sys.exit("Chromium is not installed: tools/setup.sh test installs it")
    html, size = page_of(study)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "circuit.html"
        page.write_text(html, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        options += [f"--window-size={WIDTH},{HEIGHT}", "--virtual-time-budget=5000"]
        target = [f"--screenshot={out.resolve()}", f"{page.as_uri()}#circuit:n={size}"]
        subprocess.run([browser, *options, *target], check=True, capture_output=True)
    print(f"{out}: {size} edges, {out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:]]
    main(*[*places, *(Path("demo_out/study"), OUT)[len(places) :]])
