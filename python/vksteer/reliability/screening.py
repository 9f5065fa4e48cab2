"""Predictors of reliability at every layer and position, from one pass over pairs of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, layer_list, require_int
from ..base.display import Table
from ..base.figures import new_figure
from ..base.progress import Progress
from ..base.provenance import digest, provenance
from ..base.types import Array, Float32Array, ProgressLike, Prompts
from ..inputs.prompts import as_list, as_tokens, batches
from ..runtime.resume import layer_inputs
from .answers import AnswerLens, Answers, answer_lens
from .separation import equal_means, predictors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..runtime.model import Model

#: Mean cosines of data sets that could and could not be steered (arXiv 2602.17881, 36 data sets on
#: Llama 2 7B, layer 13): about 0.48 and 0.19. The verdicts take them as thresholds.
STEERABLE, UNSTEERABLE = 0.48, 0.19
_NUMBERS = (
    "mean_cosine",
    "pairwise_cosine",
    "d_prime",
    "overlap",
    "auc",
    "norm_ratio",
    "stability_mean",
    "stability_sd",
)
#: Bytes of activations held at a time; more layers than fit are taken in several passes.
HELD_BYTES = 1 << 30


@dataclass(frozen=True)
class ScreenRow:
    """The predictors of one layer and position (docs/reliability.md); NaN where `note` says why.

    layer: the vector would steer the input of this layer (`blocks.{layer}.hook_resid_pre`).
    position: counted back from the prompt's end. lens_accuracy: NaN where no answers were given.
    """

    layer: int
    position: int
    mean_cosine: float
    pairwise_cosine: float
    d_prime: float
    overlap: float
    auc: float
    norm_ratio: float
    stability_mean: float
    stability_sd: float
    n: int
    n_undefined: int
    note: str = ""
    lens_accuracy: float = float("nan")

    @property
    def verdict(self) -> str:
        """By the mean cosine: "likely steerable" from 0.48 on, "likely unreliable" up to 0.19,
        "uncertain" between, "undefined" where there is none.
        """
        if np.isnan(self.mean_cosine):
            return "undefined"
        if self.mean_cosine >= STEERABLE:
            return "likely steerable"
        return "likely unreliable" if self.mean_cosine <= UNSTEERABLE else "uncertain"


class Screen(Table):
    """The rows of a screen, position by position, layers ascending; `meta`: provenance."""

    def __init__(self, rows: Sequence[ScreenRow], meta: dict[str, Any]) -> None:
        self.rows, self.meta = list(rows), meta

    @property
    def _has_answers(self) -> bool:
        return not all(np.isnan(row.lens_accuracy) for row in self.rows)

    def __iter__(self) -> Iterator[ScreenRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: tuple[int, int]) -> ScreenRow:
        """The row of (layer, position). Raises KeyError where it was not screened."""
        for row in self.rows:
            if (row.layer, row.position) == tuple(at):
                return row
        raise KeyError(f"(layer, position) = {at!r} was not screened")

    @property
    def best(self) -> ScreenRow | None:
        """The row of the highest mean cosine, of equal ones the first; None where all are
        undefined.
        """
        defined = [row for row in self.rows if not np.isnan(row.mean_cosine)]
        return max(defined, key=lambda row: row.mean_cosine, default=None)

    def column(self, name: str) -> Array:
        """One predictor of all rows, float64 [rows]. Raises AttributeError for another name."""
        return np.array([getattr(row, name) for row in self.rows], dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: {"rows": [fields of ScreenRow and "verdict"], "thresholds", "meta"}; numbers
        that are not finite become None; without answers there is no "lens_accuracy".
        """

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not np.isfinite(value) else value

        rows = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        if not self._has_answers:
            for row in rows:
                del row["lens_accuracy"]
        return {
            "rows": [{name: plain(value) for name, value in row.items()} for row in rows],
            "thresholds": {"steerable": STEERABLE, "unsteerable": UNSTEERABLE},
            "meta": self.meta,
        }

    def to_markdown(self) -> str:
        """A table with one row for each layer and position, and what the verdicts rest on."""
        lens = self._has_answers
        lines = [
            (
                "| layer | position | mean cosine | pairwise cosine | d' | overlap | AUC"
                f" | norm ratio | stability | n |{' lens accuracy |' if lens else ''} verdict |"
            ),
            "|---:" * (11 if lens else 10) + "|:---|",
        ]
        for row in self.rows:
            n = f"{row.n - row.n_undefined} of {row.n}" if row.n_undefined else str(row.n)
            lines.append(
                f"| {row.layer} | {row.position} | {row.mean_cosine:.3f} |"
                f" {row.pairwise_cosine:.3f} | {row.d_prime:.2f} | {row.overlap:.3f} |"
                f" {row.auc:.3f} | {row.norm_ratio:.3f} | {row.stability_mean:.3f} +-"
                f" {row.stability_sd:.3f} | {n} |"
                + (f" {row.lens_accuracy:.3f} |" if lens else "")
                + f" {row.verdict}"
                + (f" ({row.note})" if row.note else "")
                + " |"
            )
        lines += [
            "",
            (
                f"Verdicts: a mean cosine from {STEERABLE} on is likely steerable, up to"
                f" {UNSTEERABLE} likely unreliable: the means of the two kinds of data sets in"
                " arXiv 2602.17881 (Llama 2 7B, layer 13). They are no guarantee: measure the"
                " effect."
            ),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def plot(self, ax: Axes | None = None) -> Figure:
        """Mean cosine, AUC and, where answers were given, the accuracy of the logit lens over
        layers, a line for each position, with the thresholds.

        Returns the figure. Raises ImportError, naming what to install, without matplotlib.
        """
        if ax is None:
            ax = new_figure(6, 3.5).subplots()
        for position in dict.fromkeys(row.position for row in self.rows):
            rows = [row for row in self.rows if row.position == position]
            layers = [row.layer for row in rows]
            line = ax.plot(
                layers, [row.mean_cosine for row in rows], label=f"mean cosine, {position}"
            )[0]
            ax.plot(
                layers,
                [row.auc for row in rows],
                linestyle=":",
                color=line.get_color(),
                label=f"AUC, {position}",
            )
            if self._has_answers:
                ax.plot(
                    layers,
                    [row.lens_accuracy for row in rows],
                    linestyle="-.",
                    color=line.get_color(),
                    label=f"lens accuracy, {position}",
                )
        for threshold in (STEERABLE, UNSTEERABLE):
            ax.axhline(threshold, color="0.6", linewidth=0.8, linestyle="--")
        ax.set(xlabel="layer", ylabel="predictor", title="Reliability before steering")
        ax.legend(fontsize="small")
        figure: Any = ax.figure
        result: Figure = figure
        return result


def screen(
    model: Model,
    positive: Prompts,
    negative: Prompts,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] = (-1,),
    answers: Answers | None = None,
    leave_one_out: bool = False,
    bins: int = 50,
    seed: int = 0,
    progress: ProgressLike = True,
) -> Screen:
    """The predictors of reliability (`predictors`, docs/reliability.md) at every layer and
    position, from one pass over the prompts.

    positive, negative: pairs in order, texts or token lists, as many of each; item i of both is the
    same question with the matching and the non-matching answer. layers: default all. positions:
    negative, counted back from each prompt's end. leave_one_out, bins, seed: as in `predictors`.
    answers: two token ids, the answers to positive and to negative prompts, or such a pair for each
    item: every row then says how often the logit lens at that place already prefers the right one
    (`lens_accuracy`, ties one half; arXiv 2604.15557). Activations are
    `blocks.{layer}.hook_resid_pre`, float32.

    Returns a Screen: a row for each layer and position, with a verdict whose thresholds it states.
    A layer where the classes' means are equal gets NaN and a note. Raises ValueError before any
    work for lists of unequal length, fewer than 2 pairs, prompts that are too long or shorter than
    a position reaches back, layers that the model does not have, and answers that are not two
    different tokens.
    """
    rows, at, chosen = checked_pairs(model, positive, negative, layers, positions)
    require_int(bins, "bins", 1)
    n, width = len(rows[0]), model.config.d_model
    lens = None if answers is None else answer_lens(model, answers, n)
    some = max(1, HELD_BYTES // (8 * n * len(at) * width))
    found: list[ScreenRow] = []
    groups = [chosen[i : i + some] for i in range(0, len(chosen), some)]
    with Progress(progress, 2 * n * len(groups), "screen") as bar:
        for group in groups:
            pos, neg = (activations_at(model, side, group, at, bar) for side in rows)
            for p, position in enumerate(at):
                for l, layer in enumerate(group):
                    sides = pos[:, p, l], neg[:, p, l]
                    row = _row(layer, position, *sides, leave_one_out, bins, seed)
                    found.append(_with_lens(row, lens, *sides))
    found.sort(key=lambda row: (at.index(row.position), row.layer))
    meta = provenance(
        model,
        prompts_hash=digest(*rows),
        n_prompts=[n, n],
        leave_one_out=leave_one_out,
        bins=bins,
        seed=seed,
        **({} if lens is None else {"answers_hash": digest(lens.pairs)}),
    )
    return Screen(found, meta)


def _with_lens(
    row: ScreenRow, lens: AnswerLens | None, pos: Float32Array, neg: Float32Array
) -> ScreenRow:
    return row if lens is None else replace(row, lens_accuracy=lens.accuracy(pos, neg))


def _row(
    layer: int,
    position: int,
    pos: Float32Array,
    neg: Float32Array,
    leave_one_out: bool,
    bins: int,
    seed: int,
) -> ScreenRow:
    if equal_means(pos, neg):
        undefined = dict.fromkeys(_NUMBERS, float("nan"))
        n = len(pos)
        return ScreenRow(layer, position, n=n, n_undefined=n, note="equal means", **undefined)
    values = predictors(pos, neg, leave_one_out=leave_one_out, bins=bins, seed=seed)
    note = "; ".join(values.pop("flags"))
    return ScreenRow(layer, position, note=note, **values)


def checked_pairs(
    model: Model,
    positive: Prompts,
    negative: Prompts,
    layers: Sequence[int] | None,
    positions: Sequence[int],
) -> tuple[tuple[list[list[int]], list[list[int]]], list[int], list[int]]:
    """(token lists of both sides, positions as given, layers ascending). Raises ValueError as
    `screen` says.
    """
    sides = as_list(positive, "positive"), as_list(negative, "negative")
    if len(sides[0]) != len(sides[1]):
        raise ValueError(
            f"positive and negative are pairs: {len(sides[0])} and {len(sides[1])} prompts"
        )
    if len(sides[0]) < 2:
        raise ValueError("a screen needs at least 2 pairs of prompts")
    rows = as_tokens(model, sides[0], "positive"), as_tokens(model, sides[1], "negative")
    at = [positions] if is_int(positions) else list(positions)
    if not at or len(set(at)) != len(at) or not all(is_int(p) and p < 0 for p in at):
        raise ValueError(
            "positions count back from the prompt's end: negative whole numbers, none twice, not"
            f" {positions!r}"
        )
    for what, side in zip(("positive", "negative"), rows, strict=True):
        for i, row in enumerate(side):
            if len(row) < -min(at):
                raise ValueError(
                    f"{what}[{i}] has {len(row)} tokens, position {min(at)} reaches before its"
                    " start"
                )
    chosen = layer_list(layers, model.config.n_layers)
    return rows, [int(p) for p in at], chosen


def activations_at(
    model: Model, rows: list[list[int]], layers: list[int], at: list[int], bar: Progress
) -> Float32Array:
    """resid_pre, float32 [n, positions, layers, D]."""
    width = model.config.d_model
    out = np.empty((len(rows), len(at), len(layers), width), np.float32)
    longest = max(map(len, rows))
    most = max(1, HELD_BYTES // 4 // (4 * longest * len(layers) * width))
    for part in batches(rows, tokens=8192, most=most):
        _, rest = layer_inputs(model, rows[part], layers, -min(at))
        for i, l in enumerate(layers):
            out[part, :, i] = rest[l][:, at]  # rows are padded on the left
        bar.step(len(rows[part]))
    return out
