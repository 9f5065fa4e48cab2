"""The whole study of docs/method.md on one model, in one resumable call."""

from .comparing import compare
from .report import write_report
from .running import Study, run
from .steps import STEPS
from .viewer import CircuitView, view

__all__ = ["STEPS", "CircuitView", "Study", "compare", "run", "view", "write_report"]
