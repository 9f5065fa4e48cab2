"""Vectors of one model side by side: what each does both ways, how alike they are, and whether they
work through the same circuit (method.md sections 2 and 5).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..inputs.prompt_pair import PromptPair, magnitudes
from ..inputs.vectors import SteeringVector
from ..judge import Rate
from .losses import check_vector

#: Prompts of one side whose responses become samples of the circuits' part.
SAMPLES = 16
SIDES = {"harmful": -1, "harmless": 1}


@dataclass(frozen=True)
class ComparedVector:
    """One row: the strengths it was used with and both rates. circuit: a Circuit, or None where
    circuits were not compared.
    """

    name: str
    coefficient: tuple[float, float]  # (plus, minus)
    norm: float  # as it was used
    harmless: Rate
    harmful: Rate
    circuit: Any = None
    n_samples: int = 0  # whose circuit it is
    # share of its edges by the type of the input they end in
    distribution: Mapping[str, float] | None = None


@dataclass
class Comparison:
    """What `compare` found. table[name] is a row; cosines, overlaps and cross are [n, n] in the
    order of `names`, NaN where there is nothing to say.

    overlaps: |both| / the smaller one. cross[i, j]: faithfulness of the circuit of i under vector
    j, on j's samples. notes: what was left out, and why.
    """

    rows: list[ComparedVector]
    unsteered: tuple[Rate, Rate]  # harmless, harmful
    cosines: np.ndarray
    overlaps: np.ndarray
    cross: np.ndarray
    setting: dict
    notes: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        return [row.name for row in self.rows]

    def __getitem__(self, name: str) -> ComparedVector:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no vector {name!r}; there are: {', '.join(self.names)}")

    def __iter__(self) -> Iterator[ComparedVector]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return self.to_markdown()

    def to_dict(self) -> dict:
        """For JSON; NaN becomes None, circuits their edges' names."""
        plain = lambda m: [[None if np.isnan(x) else float(x) for x in row] for row in m]
        rows = {
            r.name: {
                "coefficient": list(r.coefficient),
                "norm": r.norm,
                "harmless": asdict(r.harmless),
                "harmful": asdict(r.harmful),
                "n_samples": r.n_samples,
                "circuit_size": None if r.circuit is None else len(r.circuit),
                "distribution": None if r.distribution is None else dict(r.distribution),
            }
            for r in self.rows
        }
        unsteered = {"harmless": asdict(self.unsteered[0]), "harmful": asdict(self.unsteered[1])}
        return {
            "setting": self.setting,
            "vectors": rows,
            "unsteered": unsteered,
            "cosines": plain(self.cosines),
            "overlaps": plain(self.overlaps),
            "cross_faithfulness": plain(self.cross),
            "notes": list(self.notes),
        }

    def to_markdown(self) -> str:
        """Rates, then one table each for cosines, circuits, overlaps and cross-faithfulness, as far
        as there is something in them.
        """
        rate = lambda r: f"{r.asr:.2f} [{r.low:.2f}, {r.high:.2f}]"
        both = lambda a, b, what: f"{getattr(a, what):.2f} / {getattr(b, what):.2f}"
        s = self.setting
        lines = [
            (
                f"Harmless prompts under +a ({s['n_harmless']}), harmful prompts under -a"
                f" ({s['n_harmful']}); {s['max_new_tokens']} new tokens; judge of harmful answers:"
                f" {s['judge']}."
            ),
            "",
            "| vector | layer | norm | +a / -a | harmless ASR | harmful ASR | ended | repetition |",
            "|:---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for r, layer in zip(self.rows, s["layers"]):
            lines.append(
                f"| {r.name} | {layer} | {r.norm:.3g} | {r.coefficient[0]:g} / {r.coefficient[1]:g}"
                f" | {rate(r.harmless)} | {rate(r.harmful)} |"
                f" {both(r.harmless, r.harmful, 'ended')} |"
                f" {both(r.harmless, r.harmful, 'repetition')} |"
            )
        a, b = self.unsteered
        lines.append(
            f"| none | | | | {rate(a)} | {rate(b)} | {both(a, b, 'ended')} |"
            f" {both(a, b, 'repetition')} |"
        )
        lines += self._square("cosine", self.cosines)
        if any(r.distribution for r in self.rows):
            kinds = list(next(r.distribution for r in self.rows if r.distribution))
            lines += [
                "",
                "| circuit of | samples | edges | " + " | ".join(kinds) + " |",
                "|:---|---:|---:|" + "---:|" * len(kinds),
            ]
            for r in self.rows:
                if r.distribution:
                    lines.append(
                        f"| {r.name} | {r.n_samples} | {len(r.circuit)} | "
                        + " | ".join(f"{100 * r.distribution[k]:.1f} %" for k in kinds)
                        + " |"
                    )
        lines += self._square("overlap", self.overlaps) + self._square(
            "faithfulness of row's circuit under", self.cross
        )
        return "\n".join(
            lines + [""] * bool(self.notes) + [f"Left out: {note}." for note in self.notes]
        )

    def _square(self, title: str, matrix: Float64Array) -> list[str]:
        if np.isnan(matrix).all():
            return []
        cell = lambda x: "-" if np.isnan(x) else f"{x:.2f}"
        return [
            "",
            f"| {title} | " + " | ".join(self.names) + " |",
            "|:---|" + "---:|" * len(self.names),
            *(
                f"| {name} | " + " | ".join(map(cell, row)) + " |"
                for name, row in zip(self.names, matrix)
            ),
        ]

    def plot(self, path: PathLike | None=None) -> Figure:
        """Rates as bars with their intervals, and the cosines (and, where compared, overlaps) as
        maps: a matplotlib Figure, saved to `path` if given.
        """
        maps = [
            (title, m)
            for title, m in (
                ("cosine", self.cosines),
                ("circuits' overlap", self.overlaps),
                ("cross-faithfulness", self.cross),
            )
            if not np.isnan(m).all()
        ]
        figure = new_figure(4.2 + 2.9 * len(maps), 3.2)
        axes = figure.subplots(
            1, 1 + len(maps), gridspec_kw={"width_ratios": [1.4] + [1] * len(maps)}, squeeze=False
        )[0]
        at = np.arange(len(self.rows))
        for shift, side, colour in ((-0.2, "harmless", "#4878a8"), (0.2, "harmful", "#c8643c")):
            rates = [getattr(r, side) for r in self.rows]
            asr = np.array([r.asr for r in rates])
            spread = np.abs(np.array([[r.low for r in rates], [r.high for r in rates]]) - asr)
            axes[0].bar(
                at + shift,
                asr,
                0.38,
                yerr=spread,
                capsize=2,
                color=colour,
                label=f"{side}, {'+' if side == 'harmless' else '-'}a",
            )
        axes[0].set_xticks(at, self.names)
        axes[0].set_ylim(0, 1.05)
        axes[0].set_ylabel("attack success rate")
        axes[0].legend(frameon=False, fontsize=8)
        axes[0].spines[["top", "right"]].set_visible(False)
        for ax, (title, matrix) in zip(axes[1:], maps):
            ax.imshow(matrix, vmin=min(0.0, np.nanmin(matrix)), vmax=1, cmap="Blues")
            ax.set_title(title, fontsize=9)
            ax.set_xticks(at, self.names)
            ax.set_yticks(at, self.names)
            for i, j in np.ndindex(matrix.shape):
                if not np.isnan(matrix[i, j]):
                    ax.text(
                        j,
                        i,
                        f"{matrix[i, j]:.2f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if matrix[i, j] > 0.6 else "black",
                    )
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def _strengths(coefficient: Coefficient, names: Sequence[str]) -> dict[str, tuple[float, float]]:
    if not isinstance(coefficient, Mapping):
        return dict.fromkeys(names, magnitudes(coefficient))
    missing = [name for name in names if name not in coefficient]
    if missing:
        raise ValueError(
            f"coefficient names no strength of {missing[0]!r}: give one for each vector, or one"
            " for all"
        )
    return {name: magnitudes(coefficient[name]) for name in names}


class _Circuits:
    """Samples, scores and circuits of every vector, by `vs.patching` and `vs.circuits`."""

    def __init__(self, model: Model, vectors: Mapping[str, SteeringVector], strengths: Mapping[str, tuple[float, float]], prompts: list[list[int]], side: str, options: dict[str, Any]) -> None:
        self.model, self.vectors, self.options = model, vectors, options
        self.prompts = prompts[: options["n_samples"]]
        self.coefficients = {
            name: SIDES[side] * strengths[name][side == "harmful"] for name in vectors
        }

    def find(self, name: str, notes: list[str]) -> tuple[Circuit | None, Samples]:
        """(circuit or None, samples)."""
        from .. import circuits, patching

        vector, a, o = self.vectors[name], self.coefficients[name], self.options
        samples = patching.make_samples(
            self.model,
            self.prompts,
            vector,
            a,
            responses="steered",
            max_new_tokens=o["max_new_tokens"],
            keep="flipped",
            judge=o["judge"],
            progress=False,
        )
        if not len(samples):
            notes.append(
                f"the circuit of {name}, none of whose {len(self.prompts)} prompts it flips"
            )
            return None, samples
        scores = patching.attribute(
            self.model, samples, vector, a, clean="steered", steps=o["steps"], progress=False
        )
        if o["size"] is not None:
            return scores.circuit(min(o["size"], scores.graph.n_edges)), samples
        try:
            return (
                circuits.minimum_faithful(
                    scores, self.model, samples, vector, a, threshold=o["threshold"], progress=False
                ),
                samples,
            )
        except ValueError as error:  # no size reaches the threshold
            notes.append(
                f"the minimum faithful circuit of {name} ({error}); its strongest tenth is shown"
            )
            return scores.circuit(max(1, scores.graph.n_edges // 10)), samples

    def under(self, name: str, samples: Samples, others: Sequence[Circuit]) -> list[float]:
        """Faithfulness of many circuits under one vector, on its samples."""
        from .. import circuits

        results = circuits.evaluate(
            others, self.model, samples, self.vectors[name], self.coefficients[name], progress=False
        )
        return [r["logit_diff"].faithfulness for r in results]


def compare(
    model: Model,
    vectors: Mapping[str, SteeringVector],
    harmful: Prompts,
    harmless: Prompts,
    coefficient: Coefficient=1.0,
    *,
    normalize: bool = True,
    max_new_tokens: int = 64,
    judge: Judge | None=None,
    min_words: int | str | None="auto",
    circuits: bool | str="auto",
    side: str = "harmful",
    n_samples: int = SAMPLES,
    size: int | None = None,
    threshold: float = 0.85,
    steps: int = 10,
    batch_size: int | None = None,
    progress: ProgressLike=True,
) -> Comparison:
    """Vectors of one model, for example {"dim": v, "ntp": u, "po": w}: ASR both ways with ended and
    repetition, pairwise cosines, overlaps of their circuits, each circuit's faithfulness under the
    other vectors, and the edges by type.

    harmful, harmless: prompts (texts or token lists). coefficient: a, (plus, minus), or a dict with
    one of these for each vector; harmless prompts are steered by +plus, harmful ones by -minus.
    normalize: every vector gets the first one's norm (how the method uses trained vectors). judge,
    min_words: as in `freezing.ablation_table`.
    circuits: False, or True or "auto": of all vectors, compared where they share a layer (`notes`
      says what was left out). side: whose first `n_samples` prompts are steered for them; flipped
      ones are kept. size: edges of every circuit; None: the minimum faithful one at `threshold`.
      steps: of the integrated gradients.
    Returns Comparison. Raises ValueError before any work for an empty dict, vectors of another
    width or layer or zero, empty lists, bad numbers.
    """
    if not isinstance(vectors, Mapping) or not vectors:
        raise ValueError(
            'vectors must name at least one SteeringVector, for example {"dim": v, "ntp": u}'
        )
    for vector in vectors.values():
        check_vector(model, vector)
    vectors = {str(name): v for name, v in vectors.items()}
    names, first = list(vectors), next(iter(vectors.values()))
    strengths = _strengths(coefficient, names)
    if side not in SIDES:
        raise ValueError(f"side={side!r}: 'harmful' or 'harmless'")
    if circuits not in (True, False, "auto"):
        raise ValueError(f"circuits={circuits!r}: True, False or 'auto'")
    options = {
        "n_samples": require_int(n_samples, "n_samples", 1),
        "size": None if size is None else require_int(size, "size", 1),
        "threshold": threshold,
        "steps": require_int(steps, "steps", 1),
        "max_new_tokens": max_new_tokens,
        "judge": judge,
    }
    if normalize:
        vectors = {
            name: v if v is first else v.with_norm(first.norm) for name, v in vectors.items()
        }
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size)
    notes, layers = [], {v.layer for v in vectors.values()}
    with_circuits = circuits is not False
    if with_circuits and len(layers) > 1:
        notes.append(
            f"overlaps and cross-faithfulness between layers {sorted(layers)}: circuits of"
            " different layers are of different graphs"
        )

    n = len(names)
    cosines, overlaps, cross = (np.full((n, n), np.nan) for _ in range(3))
    for i, j in np.ndindex(n, n):
        cosines[i, j] = 1.0 if i == j else vectors[names[i]].cosine(vectors[names[j]])
    with Progress(progress, len(pair) * (n + 1) + 2 * n * with_circuits, "compare") as bar:
        base = pair.rates(pair.run(), judge, min_words)
        bar.step(len(pair))
        rates = {}
        for name, vector in vectors.items():
            rates[name] = pair.rates(pair.run(vector, *strengths[name]), judge, min_words)
            bar.step(len(pair))
        found, samples = dict.fromkeys(names), dict.fromkeys(names, ())
        if with_circuits:
            finder = _Circuits(
                model,
                vectors,
                strengths,
                pair.harmful_rows if side == "harmful" else pair.harmless_rows,
                side,
                options,
            )
            for name in names:
                found[name], samples[name] = finder.find(name, notes)
                bar.step()
            for i, j in np.ndindex(n, n):
                a, b = found[names[i]], found[names[j]]
                if a is not None and b is not None and a.graph == b.graph and len(a) and len(b):
                    overlaps[i, j] = a.overlap(b)
            for j, name in enumerate(names):
                same = [
                    i
                    for i in range(n)
                    if found[name] is not None
                    and found[names[i]] is not None
                    and found[names[i]].graph == found[name].graph
                ]
                if same:
                    cross[same, j] = finder.under(
                        name, samples[name], [found[names[i]] for i in same]
                    )
                bar.step()
    rows = [
        ComparedVector(
            name,
            strengths[name],
            vectors[name].norm,
            rates[name]["harmless"],
            rates[name]["harmful"],
            found[name],
            len(samples[name]),
            None if found[name] is None else found[name].distribution(),
        )
        for name in names
    ]
    setting = {
        "layers": [v.layer for v in vectors.values()],
        "methods": [v.method for v in vectors.values()],
        "normalize": bool(normalize),
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "judge": "substring" if judge is None else type(judge).__name__,
        "side": side,
        "steps": steps,
        "threshold": threshold,
        "size": size,
        "vector_hashes": [digest(v.direction) for v in vectors.values()],
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        **provenance(model),
    }
    return Comparison(
        rows, (base["harmless"], base["harmful"]), cosines, overlaps, cross, setting, notes
    )
