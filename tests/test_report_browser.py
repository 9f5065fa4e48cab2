"""The report in Chromium: the viewer's interactions, a silent console, and 10,000 edges.

A copy of the page carries a script that acts as a user would and writes what it saw into the
document, which Chromium prints (--dump-dom). No driver of browsers is needed.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from vksteer.circuits.graph import Graph
from vksteer.patching.edge_scores import EdgeScores
from vksteer.study import report, viewer

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]

SCRIPT = """
<script>
window.problems = [];
window.addEventListener("error", e => problems.push(String(e.message)));
window.addEventListener("load", () => setTimeout(async () => {
  const seen = {};
  const node = name => document.querySelector(`.node[data-name="${name}"]`);
  const key = (k, to = document.querySelector(".stage")) =>
    to.dispatchEvent(new KeyboardEvent("keydown", {key: k, bubbles: true, cancelable: true}));
  const panels = () => [...document.querySelectorAll("[data-panel]")].map(p => p.dataset.panel);
  const shown = () => document.querySelector(".viewer .note").textContent;
  const size = document.getElementById("size");
  const slide = value => { size.value = value; size.dispatchEvent(new Event("input")); };
  try {
    BODY
  } catch (error) { problems.push(String(error.stack)); }
  seen.problems = problems;
  const out = document.createElement("pre");
  out.id = "outcome";
  out.textContent = JSON.stringify(seen);
  document.body.append(out);
}, 200));
</script>
"""


def acted(page, tmp_path, body, fragment=""):
    """What the script saw in a page. Its console.log("mark") are `seen["marks"]`, in seconds of the
    clock on the wall: the clock of the page stands still while a script runs.
    """
    path = tmp_path / "page.html"
    path.write_text(page.replace("</head>", SCRIPT.replace("BODY", body) + "</head>"))
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    assert browser, "Chromium is not installed: run tools/setup.sh all"
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,900",
         "--virtual-time-budget=20000", "--enable-logging=stderr", "--dump-dom",
         f"{path.as_uri()}{fragment}"],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["problems"] == []
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    marks = [line for line in console if '"mark"' in line]
    assert console == marks
    seen["marks"] = [seconds(re.search(r"/(\d\d)(\d\d)(\d\d\.\d+):", line)) for line in marks]
    return seen


def seconds(clock):
    hours, minutes, rest = clock.groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def viewer_of(graph, seed=0):
    """A page with the circuit of random scores, heavy-tailed as real ones are."""
    scores = np.random.default_rng(seed).standard_normal(graph.n_edges) ** 5
    made = EdgeScores(graph, scores, n_positions=1, settings={}, provenance={})
    data = viewer.drawn(made, {"edges": [10, 100], "faithfulness": [0.5, 0.875]}, {})
    results = {
        "model": {"architecture": "x", "n_layers": graph.n_layers, "d_model": 1, "hash": "0",
                  "n_heads": graph.n_heads, "n_kv_heads": graph.n_kv_heads},
        "settings": {"size": "tiny", "seed": 0, "data_hash": "0"}, "claims": [], "vksteer": "0",
        "steps": {"exact": {"why": "nothing"}},
    }  # fmt: skip
    return report.page(results, {"steps": {}}, data), made


def test_interactions(tmp_path):
    page, scores = viewer_of(Graph(6, 4, 2, 2))
    seen = acted(
        page,
        tmp_path,
        """
    slide(500);
    seen.size = document.querySelector("output").textContent;
    seen.edges = document.querySelectorAll("path.edge").length;
    slide(1000);
    seen.all = document.querySelectorAll("path.edge").length;
    node("a3.h1").dispatchEvent(new MouseEvent("click", {bubbles: true}));
    seen.panel = panels();
    seen.inputs = [...document.querySelectorAll("[data-panel] table")].map(t =>
      [...t.querySelectorAll("tbody th")].map(c => c.textContent));
    seen.hash = location.hash;
    node("m4").dispatchEvent(new MouseEvent("click", {bubbles: true, shiftKey: true}));
    seen.pinned = panels();
    key("Escape");
    seen.cleared = panels();
    key("/", document.querySelector(".viewer"));
    const search = document.querySelector("input[type=search]");
    seen.focused = document.activeElement === search;
    search.value = "5.h2";
    search.dispatchEvent(new Event("input"));
    key("Enter", search);
    seen.found = panels();
    key("ArrowLeft");
    seen.moved = panels();
    const box = document.getElementById("kind-q");
    box.checked = false;
    box.dispatchEvent(new Event("change"));
    seen.without_q = shown();
    document.querySelector("details:last-of-type").open = true;
    await new Promise(r => setTimeout(r, 50));
    seen.rows = document.querySelectorAll(".viewer details tbody tr").length;
        """,
    )
    graph = scores.graph
    assert re.match(
        r"\d+ of \d+; measured faithfulness at (10|100) edges: 0\.(50|88)", seen["size"]
    )
    assert 0 < seen["edges"] < seen["all"] == graph.n_edges
    assert seen["panel"] == ["a3.h1"] and "node=a3.h1" in seen["hash"]
    ends = {e for e in graph.edge_names if e.split("->")[1] in ("a3.h1<q>", "a3.h0<k>", "a3.h0<v>")}
    assert set(seen["inputs"][0]) == ends
    assert set(seen["inputs"][1]) == {e for e in graph.edge_names if e.startswith("a3.h1->")}
    by_score = sorted(ends, key=lambda e: -abs(scores[e]))
    assert seen["inputs"][0] == by_score
    assert seen["pinned"] == ["m4", "a3.h1"] and seen["cleared"] == []
    assert seen["focused"] and seen["found"] == ["a5.h2"] and seen["moved"] == ["a4.h2"]
    n_q = sum(e.endswith("<q>") for e in graph.edge_names)
    assert seen["without_q"].startswith(f"{graph.n_edges - n_q} edges shown")
    assert seen["rows"] == min(200, graph.n_edges - n_q)


def test_the_state_of_the_address(tmp_path):
    page, scores = viewer_of(Graph(6, 4, 2, 2))
    seen = acted(
        page,
        tmp_path,
        """
    seen.panels = panels();
    seen.checked = [...document.querySelectorAll("input:checked")].map(i => i.value);
    seen.size = document.querySelector("output").textContent;
        """,
        "#circuit:n=20&kinds=v,mlp&node=m3&pins=a2.h0,steer",
    )
    assert seen["panels"] == ["a2.h0", "steer", "m3"] and seen["checked"] == ["v", "mlp"]
    assert int(seen["size"].split()[0]) == len(scores.circuit(20))


def test_ten_thousand_edges(tmp_path):
    """On canvas; the page stays below 3 MB, and one redraw within the time of a frame."""
    page, _ = viewer_of(Graph(28, 24, 8, 12))
    assert len(page) < 3_000_000
    seen = acted(
        page,
        tmp_path,
        """
    slide(1000);
    seen.canvas = !document.querySelector("canvas").hidden;
    seen.lines = document.querySelectorAll("path.edge").length;
    seen.note = shown();
    console.log("mark");
    for (let i = 0; i < 20; i++)
      node(`a${13 + i % 10}.h${i}`).dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
    console.log("mark");
        """,
    )
    assert seen["canvas"] and seen["lines"] == 0
    assert seen["note"].startswith("10000 edges shown") and "114441" in seen["note"]
    first, last = seen["marks"]
    assert (last - first) / 20 < 1 / 30  # 4 ms with the machine loaded to 16 processes
