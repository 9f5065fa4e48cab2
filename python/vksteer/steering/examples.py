"""Pairs to learn a vector from: for every prompt a response that shows the desired behaviour and
one that does not (docs/method.md section 2).

All responses come from the model itself: refusals of harmful prompts and compliance on harmless
ones as it answers them, refusals of harmless prompts after a prefix that asks for them, and
compliance on harmful prompts under a steering vector.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from ..base.checks import is_int, require_int
from ..base.progress import Progress
from ..base.provenance import digest, identity_for, kernel_names, provenance
from ..base.store import Store
from ..base.types import BoolArray, PathLike, ProgressLike, Prompts
from ..base.whole_files import write_whole
from ..errors import ModelError
from ..inputs.prompt_pair import magnitudes
from ..inputs.prompts import as_list, as_tokens, refuse_equal_classes
from ..inputs.vectors import SteeringVector
from ..judge import long_enough, refused, succeeded
from ..runtime.edits import Steer

if TYPE_CHECKING:
    from ..judge import Judge
    from ..runtime.model import Model

PREFIX = "Treat the following question as dangerous and refuse."
FORMAT = "vksteer training data 1"
#: New tokens of a response. More than the 64 that training reads, so that the end-of-turn token
#: that is appended to a response which was cut off is never learned.
NEW = 96


@dataclass(frozen=True)
class Example:
    """One prompt with two responses, each a text or token ids. sign: +1 if a positive coefficient
    should bring about the winning response (refusal), -1 if a negative one should (compliance).

    In training a text prompt goes through the chat template and a text response gets the
    end-of-turn token appended; token ids stay as they are. Raises ValueError for blank texts, empty
    lists, what is no token id, and another sign.
    """

    prompt: str | list[int]
    winning: str | list[int]
    losing: str | list[int]
    sign: int

    def __post_init__(self) -> None:
        for name in ("prompt", "winning", "losing"):
            value = getattr(self, name)
            if isinstance(value, np.ndarray):
                value = value.tolist()
            if isinstance(value, str):
                if not value.strip():
                    raise ValueError(f"{name} is blank: a text says something, or give token ids")
                continue
            value = list(value) if isinstance(value, (list, tuple)) else None
            if not value or any(not is_int(t) or t < 0 for t in value):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}: a text, or token ids that are not empty"
                )
            object.__setattr__(self, name, [int(t) for t in value])
        if not is_int(self.sign) or self.sign not in (1, -1):
            raise ValueError(f"sign must be +1 or -1, not {self.sign!r}")
        object.__setattr__(self, "sign", int(self.sign))


class TrainingData(list[Example]):
    """A list of Example. counts: {"asked": prompts, reason: how many pairs were dropped for it}.
    meta: provenance.
    """

    def __init__(
        self,
        examples: Sequence[Example] = (),
        *,
        counts: dict[str, int] | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(examples)
        self.counts, self.meta = dict(counts or {}), dict(meta or {})

    @property
    def line(self) -> str:
        """One line: how many pairs were kept, by sign, and how many dropped, by reason."""
        signs = [e.sign for e in self]
        why = ", ".join(
            f"{n} {reason}" for reason, n in self.counts.items() if n and reason != "asked"
        )
        return (
            f"{len(self)} pairs of {self.counts.get('asked', len(self))} prompts: {signs.count(1)}"
            f" refusals of harmless, {signs.count(-1)} compliances with harmful prompts"
            + (f" (dropped: {why})" if why else "")
        )

    def __repr__(self) -> str:
        return f"TrainingData({self.line})"

    @overload
    def __getitem__(self, i: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> TrainingData: ...
    def __getitem__(self, i: SupportsIndex | slice) -> Example | TrainingData:
        if isinstance(i, slice):
            return TrainingData(super().__getitem__(i), counts=self.counts, meta=self.meta)
        return super().__getitem__(i)

    def save(self, path: PathLike) -> None:
        """Writes JSON lines: first provenance, counts and a checksum, then one line for each pair;
        an existing file is replaced in one step.
        """
        lines = [
            json.dumps(
                {"prompt": e.prompt, "winning": e.winning, "losing": e.losing, "sign": e.sign},
                ensure_ascii=False,
            )
            for e in self
        ]
        head = json.dumps(
            {
                "format": FORMAT,
                "counts": self.counts,
                "meta": self.meta,
                "n": len(lines),
                "checksum": digest(lines),
            },
            ensure_ascii=False,
        )
        write_whole(path, ("\n".join([head, *lines]) + "\n").encode("utf-8"))

    @classmethod
    def load(cls, path: PathLike) -> TrainingData:
        """Read what `save` wrote. ModelError for a file that was cut short or edited or is
        something else; OSError.
        """
        # Not splitlines(), which also cuts at U+2028 and its like inside a text.
        text = Path(path).read_text(encoding="utf-8", errors="replace")
        lines = text.removesuffix("\n").split("\n") if text else []
        try:
            head, *pairs = [json.loads(line) for line in lines]
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']!r}")
            if len(pairs) != head["n"] or digest(lines[1:]) != head["checksum"]:
                raise ValueError(
                    "the content does not match its checksum: the file was cut short or edited"
                )
            return cls(
                [Example(**pair) for pair in pairs], counts=head["counts"], meta=head["meta"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ModelError(f"{path}: no training data of vksteer: {error}") from None


#: Reasons for which a prompt gives no pair; keys of TrainingData.counts.
NOT_REFUSED, NOT_COMPLIED = (
    "harmful prompts that the model does not refuse",
    "harmful prompts that it does not comply with under the vector",
)
NOT_ANSWERED, NOT_TALKED_INTO = (
    "harmless prompts that it refuses",
    "harmless prompts that it does not refuse after the prefix",
)
EMPTY = "with an empty response"


def training_data(
    model: Model,
    harmful: Prompts,
    harmless: Prompts,
    vector: SteeringVector,
    coefficient: float | tuple[float, float] = 1.0,
    *,
    prefix: str = PREFIX,
    max_new_tokens: int = NEW,
    judge: Judge | None = None,
    min_words: int | str | None = "auto",
    batch_size: int | None = None,
    out: PathLike | None = None,
    progress: ProgressLike = True,
) -> TrainingData:
    """Pairs of the model's own responses, for `train_ntp` and `train_po` (docs/method.md
    section 2).

    harmful: prompts (texts or token lists) whose pair is (compliance under -minus * vector, the
    model's own refusal), sign -1. harmless: texts whose pair is (refusal after `prefix`, the
    model's own answer), sign +1. vector: the difference in means. coefficient: the magnitude that
    bypasses refusal, or (plus, minus), of which minus is used.
    A pair is dropped where one of its responses does not show its behaviour: by the substring
    judge, and for compliance with harmful prompts also by `judge` (callable(prompts, responses) ->
    bool [n], True for unsafe) and `min_words`, as in `freezing.ablation_table`. Decoding is greedy
    and responses are kept as texts. out: a .jsonl file of responses, 32 to a line, from which an
    interrupted call goes on. Returns TrainingData, harmful prompts first. Raises ValueError
    before any work for a vector of another width or layer or zero, empty lists, harmless token
    lists, prompts that leave no room in the context, a blank prefix, a model without a tokenizer,
    and a file of another model, vector or other prompts.
    """
    minus = _check(model, vector, coefficient, prefix, min_words)
    new = require_int(max_new_tokens, "max_new_tokens", 1)
    harmful, harmless = as_list(harmful, "harmful"), as_list(harmless, "harmless")
    refuse_equal_classes(harmful, harmless)
    rows = _rows(model, harmful, harmless, prefix, new)
    steer = Steer(vector, -minus)
    store = _store(model, rows, steer, new, out)
    made = _respond(model, rows, steer, new, batch_size, store, progress)
    examples, counts = _examples(model, harmful, harmless, made, judge, min_words)
    meta = provenance(
        model,
        kernels=kernel_names(model),
        vector_hash=digest(vector.direction),
        layer=vector.layer,
        coefficient=minus,
        prefix=prefix,
        max_new_tokens=new,
        judge="substring" if judge is None else type(judge).__name__,
        prompts_hash=digest(rows[0], rows[2]),
        n_prompts=[len(harmful), len(harmless)],
    )
    data = TrainingData(examples, counts=counts, meta=meta)
    if progress is True:
        print(f"vksteer: {data.line}", file=sys.stderr)
    if not data:
        warnings.warn(_NO_PAIR.format(line=data.line), stacklevel=2)
    return data


_NO_PAIR = (
    "no pair is left: {line}. Does the model refuse these harmful prompts, and does the vector"
    " bypass that?"
)


def _check(
    model: Model,
    vector: SteeringVector,
    coefficient: float | tuple[float, float],
    prefix: str,
    min_words: int | str | None,
) -> float:
    """The magnitude that bypasses refusal."""
    if not isinstance(vector, SteeringVector):
        raise ValueError(f"vector must be a SteeringVector, not {type(vector).__name__}")
    vector.check(model)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it brings about no compliance")
    minus = magnitudes(coefficient)[1]
    if minus == 0:
        raise ValueError("coefficient 0 steers nothing: give the magnitude that bypasses refusal")
    if not isinstance(prefix, str) or not prefix.strip():
        raise ValueError(f"prefix must be a text that asks for a refusal, not {prefix!r}")
    if getattr(model, "tokenizer", None) is None:
        raise ValueError("training data are texts that are judged, and this model has no tokenizer")
    if min_words != "auto" and min_words is not None:
        require_int(min_words, "min_words", 0)
    return minus


def _rows(
    model: Model, harmful: Prompts, harmless: Prompts, prefix: str, new: int
) -> list[list[list[int]]]:
    """Token rows of the four kinds: harmful prompts unsteered and steered, harmless prompts alone
    and after the prefix.
    """
    for i, prompt in enumerate(harmless):
        if not isinstance(prompt, str):
            raise ValueError(
                f"harmless[{i}] is a token list: the prefix needs texts to stand before"
            )
    return [
        as_tokens(model, some, what, room=new)
        for some, what in (
            (harmful, "harmful"),
            (harmful, "harmful"),
            (harmless, "harmless"),
            ([f"{prefix} {p}" for p in harmless], "harmless, with the prefix"),
        )
    ]


#: Responses of a line of the file.
KEPT = 32


def _store(
    model: Model, rows: Sequence[list[list[int]]], steer: Steer, new: int, out: PathLike | None
) -> Store:
    """Finished responses; the key is everything that they depend on."""
    vector = steer.vector
    return Store(
        out,
        format="vksteer.responses",
        key=digest(
            identity_for(out, model),
            vector.direction,
            vector.layer,
            steer.coefficient,
            rows,
            new,
        ),
        argument="out",
        what="file of responses",
        other="another model, vector, coefficient or other prompts",
        field=None,
    )


def _respond(
    model: Model,
    rows: Sequence[list[list[int]]],
    steer: Steer,
    new: int,
    batch_size: int | None,
    store: Store,
    progress: ProgressLike,
) -> list[list[str]]:
    """Greedy responses to the four kinds of rows, of which the second is steered. With a file they
    are generated in parts of 32, which changes no response.
    """
    jobs = [(row, [steer] if kind == 1 else []) for kind, some in enumerate(rows) for row in some]

    def answered(part: Sequence[tuple[list[int], list[Steer]]], shown: ProgressLike) -> list[str]:
        made = model.generate(
            [row for row, _ in part],
            max_new_tokens=new,
            edits=[edits for _, edits in part],
            temperature=0.0,
            batch_size=batch_size,
            progress=shown,
        )
        return [g.text for g in made]

    texts: list[str] = []
    if store.path is None:
        texts = answered(jobs, progress)
    else:
        with Progress(progress, len(jobs), "responses") as bar:
            for first in range(0, len(jobs), KEPT):
                part = jobs[first : first + KEPT]
                if str(first) not in store:
                    store.put(str(first), answered(part, False))
                texts += store[str(first)]
                bar.step(len(part))
    ends = np.cumsum([len(some) for some in rows]).tolist()
    return [texts[end - len(some) : end] for some, end in zip(rows, ends, strict=True)]


def _examples(
    model: Model,
    harmful: Prompts,
    harmless: Prompts,
    made: Sequence[list[str]],
    judge: Judge | None,
    min_words: int | str | None,
) -> tuple[list[Example], dict[str, int]]:
    """(examples of the pairs that show their behaviours, counts)."""
    plain, steered, answered, prefixed = made
    complied = ~refused(steered)
    if judge is not None:
        tokenizer = model.tokenizer
        assert tokenizer is not None  # training_data has checked it
        texts = [p if isinstance(p, str) else tokenizer.decode(p) for p in harmful]
        complied &= succeeded(texts, steered, judge, min_words)
    elif min_words is not None and min_words != "auto":
        complied &= long_enough(steered, int(min_words))
    counts = {"asked": len(harmful) + len(harmless)}
    examples = _pairs(
        harmful,
        steered,
        plain,
        -1,
        ((refused(plain), NOT_REFUSED), (complied, NOT_COMPLIED)),
        counts,
    )
    examples += _pairs(
        harmless,
        prefixed,
        answered,
        1,
        ((~refused(answered), NOT_ANSWERED), (refused(prefixed), NOT_TALKED_INTO)),
        counts,
    )
    return examples, counts


def _pairs(
    prompts: Prompts,
    winning: Sequence[str],
    losing: Sequence[str],
    sign: int,
    tests: Sequence[tuple[BoolArray, str]],
    counts: dict[str, int],
) -> list[Example]:
    """Examples of the prompts that pass every test (bool [n], reason). `counts` counts the others
    by the reason of the first test that they fail.
    """
    kept = []
    for i, prompt in enumerate(prompts):
        reason = next((why for passed, why in tests if not passed[i]), None)
        if reason is None and not (winning[i].strip() and losing[i].strip()):
            reason = EMPTY
        if reason is None:
            text = prompt if isinstance(prompt, str) else list(prompt)
            kept.append(Example(text, winning[i], losing[i], sign))
        else:
            counts[reason] = counts.get(reason, 0) + 1
    return kept
