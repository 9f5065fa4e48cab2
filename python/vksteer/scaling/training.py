"""Training of activation scaling with Adam, full batch (docs/activation-scaling.md)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_number, require_int
from ..base.progress import Progress
from ..base.provenance import digest, fingerprint, kernel_names, provenance
from ..base.store import Store
from ..base.types import Float64Array, PathLike, ProgressLike
from ..inputs.prompts import token_text
from ..steering.settings import Adam, Settings
from .objective import Objective
from .scalings import Scaling
from .task import SITES, Task, Weights, make_task

if TYPE_CHECKING:
    from ..runtime.model import Model


class _Checkpoint:
    """The state of Adam and the losses, replaced as a whole at every write."""

    def __init__(self, path: PathLike, key: dict[str, Any]) -> None:
        self._store = Store(
            path,
            format="vksteer.scaling_training",
            key=key,
            argument="checkpoint",
            what="checkpoint of a scaling",
            other="another training",
        )

    def write(self, adam: Adam, losses: list[float]) -> None:
        state = {
            "steps": adam.steps,
            "vector": adam.vector,
            "first": adam.first,
            "second": adam.second,
            "losses": np.array(losses[: adam.steps], np.float64),
        }
        self._store.replace({"state": state})

    def read(self, size: int) -> tuple[Adam, list[float]] | None:
        """None where nothing has been written."""
        if not len(self._store):
            return None
        try:
            state = self._store["state"]
            adam = Adam(state["vector"], state["first"], state["second"], int(state["steps"]))
            losses = [float(x) for x in state["losses"]]
            arrays = (adam.vector, adam.first, adam.second)
            if any(x.shape != (size,) for x in arrays) or len(losses) != adam.steps:
                raise ValueError(f"arrays of {[x.shape for x in arrays]}, {adam.steps} steps")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self._store.refuse(error)
        return adam, losses


class _Trainer:
    def __init__(
        self,
        model: Model,
        task: Task,
        weights: Weights,
        lr: float,
        seed: int,
        checkpoint: PathLike | None,
        checkpoint_every: int,
    ) -> None:
        self.model, self.task, self.weights, self.lr = model, task, weights, lr
        self.objective = Objective(model, task, weights)
        self.every = require_int(checkpoint_every, "checkpoint_every", 1)
        self.key = {
            "model_hash": fingerprint(model),
            "kernels": kernel_names(model) or "",
            "data_hash": digest(task.rows, task.a.tolist(), task.b.tolist()),
            "sites": list(task.sites),
            "dynamic": task.dynamic,
            "first": task.first,
            "lr": lr,
            "seed": seed,
            **asdict(weights),
        }
        shape = task.shape(model.config.d_model)
        size = int(np.prod(shape))
        self.shape, self.losses = shape, list[float]()
        self.adam = Adam(np.zeros(size), np.zeros(size), np.zeros(size))
        # Adam alone: no clipping, no decay of weights
        self.settings = Settings(loss="scaling", layer=0, clip=None, optimizer="adam", lr=lr)
        self.file = None if checkpoint is None else _Checkpoint(checkpoint, self.key)
        if self.file is not None and (kept := self.file.read(size)) is not None:
            self.adam, self.losses = kept

    @property
    def parameters(self) -> Float64Array:
        return self.adam.vector.reshape(self.shape)

    def _save(self) -> None:
        if self.file is not None:
            self.file.write(self.adam, self.losses)

    def _step(self) -> None:
        """One step of Adam. |parameter| has no slope at zero, so its part of the gradient there is
        the one of least size, and a step that would change a sign ends at zero (as orthant-wise
        methods do: Andrew and Gao 2007): parameters become exactly zero.
        """
        found = self.objective(self.parameters)
        assert found.gradient is not None
        slope = found.gradient.ravel()
        pull = self.weights.sparse / self.objective.n_free
        before = self.adam.vector
        at_zero = np.sign(slope) * np.maximum(np.abs(slope) - pull, 0)
        gradient = np.where(before != 0, slope + pull * np.sign(before), at_zero)
        value = found.smooth(self.weights) + pull * float(np.abs(before).sum())
        if not np.isfinite(gradient).all() or not np.isfinite(value):
            raise ValueError(
                f"step {self.adam.steps}: the loss or its gradient is not finite (loss {value});"
                " lower lr"
            )
        adam, _ = self.adam.step(self.settings, gradient * self.objective.free.ravel(), self.lr)
        if pull:
            over = before * adam.vector < 0
            held = (before == 0) & (at_zero == 0)
            adam = Adam(
                np.where(over | held, 0.0, adam.vector), adam.first, adam.second, adam.steps
            )
        self.losses.append(value)
        self.adam = adam

    def run(self, steps: int, progress: ProgressLike) -> Scaling:
        with Progress(progress, steps, "scaling") as bar:
            bar.step(min(self.adam.steps, steps))
            try:
                while self.adam.steps < steps:
                    self._step()
                    if self.adam.steps % self.every == 0:
                        self._save()
                    bar.step()
            finally:  # KeyboardInterrupt too: finished steps are kept
                self._save()
        return self._result()

    def _result(self) -> Scaling:
        task, row = self.task, self.task.rows[0]
        meta = provenance(
            self.model,
            training={**self.key, "steps": self.adam.steps, "n_prompts": len(task.rows)},
            notes=list(task.notes),
        )
        scaling = Scaling(
            self.parameters.copy(),
            task.sites,
            task.dynamic,
            task.first,
            np.array(self.losses, np.float64),
            tokens=tuple(token_text(self.model, t) for t in row),
            meta=meta,
        )
        return scaling.measured(self.objective, self.objective(self.parameters, gradient=False))


def train(
    model: Model,
    prompts: Any,
    a: Any,
    b: Any,
    *,
    sites: Any = SITES,
    dynamic: bool = False,
    margin: float = 1.0,
    faith: float = 1.0,
    sparse: float = 0.01,
    lr: float = 1e-2,
    steps: int = 200,
    skip_first: bool = True,
    seed: int = 0,
    checkpoint: PathLike | None = None,
    checkpoint_every: int = 20,
    progress: ProgressLike = True,
) -> Scaling:
    """Learns factors of activations that turn the model to answer a at beta = +1 and to b at
    beta = -1 (docs/activation-scaling.md; Stoehr et al., arXiv 2410.04962, eq. 5, and section 5 for
    the dynamic form). Exact losses and settings are vksteer's own.

    prompts: texts or token lists, in the static form of one length: there is one factor for each
    site, layer and position. a, b: one answer for all prompts or one each: a token id, or a text or
    token list, whose first token counts. sites: names without their layer, of the model's width.
    dynamic: instead one vector w for each site and layer, the factor is w . h / sqrt(D), and any
    length will do. margin: of the hinge, logits. faith, sparse: weights of faithfulness and
    minimality. lr, steps: of Adam on the full batch, from zero. skip_first: leave position 0 alone,
    whose activations are huge. seed: written into the provenance; nothing is drawn. checkpoint: a
    file, written every `checkpoint_every` steps, at the end and on interruption; a call with the
    same settings goes on from it with bit-identical results, also to more steps.

    Returns a Scaling: `.alpha` float64 [sites, L, positions] or `.w` [sites, L, D], `.losses`
    float64 [steps], `.effectiveness`, `.faithfulness`, `.minimality`, `.edits(beta)`. Raises
    ValueError before any work for prompts of several lengths without dynamic, a = b, bad settings,
    sites of another width, and a checkpoint of another training.
    """
    weights = Weights(margin, faith, sparse).check()
    if not is_number(lr) or lr <= 0:
        raise ValueError(f"lr must be a finite number above 0, not {lr!r}")
    steps, seed = require_int(steps, "steps", 1), require_int(seed, "seed", 0)
    task = make_task(model, prompts, a, b, sites, dynamic, skip_first)
    trainer = _Trainer(model, task, weights, float(lr), seed, checkpoint, checkpoint_every)
    return trainer.run(steps, progress)
