"""The strongest features of every token of a text."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import require_int
from ..base.figures import new_figure, tick_text
from ..base.progress import Progress
from ..base.types import BoolArray, Float32Array, Int32Array, ProgressLike, Prompts
from ..inputs.dosing import captured_rows
from ..inputs.prompts import as_tokens, token_text
from ..runtime.run import left_padded
from .autoencoder import SAE
from .encoding import MAX_MEMORY, Encoder, grouped

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..runtime.model import Model

#: Tokens whose activations wait for the encoder.
GROUP_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Features:
    """The strongest features of every token, falling, of equal ones the lower first.

    features: int32 [B, S, top], -1 where fewer are active and at padding. values: float32
    [B, S, top], 0 there. tokens: int32 [B, S], left-padded with 0. mask: bool [B, S]. texts: of
    each row's tokens. site: what was encoded.
    """

    features: Int32Array
    values: Float32Array
    tokens: Int32Array
    mask: BoolArray
    texts: tuple[tuple[str, ...], ...]
    site: str

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        B, S, top = self.features.shape
        return f"Features(prompts={B}, positions={S}, top={top}, site={self.site!r})"

    def of(self, feature: int) -> list[tuple[int, int, float]]:
        """Where a feature is among the strongest: (prompt, position from the row's first token,
        value), the largest first.
        """
        starts = self.mask.shape[1] - self.mask.sum(axis=1)
        found = [
            (int(b), int(s - starts[b]), float(self.values[b, s, i]))
            for b, s, i in np.argwhere(self.features == require_int(feature, "feature", 0))
        ]
        return sorted(found, key=lambda hit: (-hit[2], hit[:2]))

    def _lines(self, index: int, top: int | None) -> list[tuple[str, list[tuple[int, float]]]]:
        """(token, [(feature, value)]) of one prompt."""
        most = self.features.shape[2]
        top = most if top is None else min(most, require_int(top, "top", 1))
        lines = []
        at = np.flatnonzero(self.mask[index])
        for text, s in zip(self.texts[index], at, strict=True):
            pairs = zip(
                self.features[index, s, :top].tolist(), self.values[index, s, :top].tolist()
            )
            lines.append((text, [(f, v) for f, v in pairs if f >= 0]))
        return lines

    def to_markdown(self, index: int = 0, top: int | None = None) -> str:
        """A table of one prompt: a row for each token with its features and their values."""
        lines = ["| token | features |", "|:---|:---|"]
        for text, found in self._lines(index, top):
            shown = text.replace("\n", "\\n").replace("|", "\\|")
            lines.append(f"| `{shown}` | " + ", ".join(f"{f} ({v:.3g})" for f, v in found) + " |")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: site, and for every prompt its tokens with their (feature, value) pairs."""
        prompts = [
            [{"token": text, "features": found} for text, found in self._lines(i, None)]
            for i in range(len(self))
        ]
        return {"site": self.site, "prompts": prompts}

    def _repr_html_(self) -> str:
        """Tables of the prompts, a row for each token, values as the strength of a background."""
        largest = float(np.abs(self.values).max()) or 1.0
        tables = []
        for i in range(len(self)):
            rows = []
            for text, found in self._lines(i, None):
                cells = "".join(
                    f'<td style="background:rgba(200,100,60,{0.8 * abs(v) / largest:.2f})"'
                    f' title="{v:.4g}">{f}</td>'
                    for f, v in found
                )
                rows.append(f"<tr><th>{html.escape(text)}</th>{cells}</tr>")
            tables.append(f"<table>{''.join(rows)}</table>")
        return "".join(tables)

    def plot(self, index: int = 0, top: int = 16) -> Figure:
        """A map of one prompt: the `top` features with the largest value in it, over its tokens.
        Raises ImportError, naming what to install, without matplotlib.
        """
        lines = self._lines(index, None)
        best: dict[int, float] = {}
        for _, found in lines:
            for f, v in found:
                best[f] = max(best.get(f, v), v)
        shown = sorted(best, key=lambda f: (-best[f], f))[: require_int(top, "top", 1)]
        image = np.zeros((max(1, len(shown)), len(lines)))
        for column, (_, found) in enumerate(lines):
            for f, v in found:
                if f in shown:
                    image[shown.index(f), column] = v
        figure = new_figure(max(4.0, 0.3 * len(lines) + 1.5), 0.25 * len(image) + 1.5)
        axes = figure.add_subplot()
        drawn = axes.imshow(image, aspect="auto", cmap="viridis")
        texts = [tick_text(text) for text, _ in lines]
        axes.set_xticks(range(len(lines)), texts, rotation=90, fontsize=7)
        axes.set_yticks(range(len(shown)), [str(f) for f in shown], fontsize=7)
        axes.set(ylabel="feature", title=self.site)
        figure.colorbar(drawn, label="activation")
        return figure


def features(
    model: Model,
    prompts: Prompts,
    sae: SAE,
    top: int = 10,
    *,
    max_memory: int = MAX_MEMORY,
    progress: ProgressLike = True,
) -> Features:
    """The `top` strongest features of every token of prompts, encoded on the device in tiles.

    prompts: texts (through the chat template) or token lists. top: 1 to 512. max_memory: bytes that
    encoding may take beside the encoder's weights; [tokens, F] is never held. progress: True, False
    or callable(done, total), in prompts.

    Returns Features: `.features` int32 and `.values` float32 [B, S, top], left-padded. Raises
    ValueError before any work for bad prompts, an SAE of another width or layer, and top out of
    range.
    """
    from .. import _engine

    site = sae.check(model)
    top, most = require_int(top, "top", 1), _engine.constants["TOPK_MAX"]
    if top > most:
        raise ValueError(f"top={top}: at most {most} features of a token can be asked for")
    rows = as_tokens(model, prompts, "prompts")
    encoder = Encoder(model, sae, max_memory)
    tokens, mask = left_padded(rows)
    found = np.full((*tokens.shape, top), -1, np.int32)
    values = np.zeros(found.shape, np.float32)
    done = 0
    with Progress(progress, len(rows), "features") as bar:
        captured = captured_rows(model, rows, site, sae.width)
        for group in grouped(captured, GROUP_TOKENS):
            parts = encoder.top(np.concatenate(group), top)
            ends = np.cumsum([len(h) for h in group])[:-1]
            for one, which in zip(*(np.split(part, ends) for part in parts), strict=True):
                values[done, -len(one) :], found[done, -len(one) :] = one, which
                done += 1
            bar.step(len(group))
    texts = tuple(tuple(token_text(model, t) for t in row) for row in rows)
    return Features(found, values, tokens, mask, texts, site)
