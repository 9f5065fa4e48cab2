"""Is this device right? Every operation of the engine on small awkward problems against its
float64 reference on the CPU.

A problem is an op's name, its arguments, and arrays. The engine runs it on copies of the arrays, on
the device and on the reference, and returns both results. Memory that an op must not touch or read
holds NaN before; what it must not touch still holds NaN afterwards.

`vksteer verify` runs `problems()`; tests/test_ops.py runs many more shapes through the same
builders. BOUNDS are the errors that either accepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..runtime.device import _engine, open_device
from . import (
    attention,
    attribution,
    backward,
    circuit,
    decoding,
    encoding,
    forward,
    lens,
    scalars,
    scaling,
)
from .problems import Outcome, Problem

# The largest error an op may make, in its problem's units (see Problem). Beside each the worst that
# tests/test_ops.py met on lavapipe 25.0.7 with subgroups of 4, 8 and 16. About four times that, and
# more where Vulkan leaves the precision of exp or tanh to the driver.
BOUNDS = {
    op: bound
    for module in (
        forward,
        attention,
        decoding,
        backward,
        scalars,
        attribution,
        circuit,
        lens,
        scaling,
        encoding,
    )
    for op, bound in module.BOUNDS.items()
}


# -- running ---------------------------------------------------------------------------------------


def bench(device=None):
    """(engine bench, Device) on the device that `device` means, as in Model.from_pretrained."""
    engine, chosen = open_device(device)
    return _engine().Bench(engine), chosen


def check(on, problem: Problem) -> Outcome:
    """Runs a problem on the engine bench `on` and measures."""
    device, reference = on.run(problem.op, problem.arguments, problem.buffers)
    worst, where = 0.0, "nowhere"
    for name, want in reference.items():
        got = device[name].astype(np.float64)
        known = ~np.isnan(want)
        if not np.array_equal(known, ~np.isnan(got)):
            at = tuple(int(i) for i in np.argwhere(known == np.isnan(got))[0])
            return Outcome(
                problem,
                float("inf"),
                f"{name}{list(at)}: device {got[at]}, reference {want[at]}",
                device,
                reference,
            )
        if not known.any():
            continue
        largest = np.nanmax(
            [np.abs(want[known]).max(), np.nanmax(np.abs(problem.buffers[name]), initial=0.0)]
        )
        unit = problem.units.get(name, largest or 1.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            error = np.where(known & (got != want), np.abs(got - want) / unit, 0.0)
        at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        if error[at] > worst:
            worst, where = (
                float(error[at]),
                f"{name}{list(at)}: device {got[at]:.9g}, reference {want[at]:.9g}",
            )
    return Outcome(problem, worst, where, device, reference)


def problems(seed=0) -> Iterator[Problem]:
    """What `vksteer verify` runs: each op over a few awkward shapes."""
    rng = np.random.default_rng(seed)
    for module in (forward, decoding, backward, attribution, circuit, lens, scaling, encoding):
        yield from module.problems(rng)


@dataclass(frozen=True)
class Row:
    """One line of the table: an op over all its problems, or a family of matrix kernels against
    the baseline's bits.
    """

    op: str
    n_problems: int
    error: float
    bound: float
    worst: str

    @property
    def ok(self) -> bool:
        return self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an error that is not finite becomes None."""
        return {
            "op": self.op,
            "problems": self.n_problems,
            "error": self.error if np.isfinite(self.error) else None,
            "bound": self.bound,
            "ok": self.ok,
            "worst": self.worst,
        }


def verify(device=None, seed=0) -> tuple[list[Row], Any]:
    """(a Row for every op, the Device). An op that fails outright counts as an infinite
    error with the reason.
    """
    on, chosen = bench(device)
    found: dict[str, list[tuple[float, str]]] = {}
    lean = decoding.TILED in dict(on.families())
    for problem in problems(seed):
        if problem.op in decoding.BOUNDS and not lean:
            continue  # of kernels that this device never uses
        try:
            outcome = check(on, problem)
            found.setdefault(problem.op, []).append(
                (outcome.error, f"{problem.label}: {outcome.where}")
            )
        except (RuntimeError, ValueError) as error:
            found.setdefault(problem.op, []).append((float("inf"), f"{problem.label}: {error}"))
    rows = [Row(op, len(all), *max(all)[:1], BOUNDS[op], max(all)[1]) for op, all in found.items()]
    for family, name in on.families():
        try:
            on.self_test(family)
            rows.append(Row(f"linear kernels: {name}", 1, 0.0, 0.0, ""))
        except (RuntimeError, ValueError) as error:
            rows.append(Row(f"linear kernels: {name}", 1, float("inf"), 0.0, str(error)))
    return rows, chosen


def table(rows: list[Row]) -> str:
    width = max(len(row.op) for row in rows)
    lines = [f"{'op':{width}}  problems  worst error  bound    ok"]
    for row in rows:
        lines.append(
            f"{row.op:{width}}  {row.n_problems:8d}  {row.error:11.1e}  {row.bound:7.1e} "
            f" {'yes' if row.ok else 'NO'}"
        )
        if not row.ok:
            lines.append(f"    {row.worst}")
    return "\n".join(lines)
