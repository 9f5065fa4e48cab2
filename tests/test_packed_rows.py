"""PackedRows: what the engine takes gives the logits of `run`; what does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest

from oracle.compare import assert_same_bits
from vksteer import _engine
from vksteer.runtime.batch import packed_rows

PROMPTS = [[1, 2, 3], [4, 5]]


@pytest.fixture
def model(zoo):
    return zoo.engine("llama2")


def words(*values):
    return np.array(values, np.uint32)


def ints(*values):
    return np.array(values, np.int32)


def fields(**changes):
    """Two rows of three and two tokens, right-aligned in three output columns."""
    return {
        "tokens": words(1, 2, 3, 4, 5),
        "n_tokens": words(3, 2),
        "start": words(0, 0),
        "slot": words(0, 3),
        "group": words(0, 1),
        "edit_row": words(0, 1),
        "out_row": ints(0, 1),
        "column": ints(0, 1),
        "key_column": ints(0, 1),
        "n_out_rows": 2,
        "n_columns": 3,
        "n_keys": 3,
    } | changes


def last_logits(model, rows):
    cache = _engine.Cache(model._engine, 5)
    return model._engine.forward(cache, rows, [], 1)[0]


def test_rows_give_the_logits_of_run(model):
    want = model.run(PROMPTS, logits="last").logits
    assert_same_bits("named fields", last_logits(model, _engine.PackedRows(**fields())), want)
    rows = packed_rows(PROMPTS, out_row=[0, 1], column=[0, 1], n_out_rows=2, n_columns=3, n_keys=3)
    assert_same_bits("packed_rows", last_logits(model, rows), want)
    assert_same_bits("used twice", last_logits(model, rows), want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens is missing"),
        ({"column": None}, "column is missing"),
        ({"slot": ints(0, 3)}, "slot must be a C-contiguous NumPy array"),
        ({"start": np.zeros((2, 2), np.uint32)[:, 0]}, "start must be a C-contiguous"),
        ({"inputs": np.zeros(4)}, "inputs must be a C-contiguous"),
        ({"edits": 3}, "edits must be Edits or None"),
    ],
)
def test_wrong_types_are_refused_at_once(changes, message):
    with pytest.raises(TypeError, match=message):
        _engine.PackedRows(**fields(**changes))
    with pytest.raises(TypeError):
        _engine.PackedRows(words(1))  # fields have names only


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"start": words(0)}, ValueError, "start has 1 items, not 2"),
        ({"key_column": ints(0, 1, 2)}, ValueError, "key_column has 3 items, not 2"),
        ({"n_tokens": words(3, 0)}, ValueError, "row 1 has no tokens"),
        ({"n_tokens": words(3, 3)}, ValueError, "do not fit together"),
        ({"n_tokens": words()}, ValueError, "a batch of 0 rows"),
        ({"out_row": ints(0, 2)}, ValueError, "row 1 does not fit the output"),
        ({"column": ints(-1, 1)}, ValueError, "row 0 does not fit the output"),
        ({"n_keys": 2}, ValueError, "row 0 does not fit the output"),
        ({"inputs": np.zeros(7, np.float32)}, ValueError, "inputs has 7 items"),
        ({"frozen": np.ones(1, np.uint8)}, TypeError, "need q_row, v_row and mlp_row"),
        ({"tokens": words(1, 2, 3, 4, 10**6)}, ValueError, "not in the vocabulary"),
        ({"slot": words(0, 4)}, ValueError, "row 1 needs 2 cache slots, there are 1"),
    ],
)
def test_wrong_values_are_refused_by_the_call(model, changes, error, message):
    rows = _engine.PackedRows(**fields(**changes))
    with pytest.raises(error, match=message):
        last_logits(model, rows)
    assert np.isfinite(last_logits(model, _engine.PackedRows(**fields()))).all()


def test_calls_take_their_own_kinds_only(model):
    rows, cache = _engine.PackedRows(**fields()), _engine.Cache(model._engine, 5)
    with pytest.raises(TypeError, match="rows must be PackedRows"):
        model._engine.forward(cache, fields(), [], 1)
    with pytest.raises(TypeError, match="cache must be a Cache of this model"):
        model._engine.forward(rows, rows, [], 1)


def test_a_backward_pass_needs_all_layers(model):
    tape, cache = _engine.Tape(model._engine, 8, 0), _engine.Cache(model._engine, 5)
    metric = (0, True, words(2), words(1), words(2), np.ones(1, np.float32), None, None, None)
    rows = _engine.PackedRows(**fields(stop_layer=1))
    with pytest.raises(ValueError, match="a backward pass needs all layers"):
        tape.differentiate(cache, rows, [], metric, 0)
