"""What circuits are compiled to: rows of heads that one norm goes over, parallel layers, and the
engine's refusal of plans that read what does not exist.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import vksteer as vs
from vksteer.circuits.plan import Rows, compile_circuits, kept_matrix
from vksteer.runtime.device import _engine

NAMES = (
    "entry_first",
    "ref_first",
    "refs",
    "state_first",
    "states",
    "output_first",
    "outputs",
    "variant_first",
    "variants",
    "mask_first",
    "masks",
    "q_row_first",
    "q_rows",
    "k_row_first",
    "k_rows",
)
NONE = np.uint32(0xFFFFFFFF)


def compiled(config, circuits, layer=1):
    """The tables of circuits given as names of edges, by name, and the entries of the logits."""
    graph = vs.patching.graph(config, layer)
    rows = [Rows(kept_matrix(graph, graph.find(names))) for names in circuits]
    made = compile_circuits(graph, rows, config)
    return dict(zip(NAMES, made.arrays, strict=True)), made.logits


def circuits(model, tables, layer=1):
    return _engine().Circuits(model._engine, layer, tuple(tables[name] for name in NAMES))


HEAD = ["steer->a1.h0<q>", "a1.h0->logits"]


def test_a_norm_over_all_heads_changes_all_of_them(zoo):
    """One query input changes: its row has the other heads' base queries beside it, and every head
    of the layer has a state. Two circuits that differ in another head's query share no query.
    """
    model = zoo.engine("olmo2")  # 4 query heads, 2 key/value heads, post-norms
    tables, logits = compiled(model.config, [HEAD, [*HEAD, "steer->a1.h3<q>"], HEAD])
    assert tables["q_rows"].reshape(-1, 4).tolist() == [[0, NONE, NONE, NONE], [0, NONE, NONE, 0]]
    assert tables["k_rows"].size == 0
    states = tables["states"].reshape(-1, 4)
    assert states[:, :2].tolist() == [[h, row] for row in range(2) for h in range(4)]
    assert (states[:, 2:] == NONE).all()
    assert logits.tolist() == [0, 1, 0]
    circuits(model, tables)
    # With one norm for each head, only that head has a state.
    other, _ = compiled(zoo.engine("exaone4").config, [HEAD])
    assert other["states"].reshape(-1, 4).tolist() == [[0, 0, NONE, NONE]]
    assert other["q_rows"].size == other["k_rows"].size == 0


def test_a_norm_over_all_heads_needs_the_inputs_of_all(zoo):
    """Without post-norms only the heads that lead somewhere have an output, but what the others'
    queries read counts.
    """
    config = dataclasses.replace(zoo.engine("olmo2").config, post_norms=False, pre_norms=True)
    names = ["steer->a1.h0<q>", "steer->a1.h2<q>", "steer->a1.h1<k>", "a1.h0->logits"]
    tables, _ = compiled(config, [names])
    assert tables["q_rows"].tolist() == [0, NONE, 0, NONE]
    assert tables["k_rows"].tolist() == [NONE, 0]
    assert tables["states"].tolist() == [0, 0, 0, NONE]


def wrong(tables, name, index, value):
    array = tables[name].copy()
    array[index] = value
    return tables | {name: array}


@pytest.mark.parametrize("name", ["olmo2", "gemma2"])
def test_a_bias_before_a_norm_after_attention_is_refused(zoo, name):
    """It belongs to no node, so that all edges together would not be the steered run."""
    config = dataclasses.replace(zoo.engine(name).config, o_bias=True)
    with pytest.raises(ValueError, match="an output bias and a norm after it"):
        compiled(config, [HEAD])
    compiled(dataclasses.replace(config, o_bias=False), [HEAD])


@pytest.mark.parametrize(
    "name, index, value, message",
    [
        ("q_rows", 0, 1, "row 0 of a plan names an entry"),
        ("q_rows", 5, 7, "row 1 of a plan names an entry"),
        ("states", 1, 2, "state 0 of a plan names an entry"),
        ("states", 2, 0, "state 0 of a plan names an entry"),
        ("states", 0, 4, "state 0 of a plan names an entry"),
        ("q_row_first", 0, 1, "rows of queries"),
        ("q_row_first", 1, 3, "rows of queries"),
        ("k_row_first", -1, 1, "rows of keys"),
    ],
)
def test_rows_that_do_not_exist_are_refused(zoo, name, index, value, message):
    model = zoo.engine("olmo2")
    tables, _ = compiled(model.config, [HEAD, [*HEAD, "steer->a1.h3<q>"]])
    circuits(model, tables)
    with pytest.raises(ValueError, match=message):
        circuits(model, wrong(tables, name, index, value))


def test_rows_belong_to_norms_over_all_heads(zoo):
    model = zoo.engine("llama3")
    tables, _ = compiled(model.config, [HEAD])
    n, heads = len(tables["q_row_first"]), model.config.n_heads
    rows = {"q_rows": np.full(heads, NONE), "q_row_first": np.array([0] + [1] * (n - 1), np.uint32)}
    with pytest.raises(ValueError, match="rows for a model without a norm of them"):
        circuits(model, tables | rows)
    with pytest.raises(ValueError, match="do not fit the model"):
        circuits(model, tables | {"q_rows": np.zeros(heads + 1, np.uint32)})


@pytest.mark.parametrize("name", ["gptj", "gpt2"])
def test_an_mlp_beside_attention_reads_nothing_of_its_layer(zoo, name):
    """A plan in which the MLP reads a head of its own layer is refused where both read the layer's
    input, and fits where the MLP comes after attention.
    """
    model = zoo.engine(name)
    steps = ["steer->a1.h0<q>", "steer->m1", "m1->logits", "a1.h0->logits"]
    tables, _ = compiled(model.config, [steps])
    circuits(model, tables)
    # The MLP's input adds difference 0, steering: let it add the head's, number 1, instead.
    w = model.config.n_heads + 2 * model.config.n_kv_heads + 1
    at = tables["ref_first"][tables["entry_first"][w - 1]]
    assert tables["refs"][at] == 0
    changed = wrong(tables, "refs", at, 1)
    if model.config.parallel:
        with pytest.raises(ValueError, match=f"reference {at} of a plan reads difference 1 too"):
            circuits(model, changed)
    else:
        circuits(model, changed)


def test_masked_copies_of_a_parallel_layer_are_read_after_it(zoo):
    """The same for the copy of a head's difference that a patch at some tokens adds."""
    for name in ("gptj", "gpt2"):
        model = zoo.engine(name)
        graph = vs.patching.graph(model, 1)
        everything = np.ones((graph.n_upstream, graph.n_downstream), bool)
        everything[np.arange(graph.n_downstream)[None] < graph.start[:, None]] = False
        head = graph.node_names.index("a1.h0")
        patched = graph.input_names.index("a2.h0<v>")
        rows = [
            Rows(everything),
            Rows(everything, steered=False, patches=[(head, patched)]),
        ]
        made = compile_circuits(graph, rows, model.config, masked=True)
        tables = dict(zip(NAMES, made.arrays, strict=True))
        circuits(model, tables)
        copy = tables["refs"].max()  # the only masked copy has the last number
        at = tables["ref_first"][tables["entry_first"][graph.width - 1]]
        if model.config.parallel:
            with pytest.raises(ValueError, match="too early"):
                circuits(model, wrong(tables, "refs", at, copy))
        else:
            circuits(model, wrong(tables, "refs", at, copy))
