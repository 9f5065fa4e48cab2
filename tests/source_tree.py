"""The files of this tree, for tests that read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tracked(*patterns: str) -> list[Path]:
    """The files that git tracks or would add. Every pattern must match something, because a rule
    over no files would always hold.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = {}
    for pattern in patterns or ("*",):
        lines = subprocess.run(
            [*command, pattern], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        files = [p for line in lines if (p := ROOT / line).is_file()]
        assert files, f"no file is like {pattern}"
        found |= dict.fromkeys(files)
    return list(found)
