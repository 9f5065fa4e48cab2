"""Many prompts under many position-independent edits, nothing computed twice.

What the candidates of a steering vector need: the next-token logits of the same prompts under one vector after the other. Layers below the first
edited one are run once per prompt and kept; the tokens that all prompts begin with (the template's head) are run once per edit and their keys and
values copied to every row. The results are those of `model.run(..., logits="last")`, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from .batch import Batch
from .edits import Ablate, Steer

#: Bytes of layer inputs kept on the host, and the shortest shared prefix that is worth a second pass.
KEEP_BYTES = 512 << 20
PREFIX = 4


class LayerInputs:
    """Residual streams of unedited prompts by layer: float32 [tokens, D] for (prompt, layer). Bounded; the least recently used prompts go first."""

    def __init__(self, model):
        self.model, self._kept, self._bytes = model, OrderedDict(), 0

    def get(self, prompts: list[tuple[int, ...]], layer: int, *, every_layer: bool = True) -> list[np.ndarray]:
        """One array per prompt; runs the missing ones once, keeping every layer where memory allows and `every_layer` asks for it."""
        found = {}
        for p in prompts:
            if (p, layer) in self._kept:
                self._kept.move_to_end((p, layer))
                found[p] = self._kept[p, layer]
        missing = list(dict.fromkeys(p for p in prompts if p not in found))
        if missing:
            c = self.model.config
            size = sum(map(len, missing)) * c.d_model * 4
            layers = range(c.n_layers) if every_layer and size * c.n_layers <= KEEP_BYTES else [layer]
            sites = {l: f"blocks.{l}.hook_resid_pre" for l in layers}
            run = self.model.run([list(p) for p in missing], capture=list(sites.values()), logits=None)
            for l, site in sites.items():
                for prompt, row in zip(missing, run[site]):
                    kept = row[-len(prompt):].copy()  # a view would keep the whole batch alive
                    self._keep((prompt, l), kept)
                    if l == layer:
                        found[prompt] = kept
        return [found[p] for p in prompts]

    def _keep(self, key, value):
        old = self._kept.pop(key, None)
        self._kept[key] = value
        self._bytes += value.nbytes - (0 if old is None else old.nbytes)
        while self._bytes > 2 * KEEP_BYTES:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.nbytes


def can_resume(rows) -> bool:
    """Only edits that act alike on every token: Steer and Ablate without positions."""
    return all(isinstance(e, (Steer, Ablate)) and e.positions is None for _, edits in rows for e in edits)


def _first_layer(rows) -> int:
    """The first layer that any row edits; 0 for rows that must run from the start (unedited, ablated)."""
    if not all(edits for _, edits in rows):
        return 0
    return min((e.vector.layer if isinstance(e, Steer) else 0 for _, edits in rows for e in edits), default=0)


def _edit_key(edits):
    return tuple((type(e).__name__, id(e.vector), getattr(e, "coefficient", 1.0), repr(getattr(e, "sites", None))) for e in edits)


def _common_prefix(prompts) -> int:
    first, n = prompts[0], min(map(len, prompts)) - 1 # every row keeps a token of its own
    while not all(p[:n] == first[:n] for p in prompts):
        n -= 1
    return max(n, 0)


def last_logits(model, rows) -> np.ndarray:
    """Logits after the last token, float32 [len(rows), V]. rows: (token list, list of edits); see `can_resume`."""
    from .device import _engine

    prompts = [tuple(tokens) for tokens, _ in rows]
    layer = _first_layer(rows)
    inputs = model._layer_inputs.get(prompts, layer) if layer else None
    keys = [_edit_key(edits) for _, edits in rows]
    groups = list(dict.fromkeys(keys))
    prefix = _common_prefix(prompts)
    if prefix < PREFIX or len(rows) < 2 * len(groups):
        prefix = 0
    lengths = [len(p) for p in prompts]
    slots = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    cache = _engine().Cache(model._engine, int(slots[-1]))
    resumed = lambda parts: dict(first_layer=layer, inputs=np.concatenate(parts)) if layer else {}
    if prefix:
        leader = [keys.index(g) for g in groups] # the first row of each group runs the shared tokens; the others get copies
        batch = Batch(model, [prefix] * len(groups), [prefix] * len(groups), ([list(rows[r][1]) for r in leader], False), None)
        batch.forward(cache, [prompts[r][:prefix] for r in leader], [0] * len(groups), slots[leader], [0] * len(groups), prefix, prefix, [], None,
                      range(len(groups)), **resumed([inputs[r][:prefix] for r in leader] if layer else []))
        for group, first in zip(groups, leader):
            others = np.array([slots[r] for r, k in enumerate(keys) if k == group and r != first], np.uint32)
            cache.copy(int(slots[first]), others, prefix, layer)
    width = max(lengths)
    batch = Batch(model, lengths, lengths, ([list(edits) for _, edits in rows], False), None)
    logits, _ = batch.forward(cache, [p[prefix:] for p in prompts], [prefix] * len(rows), slots[:-1], [width - n for n in lengths], width, width, [],
                              "last", range(len(rows)), **resumed([x[prefix:] for x in inputs] if layer else []))
    return logits
