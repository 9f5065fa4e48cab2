"""How long work takes on an idle machine, measured while other programs share it."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Self


class IdleClock:
    """Times the work inside a `with`. software: whether the device computes on the processor.

    processor: processor seconds of this process. seconds: on a software device what the work would
    take on an idle machine, the processor time of the calling thread plus that of all others
    divided by the cores; other programs' load does not count. On other devices, and where the
    system keeps no processor time of threads, the time that passed.
    """

    seconds = 0.0
    processor = 0.0

    def __init__(self, software: bool) -> None:
        self.software = software

    def __enter__(self) -> Self:
        self._begin = time.perf_counter(), time.process_time(), time.thread_time()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        passed, process, thread = (
            now - then
            for now, then in zip(
                (time.perf_counter(), time.process_time(), time.thread_time()),
                self._begin,
                strict=True,
            )
        )
        self.processor = process
        self.seconds = passed
        if self.software:
            self.seconds = thread + (process - thread) / n_cores()


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
