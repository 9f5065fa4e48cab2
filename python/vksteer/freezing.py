"""Table 1: how much of the effect of steering is left when attention patterns, values or MLP
outputs are kept as in the unsteered run (docs/method.md section 6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .base.checks import is_int, require_int
from .base.display import Table
from .base.figures import new_figure
from .base.progress import Progress
from .base.provenance import digest, identity_for, provenance
from .base.types import Array, PathLike
from .inputs.prompt_pair import (
    Answer,
    AnswerStore,
    PromptPair,
    magnitudes,
)
from .inputs.vectors import SteeringVector
from .judge import Judge, Rate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .runtime.model import Model

__all__ = [
    "ABLATIONS",
    "AblationTable",
    "TableRow",
    "ablation_table",
    "random_vector",
]

#: The rows of the paper's table: name -> arguments of model.generate.
ABLATIONS: dict[str, dict[str, str]] = {
    "none": {},
    "QK": {"freeze": "qk"},
    "OV": {"freeze": "ov"},
    "SVV": {"ablate": "svv"},
    "MLP direct": {"ablate": "mlp_direct"},
    "MLP": {"freeze": "mlp"},
}


@dataclass(frozen=True)
class TableRow:
    """One row: the rates on both prompt sets and their change against steering without ablation."""

    name: str
    harmless: Rate
    harmful: Rate
    change_harmless: float  # asr minus that of the row "none"
    change_harmful: float
    average_change: float  # mean of the two absolute changes
    layer: int | None = None  # in per-layer mode, the layer that is frozen or ablated


class AblationTable(Table):
    """The result of `ablation_table`.

    rows: list of TableRow; table[name] returns one by its name. texts: {row name: {"harmless":
    [str], "harmful": [str]}}. setting: the arguments and versions of the run.
    """

    def __init__(
        self,
        rows: list[TableRow],
        answers: Mapping[str, Mapping[str, Sequence[Answer]]],
        setting: dict[str, Any],
    ):
        self.rows, self.setting = rows, setting
        self.texts = {
            name: {side: [a.text for a in some] for side, some in sides.items()}
            for name, sides in answers.items()
        }

    def __getitem__(self, name: str) -> TableRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def __iter__(self) -> Iterator[TableRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return self.to_markdown()

    def to_dict(self, texts: bool = False) -> dict[str, Any]:
        """For JSON: {"setting": ..., "rows": {name: {"harmless": {...}, "harmful": {...},
        "change_harmless": ...}}}, and "texts" if `texts` is True.
        """
        rows = {
            row.name: {k: v for k, v in asdict(row).items() if k != "name"} for row in self.rows
        }
        return {"setting": self.setting, "rows": rows} | ({"texts": self.texts} if texts else {})

    def to_markdown(self) -> str:
        """The table below a line that gives its setting; rates with 95 % Wilson intervals."""
        s = self.setting
        plus, minus = s["coefficient"]
        doses = s.get("dose")
        lines = [
            (
                f"Layer {s['layer']}; harmless prompts under +{plus:g} ({s['n_harmless']}), harmful"
                f" prompts under -{minus:g} ({s['n_harmful']}); {s['max_new_tokens']} new tokens;"
                f" judge of harmful answers: {s['judge']}."
                + (f" Dose: {doses[0]:.3f} harmless, {doses[1]:.3f} harmful." if doses else "")
            ),
            "",
            (
                "| ablation | harmless ASR | harmful ASR | change harmless | change harmful |"
                " average change | ended | repetition | compression |"
            ),
            "|:---|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for r in self.rows:
            rates = [f"{c.asr:.2f} [{c.low:.2f}, {c.high:.2f}]" for c in (r.harmless, r.harmful)]
            change = (
                ["-"] * 3
                if r.name == "none"
                else [
                    f"{r.change_harmless:+.2f}",
                    f"{r.change_harmful:+.2f}",
                    f"{100 * r.average_change:.1f} %",
                ]
            )
            both = [
                f"{getattr(r.harmless, c):.2f} / {getattr(r.harmful, c):.2f}"
                for c in ("ended", "repetition", "compression")
            ]
            lines.append("| " + " | ".join([r.name, *rates, *change, *both]) + " |")
        return "\n".join(lines)

    def plot(self, path: PathLike | None = None) -> Figure:
        """Both rates of every row as bars with their intervals: a matplotlib Figure, saved to
        `path` if one is given. Raises ImportError without matplotlib.
        """
        figure = new_figure(max(6.0, 0.8 * len(self.rows)), 3.6)
        self._draw(figure.add_subplot())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _draw(self, axes: Axes) -> None:
        at = np.arange(len(self.rows))
        for shift, side, colour in ((-0.2, "harmless", "#4878a8"), (0.2, "harmful", "#c8643c")):
            rates = [getattr(row, side) for row in self.rows]
            asr = np.array([r.asr for r in rates])
            spread = np.abs(np.array([[r.low for r in rates], [r.high for r in rates]]) - asr)
            sign = "+" if side == "harmless" else "-"
            axes.bar(
                at + shift,
                asr,
                0.38,
                yerr=spread,
                capsize=2,
                color=colour,
                label=f"{side} prompts, {sign}a",
            )
        axes.set_xticks(
            at,
            [row.name for row in self.rows],
            rotation=30 if len(self.rows) > 7 else 0,
            ha="right" if len(self.rows) > 7 else "center",
        )
        axes.set_ylim(0, 1.05)
        axes.set_ylabel(
            "share of answers that do not refuse"
            if self.setting["judge"] == "substring"
            else "attack success rate"
        )
        axes.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.14))
        axes.spines[["top", "right"]].set_visible(False)


# -- what is run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Condition:
    """One row of the table before it is run."""

    name: str
    vector: SteeringVector | None  # None: unsteered
    options: dict[str, Any]  # arguments of model.generate
    layer: int | None = None
    prompts: PromptPair | None = None  # None: those of the table


def random_vector(vector: SteeringVector, seed: int, index: int = 0) -> SteeringVector:
    """A direction drawn from a normal distribution, with the norm and the layer of `vector`. The
    same seed and index give the same direction.
    """
    direction: Array = np.random.default_rng([seed, index]).standard_normal(vector.width)
    direction *= vector.norm / np.linalg.norm(direction)
    return SteeringVector(
        direction,
        vector.layer,
        position=vector.position,
        method="random",
        meta={"seed": [seed, index], "norm_of": vector.method},
    )


def _layers(
    given: int | str | Sequence[int] | None, vector: SteeringVector, n_layers: int
) -> list[int] | None:
    """The layers to freeze one at a time, checked; None to freeze all at once."""
    if given is None:
        return None
    if isinstance(given, str) and given == "each":
        layers = list(range(vector.layer, n_layers))
    elif isinstance(given, (int, np.integer)):
        layers = [given]
    elif isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ValueError(
            f"layers must be None (all at once), 'each', or a list of layers, not {given!r}"
        )
    else:
        layers = list(given)
    for l in layers:
        if not is_int(l) or not vector.layer <= l < n_layers:
            raise ValueError(
                f"layers: {l!r} cannot be frozen; steering at layer {vector.layer} changes layers"
                f" {vector.layer} to {n_layers - 1}"
            )
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must name at least one layer and none twice, not {layers}")
    return [int(l) for l in layers]


def _conditions(
    vector: SteeringVector,
    layers: list[int] | None,
    n_random: int,
    seed: int,
    prompted: PromptPair | None,
) -> list[_Condition]:
    conditions = [_Condition("none", vector, {})]
    for name, options in list(ABLATIONS.items())[1:]:
        if layers is None:
            conditions.append(_Condition(name, vector, dict(options)))
        else:
            conditions += [
                _Condition(f"{name} {l}", vector, {**options, "freeze_layers": [l]}, l)
                for l in layers
            ]
    conditions += [
        _Condition(f"random {i}", random_vector(vector, seed, i), {}) for i in range(n_random)
    ]
    if prompted is not None:
        conditions.append(_Condition("prompt", None, {}, prompts=prompted))
    return conditions + [_Condition("unsteered", None, {})]


def ablation_table(
    model: Model,
    vector: SteeringVector,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    coefficient: float | Sequence[float],
    *,
    max_new_tokens: int = 128,
    judge: Judge | None = None,
    min_words: int | str | None = "auto",
    layers: int | str | Sequence[int] | None = None,
    random_control: int = 3,
    prompt_baseline: str | Sequence[str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    out: PathLike | None = None,
    progress: bool | Callable[[int, int], Any] = True,
) -> AblationTable:
    """Table 1 (docs/method.md section 6): steer in both directions, each time with one part of the
    computation frozen or ablated, and measure the attack success rate (ASR).

    Rows: none, QK, OV, SVV, MLP direct, MLP; then, as controls, `random_control` rows that steer
    by a random direction of the same norm, with `prompt_baseline` the row "prompt", and the
    unsteered model. Each has the ASR on both sets with its 95 % Wilson interval, the change from
    "none", the average change (mean of the two absolute changes), "ended", repetition and
    compression. Decoding is greedy; everything is deterministic given `seed`.

    vector: added to resid_pre of its layer. harmful, harmless: prompts (texts or token lists).
    coefficient: a, or (plus, minus), both magnitudes: harmless prompts are steered by +plus,
    harmful ones by -minus.
    judge: callable(prompts, responses) -> bool [n], True for unsafe, for harmful prompts (such as
    `LlamaGuard(model)`); None: the substring judge. min_words: "auto" applies the 15-word rule with
    a judge; None or a number sets it.
    layers: None freezes all layers from the vector's on; a list of layers or "each" freezes one at
    a time (rows "QK 12", ...).
    prompt_baseline: a text put before each prompt instead of steering, or (before harmless prompts,
    before harmful ones).
    out: a .json file of answers; a second call with the same arguments takes finished rows from it.
    Raises ValueError before any work for a vector of another width or layer or zero, empty lists,
    prompts that leave no room for the answer, numbers out of range, and a blank `prompt_baseline`
    or one before token lists.
    """
    _check(model, vector, min_words)
    plus, minus = magnitudes(coefficient)
    n_random, seed = require_int(random_control, "random_control", 0), require_int(seed, "seed", 0)
    chosen = _layers(layers, vector, model.config.n_layers)
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size)
    prompted = pair.prompted(prompt_baseline)
    conditions = _conditions(vector, chosen, n_random, seed, prompted)
    store = _store(out, pair, vector, plus, minus, seed, prompted)
    answers = _answers(pair, conditions, store, plus, minus, progress)
    rates = {name: pair.rates(sides, judge, min_words) for name, sides in answers.items()}
    setting = _setting(pair, vector, [plus, minus]) | {
        "seed": seed,
        "layers": chosen,
        "min_words": min_words,
        "judge": "substring" if judge is None else type(judge).__name__,
        "prompt_baseline": prompt_baseline,
    }
    return AblationTable([_row(c, rates) for c in conditions], answers, setting)


def _check(model: Model, vector: SteeringVector, min_words: int | str | None) -> None:
    vector.check(model, output=False)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it steers nothing, and there is nothing to ablate")
    if min_words != "auto" and min_words is not None:
        require_int(min_words, "min_words", 0)


def _store(
    out: PathLike | None,
    pair: PromptPair,
    vector: SteeringVector,
    plus: float,
    minus: float,
    seed: int,
    prompted: PromptPair | None,
) -> AnswerStore:
    """The file of answers; its key is everything that the answers depend on."""
    more = () if prompted is None else (prompted.harmless_rows, prompted.harmful_rows)
    key = digest(
        "ablation table 1",
        identity_for(out, pair.model),
        vector.direction,
        vector.layer,
        plus,
        minus,
        pair.harmful_rows,
        pair.harmless_rows,
        pair.max_new_tokens,
        seed,
        *more,
    )
    return AnswerStore(
        out,
        format="vksteer.ablation_table",
        key=key,
        what="file of an ablation table",
        other="another model, vector, coefficient or other prompts",
        field="rows",
    )


def _answers(
    pair: PromptPair,
    conditions: list[_Condition],
    store: AnswerStore,
    plus: float,
    minus: float,
    progress: bool | Callable[[int, int], Any],
) -> dict[str, dict[str, list[Answer]]]:
    """{row name: {side: answers}}, generated where the store does not hold them yet."""
    with Progress(progress, len(conditions) * len(pair), "Table 1") as bar:
        for c in conditions:
            if c.name not in store.answers:
                prompts = pair if c.prompts is None else c.prompts
                store.put(c.name, prompts.run(c.vector, plus, minus, **c.options))
            bar.step(len(pair))
    return {c.name: store.answers[c.name] for c in conditions}


def _row(condition: _Condition, rates: dict[str, dict[str, Rate]]) -> TableRow:
    """The rates of one condition beside their change from the row "none"."""
    now, none = rates[condition.name], rates["none"]
    harmless, harmful = (now[side].asr - none[side].asr for side in ("harmless", "harmful"))
    return TableRow(
        condition.name,
        now["harmless"],
        now["harmful"],
        harmless,
        harmful,
        (abs(harmless) + abs(harmful)) / 2,
        condition.layer,
    )


def _setting(pair: PromptPair, vector: SteeringVector, coefficient: list[float]) -> dict[str, Any]:
    """A table's setting, for records: the vector, the prompts, the options and the model."""
    doses = pair.doses(vector)
    return {
        "layer": vector.layer,
        "position": vector.position,
        "method": vector.method,
        "coefficient": coefficient,
        "dose": [a * doses[side] for a, side in zip(coefficient, ("harmless", "harmful"))],
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "vector_hash": digest(vector.direction),
        "vector_norm": vector.norm,
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        **provenance(pair.model),
    }
