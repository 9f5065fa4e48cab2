"""The report in Chromium: what a reader does with mouse and keyboard, a silent console, axe-core
without findings, files that are saved, and 10,000 edges.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
from contextlib import contextmanager
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from scipy import stats

import vksteer as vs
from file_lock import file_lock
from vksteer.circuits.graph import Graph
from vksteer.patching.edge_scores import EdgeScores
from vksteer.study import report, viewer

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

SMALL, LARGE = Graph(6, 4, 2, 2), Graph(28, 24, 8, 12)
CURVE = {"edges": [10, 100], "faithfulness": [0.5, 0.875]}


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "Chromium is not installed: run tools/setup.sh test"
    with sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=path, args=["--no-sandbox"], timeout=120_000
        )
        yield opened
        opened.close()


@contextmanager
def opened(browser, path, fragment="", **options):
    """A page whose console must stay silent."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, **options)
    context.set_default_timeout(60_000)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if "http" in request.url else None)
    try:
        page.goto(f"{path.as_uri()}{fragment}")
        yield page
    finally:
        context.close()
    assert said == []


def heavy(graph, seed=0):
    """Random scores, heavy-tailed as real ones are."""
    scores = np.random.default_rng(seed).standard_normal(graph.n_edges) ** 5
    return EdgeScores(graph, scores, n_positions=1, settings={}, provenance={})


def written(folder, *scores):
    """(the path of a report whose viewer has these circuits, a b c ..., and their files)."""
    shown = []
    for name, one in zip("abcdef", scores, strict=False):
        one.save(folder / f"{name}.safetensors")
        curve = {} if shown else CURVE
        file = f"{name}.safetensors"
        shown.append(viewer.Shown(name, f"circuit {name}", one, curve, file, halves=True))
    graph = scores[0].graph
    results = {
        "model": {"architecture": "x", "n_layers": graph.n_layers, "d_model": 1, "hash": "0",
                  "n_heads": graph.n_heads, "n_kv_heads": graph.n_kv_heads},
        "settings": {"size": "tiny", "seed": 0, "data_hash": "0"}, "claims": [], "vksteer": "0",
        "steps": {"exact": {"why": "nothing"}},
    }  # fmt: skip
    data = viewer.drawn(shown, {"a3.h1": ["yes", "no"]})
    path = folder / "report.html"
    path.write_text(report.page(results, {"steps": {}}, data))
    return path


def panels(page):
    return page.eval_on_selector_all("[data-panel]", "all => all.map(p => p.dataset.panel)")


def rows_of(page, label):
    """The rows of a table as texts."""
    return page.eval_on_selector_all(
        f'[aria-label="{label}"] tbody tr',
        "all => all.map(r => [...r.cells].map(c => c.innerText))",
    )


def node(page, name):
    return page.locator(f'.node[data-name="{name}"] > :is(circle, rect)')


def violations(page):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page)
    return [(v["id"], n["html"][:120]) for v in found.response["violations"] for n in v["nodes"]]


def test_a_node_and_its_tables(browser, tmp_path):
    scores = heavy(SMALL)
    with opened(browser, written(tmp_path, scores)) as page:
        page.fill("#exactly", str(SMALL.n_edges))
        page.press("#exactly", "Tab")
        assert page.locator("path.edge").count() >= SMALL.n_edges
        node(page, "a3.h1").click()
        assert panels(page) == ["a3.h1"] and "node=a3.h1" in page.url
        assert "yes · no" in page.inner_text("[data-panel]")
        ends = ("a3.h1<q>", "a3.h0<k>", "a3.h0<v>")
        into = [e for e in SMALL.edge_names if e.split("->")[1] in ends]
        found = rows_of(page, "inputs of a3.h1")
        assert [r[0] for r in found] == sorted(into, key=lambda e: -abs(scores[e]))
        total = sum(abs(scores[e]) for e in into)
        for name, score, share, sign in found:
            assert float(score) == pytest.approx(abs(scores[name]), rel=6e-3)  # three digits
            assert float(share[:-2]) == pytest.approx(100 * abs(scores[name]) / total, abs=0.051)
            assert sign == ("negative" if scores[name] < 0 else "positive")
        out = {e for e in SMALL.edge_names if e.startswith("a3.h1->")}
        assert {r[0] for r in rows_of(page, "outputs of a3.h1")} == out
        node(page, "m4").click(modifiers=["Shift"])
        node(page, "steer").click(modifiers=["Shift"])
        assert panels(page) == ["m4", "steer", "a3.h1"]
        pair = {r[0]: r[1:] for r in rows_of(page, "neighbours of m4 and steer")}
        assert float(pair["to m5"][0]) == pytest.approx(scores["m4->m5"], rel=6e-3)
        assert float(pair["to m5"][1]) == pytest.approx(scores["steer->m5"], rel=6e-3)
        page.click('button[aria-label="Unpin m4"]')
        assert panels(page) == ["steer", "a3.h1"]
        page.click('[aria-label="inputs of a3.h1"] button.link >> nth=0')
        assert panels(page)[-1] == found[0][0].split("->")[0]


def test_filters_and_sizes(browser, tmp_path):
    scores = heavy(SMALL)
    names = SMALL.edge_names
    with opened(browser, written(tmp_path, scores)) as page:
        page.fill("#exactly", "30")
        page.press("#exactly", "Tab")
        size = len(scores.circuit(30))
        text = page.inner_text("output")
        assert text.startswith(f"{size} of {len(names)} (")
        assert text.endswith(
            "measured faithfulness 0.50 at 10, 0.88 at 100 edges, of circuits found on half of the"
            " samples"
        )
        assert page.locator("path.edge:not(.swatch path)").count() == size
        box = page.locator("#size").bounding_box()
        page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2, steps=5)
        page.mouse.up()
        page.wait_for_function(
            f"document.querySelector('output').value.startsWith('{len(names)} ')"
        )
        page.uncheck("#kind-q")
        n_q = sum(e.endswith("<q>") for e in names)
        assert page.inner_text(".viewer > .note").startswith(f"{len(names) - n_q} edges shown")
        page.select_option("#choose-layer", "4")
        page.select_option("#choose-sign", "-1")
        page.click("summary:has-text('Edges as a table')")
        kept = [
            e for e in names if scores[e] < 0 and not e.endswith("<q>") and re.search("[am]4", e)
        ]
        page.wait_for_selector('[aria-label="edges"]')
        more = page.locator('[aria-label="edges"] > button')
        while more.is_visible():
            more.click()
        shown = [r[0] for r in rows_of(page, "edges")]
        assert shown == sorted(kept, key=lambda e: -abs(scores[e]))


def test_the_keyboard(browser, tmp_path):
    with opened(browser, written(tmp_path, heavy(SMALL))) as page:
        page.focus(".stage")
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.type") == "search"
        page.keyboard.type("5.h2")
        page.keyboard.press("Enter")
        assert panels(page) == ["a5.h2"]
        page.keyboard.press("ArrowLeft")
        assert panels(page) == ["a4.h2"]
        page.keyboard.press("p")
        page.keyboard.press("ArrowDown")
        assert panels(page) == ["a4.h2", "a4.h3"]
        assert page.inner_text("[role=status]").startswith("a4.h3: inputs ")
        page.keyboard.press("Escape")
        assert panels(page) == [] and page.input_value("#find") == ""


def test_the_state_of_the_address(browser, tmp_path):
    path = written(tmp_path, heavy(SMALL), heavy(SMALL, 1))
    state = (
        "#circuit:circuit=b&with=a&n=20&kinds=v,mlp&layer=3&sign=1&where=both&node=m3&pins=steer"
    )
    with opened(browser, path, state) as page:
        assert panels(page) == ["steer", "m3"]
        values = page.eval_on_selector_all(
            ".viewer select, #exactly", "all => all.map(s => s.value)"
        )
        assert values == ["1", "0", "both", "20", "3", "1"]
        checked = page.eval_on_selector_all("fieldset :checked", "all => all.map(i => i.value)")
        assert checked == ["v", "mlp"]
        where = page.url
        note = page.inner_text(".viewer > .note")
        page.evaluate("location.hash = '#circuit:n=5'")
        page.wait_for_function("document.getElementById('exactly').value === '5'")
        assert panels(page) == [] and page.input_value("#choose-a") == "0"
        page.goto("about:blank")
        page.goto(where)
        assert page.inner_text(".viewer > .note") == note and panels(page) == ["steer", "m3"]
        page.goto("about:blank")
        page.goto(f"{path.as_uri()}#circuit:n=x&kinds=z&layer=99&node=a9.h9&with=q&pins=,,")
        assert panels(page) == [] and page.input_value("#choose-layer") == ""


def test_the_addresses_of_sections_are_left_alone(browser, tmp_path):
    with opened(browser, written(tmp_path, heavy(SMALL)), "#provenance") as page:
        page.set_viewport_size({"width": 700, "height": 800})  # the viewer is laid out anew
        page.wait_for_timeout(100)
        assert page.url.endswith("#provenance")
        page.fill("#find", "a5.h2")
        page.keyboard.press("Enter")
        assert panels(page) == ["a5.h2"] and "#circuit:" in page.url
        page.click("nav a:has-text('Provenance')")
        assert page.url.endswith("#provenance") and panels(page) == ["a5.h2"]


def test_a_link_that_is_pressed_keeps_the_keyboard(browser, tmp_path):
    with opened(browser, written(tmp_path, heavy(SMALL)), "#circuit:n=40&node=logits") as page:
        link = page.locator("[data-panel=logits] button.link").first
        link.focus()
        page.keyboard.press("Enter")
        (chosen,) = panels(page)
        assert chosen != "logits"
        where = "document.activeElement.closest('[data-panel]')?.dataset.panel"
        assert page.evaluate(where) == chosen


def test_a_wide_circuit_fits_on_paper(browser, tmp_path):
    wide = heavy(Graph(32, 4, 4, 2))
    with opened(browser, written(tmp_path, wide)) as page:
        page.emulate_media(media="print")
        page.set_viewport_size({"width": 718, "height": 1000})  # A4 inside margins of 1 cm
        sizes = page.evaluate("""() => ['.stage', '.stage-scroll'].map(
            name => document.querySelector(name).getBoundingClientRect().width)""")
        assert sizes[0] <= sizes[1] <= 718


def test_the_difference_of_two_circuits(browser, tmp_path):
    one = heavy(SMALL)
    other = EdgeScores(
        SMALL, one.edges + heavy(SMALL, 1).edges / 4, n_positions=1, settings={}, provenance={}
    )
    a, b = (s.circuit(40).edge_names for s in (one, other))
    with opened(browser, written(tmp_path, one, other), "#circuit:n=40&with=b") as page:
        text = page.inner_text("#sharing")
        assert f"only circuit a: {len(a - b)};" in text and f"only circuit b: {len(b - a)};" in text
        assert f"both: {len(a & b)};" in text and len(a & b) and len(a - b)
        assert f"over union {len(a & b) / len(a | b):.2f};" in text
        p = stats.hypergeom.sf(len(a & b) - 1, SMALL.n_edges, len(a), len(b))
        said = float(re.search(r"p = ([\d.e-]+)", text)[1])
        assert said == pytest.approx(p, rel=0.05)  # two digits
        for where, names in (("both", a & b), ("a", a - b), ("b", b - a)):
            page.select_option("#choose-where", where)
            assert page.inner_text(".viewer > .note").startswith(f"{len(names)} edges shown")
            assert page.locator(f"path.edge.{where}:not(.swatch path)").count() == len(names)


@pytest.mark.parametrize(
    "state",
    [
        "n=30",
        "n=60&kinds=q,k,logits&layer=3&sign=-1&node=a3.h1",
        "n=40&circuit=b&with=a&where=b&kinds=mlp,v,q",
    ],
)
def test_copied_python(browser, tmp_path, monkeypatch, state):
    """The code makes what the view shows."""
    path = written(tmp_path, heavy(SMALL), heavy(SMALL, 1))
    granted = ["clipboard-read", "clipboard-write"]
    with opened(browser, path, f"#circuit:{state}", permissions=granted) as page:
        page.click("summary:has-text('Edges as a table')")
        page.wait_for_selector('[aria-label="edges"]')
        more = page.locator('[aria-label="edges"] > button')
        if more.is_visible():
            more.click()
        shown = [r[0] for r in rows_of(page, "edges")]
        into = [r[0] for r in rows_of(page, "inputs of a3.h1")]
        page.click("text=Copy as Python")
        page.wait_for_function("document.querySelector('[role=status]').innerText === 'Copied.'")
        code = page.inner_text(".viewer pre")
        assert page.evaluate("navigator.clipboard.readText()").strip() == code.strip()
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert found["edges"] == shown and shown
    assert found.get("inputs", []) == into


def test_files(browser, tmp_path):
    scores = heavy(SMALL)
    with opened(browser, written(tmp_path, scores), "#circuit:n=25") as page:

        def saved(name):
            with page.expect_download() as download:
                page.click(f'button[aria-label="Save the {name}"]')
            return download.value.path().read_bytes()

        table = list(csv.DictReader(io.StringIO(saved("edges as CSV").decode())))
        assert {r["edge"] for r in table} == scores.circuit(25).edge_names
        svg = ET.fromstring(saved("circuit as SVG"))
        paths = svg.iter("{http://www.w3.org/2000/svg}path")
        edges = [p for p in paths if p.get("class", "").startswith("edge ")]
        assert len(edges) == len(table)
        png = saved("circuit as PNG")
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
        assert (width, height) == (2 * int(svg.get("width")), 2 * int(svg.get("height")))


def test_a_notebook_cell(browser, tmp_path):
    """In a frame of its own height in px, which is drawn again when the frame changes its width."""
    view = vs.study.view(heavy(SMALL), others={"second": heavy(SMALL, 1)}, height=640)
    path = tmp_path / "notebook.html"
    path.write_text(
        f'<!doctype html><html lang="en"><title>x</title><main>{view._repr_html_()}</main></html>'
    )
    with opened(browser, path) as page:
        assert page.locator("iframe").bounding_box()["height"] == 640
        frame = page.frame_locator("iframe")
        frame.locator('.node[data-name="m4"] > rect').click()
        assert frame.locator("[data-panel]").get_attribute("data-panel") == "m4"
        before = frame.locator(".stage > svg").get_attribute("viewBox")
        page.set_viewport_size({"width": 700, "height": 900})
        page.wait_for_function(
            "before => document.querySelector('iframe').contentDocument"
            ".querySelector('.stage > svg').getAttribute('viewBox') !== before",
            arg=before,
        )
        frame.locator("text=Copy as Python").click()
        frame.locator(".viewer pre:has-text('scores.circuit')").wait_for()


def saved_cells(page, texts):
    """The first column as CSV of the table of candidates, whose first cells hold these texts."""
    figure = page.locator('figure[data-name="candidates"]')
    figure.locator("details table").evaluate(
        "(table, texts) => texts.forEach((x, i) => { table.rows[i + 1].cells[0].textContent = x })",
        texts,
    )
    with page.expect_download() as download:
        figure.locator("button:text-is('CSV')").click()
    with open(download.value.path(), newline="") as file:
        return [line[0] for line in csv.reader(file)][1 : len(texts) + 1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_whole_study(browser, zoo, scheme):
    """The report of a study, wide and narrow: axe-core finds nothing, the third column of answers
    changes, a figure is saved, and paper shows the data and no controls.
    """
    folder = zoo.root.parent / "tiny_study"  # that of test_study.py
    with file_lock(folder.with_suffix(".lock")):
        vs.study.run("tiny-llama-chat", out=folder, size="tiny", progress=False)
    state = "#circuit:n=19&with=ntp&node=m9&pins=a8.h1,steer"
    with opened(browser, folder / "report.html", state, color_scheme=scheme) as page:
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        assert violations(page) == []
        page.select_option("select[data-rows]", "OV")
        there = page.eval_on_selector_all(
            "#answers [data-row]",
            "all => [...new Set(all.filter(x => !x.hidden).map(x => x.dataset.row))]",
        )
        assert there == ["OV"] and page.locator("#answers mark").count() > 20
        strips = page.locator(".strip")
        assert strips.count() == 3 and strips.first.locator("text=◆").count() > 0
        with page.expect_download() as download:
            page.click('button[aria-label="Save faithful-circuits as SVG"]')
        assert ET.parse(download.value.path()).getroot().tag.endswith("}svg")
        assert saved_cells(page, ["=HYPERLINK(1)", "+a", "-0.5", "@x", 'a,"b"']) == [
            "'=HYPERLINK(1)", "'+a", "-0.5", "'@x", 'a,"b"',
        ]  # fmt: skip
        page.set_viewport_size({"width": 400, "height": 800})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        assert violations(page) == []
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = false")
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator(".controls, nav, .save").evaluate_all(
            "all => all.every(x => getComputedStyle(x).display === 'none')"
        )
        assert page.locator("details:not([open])").count() == 0
        assert (
            page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        )
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.locator("details[open]").count() == 0


def test_ten_thousand_edges(browser, tmp_path):
    """Six circuits of 10,000 edges in 3 MB, on canvas; a frame of the slider and one of the pointer
    take the page's thread less than the 33 ms of 30 frames a second (measured, in processor time:
    see the assertions; with the machine loaded to 14 processes).
    """
    path = written(tmp_path, *(heavy(LARGE, seed) for seed in range(6)))
    assert path.stat().st_size < 3_000_000
    with opened(browser, path) as page:
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})

        def busy():
            found = session.send("Performance.getMetrics")["metrics"]
            return next(m["value"] for m in found if m["name"] == "TaskDuration")

        def frame(body):
            """Seconds of the page's thread for each of 30 frames, each with `body` of i run."""
            start = busy()
            page.evaluate(
                "async () => { for (let i = 0; i < 30; i++) {" + body + "; await new Promise("
                "requestAnimationFrame); await new Promise(requestAnimationFrame); } }"
            )
            return (busy() - start) / 30

        page.fill("#exactly", "10000")
        page.press("#exactly", "Tab")
        page.wait_for_function("document.querySelector('output').value.startsWith('10000 ')")
        assert page.locator("canvas").is_visible()
        assert page.locator("path.edge:not(.swatch path)").count() == 0
        note = page.inner_text(".viewer > .note")
        assert note.startswith("10000 edges shown") and f"{LARGE.n_edges - 10_000} weakest" in note
        slide = min(
            frame(
                "const s = document.getElementById('size'); s.value = 1000 - i % 8;"
                "s.dispatchEvent(new Event('input'))"
            )
            for _ in range(3)
        )
        hover = frame(
            "document.querySelector(`.node[data-name='a${13 + i % 10}.h${i % 24}']`)"
            ".dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
        )
        print(f"slider {1000 * slide:.1f} ms, pointer {1000 * hover:.1f} ms")
        assert slide < 1 / 30  # 23 to 26 ms without a graphics device, 5.5 ms of them script
        assert hover < 1 / 30  # 8 to 9 ms
