"""The loss of activation scaling and its gradient with respect to the parameters.

Both signs of beta ride as rows of one batch. The engine computes the difference of the two answers'
logits and the divergence of the rest, their gradient, and at every site the dot product of the
value with its gradient, which is all that the gradient of a factor needs: d -> 1 on the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _engine as extension
from ..base.types import Array, Float32Array, Float64Array
from ..runtime.batch import first_tokens, packed_rows
from ..runtime.edit_compiler import KINDS, OPEN, SLICE
from ..runtime.gradients import BATCH_TOKENS, CHOICE, PAIR, cache_for, pack, tape_for
from .task import SITES, Task, Weights, make_task

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Of the two rows of each prompt.
BETAS = (1.0, -1.0)


@dataclass(frozen=True, eq=False)
class Measured:
    """differences: float64 [n, 2], logit(a) - logit(b) at beta = +1 and -1. divergences: float64
    [n, 2], KL(P0 || P_beta) without the two answers, nats. gradient: float64 [sites, L, positions]
    or [sites, L, D], of the smooth terms (without minimality), or None.
    """

    differences: Float64Array
    divergences: Float64Array
    gradient: Float64Array | None

    def smooth(self, weights: Weights) -> float:
        """Effectiveness and weighted faithfulness."""
        signs = np.array(BETAS)
        hinge = np.maximum(0.0, weights.margin - signs * self.differences).sum(axis=1)
        return float(hinge.mean() + weights.faith * self.divergences.mean())


class Objective:
    """objective(parameters) of a task; the unscaled model's last logits are computed once."""

    def __init__(self, model: Model, task: Task, weights: Weights) -> None:
        self.model, self.task, self.weights = model, task, weights
        self.keys = [site.key for of_site in task.places for site in of_site]
        self.free = np.ones(task.shape(model.config.d_model), bool)
        if not task.dynamic:
            self.free[:, :, : task.first] = False
        self._groups = pack([2 * len(row) for row in task.rows], BATCH_TOKENS)
        self._reference = self._unscaled()
        self._records = [self._layout(len(g)) for g in self._groups]

    @property
    def n_free(self) -> int:
        """Parameters that are trained."""
        return int(self.free.sum())

    def _unscaled(self) -> Float32Array:
        """Logits after each prompt, float32 [n, V]."""
        logits = [
            self.model.run([list(self.task.rows[i]) for i in group], logits="last").logits
            for group in self._groups
        ]
        return np.concatenate([np.asarray(x) for x in logits])

    def before(self) -> Float64Array:
        """logit(a) - logit(b) of the unscaled model, float64 [n]."""
        rows, logits = np.arange(len(self.task.rows)), self._reference.astype(np.float64)
        found: Float64Array = logits[rows, self.task.a] - logits[rows, self.task.b]
        return found

    def _layout(self, n_prompts: int) -> tuple[Array, Float32Array, int]:
        """(records of the engine's edits, the part of beta that is a coefficient, rows) of n
        prompts: at every site one edit for each row, rows ascending, which merge into one dispatch.
        """
        task, n_rows = self.task, 2 * n_prompts
        places = [site for of_site in task.places for site in of_site]
        records = np.zeros((len(places), n_rows, 15), np.int64)
        per_place = self.model.config.d_model if task.dynamic else 2 * task.length
        for p, site in enumerate(places):
            records[p, :, 0], records[p, :, 1] = site.number, site.layer
            records[p, :, 11] = p * per_place
        records[:, :, 2] = np.arange(n_rows)
        records[:, :, 3] = KINDS["dynamic" if task.dynamic else "scale"]
        records[:, :, 4], records[:, :, 6] = task.first, 1
        records[:, :, 5] = OPEN if task.dynamic else task.length
        records[:, :, 8], records[:, :, 10] = SLICE, 1
        signs = np.tile(BETAS, n_prompts)
        if task.dynamic:
            records[:, :, 14] = 1
            coefficients = signs / math.sqrt(self.model.config.d_model)
        else:
            records[:, 1::2, 11] += task.length
            records[:, :, 11] += task.first
            records[:, :, 12] = 1
            coefficients = np.ones(n_rows)
        flat = np.ascontiguousarray(records.reshape(-1, 15))
        return flat, np.tile(coefficients, len(places)).astype(np.float32), n_rows

    def _edits(self, group: int, parameters: Float64Array) -> Any:
        from ..runtime.device import _engine

        records, coefficients, n_rows = self._records[group]
        if self.task.dynamic:
            operands = parameters
        else:  # [sites, L, beta, positions]
            operands = 1.0 + np.array(BETAS)[:, None] * parameters[:, :, None]
        nothing = np.zeros(0, np.uint32)
        return _engine().Edits(
            self.model._engine,
            records,
            coefficients,
            nothing,
            np.zeros(1, np.uint32),
            np.ascontiguousarray(operands.ravel(), np.float32),
            n_rows,
        )

    def _metric(self, prompts: list[int], lengths: list[int]) -> extension.Metric:
        index = np.repeat(prompts, 2)
        ends = first_tokens(lengths) + np.array(lengths) - 1
        return (
            CHOICE,
            True,
            ends.astype(np.uint32),
            np.ascontiguousarray(self.task.a[index]),
            np.ascontiguousarray(self.task.b[index]),
            np.tile(BETAS, len(prompts)).astype(np.float32),
            None,
            None,
            np.ascontiguousarray(self._reference[index]),
            self.weights.margin,
            0.5 * self.weights.faith,  # a mean over two signs, of rows that are summed
        )

    def __call__(self, parameters: Float64Array, gradient: bool = True) -> Measured:
        """Values and, unless gradient is False, the gradient at parameters float64 [sites, L,
        positions] or [sites, L, D].
        """
        n = len(self.task.rows)
        values = np.zeros((n, 2, 2))
        total = np.zeros(self.free.shape)
        for g, group in enumerate(self._groups):
            rows = [self.task.rows[i] for i in group for _ in BETAS]
            found, scaled = _pass(
                self.model,
                rows,
                self._edits(g, parameters),
                self._metric(group, [len(r) for r in rows]),
                self.keys if gradient else [],
                self.task,
            )
            values[group] = found.astype(np.float64).reshape(len(group), 2, 2)
            if gradient:
                total += self._sum(scaled, len(group))
        if gradient:
            total *= self.free / n
        return Measured(values[:, :, 0], values[:, :, 1], total if gradient else None)

    def _sum(self, scaled: dict[tuple[int, int], Float32Array], n_prompts: int) -> Float64Array:
        """The sum over rows of beta times the sites' gradients, in float64 and the rows' order."""
        signs = np.tile(BETAS, n_prompts)
        if self.task.dynamic:
            signs = signs / math.sqrt(self.model.config.d_model)
        found = np.zeros((len(self.keys), self.free.shape[2]))
        for i, key in enumerate(self.keys):
            for sign, row in zip(signs, scaled[key]):
                found[i] += sign * row
        return found.reshape(self.free.shape)


def _pass(
    model: Model,
    rows: Any,
    edits: Any,
    metric: extension.Metric,
    keys: list[tuple[int, int]],
    task: Task,
) -> tuple[Float32Array, dict[tuple[int, int], Float32Array]]:
    """One forward and backward pass of packed rows: (the metric's values, scaling gradients)."""
    lengths = [len(r) for r in rows]
    width, n = max(lengths), len(rows)
    packed = packed_rows(
        rows,
        out_row=range(n),
        column=[width - t for t in lengths],
        n_out_rows=n,
        n_columns=width,
        n_keys=width,
        edits=edits,
    )
    tape = tape_for(model, sum(lengths), 0)
    stop = min((layer for _, layer in keys), default=model.config.n_layers)
    values, _, scaled = tape.differentiate(
        cache_for(model, sum(lengths)), packed, [], metric, stop, keys, task.dynamic, task.first
    )
    return values, scaled


def minimality(parameters: Float64Array, n_free: int) -> float:
    """Mean |parameter| over the trained ones."""
    return float(np.abs(parameters).sum() / n_free)


def loss(
    model: Model,
    prompts: Any,
    a: Any,
    b: Any,
    alpha: Any,
    *,
    sites: Any = SITES,
    dynamic: bool = False,
    margin: float = 1.0,
    faith: float = 1.0,
    sparse: float = 0.01,
    skip_first: bool = True,
) -> tuple[float, Float64Array]:
    """The loss of `train` at given parameters, and its gradient (docs/activation-scaling.md).

    alpha: float [sites, L, positions], or with dynamic=True w [sites, L, D]; or a Scaling. The
    other arguments are those of `train`. Returns (value, gradient float64 of alpha's shape). The
    gradient is 0 where skip_first masks position 0, and that of |alpha| is 0 at alpha = 0. Raises
    ValueError as `train`, and for parameters of another shape or that are not finite.
    """
    task = make_task(model, prompts, a, b, sites, dynamic, skip_first)
    weights = Weights(margin, faith, sparse).check()
    given = getattr(alpha, "parameters", alpha)
    parameters = np.array(given, np.float64)
    if parameters.shape != task.shape(model.config.d_model):
        raise ValueError(
            f"alpha has shape {list(parameters.shape)}; these prompts and sites need"
            f" {list(task.shape(model.config.d_model))}"
        )
    if not np.isfinite(parameters).all():
        raise ValueError("alpha has entries that are not finite")
    objective = Objective(model, task, weights)
    parameters = parameters * objective.free
    found = objective(parameters)
    assert found.gradient is not None
    value = found.smooth(weights) + weights.sparse * minimality(parameters, objective.n_free)
    slope = weights.sparse * np.sign(parameters) / objective.n_free
    return value, found.gradient + slope


def first_order(
    model: Model, prompts: Any, a: Any, b: Any, *, sites: Any = SITES, skip_first: bool = True
) -> Float64Array:
    """What each factor would do, from one gradient: d(logit(a) - logit(b)) / d(alpha) at alpha = 0
    and beta = 1, the mean over prompts; float64 [sites, L, positions].

    It is <h, dD/dh> with D the difference of the logits after the prompt, or -<h, dL/dh> of the
    loss's hinge, and ranks sites, layers and positions without training. Arguments and errors as
    `train` without dynamic.
    """
    task = make_task(model, prompts, a, b, sites, False, skip_first)
    keys = [site.key for of_site in task.places for site in of_site]
    total = np.zeros((len(keys), task.length))
    for group in pack([len(row) for row in task.rows], BATCH_TOKENS):
        rows = [task.rows[i] for i in group]
        lengths = [len(r) for r in rows]
        ends = first_tokens(lengths) + np.array(lengths) - 1
        metric: extension.Metric = (
            PAIR,
            True,
            ends.astype(np.uint32),
            np.ascontiguousarray(task.a[group]),
            np.ascontiguousarray(task.b[group]),
            np.ones(len(group), np.float32),
            None,
            None,
            None,
        )
        _, scaled = _pass(model, rows, None, metric, keys, task)
        for i, key in enumerate(keys):
            for row in scaled[key]:
                total[i] += row
    total[:, : task.first] = 0
    return (total / len(task.rows)).reshape(task.shape(model.config.d_model))
