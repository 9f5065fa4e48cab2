"""What activation scaling is trained on: prompts, two answers for each, and where values are
scaled.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, is_number
from ..base.types import UInt32Array
from ..inputs.prompts import as_tokens, token_text

if TYPE_CHECKING:
    from ..runtime.model import Model
    from ..runtime.sites import Site

#: Where values are scaled unless sites= says otherwise.
SITES = ("hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Weights:
    """The weights of the loss: margin of the hinge, faithfulness, minimality."""

    margin: float
    faith: float
    sparse: float

    def check(self) -> Weights:
        """The same as floats. Raises ValueError unless each is a finite number from 0 on."""
        for name in ("margin", "faith", "sparse"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ValueError(f"{name} must be a finite number from 0 on, not {value!r}")
        return Weights(float(self.margin), float(self.faith), float(self.sparse))


@dataclass(frozen=True, eq=False)
class Task:
    """A checked task. rows: token lists; a, b: uint32 [n], the two answers of each; sites: names
    without their layer; places: for each of them the site of every layer; dynamic: factors come
    from the values, so lengths may differ; first: the first position that is scaled.
    """

    rows: tuple[tuple[int, ...], ...]
    a: UInt32Array
    b: UInt32Array
    sites: tuple[str, ...]
    places: tuple[tuple[Site, ...], ...]
    dynamic: bool
    first: int
    notes: tuple[str, ...]

    @property
    def length(self) -> int:
        """Tokens of the longest prompt; of all prompts in the static form."""
        return max(map(len, self.rows))

    def shape(self, width: int) -> tuple[int, int, int]:
        """Of the parameters: [sites, L, positions], or dynamic [sites, L, D]."""
        return len(self.sites), len(self.places[0]), width if self.dynamic else self.length


def make_task(
    model: Model, prompts: Any, a: Any, b: Any, sites: Any, dynamic: bool, skip_first: bool
) -> Task:
    """The task of a call. Raises ValueError before any work; see `train`."""
    model._check_open()
    if not isinstance(dynamic, bool) or not isinstance(skip_first, bool):
        raise ValueError("dynamic and skip_first must be True or False")
    rows = as_tokens(model, prompts, "prompts")
    names, places = _places(model, sites)
    for i, row in enumerate(rows):
        bad = [t for t in row if not 0 <= t < model.config.d_vocab]
        if bad:
            raise ValueError(
                f"prompts[{i}]: token {bad[0]} is not in the vocabulary of {model.config.d_vocab}"
            )
    if not dynamic:
        other = next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if other is not None:
            raise ValueError(
                f"prompts[0] has {len(rows[0])} tokens and prompts[{other}] has"
                f" {len(rows[other])}: there is one factor for each position, so all prompts need"
                " one length; use dynamic=True for prompts of several lengths"
            )
    if skip_first and max(map(len, rows)) < 2:
        raise ValueError(
            "prompts of one token leave nothing to scale after position 0: use skip_first=False"
        )
    notes: list[str] = []
    one, two = (
        _answers(model, given, len(rows), what, notes) for given, what in ((a, "a"), (b, "b"))
    )
    for i, (x, y) in enumerate(zip(one, two, strict=True)):
        if x == y:
            raise ValueError(
                f"a and b are the same token {int(x)} ({token_text(model, int(x))!r}) for"
                f" prompts[{i}]: name two different answers"
            )
    notes += _architecture(model, names)
    return Task(
        tuple(map(tuple, rows)), one, two, names, places, dynamic, int(skip_first), tuple(notes)
    )


def _places(model: Model, sites: Any) -> tuple[tuple[str, ...], tuple[tuple[Site, ...], ...]]:
    listed = [sites] if isinstance(sites, str) else list(sites)
    if not listed:
        raise ValueError("sites is empty: name at least one, for example 'hook_mlp_out'")
    if len(set(listed)) < len(listed):
        raise ValueError(f"sites names one twice: {listed}")
    places = []
    for name in listed:
        if not isinstance(name, str) or name.startswith(("blocks.", "hook_embed")):
            raise ValueError(
                f"sites: {name!r}; give names without their layer, for example 'hook_attn_out';"
                " every layer is scaled, and 'hook_resid_pre' of layer 0 is the embedding"
            )
        found = model._sites.find_all([f"blocks.*.{name}"])
        if len(found) != model.config.n_layers:
            raise ValueError(f"sites: {name!r} is not one site of every layer")
        if found[0].kind != "width" or not name.startswith("hook_"):
            raise ValueError(
                f"sites: {name!r} is not of the model's width {model.config.d_model}; use"
                " hook_attn_out, hook_mlp_out or a site of the residual stream"
            )
        places.append(tuple(found))
    return tuple(listed), tuple(places)


def _answers(model: Model, given: Any, n: int, what: str, notes: list[str]) -> UInt32Array:
    """The first token of each answer, uint32 [n]."""
    several = isinstance(given, (Sequence, np.ndarray)) and not isinstance(given, str)
    listed = list(given) if several else [given] * n
    if len(listed) != n:
        raise ValueError(
            f"{what} names {len(listed)} answers for {n} prompts: give one for all, or one each"
        )
    found, cut = [], 0
    for i, answer in enumerate(listed):
        tokens = [int(answer)] if is_int(answer) else _answer_tokens(model, answer, f"{what}[{i}]")
        if not tokens or not 0 <= tokens[0] < model.config.d_vocab:
            raise ValueError(
                f"{what}[{i}] is {answer!r}: an answer is a token id below {model.config.d_vocab},"
                " or a text"
            )
        cut += len(tokens) > 1
        found.append(tokens[0])
    if cut:
        note = f"{cut} of {n} answers {what} have several tokens: the first one stands for each"
        warnings.warn(note, stacklevel=4)
        notes.append(note)
    return np.array(found, np.uint32)


def _answer_tokens(model: Model, answer: Any, what: str) -> list[int]:
    if isinstance(answer, str):
        return list(model._need_tokenizer(f"{what}, a text,").encode(answer, add_bos=False))
    if isinstance(answer, (Sequence, np.ndarray)) and all(map(is_int, answer)):
        return [int(t) for t in answer]
    return []


def _architecture(model: Model, names: Sequence[str]) -> list[str]:
    """What an output site holds where that is not a layer's plain output."""
    outputs = [n for n in names if n in SITES]
    notes = []
    if outputs and model.config.post_norms:
        notes.append(
            f"{' and '.join(outputs)}: the output after the post-norm, which is what enters the"
            " residual stream"
        )
    if outputs and model.config.parallel:
        notes.append(
            f"{' and '.join(outputs)}: attention and MLP of a layer are parallel, both read the"
            " same residual stream, and both outputs are added to it"
        )
    return notes
