"""How results show themselves in a notebook: tables as HTML, without a network and without styles
of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of texts, which are escaped."""
    top = "".join(f"<th>{escape(str(name))}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def html_of_markdown(text: str) -> str:
    """The HTML of what the `to_markdown` of results give: tables, and lines between them as
    paragraphs. Everything is escaped.
    """
    parts: list[str] = []
    table: list[list[str]] = []
    for line in [*text.split("\n"), ""]:
        if line.startswith("|"):
            table.append(_cells(line))
            continue
        if table:
            parts.append(html_table(table[0], table[2:]))  # the second line is the rule
            table = []
        if line.strip():
            parts.append(f"<p>{escape(line)}</p>")
    return "".join(parts)


def _cells(line: str) -> list[str]:
    """The cells of a row; a bar after a backslash belongs to its cell."""
    inner = line.strip().strip("|").replace("\\|", "\0")
    return [cell.strip().replace("\0", "|") for cell in inner.split("|")]


class Table:
    """A result whose `to_markdown()` is what a notebook shows."""

    def to_markdown(self) -> str:
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return html_of_markdown(self.to_markdown())
