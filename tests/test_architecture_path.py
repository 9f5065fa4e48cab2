"""docs/architecture.md, "One token's way": every function on the list exists in its file, and each
calls the next. No device needed.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))
import kernels  # noqa: E402  the build's own reader of kernels.def

PAGE = ROOT / "docs" / "architecture.md"
HEADING = "## One token's way"
STEP = re.compile(r"^\d+\. `([\w.]+)` \(`([\w./]+)`\)", re.MULTILINE)


class Step(NamedTuple):
    name: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} ({self.path})"


def steps_of(page: str) -> list[Step]:
    _, _, section = page.partition(f"{HEADING}\n")
    return [Step(*m.groups()) for m in STEP.finditer(section.split("\n## ")[0])]


def python_body(source: str, name: str) -> ast.FunctionDef:
    """The function, or the method of `Class.method`."""
    body: ast.AST = ast.parse(source)
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [n for n in ast.iter_child_nodes(body) if isinstance(n, kinds) and n.name == part]
        assert found, f"no {name}"
        body = found[-1]
    assert isinstance(body, ast.FunctionDef), f"{name} is a class"
    return body


def names_of_module(source: str, path: str, other: str) -> set[str]:
    """What the file at `path` can call of the file `other` by its own name: all if it is the same
    file, else what it imports from there.
    """
    tree = ast.parse(source)
    if path == other:
        return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = Path(path).parents[node.level - 1]
            if str(folder.joinpath(*(node.module or "").split("."))) + ".py" == other:
                names |= {alias.name for alias in node.names if alias.asname is None}
    return names


def python_leads(step: Step, after: Step, read) -> bool:
    """Whether a Python function calls `after`, judged by what stands before the name too: in C, a
    method of an object called `_engine`; in Python, a function of that file, a method of `self`, of
    `Class(...)`, or of an object that bears the name of the class.
    """
    source = read(step.path)
    called = [n.func for n in ast.walk(python_body(source, step.name)) if isinstance(n, ast.Call)]
    methods = {(ast.unparse(f.value), f.attr) for f in called if isinstance(f, ast.Attribute)}
    if after.path.endswith(".c"):
        method = method_name(read(after.path), after.name)
        return any(name == method and on.split(".")[-1] == "_engine" for on, name in methods)
    owner, _, name = after.name.rpartition(".")
    known = names_of_module(source, step.path, after.path)
    if not owner:
        return name in known and any(isinstance(f, ast.Name) and f.id == name for f in called)
    own = step.path == after.path and step.name.startswith(f"{owner}.")
    object_name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", owner.lstrip("_")).lower()
    return (own and ("self", name) in methods) or (
        owner in known
        and any(
            called_name == name and (on.startswith(f"{owner}(") or on.split(".")[-1] == object_name)
            for on, called_name in methods
        )
    )


def c_body(source: str, name: str) -> str:
    """What stands between the braces of a C function, without comments and strings."""
    plain = re.sub(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', " ", source, flags=re.DOTALL)
    head = re.search(rf"^[A-Za-z_][\w \t*]*?\b{name}\([^;{{}}]*\)\s*\{{", plain, re.MULTILINE)
    assert head, f"no {name}"
    depth, at = 1, head.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(plain[at], 0)
        at += 1
    return plain[head.end() : at - 1]


def method_name(source: str, function: str) -> str:
    """The Python method under which a C function is offered."""
    found = re.search(rf'\{{"(\w+)",[^}}"]*?\b{function}\b', source)
    assert found, f"{function} is in no method table"
    return found[1]


def check_hop(step: Step, after: Step, read) -> None:
    """Asserts that `step` leads to `after`; read: path -> text."""
    source, name = read(step.path), after.name.split(".")[-1]
    if step.path.endswith(".py"):
        assert python_leads(step, after, read), f"{step} does not call {after}"
    elif step.path.endswith(".c"):
        body = c_body(source, step.name)
        # A kernel with variants is looked up by the generated function kernel_<name>().
        kernel = rf"\b(KERNEL_{name}\b|kernel_{name}\s*\()"
        pattern = kernel if after.path.endswith(".def") else rf"\b{name}\s*\("
        assert re.search(pattern, body), f"{step} does not lead to {after}"
    else:
        rows = {row.kernel: row.file for row in kernels.read(ROOT / step.path)}
        assert step.name in rows, f"no row {step}"
        assert after.path == f"shaders/{rows[step.name]}.comp", f"{step} is not compiled from it"
        assert re.search(r"^void main\(\)", read(after.path), re.MULTILINE), f"no {after}"


def read_file(path: str) -> str:
    assert (ROOT / path).is_file(), f"no file {path}"
    return (ROOT / path).read_text(encoding="utf-8")


STEPS = steps_of(PAGE.read_text(encoding="utf-8"))


def test_the_way_is_complete():
    assert STEPS[0].name == "Model.generate" and STEPS[-1].path.endswith(".comp")
    layers = ["python/vksteer/runtime", "csrc/python", "csrc/run", "csrc/ops", "shaders"]
    passed = [str(Path(s.path).parent) for s in STEPS]
    assert sorted(set(passed), key=passed.index) == layers


@pytest.mark.parametrize("i", range(len(STEPS) - 1), ids=lambda i: STEPS[i].name)
def test_each_step_leads_to_the_next(i):
    check_hop(STEPS[i], STEPS[i + 1], read_file)


MADE = {
    "a.py": (
        'class A:\n    def run(self):\n        """later()"""\n        return self._engine.go(1)\n'
        "    def other(self):\n        return self.queue.go(1)\n"
        "    def both(self):\n        self.run()\n        self.thread.other()\n"
        "def make():\n    A().run()\n    process.both()\n"
    ),
    "d.py": (
        "from .a import A, make\nfrom .e import low\n\n"
        "def start(process):\n    make()\n    low()\n    process.run()\n    A(1).both()\n"
    ),
    "e.py": "from .d import make\n\ndef start(a):\n    make()\n    a.run()\n",
    "b.c": (
        "int b_kernel(int n) {\n    return KERNEL_plain + kernel_many(n);\n}\n\n"
        "static int low(int n) {\n    if (n) {\n        return 1;\n    }\n    return 0;\n}\n\n"
        'int b_go(void) {\n    /* high() */\n    return low(1) + text("mid(");\n}\n'
        '    {"go", b_go, METH_NOARGS,\n     "go()"},\n'
    ),
}


@pytest.mark.parametrize(
    ("step", "after", "leads"),
    [
        (Step("A.run", "a.py"), Step("b_go", "b.c"), True),
        (Step("b_go", "b.c"), Step("low", "b.c"), True),
        (Step("b_go", "b.c"), Step("high", "b.c"), False),
        (Step("b_go", "b.c"), Step("mid", "b.c"), False),
        (Step("low", "b.c"), Step("low", "b.c"), False),
        (Step("A.run", "a.py"), Step("A.later", "a.py"), False),
        (Step("A.other", "a.py"), Step("b_go", "b.c"), False),  # a method of something else
        (Step("A.both", "a.py"), Step("A.run", "a.py"), True),
        (Step("A.both", "a.py"), Step("A.other", "a.py"), False),
        (Step("make", "a.py"), Step("A.run", "a.py"), True),
        (Step("make", "a.py"), Step("A.both", "a.py"), False),
        (Step("start", "d.py"), Step("make", "a.py"), True),
        (Step("start", "d.py"), Step("A.both", "a.py"), True),
        (Step("start", "d.py"), Step("A.run", "a.py"), False),
        (Step("start", "d.py"), Step("low", "a.py"), False),  # imported from elsewhere
        (Step("start", "e.py"), Step("make", "a.py"), False),
        (Step("start", "e.py"), Step("A.run", "a.py"), False),  # A is not imported
        (Step("b_kernel", "b.c"), Step("plain", "k.def"), True),
        (Step("b_kernel", "b.c"), Step("many", "k.def"), True),
        (Step("b_go", "b.c"), Step("many", "k.def"), False),
        (Step("A.gone", "a.py"), Step("b_go", "b.c"), False),
        (Step("gone", "b.c"), Step("low", "b.c"), False),
    ],
)
def test_a_broken_hop_is_found(step, after, leads):
    if leads:
        check_hop(step, after, MADE.__getitem__)
    else:
        with pytest.raises(AssertionError):
            check_hop(step, after, MADE.__getitem__)
