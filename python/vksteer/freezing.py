"""Table 1: what of steering is left when attention patterns, values or MLPs are kept as in the
unsteered run (method.md section 6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from .base.checks import require_int
from .base.figures import new_figure
from .base.progress import Progress
from .base.provenance import digest, fingerprint, provenance
from .inputs.prompt_pair import Answer, AnswerStore, PromptPair, magnitudes
from .inputs.vectors import SteeringVector
from .judge import Rate

#: The paper's rows: name -> arguments of model.generate.
ABLATIONS = {
    "none": {},
    "QK": {"freeze": "qk"},
    "OV": {"freeze": "ov"},
    "SVV": {"ablate": "svv"},
    "MLP direct": {"ablate": "mlp_direct"},
    "MLP": {"freeze": "mlp"},
}


@dataclass(frozen=True)
class TableRow:
    """One row: both rates and their change against steering without any ablation."""

    name: str
    harmless: Rate
    harmful: Rate
    change_harmless: float  # asr minus that of the row "none"
    change_harmful: float
    average_change: float  # mean of the two absolute changes
    layer: int | None = None  # the one layer that is frozen or ablated, in per-layer mode


class AblationTable:
    """The result of `ablation_table`.

    rows: list of TableRow; table[name] is one of them. texts: {row name: {"harmless": [str],
    "harmful": [str]}}. setting: what was run, for records.
    """

    def __init__(
        self, rows: list[TableRow], answers: dict[str, dict[str, list[Answer]]], setting: dict
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

    def __len__(self):
        return len(self.rows)

    def __repr__(self):
        return self.to_markdown()

    def to_dict(self, texts: bool = False) -> dict:
        """For JSON: {"setting": ..., "rows": {name: {"harmless": {...}, "harmful": {...},
        "change_harmless": ...}}}; with texts on request.
        """
        rows = {
            row.name: {k: v for k, v in asdict(row).items() if k != "name"} for row in self.rows
        }
        return {"setting": self.setting, "rows": rows} | ({"texts": self.texts} if texts else {})

    def to_markdown(self) -> str:
        """The table with its setting above; rates with 95 % Wilson intervals."""
        s = self.setting
        plus, minus = s["coefficient"]
        lines = [
            (
                f"Layer {s['layer']}; harmless prompts under +{plus:g} ({s['n_harmless']}), harmful"
                f" prompts under -{minus:g} ({s['n_harmful']}); {s['max_new_tokens']} new tokens;"
                f" judge of harmful answers: {s['judge']}."
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

    def plot(self, path=None):
        """Both rates of every row as bars with their intervals: a matplotlib Figure, saved to
        `path` if one is given (needs matplotlib).
        """
        figure = new_figure(max(6.0, 0.8 * len(self.rows)), 3.6)
        axes = figure.add_subplot()
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
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


# -- what is run -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    name: str
    vector: SteeringVector | None
    options: dict
    layer: int | None = None


def random_vector(vector: SteeringVector, seed: int, index: int = 0) -> SteeringVector:
    """A direction drawn from a normal distribution, of the norm of `vector` and at its layer; the
    same for the same seed and index.
    """
    direction = np.random.default_rng([seed, index]).standard_normal(vector.width)
    direction *= vector.norm / np.linalg.norm(direction)
    return SteeringVector(
        direction,
        vector.layer,
        position=vector.position,
        method="random",
        meta={"seed": [seed, index], "norm_of": vector.method},
    )


def _layers(layers, vector, n_layers) -> list[int] | None:
    if layers is None:
        return None
    layers = (
        range(vector.layer, n_layers)
        if isinstance(layers, str) and layers == "each"
        else [layers]
        if isinstance(layers, (int, np.integer))
        else layers
    )
    if isinstance(layers, str) or not hasattr(layers, "__iter__"):
        raise ValueError(
            f"layers must be None (all at once), 'each', or a list of layers, not {layers!r}"
        )
    layers = list(layers)
    for l in layers:
        if (
            isinstance(l, (bool, np.bool_))
            or not isinstance(l, (int, np.integer))
            or not vector.layer <= l < n_layers
        ):
            raise ValueError(
                f"layers: {l!r} cannot be frozen; steering at layer {vector.layer} changes layers"
                f" {vector.layer} to {n_layers - 1}"
            )
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"layers must name at least one layer and none twice, not {layers}")
    return [int(l) for l in layers]


def _plans(vector, layers, random_control, seed) -> list[_Plan]:
    plans = [_Plan("none", vector, {})]
    for name, options in list(ABLATIONS.items())[1:]:
        if layers is None:
            plans.append(_Plan(name, vector, options))
        else:
            plans += [
                _Plan(f"{name} {l}", vector, options | {"freeze_layers": [l]}, l) for l in layers
            ]
    plans += [
        _Plan(f"random {i}", random_vector(vector, seed, i), {}) for i in range(random_control)
    ]
    return plans + [_Plan("unsteered", None, {})]


def ablation_table(
    model,
    vector: SteeringVector,
    harmful,
    harmless,
    coefficient,
    *,
    max_new_tokens: int = 128,
    judge=None,
    min_words="auto",
    layers=None,
    random_control: int = 3,
    seed: int = 0,
    batch_size: int | None = None,
    out=None,
    progress=True,
) -> AblationTable:
    """Table 1 (method.md section 6): steer both ways, with one part of the computation frozen or
    ablated at a time, and count.

    Rows: none, QK, OV, SVV, MLP direct, MLP; then, as controls, `random_control` rows that steer
    by a random direction of the same norm, and the unsteered model. Each with ASR on both sets
    and its 95 % Wilson interval, change from "none", average change (mean of the two absolute
    changes), "ended", repetition and compression. Decoding is greedy; everything is
    deterministic given `seed`.

    vector: steers resid_pre of its layer. harmful, harmless: prompts (texts or token lists).
    coefficient: a, or (plus, minus): harmless prompts are steered by +plus, harmful ones by
    -minus, both magnitudes.
    judge: callable(prompts, responses) -> bool [n], True for unsafe, asked about harmful prompts
    (`LlamaGuard(model)`); None: the substring judge. min_words: "auto" applies the 15-word rule
    with a judge; None or a number sets it.
    layers: None freezes every layer from the vector's on; a list of layers or "each" freezes one at
    a time (rows "QK 12", ...).
    out: a .json file for the answers; a second call with the same arguments takes
    finished rows from it.
    Raises ValueError before any work for a vector of another width or layer or zero, empty lists,
    prompts that leave no room, bad numbers.
    """
    vector.check(model)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it steers nothing, and there is nothing to ablate")
    plus, minus = magnitudes(coefficient)
    n_random, seed = require_int(random_control, "random_control", 0), require_int(seed, "seed", 0)
    layers = _layers(layers, vector, model.config.n_layers)
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size)
    if min_words != "auto" and min_words is not None:
        require_int(min_words, "min_words", 0)
    plans = _plans(vector, layers, n_random, seed)
    key = digest(
        "ablation table 1",
        fingerprint(model),
        vector.direction,
        vector.layer,
        plus,
        minus,
        pair.harmful_rows,
        pair.harmless_rows,
        pair.max_new_tokens,
        seed,
    )
    store = AnswerStore(
        out,
        format="vksteer.ablation_table",
        key=key,
        what="file of an ablation table",
        other="another model, vector, coefficient or other prompts",
        field="rows",
    )

    with Progress(progress, len(plans) * len(pair), "Table 1") as bar:
        for plan in plans:
            if plan.name not in store.answers:
                store.put(plan.name, pair.run(plan.vector, plus, minus, **plan.options))
            bar.step(len(pair))
    answers = {plan.name: store.answers[plan.name] for plan in plans}

    rates = {name: pair.rates(sides, judge, min_words) for name, sides in answers.items()}
    none = rates["none"]
    rows = []
    for plan in plans:
        now = rates[plan.name]
        change = [now[side].asr - none[side].asr for side in ("harmless", "harmful")]
        rows.append(
            TableRow(
                plan.name,
                now["harmless"],
                now["harmful"],
                *change,
                sum(map(abs, change)) / 2,
                plan.layer,
            )
        )
    setting = {
        "layer": vector.layer,
        "position": vector.position,
        "method": vector.method,
        "coefficient": [plus, minus],
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "seed": seed,
        "layers": layers,
        "min_words": min_words,
        "judge": "substring" if judge is None else type(judge).__name__,
        "vector_hash": digest(vector.direction),
        "vector_norm": vector.norm,
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        **provenance(model),
    }
    return AblationTable(rows, answers, setting)
