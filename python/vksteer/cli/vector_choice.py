"""Finding a steering vector where no --vector is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..runtime.model import Model
    from ..steering.candidates import Candidates


def find_vector(
    model: Model, train: Any, validation: Any, criterion: str, out: Path | None, show: bool
) -> SteeringVector:
    """The difference in means that the rule chooses; the candidates go to candidates.md."""
    from .. import steering

    candidates = steering.difference_in_means(model, *train, progress=show)
    named = zip(candidates.positions, candidates.position_texts)
    positions = ", ".join(f"{p} {t!r}" for p, t in named)
    print(
        f"Candidates: {len(candidates.positions)} positions ({positions}) x"
        f" {model.config.n_layers} layers"
    )
    harmful, harmless = validation
    try:
        vector = candidates.select(harmful, harmless, criterion=criterion, progress=show)
    finally:
        if out is not None and candidates.table is not None:
            removed = "\n".join(f"- {r}" for r in candidates.rejected)
            (out / "candidates.md").write_text(
                f"{candidates.table.to_markdown()}\n\nRemoved by a filter:\n\n{removed}\n",
                encoding="utf-8",
            )
    _show_choice(candidates, vector, "bypass_ablation" if criterion == "arditi" else "bypass")
    return vector


def _show_choice(candidates: Candidates, vector: SteeringVector, score: str) -> None:
    """Prints the refusal tokens, the chosen candidate and its scores."""
    assert candidates.table is not None  # select fills it
    chosen = vector.meta["selection"]
    n_positions, n_layers = candidates.vectors.shape[:2]
    print(f"Refusal tokens: {candidates.table.refusal_tokens}")
    print(
        f"Chosen: layer {vector.layer}, position {vector.position} ({score}"
        f" {chosen[score]:.2f}, induce {chosen['induce']:.2f}, KL {chosen['kl']:.3f};"
        f" {len(candidates.rejected)} of {n_positions * n_layers} candidates removed"
        " by filters)\n"
    )
