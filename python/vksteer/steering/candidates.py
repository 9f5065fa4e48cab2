"""Difference in means: one candidate vector for each pair of post-instruction position and layer,
their scores, and the choice of one (docs/method.md section 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, layer_list
from ..base.progress import Progress
from ..base.provenance import digest, identity, identity_for, provenance
from ..base.store import Store
from ..base.types import (
    Array,
    Float32Array,
    Float64Array,
    IntArray,
    PathLike,
    ProgressLike,
    Prompts,
)
from ..inputs.prompts import as_list, as_tokens, batches, refuse_equal_classes, token_text
from ..inputs.vectors import SteeringVector
from ..runtime.resume import layer_inputs
from .rule import Rejection, best_of, check_criterion, closest, examine, layer_allowed, none_left
from .scores import Scorer, Scores

if TYPE_CHECKING:
    from ..runtime.model import Model

#: Bytes of captures that may be held at a time while means are taken.
CAPTURE_BYTES = 256 << 20


class Candidates:
    """All candidates of a difference in means.

    vectors: float32 [P, L, D]. positions: negative, ascending, int64 [P]. position_texts: the
    template's token at each position. meta: provenance. table: the Scores of the last `evaluate` or
    `select`. rejected: the candidates that a filter removed in the last `select`, each with the
    filter and the value.
    """

    def __init__(
        self,
        model: Model,
        vectors: Float32Array,
        positions: Array,
        position_texts: Sequence[str],
        meta: Mapping[str, Any],
    ) -> None:
        self.model, self.vectors, self.positions, self.position_texts, self.meta = (
            model,
            vectors,
            positions,
            position_texts,
            meta,
        )
        self.vectors.flags.writeable = False
        self.table: Scores | None = None
        self.rejected: list[Rejection] = []

    def __repr__(self) -> str:
        P, L, D = self.vectors.shape
        at = ", ".join(f"{p} {text!r}" for p, text in zip(self.positions, self.position_texts))
        return f"Candidates({P} positions x {L} layers, width {D}; positions: {at})"

    def vector(self, position: int, layer: int) -> SteeringVector:
        """The candidate of a position (one of `positions`) and a layer. Raises ValueError where
        there is none.
        """
        if position not in self.positions:
            raise ValueError(
                f"position {position!r} is not among the candidates' {self.positions.tolist()}"
            )
        if (
            isinstance(layer, bool)
            or not isinstance(layer, (int, np.integer))
            or not 0 <= layer < self.vectors.shape[1]
        ):
            raise ValueError(f"layer must lie in 0 to {self.vectors.shape[1] - 1}, not {layer!r}")
        return self._at(self.positions.tolist().index(position), int(layer))

    def _at(self, p: int, l: int) -> SteeringVector:
        return SteeringVector(
            self.vectors[p, l], l, position=int(self.positions[p]), method="dim", meta=self.meta
        )

    def _tables(self, scorer: Scorer) -> tuple[dict[str, Float64Array], Scores]:
        """Empty tables by score, and the Scores that show them."""
        tables = {name: np.full(self.vectors.shape[:2], np.nan) for name in Scorer.SCORES}
        return tables, Scores(
            **tables,
            positions=tuple(self.positions.tolist()),
            refusal_tokens=scorer.refusal,
            unsteered=scorer.unsteered,
        )

    def _measure(
        self,
        scorer: Scorer,
        tables: dict[str, Float64Array],
        score: str,
        candidates: Sequence[tuple[int, int]],
        *,
        progress: Progress,
        store: Store,
    ) -> None:
        """Fills one table at these candidates, layer by layer: rows that steer one layer run
        together. Layers that the store holds are taken from it.
        """
        for l in sorted({l for _, l in candidates}):
            here = [candidate for candidate in candidates if candidate[1] == l]
            name = f"{score}, layer {l}, position indices {[p for p, _ in here]}"
            if name in store:
                progress.step(len(here) * len(scorer.prompts(score)))
            else:
                vectors = [self._at(*candidate) for candidate in here]
                store.put(name, scorer.measure(score, vectors, progress.step))
            tables[score][tuple(np.array(here).T)] = store[name]

    def _store(
        self,
        out: PathLike | None,
        harmful: Sequence[Sequence[int]],
        harmless: Sequence[Sequence[int]],
        refusal_tokens: Sequence[int] | None,
    ) -> Store:
        """Scores of finished layers; the key is everything that a score depends on."""
        key = ""
        if out is not None:
            tokens = None if refusal_tokens is None else np.atleast_1d(refusal_tokens).tolist()
            vectors = hashlib.sha256(np.ascontiguousarray(self.vectors).tobytes()).hexdigest()
            key = digest(identity(self.model), vectors, harmful, harmless, tokens)
        return Store(
            out,
            format="vksteer.candidate_scores",
            key=key,
            argument="out",
            what="file of candidates' scores",
            other="another model, other candidates or other prompts",
            field=None,
        )

    def evaluate(
        self,
        val_harmful: Prompts,
        val_harmless: Prompts,
        refusal_tokens: Sequence[int] | None = None,
        layers: Sequence[int] | int | None = None,
        *,
        progress: ProgressLike = True,
    ) -> Scores:
        """All four scores of every position at the given layers (docs/method.md section 2): Scores
        with float64 [P, L] tables, means over prompts, NaN at other layers.

        val_harmful, val_harmless: prompts (texts or token lists). refusal_tokens: ids (default:
        derived from the model's first tokens on these prompts; `.refusal_tokens` of the result and
        the progress bar show them). layers: one or several (default: all). progress: True, False or
        callable(done, total). A zero vector gets the scores of the unsteered model and KL 0.
        Raises ValueError for empty lists, prompts longer than the context, and layers or tokens
        that the model does not have.
        """
        P, L, _ = self.vectors.shape
        chosen = layer_list(layers, L)
        harmful = as_tokens(self.model, val_harmful, "val_harmful")
        harmless = as_tokens(self.model, val_harmless, "val_harmless")
        refuse_equal_classes(harmful, harmless)
        candidates = [(p, l) for l in chosen for p in range(P)]
        total = 2 * len(candidates) * (len(harmful) + len(harmless))
        with Progress(progress, total, "scores") as bar:
            scorer = Scorer(self.model, harmful, harmless, refusal_tokens, bar)
            tables, result = self._tables(scorer)
            kept = self._store(None, harmful, harmless, refusal_tokens)
            for score in Scorer.SCORES:
                self._measure(scorer, tables, score, candidates, progress=bar, store=kept)
        self.table = result
        return result

    def select(
        self,
        val_harmful: Prompts,
        val_harmless: Prompts,
        criterion: str = "paper",
        strict: bool = False,
        refusal_tokens: Sequence[int] | None = None,
        *,
        relax: bool = False,
        out: PathLike | None = None,
        progress: ProgressLike = True,
    ) -> SteeringVector:
        """The candidate that the rule chooses on these validation prompts (`choose`, docs/method.md
        section 2), as a SteeringVector with its scores in meta.

        val_harmful, val_harmless: texts or token lists. criterion: "paper" (default) or "arditi",
        which scores bypass under ablation. strict: the paper's inequalities instead of those of the
        authors' code. refusal_tokens: token ids (default: derived from the model's first tokens on
        these prompts). relax: where no candidate passes, choose by the same rule without the filter
        on induce; `meta["selection"]["relaxed"]` says whether that happened. out: a .jsonl file of
        scores, a line for each score and layer, from which an interrupted call goes on. progress:
        True, False or callable(done, total).
        Measures only what the choice needs: induce where the layer filter passes, KL where induce
        does, bypass where KL does. Then `rejected` names the filter that removed each other
        candidate, and `table` holds what was measured, float64 [P, L] with NaN elsewhere.
        Raises ValueError where no candidate is left, with the counts and the closest one; before
        any work for an unknown criterion, a file of other scores, and arguments as in `evaluate`.
        """
        check_criterion(criterion)
        harmful = as_tokens(self.model, val_harmful, "val_harmful")
        harmless = as_tokens(self.model, val_harmless, "val_harmless")
        refuse_equal_classes(harmful, harmless)
        kept = self._store(out, harmful, harmless, refusal_tokens)
        allowed = self._allowed(zero := self._zero(), strict)
        score = "bypass_ablation" if criterion == "arditi" else "bypass"
        # The most rows that may be run; what a filter removes counts as done.
        total = len(allowed) * (2 * len(harmless) + len(harmful))
        with Progress(progress, total, "select") as bar:
            scorer = Scorer(self.model, harmful, harmless, refusal_tokens, bar)
            tables, self.table = self._tables(scorer)
            measure = partial(self._measure, scorer, tables, progress=bar, store=kept)
            measure("induce", allowed)
            left = _measured(measure, tables, score, tables["induce"], allowed, strict)
            if relaxed := relax and not left:
                bar.say("no candidate passes all filters: the one on the induce score is dropped")
                every = np.ones_like(tables["kl"])
                left = _measured(measure, tables, score, every, allowed, strict)
            bar.step(total - bar.done)
        eligible, rejected = examine(
            tables[score], tables["induce"], tables["kl"], strict=strict, positions=self.positions
        )
        self.rejected = [self._explained(r, zero) for r in rejected]
        if relaxed:
            eligible = [c for c in left if not np.isnan(tables[score][c])]
        if not eligible:
            raise none_left(self.rejected)
        best = best_of(eligible, tables[score], tables["induce"], criterion)
        chosen = {"criterion": criterion, "strict": bool(strict), "relaxed": relaxed}
        chosen |= {name: tables[name][best] for name in (score, "induce", "kl")}
        return self._chosen(best, chosen | _setting(scorer))

    def _allowed(self, zero: set[tuple[int, int]], strict: bool) -> list[tuple[int, int]]:
        """The candidates that pass the filter on layers and are not zero, layer by layer."""
        P, L, _ = self.vectors.shape
        places = [(p, l) for l in range(L) for p in range(P) if layer_allowed(l, L, strict)]
        return [place for place in places if place not in zero]

    def _zero(self) -> set[tuple[int, int]]:
        """(position index, layer) of the vectors that are zero."""
        P, L, _ = self.vectors.shape
        return {(p, l) for p, l in np.ndindex(P, L) if not self.vectors[p, l].any()}

    def _chosen(self, candidate: tuple[int, int], selection: dict[str, Any]) -> SteeringVector:
        p, l = candidate
        return SteeringVector(
            self.vectors[p, l],
            l,
            position=int(self.positions[p]),
            method="dim",
            meta=dict(self.meta, selection=selection),
        )

    @staticmethod
    def _explained(rejection: Rejection, zero: set[tuple[int, int]]) -> Rejection:
        if rejection.filter == "undefined" and (rejection.index, rejection.layer) in zero:
            return Rejection(
                rejection.index,
                rejection.layer,
                "undefined",
                "the two means are equal: the vector is zero",
                np.inf,
                rejection.position,
            )
        return rejection

    @property
    def closest(self) -> Rejection | None:
        """Of the candidates that the last `select` rejected, the one of the smallest shortfall."""
        return closest(self.rejected)


def _measured(
    measure: Callable[[str, Sequence[tuple[int, int]]], None],
    tables: dict[str, Float64Array],
    score: str,
    induce: Float64Array,
    allowed: Sequence[tuple[int, int]],
    strict: bool,
) -> list[tuple[int, int]]:
    """Those of the allowed candidates that pass the filters on this induce score and on KL. KL is
    measured where induce passes and `score` where KL does, unless it has been.
    """
    passed = np.zeros(induce.shape)

    def passing(kl: Float64Array) -> list[tuple[int, int]]:
        return [c for c in examine(passed, induce, kl, strict=strict)[0] if c in allowed]

    measure("kl", [c for c in passing(passed) if np.isnan(tables["kl"][c])])
    left = passing(tables["kl"])
    measure(score, [c for c in left if np.isnan(tables[score][c])])
    return left


def _setting(scorer: Scorer) -> dict[str, Any]:
    """What a selection depended on."""
    return {
        "refusal_tokens": list(scorer.refusal.ids),
        "refusal_token_texts": list(scorer.refusal.texts),
        "unsteered": list(scorer.unsteered),
        "validation_prompts_hash": digest(scorer.harmful, scorer.harmless),
        "n_validation": [len(scorer.harmful), len(scorer.harmless)],
    }


def _positions(model: Model, positions: Sequence[int] | int | None) -> IntArray:
    """Ascending positions."""
    if positions is None:
        n = model.post_instruction_length
        if n < 1:
            raise ValueError(
                "this model's chat template puts no token after the instruction: name"
                " positions=[-1] or others"
            )
        return np.arange(-n, 0)
    given = [positions] if isinstance(positions, (int, np.integer)) else list(positions)
    for p in given:
        if not is_int(p) or p >= 0:
            raise ValueError(
                "positions count back from the prompt's end and must be negative whole numbers,"
                f" not {p!r}"
            )
    if not given or len(set(given)) != len(given):
        raise ValueError(f"positions must name at least one position and none twice, not {given}")
    return np.array(sorted(int(p) for p in given))


#: Tokens of a batch where means are kept in a file: less is lost than with the usual batches.
KEPT_TOKENS = 2048


def _means(
    model: Model,
    rows: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    positions: IntArray,
    store: Store,
    bar: Progress,
) -> tuple[Float64Array, Float64Array]:
    """The means of resid_pre over both lists of prompts, float64 [P, L, D] each, summed prompt by
    prompt so that they do not depend on batches. The store holds the sums so far.
    """
    config = model.config
    totals: list[Float64Array] = []
    first = 0
    if "sums" in store:
        totals, first = store["sums"]["totals"], store["sums"]["prompts"]
    if first:
        bar.step(first)
    for kind, some in enumerate(rows):
        if len(totals) <= kind:
            totals.append(np.zeros((len(positions), config.n_layers, config.d_model)))
        done = max(0, min(len(some), first - sum(map(len, rows[:kind]))))
        total, left = totals[kind], some[done:]
        most = max(1, CAPTURE_BYTES // (4 * max(map(len, some)) * config.n_layers * config.d_model))
        tokens = 8192 if store.path is None else KEPT_TOKENS
        for part in batches(left, tokens=tokens, most=most):
            _, rest = layer_inputs(model, left[part], range(config.n_layers), -int(positions[0]))
            # Rows are padded on the left, so negative positions are those of the row.
            captured = np.stack([rest[l][:, positions] for l in range(config.n_layers)], axis=2)
            for one in captured:
                total += one
            bar.step(len(captured))
            if store.path is not None:
                store.put("sums", {"totals": totals, "prompts": bar.done})
    return totals[0] / len(rows[0]), totals[1] / len(rows[1])


def difference_in_means(
    model: Model,
    harmful: Prompts,
    harmless: Prompts,
    positions: Sequence[int] | None = None,
    *,
    out: PathLike | None = None,
    progress: ProgressLike = True,
) -> Candidates:
    """The mean of resid_pre over harmful prompts minus that over harmless prompts, at every
    post-instruction position and layer (docs/method.md section 2).

    harmful, harmless: prompts (texts or token lists). positions: negative, counted back from the
    prompt's end (default: all that the chat template puts after the instruction). out: a .json file
    of the sums so far, from which an interrupted call goes on. One pass over the prompts; means are
    float64 sums in prompt order, so results are bit-identical for every batch size. Returns
    Candidates: `.vectors` float32 [P, L, D], `.positions` [P] ascending.
    Raises ValueError for empty lists, for prompts longer than the context, for prompts shorter than
    a position reaches back, and for a file of other sums.
    """
    at = _positions(model, positions)
    harmful, harmless = as_list(harmful, "harmful"), as_list(harmless, "harmless")
    refuse_equal_classes(harmful, harmless)
    rows = as_tokens(model, harmful, "harmful"), as_tokens(model, harmless, "harmless")
    for what, some in zip(("harmful", "harmless"), rows):
        for i, row in enumerate(some):
            if len(row) < -at[0]:
                raise ValueError(
                    f"{what}[{i}] has {len(row)} tokens, position {at[0]} reaches before its start"
                )
    store = Store(
        out,
        format="vksteer.sums_of_activations",
        key=digest(identity_for(out, model), rows, at),
        argument="out",
        what="file of sums of activations",
        other="another model, other prompts or other positions",
    )
    with Progress(progress, len(rows[0]) + len(rows[1]), "means") as bar:
        of_harmful, of_harmless = _means(model, rows, at, store, bar)
    meta = provenance(model, prompts_hash=digest(*rows), n_prompts=[len(rows[0]), len(rows[1])])
    texts = [token_text(model, rows[0][0][p]) for p in at]
    difference = np.ascontiguousarray(of_harmful - of_harmless, dtype=np.float32)
    return Candidates(model, difference, at, texts, meta)
