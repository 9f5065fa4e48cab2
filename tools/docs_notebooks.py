"""The notebooks as pages: executed, and their cells and outputs written as Markdown.

An executed notebook is kept under a name that is a hash of the notebook and of the whole package
(sources, engine and models), so that a stored output is never older than what made it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def package_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / "python/vksteer").rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def executed(path: Path, kept: Path):
    """The notebook with outputs, from `kept` or executed now; one that fails raises."""
    import nbclient
    import nbformat

    key = hashlib.sha256(path.read_bytes() + package_hash().encode()).hexdigest()[:16]
    file = kept / f"{path.stem}-{key}.ipynb"
    if file.exists():
        return nbformat.read(file, as_version=4)
    notebook = nbformat.read(path, as_version=4)
    work = kept / "work"
    work.mkdir(parents=True, exist_ok=True)
    resources = {"metadata": {"path": str(work)}}
    os.environ["HF_HUB_OFFLINE"] = "1"
    print(f"executing {path.name}", flush=True)
    nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources=resources
    ).execute()
    for old in kept.glob(f"{path.stem}-*.ipynb"):
        old.unlink()
    nbformat.write(notebook, file)
    return notebook


def fence(text: str, language: str) -> str:
    ticks = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}\n"


def last_state(text: str) -> str:
    """What a terminal shows in the end: a carriage return begins the line anew."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in ANSI.sub("", text).split("\n"))
    return "\n".join(lines).strip("\n")


def joined(outputs: list) -> list:
    """The outputs of a cell without stderr, streams of stdout that follow each other as one."""
    out: list = []
    for output in outputs:
        stream = output["output_type"] == "stream"
        if stream and output["name"] == "stderr":
            continue
        if stream and out and out[-1]["output_type"] == "stream":
            out[-1] = out[-1] | {"text": out[-1]["text"] + output["text"]}
        else:
            out.append(output)
    return out


def output_markdown(output, picture: Path) -> str:
    """One output of a cell; a picture is written to `picture`."""
    if output["output_type"] == "stream":
        text = last_state(output["text"])
        return fence(text, "text") if text else ""
    data = output.get("data", {})
    if "image/png" in data:
        picture.write_bytes(base64.b64decode(data["image/png"]))
        return f"![A figure that the cell above draws]({picture.name})\n"
    if "text/markdown" in data:
        return f"{data['text/markdown']}\n"
    return fence(last_state(data.get("text/plain", "")), "text")


def page(notebook, folder: Path, stem: str) -> str:
    parts, pictures = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source + "\n")
        elif cell.cell_type == "code" and cell.source.strip():
            parts.append(fence(cell.source, "python"))
            for output in joined(cell.outputs):
                pictures += 1
                parts.append(output_markdown(output, folder / f"{stem}-{pictures}.png"))
    return "\n".join(part for part in parts if part)


def write(folder: Path, kept: Path) -> list[str]:
    """Writes a page for every notebook; their names, in order."""
    folder.mkdir(parents=True)
    kept.mkdir(parents=True, exist_ok=True)
    stems = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text = page(executed(path, kept), folder, path.stem)
        note = f"\n*This page is the executed notebook `notebooks/{path.name}`.*\n"
        head, _, rest = text.partition("\n")
        (folder / f"{path.stem}.md").write_text(f"{head}\n{note}{rest}")
        stems.append(path.stem)
    return stems
