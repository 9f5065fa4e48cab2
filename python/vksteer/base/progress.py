"""Progress of long work: True shows a bar, False shows nothing, a callable gets (done, total)."""

from __future__ import annotations

import sys
from typing import Any, Self

from .types import ProgressLike


class Progress:
    """A context manager; `step(n)` says that n more of `total` units are done.

    progress: True, False or callable(done, total). Raises ValueError for anything else.
    """

    def __init__(self, progress: ProgressLike, total: int, label: str = "") -> None:
        if not isinstance(progress, bool) and not callable(progress):
            raise ValueError(
                f"progress must be True, False or a function of (done, total), not {progress!r}"
            )
        self.total, self.done, self.label = total, 0, label
        self._call = progress if callable(progress) else None
        self._bar: Any = None
        self._show = progress is True

    def __enter__(self) -> Self:
        if self._show:
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total,
                desc=self.label or None,
                leave=False,
                file=sys.stderr,
                dynamic_ncols=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def step(self, n: int = 1) -> None:
        """Adds n to the units that are done and reports them."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        if self._call is not None:
            self._call(self.done, self.total)

    def say(self, text: str) -> None:
        """A line beside the bar, only where one is shown."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
