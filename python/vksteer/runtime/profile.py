"""Profiles: what every kernel of a model's calls costs, by the device's own clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Self

if TYPE_CHECKING:
    from .model import Model


class KernelCost(NamedTuple):
    """What one kernel cost. seconds: device time, NaN on a device without timestamps. A kernel's
    bytes are those of every array that a dispatch reads or writes, counted once however often its
    workgroups read it again; flops are estimates from the shapes.
    """

    kernel: str
    calls: int
    seconds: float
    bytes_read: float
    bytes_written: float
    flops: float

    @property
    def bytes_per_second(self) -> float:
        return _rate(self.bytes_read + self.bytes_written, self.seconds)

    @property
    def flops_per_second(self) -> float:
        return _rate(self.flops, self.seconds)

    def minus(self, other: KernelCost) -> KernelCost:
        """The same kernel's cost after `other` was read."""
        return KernelCost(
            self.kernel,
            self.calls - other.calls,
            self.seconds - other.seconds,
            self.bytes_read - other.bytes_read,
            self.bytes_written - other.bytes_written,
            self.flops - other.flops,
        )


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else math.nan


class _Reading(NamedTuple):
    kernels: dict[str, KernelCost]
    dispatches: int
    barriers: int
    submissions: int
    host_seconds: float

    def minus(self, other: _Reading) -> _Reading:
        none = KernelCost("", 0, 0.0, 0.0, 0.0, 0.0)
        spent = {k: c.minus(other.kernels.get(k, none)) for k, c in self.kernels.items()}
        return _Reading(
            {k: c for k, c in spent.items() if c.calls},
            self.dispatches - other.dispatches,
            self.barriers - other.barriers,
            self.submissions - other.submissions,
            self.host_seconds - other.host_seconds,
        )


class Profile:
    """What a model's calls cost: `with model.profile() as p: model.run(...)`.

    Figures are those of all calls on this model between the begin and the end of the block, also
    of other threads; inside the block they can be read, too, which waits for the device. Results
    keep their bits. Profiles may be nested. A timestamp follows every command while one runs, so
    that the device's time is a little longer than without; commands that run side by side share
    the time that they take together, so that the rows add up to the device's time.

    Attributes: dispatches, barriers and submissions (counts); bytes_read, bytes_written and flops
    (sums over kernels, see `KernelCost`); seconds (on the device); host_seconds (the calls'
    recording and submitting: their time without their waits for the device and without the Python
    around them); kernels (list of KernelCost, the longest first).
    Raises ValueError where a figure is read before the block has begun.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._begin: _Reading | None = None
        self._end: _Reading | None = None

    def __enter__(self) -> Self:
        if self._begin is not None:
            raise ValueError("a profile is used once: call model.profile() again")
        self._model._engine.profile_start()
        try:
            self._begin = self._read()
        except BaseException:  # no __exit__ follows
            self._model._engine.profile_stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._end = self._read()
        finally:
            self._model._engine.profile_stop()

    def _read(self) -> _Reading:
        rows, dispatches, barriers, submissions, host_seconds = self._model._engine.profile_read()
        kernels = {row[0]: KernelCost(*row) for row in rows}
        return _Reading(kernels, dispatches, barriers, submissions, host_seconds)

    @property
    def _spent(self) -> _Reading:
        if self._begin is None:
            raise ValueError("this profile has not begun: use `with model.profile() as p:`")
        return (self._end or self._read()).minus(self._begin)

    @property
    def dispatches(self) -> int:
        return self._spent.dispatches

    @property
    def barriers(self) -> int:
        return self._spent.barriers

    @property
    def submissions(self) -> int:
        return self._spent.submissions

    @property
    def host_seconds(self) -> float:
        return self._spent.host_seconds

    @property
    def kernels(self) -> list[KernelCost]:
        return sorted(self._spent.kernels.values(), key=lambda cost: -cost.seconds)

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.kernels)

    @property
    def bytes_read(self) -> float:
        return sum(cost.bytes_read for cost in self.kernels)

    @property
    def bytes_written(self) -> float:
        return sum(cost.bytes_written for cost in self.kernels)

    @property
    def flops(self) -> float:
        return sum(cost.flops for cost in self.kernels)

    def table(self) -> list[dict[str, Any]]:
        """One row a kernel, the longest first: kernel, calls, seconds, share (of the device's
        time), gb_per_second, gflop_per_second. "(copy)" and "(fill)" are Vulkan's own commands.
        Values that the device cannot tell are None.
        """
        total = self.seconds
        return [
            {
                "kernel": cost.kernel,
                "calls": cost.calls,
                "seconds": _known(cost.seconds),
                "share": _known(_rate(cost.seconds, total)),
                "gb_per_second": _known(cost.bytes_per_second / 1e9),
                "gflop_per_second": _known(cost.flops_per_second / 1e9),
            }
            for cost in self.kernels
        ]

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON holds them; "kernels" are the rows of `table`."""
        return {
            "dispatches": self.dispatches,
            "barriers": self.barriers,
            "submissions": self.submissions,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "flops": self.flops,
            "seconds": _known(self.seconds),
            "host_seconds": self.host_seconds,
            "kernels": self.table(),
        }

    def __str__(self) -> str:
        lines = [f"{'kernel':28} {'calls':>7} {'ms':>10} {'share':>6} {'GB/s':>8} {'GFLOP/s':>9}"]
        for row in self.table():
            seconds, share, gb, gflop = (
                math.nan if row[key] is None else row[key]
                for key in ("seconds", "share", "gb_per_second", "gflop_per_second")
            )
            lines.append(
                f"{row['kernel']:28} {row['calls']:7} {1e3 * seconds:10.3f} {100 * share:5.1f}%"
                f" {gb:8.2f} {gflop:9.2f}"
            )
        moved = self.bytes_read + self.bytes_written
        lines.append(
            f"{self.dispatches} dispatches, {self.barriers} barriers, {self.submissions}"
            f" submissions; {moved / 1e6:.1f} MB moved, {self.flops / 1e9:.3f} GFLOP;"
            f" {1e3 * self.seconds:.3f} ms on the device, {1e3 * self.host_seconds:.3f} ms on the"
            " host"
        )
        return "\n".join(lines)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
