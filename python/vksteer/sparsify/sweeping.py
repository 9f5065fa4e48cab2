"""Curves over sparsity: what steering still does when fewer and fewer dimensions are kept, for
every way to choose them (method.md section 8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..base.checks import require_int
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, fingerprint, provenance
from ..freezing import random_vector
from ..inputs.prompt_pair import AnswerStore, PromptPair, magnitudes
from ..inputs.vectors import SteeringVector
from ..judge import Rate
from .choosing import by_effect, by_gradient, by_magnitude, by_random, effects

TAUS = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5)
METHODS = ("gradient", "effect", "magnitude", "random")
FORMAT = "vksteer.sparsity_sweep"


@dataclass(frozen=True)
class SparsityRow:
    """One vector, one choice of dimensions. method: one of METHODS, "random direction" (dense, of
    the same norm) or "unsteered".
    """

    vector: str
    method: str
    tau: float | None  # of the gradient's row that k is taken from
    k: int  # dimensions set to zero
    sparsity: float  # k / D
    harmless: Rate  # under +a: low asr is a strong vector
    harmful: Rate  # under -a: high asr is a strong vector


class SparsitySweep:
    """The result of `sparsify.sweep`: rows in the order they were run; setting: what
    was run, for records.
    """

    def __init__(self, rows: list[SparsityRow], setting: dict):
        self.rows, self.setting = rows, setting

    def __iter__(self) -> Iterator[SparsityRow]:
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)

    def __repr__(self):
        return self.to_markdown()

    @property
    def vectors(self) -> list[str]:
        return list(dict.fromkeys(row.vector for row in self.rows if row.method != "unsteered"))

    def curve(self, vector: str, method: str) -> list[SparsityRow]:
        """The rows of one vector and method by rising sparsity. KeyError where there are none."""
        rows = sorted(
            (r for r in self.rows if (r.vector, r.method) == (vector, method)),
            key=lambda r: r.sparsity,
        )
        if not rows:
            raise KeyError(
                f"no rows of {vector!r} by {method!r}; there are vectors {', '.join(self.vectors)}"
                f" and methods {', '.join(dict.fromkeys(r.method for r in self.rows))}"
            )
        return rows

    def to_dict(self) -> dict:
        return {"setting": self.setting, "rows": [asdict(row) for row in self.rows]}

    def to_markdown(self) -> str:
        s = self.setting
        lines = [
            (
                f"Harmless prompts under +a ({s['n_harmless']}), harmful prompts under -a"
                f" ({s['n_harmful']}); {s['max_new_tokens']} new tokens; judge of harmful answers:"
                f" {s['judge']}."
            ),
            "",
            (
                "| vector | kept by | tau | set to zero | sparsity | harmless ASR | harmful ASR |"
                " ended | repetition |"
            ),
            "|:---|:---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for r in self.rows:
            rates = [f"{c.asr:.3f} [{c.low:.2f}, {c.high:.2f}]" for c in (r.harmless, r.harmful)]
            both = [
                f"{getattr(r.harmless, c):.2f} / {getattr(r.harmful, c):.2f}"
                for c in ("ended", "repetition")
            ]
            lines.append(
                "| "
                + " | ".join(
                    [
                        r.vector,
                        r.method,
                        "" if r.tau is None else f"{r.tau:g}",
                        str(r.k),
                        f"{100 * r.sparsity:.1f} %",
                        *rates,
                        *both,
                    ]
                )
                + " |"
            )
        return "\n".join(lines)

    def plot(self, path=None):
        """ASR, ended and repetition against sparsity, a column of panels a vector and side, a line
        a method; the random direction and the unsteered model as level lines. A matplotlib Figure,
        saved to `path` if one is given (needs matplotlib).
        """
        columns = [(vector, side) for vector in self.vectors for side in ("harmless", "harmful")]
        figure = new_figure(2.9 * len(columns) + 0.6, 6.2)
        panels = figure.subplots(3, len(columns), squeeze=False, sharex=True)
        for j, (vector, side) in enumerate(columns):
            for i, what in enumerate(("asr", "ended", "repetition")):
                self._panel(panels[i][j], vector, side, what)
            panels[0][j].set_title(
                f"{vector}, {side} prompts, {'+' if side == 'harmless' else '-'}a", fontsize=8
            )
            panels[2][j].set_xlabel("dimensions set to zero, %", fontsize=8)
        for i, what in enumerate(("ASR", "ended", "repetition")):
            panels[i][0].set_ylabel(what, fontsize=8)
        panels[0][0].legend(frameon=False, fontsize=7)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _panel(self, axes, vector, side, what):
        for above, (method, colour) in enumerate(
            zip(METHODS, ("#c8643c", "#4878a8", "#6a9a4a", "#8a8a8a"))
        ):
            rows = sorted(
                (r for r in self.rows if (r.vector, r.method) == (vector, method)),
                key=lambda r: r.sparsity,
            )
            axes.plot(
                [100 * r.sparsity for r in rows],
                [getattr(getattr(r, side), what) for r in rows],
                "o-",
                markersize=3,
                linewidth=1.2,
                color=colour,
                label=method,
                zorder=9 - above,
            )
        for r in self.rows:
            if r.method == "unsteered" or (r.vector, r.method) == (vector, "random direction"):
                axes.axhline(
                    getattr(getattr(r, side), what),
                    color="black",
                    linewidth=0.8,
                    linestyle=":" if r.method == "unsteered" else "--",
                    label=r.method,
                )
        axes.set_ylim(-0.04, 1.04)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)


# -- what is run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    name: str
    method: str
    tau: float | None
    k: int
    vector: SteeringVector | None
    strengths: tuple[float, float]

    @property
    def key(self) -> str:
        """Of the run: equal directions and strengths share one (at tau 0 all
        methods keep everything).
        """
        return (
            "unsteered"
            if self.vector is None
            else digest(self.vector.direction, self.vector.layer, self.strengths)
        )


def _named(value, what: str, names=None) -> dict[str, Any]:
    """A mapping name -> one of `value`; a single one is called by its method or "vector"."""
    if isinstance(value, Mapping):
        out = {str(name): one for name, one in value.items()}
    else:
        only = (
            next(iter(names))
            if names is not None and len(names) == 1
            else (getattr(value, "method", "") or "vector")
        )
        out = {only: value} if names is None or len(names) == 1 else dict.fromkeys(names, value)
    if not out or (names is not None and set(out) != set(names)):
        raise ValueError(
            f"{what} must name the vectors {', '.join(names or ['(none)'])}, not"
            f" {', '.join(out) or 'nothing'}"
        )
    return out


def _numbers(taus) -> list[float]:
    taus = [taus] if isinstance(taus, (int, float)) else list(taus)
    for tau in taus:
        if (
            isinstance(tau, (bool, np.bool_))
            or not isinstance(tau, (int, float, np.integer, np.floating))
            or not math.isfinite(tau)
            or tau < 0
        ):
            raise ValueError(f"taus: {tau!r} is not a finite number from 0 on")
    if not taus or len(set(taus)) != len(taus):
        raise ValueError(f"taus must name at least one tau and none twice, not {taus}")
    return sorted(map(float, taus))


def _plans(
    vectors, scores, strengths, taus, methods, controls, seed
) -> tuple[list[_Plan], list[str]]:
    """(everything to run, what is left out and why)."""
    plans, left_out = [_Plan("-", "unsteered", None, 0, None, (0.0, 0.0))], []
    for name, vector in vectors.items():
        choose = {
            "gradient": lambda tau, k: by_gradient(vector, scores[name], tau),
            "effect": lambda tau, k: by_effect(vector, scores[name], k),
            "magnitude": lambda tau, k: by_magnitude(vector, k),
            "random": lambda tau, k: by_random(vector, k, seed),
        }
        for tau in taus:
            try:
                k = int((~by_gradient(vector, scores[name], tau).kept).sum())
            except ValueError as error:
                left_out.append(f"{name}, tau {tau:g}: {error}")
                continue
            for method in methods:
                try:
                    plans.append(
                        _Plan(name, method, tau, k, choose[method](tau, k), strengths[name])
                    )
                except ValueError as error:  # a vector with zeros of its own may have none left
                    left_out.append(f"{name}, {method}, tau {tau:g}: {error}")
        plans += [
            _Plan(
                name, "random direction", None, 0, random_vector(vector, seed, i), strengths[name]
            )
            for i in range(controls)
        ]
    return plans, left_out


def sweep(
    model,
    vectors,
    scores,
    harmful,
    harmless,
    coefficient=1.0,
    *,
    taus=TAUS,
    methods=METHODS,
    random_control: int = 1,
    max_new_tokens: int = 128,
    judge=None,
    min_words="auto",
    seed: int = 0,
    batch_size: int | None = None,
    out=None,
    progress=True,
) -> SparsitySweep:
    """Steers both ways with sparser and sparser vectors and counts: ASR on both sets with
    intervals, "ended" and repetition, for every method.

    vectors: a SteeringVector, or {name: vector}. scores: of each, as `by_gradient` takes them
    ({name: scores} for several). At every tau the gradient's row says how many dimensions are set
    to zero; the other methods set as many to zero. tau 0 is the whole vector, run once.
    coefficient: a, or (plus, minus), or {name: either}: harmless prompts get +plus, harmful ones
    -minus. random_control: dense random directions of each vector's norm. judge, min_words: as in
    `freezing.ablation_table`. A tau that keeps nothing is left out and named in
    `.setting["left_out"]`. out: a .jsonl file of answers, a line a finished run; a later call with
    the same model and prompts takes from it what it has.
    Raises ValueError before any work for vectors of another width or layer or zero, scores that do
    not fit, names that differ, taus, methods or numbers out of range, prompts that leave no room.
    """
    vectors = _named(vectors, "vectors")
    for name, vector in vectors.items():
        if not isinstance(vector, SteeringVector):
            raise ValueError(f"vectors: {name!r} is {type(vector).__name__}, not a SteeringVector")
        vector.check(model)
        if vector.norm == 0:
            raise ValueError(f"vectors: {name!r} is zero: there is nothing to keep")
    if len(vectors) > 1 and not isinstance(scores, Mapping):
        raise ValueError(f"scores must be a mapping, one for each of {', '.join(vectors)}")
    scores = _named(scores, "scores", list(vectors))
    for name, vector in vectors.items():
        effects(vector, scores[name])
    strengths = {
        name: magnitudes(a) for name, a in _named(coefficient, "coefficient", list(vectors)).items()
    }
    taus = _numbers(taus)
    methods = [methods] if isinstance(methods, str) else list(methods)
    if not methods or set(methods) - set(METHODS) or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, none twice, not {methods}")
    controls, seed = require_int(random_control, "random_control", 0), require_int(seed, "seed", 0)
    if min_words != "auto" and min_words is not None:
        require_int(min_words, "min_words", 0)
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size)
    plans, left_out = _plans(vectors, scores, strengths, taus, methods, controls, seed)
    kernels = getattr(model, "kernels", None)
    store = AnswerStore(
        out,
        format=FORMAT,
        key=digest(
            FORMAT, fingerprint(model), pair.harmful_rows, pair.harmless_rows, pair.max_new_tokens
        ),
        what="file of a sparsity sweep",
        other="another model or other prompts",
        field=None,
        about={"kernels": kernels},
    )

    runs = {plan.key: plan for plan in plans}
    with Progress(progress, len(runs) * len(pair), "sparsity") as bar:
        for key, plan in runs.items():
            if key not in store.answers:
                store.put(key, pair.run(plan.vector, *plan.strengths))
            bar.step(len(pair))
    rates = {key: pair.rates(store.answers[key], judge, min_words) for key in runs}
    width = next(iter(vectors.values())).width
    rows = [
        SparsityRow(
            p.name,
            p.method,
            p.tau,
            p.k,
            p.k / width,
            rates[p.key]["harmless"],
            rates[p.key]["harmful"],
        )
        for p in plans
    ]
    setting = {
        "vectors": {
            name: {
                "layer": v.layer,
                "method": v.method,
                "norm": v.norm,
                "hash": digest(v.direction),
                "coefficient": list(strengths[name]),
            }
            for name, v in vectors.items()
        },
        "taus": taus,
        "methods": methods,
        "random_control": controls,
        "seed": seed,
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "judge": "substring" if judge is None else type(judge).__name__,
        "min_words": min_words,
        "left_out": left_out,
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        "kernels": kernels,
        **provenance(model),
    }
    return SparsitySweep(rows, setting)
