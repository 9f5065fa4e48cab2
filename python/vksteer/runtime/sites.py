"""Names and shapes of sites, and from names and patterns to the engine's (site, layer) numbers. The
table itself is csrc/run/sites.def.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..loading.config import Config

#: Kinds of csrc/run/sites.def -> axes as users read them.
AXES = {
    "width": "batch pos d_model",
    "one": "batch pos 1",
    "query_heads": "batch pos head d_head",
    "kv_heads": "batch pos kv_head d_head",
    "keys": "batch head query key",
    "heads_width": "batch pos head d_model",
    "mlp": "batch pos d_mlp",
}


def _exists(needs: str, layer: int, config: Config) -> bool:
    """Whether the model has what a site needs, in this layer (csrc/run/sites.def)."""
    return {
        "": True,
        "positions": config.pos_embed,
        "pre_norms": config.pre_norms,
        "post_norms": config.post_norms,
        "rotation": config.rope_table[layer] >= 0,
        "sequential": not config.parallel,
        "gate": config.gated,
    }[needs]


@dataclass(frozen=True)
class Site:
    """One site of one model: its name, the engine's site number and layer, kind (a key of AXES),
    heads (1 without a heads axis) and width (0 over keys).
    """

    name: str
    number: int
    layer: int
    kind: str
    n_heads: int
    width: int

    @property
    def key(self) -> tuple[int, int]:
        return self.number, self.layer

    @property
    def before_layers(self) -> bool:
        """Whether it is an embedding, which every layer depends on and no layer computes."""
        return not self.name.startswith(("blocks.", "ln_final."))

    @property
    def has_heads(self) -> bool:
        return self.kind in ("query_heads", "kv_heads", "keys", "heads_width")

    @property
    def over_keys(self) -> bool:
        return self.kind == "keys"


class SiteTable:
    """All sites of a model with this config, in the order of the forward pass."""

    def __init__(self, config: Config) -> None:
        from .device import _engine

        widths = {
            "width": (1, config.d_model),
            "one": (1, 1),
            "query_heads": (config.n_heads, config.d_head),
            "kv_heads": (config.n_kv_heads, config.d_head),
            "keys": (config.n_heads, 0),
            "heads_width": (config.n_heads, config.d_model),
            "mlp": (1, config.d_mlp),
        }
        rows = [(number, *row) for number, row in enumerate(_engine().sites())]
        first = next(i for i, row in enumerate(rows) if row[3])
        last = max(i for i, row in enumerate(rows) if row[3])
        in_order = [
            *((0, row) for row in rows[:first]),
            *((layer, row) for layer in range(config.n_layers) for row in rows[first : last + 1]),
            *((0, row) for row in rows[last + 1 :]),
        ]
        self.by_name: dict[str, Site] = {}
        for layer, (number, pattern, kind, _, needs) in in_order:
            if _exists(needs, layer, config):
                name = pattern.replace("{l}", str(layer))
                self.by_name[name] = Site(name, number, layer, kind, *widths[kind])

    def shapes(self) -> dict[str, str]:
        """Name -> axes, e.g. "blocks.3.attn.hook_pattern": "batch head query key"."""
        return {name: AXES[site.kind] for name, site in self.by_name.items()}

    def find(self, pattern: str) -> list[Site]:
        """Sites that a name or a pattern (* stands for anything) names, in order.

        Raises KeyError, with the nearest names, where there is none.
        """
        if not isinstance(pattern, str):
            raise TypeError(f"a site is named by a str, not {pattern!r}")
        if pattern in self.by_name:
            return [self.by_name[pattern]]
        if "*" in pattern:
            expression = re.compile(".*".join(re.escape(part) for part in pattern.split("*")))
            found = [site for name, site in self.by_name.items() if expression.fullmatch(name)]
            if found:
                return found
        near = difflib.get_close_matches(pattern, self.by_name, n=3, cutoff=0.4)
        raise KeyError(
            f"no site {pattern!r}"
            + (f"; nearest: {', '.join(near)}" if near else "")
            + "; model.sites lists all"
        )

    def find_all(self, patterns: str | Iterable[str]) -> list[Site]:
        """Sites of a pattern or a list of patterns, each once, in the order of the patterns."""
        if isinstance(patterns, str):
            patterns = [patterns]
        try:
            patterns = list(patterns)
        except TypeError:
            raise TypeError(
                f"sites are named by a str or a list of them, not {patterns!r}"
            ) from None
        return list(
            {site.name: site for pattern in patterns for site in self.find(pattern)}.values()
        )
