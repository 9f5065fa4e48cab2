"""Circuits compiled for the engine: what has to be computed for many runs at once, each thing once.
csrc/analysis/circuit.h defines the terms and the format of the tables.

The engine adds differences to the base run: the difference of a node is what the node adds to the
residual stream in a run minus what it adds in the base run. An input whose kept edges all start at
nodes without a difference reads what it reads in the base run. Any other reading of an input is
identified by the differences that are added to it. Runs that agree on them share one entry; heads
with the same entries for query, key and value share one state; and so on upwards. Whatever no
later input and no metric needs is left out.

Where a norm goes over the queries (or keys) of all heads, a query depends on what every head's
query input reads: the entries of all heads that a run combines are a row, and a state names rows
instead of entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from ..base.types import BoolArray, IntArray
from .graph import Graph

if TYPE_CHECKING:
    from ..loading.config import Config

#: Masked differences are numbered from here on until the number of the others is known.
_MASKED = 1 << 40

#: (head, entries of its query, key and value input), -1 for the base run's. Where one norm goes
#: over all heads: (head, row of queries, row of keys, entry of its value input).
State: TypeAlias = tuple[int, int, int, int]
#: (head, number of its state or -1, number of the layer's variant)
Output: TypeAlias = tuple[int, int, int]


@dataclass
class Rows:
    """One run beside the base run.

    kept: bool [n_upstream, n_downstream], the edges along which differences of this run are passed
    on. steered: whether steering is the first of its differences. patches: (upstream, downstream)
    pairs; the input of each also gets the difference of that node in the first run, masked where
    patches act at some tokens only. read: whether a metric reads its logits.
    """

    kept: BoolArray
    steered: bool = True
    patches: Sequence[tuple[int, int]] = ()
    read: bool = True


def kept_matrix(graph: Graph, edges: npt.ArrayLike) -> BoolArray:
    """Edge numbers as a matrix, bool [n_upstream, n_downstream]."""
    matrix = np.zeros((graph.n_upstream, graph.n_downstream), bool)
    numbers = np.asarray(edges)
    matrix[graph.upstream[numbers], graph.downstream[numbers]] = True
    return matrix


@dataclass
class CompiledCircuits:
    """arrays: the tables that the engine's Circuits takes, uint32 each. logits: int64 [n rows], the
    entry of the logits' input that each run reads, -1 for the base run's.
    """

    arrays: tuple[npt.NDArray[np.uint32], ...]
    logits: IntArray


@dataclass(frozen=True)
class Norms:
    """The norms of a model that go over several heads: post_norms, over the output of attention;
    wide, over the queries (or keys) of all heads.
    """

    post_norms: bool
    wide: bool


def _needed(graph: Graph, rows: Sequence[Rows], norms: Norms) -> tuple[BoolArray, BoolArray]:
    """What metrics depend on: (outputs bool [R, n_upstream], inputs bool [R, n_downstream])."""
    H, G, w = graph.n_heads, graph.n_kv_heads, graph.width
    out = np.zeros((len(rows), graph.n_upstream), bool)
    into = np.zeros((len(rows), graph.n_downstream), bool)
    into[:, -1] = [r.read for r in rows]
    for u, _ in (p for r in rows for p in r.patches):
        out[0, u] = True

    def leads(u: int | slice) -> BoolArray:
        return np.array([(r.kept[u] & into[i]).any(axis=-1) for i, r in enumerate(rows)])

    for l in reversed(range(graph.depth)):
        first, at = 1 + l * (H + 1), l * w
        out[:, first + H] |= leads(first + H)
        into[:, at + w - 1] = out[:, first + H]
        heads = out[:, first : first + H] | leads(slice(first, first + H))
        out[:, first : first + H] = heads
        groups = heads.reshape(len(rows), G, H // G).any(axis=2)
        into[:, at : at + w - 1] = np.concatenate([heads, groups, groups], axis=1)
        # A norm's statistic depends on all heads that it goes over.
        reach = w - 1 if norms.post_norms else H + G if norms.wide else 0
        into[:, at : at + reach] |= heads.any(axis=1, keepdims=True)
    return out, into


class _Compiler:
    """Numbers entries, states, outputs and differences in one walk from the steering layer up."""

    def __init__(self, graph: Graph, rows: Sequence[Rows], norms: Norms, masked: bool):
        self.graph, self.rows, self.norms, self.masked = graph, rows, norms, masked
        #: int64 [R, n_upstream]: the difference of each node in each run, -1 for none.
        self.differences = np.full((len(rows), graph.n_upstream), -1, np.int64)
        self.differences[[i for i, r in enumerate(rows) if r.steered], 0] = 0
        self.n_differences = 1
        self.patched_from: dict[int, int] = {}  # upstream node -> difference that a patch adds
        self.patches: list[dict[int, list[int]]] = [{} for _ in rows]  # input -> nodes
        for mine, row in zip(self.patches, rows, strict=True):
            for u, v in row.patches:
                mine.setdefault(v, []).append(u)
        self.sources = {u for r in rows for u, _ in r.patches}
        self.entry_first, self.refs = [0], list[IntArray]()
        self.states, self.state_first = list[State](), [0]
        self.outputs, self.output_first = list[Output](), [0]
        self.variants, self.variant_first = list[tuple[int, ...]](), [0]
        self.q_rows, self.q_row_first = list[tuple[int, ...]](), [0]
        self.k_rows, self.k_row_first = list[tuple[int, ...]](), [0]
        self.masks, self.mask_first = list[int](), [0]

    def stage_done(self, nodes: Iterable[int]) -> None:
        """The differences of these nodes are numbered: note those that patches take."""
        for u in nodes:
            if u in self.sources:
                difference = int(self.differences[0, u])
                if self.masked and difference >= 0:
                    self.masks.append(difference)
                    difference = _MASKED + len(self.masks) - 1
                self.patched_from[u] = difference
        self.mask_first.append(len(self.masks))

    def read(self, v: int, needed: BoolArray) -> IntArray:
        """The entry, counted within its input, by which each run reads input v, or -1 for the base
        run's: int64 [R]. needed: bool [R].
        """
        start, found = len(self.refs), dict[bytes, int]()
        out = np.full(len(self.rows), -1, np.int64)
        for r in np.flatnonzero(needed).tolist():
            differences = np.where(self.rows[r].kept[:, v], self.differences[r], -1)
            for u in self.patches[r].get(v, ()):
                differences[u] = self.patched_from[u]
            differences = differences[differences >= 0]
            if differences.size:
                key = differences.tobytes()
                if key not in found:
                    found[key] = len(found)
                    self.refs.append(differences)
                out[r] = found[key]
        self.entry_first.append(start + len(found))
        return out

    def attention(self, l: int, needed_out: BoolArray, needed_in: BoolArray) -> None:
        """Numbers what the heads of layer l compute (l is counted from the steering layer)."""
        H, G, w = self.graph.n_heads, self.graph.n_kv_heads, self.graph.width
        post_norms = self.norms.post_norms
        inputs = range(l * w, l * w + w - 1)
        entries = np.stack([self.read(v, needed_in[:, v]) for v in inputs], axis=1)  # [R, H + 2G]
        if self.norms.wide:
            entries[:, :H] = _joined(entries[:, :H], self.q_rows)
            entries[:, H : H + G] = _joined(entries[:, H : H + G], self.k_rows)
        self.q_row_first.append(len(self.q_rows))
        self.k_row_first.append(len(self.k_rows))
        heads = slice(1 + l * (H + 1), 1 + l * (H + 1) + H)
        states, variants, made = self._heads(entries, needed_out[:, heads], post_norms)
        if not post_norms and states:
            states, made = _without_unused(states, made)
        outputs = dict.fromkeys(output for _, output in made)
        order = {output: i for i, output in enumerate(sorted(outputs, key=lambda o: o[0]))}
        for r, output in made:
            self.differences[r, heads.start + output[0]] = self.n_differences + order[output]
        self.n_differences += len(order)
        self.states += list(states)
        self.outputs += list(order)
        self.variants += list(variants)
        self.state_first.append(len(self.states))
        self.output_first.append(len(self.outputs))
        self.variant_first.append(len(self.variants))
        self.stage_done(range(heads.start, heads.stop))

    def _heads(
        self, entries: IntArray, needed: BoolArray, post_norms: bool
    ) -> tuple[dict[State, int], dict[tuple[int, ...], int], list[tuple[int, Output]]]:
        """(states, variants, (run, output) pairs) of one layer. entries: int64 [R, H + 2G]; needed:
        bool [R, H].
        """
        H, G = self.graph.n_heads, self.graph.n_kv_heads
        states: dict[State, int] = {}
        variants: dict[tuple[int, ...], int] = {}
        made: list[tuple[int, Output]] = []
        for r, row in enumerate(entries.tolist()):
            mine = []
            for h in range(H):
                g = H + h // (H // G)
                state = (h, row[h], row[g], row[g + G])
                mine.append(-1 if max(state[1:]) < 0 else states.setdefault(state, len(states)))
            if max(mine) < 0:
                continue
            variant = variants.setdefault(tuple(mine), len(variants)) if post_norms else 0
            made += [
                (r, (h, mine[h], variant))
                for h in np.flatnonzero(needed[r]).tolist()
                if mine[h] >= 0 or post_norms
            ]
        return states, variants, made

    def mlp(self, l: int, needed_in: BoolArray) -> None:
        """Numbers what the MLP of layer l computes: one difference for each entry."""
        H, w = self.graph.n_heads, self.graph.width
        v, u = l * w + w - 1, 1 + l * (H + 1) + H
        before = self.entry_first[-1]
        entries = self.read(v, needed_in[:, v])
        self.differences[:, u] = np.where(entries >= 0, self.n_differences + entries, -1)
        self.n_differences += self.entry_first[-1] - before
        self.stage_done([u])


def _joined(entries: IntArray, rows: list[tuple[int, ...]]) -> IntArray:
    """What a norm over all heads normalises together: each run's entries of all heads, numbered
    anew in the layer and appended to `rows`. Returns the number of each run's, or -1 where no head
    has an entry: int64 [R, 1]. entries: int64 [R, heads].
    """
    found: dict[tuple[int, ...], int] = {}
    numbers = [
        -1 if max(row) < 0 else found.setdefault(tuple(row), len(found)) for row in entries.tolist()
    ]
    rows += list(found)
    return np.array(numbers, np.int64)[:, None]


def _without_unused(
    states: dict[State, int], made: list[tuple[int, Output]]
) -> tuple[dict[State, int], list[tuple[int, Output]]]:
    """The same without states that no needed output has, the others numbered anew in order."""
    used = {output[1] for _, output in made}
    kept = [state for state, number in states.items() if number in used]
    renumber = {states[state]: i for i, state in enumerate(kept)}
    return (
        {state: i for i, state in enumerate(kept)},
        [(r, (h, renumber[number], variant)) for r, (h, number, variant) in made],
    )


def compile_circuits(
    graph: Graph, rows: Sequence[Rows], config: Config, masked: bool = False
) -> CompiledCircuits:
    """The tables of these runs of a model. masked: whether patches act at some tokens only.

    Raises ValueError for a model with a norm after attention and a bias of its output: what the
    norm leaves of the bias changes with the heads and belongs to none of them.
    """
    if config.post_norms and config.o_bias:
        raise ValueError(
            "circuits and exact patches of a model whose attention has both an output bias and a"
            " norm after it are not supported: the bias belongs to no node, and the norm's scale"
            " changes what it adds"
        )
    norms = Norms(config.post_norms, config.qk_norm == "wide")
    needed_out, needed_in = _needed(graph, rows, norms)
    compiler = _Compiler(graph, rows, norms, masked)
    compiler.stage_done([0])
    for l in range(graph.depth):
        compiler.attention(l, needed_out, needed_in)
        compiler.mlp(l, needed_in)
    logits = compiler.read(graph.n_downstream - 1, needed_in[:, -1])
    lengths = [len(r) for r in compiler.refs]
    refs = np.concatenate(compiler.refs) if compiler.refs else np.zeros(0, np.int64)
    refs = np.where(refs >= _MASKED, refs - _MASKED + compiler.n_differences, refs)

    def numbers(values: npt.ArrayLike) -> npt.NDArray[np.uint32]:
        """Flat; -1 becomes 0xffffffff, which stands for the base run (csrc/analysis/circuit.h)."""
        return np.array(values, np.int64).reshape(-1).astype(np.uint32)

    arrays = (
        numbers(compiler.entry_first),
        numbers(np.concatenate([[0], np.cumsum(lengths)])),
        numbers(refs),
        numbers(compiler.state_first),
        numbers(compiler.states),
        numbers(compiler.output_first),
        numbers(compiler.outputs),
        numbers(compiler.variant_first),
        numbers(compiler.variants),
        numbers(compiler.mask_first),
        numbers(compiler.masks),
        numbers(compiler.q_row_first),
        numbers(compiler.q_rows),
        numbers(compiler.k_row_first),
        numbers(compiler.k_rows),
    )
    return CompiledCircuits(arrays, logits)
