"""The result of activation scaling: factors, what they do, edits, files and pictures."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_number, require_int
from ..base.figures import new_figure
from ..base.types import Array, Float64Array, PathLike
from ..runtime.edits import DynamicScale, Scale
from . import files
from .objective import Measured, Objective
from .task import Weights, make_task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..runtime.model import Model

#: Parameters smaller than this count as zero.
ZERO = 1e-3


@dataclass(frozen=True, eq=False)
class Scaling:
    """Factors that turn the model towards answer a (beta = +1) or b (beta = -1).

    parameters: float64 [sites, L, positions] (`alpha`), or dynamic [sites, L, D] (`w`). sites:
    names without their layer. losses: float64 [steps]. effectiveness: share, over prompts and both
    signs, where the more probable of the two answers is the one that beta asks for. differences:
    mean logit(a) - logit(b) at beta = -1, 0 and +1. faithfulness: mean KL of the distribution
    without the two answers from the unscaled model's, nats; 0 is best. These three are NaN until
    they are measured. tokens: texts of the first prompt's tokens, for the map. first: the first
    position that is scaled. meta: provenance, settings and notes.
    """

    parameters: Float64Array
    sites: tuple[str, ...]
    dynamic: bool
    first: int = 1
    losses: Float64Array = field(default_factory=lambda: np.zeros(0))
    effectiveness: float = np.nan
    differences: tuple[float, float, float] = (np.nan, np.nan, np.nan)
    faithfulness: float = np.nan
    tokens: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    # -- the parameters ----------------------------------------------------------------------------

    @property
    def alpha(self) -> Float64Array:
        """float64 [sites, L, positions]. AttributeError for the dynamic form, which has `w`."""
        if self.dynamic:
            raise AttributeError("a dynamic scaling has w [sites, L, D], not alpha")
        return self.parameters

    @property
    def w(self) -> Float64Array:
        """float64 [sites, L, D]. AttributeError for the static form, which has `alpha`."""
        if not self.dynamic:
            raise AttributeError("a scaling of positions has alpha [sites, L, positions], not w")
        return self.parameters

    @property
    def n_free(self) -> int:
        """Parameters that were trained: without position 0 where it was masked."""
        n = self.parameters.shape[2] - (0 if self.dynamic else self.first)
        total: int = self.parameters.shape[0] * self.parameters.shape[1] * n
        return total

    @property
    def minimality(self) -> float:
        """Mean |parameter|, over those that were trained."""
        return float(np.abs(self.parameters).sum() / self.n_free)

    @property
    def l0(self) -> int:
        """Parameters of at least 1e-3 in size."""
        return int((np.abs(self.parameters) >= ZERO).sum())

    @property
    def small(self) -> float:
        """Share of the trained parameters below 1e-3 in size."""
        return 1 - self.l0 / self.n_free

    @property
    def notes(self) -> list[str]:
        """What to know about these sites and answers."""
        return list(self.meta.get("notes", []))

    def strength(self) -> Float64Array:
        """float64 [sites, L, positions]: |alpha|; or dynamic [sites, L, 1]: the norm of each w."""
        if self.dynamic:
            return np.asarray(np.linalg.norm(self.parameters, axis=2, keepdims=True))
        return np.abs(self.parameters)

    def top(self, n: int = 10) -> list[tuple[str, int, int | None, float]]:
        """The n strongest: (site, layer, position or None, alpha or norm of w), strongest first."""
        size = self.strength()
        order = np.argsort(-size, axis=None, kind="stable")[: require_int(n, "n", 1)]
        out = []
        for place in order:
            s, l, i = (int(x) for x in np.unravel_index(place, size.shape))
            value = float(size[s, l, 0] if self.dynamic else self.parameters[s, l, i])
            out.append((self.sites[s], l, None if self.dynamic else i, value))
        return out

    # -- in use ------------------------------------------------------------------------------------

    def edits(self, beta: float) -> list[Scale | DynamicScale]:
        """Edits for `run`, `generate`, `gradients` and whatever takes edits. beta: the dial, from
        -1 (towards b) over 0 (nothing changes) to +1 (towards a).

        In the static form each factor belongs to one position, counted from the row's first token,
        and tokens beyond the trained length, decoded ones too, are left as they are. In the dynamic
        form every token is scaled, decoded ones too. Sites and layers without any factor get no
        edit. Raises ValueError unless beta is a finite number.
        """
        if not is_number(beta):
            raise ValueError(f"beta must be a finite number, not {beta!r}")
        found: list[Scale | DynamicScale] = []
        for s, site in enumerate(self.sites):
            for l, row in enumerate(self.parameters[s]):
                name = f"blocks.{l}.{site}"
                if not row.any():
                    continue
                if self.dynamic:
                    where = slice(self.first, None) if self.first else None
                    w = row.astype(np.float32)
                    found.append(DynamicScale(name, w, float(beta), positions=where))
                else:
                    factors = (1 + float(beta) * row[self.first :])[:, None].astype(np.float32)
                    listed = list(range(self.first, len(row)))
                    found.append(Scale(name, factors, positions=listed))
        return found

    def evaluate(self, model: Model, prompts: Any, a: Any, b: Any) -> Scaling:
        """The same factors with effectiveness, differences and faithfulness measured on these
        prompts. Raises ValueError as `train`, and for prompts of another length or a model of
        other sizes.
        """
        task = make_task(model, prompts, a, b, self.sites, self.dynamic, bool(self.first))
        if task.shape(model.config.d_model) != self.parameters.shape:
            raise ValueError(
                f"these factors have shape {list(self.parameters.shape)}; these prompts and this"
                f" model need {list(task.shape(model.config.d_model))}"
            )
        objective = Objective(model, task, Weights(1.0, 1.0, 0.0))
        return self.measured(objective, objective(self.parameters, gradient=False))

    def measured(self, objective: Objective, found: Measured) -> Scaling:
        """The same with the metrics of a measurement."""
        agree = found.differences * np.array([1.0, -1.0]) > 0
        plus, minus = found.differences.mean(axis=0)
        return replace(
            self,
            effectiveness=float(agree.mean()),
            differences=(float(minus), float(objective.before().mean()), float(plus)),
            faithfulness=float(found.divergences.mean()),
        )

    def prune(self, n: int, model: Model, prompts: Any, a: Any, b: Any) -> Scaling:
        """Only the n strongest factors (dynamic: vectors), the others exactly zero, with the
        metrics measured again on these prompts. Equal ones: the earlier site, layer, position.
        """
        size = self.strength()
        n = require_int(n, "n", 0)
        kept = np.zeros(size.size, bool)
        kept[np.argsort(-size, axis=None, kind="stable")[:n]] = True
        parameters = np.where(kept.reshape(size.shape), self.parameters, 0.0)
        meta = {**self.meta, "pruned_to": n}
        return replace(self, parameters=parameters, meta=meta).evaluate(model, prompts, a, b)

    # -- files and pictures ------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Writes a .safetensors or .npz file: one row `scale.{site}.{layer}` (float32) each, and
        the provenance. Raises ValueError for another ending.
        """
        facts = {
            "sites": list(self.sites),
            "dynamic": self.dynamic,
            "first": self.first,
            "losses": self.losses.tolist(),
            "effectiveness": self.effectiveness,
            "differences": list(self.differences),
            "faithfulness": self.faithfulness,
            "tokens": list(self.tokens),
            "meta": self.meta,
        }
        rows = {
            f"scale.{site}.{l}": self.parameters[s, l].astype(np.float32)
            for s, site in enumerate(self.sites)
            for l in range(self.parameters.shape[1])
        }
        files.save(path, rows, facts)

    @staticmethod
    def load(path: PathLike) -> Scaling:
        """Reads what `save` wrote. Raises ModelError for a file that is damaged or no scaling."""
        parameters, facts = files.load(path)
        return Scaling(
            parameters,
            tuple(facts["sites"]),
            bool(facts["dynamic"]),
            int(facts["first"]),
            np.array(facts["losses"], np.float64),
            float(facts["effectiveness"]),
            (*map(float, facts["differences"]),),  # type: ignore[arg-type]
            float(facts["faithfulness"]),
            tuple(facts["tokens"]),
            dict(facts["meta"]),
        )

    def _map(self) -> tuple[Array, float]:
        values = self.strength() if self.dynamic else self.parameters
        return values, float(np.abs(values).max()) or 1.0

    def plot(self) -> Figure:
        """A map of layers against positions for each site (dynamic: one column, the norms of w).
        Raises ImportError, naming what to install, without matplotlib.
        """
        values, size = self._map()
        _, L, n = values.shape
        figure = new_figure(max(4.0, len(self.sites) * (0.3 * n + 1.2)), max(3.0, 0.2 * L + 1))
        axes = figure.subplots(1, len(self.sites), squeeze=False)[0]
        for ax, site, part in zip(axes, self.sites, values, strict=True):
            image = ax.imshow(part, cmap="RdBu_r", vmin=-size, vmax=size, aspect="auto")
            if not self.dynamic:
                labels = self.tokens if len(self.tokens) == n else tuple(map(str, range(n)))
                ax.set_xticks(range(n), labels, rotation=90, fontsize=7)
            else:
                ax.set_xticks([])
            ax.set(ylabel="layer", title=site)
        figure.colorbar(image, ax=list(axes), label="|w|" if self.dynamic else "alpha")
        return figure

    def __repr__(self) -> str:
        kind = "dynamic" if self.dynamic else f"{self.parameters.shape[2]} positions"
        return (
            f"Scaling({', '.join(self.sites)}; {self.parameters.shape[1]} layers, {kind};"
            f" effectiveness {self.effectiveness:.3f}, faithfulness {self.faithfulness:.4f} nats,"
            f" mean size {self.minimality:.4f}, {self.l0} of {self.n_free} not zero)"
        )

    def _repr_html_(self) -> str:
        """The summary and the ten strongest factors."""
        lines = "".join(
            f"<tr><td>{html.escape(site)}</td><td>{layer}</td>"
            f"<td>{'' if i is None else html.escape(self._token(i))}</td><td>{value:.3f}</td></tr>"
            for site, layer, i, value in self.top(10)
        )
        names = ("site", "layer", "position", "|w|" if self.dynamic else "alpha")
        head = "".join(f"<th>{name}</th>" for name in names)
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{lines}</table>"

    def _token(self, i: int) -> str:
        return f"{i}: {self.tokens[i]}" if i < len(self.tokens) else str(i)
