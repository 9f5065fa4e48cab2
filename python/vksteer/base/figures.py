"""Matplotlib's Figure, imported here only, so that one message says what to install."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of width x height inches that belongs to no window and no notebook state.

    Raises ImportError, naming the extra to install, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'vksteer[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def tick_text(text: str) -> str:
    """A token's text for matplotlib: printable, at most 10 characters, white space shown, and
    dollar signs escaped, which would begin mathematics.
    """
    text = text.replace("\n", "\\n").replace(" ", "\u2423").replace("$", r"\$")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)[:10]
