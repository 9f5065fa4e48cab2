"""The extension's type stub names what the extension has, and nothing else."""

import ast
from pathlib import Path

from vksteer import _engine

STUB = Path(_engine.__file__).parent / "_engine.pyi"


def public(names):
    return {n for n in names if not n.startswith("_")}


def test_the_stub_and_the_module_agree():
    tree = ast.parse(STUB.read_text())
    functions = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    constants = {n.target.id for n in tree.body if isinstance(n, ast.AnnAssign)}
    assert functions | set(classes) | constants == public(dir(_engine))
    for name, node in classes.items():
        members = {m.name for m in node.body if isinstance(m, ast.FunctionDef)} | {
            m.target.id for m in node.body if isinstance(m, ast.AnnAssign)
        }
        assert public(members) == public(vars(getattr(_engine, name))), name
