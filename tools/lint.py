"""The limits that neither ruff nor clang-format holds: columns, function lengths, file lengths.

Reads every tracked source file below csrc, shaders, python, tests, tools, benchmarks and cmake,
and setup.py, CMakeLists.txt and Makefile. A line may have 100 columns, strings and comments
included. A function may have 60 lines, counted from its first line (of `def` in Python, of the
return type in C and GLSL) to its last. A file may have 500 lines. Prints every violation as
`path:line: what` and exits 1 if there is one.

    python tools/lint.py            all files
    python tools/lint.py FILE ...   these files only; others than sources are left out
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("csrc", "shaders", "python", "tests", "tools", "benchmarks", "cmake")
FILES = ("setup.py", "CMakeLists.txt", "Makefile")
C_LIKE = (".c", ".h", ".comp", ".glsl")
SOURCES = (*C_LIKE, ".def", ".py", ".pyi", ".sh", ".cmake")

COLUMNS = 100
FUNCTION_LINES = 60
FILE_LINES = 500

# (line, what is wrong with it)
Violation = tuple[int, str]


def sources() -> list[Path]:
    """The tracked files that are held to the limits, and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run([*command, *FOLDERS, *FILES], cwd=ROOT, capture_output=True, check=True)
    names = sorted(name for name in listed.stdout.decode().split("\0") if name)
    return [
        path
        for name in names
        if ((path := ROOT / name).suffix in SOURCES or name in FILES) and path.is_file()
    ]


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of every function, nested ones too; decorators do not count."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, node.end_lineno or node.lineno


def without_text(text: str) -> str:
    """C or GLSL with comments, literals and preprocessor lines blanked, every line kept in place.

    Only the first branch of an `#if` is kept: two branches may open the same brace, and one closes.
    """
    pattern = r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'"
    text = re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.DOTALL)
    lines = text.split("\n")
    kept: list[bool] = []  # of every #if around this line, whether its first branch is being read
    directive = False
    for i, line in enumerate(lines):
        word = re.match(r"\s*#\s*(\w+)", line)
        if word and not directive:
            if word[1] in ("if", "ifdef", "ifndef"):
                kept.append(True)
            elif word[1] in ("else", "elif") and kept:
                kept[-1] = False
            elif word[1] == "endif" and kept:
                kept.pop()
        was_directive, directive = directive, (bool(word) or directive) and line.endswith("\\")
        if word or was_directive or not all(kept):
            lines[i] = ""
    return "\n".join(lines)


def c_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """(name, first line, last line) of every function: a block at file level after `name(...)`."""
    text = without_text(text)
    depth, begin, opened = 0, 0, None
    for at, char in enumerate(text):
        if char == "{":
            if depth == 0:
                # Calls of macros, one a line and without a semicolon, are no part of the head.
                begin += len(re.match(r"(\s*\w+\([^\n]*\)[ \t]*\n)*", text[begin:at])[0])
                head = re.search(r"(\w+)\s*\([^;={}]*\)\s*$", text[begin:at])
                first = begin + len(text[begin:at]) - len(text[begin:at].lstrip())
                opened = (
                    (head[1], first)
                    if head and "=" not in text[begin : begin + head.start()]
                    else None
                )
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0 and opened:
                yield opened[0], text.count("\n", 0, opened[1]) + 1, text.count("\n", 0, at) + 1
        if depth == 0 and char in ";}":
            begin = at + 1


def violations(path: Path) -> Iterator[Violation]:
    """What a file does against the limits, in no order."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield number, f"{len(line)} columns, at most {COLUMNS}"
    if len(lines) > FILE_LINES:
        yield len(lines), f"{len(lines)} lines in the file, at most {FILE_LINES}"
    functions: Iterator[tuple[str, int, int]] = iter(())
    if path.suffix == ".py":
        functions = python_functions(text)
    elif path.suffix in C_LIKE:
        functions = c_functions(text)
    for name, first, last in functions:
        if last - first + 1 > FUNCTION_LINES:
            yield first, f"{last - first + 1} lines in {name}(), at most {FUNCTION_LINES}"


def main(arguments: list[str]) -> int:
    """Prints the violations of the named files, or of all, and returns the exit status."""
    paths = sources()
    if arguments:
        named = {Path(name).resolve() for name in arguments}
        paths = [path for path in paths if path in named]
    found = 0
    for path in paths:
        for number, what in sorted(violations(path)):
            print(f"{path.relative_to(ROOT)}:{number}: {what}")
            found += 1
    if found:
        print(f"{found} violations in {len(paths)} files", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
