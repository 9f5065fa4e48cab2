"""The public names are those of public_names.json: nothing that users call disappears by accident.

Which names count. A namespace that defines `__all__` is public in exactly these names. dir() of the
others also shows what they import, so of these the list holds what the documents name, what the
README, the tests and the notebooks use, and the classes of what those calls return; each of these
names has to be there. A public class that either kind of namespace offers counts with its
attributes: what dir() shows without a leading underscore, the fields of a dataclass, and what its
own methods assign to `self`; what it inherits from Python's own classes does not count. No name may
be missing and, where the rule is exact, none may be new without being listed.

    python tests/test_public_names.py write     # after adding names: bring the list up to date
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

LIST = Path(__file__).with_name("public_names.json")
UPDATE = (
    "If names were added on purpose, run `python tests/test_public_names.py write` and commit "
    "tests/public_names.json. Removing or renaming a name breaks users' code: keep the old name, "
    "or write down in docs/decisions.md why it has to go"
)


def attributes(cls: type) -> set[str]:
    """Public attributes of a class and of its instances, without making one."""
    own = [c for c in cls.__mro__ if c.__module__.partition(".")[0] == "vksteer"]
    foreign = {name for c in cls.__mro__ if c not in own for name in vars(c)}
    names = {name for name in dir(cls) if name not in foreign}
    for c in own:
        names |= set(getattr(c, "__dataclass_fields__", ())) | assigned(c)
    return {name for name in names if not name.startswith("_")}


def assigned(cls: type) -> set[str]:
    """Names that the methods of a class assign to attributes of `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "__setattr__":
            names |= {a.value for a in node.args[1:2] if isinstance(a, ast.Constant)}
    return names


def present(listed: dict[str, list[str]], namespaces) -> dict[str, list[str]]:
    """The public names of today: {namespace or class: sorted names}."""
    found = {}
    for namespace in namespaces:
        module = importlib.import_module(namespace)
        deliberate = getattr(module, "__all__", None)
        if deliberate is None:
            deliberate = [name for name in listed[namespace] if name in dir(module)]
        found[namespace] = sorted(deliberate)
        for name in deliberate:
            value = getattr(module, name)  # an entry of __all__ that is not there fails here
            if isinstance(value, type):
                found[f"{namespace}.{name}"] = sorted(attributes(value))
    return dict(sorted(found.items()))


def names_now() -> dict[str, list[str]]:
    listed = json.loads(LIST.read_text())
    return present(listed, [n for n in listed if n.rpartition(".")[2].islower()])


def test_public_names_are_those_of_the_list():
    """In a process of its own: what other tests have imported adds names to modules."""
    listed = json.loads(LIST.read_text())
    done = subprocess.run(
        [sys.executable, __file__, "print"], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr}\n{UPDATE}"
    found = json.loads(done.stdout)
    lines = []
    for owner in sorted({*listed, *found}):
        old, new = set(listed.get(owner, ())), set(found.get(owner, ()))
        lines += [f"{owner}.{name} is gone" for name in sorted(old - new)]
        lines += [f"{owner}.{name} is new and not listed" for name in sorted(new - old)]
    assert not lines, "\n".join([*lines, UPDATE])


def main(action: str) -> None:
    text = json.dumps(names_now(), indent=1) + "\n"
    if action == "write":
        LIST.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "print")
