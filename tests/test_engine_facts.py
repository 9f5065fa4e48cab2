"""The engine checks the facts that it gets, whatever the readers of configs let through."""

from __future__ import annotations

import pytest

from vksteer.errors import ModelError
from vksteer.runtime.device import _engine, open_device
from vksteer.runtime.weights import _facts


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama2", {"d_head": 4}, "d_rot = 6 is outside 0 to 4"),
        ("llama2", {"d_head": 7}, "odd"),
        ("smollm3", {"rope_table": [0, 1, 0, 0]}, "layer 1 uses rotation table 1 of 1"),
        ("ministral3", {"query_length": 0}, "query_length"),
        ("ministral3", {"rope_table": [0, -1, 0]}, "layer 1 rotates nothing"),
        ("granite", {"unembed_bias": 1}, "a bias of logits"),
        ("granite", {"residual_scale": 0.0}, "residual_scale is 0"),
        ("granite", {"residual_scale": float("nan")}, "not finite"),
        ("olmo", {"clip_qkv": float("inf")}, "not finite"),
        ("olmo2", {"parallel": 1}, "norms that no model has"),
        ("llama2", {"norm_bias": 1}, "norms that no model has"),
        ("olmo2", {"qk_norm_bias": 1}, "norms that no model has"),
    ],
)
def test_facts_that_no_model_has_are_refused(zoo, name, change, message):
    device, _ = open_device(None)
    facts = _facts(zoo.engine(name).config, 0)
    _engine().Model(device, facts)
    with pytest.raises((ModelError, ValueError, RuntimeError), match=message):
        _engine().Model(device, facts | change)
