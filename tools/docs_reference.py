"""Pages of the public names, from their docstrings, and of the tables of sites and families.

A docstring is plain text: paragraphs, `code`, lists, and indented blocks after a line that ends
with "::". References such as "docs/method.md section 6" become links; one to a page or section that
does not exist stops the build.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PUBLIC = ROOT / "tests/public_names.json"
CODE = re.compile(r"``([^`]+)``|`([^`]+)`")
PAGE = re.compile(r"(?:docs/)?\b(\w+)\.md(?: sections? (\d+))?")
PLACEHOLDER = re.compile("\x00(\\d+)\x00")


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def sections(page: str) -> dict[str, str]:
    """Number -> anchor of the numbered headings of a page of docs/."""
    text = (ROOT / f"docs/{page}.md").read_text()
    headings = re.findall(r"^#+ ((\d+)\. .*)$", text, re.M)
    return {number: slug(heading) for heading, number in headings}


def page_link(match: re.Match) -> str:
    page, section = match[1], match[2]
    if not (ROOT / f"docs/{page}.md").exists():
        return match[0]
    anchor = ""
    if section:
        if section not in sections(page):
            sys.exit(f"a docstring names {match[0]!r}, a section that does not exist")
        anchor = f"#{sections(page)[section]}"
    return f"[{match[0]}](../{page}.md{anchor})"


def inline(text: str) -> str:
    """A line of a docstring as Markdown: code stays, references are linked, the rest is literal."""
    kept: list[str] = []

    def keep(markdown: str) -> str:
        kept.append(markdown)
        return f"\x00{len(kept) - 1}\x00"

    text = CODE.sub(lambda m: keep(f"`{m[1] or m[2]}`"), text)
    text = PAGE.sub(lambda m: keep(page_link(m)), text)
    text = re.sub(r"([\\*_<>\[\]{}|#~$^`])", r"\\\1", text)
    return PLACEHOLDER.sub(lambda m: kept[int(m[1])], text)


def markdown(docstring: str) -> str:
    out: list[str] = []
    code = False
    for line in inspect.cleandoc(docstring).split("\n"):
        indented = line.startswith("    ")
        if code and line.strip() and not indented:
            out += ["```", ""]
            code = False
        if indented and not code and not (out and out[-1].strip()):  # after an empty line
            text = next((i for i in reversed(range(len(out))) if out[i].strip()), None)
            if text is not None:
                out[text] = out[text].removesuffix(":") if out[text].endswith("::") else out[text]
            out.append("```text")
            code = True
        out.append(line[4:] if code else inline(line.strip()))
    return "\n".join([*out, *(["```"] if code else [])]).strip() + "\n"


class Annotation:
    """An annotation that is written as it stands in the source, without quotes."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(name: str, function) -> str:
    """`name(parameters) -> returned`, one parameter a line where it is long; without `self`."""
    try:
        of = inspect.signature(function)
    except (TypeError, ValueError):
        return name
    plain = lambda a: Annotation(a) if isinstance(a, str) else a
    parameters = [p.replace(annotation=plain(p.annotation)) for p in of.parameters.values()]
    parameters = [p for i, p in enumerate(parameters) if not (i == 0 and p.name in ("self", "cls"))]
    returns = of.empty if inspect.isclass(function) else plain(of.return_annotation)
    of = of.replace(parameters=parameters, return_annotation=returns)
    text = f"{name}{of}"
    if len(text) <= 72:
        return text
    returned = text[text.rindex(" -> ") :] if of.return_annotation is not of.empty else ""
    lines, kind = [], None
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and kind not in (p.KEYWORD_ONLY, p.VAR_POSITIONAL):
            lines.append("    *,")
        lines.append(f"    {p},")
        kind = p.kind
    return "\n".join([f"{name}(", *lines, f"){returned}"])


def own_docstring(obj) -> str:
    """What is written in the source; dataclasses and exceptions give themselves one otherwise."""
    text = inspect.getdoc(obj) if not inspect.isclass(obj) else obj.__dict__.get("__doc__")
    generated = inspect.isclass(obj) and dataclasses.is_dataclass(obj)
    return "" if not text or (generated and text.startswith(f"{obj.__name__}(")) else text


def callable_text(level: int, name: str, obj) -> str:
    function = obj.__func__ if isinstance(obj, (classmethod, staticmethod)) else obj
    head = f"{'#' * level} {name}\n\n```python\n{signature(name, function)}\n```\n"
    return f"{head}\n{markdown(own_docstring(function) or '')}\n"


def member(cls: type, name: str):
    """The attribute as its class holds it: a property, a class method or a function; else None."""
    return next((vars(c)[name] for c in cls.__mro__ if name in vars(c)), None)


def field_line(cls: type, name: str) -> str:
    found, annotation = member(cls, name), None
    for c in cls.__mro__:
        annotation = annotation or vars(c).get("__annotations__", {}).get(name)
    text = ""
    if isinstance(found, property) or hasattr(found, "func"):  # or functools.cached_property
        function = getattr(found, "fget", None) or found.func
        annotation = function.__annotations__.get("return")
        text = " ".join((inspect.getdoc(function) or "").split())
    if isinstance(annotation, type):
        annotation = annotation.__name__
    kind = f" (`{annotation}`)" if annotation else ""
    return f"- `{name}`{kind}{': ' if text else ''}{inline(text)}\n"


def class_text(name: str, cls: type, names: list[str]) -> str:
    head = f"## {name}\n\n"
    if not issubclass(cls, BaseException):
        head += f"```python\nclass {signature(name, cls)}\n```\n\n"
    parts = [head, markdown(own_docstring(cls)), "\n"]
    methods = {}
    fields = []
    for attribute in names:
        found = member(cls, attribute)
        if inspect.isfunction(found) or isinstance(found, (classmethod, staticmethod)):
            methods[attribute] = found
        else:
            fields.append(field_line(cls, attribute))
    parts += [*fields, "\n"]
    parts += [callable_text(3, f"{name}.{attribute}", m) for attribute, m in methods.items()]
    return "".join(parts)


def namespace_text(namespace: str, listed: dict[str, list[str]]) -> str:
    module = importlib.import_module(namespace)
    short = namespace.replace("vksteer", "vs", 1)
    parts = [f"# {namespace}\n\n", markdown(module.__doc__ or ""), "\n"]
    for name in sorted(listed[namespace], key=lambda n: (not n[0].isupper(), n.lower())):
        obj = getattr(module, name)
        if inspect.ismodule(obj):
            link = f"{obj.__name__}.md" if obj.__name__ in listed else None
            doc = inline((obj.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "))
            title = f"[{name}]({link})" if link else f"`{name}`"
            parts.append(f"## {name}\n\nModule {title}: {doc}\n\n")
        elif inspect.isclass(obj):
            parts.append(class_text(f"{short}.{name}", obj, listed.get(f"{namespace}.{name}", [])))
        elif callable(obj):
            parts.append(callable_text(2, f"{short}.{name}", obj))
        else:
            parts.append(f"## {short}.{name}\n\n```python\n{short}.{name} = {obj!r}\n```\n\n")
    return "".join(parts)


def sites_text() -> str:
    """The table of sites, with the shapes that a bundled model gives them."""
    import vksteer

    rows = re.findall(
        r'^SITE\((\w+), "([^"]+)", (\w+)\)', (ROOT / "csrc/run/sites.def").read_text(), re.M
    )
    shapes: dict[str, str] = {}
    for name in ("tiny-llama-chat", "tiny-gemma-chat"):
        with vksteer.Model.from_pretrained(name, progress=False) as model:
            shapes = model.sites | shapes
    lines = [
        "# Sites\n",
        "Places of the forward pass that can be captured and edited, in the order of the pass.",
        "Names and shapes are those of TransformerLens; `{l}` is the layer. `ln1_post` and",
        "`ln2_post` exist in models that normalise the outputs of attention and MLP (Gemma).\n",
        "| site | axes |",
        "|---|---|",
    ]
    for _, site, kind in rows:
        lines.append(f"| `{site}` | {shapes.get(site.format(l=0), kind)} |")
    return "\n".join(lines) + "\n"


def families_text() -> str:
    from vksteer.loading import families

    return (
        "# Model families\n\nThe architecture is read from the file. A configuration key that"
        " would change the numbers and is not\nunderstood is refused by name.\n\n"
        f"{families.markdown()}\n"
    )


def write(folder: Path) -> list[str]:
    """Writes the pages; their names, in order."""
    folder.mkdir(parents=True)
    listed = json.loads(PUBLIC.read_text())
    pages = {}
    for name in listed:
        if inspect.ismodule(sys.modules.get(name)) or name.rpartition(".")[2].islower():
            pages[name] = namespace_text(name, listed)
    pages |= {"sites": sites_text(), "families": families_text()}
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text)
    return list(pages)
