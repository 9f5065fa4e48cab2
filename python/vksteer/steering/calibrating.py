"""`vs.steering.calibrate`: how strong steering must be, and how strong it may be.

Each way has an interval of coefficients in which behaviour changes and side effects stay inside
bounds. It is found by doubling the coefficient until a bound is broken, then by bisection. Layers
below the vector's run once for each prompt, and the shared prefix of the prompts once for each
coefficient (runtime/resume.py); where the KL divergence alone breaks its bound, no answer is
generated.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import is_number
from ..base.distributions import log_softmax
from ..base.progress import Progress
from ..base.provenance import digest, identity_for, provenance
from ..base.types import Float32Array, Float64Array, PathLike, ProgressLike, Prompts
from ..inputs.prompt_pair import AnswerStore, PromptPair
from ..runtime.edits import Steer
from .calibration import SIDES, Bounds, Range, RangeRow
from .scores import Rows, kl_divergence, last_logits
from .sweeping import DAMAGE, EFFECT

if TYPE_CHECKING:
    from ..inputs.vectors import SteeringVector
    from ..judge import Judge, Rate
    from ..runtime.model import Model

#: Doublings from the first coefficient to the largest, and bisections of an end at most.
DOUBLINGS, BISECTIONS = 5, 6

#: Yields coefficients to be measured, and is sent what they did.
Search: TypeAlias = Generator[float, RangeRow, None]


def calibrate(
    model: Model,
    vector: SteeringVector,
    harmful: Prompts,
    harmless: Prompts,
    *,
    max_kl: float = 0.5,
    max_repetition: float = DAMAGE,
    max_unended: float = DAMAGE,
    min_effect: float = EFFECT,
    low: float = 0.0,
    high: float = 4.0,
    resolution: float = 0.05,
    max_new_tokens: int = 64,
    judge: Judge | None = None,
    min_words: int | str | None = "auto",
    batch_size: int | None = None,
    out: PathLike | None = None,
    progress: ProgressLike = True,
) -> Range:
    """The coefficients that change behaviour and break nothing, for each way.

    Plus: harmless prompts under +a, which should be refused; minus: harmful prompts under -a, which
    should be answered. A coefficient counts if the rate moves by at least `min_effect` of what it
    could, and if none of these bounds is broken: `max_kl`, KL(unsteered || steered) of the next
    token in nats, the mean over the prompts of the other kind, whose answers should stay as they
    are; `max_repetition` and `max_unended`, by how much repetition may rise above, and the share of
    ended texts fall below, those of the unsteered model.

    low, high: the coefficients searched, magnitudes. The first of them, at least high / 32, is
    doubled until a bound is broken or `high` is reached; then both ends are bisected until they are
    known to `resolution`, a share of the coefficient. Between two measured coefficients effects are
    taken to grow. judge, min_words: as in `freezing.ablation_table`. out: a .json file of answers;
    a second call with the same arguments takes finished ones from it.

    Returns a Range: `.plus` and `.minus`, (lowest, highest) measured coefficient that counts, or
    None; `.recommended`, (plus, minus); `.rows`, all that was measured; `.reason` of empty sides.
    Raises ValueError before any work for bad prompts and bounds, a vector that is zero or of
    another width or layer, and low and high that are no interval from 0 on.
    """
    bounds = Bounds(max_kl, max_repetition, max_unended, min_effect)
    _check(model, vector, bounds, low, high, resolution)
    pair = PromptPair.of(model, harmful, harmless, max_new_tokens, batch_size)
    store = _store(out, pair, vector)
    most = 2 * (DOUBLINGS + 1 + 3 * BISECTIONS) + 2
    with Progress(progress, most, "calibrate") as bar:
        measuring = _Measuring(pair, vector, bounds, store, judge, min_words)
        bar.step(2)
        rows = _run(measuring, {side: _search(low, high, resolution) for side in SIDES}, bar)
        bar.step(most - bar.done)
    setting = {"low": low, "high": high, **_setting(pair, vector)}
    setting["judge"] = "substring" if judge is None else type(judge).__name__
    return Range(rows, bounds, measuring.unsteered, setting)


def _check(
    model: Model,
    vector: SteeringVector,
    bounds: Bounds,
    low: float,
    high: float,
    resolution: float,
) -> None:
    vector.check(model)
    if vector.norm == 0:
        raise ValueError("the vector is zero: no coefficient makes it steer")
    positive = {
        "max_kl": bounds.kl,
        "max_repetition": bounds.repetition,
        "max_unended": bounds.unended,
        "min_effect": bounds.effect,
        "resolution": resolution,
    }
    for name, value in positive.items():
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name} must be a finite number above 0, not {value!r}")
    if not is_number(low) or not is_number(high) or not 0 <= low < high:
        raise ValueError(
            f"low={low!r} and high={high!r} must be magnitudes, 0 <= low < high: both ways are"
            " searched"
        )


def _setting(pair: PromptPair, vector: SteeringVector) -> dict[str, Any]:
    return {
        "layer": vector.layer,
        "n_harmless": len(pair.harmless),
        "n_harmful": len(pair.harmful),
        "max_new_tokens": pair.max_new_tokens,
        "vector_hash": digest(vector.direction),
        "prompts_hash": digest(pair.harmful_rows, pair.harmless_rows),
        **provenance(pair.model),
    }


def _store(out: PathLike | None, pair: PromptPair, vector: SteeringVector) -> AnswerStore:
    key = digest(
        "calibration 1",
        identity_for(out, pair.model),
        vector.direction,
        vector.layer,
        pair.harmful_rows,
        pair.harmless_rows,
        pair.max_new_tokens,
    )
    return AnswerStore(
        out,
        format="vksteer.calibration",
        key=key,
        what="file of a calibration",
        other="another model, vector or other prompts",
        field="rows",
    )


class _Measuring:
    """What steering at a coefficient does, for one side or both."""

    def __init__(
        self,
        pair: PromptPair,
        vector: SteeringVector,
        bounds: Bounds,
        store: AnswerStore,
        judge: Judge | None,
        min_words: int | str | None,
    ) -> None:
        self.pair, self.vector, self.bounds, self.store = pair, vector, bounds, store
        self.judge, self.min_words = judge, min_words
        if "unsteered" not in store.answers:
            store.put("unsteered", pair.run())
        self.unsteered = pair.rates(store.answers["unsteered"], judge, min_words)
        self.doses = pair.doses(vector)
        #: prompts whose next token should stay as it is
        self.others = {"plus": pair.harmful_rows, "minus": pair.harmless_rows}
        base = self._logits(dict.fromkeys(SIDES, 0.0))
        self.logp: dict[str, Float64Array] = {s: log_softmax(x) for s, x in base.items()}

    def _logits(self, coefficients: dict[str, float]) -> dict[str, Float32Array]:
        """Next-token logits of the other kind of prompts, [prompts, V] for each side."""
        rows: Rows = [
            (tokens, [Steer(self.vector, SIDES[side].sign * a)] if a else [])
            for side, a in coefficients.items()
            for tokens in self.others[side]
        ]
        logits = np.concatenate([x for _, x in last_logits(self.pair.model, rows)])
        ends = np.cumsum([len(self.others[side]) for side in coefficients])
        return dict(zip(coefficients, np.split(logits, ends[:-1]), strict=True))

    def measure(self, coefficients: dict[str, float]) -> dict[str, RangeRow]:
        """A row for each side. coefficients: {side: magnitude}."""
        kl = {
            side: float(kl_divergence(self.logp[side], x).mean())
            for side, x in self._logits(coefficients).items()
        }
        inside = {side: a for side, a in coefficients.items() if kl[side] <= self.bounds.kl}
        rates = self._rates(inside)
        return {
            side: RangeRow.of(
                side,
                a,
                a * self.doses[SIDES[side].prompts],
                kl[side],
                rates.get(side),
                self.unsteered,
                self.bounds,
            )
            for side, a in coefficients.items()
        }

    def _rates(self, coefficients: dict[str, float]) -> dict[str, Rate]:
        """Rates of steered answers, which are generated together where the store lacks them."""
        names = {side: f"{side} {a!r}" for side, a in coefficients.items()}
        missing = [side for side in coefficients if names[side] not in self.store.answers]
        if missing:
            made = self.pair.run(
                self.vector,
                coefficients.get("plus", 0.0),
                coefficients.get("minus", 0.0),
                sides=[SIDES[side].prompts for side in missing],
            )
            for side in missing:
                prompts = SIDES[side].prompts
                self.store.put(names[side], {prompts: made[prompts]})
        return {
            side: self.pair.rates(self.store.answers[name], self.judge, self.min_words)[
                SIDES[side].prompts
            ]
            for side, name in names.items()
        }


def _run(measuring: _Measuring, searches: dict[str, Search], bar: Progress) -> list[RangeRow]:
    """Both searches side by side: one pass measures a coefficient of each."""
    rows: list[RangeRow] = []
    targets = {
        side: next(search)
        for side, search in searches.items()
        if measuring.bounds.left(side, measuring.unsteered) > 0
    }
    while targets:
        found = measuring.measure(targets)
        rows += found.values()
        bar.step(len(found))
        targets = dict(_next(searches, found))
    return sorted(rows, key=lambda row: (list(SIDES).index(row.side), row.coefficient))


def _next(searches: dict[str, Search], found: dict[str, RangeRow]) -> Iterator[tuple[str, float]]:
    for side, row in found.items():
        try:
            yield side, searches[side].send(row)
        except StopIteration:
            continue


def _search(low: float, high: float, resolution: float) -> Search:
    """Doubling until a bound is broken, then bisection of both ends."""
    measured: list[RangeRow] = []
    at = max(low, high / 2**DOUBLINGS)
    while True:
        row = yield at
        measured.append(row)
        if not row.inside or at >= high:
            break
        at = min(2 * at, high)
    good = [row.coefficient for row in measured if row.counts]
    if not good and not measured[-1].inside:
        # perhaps between the last one inside the bounds and the first one outside
        found = yield from _between(_below(measured, low), measured[-1].coefficient, resolution)
        measured += found
        good = [row.coefficient for row in measured if row.counts]
    if not good:
        return
    first, last = min(good), max(good)
    if first > low:
        smaller = [r.coefficient for r in measured if r.coefficient < first]
        yield from _end(first, max(smaller, default=low), resolution)
    larger = [r.coefficient for r in measured if r.coefficient > last]
    if larger:
        yield from _end(last, min(larger), resolution)


def _below(measured: Sequence[RangeRow], low: float) -> float:
    return max((r.coefficient for r in measured if r.inside), default=low)


def _between(
    below: float, above: float, resolution: float
) -> Generator[float, RangeRow, list[RangeRow]]:
    """Bisects between a coefficient without effect and one outside the bounds, until one counts."""
    found: list[RangeRow] = []
    for _ in range(BISECTIONS):
        if above - below <= resolution * above:
            break
        row = yield (below + above) / 2
        found.append(row)
        if row.counts:
            break
        below, above = (row.coefficient, above) if row.inside else (below, row.coefficient)
    return found


def _end(good: float, bad: float, resolution: float) -> Search:
    """Bisects between a coefficient that counts and one that does not."""
    for _ in range(BISECTIONS):
        if abs(good - bad) <= resolution * max(good, bad):
            return
        row = yield (good + bad) / 2
        good, bad = (row.coefficient, bad) if row.counts else (good, row.coefficient)
