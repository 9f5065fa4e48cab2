"""What has to be computed for many circuits at once, each thing once (csrc/analysis/circuit.h has
the words and the format).

An input whose kept edges start at nodes that nothing changed is the base run's. Otherwise the way
it is read is named by the blocks that are added to it; circuits that agree on them share one entry,
heads with the same query, key and value entries share a state, and so on upwards. What no later
input and no metric needs is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .graph import Graph

#: NO_BLOCK of shaders/include/params.h.
NO_BLOCK = 0xFFFFFFFF
_MASKED = 1 << 40  # provisional numbers of masked blocks


@dataclass
class Rows:
    """One run beside the base run.

    kept: bool [n_upstream, n_downstream], the edges along which what this run changes is passed on.
    steered: does it start with steering? patches: (upstream, downstream) pairs where an input gets,
    besides, what the first run's node changes (masked). read: are its logits wanted?
    """

    kept: np.ndarray
    steered: bool = True
    patches: Sequence[tuple[int, int]] = ()
    read: bool = True


def kept_matrix(graph: Graph, edges) -> np.ndarray:
    """Bool [n_upstream, n_downstream] from edge numbers."""
    matrix = np.zeros((graph.n_upstream, graph.n_downstream), bool)
    matrix[graph.upstream[edges], graph.downstream[edges]] = True
    return matrix


@dataclass
class Plan:
    """arrays: what the engine's Circuits takes. logits: int64 [n rows], which entry of the logits'
    input each row is, -1 for the base run's.
    """

    arrays: tuple
    logits: np.ndarray


def _needed(graph: Graph, rows: Sequence[Rows], post_norms: bool):
    """(outputs that matter bool [R, n_upstream], inputs that matter bool [R, n_downstream])."""
    H, G, w = graph.n_heads, graph.n_kv_heads, graph.width
    out = np.zeros((len(rows), graph.n_upstream), bool)
    into = np.zeros((len(rows), graph.n_downstream), bool)
    into[:, -1] = [r.read for r in rows]
    for u, _ in (p for r in rows for p in r.patches):
        out[0, u] = True
    leads = lambda u: np.array([(r.kept[u] & into[i]).any(axis=-1) for i, r in enumerate(rows)])
    for l in reversed(range(graph.depth)):
        first, at = 1 + l * (H + 1), l * w
        out[:, first + H] |= leads(first + H)
        into[:, at + w - 1] = out[:, first + H]
        heads = out[:, first : first + H] | leads(slice(first, first + H))
        out[:, first : first + H] = heads
        if post_norms:  # every head's part is divided by what all of them add up to
            into[:, at : at + w - 1] = heads.any(axis=1, keepdims=True)
        else:
            groups = heads.reshape(len(rows), G, H // G).any(axis=2)
            into[:, at : at + w - 1] = np.concatenate([heads, groups, groups], axis=1)
    return out, into


class _Layout:
    """Numbers handed out while the plan is walked through once, from the steering layer up."""

    def __init__(self, graph, rows, masked):
        self.graph, self.rows, self.masked = graph, rows, masked
        # what each node adds in each run; -1: nothing new
        self.blocks = np.full((len(rows), graph.n_upstream), -1, np.int64)
        self.blocks[[i for i, r in enumerate(rows) if r.steered], 0] = 0
        self.n_blocks = 1
        self.patched_from: dict[int, int] = {}  # upstream node -> block that its patches add
        self.patches = [{} for _ in rows]
        for mine, row in zip(self.patches, rows):
            for u, v in row.patches:
                mine.setdefault(v, []).append(u)
        self.sources = {u for r in rows for u, _ in r.patches}
        self.entry_first, self.refs = [0], []
        self.states, self.state_first, self.outputs, self.output_first = [], [0], [], [0]
        self.variants, self.variant_first, self.masks, self.mask_first = [], [0], [], [0]

    def stage_done(self, nodes):
        for u in nodes:
            if u in self.sources:
                block = int(self.blocks[0, u])
                if self.masked and block >= 0:
                    self.masks.append(block)
                    block = _MASKED + len(self.masks) - 1
                self.patched_from[u] = block
        self.mask_first.append(len(self.masks))

    def read(self, v, needed) -> np.ndarray:
        """The entry (within its input) by which each run reads input v, -1 for the
        base run's: int64 [R].
        """
        start, found = len(self.refs), {}
        out = np.full(len(self.rows), -1, np.int64)
        for r in np.flatnonzero(needed):
            blocks = np.where(self.rows[r].kept[:, v], self.blocks[r], -1)
            for u in self.patches[r].get(v, ()):
                blocks[u] = self.patched_from[u]
            blocks = blocks[blocks >= 0]
            if blocks.size:
                key = blocks.tobytes()
                if key not in found:
                    found[key] = len(found)
                    self.refs.append(blocks)
                out[r] = found[key]
        self.entry_first.append(start + len(found))
        return out

    def attention(self, l, needed_out, needed_in, post_norms):
        graph, R = self.graph, len(self.rows)
        H, G, w = graph.n_heads, graph.n_kv_heads, graph.width
        # [R, H + 2G]
        entries = np.stack(
            [self.read(l * w + i, needed_in[:, l * w + i]) for i in range(w - 1)], axis=1
        )
        states, variants, outputs = {}, {}, {}
        made = []  # (run, node, output)
        for r in range(R):
            mine = []
            for h in range(H):
                g = h // (H // G)
                key = (h, int(entries[r, h]), int(entries[r, H + g]), int(entries[r, H + G + g]))
                mine.append(-1 if max(key[1:]) < 0 else states.setdefault(key, len(states)))
            if max(mine) < 0:
                continue
            variant = variants.setdefault(tuple(mine), len(variants)) if post_norms else 0
            for h in np.flatnonzero(needed_out[r, 1 + l * (H + 1) : 1 + l * (H + 1) + H]).tolist():
                if mine[h] >= 0 or post_norms:
                    key = (h, mine[h], variant)
                    outputs.setdefault(key, None)
                    made.append((r, h, key))
        if not post_norms and states:  # states that no needed output has are left out
            used = {key[1] for key in outputs}
            kept = [key for key, s in states.items() if s in used]
            renumber = {states[key]: i for i, key in enumerate(kept)}
            states = {key: i for i, key in enumerate(kept)}
            outputs = {(h, renumber[s], v): None for h, s, v in outputs}
            made = [(r, h, (k[0], renumber[k[1]], k[2])) for r, h, k in made]
        order = {key: i for i, key in enumerate(sorted(outputs, key=lambda k: k[0]))}
        for r, h, key in made:
            self.blocks[r, 1 + l * (H + 1) + h] = self.n_blocks + order[key]
        self.n_blocks += len(order)
        self.states += list(states)
        self.outputs += list(order)
        self.variants += list(variants)
        self.state_first.append(len(self.states))
        self.output_first.append(len(self.outputs))
        self.variant_first.append(len(self.variants))
        self.stage_done(range(1 + l * (H + 1), 1 + l * (H + 1) + H))

    def mlp(self, l, needed_in):
        v, u = (
            l * self.graph.width + self.graph.width - 1,
            1 + l * (self.graph.n_heads + 1) + self.graph.n_heads,
        )
        before = self.entry_first[-1]
        entries = self.read(v, needed_in[:, v])
        self.blocks[:, u] = np.where(entries >= 0, self.n_blocks + entries, -1)
        self.n_blocks += self.entry_first[-1] - before
        self.stage_done([u])


def compile_plan(
    graph: Graph, rows: Sequence[Rows], post_norms: bool, masked: bool = False
) -> Plan:
    """The plan of these runs. masked: patches act at some tokens only."""
    needed_out, needed_in = _needed(graph, rows, post_norms)
    layout = _Layout(graph, rows, masked)
    layout.stage_done([0])
    for l in range(graph.depth):
        layout.attention(l, needed_out, needed_in, post_norms)
        layout.mlp(l, needed_in)
    logits = layout.read(graph.n_downstream - 1, needed_in[:, -1])
    lengths = [len(r) for r in layout.refs]
    refs = np.concatenate(layout.refs) if layout.refs else np.zeros(0, np.int64)
    refs = np.where(refs >= _MASKED, refs - _MASKED + layout.n_blocks, refs)
    # -1 becomes NO_BLOCK
    numbers = lambda values: np.array(values, np.int64).reshape(-1).astype(np.uint32)
    arrays = (
        numbers(layout.entry_first),
        numbers(np.concatenate([[0], np.cumsum(lengths)])),
        numbers(refs),
        numbers(layout.state_first),
        numbers(layout.states),
        numbers(layout.output_first),
        numbers(layout.outputs),
        numbers(layout.variant_first),
        numbers(layout.variants),
        numbers(layout.mask_first),
        numbers(layout.masks),
    )
    return Plan(arrays, logits)
