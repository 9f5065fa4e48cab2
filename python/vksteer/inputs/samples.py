"""Samples of multi-token patching: a prompt and a whole response, teacher forced (docs/method.md
section 5).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, is_number, require_int
from ..base.json_files import load_json, save_json
from ..base.provenance import digest, fingerprint, loaded_with
from ..base.types import BoolArray, PathLike, ProgressLike
from ..errors import ModelError
from ..judge import succeeded
from ..runtime.edits import Steer
from .prompts import as_list, as_tokens

if TYPE_CHECKING:
    from ..loading.config import Config
    from ..runtime.decoding import Generation
    from ..runtime.model import Model
    from .vectors import SteeringVector


@dataclass(frozen=True)
class Sample:
    """prompt_tokens, response_tokens: token ids, kept as tuples of int. The response holds its end
    token where the model produced one.

    Raises ValueError for an empty prompt or response and for anything but whole numbers from 0 on.
    """

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "response_tokens"):
            object.__setattr__(self, name, _tokens(getattr(self, name), name))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt_tokens + self.response_tokens

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)

    def __repr__(self) -> str:
        return (
            f"Sample({len(self.prompt_tokens)} prompt tokens, {len(self.response_tokens)} response"
            " tokens)"
        )

    def check(self, model: Model | Config, what: str = "sample") -> None:
        """Raises ValueError where it does not fit the model: a token outside the vocabulary, more
        tokens than the context.
        """
        c: Any = getattr(model, "config", model)
        if len(self) > c.n_ctx:
            raise ValueError(
                f"{what} has {len(self.prompt_tokens)} prompt and {len(self.response_tokens)}"
                f" response tokens, the model's context holds {c.n_ctx}: shorten or drop it"
            )
        if max(self.tokens) >= c.d_vocab:
            at = self.tokens.index(max(self.tokens))
            raise ValueError(
                f"{what}, position {at}: token {self.tokens[at]} is not in the vocabulary of"
                f" {c.d_vocab}"
            )


def _tokens(values: Any, name: str) -> tuple[int, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, (Iterable, np.ndarray)):
        raise ValueError(f"{name} must be token ids, not {values!r}")
    values = list(values)
    for i, t in enumerate(values):
        if not is_int(t) or t < 0:
            raise ValueError(f"{name}[{i}] is {t!r}, not a token id")
    if not values:
        raise ValueError(
            f"{name} is empty: a sample needs a prompt and a response of at least one token each"
        )
    return tuple(int(t) for t in values)


def check_samples(model: Model | Config, samples: Any) -> list[Sample]:
    """A list of Sample, each of which fits the model; one Sample alone counts as a list of one.

    Raises ValueError naming the sample for anything else, and for an empty list.
    """
    found = [samples] if isinstance(samples, Sample) else list(samples)
    if not found:
        raise ValueError(
            "samples is empty: give at least one Sample (vs.patching.make_samples makes them)"
        )
    for i, sample in enumerate(found):
        if not isinstance(sample, Sample):
            raise ValueError(
                f"samples[{i}] is {sample!r}, not a Sample(prompt_tokens, response_tokens)"
            )
        sample.check(model, f"samples[{i}]")
    return found


def samples_hash(samples: Iterable[Sample]) -> str:
    """SHA-256 of all tokens, in order."""
    return digest([[list(s.prompt_tokens), list(s.response_tokens)] for s in samples])


class Samples(list[Sample]):
    """What `make_samples` made: a list of Sample.

    dropped: {reason: how many prompts}; asked: prompts in all; index: which prompt each sample
    came from; texts: {"base": [...], "steered": [...]} of the kept ones, as far as they were
    generated. setting: how they were made, for records. `print(samples.line)` says how many
    were dropped and why.
    """

    def __init__(
        self,
        samples: Iterable[Sample] = (),
        *,
        dropped: dict[str, int] | None = None,
        asked: int | None = None,
        index: Sequence[int] = (),
        texts: dict[str, list[str]] | None = None,
        setting: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(samples)
        self.dropped, self.texts, self.setting = (
            dict(dropped or {}),
            dict(texts or {}),
            dict(setting or {}),
        )
        # the name hides list.index, which no caller of Samples needs
        self.index: list[int] = list(index)  # type: ignore[assignment]
        self.asked = len(self) if asked is None else asked

    @property
    def line(self) -> str:
        """One line: how many samples, how many prompts were dropped, why."""
        why = ", ".join(f"{n} {reason}" for reason, n in self.dropped.items() if n)
        return f"{len(self)} samples of {self.asked} prompts" + (
            f" (dropped: {why})" if why else ""
        )

    def __repr__(self) -> str:
        return f"Samples({self.line})"

    def save(self, path: PathLike) -> None:
        """JSON with a checksum; an existing file is replaced whole."""
        content = {
            "asked": self.asked,
            "dropped": self.dropped,
            "index": self.index,
            "texts": self.texts,
            "setting": self.setting,
            "samples": [[list(s.prompt_tokens), list(s.response_tokens)] for s in self],
        }
        save_json(path, content, format="vksteer.samples")

    @classmethod
    def load(cls, path: PathLike) -> Samples:
        """Reads what `save` wrote. Raises ModelError for a file that was cut short or edited or is
        something else.
        """
        content = load_json(path, format="vksteer.samples", what="samples", limit=1 << 30)
        try:
            return cls(
                [Sample(*pair) for pair in content["samples"]],
                dropped=content["dropped"],
                asked=content["asked"],
                index=content["index"],
                texts=content["texts"],
                setting=content["setting"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path}: no samples of vksteer: {error!r}") from None


#: Reasons for which a prompt gives no sample.
EMPTY, SAME = "with an empty response", "whose behaviour steering does not flip"


def make_samples(
    model: Model,
    prompts: Any,
    vector: SteeringVector,
    coefficient: float,
    *,
    responses: str = "steered",
    max_new_tokens: int = 64,
    keep: str = "flipped",
    judge: Any = None,
    min_words: int | str | None = "auto",
    batch_size: int | None = None,
    progress: ProgressLike = True,
) -> Samples:
    """Samples from prompts: greedy responses of the model, steered or not, of those prompts whose
    behaviour steering flips (docs/method.md section 5).

    prompts: texts or token lists; call it once for harmful and once for harmless prompts, with the
    sign that flips each. responses: take the response of the "steered" or of the "base" model, with
    its end token.
    keep: "flipped" keeps a prompt where the judge's verdict on the steered response differs from
    that on the base response; "all" asks no judge. judge: callable(prompts, responses) -> bool [n],
    True for unsafe (`LlamaGuard(model)`); None: the substring judge. min_words: as in `freezing`. A
    response of nothing but end tokens is dropped. `samples.dropped` and `samples.line` say how many
    prompts were dropped and why; the line is also printed where progress is shown.
    Raises ValueError before any work for a vector of another width or layer or zero, prompts that
    leave no room for the response, bad arguments.
    """
    coefficient = check_steering(model, vector, coefficient)
    new = _check_options(responses, keep, min_words, max_new_tokens)
    prompts = as_list(prompts, "prompts")
    rows = as_tokens(model, prompts, "prompts", room=new)
    if keep == "flipped" and getattr(model, "tokenizer", None) is None:
        raise ValueError("keep='flipped' judges texts, this model has no tokenizer: use keep='all'")
    sides = ("base", "steered") if keep == "flipped" else (responses,)
    steered = [Steer(vector, coefficient)]
    edits = [steered if side == "steered" else [] for side in sides for _ in rows]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    options.update(max_new_tokens=new, edits=edits, temperature=0.0)
    made, n = model.generate(rows * len(sides), **options), len(rows)
    answers = {side: made[i * n : (i + 1) * n] for i, side in enumerate(sides)}
    judged = "substring" if judge is None else type(judge).__name__
    setting = {
        "responses": responses,
        "keep": keep,
        "max_new_tokens": new,
        "judge": None if keep == "all" else judged,
        "coefficient": coefficient,
        "layer": vector.layer,
        "vector_hash": digest(vector.direction),
        "model_hash": fingerprint(model),
        **loaded_with(model),
        "prompts_hash": digest(rows),
    }
    texts = {side: [g.text for g in some] for side, some in answers.items()}
    flipped = np.ones(n, bool)
    if keep == "flipped":
        flipped = _flipped(model, prompts, texts, judge, min_words)
    return _reported(_kept(model, rows, answers, texts, flipped, setting), progress)


def _reported(samples: Samples, progress: ProgressLike) -> Samples:
    if progress is True:
        print(f"vksteer: {samples.line}", file=sys.stderr)
    if not samples:
        warnings.warn(
            f"no sample is left: {samples.line}. Is the coefficient strong enough, and has it the"
            " sign that flips these prompts?",
            stacklevel=3,
        )
    return samples


def _check_options(responses: str, keep: str, min_words: Any, max_new_tokens: Any) -> int:
    """max_new_tokens as an int; ValueError for an option of `make_samples` that is out of range."""
    if responses not in ("steered", "base"):
        raise ValueError(f"responses must be 'steered' or 'base', not {responses!r}")
    if keep not in ("flipped", "all"):
        raise ValueError(f"keep must be 'flipped' or 'all', not {keep!r}")
    if min_words != "auto" and min_words is not None:
        require_int(min_words, "min_words", 0)
    return require_int(max_new_tokens, "max_new_tokens", 1)


def _flipped(
    model: Model,
    prompts: list[str | list[int]],
    texts: dict[str, list[str]],
    judge: Any,
    min_words: int | str | None,
) -> BoolArray:
    """A bool for each prompt: whether the judge's verdicts on its two responses differ."""
    assert model.tokenizer is not None  # make_samples has checked
    decode = model.tokenizer.decode
    asked = [p if isinstance(p, str) else decode(p) for p in prompts]
    base, steered = (succeeded(asked, texts[s], judge, min_words) for s in ("base", "steered"))
    return np.asarray(base != steered)


def _kept(
    model: Model,
    rows: list[list[int]],
    answers: dict[str, list[Generation]],
    texts: dict[str, list[str]],
    flipped: BoolArray,
    setting: dict[str, Any],
) -> Samples:
    """The samples of flipped prompts whose response is more than end tokens."""
    ends = set(getattr(model, "eos_ids", ()))
    chosen = answers[setting["responses"]]
    empty = [all(int(t) in ends for t in g.tokens) for g in chosen]
    kept = [i for i in range(len(rows)) if not empty[i] and flipped[i]]
    same = sum(not e and not f for e, f in zip(empty, flipped, strict=True))
    dropped = {EMPTY: sum(empty), SAME: int(same)}
    return Samples(
        [Sample(tuple(rows[i]), tuple(chosen[i].tokens)) for i in kept],
        dropped={reason: n for reason, n in dropped.items() if n},
        asked=len(rows),
        index=kept,
        texts={side: [some[i] for i in kept] for side, some in texts.items()},
        setting=setting,
    )


def check_steering(model: Model | Config, vector: SteeringVector, coefficient: Any) -> float:
    """The coefficient as a finite float; ValueError for a vector that does not fit the model or
    steers the output of its last block, a zero vector, and any other coefficient.
    """
    vector.check(model, output=False)
    if vector.norm == 0:
        raise ValueError("the vector is zero: it steers nothing")
    if not is_number(coefficient):
        raise ValueError(f"coefficient must be a finite number, not {coefficient!r}")
    return float(coefficient)
