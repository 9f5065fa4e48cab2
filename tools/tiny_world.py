"""The village world (`vksteer.data.world`), loaded by path: training needs no built engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "village", Path(__file__).resolve().parents[1] / "python/vksteer/data/world.py"
)
world = importlib.util.module_from_spec(_spec)
sys.modules["village"] = world  # dataclasses look their module up by name
_spec.loader.exec_module(world)
