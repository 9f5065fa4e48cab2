"""Do vectors of several kinds of prompts point the same way? Cosines of every pair of them.

Source: Braun (arXiv 2602.17881 and 2505.22637), who compares the vectors of several ways to put the
same question.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.arrays import as_numpy
from ..base.checks import require_int
from ..base.display import Table
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Array, Float64Array, ProgressLike, Prompts
from ..inputs.vectors import SteeringVector
from .screening import activations_at, checked_pairs
from .separation import equal_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.model import Model


class Cosines(Table):
    """Cosines of the angles between k vectors.

    names: k names. values: float64 [k, k], symmetric with ones on the diagonal. vectors: {name:
    SteeringVector}, those that were steering vectors or were made from prompts. meta: provenance.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        values: Float64Array,
        vectors: Mapping[str, SteeringVector],
        meta: dict[str, Any],
    ) -> None:
        self.names, self.values, self.vectors, self.meta = names, values, dict(vectors), meta

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, pair: tuple[str, str]) -> float:
        """The cosine of two vectors by their names. Raises KeyError for an unknown one."""
        for name in pair:
            if name not in self.names:
                raise KeyError(f"there is no vector {name!r}: {', '.join(self.names)}")
        first, second = (self.names.index(name) for name in pair)
        return float(self.values[first, second])

    @property
    def lowest(self) -> tuple[str, str, float]:
        """The two vectors that agree least and their cosine; of equal ones the first."""
        rows, columns = np.triu_indices(len(self), 1)
        at = int(np.argmin(self.values[rows, columns]))
        first, second = self.names[rows[at]], self.names[columns[at]]
        return first, second, self[first, second]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"names", "values" as lists, "meta"}."""
        return {"names": list(self.names), "values": self.values.tolist(), "meta": self.meta}

    def to_markdown(self) -> str:
        """The matrix as a table, and the pair that agrees least."""
        first, second, value = self.lowest
        shown = [name.replace("|", "\\|") for name in self.names]
        return "\n".join(
            [
                "| cosine | " + " | ".join(shown) + " |",
                "|:---" + "|---:" * len(self) + "|",
                *(
                    f"| {name} | " + " | ".join(f"{x:.3f}" for x in row) + " |"
                    for name, row in zip(shown, self.values, strict=True)
                ),
                "",
                f"Least alike: {first} and {second} ({value:.3f}).",
            ]
        )

    def __repr__(self) -> str:
        return self.to_markdown()

    def plot(self, ax: Axes | None = None) -> Figure:
        """The matrix in colours from -1 to 1, each cell with its number. Returns the figure; raises
        ImportError, naming what to install, without matplotlib.
        """
        if ax is None:
            size = 1.8 + 0.7 * len(self)
            ax = new_figure(size + 0.8, size).subplots()
        image = ax.imshow(self.values, cmap="RdBu_r", vmin=-1, vmax=1)
        for (i, j), value in np.ndenumerate(self.values):
            colour = "white" if abs(value) > 0.6 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="small")
        names = [name.replace("$", r"\$") for name in self.names]
        ax.set_xticks(range(len(self)), names, rotation=45, ha="right")
        ax.set_yticks(range(len(self)), names)
        ax.set_title("Cosines between vectors")
        figure: Any = ax.figure
        figure.colorbar(image, ax=ax)
        result: Figure = figure
        return result


def cosines(vectors: Mapping[str, SteeringVector | Array]) -> Cosines:
    """The cosine of every pair of named vectors, in float64.

    vectors: {name: SteeringVector or numbers [D]}, at least two of one width; steering vectors of
    one layer, since the streams of two layers do not share their directions.
    Raises ValueError for fewer than two, other widths or layers, and vectors that are zero or not
    finite.
    """
    rows = []
    kept = {name: v for name, v in vectors.items() if isinstance(v, SteeringVector)}
    for name, given in vectors.items():
        numbers = given.direction if isinstance(given, SteeringVector) else as_numpy(given)
        row = np.asarray(numbers, dtype=np.float64)
        if row.ndim != 1 or not np.isfinite(row).all() or not row.any():
            raise ValueError(f"vector {name!r} must be numbers [D], finite and not all zero")
        rows.append(row)
    _check(tuple(vectors), rows, kept)
    return Cosines(tuple(vectors), _matrix(np.stack(rows)), kept, {})


def cosines_of_prompts(
    model: Model,
    kinds: Mapping[str, tuple[Prompts, Prompts]],
    *,
    layer: int,
    position: int = -1,
    progress: ProgressLike = True,
) -> Cosines:
    """The cosines between the difference-in-means vectors of several kinds of prompts.

    kinds: {name: (positive, negative)}, pairs of prompts in order as in `screen`, for example the
    same questions put in several ways; at least two kinds. layer: whose input is compared
    (`blocks.{layer}.hook_resid_pre`). position: negative, counted back from each prompt's end.
    The result's `.vectors` are the steering vectors of the kinds.
    Raises ValueError before any work, naming the kind, for what `screen` refuses, and for a kind
    whose two means are equal.
    """
    at, wanted = require_int(position, "position"), require_int(layer, "layer")
    checked = {}
    for name, sides in dict(kinds).items():
        try:
            positive, negative = sides
            checked[name] = checked_pairs(model, positive, negative, [wanted], [at])[0]
        except (TypeError, ValueError) as error:
            raise ValueError(f"kind {name!r}: {error}") from None
    if len(checked) < 2:
        raise ValueError("kinds: name at least two kinds of prompts")
    rows, vectors = [], {}
    with Progress(progress, 2 * sum(len(pairs[0]) for pairs in checked.values()), "kinds") as bar:
        for name, pairs in checked.items():
            pos, neg = (
                activations_at(model, side, [wanted], [at], bar)[:, 0, 0].astype(np.float64)
                for side in pairs
            )
            if equal_means(pos, neg):
                raise ValueError(f"kind {name!r}: both means are equal, there is no vector")
            rows.append(pos.mean(axis=0) - neg.mean(axis=0))
            meta = provenance(model, prompts_hash=digest(*pairs))
            vectors[name] = SteeringVector(
                rows[-1], wanted, position=at, method=f"dim {name}", meta=meta
            )
    meta = provenance(
        model,
        layer=wanted,
        position=at,
        prompts_hash={name: digest(*pairs) for name, pairs in checked.items()},
    )
    return Cosines(tuple(checked), _matrix(np.stack(rows)), vectors, meta)


def _check(
    names: tuple[str, ...], rows: list[Array], vectors: Mapping[str, SteeringVector]
) -> None:
    if len(names) < 2:
        raise ValueError("cosines compare at least two vectors")
    widths = {name: len(row) for name, row in zip(names, rows, strict=True)}
    layers = {name: vector.layer for name, vector in vectors.items()}
    for what, found in (("width", widths), ("layer", layers)):
        if len(set(found.values())) > 1:
            said = ", ".join(f"{name!r} {value}" for name, value in found.items())
            raise ValueError(f"cosines need vectors of one {what}: {said}")


def _matrix(rows: Float64Array) -> Float64Array:
    """[k, k] cosines of the rows."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    values: Float64Array = np.clip(unit @ unit.T, -1.0, 1.0)
    values += values.T.copy()
    values /= 2
    np.fill_diagonal(values, 1.0)
    return values
