"""Builds the documentation as a static site: `make docs`.

    docs_build.py [FOLDER]     (default: build/docs/site)

Pages: docs/, CONTRIBUTING.md and CHANGELOG.md, the docstrings of the public names, the tables of
sites and model families, and the notebooks, executed. All are gathered as Markdown in
build/docs/source and built by Sphinx, where a warning is an error; then tools/docs_check.py follows
every link of the result. The site loads nothing from other hosts and can be read from the disk.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import docs_check
import docs_notebooks
import docs_reference

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build/docs"
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")

#: Sections of the navigation: caption -> pages of docs/ and of the top level.
SECTIONS = {
    "Using vksteer": [
        "setup",
        "api",
        "method",
        "reliability",
        "views",
        "cache-steering",
        "target-atoms",
        "activation-scaling",
        "token-weights",
        "prompt-sets",
        "study",
        "scale",
        "glossary",
        "devices",
        "environment",
    ],
    "Developing vksteer": ["CONTRIBUTING", "architecture", "decisions", "roadmap", "CHANGELOG"],
    "Measurements": ["performance", "benchmarks"],
}
TOP_LEVEL = ("CONTRIBUTING.md", "CHANGELOG.md")

CSS = """
table.docutils { font-size: 0.85em; }
.table-wrapper { overflow-x: auto; }
.highlight pre { font-size: 0.9em; }
/* Outputs of the notebooks: lines that are long wrap, and a bar sets them off from the code. */
.highlight-text pre { white-space: pre-wrap; }
.highlight-text { border-left: 3px solid var(--color-brand-primary); }
"""


def site_links(text: str, page: Path, site_page: str) -> str:
    """Links of a page of the tree as links of the site.

    page: where the text lies in the tree; site_page: its path in the site. A file of the tree that
    is no page of the site is named instead. Raises SystemExit for a file that does not exist.
    """
    depth = site_page.count("/")

    def replace(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = (page.parent / target).resolve()
        if not path.exists():
            sys.exit(f"{page.relative_to(ROOT)}: link to {target}, which does not exist")
        inside = path.relative_to(ROOT)
        if inside.name in TOP_LEVEL and inside.parent == Path():
            return f"]({'../' * depth}{inside.name}{anchor})"
        if inside.parts[0] == "docs" and path.is_file():
            return f"]({'../' * depth}{inside.relative_to('docs').as_posix()}{anchor})"
        if inside.parts[0] == "notebooks" and inside.suffix == ".ipynb":
            return f"]({'../' * depth}notebooks/{inside.stem}.md{anchor})"
        return f"](TREE:{inside.as_posix()})"

    text = LINK.sub(replace, text)
    return re.sub(r"\[([^\]]*)\]\(TREE:([^)]*)\)", r"\1 (`\2`)", text)


def copy_pages(source: Path) -> list[str]:
    """docs/ and the pages of the top level into `source`; the results' pages, without ".md"."""
    pages = {
        path.relative_to(ROOT / "docs").as_posix(): path for path in (ROOT / "docs").rglob("*")
    }
    pages |= {name: ROOT / name for name in TOP_LEVEL if (ROOT / name).exists()}
    for name, path in pages.items():
        if path.is_dir() or "__pycache__" in name:
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            (source / name).write_text(site_links(path.read_text(), path, name))
        else:
            shutil.copy(path, source / name)
    return sorted(name[:-3] for name in pages if name.startswith("results/") and name[-3:] == ".md")


def toctree(caption: str, pages: list[str]) -> str:
    lines = "\n".join(pages)
    return f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n:maxdepth: 2\n\n{lines}\n```\n"


def gather(source: Path) -> None:
    """Everything that Sphinx reads, into an empty folder."""
    shutil.rmtree(source, ignore_errors=True)
    (source / "_static").mkdir(parents=True)
    (source / "_static/tables.css").write_text(CSS)
    results = copy_pages(source)
    reference = docs_reference.write(source / "reference")
    notebooks = docs_notebooks.write(source / "notebooks", BUILD / "executed")
    sections = {
        caption: [page for page in pages if (source / f"{page}.md").exists()]
        for caption, pages in SECTIONS.items()
    }
    sections["Measurements"] += results
    sections = {
        "Using vksteer": sections.pop("Using vksteer"),
        "Reference": [f"reference/{page}" for page in reference],
        "Notebooks": [f"notebooks/{page}" for page in notebooks],
        **sections,
    }
    with open(source / "index.md", "a") as index:
        index.writelines(toctree(caption, pages) for caption, pages in sections.items())


def main(site: Path) -> None:
    source = BUILD / "source"
    gather(source)
    shutil.rmtree(site, ignore_errors=True)
    options = ["-q", "-W", "--keep-going", "-E", "-d", BUILD / "doctrees", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, source, site]
    if subprocess.run(command, check=False).returncode:
        sys.exit("the documentation has warnings (above)")
    problems = docs_check.problems(site)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{site}/index.html: {sum(1 for _ in site.rglob('*.html'))} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else BUILD / "site")
