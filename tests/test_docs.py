"""The documentation: the site builds without a warning, its links lead somewhere, and it loads
nothing from other hosts; and each of these checks finds what it is for.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from child import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import docs_build
import docs_check
import docs_notebooks
import docs_reference


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_site(tmp_path):
    """`make docs`, and one page for every page, namespace and notebook."""
    site = tmp_path / "site"
    command = [sys.executable, ROOT / "tools/docs_build.py", site]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert docs_check.problems(site) == []
    pages = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    namespaces = json.loads((ROOT / "tests/public_names.json").read_text())
    expected = {f"reference/{name}" for name in namespaces if name.rpartition(".")[2].islower()}
    expected |= {f"notebooks/{path.stem}" for path in (ROOT / "notebooks").glob("*.ipynb")}
    expected |= {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert len(expected) > 20 and not expected - pages
    for path in (site / "notebooks").glob("*.html"):
        assert re.search(r'<img [^>]*src="\.\./_images/', path.read_text()), f"{path}: no figure"


@pytest.mark.parametrize(
    "head, body, found",
    [
        ("", '<img src="https://a.example/x.png">', "loads https://a.example/x.png"),
        ('<script src="//a.example/x.js"></script>', "", "loads //a.example/x.js"),
        ('<link rel="stylesheet" href="https://a.example/x.css">', "", "loads https://a.example"),
        ("", '<p style="background: url(https://a.example/x.png)">', "loads https://a.example"),
        ("", '<a href="none.html">none</a>', "leads to no file"),
        ("", '<a href="other.html#none">none</a>', "leads to no anchor"),
        ("", '<a href="https://a.example">one</a><a href="other.html#here">other</a>', None),
    ],
)
def test_problems_of_a_site_are_found(tmp_path, head, body, found):
    (tmp_path / "index.html").write_text(f"<html><head>{head}</head><body>{body}</body></html>")
    (tmp_path / "other.html").write_text('<html><body><p id="here">here</p></body></html>')
    problems = docs_check.problems(tmp_path)
    assert len(problems) == (found is not None) and all(found in line for line in problems)


def test_remote_addresses_in_style_sheets_are_found(tmp_path):
    (tmp_path / "index.html").write_text("<html></html>")
    (tmp_path / "a.css").write_text("@import 'https://a.example/f.css'; a { b: url(local.png) }")
    assert docs_check.problems(tmp_path) == ["a.css: loads https://a.example/f.css"]


def test_links_of_pages_become_links_of_the_site():
    text = "[a](method.md#x) [b](../CHANGELOG.md) [c](../python/vksteer) [d](https://a.example/b)"
    site = docs_build.site_links(text, ROOT / "docs/index.md", "index.md")
    assert site == (
        "[a](method.md#x) [b](CHANGELOG.md) c (`python/vksteer`) [d](https://a.example/b)"
    )
    with pytest.raises(SystemExit, match=r"none\.md"):
        docs_build.site_links("[a](none.md)", ROOT / "docs/index.md", "index.md")


def test_docstrings_become_markdown():
    text = "Adds [B, D] * `a_b`, see docs/method.md section 6.\n\nLike this::\n\n    x < y\n"
    assert docs_reference.markdown(text) == (
        "Adds \\[B, D\\] \\* `a_b`, see"
        " [docs/method.md section 6](../method.md#6-freezing-table-1).\n\n"
        "Like this:\n\n```text\nx < y\n```\n"
    )
    with pytest.raises(SystemExit, match="section 99"):
        docs_reference.markdown("See docs/method.md section 99.")


def test_outputs_become_markdown(tmp_path):
    stream = {"output_type": "stream", "name": "stdout", "text": "10 %\r\x1b[1m20 %\n"}
    noise = {"output_type": "stream", "name": "stderr", "text": "warning"}
    (one,) = docs_notebooks.joined([stream, noise, stream])
    markdown = docs_notebooks.output_markdown(one, tmp_path / "x.png")
    assert markdown == "```text\n20 %\n20 %\n```\n"
    picture = {"output_type": "display_data", "data": {"image/png": "AAAA", "text/plain": "F"}}
    assert "(x.png)" in docs_notebooks.output_markdown(picture, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes() == b"\0\0\0"
