"""Sweeps over sparsity: the effect of steering as fewer and fewer dimensions are kept, for every
method of choosing them (docs/method.md section 8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..base.checks import is_number, require_int
from ..base.display import Table
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, identity_for, kernel_names, provenance
from ..base.types import PathLike
from ..freezing import random_vector
from ..inputs.prompt_pair import AnswerStore, PromptPair, magnitudes
from ..inputs.vectors import SteeringVector
from ..judge import Judge, Rate
from .choosing import SparseVector, by_effect, by_gradient, by_magnitude, by_random, effects

if TYPE_CHECKING:
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..patching.edge_scores import EdgeScores
    from ..runtime.model import Model

TAUS = (0.0, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 2.5)
METHODS = ("gradient", "effect", "magnitude", "random")
FORMAT = "vksteer.sparsity_sweep"


@dataclass(frozen=True)
class SparsityRow:
    """One vector with one choice of dimensions. method: one of METHODS, "random direction" (all
    dimensions, the same norm) or "unsteered".
    """

    vector: str
    method: str
    tau: float | None  # the threshold of the gradient method that decides k
    k: int  # dimensions set to zero
    sparsity: float  # k / D
    harmless: Rate  # under +a: a strong vector has a low ASR
    harmful: Rate  # under -a: a strong vector has a high ASR


class SparsitySweep(Table):
    """The result of `sparsify.sweep`.

    rows: list of SparsityRow, in the order of the run. setting: the arguments and versions of the
    run.
    """

    def __init__(self, rows: list[SparsityRow], setting: dict[str, Any]):
        self.rows, self.setting = rows, setting

    def __iter__(self) -> Iterator[SparsityRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return self.to_markdown()

    @property
    def vectors(self) -> list[str]:
        """The names of the vectors, in the order of the rows."""
        return list(dict.fromkeys(row.vector for row in self.rows if row.method != "unsteered"))

    def curve(self, vector: str, method: str) -> list[SparsityRow]:
        """The rows of one vector and method by rising sparsity. Raises KeyError where there are
        none.
        """
        rows = self._curve(vector, method)
        if not rows:
            raise KeyError(
                f"no rows of {vector!r} by {method!r}; there are vectors {', '.join(self.vectors)}"
                f" and methods {', '.join(dict.fromkeys(r.method for r in self.rows))}"
            )
        return rows

    def _curve(self, vector: str, method: str) -> list[SparsityRow]:
        rows = (r for r in self.rows if (r.vector, r.method) == (vector, method))
        return sorted(rows, key=lambda r: r.sparsity)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"setting": the arguments, hashes and device, "rows": [one object for each
        row]}; a row has the fields of SparsityRow, its rates as objects.
        """
        return {"setting": self.setting, "rows": [asdict(row) for row in self.rows]}

    def to_markdown(self) -> str:
        """The table below a line that gives its setting; rates with 95 % Wilson intervals."""
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

    def plot(self, path: PathLike | None = None) -> Figure:
        """ASR, ended and repetition against sparsity: a matplotlib Figure, saved to `path` if one
        is given. Raises ImportError without matplotlib.

        Each vector and prompt set has a column of panels, each method a line; the random direction
        and the unsteered model are horizontal lines.
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

    def _panel(self, axes: Axes, vector: str, side: str, what: str) -> None:
        for above, (method, colour) in enumerate(
            zip(METHODS, ("#c8643c", "#4878a8", "#6a9a4a", "#8a8a8a"))
        ):
            rows = self._curve(vector, method)
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
class _Condition:
    """One row of the sweep before it is run."""

    name: str
    method: str
    tau: float | None
    k: int
    vector: SteeringVector | None  # None: unsteered
    strengths: tuple[float, float]

    @property
    def key(self) -> str:
        """The digest of what is run. Conditions of the same direction and strengths share one run,
        for example all methods at tau 0, which keep every dimension.
        """
        return (
            "unsteered"
            if self.vector is None
            else digest(self.vector.direction, self.vector.layer, self.strengths)
        )


def _named(value: Any, what: str, names: list[str] | None = None) -> dict[str, Any]:
    """{name: value} from a mapping or from one value, which holds for all `names`; without names a
    single vector is named after its method, or "vector".
    """
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


def _numbers(given: float | Iterable[float]) -> list[float]:
    """The thresholds tau, checked and in rising order."""
    taus = [given] if isinstance(given, (int, float)) else list(given)
    for tau in taus:
        if not is_number(tau) or tau < 0:
            raise ValueError(f"taus: {tau!r} is not a finite number from 0 on")
    if not taus or len(set(taus)) != len(taus):
        raise ValueError(f"taus must name at least one tau and none twice, not {taus}")
    return sorted(map(float, taus))


def _sparse(
    method: str, vector: SteeringVector, scores: Any, tau: float, k: int, seed: int
) -> SparseVector:
    """`vector` without k dimensions, chosen by one of METHODS."""
    if method == "gradient":
        return by_gradient(vector, scores, tau)
    if method == "effect":
        return by_effect(vector, scores, k)
    if method == "magnitude":
        return by_magnitude(vector, k)
    return by_random(vector, k, seed)


def _conditions(
    vectors: dict[str, SteeringVector],
    scores: dict[str, Any],
    strengths: dict[str, tuple[float, float]],
    taus: list[float],
    methods: list[str],
    controls: int,
    seed: int,
) -> tuple[list[_Condition], list[str]]:
    """(everything to run, what is left out and why)."""
    conditions = [_Condition("-", "unsteered", None, 0, None, (0.0, 0.0))]
    left_out = []
    for name, vector in vectors.items():
        for tau in taus:
            try:
                k = int((~by_gradient(vector, scores[name], tau).kept).sum())
            except ValueError as error:
                left_out.append(f"{name}, tau {tau:g}: {error}")
                continue
            for method in methods:
                try:
                    sparse = _sparse(method, vector, scores[name], tau, k, seed)
                except ValueError as error:  # a vector with zeros of its own may have none left
                    left_out.append(f"{name}, {method}, tau {tau:g}: {error}")
                else:
                    conditions.append(_Condition(name, method, tau, k, sparse, strengths[name]))
        for i in range(controls):
            control = random_vector(vector, seed, i)
            conditions.append(
                _Condition(name, "random direction", None, 0, control, strengths[name])
            )
    return conditions, left_out


def sweep(
    model: Model,
    vectors: SteeringVector | Mapping[str, SteeringVector],
    scores: EdgeScores | npt.ArrayLike | Mapping[str, EdgeScores | npt.ArrayLike],
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    coefficient: float | Sequence[float] | Mapping[str, float | Sequence[float]] = 1.0,
    *,
    taus: float | Iterable[float] = TAUS,
    methods: str | Iterable[str] = METHODS,
    random_control: int = 1,
    max_new_tokens: int = 128,
    judge: Judge | None = None,
    min_words: int | str | None = "auto",
    seed: int = 0,
    batch_size: int | None = None,
    out: PathLike | None = None,
    progress: bool | Callable[[int, int], Any] = True,
) -> SparsitySweep:
    """Steers in both directions with sparser and sparser vectors, by every method, and measures the
    ASR on both prompt sets with intervals, "ended" and repetition (docs/method.md section 8): a
    SparsitySweep.

    vectors: a SteeringVector, or {name: vector}. scores: as `by_gradient` takes them, EdgeScores or
    float [D] ({name: scores} for several vectors). harmful, harmless: prompts, texts or token
    lists. coefficient: a, or (plus, minus), or {name: either}, magnitudes: harmless prompts get
    +plus, harmful ones -minus. taus: thresholds of `by_gradient`, from 0 on; at each the gradient
    method decides how many dimensions are set to zero, and the other methods set as many. tau 0 is
    the whole vector, run once; a tau that keeps nothing is left out and named in
    `.setting["left_out"]`. methods: some of METHODS (default all). random_control: random
    directions of each vector's norm. max_new_tokens: of an answer. judge, min_words: as in
    `vs.freezing.ablation_table`. seed: of random dimensions and directions. batch_size: rows at
    once (default: as memory allows). out: a .jsonl file of answers, one line for each finished run;
    a later call with the same model and prompts takes the runs that it holds. progress: True, False
    or callable(done, total).
    Raises ValueError before any work for vectors of another width or layer or zero, scores that do
    not fit, names that differ, taus, methods or numbers out of range, and prompts that leave no
    room for the answer.
    """
    named, scores, strengths = _vectors(model, vectors, scores, coefficient)
    for name, vector in named.items():
        effects(vector, scores[name])
    taus, methods = _numbers(taus), _methods(methods)
    controls, seed = require_int(random_control, "random_control", 0), require_int(seed, "seed", 0)
    if min_words != "auto" and min_words is not None:
        require_int(min_words, "min_words", 0)
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size)
    conditions, left_out = _conditions(named, scores, strengths, taus, methods, controls, seed)
    rates = _run(pair, conditions, out, judge, min_words, progress)
    width = next(iter(named.values())).width
    rows = [_row(c, width, rates[c.key]) for c in conditions]
    options = {
        "taus": taus,
        "methods": methods,
        "random_control": controls,
        "seed": seed,
        **_judging(pair, judge, min_words),
        "left_out": left_out,
    }
    return SparsitySweep(rows, _setting(pair, named, strengths, options))


def _judging(pair: PromptPair, judge: Judge | None, min_words: int | str | None) -> dict[str, Any]:
    """The part of a sweep's setting that says which answers are judged, and how."""
    return {
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "judge": "substring" if judge is None else type(judge).__name__,
        "min_words": min_words,
    }


def _vectors(
    model: Model, vectors: Any, scores: Any, coefficient: Any
) -> tuple[dict[str, SteeringVector], dict[str, Any], dict[str, tuple[float, float]]]:
    """(vectors, scores, (plus, minus)) by name, checked against the model and one another."""
    named: dict[str, SteeringVector] = _named(vectors, "vectors")
    for name, vector in named.items():
        if not isinstance(vector, SteeringVector):
            raise ValueError(f"vectors: {name!r} is {type(vector).__name__}, not a SteeringVector")
        vector.check(model, output=False)
        if vector.norm == 0:
            raise ValueError(f"vectors: {name!r} is zero: there is nothing to keep")
    names = list(named)
    if len(named) > 1 and not isinstance(scores, Mapping):
        raise ValueError(f"scores must be a mapping, one for each of {', '.join(names)}")
    scores = _named(scores, "scores", names)
    coefficients = _named(coefficient, "coefficient", names)
    return named, scores, {name: magnitudes(a) for name, a in coefficients.items()}


def _methods(given: str | Iterable[str]) -> list[str]:
    methods = [given] if isinstance(given, str) else list(given)
    if not methods or set(methods) - set(METHODS) or len(set(methods)) != len(methods):
        raise ValueError(f"methods must be some of {', '.join(METHODS)}, none twice, not {methods}")
    return methods


def _run(
    pair: PromptPair,
    conditions: list[_Condition],
    out: PathLike | None,
    judge: Judge | None,
    min_words: int | str | None,
    progress: bool | Callable[[int, int], Any],
) -> dict[str, dict[str, Rate]]:
    """{condition's key: {side: Rate}}; answers that `out` already holds are not generated again."""
    store = AnswerStore(
        out,
        format=FORMAT,
        key=digest(
            FORMAT,
            identity_for(out, pair.model),
            pair.harmful_rows,
            pair.harmless_rows,
            pair.max_new_tokens,
        ),
        what="file of a sparsity sweep",
        other="another model or other prompts",
        field=None,
        about={"kernels": kernel_names(pair.model)},
    )
    runs = {c.key: c for c in conditions}
    with Progress(progress, len(runs) * len(pair), "sparsity") as bar:
        for key, condition in runs.items():
            if key not in store.answers:
                store.put(key, pair.run(condition.vector, *condition.strengths))
            bar.step(len(pair))
    return {key: pair.rates(store.answers[key], judge, min_words) for key in runs}


def _row(c: _Condition, width: int, rates: dict[str, Rate]) -> SparsityRow:
    return SparsityRow(
        c.name, c.method, c.tau, c.k, c.k / width, rates["harmless"], rates["harmful"]
    )


def _setting(
    pair: PromptPair,
    vectors: dict[str, SteeringVector],
    strengths: dict[str, tuple[float, float]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """A sweep's setting, for records: the vectors, the options, the prompts and the model."""
    return {
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
        **options,
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        "kernels": kernel_names(pair.model),
        **provenance(pair.model),
    }
