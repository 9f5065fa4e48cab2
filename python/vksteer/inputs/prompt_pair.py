"""The experiment that every table repeats: harmless prompts steered by +a, harmful ones by -a, in
one batch of generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ..base.checks import is_number, require_int
from ..base.provenance import digest, identity
from ..base.store import Store
from ..base.types import PathLike
from ..judge import Rate, ended, succeeded
from ..runtime.edits import Steer
from .dosing import stream_norms
from .prompts import as_list, as_tokens, refuse_equal_classes

if TYPE_CHECKING:
    from ..runtime.model import Model
    from .vectors import SteeringVector


def magnitudes(coefficient: Any) -> tuple[float, float]:
    """(plus, minus) from one magnitude or two: harmless prompts get +plus, harmful ones -minus.

    Raises ValueError for anything but one or two finite numbers from 0 on.
    """
    pair = (
        (coefficient, coefficient)
        if isinstance(coefficient, (int, float, np.integer, np.floating))
        else coefficient
    )
    try:
        pair = tuple(pair)
    except TypeError:
        raise ValueError(
            f"coefficient must be a number or a pair (plus, minus), not {coefficient!r}"
        ) from None
    for value in pair:
        if not is_number(value) or value < 0:
            raise ValueError(
                f"coefficient: {value!r} is no magnitude (a finite number from 0 on; the sign comes"
                " from the prompts: harmless +, harmful -)"
            )
    if len(pair) != 2:
        raise ValueError(
            f"coefficient must be one magnitude or (plus, minus), not {len(pair)} numbers"
        )
    return float(pair[0]), float(pair[1])


def baseline_instructions(given: Any) -> tuple[str, str]:
    """(text before harmless prompts, text before harmful ones) from one text or two.

    Raises ValueError for anything else, and for a blank text.
    """
    pair = (given, given) if isinstance(given, str) else given
    if (
        not isinstance(pair, (list, tuple))
        or len(pair) != 2
        or not all(isinstance(text, str) and text.strip() for text in pair)
    ):
        raise ValueError(
            "prompt_baseline must be a text that is not blank, or two: (before harmless prompts,"
            f" before harmful ones), not {given!r}"
        )
    return pair[0], pair[1]


@dataclass
class Answer:
    """What a table keeps of one generation."""

    text: str
    finish_reason: str
    n_tokens: int


#: The answers of one run: "harmless" and "harmful".
Answers: TypeAlias = dict[str, list[Answer]]


class AnswerStore:
    """Answers of finished runs by name, in a file from which an interrupted table goes on.

    out: the file, or None to keep them in memory only. The other arguments and the errors are those
    of `base.store.Store`.
    """

    def __init__(
        self,
        out: PathLike | None,
        *,
        format: str,
        key: str,
        what: str,
        other: str,
        field: str | None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._store = Store(
            out,
            format=format,
            key=key,
            argument="out",
            what=what,
            other=other,
            field=field,
            about=about,
        )
        try:
            self.answers: dict[str, Answers] = {
                name: {
                    side: [Answer(**a) for a in some] for side, some in self._store[name].items()
                }
                for name in self._store
            }
        except (TypeError, AttributeError) as error:
            self._store.refuse(error)

    def put(self, name: str, answers: Answers) -> None:
        self.answers[name] = answers
        self._store.put(name, {side: [asdict(a) for a in some] for side, some in answers.items()})


def _store(model: Model, out: PathLike) -> AnswerStore:
    return AnswerStore(
        out,
        format="vksteer.answers",
        key=digest("answers 2", identity(model)),
        what="file of answers",
        other="another model",
        field=None,
    )


@dataclass
class PromptPair:
    """Harmful and harmless prompts, checked and as tokens; `run` answers all of them in
    one call of the engine.
    """

    model: Model
    harmful: list[str | list[int]]
    harmless: list[str | list[int]]
    harmful_rows: list[list[int]]
    harmless_rows: list[list[int]]
    max_new_tokens: int
    batch_size: int | None
    store: AnswerStore | None = None  # what `run` keeps answers in and takes finished ones from

    @classmethod
    def of(
        cls,
        model: Model,
        harmful: Any,
        harmless: Any,
        max_new_tokens: int,
        batch_size: int | None = None,
        out: PathLike | None = None,
    ) -> PromptPair:
        """The pair of two lists of prompts, as `prompts.as_list` takes them. out: a .jsonl file of
        answers, one line for each `run`; a later pair of the same model takes runs with the same
        prompts and steering from it.

        Raises ValueError as `as_list` does, for a prompt that leaves no room for the answer, and
        for a file of another model.
        """
        new = require_int(max_new_tokens, "max_new_tokens", 1)
        harmful, harmless = as_list(harmful, "harmful"), as_list(harmless, "harmless")
        refuse_equal_classes(harmful, harmless)
        return cls(
            model,
            harmful,
            harmless,
            as_tokens(model, harmful, "harmful", room=new),
            as_tokens(model, harmless, "harmless", room=new),
            new,
            batch_size,
            None if out is None else _store(model, out),
        )

    def __len__(self) -> int:
        return len(self.harmful) + len(self.harmless)

    def prompted(self, baseline: Any) -> PromptPair | None:
        """The same prompts with an instruction before each, as a baseline of steering; judges are
        asked about the prompts without it. baseline: one text, or (before harmless prompts, before
        harmful ones), or None, which gives None.

        Raises ValueError for anything else, for prompts that are token lists, and for a prompt that
        leaves no room for the answer.
        """
        if baseline is None:
            return None
        instructions = baseline_instructions(baseline)
        rows = []
        for side, text in zip(("harmless", "harmful"), instructions, strict=True):
            prompts: list[str | list[int]] = getattr(self, side)
            tokens = [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]
            if tokens:
                raise ValueError(
                    f"prompt_baseline puts a text before each prompt, and {side}[{tokens[0]}] is a"
                    " list of tokens: give texts"
                )
            before = text if text[-1].isspace() else f"{text} "
            what = f"prompt_baseline with {side}"
            joined = [f"{before}{prompt}" for prompt in prompts]
            rows.append(as_tokens(self.model, joined, what, room=self.max_new_tokens))
        return replace(self, harmless_rows=rows[0], harmful_rows=rows[1])

    def run(
        self,
        vector: SteeringVector | None = None,
        plus: float = 0.0,
        minus: float = 0.0,
        sides: Sequence[str] = ("harmless", "harmful"),
        **options: Any,
    ) -> Answers:
        """{"harmless": answers under +plus, "harmful": answers under -minus}, greedy; without a
        vector, unsteered. sides: those that are run. options: freeze and the like.
        """
        if self.store is None:
            return self._answered(vector, plus, minus, sides, options)
        steered = None if vector is None else [vector.direction, vector.layer, plus, minus]
        name = digest(
            self.harmful_rows,
            self.harmless_rows,
            self.max_new_tokens,
            steered,
            list(sides),
            options,
        )
        if name not in self.store.answers:
            self.store.put(name, self._answered(vector, plus, minus, sides, options))
        return self.store.answers[name]

    def _answered(
        self,
        vector: SteeringVector | None,
        plus: float,
        minus: float,
        sides: Sequence[str],
        options: dict[str, Any],
    ) -> Answers:
        prompts = {"harmless": self.harmless_rows, "harmful": self.harmful_rows}
        signed = {"harmless": plus, "harmful": -minus}
        edits: Sequence[Any] = ()
        if vector is not None:
            edits = [[Steer(vector, signed[side])] for side in sides for _ in prompts[side]]
        made = self.model.generate(
            [row for side in sides for row in prompts[side]],
            max_new_tokens=self.max_new_tokens,
            edits=edits,
            temperature=0.0,
            batch_size=self.batch_size,
            progress=False,
            **options,
        )
        answers = [Answer(g.text, g.finish_reason, len(g.tokens)) for g in made]
        out, start = {}, 0
        for side in sides:
            out[side] = answers[start : start + len(prompts[side])]
            start += len(prompts[side])
        return out

    def doses(self, vector: SteeringVector) -> dict[str, float]:
        """The dose of coefficient 1 (`vs.dose`) on the tokens of the prompts, the mean for each
        side: that of a coefficient a is |a| times it.
        """
        sides = {"harmless": self.harmless_rows, "harmful": self.harmful_rows}
        norms = {side: stream_norms(self.model, rows, vector.layer) for side, rows in sides.items()}
        return {
            side: float(np.mean([np.mean(vector.norm / row) for row in rows]))
            for side, rows in norms.items()
        }

    def rates(
        self, answers: Answers, judge: Any = None, min_words: int | str | None = "auto"
    ) -> dict[str, Rate]:
        """A Rate for each side that was run. The judge is asked about harmful prompts only; on
        harmless ones the substring judge decides (method.md section 3).
        """
        out = {}
        # a judge takes texts; the substring judge does not read prompts, which may be tokens
        sides: dict[str, Any] = {"harmless": self.harmless, "harmful": self.harmful}
        for side in answers:
            prompts = sides[side]
            texts = [a.text for a in answers[side]]
            success = (
                succeeded(prompts, texts, judge, min_words)
                if side == "harmful"
                else succeeded(prompts, texts)
            )
            out[side] = Rate.of(success, texts, ended(answers[side]))
        return out
