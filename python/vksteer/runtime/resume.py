"""Many prompts under many position-independent edits, nothing computed twice.

What the candidates of a steering vector need: the residual streams of prompts, and the
next-token logits of the same prompts under one vector after the other. Layers below the first
edited one are run once per prompt and kept; the tokens that all prompts begin with (the
template's head) are run once per edit and their keys and values copied to every row. The results
are those of `model.run`, to the last bit.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from .batch import Batch
from .edits import Ablate, Steer

#: Bytes of layer inputs kept on the host, and the shortest shared prefix that is
#: worth a second pass.
KEEP_BYTES = 512 << 20
PREFIX = 4


class LayerInputs:
    """Residual streams of unedited prompts by layer: float32 [tokens, D] for (prompt, layer).
    Bounded; the least recently used prompts go first.
    """

    def __init__(self, model):
        self.model, self._kept, self._bytes = model, OrderedDict(), 0

    def get(
        self, prompts: list[tuple[int, ...]], layer: int, *, every_layer: bool = True
    ) -> list[np.ndarray]:
        """One array per prompt; runs the missing ones once, keeping every layer where memory allows
        and `every_layer` asks for it.
        """
        found = {}
        for p in prompts:
            if (p, layer) in self._kept:
                self._kept.move_to_end((p, layer))
                found[p] = self._kept[p, layer]
        missing = list(dict.fromkeys(p for p in prompts if p not in found))
        if missing:
            c = self.model.config
            size = sum(map(len, missing)) * c.d_model * 4
            layers = (
                range(c.n_layers) if every_layer and size * c.n_layers <= KEEP_BYTES else [layer]
            )
            head, rest = streams(self.model, missing, layers, 1)
            for l in layers:
                for prompt, row in zip(missing, rest[l]):
                    kept = np.concatenate([head[l], row[len(row) + len(head[l]) - len(prompt) :]])
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
    return all(
        isinstance(e, (Steer, Ablate)) and e.positions is None for _, edits in rows for e in edits
    )


def _first_layer(rows) -> int:
    """The first layer that any row edits; 0 for rows that must run from the start
    (unedited, ablated).
    """
    if not all(edits for _, edits in rows):
        return 0
    return min(
        (e.vector.layer if isinstance(e, Steer) else 0 for _, edits in rows for e in edits),
        default=0,
    )


def _edit_key(edits):
    return tuple(
        (
            type(e).__name__,
            id(e.vector),
            getattr(e, "coefficient", 1.0),
            repr(getattr(e, "sites", None)),
        )
        for e in edits
    )


def _shared(prompts, n_groups: int, reach: int) -> int:
    """Tokens that all prompts begin with, the last `reach` of each left out; 0 where that is not
    worth a pass of its own.
    """
    first, n = prompts[0], min(map(len, prompts)) - reach
    while n > 0 and not all(p[:n] == first[:n] for p in prompts):
        n -= 1
    return n if n >= PREFIX and len(prompts) >= 2 * n_groups else 0


def _pass(
    model,
    prompts,
    rows_edits,
    keys,
    capture,
    logits,
    *,
    layer=0,
    inputs=None,
    stop_layer=0,
    reach=1,
):
    """Prompts (tuples of tokens) under edits; rows with one key have equal edits, and the tokens
    that all prompts begin with are run once for each key.

    layer, inputs: start there, from these residual streams [tokens, D], one a prompt. At
    least the last `reach` tokens of every prompt are its own. Returns (logits or None, {site:
    [keys, head, ...]} of the shared head, {site: [prompts, longest prompt - head, ...]} of
    the rest, left-padded).
    """
    from .device import _engine

    groups = list(dict.fromkeys(keys))
    prefix = _shared(prompts, len(groups), reach)
    lengths = [len(p) for p in prompts]
    slots = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    cache = _engine().Cache(model._engine, int(slots[-1]))
    options = lambda parts: (
        {"stop_layer": stop_layer} | ({"first_layer": layer, "inputs": parts} if layer else {})
    )
    head = {}
    if prefix:
        # the first row of each group runs the shared tokens; the others get copies
        leader = [keys.index(g) for g in groups]
        batch = Batch(
            model,
            [prefix] * len(groups),
            [prefix] * len(groups),
            ([list(rows_edits[r]) for r in leader], False),
            None,
        )
        _, head = batch.forward(
            cache,
            [prompts[r][:prefix] for r in leader],
            slots=slots[leader],
            columns=[0] * len(groups),
            n_columns=prefix,
            capture=capture,
            **options([inputs[r][:prefix] for r in leader] if layer else []),
        )
        for group, first in zip(groups, leader):
            others = np.array(
                [slots[r] for r, k in enumerate(keys) if k == group and r != first], np.uint32
            )
            cache.copy(int(slots[first]), others, prefix, layer)
    width = max(lengths) - prefix
    batch = Batch(model, lengths, lengths, ([list(edits) for edits in rows_edits], False), None)
    values, rest = batch.forward(
        cache,
        [p[prefix:] for p in prompts],
        starts=[prefix] * len(prompts),
        slots=slots[:-1],
        columns=[width - n for n in lengths],
        n_columns=width,
        key_columns=[0] * len(prompts),
        n_keys=width + prefix,
        capture=capture,
        logits=logits,
        **options([x[prefix:] for x in inputs] if layer else []),
    )
    return values, head, rest


def last_logits(model, rows) -> np.ndarray:
    """Logits after the last token, float32 [len(rows), V]. rows: (token list, list of
    edits); see `can_resume`.
    """
    prompts = [tuple(tokens) for tokens, _ in rows]
    layer = _first_layer(rows)
    inputs = model._layer_inputs.get(prompts, layer) if layer else None
    return _pass(
        model,
        prompts,
        [edits for _, edits in rows],
        [_edit_key(edits) for _, edits in rows],
        [],
        "last",
        layer=layer,
        inputs=inputs,
    )[0]


def streams(model, prompts, layers, reach: int) -> tuple[dict, dict]:
    """resid_pre of unedited prompts at some layers: {layer: [head, D]} of what all begin with,
    {layer: [prompts, longest - head, D]}, left-padded, of the rest.

    The head is empty where too little is shared; at least the last `reach` tokens of every
    prompt are in the rest.
    """
    names = {l: f"blocks.{l}.hook_resid_pre" for l in layers}
    # as in steering.scores: a model that has `run` only
    if not hasattr(model, "_layer_inputs") or _shared([tuple(p) for p in prompts], 1, reach) == 0:
        run = model.run([list(p) for p in prompts], capture=list(names.values()), logits=None)
        return {l: run[name][0, :0] for l, name in names.items()}, {
            l: run[name] for l, name in names.items()
        }
    keys = {l: model._sites.find_all([name])[0].key for l, name in names.items()}
    _, head, rest = _pass(
        model,
        [tuple(p) for p in prompts],
        [[]] * len(prompts),
        [()] * len(prompts),
        list(keys.values()),
        None,
        stop_layer=max(1, *keys),
        reach=reach,
    )
    return {l: head[key][0] for l, key in keys.items()}, {l: rest[key] for l, key in keys.items()}
