"""Linear probes: a direction that tells two classes of activations apart, and its reading at every
token of a text.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .base.checks import is_number
from .base.figures import new_figure, tick_text
from .base.types import Array, Float64Array, Prompts
from .inputs.dosing import captured_rows
from .inputs.prompts import as_tokens, token_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .runtime.model import Model

__all__ = ["Probe", "Reading", "fit"]

FOLDS = 5
#: Newton steps of the logistic fit, and the change of the weights at which it ends.
STEPS, TOLERANCE = 100, 1e-10


@dataclass(frozen=True, eq=False)
class Reading:
    """Scores of every token: `scores[i]` is float64 [tokens of prompt i], `tokens[i]` their texts.
    site: where they were read.
    """

    scores: tuple[Float64Array, ...]
    tokens: tuple[tuple[str, ...], ...]
    site: str

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, i: int) -> Float64Array:
        return self.scores[i]

    def __iter__(self) -> Iterator[Float64Array]:
        return iter(self.scores)

    def _repr_html_(self) -> str:
        """The prompts with a background for each token: red where the probe says the positive
        class, blue where the other, as strong as the largest score of all.
        """
        largest = max((float(np.abs(s).max()) for s in self.scores), default=0.0) or 1.0
        lines = []
        for scores, tokens in zip(self.scores, self.tokens, strict=True):
            spans = []
            for score, token in zip(scores, tokens, strict=True):
                colour = "200,60,40" if score > 0 else "40,90,200"
                alpha = 0.8 * abs(float(score)) / largest
                spans.append(
                    f'<span style="background:rgba({colour},{alpha:.2f})" title="{score:.3f}">'
                    f"{html.escape(token)}</span>"
                )
            lines.append("<div>" + "".join(spans) + "</div>")
        return "".join(lines)

    def plot(self, index: int = 0, ax: Axes | None = None) -> Figure:
        """Scores over the tokens of one prompt, as a figure. Raises ImportError, naming what to
        install, without matplotlib.
        """
        scores, tokens = self.scores[index], self.tokens[index]
        if ax is None:
            ax = new_figure(max(4.0, 0.25 * len(tokens)), 3).subplots()
        ax.bar(
            range(len(scores)), scores, color=["#c8643c" if s > 0 else "#4878a8" for s in scores]
        )
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set_xticks(range(len(tokens)), map(tick_text, tokens), rotation=90, fontsize=7)
        ax.set(ylabel="score", title=self.site)
        figure: Any = ax.figure
        result: Figure = figure
        return result


@dataclass(frozen=True, eq=False)
class Probe:
    """score(x) = x . direction + bias; positive means the class of y = 1.

    direction: float64 [D]. bias: float. accuracy: share of samples on the right side, each scored
    by a probe that was fitted without its fold; NaN with fewer than two samples in a class.
    train_accuracy: of the samples themselves. method, l2: how it was fitted. n: samples.
    """

    direction: Float64Array
    bias: float
    accuracy: float
    train_accuracy: float
    method: str
    l2: float
    n: int

    def __repr__(self) -> str:
        return (
            f"Probe({self.method}, width={self.direction.size}, n={self.n},"
            f" accuracy={self.accuracy:.3f} cross-validated, {self.train_accuracy:.3f} on its own"
            " samples)"
        )

    def score(self, X: Array) -> Float64Array:
        """The score x . direction + bias of activations [..., D]; float64 [...].

        Raises ValueError for another width.
        """
        X = np.asarray(X, dtype=np.float64)
        if X.shape[-1:] != self.direction.shape:
            raise ValueError(f"the probe has width {self.direction.size}, not {X.shape[-1:]}")
        scores: Float64Array = X @ self.direction + self.bias
        return scores

    def read(self, model: Model, prompts: Prompts, site: str) -> Reading:
        """The score at every token of prompts.

        prompts: texts or token lists. site: the name of one site of width D, for example
        "blocks.12.hook_resid_pre". Returns a Reading, float64 [tokens] for each prompt. Raises
        ValueError for bad prompts and a site of another width, KeyError for an unknown site.
        """
        found = model._sites.find_all([site])
        if len(found) != 1 or found[0].has_heads or found[0].width != self.direction.size:
            raise ValueError(
                f"site {site!r} must be one site of width {self.direction.size} without heads"
            )
        rows = as_tokens(model, prompts, "prompts")
        captured = captured_rows(model, rows, site, self.direction.size)
        scores = tuple(self.score(row) for row in captured)
        tokens = tuple(tuple(token_text(model, t) for t in row) for row in rows)
        return Reading(scores, tokens, site)


def fit(X: Array, y: Array, method: str = "logistic", l2: float = 1.0, *, seed: int = 0) -> Probe:
    """A linear probe of two classes.

    X: activations [n, D]. y: n labels of 0 and 1 (or False and True). method: "logistic" minimises
    the summed log loss + l2 / 2 |direction|^2, the bias free, by Newton's method in float64;
    "mean" takes the difference of the class means, with the threshold halfway between them.
    seed: how samples are dealt to the 5 folds of the cross-validation, each class evenly.

    Returns a Probe. Raises ValueError for arrays of other shapes, values that are not finite,
    labels other than 0 and 1, one class only, an unknown method, and l2 that is not positive.
    """
    X, y = _checked(X, y, method, l2)
    direction, bias = _fitted(X, y, method, l2)
    right = (X @ direction + bias > 0) == (y == 1)
    accuracy = _held_out(X, y, method, l2, _folds(y, seed))
    return Probe(direction, bias, accuracy, float(right.mean()), method, float(l2), len(y))


def _checked(X: Array, y: Array, method: str, l2: float) -> tuple[Float64Array, Float64Array]:
    X = np.asarray(X, dtype=np.float64)
    labels = np.asarray(y)
    if X.ndim != 2 or labels.shape != X.shape[:1]:
        raise ValueError(
            f"X must be [n, D] and y [n] of the same n, not {X.shape} and {labels.shape}"
        )
    if not np.isfinite(X).all():
        raise ValueError("X holds values that are not finite")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError("y must hold 0 and 1 only")
    if len(np.unique(labels)) < 2:
        raise ValueError("y holds one class only: a probe needs both")
    if method not in ("logistic", "mean"):
        raise ValueError(f"method must be 'logistic' or 'mean', not {method!r}")
    if not is_number(l2) or l2 <= 0:
        raise ValueError(f"l2 must be a positive number, not {l2!r}")
    return X, labels.astype(np.float64)


def _folds(y: Float64Array, seed: int) -> Array:
    """The fold of each sample, classes dealt out evenly; all 0 where there can be no two."""
    folds = np.zeros(len(y), np.int64)
    counts = [int((y == c).sum()) for c in (0, 1)]
    n = min(FOLDS, *counts)
    if n < 2:
        return folds
    generator = np.random.default_rng(seed)
    for c in (0, 1):
        members = generator.permutation(np.flatnonzero(y == c))
        folds[members] = np.arange(len(members)) % n
    return folds


def _held_out(X: Float64Array, y: Float64Array, method: str, l2: float, folds: Array) -> float:
    """The share of samples that a probe of the other folds puts on the right side."""
    if folds.max() == 0:
        return float("nan")
    right = np.zeros(len(y), bool)
    for f in range(int(folds.max()) + 1):
        out = folds == f
        w, b = _fitted(X[~out], y[~out], method, l2)
        right[out] = (X[out] @ w + b > 0) == (y[out] == 1)
    return float(right.mean())


def _fitted(X: Float64Array, y: Float64Array, method: str, l2: float) -> tuple[Float64Array, float]:
    """(direction, bias)."""
    if method == "mean":
        pos, neg = X[y == 1].mean(axis=0), X[y == 0].mean(axis=0)
        direction = pos - neg
        return direction, -float(direction @ (pos + neg) / 2)
    # The penalised solution lies in the span of the centred rows, so it is found there: as many
    # unknowns as the rank, which is at most n, instead of D.
    middle = X.mean(axis=0)
    u, s, vt = np.linalg.svd(X - middle, full_matrices=False)
    keep = s > s[0] * 1e-12 if s[0] > 0 else s > 0
    Z = np.column_stack([u[:, keep] * s[keep], np.ones(len(X))])
    w = _newton(Z, y, l2)
    direction = w[:-1] @ vt[keep]
    return direction, float(w[-1] - direction @ middle)


def _newton(Z: Float64Array, y: Float64Array, l2: float) -> Float64Array:
    """Minimises the summed log loss of Z w + l2 / 2 |w|^2, the last weight free of the penalty.

    Newton's method with step halving: the loss is strictly convex but for the last weight, and both
    classes are there, so it has one minimum.
    """
    penalty = np.full(Z.shape[1], float(l2))
    penalty[-1] = 0

    def loss(w: Float64Array) -> float:
        z = Z @ w
        return float(np.logaddexp(0, z).sum() - y @ z + (penalty * w * w).sum() / 2)

    w: Float64Array = np.zeros(Z.shape[1])
    now = loss(w)
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(Z @ w, -500, 500)))
        gradient = Z.T @ (p - y) + penalty * w
        # the bound keeps the free weight's curvature from rounding to zero
        curvature = np.maximum(p * (1 - p), 1e-12)
        step = np.linalg.solve((Z.T * curvature) @ Z + np.diag(penalty), gradient)
        scale = 1.0
        while scale > 1e-6 and loss(w - scale * step) > now + 1e-12 * abs(now):  # rounding
            scale /= 2
        w = w - scale * step
        now = loss(w)
        if float(np.abs(scale * step).max()) < TOLERANCE * (1 + float(np.abs(w).max())):
            break
    return w
