"""The field's words everywhere, and documents that refer only to what exists. No device needed.

docs/glossary.md lists the old words with what replaced them; that page and this file are the only
places where they may occur. Each pattern is written so that ordinary uses do not match; SAMPLES
holds both kinds.
"""

from __future__ import annotations

import json
import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXEMPT = {"docs/glossary.md", "tests/test_words.py", "LICENSE"}

#: (pattern, what to write instead). Ignoring case unless the pattern says (?-i:...).
OLD = (
    (r"\bways? back\b", "backward pass"),
    (r"(?<![a-z])twins?(?![a-z])", "reference"),
    (r"\b(some|any|no)(body| one) (\w+ )?looks?\b", "a hook, edit or tape needs it"),
    (r"\bdoes (some|any|no)body look\b", "no hook, edit or tape needs it"),
    (r"\blooks on\b|\blook on \(|\blooked[ _]at\b", "hook; needed"),
    (r"\b(legal|allowed) twice\b", "idempotent; calling it again does nothing"),
    (r"\bhas it those bits\b|\bis it worth it\b", "bit-identical, and profitable for this shape"),
    (r"\basks? no questions?\b|\bwithout questions?\b", "no bounds checks"),
    (r"\bstill to be had\b", "can still be captured"),
    (r"\bnobody here knows\b", "this layer only sees deduplicated entries"),
    (r"\bneeds a whole batch\b", "needs the batch in one chunk"),
    (r"\b(that|what) all (\w+ )?prompts (\w+ )?begin with\b", "shared prefix"),
    (r"\bfirst try is another\b", "probe in a subprocess"),
    (r"\bcannot be meant\b", "invalid argument"),
    (r"attn_mix|\b(softmax|scores), mix\b", "attention output"),
    (r"(?-i:\bTreatment\b)|\bstruct treatment\b", "freeze and ablation spec"),
    (r"(?<![\w.])_?whole\(", "require_int"),
    (r"(?-i:\bSEEN_[A-Z])|(?<![a-z])observers?(?![a-z])|\bsee\(|\{\w+, see\}", "hook"),
    (r"\bto the (last )?bit\b", "bit-identical"),
    (r"\bbits? (do|does|did) not change\b", "bit-identical"),
    (r"\bchang(e|es|ed|ing) (not a|no|a) bit\b", "bit-identical"),
    (r"\b(quiet|busy|quieter|quietest)\s+(\w+\s+)?(machines?|cores?|minutes?|moments?)\b", "idle"),
    (r"\bmachine('s)?( is| was| that is)? (busy|quiet)\b|\bmeasured quietly\b", "loaded, idle"),
    (r"\b(this|that|one|each|every|another|which|its) rooms?\b(?! for)", "module"),
    (r"\brooms\b(?! for)|\ba room\b(?! for)|(?-i:\bROOMS\b)", "modules"),
    (r"\bhouse\b", "architecture"),
    (r"\(wanted\b|\bwanted:? \d|\| wanted \|", "target"),
)

#: In benchmarks/ every wanted or asked figure is a target.
MEASURED = ((r"\bwanted\b|\b(was|were|is|what) asked\b|\basked of\b", "target"),)

#: 0.76x, not .76 x: a leading zero, and no space before the x of a ratio.
NUMBERS = (
    (r"(?<![\w.\])}\"'`/\\*%:])\.\d+\b", "a leading zero"),
    (r"\b\d+\.\d+ x\b(?! *\d)", "0.76x"),
    (r"(?<![\w.])\d+ x(?=\s*(?:[|,;)]|\.\s|$))", "2x"),
)

#: What speaks of how the work was organised, or of pages that a reader cannot open.
WORKPLACE = (
    (r"\bissue #?\d|\bissues #?\d+(,| and)", "nothing: say what, not where it was planned"),
    (r"\b(this|last|next|first|second|third|fourth|fifth|previous|work) session\b", "nothing"),
    (r"\bend of the session\b|(?<!\")\bsessions\b", "nothing"),
    (r"\bshared (notes?|pages?)\b|\bdesign page\b|\(design[:)]", "a page under docs/"),
    (r"\(accepted\)|\bstatus:? accepted\b|\baccepted (issue|work)\b", "nothing"),
    (r"(?<![\w.])/work/", "a path of this tree"),
)

SAMPLES = {
    "the way back reads it": True,
    "a way to go back": False,
    "twin_linear(memory)": True,
    "between two lines": False,
    "where nobody looks": True,
    "nobody would answer": False,
    "Freed; legal twice.": True,
    "whole(steps, 'steps', 1)": True,
    "write_whole(path, data)": False,
    "the whole (pruned) graph": False,
    "equal to the last bit": True,
    "the lowest bit of a word": False,
    "No Vulkan type leaves this room.": True,
    "prompts that leave no room": False,
    "a plot has room for two axes": False,
    "rooms[i].name": True,
    "house rules": True,
    "lighthouse": False,
    "at .76 x": True,
    "f'{x:.2f} and {y: .3g}'": False,
    "2.13.0": False,
    "a ratio of 0.76x": False,
    "2.8 x |": True,
    "tiles of 16 x 4": False,
    "issue 6, left": True,
    "an issue with the file": False,
    "decoding issues 275 dispatches": False,
    "in the third session": True,
    '@pytest.fixture(scope="session")': False,
    "onnxruntime.InferenceSession": False,
    "tests/test_work/x": False,
    "on a busy machine": True,
    "a busy road": False,
    "attn_mix_bwd": True,
    "see head_inputs_params": False,
}


def tracked() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [p for line in sorted(set(listed.stdout.splitlines())) if (p := ROOT / line).is_file()]


def lines(path: Path) -> list[tuple[str, str]]:
    """(place, line) of a text file; of a notebook, of its cells' sources. Data has none."""
    if path.suffix == ".json" or (path.name == "report.html" and "results" in path.parts):
        return []  # data: prompts, tokenizers, stored results and reports
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return []
    name = path.relative_to(ROOT).as_posix()
    if path.suffix != ".ipynb":
        return [(f"{name}:{i}", line) for i, line in enumerate(text.splitlines(), 1)]
    cells = enumerate(json.loads(text)["cells"], 1)
    sources = [(i, "".join(cell["source"]).splitlines()) for i, cell in cells]
    return [
        (f"{name}:cell {i}, line {j}", line)
        for i, source in sources
        for j, line in enumerate(source, 1)
    ]


def hits(patterns, name: str, placed: list[tuple[str, str]]) -> list[str]:
    """One line for each match: place, what was found, what to write.

    A comment may break a phrase, so two lines are read together; a match counts where it begins.
    Numbers are read line by line.
    """
    found = []
    apart = patterns is NUMBERS
    joined = ["" if apart else re.sub(r"^[\s*/#>|-]+", "", line) for _, line in placed]
    pairs = list(zip(placed, [*joined[1:], ""], strict=True)) if placed else []
    text, unjoined = " ".join(joined), "\n".join(line for _, line in placed)
    for pattern, instead in patterns:
        expression = re.compile(pattern, re.IGNORECASE | re.MULTILINE)
        if match := expression.search(name):
            found.append(f"{name}: in the file's name, {match[0]!r} -> {instead}")
        if not expression.search(text) and not expression.search(unjoined):
            continue
        for (place, line), after in pairs:
            for match in expression.finditer(f"{line} {after}" if after else line):
                if match.start() < len(line):
                    found.append(f"{place}: {match[0]!r} -> {instead}")
    return found


def test_patterns_match_what_they_should():
    every = (*OLD, *NUMBERS, *WORKPLACE)
    for sample, wrong in SAMPLES.items():
        found = hits(every, "", [("sample", sample)])
        assert bool(found) == wrong, (sample, found)


@pytest.mark.parametrize("kind", ["old words", "numbers", "workplace", "measured"])
def test_words(kind):
    patterns = {"old words": OLD, "numbers": NUMBERS, "workplace": WORKPLACE, "measured": MEASURED}
    found = []
    for path in tracked():
        name = path.relative_to(ROOT).as_posix()
        if name in EXEMPT or (kind == "measured" and not name.startswith("benchmarks/")):
            continue
        shown = name if kind == "old words" else ""
        found += hits(patterns[kind], shown, lines(path))
    assert not found, f"{len(found)} places:\n" + "\n".join(found)


# --- documents refer to what exists ---------------------------------------------------------------

#: First parts of a path that is meant to be in this tree.
TOP = ("csrc", "shaders", "python", "tests", "docs", "tools", "benchmarks", "cmake", "notebooks")
FILE = re.compile(r"[\w.\-]+\.(?:md|py|c|h|comp|glsl|def|sh|ipynb|cff|toml)")


def documents() -> list[Path]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return [p for p in pages if p.is_file()]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MkDocs make it."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))


def anchors(path: Path) -> set[str]:
    return {slug(m[1]) for m in re.finditer(r"^#+ +(.+)$", path.read_text(), re.MULTILINE)}


def test_links_lead_somewhere():
    broken = []
    for path in documents():
        name = path.relative_to(ROOT)
        text = re.sub(
            r"```.*?```", lambda m: "\n" * m[0].count("\n"), path.read_text(), flags=re.DOTALL
        )
        for match in re.finditer(r"\]\(([^)\s]+)\)", text):
            target, _, anchor = match[1].partition("#")
            if "://" in target:
                continue
            there = (path.parent / target).resolve() if target else path
            place = f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
            if not there.exists():
                broken.append(f"{place}: {match[1]} does not exist")
            elif anchor and anchor not in anchors(there):
                broken.append(f"{place}: {match[1]} has no such heading")
    assert not broken, "\n".join(broken)


def paths_in(text: str) -> list[tuple[int, str]]:
    """(line, path) of every path of this tree that stands between backticks or in a command."""
    found = []
    for i, line in enumerate(text.splitlines(), 1):
        for code in re.findall(r"`([^`]+)`", line):
            for piece in re.split(r"[\s,;()=\"']+", code):
                word = re.sub(r"^vksteer/(?=.*\.py)", "python/vksteer/", piece.rstrip(".:"))
                word = re.sub(r"<\w+>", "*", re.sub(r":\d+$", "", word))
                if (word.split("/")[0] in TOP and "/" in word) or FILE.fullmatch(word):
                    found.append((i, word))
    return found


def test_paths_exist():
    names = [p.relative_to(ROOT).as_posix() for p in tracked()]
    folders = {parent.as_posix() for name in names for parent in Path(name).parents}
    bare = {Path(name).name for name in names}
    missing = []
    for path in documents():
        for line, named in paths_in(path.read_text()):
            word = named.rstrip("/")
            whole_path = word in names or word in folders or any(fnmatch(n, word) for n in names)
            if not whole_path and ("/" in word or word not in bare):
                missing.append(f"{path.relative_to(ROOT)}:{line}: {word}")
    assert not missing, "\n".join(missing)
