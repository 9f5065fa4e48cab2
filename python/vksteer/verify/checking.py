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
from . import attribution, backward, circuit, lens
from .forward import (
    act,
    attn_decode,
    attn_output,
    attn_scores,
    attn_softmax,
    copy,
    edit,
    embed,
    linear,
    linear_pairs,
    norm,
    rope,
    sum_heads,
)
from .problems import ACTIVATIONS, EDITS, Outcome, Problem

# The largest error an op may make, in its problem's units (see Problem). Beside each the worst that
# tests/test_ops.py met on lavapipe 25.0.7 with subgroups of 4, 8 and 16. About four times that, and
# more where Vulkan leaves the precision of exp or tanh to the driver.
BOUNDS = {
    "embed": 2e-7,  # 0.4e-7
    "linear": 1.5e-6,  # 2.9e-7, of sum |x w| + |bias| + |add|, K up to 257
    "linear_pairs": 1.2e-6,  # 2.8e-7, of sum |x gain w| + |bias|
    "norm": 2e-6,  # 4.5e-7, width 1024
    "rope": 1e-6,  # 2.2e-7
    "attn_scores": 1.5e-6,  # 2.6e-7, of sum |q k|
    "attn_softmax": 2e-6,  # 3.2e-7
    "attn_output": 1.5e-6,  # 2.7e-7, of sum pattern |v|
    "attn_decode": 3e-6,  # 4.6e-7
    "act": 2e-6,  # 2.9e-7, of |gate up|
    "edit": 1e-6,  # 1.9e-7
    "copy": 4e-7,  # 1.1e-7
    "sum_heads": 6e-7,  # 1.5e-7, of sum |x|
    # Backward (verify_backward.py), of what each gradient would be without cancellation.
    "linear_bwd": 1.5e-6,  # 3.0e-7
    "norm_bwd": 2e-6,  # 4.0e-7
    "rope_bwd": 2e-6,  # 5.0e-7
    "attn_softmax_bwd": 1e-6,  # 1.9e-7
    "attn_output_bwd": 4e-6,  # 9.8e-7, 257 queries
    "act_bwd": 3.5e-6,  # 8.4e-7
    "pair_grad": 1e-6,  # 1.9e-7
    "logit_grad": 3.5e-6,  # 8.3e-7
    # Attribution (verify_attribution.py), of sums without cancellation.
    "difference": 1.2e-6,  # 2.9e-7
    "accumulate": 1.2e-6,  # 3.0e-7, 10 sources
    "head_inputs": 1.5e-6,  # 3.8e-7
    "head_gradients": 1e-6,  # 2.2e-7, 10 steps
    "dots": 1e-6,  # 2.0e-7, of sum |a b|, K up to 18944
    "node_dims": 1.2e-6,  # 2.8e-7, 32 slots
    # Circuits (verify_circuit.py), of sums without cancellation.
    "circuit_inputs": 1.5e-6,  # 1.7e-7
    "circuit_place": 2e-6,  # 1.7e-7
    "circuit_heads": 1e-6,  # 1.0e-7
    "circuit_outputs": 1.5e-6,  # 2.9e-7
    "pair_logits": 1e-6,  # 1.0e-7
    "logit_metrics": 3e-6,  # 2.6e-7, of the largest logit
    # The OV circuit (verify_lens.py).
    "head_out": 1.2e-6,  # 2.6e-7, of sum |x w gain|
    "row_norms": 1.5e-6,  # 3.6e-7
    "topk": 0.0,  # it only picks
}


# -- matrices --------------------------------------------------------------------------------------


# -- row by row ------------------------------------------------------------------------------------


# -- attention -------------------------------------------------------------------------------------


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
        at = np.unravel_index(error.argmax(), error.shape)
        if error[at] > worst:
            worst, where = (
                float(error[at]),
                f"{name}{[int(i) for i in at]}: device {got[at]:.9g}, reference {want[at]:.9g}",
            )
    return Outcome(problem, worst, where, device, reference)


def problems(seed=0) -> Iterator[Problem]:
    """What `vksteer verify` runs: each op over a few awkward shapes."""
    rng = np.random.default_rng(seed)
    for weight_type in range(3):
        yield embed(rng, 7, 77, 33, weight_type, scale=3.5, segment_rows=32)
        for rows in (1, 2, 3, 7, 9, 33):
            yield linear(rng, rows, 77, 53, weight_type, bias=True, add=True)
        yield linear(rng, 3, 129, 257, weight_type, softcap=5.0, segment_rows=64)
        yield linear(rng, 5, 33, 80, weight_type, first_k=32, n_k=48)
        for rows in (1, 2, 3, 8, 9):
            yield linear_pairs(
                rng, rows, 53, "gate", weight_type, width=77, act=rows % 3, bias=rows == 3
            )
            yield linear_pairs(
                rng,
                rows,
                80,
                "rotate",
                weight_type,
                heads=(4, 2, 10 if rows == 2 else 64),
                bias=rows != 8,
            )
    for flags in (
        (),
        ("add",),
        ("rows",),
        ("write_scale", "write_normalized"),
        ("read_scale", "write_normalized", "no_out"),
        ("read_normalized", "add"),
    ):
        yield norm(rng, 3, 257, flags)
    for d_head in (2, 6, 64, 80, 128):
        yield rope(rng, [(0, 3), (5, 1)], 4, 2, d_head)
        yield attn_scores(
            rng, [(0, 17), (4, 1), (30, 9)], 4, 2, d_head, softcap=20.0 if d_head == 64 else 0.0
        )
        yield attn_output(
            rng, [(0, 17), (4, 1), (30, 9)], 4, 2, d_head, window=5 if d_head == 64 else 0
        )
        yield attn_decode(rng, [0, 37, 6, 129], 4, 2, d_head, window=5 if d_head == 64 else 0)
    # query heads that share keys and values: a kernel each, the last in two turns
    for group in (1, 3, 4, 7):
        yield attn_decode(
            rng, [0, 37, 6, 129], 2 * group, 2, 64, softcap=20.0 if group == 3 else 0.0
        )
    for window in (0, 1, 5):
        yield attn_softmax(rng, [(0, 33), (7, 1), (250, 9)], 3, window)
    for kind in range(len(ACTIVATIONS)):
        yield act(rng, 3, 257, kind)
    for kind in range(len(EDITS)):
        yield edit(rng, kind, 7, 3, 33)
        if EDITS[kind] != "add_scaled":
            yield edit(rng, kind, 7, 3, 0, keys=True, window=4)
    yield copy(rng, 7, 33, pick=True, add=True)
    yield sum_heads(rng, 3, 5, 33, bias=True)
    for module in (backward, attribution, circuit, lens):
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
        """For JSON, which has no infinity: an error that is none is null."""
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
    for problem in problems(seed):
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
