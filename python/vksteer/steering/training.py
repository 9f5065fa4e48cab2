"""Training of steering vectors by next-token prediction (NTP) and preference optimisation (PO):
method.md section 2.

The model is frozen; only the direction is learned. What a step does depends on the settings, the
seed and its number alone: shuffling and factors are drawn anew from (seed, epoch), gradients are
added up in float64 in the order of the examples, and the optimiser's state is float64. So
micro-batches change no bit, and a training that goes on from its checkpoint ends where the
uninterrupted one does. `checkpoints.py` owns the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, fingerprint, provenance
from ..inputs.vectors import SteeringVector
from .checkpoints import Checkpoint, State
from .losses import LIMIT, LogProbs, Objective, check_number, mean_gradient, prepare
from .settings import Adam, Settings


@dataclass
class Training:
    """What training gave.

    vector: SteeringVector of the chosen epoch, with provenance; its norm is what training made it
    (`normalized_to`). losses: mean loss of each step. validation: a dict per epoch: epoch, loss,
    and for PO match (None where the loss ruled the epoch out); empty without validation examples.
    curve: a dict per step: step, epoch, lr, loss, gradient (norm before clipping), norm (of the
    vector after the step).
    vectors: float64 [epochs, D], the vector after each epoch. epoch: the chosen one, counted from
    0. settings: Settings.
    """

    vector: SteeringVector
    losses: list[float]
    validation: list[dict[str, Any]]
    curve: list[dict[str, float]]
    vectors: np.ndarray
    epoch: int
    settings: Settings

    def normalized_to(self, norm: SteeringVector | float) -> SteeringVector:
        """The vector with the norm of another one (a SteeringVector, for example DIM's) or a
        number: how the method uses it.
        """
        return self.vector.with_norm(
            norm.norm if isinstance(norm, SteeringVector) else check_number(norm, "norm")
        )

    def to_dict(self) -> dict:
        """For JSON: settings, losses, validation and curve; the vector itself is
        saved by `vector.save`.
        """
        return {
            "settings": asdict(self.settings),
            "epoch": self.epoch,
            "losses": self.losses,
            "validation": self.validation,
            "curve": self.curve,
            "vector_hash": digest(self.vector.direction),
            "vector_norm": self.vector.norm,
        }

    def to_markdown(self) -> str:
        """One line an epoch: learning rate, mean training loss, validation, norm."""
        lines = [
            "| epoch | lr | training loss | validation loss | match | norm | chosen |",
            "|---:|---:|---:|---:|---:|---:|:---|",
        ]
        number = lambda x: "" if x is None else f"{x:.4f}"
        for e in range(len(self.vectors)):
            steps = [c for c in self.curve if c["epoch"] == e]
            v = self.validation[e] if self.validation else {}
            lines.append(
                f"| {e} | {steps[0]['lr']:.4g} | {np.mean([c['loss'] for c in steps]):.4f} |"
                f" {number(v.get('loss'))} | {number(v.get('match'))} | {steps[-1]['norm']:.3f} |"
                f" {'yes' if e == self.epoch else ''} |"
            )
        return "\n".join(lines)

    def plot(self, path: PathLike | None=None) -> Figure:
        """Loss by step with the validation loss at the ends of epochs: a matplotlib Figure, saved
        to `path` if one is given (needs matplotlib).
        """
        figure = new_figure(6.0, 3.2)
        axes = figure.add_subplot()
        axes.plot(
            np.arange(1, len(self.losses) + 1),
            self.losses,
            color="#4878a8",
            linewidth=0.8,
            label="training, each step",
        )
        if self.validation:
            per_epoch = len(self.losses) / len(self.vectors)
            axes.plot(
                per_epoch * (1 + np.arange(len(self.vectors))),
                [v["loss"] for v in self.validation],
                "o-",
                color="#c8643c",
                label="validation",
            )
        axes.set_xlabel("step")
        axes.set_ylabel(f"{self.settings.loss.upper()} loss")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


class _Trainer:
    def __init__(
        self,
        model: Model,
        examples: Examples,
        validation: Examples | None,
        settings: Settings,
        batch_tokens: int | None,
        checkpoint: PathLike | None,
        checkpoint_every: int,
    ) -> None:
        model._check_open()
        self.model, self.s = model, settings
        losing = settings.phi is not None
        self.examples = prepare(model, examples, losing=losing, limit=settings.limit)
        self.held_out = (
            []
            if validation is None
            else prepare(model, validation, losing=losing, limit=settings.limit, what="validation")
        )
        self.every = require_int(checkpoint_every, "checkpoint_every", 1)
        self.log_probs = LogProbs(
            model,
            settings.layer,
            None if batch_tokens is None else require_int(batch_tokens, "batch_tokens", 1),
        )
        self.objective = Objective(self.log_probs, settings.phi, settings.reduction)
        self.steps_an_epoch = -(-len(self.examples) // settings.batch_size)
        self.key = {
            "model_hash": fingerprint(model),
            "kernels": str(getattr(model, "kernels", "")),
            "examples_hash": digest([asdict(e) for e in self.examples]),
            "validation_hash": digest([asdict(e) for e in self.held_out]),
            **asdict(settings),
        }
        rng = np.random.default_rng([settings.seed, 0])
        width = model.config.d_model
        self.adam = Adam(
            settings.init * rng.standard_normal(width), np.zeros(width), np.zeros(width)
        )
        self.curve: list[dict[str, float]] = []
        self.vectors: list[np.ndarray] = []
        self.validation: list[dict[str, Any]] = []
        self.file = None if checkpoint is None else Checkpoint(checkpoint, self.key)
        if self.file is not None and (state := self.file.read(width)) is not None:
            self.adam = Adam(state.vector, state.first, state.second, state.steps)
            self.curve, self.vectors, self.validation = state.curve, state.vectors, state.validation

    def _save(self) -> None:
        if self.file is not None:
            adam, done = self.adam, len(self.vectors)
            curve, validation = self.curve[: adam.steps], self.validation[:done]
            self.file.write(
                State(
                    adam.steps,
                    adam.vector,
                    adam.first,
                    adam.second,
                    curve,
                    self.vectors,
                    validation,
                )
            )

    def _coefficients(self, epoch: int, n: int, which: int) -> Float64Array:
        """Strengths of n examples: the one coefficient, or factors drawn for this epoch. which: 1
        training; 2 validation, the same at every epoch.
        """
        if self.s.factors is None:
            return np.full(n, self.s.coefficient)
        return np.random.default_rng([self.s.seed, which, epoch]).choice(self.s.factors, n)

    def _step(self, epoch: int, batch: IntArray, coefficients: Float64Array, lr: float) -> None:
        some = [self.examples[i] for i in batch]
        losses, gradients = self.objective(
            some, self.adam.vector.astype(np.float32), coefficients[batch]
        )
        gradient = mean_gradient(gradients)
        if not np.isfinite(gradient).all() or not np.isfinite(losses).all():
            raise ValueError(
                f"step {self.adam.steps}: the loss or its gradient is not finite (loss"
                f" {losses.mean()}); lower lr or the coefficient"
            )
        adam, norm = self.adam.step(self.s, gradient, lr)
        self.curve.append(
            {
                "step": adam.steps,
                "epoch": epoch,
                "lr": lr,
                "loss": float(losses.mean()),
                "gradient": norm,
                "norm": float(np.linalg.norm(adam.vector)),
            }
        )
        self.adam = adam  # from here on the step is done; a checkpoint takes the curve up to it

    def _held_out_loss(self, vector: Float64Array) -> float:
        losses, _ = self.objective(
            self.held_out,
            vector.astype(np.float32),
            self._coefficients(0, len(self.held_out), 2),
            gradient=False,
        )
        return float(losses.mean())

    def run(self, progress: ProgressLike) -> Training:
        s, done = self.s, self.adam.steps
        with Progress(progress, s.epochs * self.steps_an_epoch, s.loss.upper()) as bar:
            bar.step(done)
            try:
                for epoch in range(len(self.vectors), s.epochs):
                    lr = s.lr * (1 - epoch / s.epochs)
                    order = np.random.default_rng([s.seed, 3, epoch]).permutation(
                        len(self.examples)
                    )
                    coefficients = self._coefficients(epoch, len(self.examples), 1)
                    for k in range(
                        self.adam.steps - epoch * self.steps_an_epoch, self.steps_an_epoch
                    ):
                        self._step(
                            epoch,
                            order[k * s.batch_size : (k + 1) * s.batch_size],
                            coefficients,
                            lr,
                        )
                        if self.adam.steps % self.every == 0:
                            self._save()
                        bar.step()
                    if self.held_out:
                        self.validation.append(
                            {
                                "epoch": epoch,
                                "loss": self._held_out_loss(self.adam.vector),
                                "match": None,
                            }
                        )
                    self.vectors.append(self.adam.vector.copy())
                    bar.say(self._line(epoch, lr))
                    self._save()
            except BaseException:  # Ctrl-C above all: what is done is kept
                self._save()
                raise
            return self._result()

    def _line(self, epoch: int, lr: float) -> str:
        losses = [c["loss"] for c in self.curve if c["epoch"] == epoch]
        held_out = f", validation {self.validation[-1]['loss']:.4f}" if self.validation else ""
        return (
            f"epoch {epoch + 1} of {self.s.epochs}: lr {lr:.4g}, loss"
            f" {np.mean(losses):.4f}{held_out}, norm {self.curve[-1]['norm']:.3f}"
        )

    def _choose(self) -> int:
        """NTP: the least validation loss. PO: among losses within one phi of the least, the best
        match score. Ties: the earlier epoch. None: the last.
        """
        if not self.held_out:
            return self.s.epochs - 1
        losses = [v["loss"] for v in self.validation]
        if self.s.phi is None:
            return int(np.argmin(losses))
        near = [e for e, loss in enumerate(losses) if loss <= min(losses) + self.s.phi]
        coefficients = self._coefficients(0, len(self.held_out), 2) * np.array(
            [e.sign for e in self.held_out]
        )
        for e in near:
            self.validation[e]["match"] = self.log_probs.matches(
                [x.winning for x in self.held_out], self.vectors[e].astype(np.float32), coefficients
            )
        return max(near, key=lambda e: (self.validation[e]["match"], -e))

    def _result(self) -> Training:
        epoch, s = self._choose(), self.s
        chosen = {
            "epoch": epoch,
            "validation": self.validation[epoch] if self.validation else None,
            "n_examples": len(self.examples),
            "n_validation": len(self.held_out),
        }
        meta = provenance(self.model, training={**self.key, **chosen})
        vector = SteeringVector(self.vectors[epoch], s.layer, method=s.loss, meta=meta)
        return Training(
            vector,
            [c["loss"] for c in self.curve],
            self.validation,
            self.curve,
            np.array(self.vectors),
            epoch,
            s,
        )


def _train(
    model: Model,
    examples: Examples,
    validation: Examples | None,
    settings: Settings,
    batch_tokens: int | None,
    checkpoint: PathLike | None,
    checkpoint_every: int,
    progress: ProgressLike,
) -> Training:
    settings = settings.check(model)
    return _Trainer(
        model, examples, validation, settings, batch_tokens, checkpoint, checkpoint_every
    ).run(progress)


def train_ntp(
    model: Model,
    examples: Sequence,
    *,
    layer: int,
    validation: Sequence | None = None,
    coefficient: float = 1.0,
    factors: Factors=None,
    epochs: int = 10,
    batch_size: int = 6,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    optimizer: str = "adamw",
    seed: int = 42,
    init: float = 0.01,
    limit: int = LIMIT,
    reduction: str = "mean",
    batch_tokens: int | None = None,
    checkpoint: PathLike | None=None,
    checkpoint_every: int = 20,
    progress: ProgressLike=True,
) -> Training:
    """Learns a vector at resid_pre of `layer` that makes the winning responses likely: mean over
    examples of -log p(winning | steered).

    examples: anything with prompt, winning and sign (+1 or -1; texts or token lists; `ntp_loss`),
    for instance `vs.steering.training_data`'s. validation: more of them; the epoch of least
    validation loss is chosen (without any: the last).
    coefficient: each example is steered by coefficient * sign; factors: instead a strength drawn
      for every sample and epoch, "authors" for 2, 4, ..., 20 (validation keeps one draw).
    The rest as method.md section 2: AdamW, lr (1 - epoch / epochs), clipping by norm, a small
      random start, `limit` response tokens, reduction "mean" or "sum" over a response's
      tokens. batch_tokens: tokens that go through the device at once (default: as memory
      allows; changes no bit).
    checkpoint: a file; written whole every `checkpoint_every` steps, at the ends of epochs and when
      interrupted. A second call with the same settings goes on from there and ends with the same
      bits; one of other settings is refused.
    Returns Training. Raises ValueError before any work for bad examples (`ntp_loss`) and settings.
    """
    settings = Settings(
        "ntp",
        layer,
        None,
        coefficient,
        factors,
        epochs,
        batch_size,
        lr,
        weight_decay,
        clip,
        optimizer,
        seed,
        init,
        limit,
        reduction,
    )
    return _train(
        model, examples, validation, settings, batch_tokens, checkpoint, checkpoint_every, progress
    )


def train_po(
    model: Model,
    examples: Sequence,
    *,
    layer: int,
    phi: float = 2e-2,
    validation: Sequence | None = None,
    coefficient: float = 1.0,
    factors: Factors=None,
    epochs: int = 10,
    batch_size: int = 6,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    clip: float | None = 1.0,
    optimizer: str = "adamw",
    seed: int = 42,
    init: float = 0.01,
    limit: int = LIMIT,
    batch_tokens: int | None = None,
    checkpoint: PathLike | None=None,
    checkpoint_every: int = 20,
    progress: ProgressLike=True,
) -> Training:
    """Learns a vector that prefers the winning to the losing responses (`po_loss`); examples also
    need losing. The rest as `train_ntp`.

    Of the epochs whose validation loss lies within one phi of the least, the one with the
    best match score is chosen: the share of the winning responses' tokens that the steered
    model predicts greedily.
    """
    settings = Settings(
        "po",
        layer,
        phi,
        coefficient,
        factors,
        epochs,
        batch_size,
        lr,
        weight_decay,
        clip,
        optimizer,
        seed,
        init,
        limit,
    )
    return _train(
        model, examples, validation, settings, batch_tokens, checkpoint, checkpoint_every, progress
    )
