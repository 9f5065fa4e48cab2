"""The Python package's modules: imports go downward only, and no two modules import each other,
directly or in a circle.

Imports inside functions count; those under `if TYPE_CHECKING:` do not. Nothing here
imports the package.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "python" / "vksteer"

#: The modules, bottom first: a file imports only from its own module and from those before it.
ORDER = (
    "_version",
    "base",
    "loading",
    "runtime",
    "data",
    "judge",
    "inputs",
    "circuits",
    "patching",
    "steering",
    "reliability",
    "kv",
    "scaling",
    "probes",
    "sae",
    "ov",
    "freezing",
    "sparsify",
    "study",
    "verify",
    "cli",
    "demo",
)
#: Reached from everywhere: the exceptions, and the C extension.
EVERYWHERE = {"errors", "_engine"}
#: The front door and `python -m vksteer` may import any module; nothing imports them.
FRONT = {"__init__", "__main__"}
MOST_AT_TOP = 14


def module_of(path: Path) -> str:
    """The dotted name inside the package; an `__init__` has the name of its package."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(tree: ast.AST):
    """Every import statement at any depth, except those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        else:
            yield from imports(node)


def lazy(tree: ast.Module) -> list[str]:
    """The relative modules that a package's _LAZY names, from which a public name is taken on first
    access.
    """
    return [
        ast.literal_eval(value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_LAZY"
        for value in node.value.values
    ]


def targets(path: Path, source: str, modules: set[str]) -> set[str]:
    """Modules of the package that a file imports from; `from . import x` is module x where there is
    one.
    """
    name = module_of(path)
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    found = set()
    tree = ast.parse(source)
    for value in lazy(tree):
        level = len(value) - len(value.lstrip("."))
        found.add(".".join([*package[: len(package) - level + 1], value[level:]]))
    for node in imports(tree):
        if isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("vksteer.") for a in node.names if a.name.startswith("vksteer.")
            }
            found |= {"__init__" for a in node.names if a.name == "vksteer"}
            continue
        if node.level == 0 and (node.module or "").split(".")[0] != "vksteer":
            continue
        base = package[: len(package) - node.level + 1] if node.level else []
        base = (
            [*base, *(node.module or "").split(".")]
            if node.level
            else (node.module or "").split(".")[1:]
        )
        base = [part for part in base if part]
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            found.add(whole if whole in modules else ".".join(base) or "__init__")
    return found - {name}


def graph() -> dict[str, set[str]]:
    files = sorted(PACKAGE.rglob("*.py"))
    modules = {module_of(path) for path in files} | {"_engine"}
    return {module_of(path): targets(path, path.read_text(), modules) for path in files}


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module (Tarjan), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in arrows.get(node, ()):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            component = []
            while not component or component[-1] != node:
                component.append(stack.pop())
            if len(component) > 1:
                found.append(sorted(component))

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def top(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_every_module_has_a_place_in_the_order():
    assert {top(module) for module in graph()} - EVERYWHERE - FRONT == set(ORDER)


def test_imports_go_downward():
    upward = []
    for module, found in graph().items():
        if module in FRONT:
            continue
        for other in found:
            if top(other) in EVERYWHERE or top(other) == top(module):
                continue
            if other in FRONT or ORDER.index(top(other)) > ORDER.index(top(module)):
                upward.append(f"{module} imports {other}")
    assert not upward


def test_no_circles():
    arrows = {module: found for module, found in graph().items() if module not in FRONT}
    assert not circles(arrows)


def test_few_files_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= MOST_AT_TOP


def test_no_module_bears_the_name_of_a_public_function():
    """Importing such a submodule would replace the function in its package's namespace."""
    shadowed = []
    for path in PACKAGE.rglob("__init__.py"):
        listed = {
            element.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") in ("__all__", "_LAZY")
            for element in ast.walk(node.value)
            if isinstance(element, ast.Constant) and isinstance(element.value, str)
        }
        inside = {p.stem for p in path.parent.glob("*.py")} | {
            p.parent.name for p in path.parent.glob("*/__init__.py")
        }
        if path.parent == PACKAGE:  # the public namespaces are meant to be modules
            inside -= {
                "circuits",
                "data",
                "freezing",
                "judge",
                "kv",
                "ov",
                "patching",
                "probes",
                "reliability",
                "sae",
                "scaling",
                "sparsify",
                "steering",
                "study",
            }
        shadowed += [f"{path.parent.name}/{name}.py" for name in sorted(listed & inside)]
    assert not shadowed


# -- the reader of imports -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, want",
    [
        ("from ..base import checks", {"base.checks"}),
        ("def f():\n    from ..errors import ModelError", {"errors"}),
        ("if TYPE_CHECKING:\n    from .model import Model", set()),
        ("from vksteer import device", {"__init__"}),
        ("import vksteer.base.checks", {"base.checks"}),
        ("from .. import _engine", {"_engine"}),
        ('_LAZY = {"f": "..base.checks", "g": ".model"}', {"base.checks", "runtime.model"}),
    ],
)
def test_reader_sees(source, want):
    modules = {"base.checks", "errors", "runtime.model", "_engine"}
    assert targets(PACKAGE / "runtime" / "x.py", source, modules) == want


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
