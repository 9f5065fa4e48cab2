"""The whole study of docs/method.md on one model, in one resumable call."""

from .comparing import compare
from .report import write_report
from .running import Study, run
from .steps import STEPS

__all__ = ["STEPS", "Study", "compare", "run", "write_report"]
