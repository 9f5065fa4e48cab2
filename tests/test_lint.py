"""tools/lint.py: where it sees functions begin and end, and what it reports. No device needed."""

from __future__ import annotations

import re
import sys

import pytest

from source_tree import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import lint

C = r"""
#include "a.h"
#define BOTH(x) \
    do {        \
    } while (x)

/* int in_a_comment(void) { */
EACH(ROW)
ROW(a, b)

static const char *text = "int in_a_string(void) {";
static const int table[] = {1, 2, call(3)};

struct pair {
    int a, b;
};

int one(int a) {
    if (a == '{') {
        return 1;
    }
    return 0; // }
}

EACH(ROW)
#undef ROW

static struct pair *
two(const struct pair *p,
    int n) {
    struct pair q = {.a = n};
    return p;
}

#ifdef WIDE
int three(int a, int b) {
#else
int three(int a) {
#endif
    return a;
}
"""

GLSL = """
layout(push_constant, scalar) uniform Params { norm_params p; };
shared float sums[WG];

float total(float v) {
    [[unroll]] for (uint i = 0; i < 4; i++) {
        v += 1.0;
    }
    return v;
}

void main() {
    total(1.0);
}
"""

PYTHON = '''
@decorated(
    1,
)
def outer():
    """def in_text():"""
    async def inner():
        pass
    return inner


class A:
    def method(self): ...
'''


def spans(found, text):
    """{name: (its first line, its last line)}, both as text."""
    lines = text.splitlines()
    return {name: (lines[a - 1].strip(), lines[b - 1].strip()) for name, a, b in found}


def test_functions_of_c():
    assert spans(lint.c_functions(C), C) == {
        "one": ("int one(int a) {", "}"),
        "two": ("static struct pair *", "}"),
        "three": ("int three(int a, int b) {", "}"),
    }
    lengths = {name: last - first + 1 for name, first, last in lint.c_functions(C)}
    assert lengths == {"one": 6, "two": 6, "three": 6}


def test_functions_of_glsl():
    lengths = {name: last - first + 1 for name, first, last in lint.c_functions(GLSL)}
    assert lengths == {"total": 6, "main": 3}


def test_functions_of_python():
    assert spans(lint.python_functions(PYTHON), PYTHON) == {
        "outer": ("def outer():", "return inner"),
        "inner": ("async def inner():", "pass"),
        "method": ("def method(self): ...",) * 2,
    }


def long_c(lines):
    return "int f(void) {\n" + "    g();\n" * (lines - 2) + "}\n"


def long_python(lines):
    return "def f():\n" + "    g()\n" * (lines - 1)


@pytest.mark.parametrize(
    ("name", "text", "reported"),
    [
        ("a.c", long_c(60), []),
        ("a.c", long_c(61), [(1, "61 lines in f(), at most 60")]),
        ("a.comp", "\n" + long_c(61), [(2, "61 lines in f(), at most 60")]),
        ("a.py", long_python(60), []),
        ("a.py", long_python(61), [(1, "61 lines in f(), at most 60")]),
        ("a.c", "// " + "x" * 97 + "\n", []),
        ("a.c", "\n// " + "x" * 98 + "\n", [(2, "101 columns, at most 100")]),
        ("a.py", "x = 1\n" * 500, []),
        ("a.py", "x = 1\n" * 501, [(501, "501 lines in the file, at most 500")]),
        ("Makefile", "x" * 101, [(1, "101 columns, at most 100")]),
    ],
)
def test_what_is_reported(tmp_path, name, text, reported):
    (tmp_path / name).write_text(text)
    assert list(lint.violations(tmp_path / name)) == reported


def test_every_function_of_the_tree_is_seen():
    """Each definition that clang-format leaves at the first column, by a search that counts no
    braces.
    """
    head = re.compile(r"^[A-Za-z_][\w \t*]*?\b(\w+)\([^;{}()]*\)\s*\{$", re.MULTILINE)
    seen = 0
    for path in lint.sources():
        if path.suffix in lint.C_LIKE:
            text = lint.without_text(path.read_text(encoding="utf-8"))
            expected = {m[1] for m in head.finditer(text)}
            found = {name for name, _, _ in lint.c_functions(text)}
            assert expected <= found, path
            seen += len(expected)
    assert seen > 500


def test_pre_commit_passes_every_file_that_lint_reads():
    """Its pattern chooses which changed files reach the hook."""
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    (pattern,) = re.findall(r"entry: \.venv/bin/python tools/lint\.py\n +files: (\S+)", config)
    missed = [p for p in lint.sources() if not re.search(pattern, str(p.relative_to(ROOT)))]
    assert not missed


def test_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    paths = [tmp_path / "a.c", tmp_path / "b.c"]
    paths[0].write_text(long_c(60))
    paths[1].write_text(long_c(61))
    monkeypatch.setattr(lint, "sources", lambda: paths)
    assert lint.main([str(paths[0])]) == 0 and not capsys.readouterr().out
    assert lint.main([]) == 1
    assert capsys.readouterr().out == "b.c:1: 61 lines in f(), at most 60\n"
