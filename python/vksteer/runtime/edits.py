"""Edits: what may be changed inside a forward pass, as plain frozen data.

An edit acts at a site (a TransformerLens hook name), on every token of a row unless ``positions``
says otherwise, for the prompt and for every decoded token. ``positions`` counts from the row's own
first real token, never array columns:

* ``None``: every token;
* ``"prompt"`` / ``"response"``: tokens of the prompt / everything after it (teacher-forced
  response or decoded tokens);
* a list of ints: those tokens; a negative number counts from the prompt's end (-1 is
  the last prompt token);
* a slice: start and stop as above, without a stop it includes decoded tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Positions: TypeAlias = str | Sequence[int] | slice | None

#: Sites that directional ablation acts on by default: what enters a layer and what is added to the
#: stream (docs/method.md section 2; Arditi et al. 2024).
ABLATION_SITES = ("blocks.*.hook_resid_pre", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")


@dataclass(frozen=True, eq=False)
class Steer:
    """Activation addition: ``resid_pre[vector.layer] += coefficient * vector.direction``
    (docs/method.md section 1). In a model of L layers, a vector of layer L is added to the output
    of the last block, ``blocks.{L-1}.hook_resid_post``, before the final norm.

    vector: a SteeringVector (direction float32 [D], layer).
    """

    vector: Any
    coefficient: float = 1.0
    positions: Positions = None


@dataclass(frozen=True, eq=False)
class Ablate:
    """Directional ablation: ``h -= u (u . h)`` with ``u = direction / |direction|``
    (docs/method.md section 1).

    vector: a SteeringVector or float32 [D]. sites: names or patterns of sites of width D; None:
    hook_resid_pre, hook_attn_out and hook_mlp_out of every layer.
    """

    vector: Any
    sites: Any = None
    positions: Positions = None


@dataclass(frozen=True, eq=False)
class Set:
    """Replace the site's value. ``values`` broadcast against one row's selected slice: [n_selected,
    ...site shape without batch and position].
    """

    site: str
    values: Any
    positions: Positions = None
    heads: Any = None


@dataclass(frozen=True, eq=False)
class Add:
    """Add ``values`` to the site's value; they broadcast as in ``Set``."""

    site: str
    values: Any
    positions: Positions = None
    heads: Any = None


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply the site's value by ``factor`` (a number, or an array that
    broadcasts as in ``Set``).
    """

    site: str
    factor: Any
    positions: Positions = None
    heads: Any = None


@dataclass(frozen=True, eq=False)
class DynamicScale:
    """Multiply the site's value by a factor that is learned from it:
    ``h *= 1 + factor * (w . h) / sqrt(D)`` (docs/activation-scaling.md, after Stoehr et al. 2024,
    section 5).

    site: a name or pattern of sites of width D. w: float32 [D]. factor: a number, 0 changes
    nothing. The gradient passes through the factor too.
    """

    site: str
    w: Any
    factor: float = 1.0
    positions: Positions = None


@dataclass(frozen=True, eq=False)
class MeanAblate:
    """Replace the site's value by a mean taken elsewhere (an array that
    broadcasts as in ``Set``).
    """

    site: str
    mean: Any
    positions: Positions = None
    heads: Any = None


#: Any edit.
Edit: TypeAlias = Steer | Ablate | Set | Add | Scale | DynamicScale | MeanAblate
#: Edits of a call: one list for all rows, or one list for each row.
Edits: TypeAlias = Edit | Iterable[Edit] | Sequence[Sequence[Edit]]
