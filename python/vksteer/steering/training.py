"""Training of steering vectors by next-token prediction (NTP) and preference optimisation (PO)
(docs/method.md section 2).

The model is frozen; only the direction is learned. A step depends on the settings, the seed and its
number alone: shuffling and factors are drawn from (seed, epoch), gradients are summed in float64 in
the order of the examples, and the state of the optimiser is float64. So results are bit-identical
for all sizes of device batches, and for a training that goes on from its checkpoint
(steering/checkpoints.py).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import require_int
from ..base.progress import Progress
from ..base.provenance import digest, fingerprint, identity_for, kernel_names, provenance
from ..base.types import Float64Array, IntArray, PathLike, ProgressLike
from ..inputs.vectors import SteeringVector
from .checkpoints import Checkpoint, State
from .losses import LIMIT, Examples, LogProbs, Objective, check_vector, mean_gradient, prepare
from .settings import Adam, Factors, Settings
from .trained import Training
from .weighting import default_reference, weigh

if TYPE_CHECKING:
    from ..runtime.model import Model


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
        reference: SteeringVector | None = None,
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
            "kernels": kernel_names(model) or "",
            "examples_hash": digest([asdict(e) for e in self.examples]),
            "validation_hash": digest([asdict(e) for e in self.held_out]),
            **asdict(settings),
        }
        self.reference = self._reference(reference)
        self.weighed: Float64Array | None = None
        rng = np.random.default_rng([settings.seed, 0])
        width = model.config.d_model
        self.adam = Adam(
            settings.init * rng.standard_normal(width), np.zeros(width), np.zeros(width)
        )
        self.curve: list[dict[str, float]] = []
        self.vectors: list[Float64Array] = []
        self.validation: list[dict[str, Any]] = []
        made_with = {"identity": identity_for(checkpoint, model)}
        self.file = None if checkpoint is None else Checkpoint(checkpoint, made_with | self.key)
        if self.file is not None and (state := self.file.read(width)) is not None:
            self.adam = Adam(state.vector, state.first, state.second, state.steps)
            self.curve, self.vectors, self.validation = state.curve, state.vectors, state.validation
            self.weighed = state.weighed
        self._weigh()

    def _reference(self, given: SteeringVector | None) -> SteeringVector | None:
        """The vector under which tokens are weighted first; None where they are weighted alike."""
        s = self.s
        if s.token_weights == "uniform":
            if given is not None or s.refresh is not None:
                raise ValueError("reference and refresh belong to a weighting: give token_weights")
            del self.key["token_weights"], self.key["refresh"]
            return None
        if given is None:
            given = default_reference(self.model, self.examples, s.layer)
        check_vector(self.model, given)
        if given.layer != s.layer:
            raise ValueError(
                f"reference has layer {given.layer}, and layer {s.layer} is trained: give a vector"
                " of that layer"
            )
        self.key["reference_hash"] = digest(given.direction)
        return given

    def _weigh(self) -> None:
        """Weights under the last vector that they were computed under, or the reference."""
        s = self.s
        if self.reference is None:
            return
        direction = (
            self.reference.direction if self.weighed is None else self.weighed.astype(np.float32)
        )
        strength = s.coefficient if s.factors is None else float(np.mean(np.asarray(s.factors)))
        self.objective.weights = weigh(
            self.model, self.examples, s.token_weights, s.layer, direction, strength
        )

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
                    self.weighed,
                )
            )

    def _coefficients(self, epoch: int, n: int, which: int) -> Float64Array:
        """Strengths of n examples, float64 [n]: the one coefficient, or factors drawn for this
        epoch. which: 1 for training; 2 for validation, whose caller always passes epoch 0.
        """
        if self.s.factors is None:
            return np.full(n, self.s.coefficient)
        rng = np.random.default_rng([self.s.seed, which, epoch])
        return np.asarray(rng.choice(np.asarray(self.s.factors), n))

    def _step(self, epoch: int, batch: IntArray, coefficients: Float64Array, lr: float) -> None:
        some, refresh = [self.examples[i] for i in batch], self.s.refresh
        if refresh is not None and self.adam.steps and self.adam.steps % refresh == 0:
            self.weighed = self.adam.vector.copy()
            self._weigh()
        losses, gradients = self.objective(
            some, self.adam.vector.astype(np.float32), coefficients[batch]
        )
        assert gradients is not None
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
        self.adam = adam  # the step is complete; a checkpoint takes the curve up to it

    def _held_out_loss(self, vector: Float64Array) -> float:
        alike = Objective(self.log_probs, self.s.phi, self.s.reduction)
        losses, _ = alike(
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
            except BaseException:  # KeyboardInterrupt too: finished steps are kept
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
        """The chosen epoch. NTP: the least validation loss. PO: the best match score among the
        epochs whose loss is within one phi of the least. Ties go to the earlier epoch. Without
        validation examples: the last one.
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
        direction: Any = self.vectors[epoch]  # SteeringVector rounds it to float32
        vector = SteeringVector(direction, s.layer, method=s.loss, meta=meta)
        return Training(
            vector,
            [c["loss"] for c in self.curve],
            self.validation,
            self.curve,
            np.array(self.vectors),
            epoch,
            s,
            self._token_weights(),
        )

    def _token_weights(self) -> list[Float64Array]:
        if self.s.phi is not None:
            return []
        weights = self.objective.weights
        return [
            weights[e].copy() if weights else np.ones(len(e.winning.response))
            for e in self.examples
        ]


def _train(
    model: Model,
    examples: Examples,
    validation: Examples | None,
    settings: Settings,
    batch_tokens: int | None,
    checkpoint: PathLike | None,
    checkpoint_every: int,
    progress: ProgressLike,
    reference: SteeringVector | None = None,
) -> Training:
    settings = settings.check(model)
    return _Trainer(
        model, examples, validation, settings, batch_tokens, checkpoint, checkpoint_every, reference
    ).run(progress)


def train_ntp(
    model: Model,
    examples: Examples,
    *,
    layer: int,
    validation: Examples | None = None,
    coefficient: float = 1.0,
    factors: Factors = None,
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
    token_weights: str = "uniform",
    reference: SteeringVector | None = None,
    refresh: int | None = None,
    batch_tokens: int | None = None,
    checkpoint: PathLike | None = None,
    checkpoint_every: int = 20,
    progress: ProgressLike = True,
) -> Training:
    """Trains a vector at resid_pre of `layer` with the NTP loss (docs/method.md section 2) and
    returns a Training, with `.vector` (a SteeringVector) and `.losses`.

    examples: as in `ntp_loss`, for instance of `vs.steering.training_data`. validation: more; the
    epoch of least validation loss is chosen (without any: the last). coefficient: each example is
    steered by coefficient * sign. factors: strengths instead, one drawn for every example and
    epoch, "authors" for 2, 4, ..., 20; validation keeps one draw. epochs: passes over the examples.
    batch_size: examples of one step. lr: the first epoch's rate; an epoch's is lr (1 - epoch /
    epochs). optimizer: "adamw" or "adam" (weight_decay differs). clip: largest norm of a gradient,
    or None. init: standard deviation of the initial vector. seed: of init, order and factors.
    limit, reduction: as in `ntp_loss`. token_weights: "uniform", "effect", "exchange" or
    "attention", how much each token of a response counts (`token_weights`, docs/token-weights.md).
    reference: the SteeringVector under which they are computed (default: the difference in means of
    the examples' prompts). refresh: compute them again under the trained vector every `refresh`
    steps. batch_tokens: tokens of a device batch (default: as memory allows); results are
    bit-identical whatever it is. checkpoint: a file, written every `checkpoint_every` steps, after
    each epoch and on interruption; a call with the same settings goes on from it with bit-identical
    results.
    Raises ValueError before any work for bad examples or settings, and a checkpoint of others.
    """
    shared = (layer, None, coefficient, factors, epochs, batch_size, lr, weight_decay, clip)
    ours = (optimizer, seed, init, limit, reduction, token_weights, refresh)
    return _train(
        model,
        examples,
        validation,
        Settings("ntp", *shared, *ours),
        batch_tokens,
        checkpoint,
        checkpoint_every,
        progress,
        reference,
    )


def train_po(
    model: Model,
    examples: Examples,
    *,
    layer: int,
    phi: float = 2e-2,
    validation: Examples | None = None,
    coefficient: float = 1.0,
    factors: Factors = None,
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
    checkpoint: PathLike | None = None,
    checkpoint_every: int = 20,
    progress: ProgressLike = True,
) -> Training:
    """Trains a vector at resid_pre of `layer` with the PO loss (docs/method.md section 2) and
    returns a Training, with `.vector` (a SteeringVector) and `.losses`.

    examples: as in `po_loss`, with winning and losing responses. phi: above 0, the factor of the PO
    loss and the tolerance of the choice: of the epochs whose validation loss is within one phi of
    the least, the one with the best match score is chosen, the share of the tokens of winning
    responses that the steered model predicts greedily. validation: more examples (without any, the
    last epoch is chosen). coefficient, factors, epochs, batch_size (examples of one step), lr,
    weight_decay, clip, optimizer, seed, init (standard deviation of the initial vector), limit
    (tokens of a response that are summed), batch_tokens, checkpoint, checkpoint_every (steps) and
    progress: as in `train_ntp`, with the same defaults.
    Raises ValueError before any work for bad examples or settings, phi <= 0 included, and a
    checkpoint of others.
    """
    settings = Settings(
        loss="po",
        layer=layer,
        phi=phi,
        coefficient=coefficient,
        factors=factors,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        clip=clip,
        optimizer=optimizer,
        seed=seed,
        init=init,
        limit=limit,
    )
    return _train(
        model, examples, validation, settings, batch_tokens, checkpoint, checkpoint_every, progress
    )
