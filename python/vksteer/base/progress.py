"""One progress report for all long work: True shows a bar, False nothing, a
callable gets (done, total).
"""

from __future__ import annotations

import sys


class Progress:
    """A context manager; `step(n)` says that n more of `total` units are done.

    progress: True, False or callable(done, total). Raises ValueError for anything else.
    """

    def __init__(self, progress, total: int, label: str = ""):
        if not isinstance(progress, bool) and not callable(progress):
            raise ValueError(
                f"progress must be True, False or a function of (done, total), not {progress!r}"
            )
        self.total, self.done, self.label = total, 0, label
        self._call = progress if callable(progress) else None
        self._bar, self._show = None, progress is True

    def __enter__(self):
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

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()

    def step(self, n: int = 1) -> None:
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        if self._call is not None:
            self._call(self.done, self.total)

    def say(self, text: str) -> None:
        """A line beside the bar, only where one is shown."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
