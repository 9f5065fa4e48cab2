"""The logit lens: which tokens a vector of the residual stream promotes, read through the final
norm and the unembedding (no softcap).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .. import _engine
from ..base.arrays import as_numpy
from ..base.checks import require_int
from ..base.display import Table
from ..base.progress import Progress
from ..base.types import Array, Float32Array, PathLike
from ..inputs.prompts import token_text
from ..inputs.vectors import SteeringVector
from .value_vectors import SteeringValueVectors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..runtime.model import Model

MOST = _engine.constants["TOPK_MAX"]  # longest list of tokens that the engine returns
AT_ONCE = _engine.constants["LENS_ROWS"]  # vectors that the engine reads at once


@dataclass(frozen=True)
class Hit:
    """A token that `Lens.find` found among those that a vector promotes."""

    index: tuple[int, ...]  # of the vector
    label: str  # the vector's name, for example "L12 H3"
    rank: int  # among the vector's tokens, from 1 on
    token: int
    text: str
    value: float


class Lens(Table):
    """The result of `logit_lens`. The leading axes are those of the vectors.

    tokens: int32 [..., top]; values: float32 [..., top], falling, ties by the lower token id.
    by: "logit" or "cosine". labels: for each leading axis the names of its entries.
    """

    def __init__(
        self, model: Model, tokens: Array, values: Float32Array, by: str, labels: list[list[str]]
    ):
        self.tokens, self.values, self.by, self.labels = tokens, values, by, labels
        unique = np.unique(tokens)
        self._texts = {int(t): _text(model, int(t)) for t in unique}

    def __repr__(self) -> str:
        return (
            f"Lens({' x '.join(map(str, self.tokens.shape[:-1])) or 'one'} vectors, top"
            f" {self.tokens.shape[-1]} by {self.by})"
        )

    def text(self) -> list[Any]:
        """The text of every token, as nested lists of the shape of `tokens`. Without a tokenizer a
        token is named by its id.
        """
        return _nested(self.tokens, lambda t: self._texts[t])

    def label(self, index: Sequence[int]) -> str:
        """The name of one vector, for example "L12 H3"."""
        return " ".join(names[i] for names, i in zip(self.labels, index))

    def find(self, text: str) -> list[Hit]:
        """All promoted tokens that contain `text`, ignoring case, ordered by vector and then by
        rank. Raises ValueError for an empty text.
        """
        if not isinstance(text, str) or not text:
            raise ValueError(f"find takes a text that is not empty, not {text!r}")
        matching = [t for t, shown in self._texts.items() if text.lower() in shown.lower()]
        hits = []
        for *place, rank in np.argwhere(np.isin(self.tokens, matching)).tolist():
            index = tuple(place)
            token = int(self.tokens[(*index, rank)])
            hits.append(
                Hit(
                    index,
                    self.label(index),
                    rank + 1,
                    token,
                    self._texts[token],
                    float(self.values[(*index, rank)]),
                )
            )
        return hits

    def _cell(
        self, index: tuple[int, ...], top: int, mark: str | None, values: bool = False
    ) -> str:
        """The first `top` tokens of one vector in one line, with their values if asked for."""
        found = []
        for token, value in zip(self.tokens[index][:top], self.values[index][:top]):
            shown = readable(self._texts[int(token)])
            if mark is not None and mark.lower() in self._texts[int(token)].lower():
                shown = f"**{shown}**"
            found.append(f"{shown} {value:.3g}" if values else shown)
        return ", ".join(found)

    def to_markdown(self, top: int | None = None, mark: str | None = None) -> str:
        """A table of the promoted tokens.

        With two leading axes (layers and heads): a row for each layer, a column for each head and
        `top` tokens in a cell (default 1). Otherwise a row for each vector, with `top` tokens and
        their values (default 8). mark: tokens that contain it are bold. A space is shown as
        "\u2423". Raises ValueError for more tokens than the lens holds.
        """
        shape = self.tokens.shape[:-1]
        if len(shape) == 2:
            top = self._top(top, 1)
            lines = ["| | " + " | ".join(self.labels[1]) + " |", "|:---" * (shape[1] + 1) + "|"]
            rows = [
                [self.labels[0][n], *(self._cell((n, h), top, mark) for h in range(shape[1]))]
                for n in range(shape[0])
            ]
        else:
            top = self._top(top, 8)
            lines = [f"| vector | promoted tokens, {self.by} |", "|:---|:---|"]
            rows = [
                [self.label(index) or "vector", self._cell(index, top, mark, values=True)]
                for index in np.ndindex(shape)
            ]
        return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])

    def _top(self, top: int | None, default: int) -> int:
        most: int = self.tokens.shape[-1]
        top = min(default, most) if top is None else require_int(top, "top", 1)
        if top > most:
            raise ValueError(f"top={top}: this lens holds the first {most} tokens of each vector")
        return top

    def to_dict(self) -> dict[str, Any]:
        """For JSON: labels of the leading axes; tokens, texts and values as nested lists."""
        return {
            "by": self.by,
            "labels": self.labels,
            "tokens": self.tokens.tolist(),
            "texts": self.text(),
            "values": self.values.tolist(),
        }

    def plot(self, path: PathLike | None = None, mark: str | None = None) -> Figure:
        """A matplotlib Figure, saved to `path` if one is given.

        With two leading axes: a map of the largest value of every vector, with its token; vectors
        that promote a token containing `mark` are framed. With one leading axis or none: bars of
        the first tokens. Raises ValueError for more than two leading axes, ImportError without
        matplotlib.
        """
        from .lens_plot import lens_figure

        return lens_figure(self, path, mark)


def readable(text: str) -> str:
    """A token's text for one line of a Markdown table: white space shown, Markdown's own characters
    escaped.
    """
    text = (
        text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t").replace(" ", "\u2423")
    )
    return (
        "".join(
            "\\" + c if c in "|*_`<>[]" else c if c.isprintable() else f"\\u{ord(c):04x}"
            for c in text
        )
        or "(nothing)"
    )


def _text(model: Model, token: int) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    # An embedding may have more rows than the tokenizer has tokens.
    return token_text(model, token) if tokenizer is None or token < len(tokenizer) else f"<{token}>"


def _nested(tokens: Array, name: Callable[[int], str]) -> list[Any]:
    if tokens.ndim == 1:
        return [name(int(token)) for token in tokens]
    return [_nested(part, name) for part in tokens]


# -- the call --------------------------------------------------------------------------------------


def _vectors(vectors: Any, width: int, centred: bool) -> tuple[Float32Array, list[list[str]]]:
    """(float32 [..., D], labels of the leading axes) of everything that `logit_lens` accepts.
    centred: the final norm subtracts the mean.
    """
    array, names = _array(vectors, width)
    if array.ndim == 0 or array.shape[-1] != width:
        raise ValueError(
            f"vectors must have the model's width {width} as their last axis, not the shape"
            f" {list(array.shape)}"
        )
    if not array.size:
        raise ValueError(f"there are no vectors to read: the shape is {list(array.shape)}")
    _check_values(array, centred)
    if names is None:
        names = [[str(i) for i in range(n)] for n in array.shape[:-1]]
    return array, names


def _array(vectors: Any, width: int) -> tuple[Float32Array, list[list[str]] | None]:
    """The numbers of whatever was given, and the labels that it brings along."""
    names = None
    if isinstance(vectors, SteeringVector):
        vectors = vectors.direction
    elif isinstance(vectors, SteeringValueVectors):
        vectors, names = vectors.values, vectors.labels
    elif (
        isinstance(vectors, (list, tuple))
        and vectors
        and all(isinstance(v, SteeringVector) for v in vectors)
    ):
        names = [[v.method or f"vector {i}" for i, v in enumerate(vectors)]]
        vectors = [v.direction for v in vectors]
    vectors = as_numpy(vectors)
    if isinstance(vectors, (list, tuple)):
        widths = sorted({np.shape(v)[-1] if np.ndim(v) else 1 for v in vectors})
        if len(widths) > 1:
            raise ValueError(
                f"vectors of different widths ({', '.join(map(str, widths))}) cannot be read"
                f" together: the model's is {width}"
            )
    try:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(vectors, dtype=np.float32), names
    except (TypeError, ValueError) as error:
        raise ValueError(f"vectors must be numbers [..., {width}]: {error}") from None


def _check_values(array: Float32Array, centred: bool) -> None:
    """Raises ValueError for vectors that are zero or not finite, or of which the final norm leaves
    nothing, naming the first.
    """
    flat = array.reshape(-1, array.shape[-1])
    equal = centred & (flat == flat[:, :1]).all(axis=1)
    for bad, what in (
        (~np.isfinite(flat).all(axis=1), "not finite"),
        (~flat.any(axis=1), "zero, and promotes nothing"),
        (equal, "a row of equal numbers, of which LayerNorm leaves nothing"),
    ):
        if bad.any():
            at = (
                [int(i) for i in np.unravel_index(int(np.flatnonzero(bad)[0]), array.shape[:-1])]
                if array.ndim > 1
                else []
            )
            raise ValueError(f"vectors{at or ''} is {what} ({int(bad.sum())} of {len(flat)} are)")


def logit_lens(
    model: Model,
    vectors: SteeringVector | SteeringValueVectors | Sequence[SteeringVector] | npt.ArrayLike,
    top: int = 20,
    by: str = "logit",
    *,
    labels: Sequence[Sequence[object]] | None = None,
    progress: bool | Callable[[int, int], Any] = True,
) -> Lens:
    """The `top` tokens that each vector promotes, read through the final norm and the unembedding
    without softcap (docs/method.md section 7). The final norm is that of the vector itself, which
    LayerNorm centres; biases of the final norm and of the unembedding are left out, as they are the
    same for every vector, so that -v promotes what v suppresses.

    vectors: numbers [..., D]; a SteeringVector or a list of them; or SteeringValueVectors, whose
    layers and heads become the labels. by: "logit", or "cosine" between the vector after the final
    norm and the rows of the unembedding (a row of zeros counts as 0).
    top: 1 to 512, at most the vocabulary. labels: names of the entries of each leading axis. The
    ranking runs on the device in tiles of the vocabulary, so memory does not grow with [vectors x
    vocabulary].
    Returns a Lens: `.tokens` int32 [..., top], `.values` float32 [..., top] falling, ties by the
    lower token id, `.text()`, `.find("sorry")`. Raises ValueError before any work for another
    width, zero or non-finite vectors, vectors of equal entries where the final norm is LayerNorm,
    top or by out of range, and labels that do not fit.
    """
    model._check_open()
    c = model.config
    top = require_int(top, "top", 1)
    if top > min(MOST, c.d_vocab):
        raise ValueError(
            f"top={top}: at most {min(MOST, c.d_vocab)} tokens can be asked for"
            + (" (the vocabulary)" if c.d_vocab <= MOST else "")
        )
    if by not in ("logit", "cosine"):
        raise ValueError(f"by={by!r}: use 'logit' or 'cosine'")
    array, names = _vectors(vectors, c.d_model, c.norm == "layer")
    if labels is not None:
        names = [list(map(str, axis)) for axis in labels]
        if [len(axis) for axis in names] != list(array.shape[:-1]):
            raise ValueError(
                f"labels name {[len(axis) for axis in names]} entries, the vectors' leading axes"
                f" have {list(array.shape[:-1])}"
            )
    flat = array.reshape(-1, c.d_model)
    values, tokens = np.empty((len(flat), top), np.float32), np.empty((len(flat), top), np.int32)
    with Progress(
        progress if len(flat) > AT_ONCE or not isinstance(progress, bool) else False,
        len(flat),
        "lens",
    ) as bar:
        for first in range(0, len(flat), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            values[some], tokens[some] = model._engine.lens(flat[some], top, by == "cosine")
            bar.step(len(flat[some]))
    if by == "cosine":
        values /= _normed_length(model, flat)[:, None]
    shape = array.shape[:-1] + (top,)
    return Lens(model, tokens.reshape(shape), values.reshape(shape), by, names)


def _normed_length(model: Model, flat: Float32Array) -> Float32Array:
    """The Euclidean norm of each vector after the final norm, float32 [n]."""
    x = flat.astype(np.float64)
    if model.config.norm == "layer":
        x -= x.mean(axis=1, keepdims=True)
    x *= model._engine.vector("ln_final", -1) / np.sqrt(
        (x**2).mean(axis=1, keepdims=True) + model.config.norm_eps
    )
    lengths: Float32Array = np.linalg.norm(x, axis=1).astype(np.float32)
    return lengths
