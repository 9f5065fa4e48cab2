"""Many prompts under many position-independent edits, without computing anything twice.

Candidates of a steering vector need the residual streams of prompts, and the next-token logits of
the same prompts under one vector after the other. Layers below the first edited one are run once
per prompt and their inputs are kept; the shared prefix (the head of the chat template) is run once
per edit, and its keys and values are copied to every row. The results are bit-identical to those of
`model.run`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard

import numpy as np

from ..base.types import Float32Array, UInt32Array
from .batch import Batch
from .edits import Ablate, Steer

if TYPE_CHECKING:
    from .edits import Edit
    from .model import Model

#: {(site, layer): values}, as the engine returns captures.
Captured: TypeAlias = dict[tuple[int, int], Float32Array]
#: A row: its tokens and its edits.
Row: TypeAlias = tuple[Sequence[int], "Sequence[Edit]"]

#: Bytes of layer inputs kept on the host, and the fewest tokens of a shared prefix that are worth a
#: pass of their own.
KEEP_BYTES = 512 << 20
PREFIX = 4


class LayerInputs:
    """Residual streams of unedited prompts by layer: float32 [tokens, D] for (prompt, layer).
    Bounded; the least recently used prompts are dropped first.
    """

    def __init__(self, model: Model) -> None:
        self.model, self._bytes = model, 0
        self._kept: OrderedDict[tuple[tuple[int, ...], int], Float32Array] = OrderedDict()

    def get(
        self, prompts: list[tuple[int, ...]], layer: int, *, every_layer: bool = True
    ) -> list[Float32Array]:
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
            head, rest = layer_inputs(self.model, missing, layers, 1)
            for l in layers:
                for prompt, row in zip(missing, rest[l]):
                    kept = np.concatenate([head[l], row[len(row) + len(head[l]) - len(prompt) :]])
                    self._keep((prompt, l), kept)
                    if l == layer:
                        found[prompt] = kept
        return [found[p] for p in prompts]

    def _keep(self, key: tuple[tuple[int, ...], int], value: Float32Array) -> None:
        old = self._kept.pop(key, None)
        self._kept[key] = value
        self._bytes += value.nbytes - (0 if old is None else old.nbytes)
        while self._bytes > 2 * KEEP_BYTES:
            _, old = self._kept.popitem(last=False)
            self._bytes -= old.nbytes


class KeepsLayerInputs(Protocol):
    """A model that can start a run above the embedding, from the layer inputs that it keeps.

    `Model` is one. Steering calls take any object with `config`, `chat_tokens` and `run`; one that
    keeps no layer inputs (the NumPy models of the tests) runs from the embedding, with the same
    results. `keeps_layer_inputs` is the only place where the difference is made.
    """

    @property
    def _layer_inputs(self) -> LayerInputs: ...


def keeps_layer_inputs(model: object) -> TypeGuard[Model]:
    """Whether `model` is a KeepsLayerInputs."""
    return hasattr(model, "_layer_inputs")


def can_resume(rows: Iterable[Row]) -> bool:
    """Whether all edits act alike on every token: Steer and Ablate without positions."""
    return all(
        isinstance(e, (Steer, Ablate)) and e.positions is None for _, edits in rows for e in edits
    )


def _first_layer(rows: Sequence[Row], n_layers: int) -> int:
    """The first layer that any row edits (the last one for edits of its output); 0 for rows that
    must run from the start (unedited, ablated).
    """
    if not all(edits for _, edits in rows):
        return 0
    first = min(
        (e.vector.layer if isinstance(e, Steer) else 0 for _, edits in rows for e in edits),
        default=0,
    )
    return min(first, n_layers - 1)


def _edit_key(edits: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(
        (
            type(e).__name__,
            id(e.vector),
            getattr(e, "coefficient", 1.0),
            repr(getattr(e, "sites", None)),
        )
        for e in edits
    )


def _shared(model: Model, prompts: Sequence[Sequence[int]], n_groups: int, reach: int) -> int:
    """Length of the shared prefix, which leaves out the last `reach` tokens of each prompt; 0 where
    it is not worth a pass of its own, and where a prompt is so long that its rotation is another
    one than that of its prefix (longrope).
    """
    if 0 < model.config.rope_switch < max(map(len, prompts)):
        return 0
    first, n = prompts[0], min(map(len, prompts)) - reach
    while n > 0 and not all(p[:n] == first[:n] for p in prompts):
        n -= 1
    return n if n >= PREFIX and len(prompts) >= 2 * n_groups else 0


def _pass(
    model: Model,
    prompts: list[tuple[int, ...]],
    rows_edits: Sequence[Sequence[Edit]],
    keys: list[Any],
    capture: list[tuple[int, int]],
    logits: str | None,
    *,
    layer: int = 0,
    inputs: list[Float32Array] | None = None,
    stop_layer: int = 0,
    reach: int = 1,
) -> tuple[Float32Array | None, Captured, Captured]:
    """Prompts under edits; rows with equal keys have equal edits, and the shared prefix, which
    leaves out at least the last `reach` tokens of every prompt, is run once for each key.

    layer, inputs: start there, from these residual streams [tokens, D]. Returns (logits or None,
    {site: [keys, prefix, ...]}, {site: [prompts, longest - prefix, ...]} of the rest, left-padded).
    """
    from .device import _engine

    groups = list(dict.fromkeys(keys))
    prefix = _shared(model, prompts, len(groups), reach)
    lengths = [len(p) for p in prompts]
    slots = np.concatenate([[0], np.cumsum(lengths)]).astype(np.uint32)
    cache = _engine().Cache(model._engine, int(slots[-1]))

    def options(part: slice, rows: Sequence[int]) -> dict[str, Any]:
        if not layer or inputs is None:
            return {"stop_layer": stop_layer}
        parts = [inputs[r][part] for r in rows]
        return {"stop_layer": stop_layer, "first_layer": layer, "inputs": parts}

    head: Captured = {}
    if prefix:
        # the first row of each group runs the shared tokens; the others get copies
        leader = [keys.index(g) for g in groups]
        shared = [prompts[r][:prefix] for r in leader]
        edits = [rows_edits[r] for r in leader]
        resumed = options(slice(prefix), leader)
        head = _prefix_pass(model, cache, shared, edits, slots[leader], capture, resumed)
        for group, first in zip(groups, leader, strict=True):
            others = [slots[r] for r, k in enumerate(keys) if k == group and r != first]
            cache.copy(int(slots[first]), np.array(others, np.uint32), prefix, layer)
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
        **options(slice(prefix, None), range(len(prompts))),
    )
    return values, head, rest


def _prefix_pass(
    model: Model,
    cache: Any,
    prompts: list[tuple[int, ...]],
    rows_edits: list[Sequence[Edit]],
    slots: UInt32Array,
    capture: list[tuple[int, int]],
    options: dict[str, Any],
) -> Captured:
    """One pass over prefixes of one length: fills the cache and returns {site: [prefixes, ...]}."""
    n, length = len(prompts), len(prompts[0])
    batch = Batch(
        model, [length] * n, [length] * n, ([list(edits) for edits in rows_edits], False), None
    )
    _, captured = batch.forward(
        cache,
        prompts,
        slots=slots,
        columns=[0] * n,
        n_columns=length,
        capture=capture,
        **options,
    )
    return captured


def last_logits(model: Model, rows: Sequence[Row]) -> Float32Array:
    """Logits after the last token, float32 [len(rows), V]. rows: (token list, list of
    edits); see `can_resume`.
    """
    prompts = [tuple(tokens) for tokens, _ in rows]
    layer = _first_layer(rows, model.config.n_layers)
    inputs = model._layer_inputs.get(prompts, layer) if layer else None
    logits, _, _ = _pass(
        model,
        prompts,
        [edits for _, edits in rows],
        [_edit_key(edits) for _, edits in rows],
        [],
        "last",
        layer=layer,
        inputs=inputs,
    )
    assert logits is not None  # "last" was asked for
    return logits


def layer_inputs(
    model: Model, prompts: Sequence[Sequence[int]], layers: Sequence[int], reach: int
) -> tuple[dict[int, Float32Array], dict[int, Float32Array]]:
    """resid_pre of unedited prompts at some layers: {layer: [prefix, D]} of the shared prefix, and
    {layer: [prompts, longest - prefix, D]}, left-padded, of the rest.

    The prefix is empty where too little is shared; at least the last `reach` tokens of every prompt
    are in the rest.
    """
    names = {l: f"blocks.{l}.hook_resid_pre" for l in layers}
    rows = [tuple(p) for p in prompts]
    if not keeps_layer_inputs(model) or _shared(model, rows, 1, reach) == 0:
        run = model.run([list(p) for p in prompts], capture=list(names.values()), logits=None)
        return {l: run[name][0, :0] for l, name in names.items()}, {
            l: run[name] for l, name in names.items()
        }
    keys = {l: model._sites.find_all([name])[0].key for l, name in names.items()}
    _, head, rest = _pass(
        model,
        rows,
        [[]] * len(prompts),
        [()] * len(prompts),
        list(keys.values()),
        None,
        stop_layer=max(1, *keys),
        reach=reach,
    )
    return {l: head[key][0] for l, key in keys.items()}, {l: rest[key] for l, key in keys.items()}
