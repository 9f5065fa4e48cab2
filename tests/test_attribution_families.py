"""EAP-IG scores of every family with layers unlike Llama's, against the float64 oracle
(oracle/attribution.py), and their invariants: LayerNorm with and without bias, parallel layers,
norms after attention and MLP only, plain MLPs, multipliers, clipping, norms of queries and keys,
rotations of every kind. test_more_families.py has other metrics, exact patches and circuits.

Bound: 1e-3 of the largest score of an array (attribution_setting.py). Largest errors met on
lavapipe, relative to the largest score: edges 5e-7, nodes 2e-7, dimensions 4e-7, edges at every
position 1.1e-5 (exaone4).
"""

from __future__ import annotations

import numpy as np
import pytest

from attribution_setting import BOUND, check, setting  # noqa: F401
from oracle import attribution as oracle
from oracle.compare import assert_close, assert_same_bits
from oracle.more_families import MORE_FAMILIES
from oracle.separated import node_names
from vksteer.patching import attribute, exact
from vksteer.patching.attribution_runs import AttributionRuns
from vksteer.runtime.gradients import PAIR, RowMetric

NAMES = sorted(MORE_FAMILIES)


@pytest.mark.parametrize("at", ["pre_norm", "normed"])
@pytest.mark.parametrize("name", NAMES)
def test_first_and_last_layer(setting, name, at):
    """Every position and all dimensions; a logit difference from the first layer on, a metric of
    whole distributions in the last.
    """
    last = setting(name).ref.facts.n_layers - 1
    for layer, options in (
        (0, dict(coefficient=1.0)),
        (last, dict(coefficient=-0.8, metric="kl", clean="base", rule="right")),
    ):
        s = setting(name, layer=layer, coefficient=options.pop("coefficient"))
        got, want = s.both(dims="all", per_position=True, at=at, steps=3, **options)
        check(f"{name} layer {layer} {at}", got, want, at)
        assert_close("dims", got.dims, want.dims, BOUND)
        for i in range(len(s.cases)):
            assert_close(f"sample {i}", got.positions[i], want.positions[i][at], BOUND)


def test_texts_longer_than_the_switch_of_longrope(setting):
    """Short and long texts in one batch, each with its own rotation tables."""
    s = setting("phi3_long", sizes=((30, 20), (7, 9), (33, 7), (34, 7), (12, 30)))
    switch = s.ref.facts.rope_switch
    assert {len(c.tokens) > switch for c in s.cases} == {True, False} and len(
        s.cases[2].tokens
    ) == 40
    got, want = s.both(steps=3, per_position=True)
    check("long and short texts", got, want, "pre_norm")
    for i in range(len(s.cases)):
        assert_close(f"sample {i}", got.positions[i], want.positions[i]["pre_norm"], BOUND)
        alone = s.engine([i], steps=3, per_position=True)
        assert_same_bits(f"sample {i} alone", alone.positions[0], got.positions[i])


def test_a_long_text_whose_metric_is_read_early(setting):
    """What lies after the last metric position is not run, but its length counts."""
    s = setting("phi3_long", sizes=((12, 30),))
    switch, case = s.ref.facts.rope_switch, s.cases[0]
    threshold = 1.001 * float(case.divergence()[switch - case.candidates()[0] :].max())
    assert case.positions("directional_kl", threshold)[-1] < switch < len(case.tokens)
    nodes = node_names(s.ref.facts, 1)
    options = dict(nodes=nodes, metric="directional_kl", threshold=threshold)
    want = oracle.exact(s.ref, case.sample, s.vector, s.coefficient, case=case, **options)
    got = exact(s.model, s.samples[0], s.vector, s.coefficient, **options)
    assert_close("exact patches", got, want, BOUND)


@pytest.mark.parametrize("name", NAMES)
def test_completeness(setting, name):
    """With many steps, the score of the steering node is m(clean) - m(corrupt)."""
    s = setting(name)
    got = s.engine(steps=60)
    score = lambda case: oracle.score(
        s.ref, case.sample, s.vector, s.coefficient, steps=1, case=case
    )
    found = [score(case) for case in s.cases]
    want = sum(f.n * f.difference for f in found) / sum(f.n for f in found)
    assert abs(got.nodes[0] - want) < 2e-3 * abs(want)


@pytest.mark.parametrize("name", NAMES)
def test_identical_runs_give_exact_zeros(setting, name, monkeypatch):
    """The difference of two logits whose gradient is not 0 is read at every position, of two runs
    that lie side by side in a batch.
    """
    s = setting(name)

    def read(self, first, top, kl, normed):
        n = len(top)
        tokens = [np.full(n, token, np.uint32) for token in (1, 2)]
        return RowMetric(PAIR, first + np.arange(n), np.full(n, 1 / n, np.float32), *tokens)

    monkeypatch.setattr(AttributionRuns, "metric_of", read)
    for at in ("pre_norm", "normed"):
        run = lambda coefficient: attribute(
            s.model, s.samples, s.vector, coefficient, at=at, steps=2, dims="all", progress=False
        )
        other, got = run(1.0), run(0.0)
        assert np.count_nonzero(other.edges) > 0.5 * other.edges.size and other.dims.all(0).any()
        assert not np.any(got.edges) and not np.any(got.nodes) and not np.any(got.dims)


@pytest.mark.parametrize("name", NAMES)
def test_bits_do_not_depend_on_packing(setting, name):
    """A sample alone, and in another order."""
    s = setting(name)
    options = dict(steps=3, per_position=True)
    together = s.engine(**options)
    turned = s.engine([2, 0, 1], **options)
    for i in range(3):
        alone = s.engine([i], **options)
        assert_same_bits(f"sample {i} alone", alone.positions[0], together.positions[i])
        assert_same_bits(
            f"sample {i} in another order",
            turned.positions[[2, 0, 1].index(i)],
            together.positions[i],
        )


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_neox", "olmo", "olmo2", "phi_norm", "cohere_norm", "ministral3"]
)
def test_bits_do_not_depend_on_max_memory(zoo, rng, name):
    """With all activations kept, with one layer's, and in parts of a sample."""
    import vksteer as vs
    from vksteer.patching.attribution_layout import layout

    model = zoo.engine(name)
    draw = lambda n: rng.integers(0, model.config.d_vocab, n).tolist()
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model).astype(np.float32), 1)
    samples = [vs.patching.Sample(draw(p), draw(r)) for p, r in ((30, 70), (5, 8), (3, 60))]
    lengths = [len(x) for x in samples]
    run = lambda memory: attribute(
        model,
        samples,
        vector,
        1.0,
        steps=2,
        per_position=True,
        dims="all",
        max_memory=memory,
        progress=False,
    )
    plan = lambda memory: layout(model, 1, lengths, 2, False, False, memory)
    plenty, least = run(1 << 29), None
    limits, memory = {plan(1 << 29): 1 << 29}, (1 << 29) - 1
    while True:
        try:
            memory = plan(memory).bytes
        except ValueError:
            break
        limits[plan(memory)] = least = memory
        memory -= 1
    assert {p.keep_inside for p in limits} == {True, False} and len(limits) >= 4
    assert any(p.n_sample_tokens < max(lengths) for p in limits)
    for memory in limits.values():
        less = run(memory)
        for i in range(3):
            assert_same_bits(f"{memory} bytes, sample {i}", less.positions[i], plenty.positions[i])
        for what in ("edges", "nodes", "dims"):
            np.testing.assert_array_equal(getattr(less, what), getattr(plenty, what))
    with pytest.raises(ValueError, match="max_memory"):
        run(least - 1)
