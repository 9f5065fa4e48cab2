"""The edit itself: which vector is added to which entry of the cache, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..base.checks import is_int, is_number, layer_list, require_int
from ..base.types import Float64Array
from ..runtime.cache_edits import CacheEdit
from .cache_vectors import CacheVector
from .rotating import rotated

if TYPE_CHECKING:
    from ..runtime.model import Model


@dataclass(frozen=True, eq=False)
class CacheSteer(CacheEdit):
    r"""Adds to the keys and values of one entry of a prompt's cache, once, after the prompt has
    been run (docs/cache-steering.md; Belitsky et al., arXiv 2507.08799):

        K[l, g, p] += key * vector.keys[l, g]        V[l, g, p] += value * vector.values[l, g]

    vector: a CacheVector. key, value: the coefficients. layers: a slice, or a list of layers; by
    default all but layer 0; None: all. position: which entry, counted from the prompt's end where
    it is negative, before anything is appended; -1 is the last prompt token. append: text or tokens
    that are put after the prompt.

    Queries up to the prompt's end have been computed before the edit, so it acts on tokens after
    the prompt. With append=None the first new token is drawn from unsteered logits, and steering
    begins with the second. With append="\n" the appended token is the first query that sees the
    edit, its logits give the first new token, and `prompt_tokens` includes it.

    Raises TypeError for what is no CacheVector, ValueError for a coefficient that is no finite
    number, a position that is no whole number, and an empty append. `generate` refuses vectors of
    another model, positions that a prompt does not have, and prompts of a single token.
    """

    vector: CacheVector
    key: float = 0.0
    value: float = 1.0
    layers: slice | Sequence[int] | None = field(default_factory=lambda: slice(1, None))
    position: int = -1
    append: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vector, CacheVector):
            raise TypeError(
                f"CacheSteer needs a CacheVector (vs.kv.extract), not {type(self.vector).__name__}"
            )
        for name in ("key", "value"):
            if not is_number(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)!r}")
        require_int(self.position, "position")
        append = self.append
        if append is None or (isinstance(append, str) and append):
            return
        tokens = [] if isinstance(append, str) else list(append)
        if not tokens or not all(is_int(t) and t >= 0 for t in tokens):
            raise ValueError(
                f"append={append!r}: use None, a text, or a list of token ids; None appends nothing"
            )
        object.__setattr__(self, "append", tuple(int(t) for t in tokens))

    def to_dict(self) -> dict[str, Any]:
        """The provenance of a generation: coefficients, layers, position, append, and the vector's
        fingerprint.
        """
        layers: Any = self.layers
        if isinstance(layers, slice):
            layers = {"start": layers.start, "stop": layers.stop, "step": layers.step}
        elif layers is not None:
            layers = [int(l) for l in layers]
        return {
            "kind": "cache_steer",
            "key": float(self.key),
            "value": float(self.value),
            "layers": layers,
            "position": int(self.position),
            "append": self.append
            if isinstance(self.append, str) or not self.append
            else list(self.append),
            "rotate": self.vector.rotate,
            "vector": self.vector.fingerprint,
        }

    # -- what generation asks ----------------------------------------------------------------------

    def _check(self, model: Model) -> None:
        self.vector.check(model)
        self._layers(model)
        for token in self._appended(model):
            if token >= model.config.d_vocab:
                raise ValueError(
                    f"append: token {token} is not in the vocabulary of {model.config.d_vocab}"
                )

    def _layers(self, model: Model) -> list[int]:
        n = model.config.n_layers
        if not isinstance(self.layers, slice):
            return layer_list(self.layers, n)
        chosen = sorted(range(n)[self.layers])
        if not chosen:
            raise ValueError(f"layers={self.layers} names none of the model's {n} layers")
        return chosen

    def _appended(self, model: Model) -> list[int]:
        if self.append is None:
            return []
        if not isinstance(self.append, str):
            return list(self.append)
        tokens = model._need_tokenizer("a text to append").encode(self.append, add_bos=False)
        if not tokens:
            raise ValueError(f"append={self.append!r} gives no token: give token ids")
        return [int(t) for t in tokens]

    def _position(self, n_tokens: int, row: int) -> int:
        position = int(self.position)
        return entry(position, n_tokens, f"row {row}")

    def _largest(self) -> float:
        return max(
            abs(float(c)) * float(np.abs(x).max(initial=0))
            for c, x in ((self.key, self.vector.keys), (self.value, self.vector.values))
        )

    def _at_one_position(self) -> bool:
        return self.vector.rotate == "unrotated" and self.key != 0

    def _addition(self, model: Model, position: int, long: bool) -> Float64Array:
        keys = self.vector.keys.astype(np.float64)
        if self._at_one_position():
            keys = rotated(model.config, keys, position, long)
        layers = self._layers(model)
        out = np.zeros((2, *keys.shape))
        out[0, layers] = float(self.key) * keys[layers]
        out[1, layers] = float(self.value) * self.vector.values[layers].astype(np.float64)
        return out


def entry(position: int, n_tokens: int, what: str) -> int:
    """The index of the entry that `position` names in a prompt of n_tokens. Raises ValueError,
    naming `what`, for one that it does not have and for a prompt of one token.
    """
    at = position + n_tokens if position < 0 else position
    if n_tokens < 2:
        raise ValueError(
            f"{what} has one token: its only entry is the one that every token attends to most;"
            " give a prompt of at least two"
        )
    if not 0 <= at < n_tokens:
        raise ValueError(f"{what} has {n_tokens} tokens and no position {position}")
    return at
