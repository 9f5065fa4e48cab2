"""The result of a training, as numbers, table and picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.display import Table
from ..base.figures import new_figure
from ..base.provenance import digest
from ..base.types import Float64Array, PathLike
from ..inputs.vectors import SteeringVector
from .losses import check_number
from .settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Training(Table):
    """The result of a training.

    vector: of the chosen epoch, with provenance; its norm is the trained one (see `normalized_to`).
    losses: mean loss of each step. validation: for each epoch {"epoch", "loss", "match"}, where
    match is None for NTP and where the loss ruled the epoch out; empty without validation examples.
    curve: for each step {"step", "epoch", "lr", "loss", "gradient", "norm"}: the norm of the
    gradient before clipping, and that of the vector after the step. vectors: after each epoch,
    float64 [epochs, D]. epoch: the chosen one, counted from 0. token_weights: of NTP,
    for each example float64 [tokens summed], those of the last steps.
    """

    vector: SteeringVector
    losses: list[float]
    validation: list[dict[str, Any]]
    curve: list[dict[str, float]]
    vectors: Float64Array
    epoch: int
    settings: Settings
    token_weights: list[Float64Array] = field(default_factory=list)

    def normalized_to(self, norm: SteeringVector | float) -> SteeringVector:
        """The vector with a given norm, or with that of another SteeringVector: the method uses
        trained vectors with the norm of the DIM vector.
        """
        return self.vector.with_norm(
            norm.norm if isinstance(norm, SteeringVector) else check_number(norm, "norm")
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: settings, losses, validation and curve. `vector.save` saves the vector."""
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
        """A table with one row for each epoch: learning rate, losses, match and norm."""
        lines = [
            "| epoch | lr | training loss | validation loss | match | norm | chosen |",
            "|---:|---:|---:|---:|---:|---:|:---|",
        ]

        def number(x: float | None) -> str:
            return "" if x is None else f"{x:.4f}"

        for e in range(len(self.vectors)):
            steps = [c for c in self.curve if c["epoch"] == e]
            v = self.validation[e] if self.validation else {}
            lines.append(
                f"| {e} | {steps[0]['lr']:.4g} | {np.mean([c['loss'] for c in steps]):.4f} |"
                f" {number(v.get('loss'))} | {number(v.get('match'))} | {steps[-1]['norm']:.3f} |"
                f" {'yes' if e == self.epoch else ''} |"
            )
        return "\n".join(lines)

    def plot(self, path: PathLike | None = None) -> Figure:
        """The loss by step, and the validation loss at the end of each epoch: a matplotlib Figure,
        saved to `path` if one is given. Raises ImportError without matplotlib.
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
