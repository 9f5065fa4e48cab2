"""EAP-IG scores, exact patches and their invariants against the float64 oracle
(oracle/attribution.py): every rule, metric, role and definition.

Bound: 1e-3 of the largest score of an array. Largest error met on lavapipe: 2.1e-6. Samples with a
top-1 margin below 1e-3 in one of their two runs are drawn again (see `clear_cases`).
"""

from __future__ import annotations

import numpy as np
import pytest

from attribution_setting import BOUND, check, setting  # noqa: F401
from oracle import attribution as oracle
from oracle.compare import assert_close, assert_same_bits
from oracle.separated import edge_names, node_names
from vksteer.patching import attribute, exact

KINDS = ["llama3", "gemma2", "qwen2", "qwen3"]

#: Every value of every option, and the combinations that share code. "gap" stands for a threshold
#: that the divergence at no position is close to.
OPTIONS = [
    dict(),
    dict(rule="left"),
    dict(rule="right", steps=3),
    dict(steps=1),
    dict(at="normed"),
    dict(clean="base"),
    dict(capped=False),
    dict(metric="directional_kl"),
    dict(
        metric="directional_kl", threshold="gap", at="normed", rule="right", clean="base", steps=4
    ),
    dict(metric="directional_kl", threshold="gap", capped=False, steps=4),
    dict(metric="kl"),
    dict(metric="kl", threshold="gap", clean="base", rule="left", steps=4),
    dict(metric="kl", capped=False, at="normed", clean="base", steps=4),
    # logit_diff ignores a threshold.
    dict(at="normed", capped=False, clean="base", rule="left", steps=4, threshold=1e9),
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()) or "default"
)
@pytest.mark.parametrize("name", KINDS)
def test_scores(setting, name, options):
    s = setting(name)
    if options.get("threshold") == "gap":
        options = {
            **options,
            "threshold": oracle.clear_threshold(s.cases, options.get("capped", True)),
        }
    got, want = s.both(**options)
    at = options.get("at", "pre_norm")
    assert list(got.edge_names) == edge_names(s.ref.facts, 1) and list(
        got.node_names
    ) == node_names(s.ref.facts, 1)
    check(f"{name} {options}", got, want, at)
    assert (
        float(want.edges[at].abs().max()) > 1e-3 and (want.edges[at] != 0).float().mean() > 0.5
    ), "a test of nothing"
    assert_close("dims of steer", got.dims, want.dims[:1], BOUND)
    assert np.asarray(got.dims).shape == (1, s.ref.facts.d_model)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("at", ["pre_norm", "normed"])
def test_dims_and_positions(setting, name, at):
    s = setting(name)
    got, want = s.both(dims="all", per_position=True, at=at, steps=4)
    check(name, got, want, at)
    assert_close("dims", got.dims, want.dims, BOUND)
    assert len(got.positions) == len(s.samples)
    for i, case in enumerate(s.cases):
        assert np.asarray(got.positions[i]).shape == (
            len(got.edge_names),
            len(case.tokens),
        ), "edges x the sample's own tokens"
        assert_close(f"positions of sample {i}", got.positions[i], want.positions[i][at], BOUND)
    share = np.array([c.metric("logit_diff").positions.__len__() for c in s.cases], float) / want.n
    together = sum(w * np.asarray(p, np.float64).sum(1) for w, p in zip(share, got.positions))
    assert_close("positions summed", together, got.edges, 1e-5)


@pytest.mark.parametrize(
    "name, layer, coefficient",
    [
        ("gemma2", 0, 1.0),
        ("gemma2", 3, -1.2),
        ("llama3", 0, -0.8),
        ("llama3", 3, 1.5),
        ("llama2", 1, 1.0),
        ("llama_bias", 1, 1.0),
        ("mistral", 1, -1.0),
        ("gemma3", 2, 1.0),
        ("qwen2_window", 0, 1.0),
    ],
)
def test_other_layers_signs_and_families(setting, name, layer, coefficient):
    s = setting(name, layer=layer, coefficient=coefficient)
    for options in (dict(steps=3), dict(steps=3, metric="directional_kl", at="normed")):
        got, want = s.both(**options)
        check(f"{name} layer {layer} {options}", got, want, options.get("at", "pre_norm"))


def test_one_token_responses_and_prompts(setting):
    s = setting("qwen3", sizes=((1, 1), (1, 6), (9, 1)))
    check("short", *s.both(steps=3), "pre_norm")
    for i in range(3):
        check(f"short, sample {i}", *s.both(i, steps=3), "pre_norm")


# -- what must be bit-identical --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma2", "llama3"])
def test_bits_do_not_depend_on_packing(setting, name):
    """A sample alone, among others, and in another order. Scores per position are compared, because
    those of several samples are combined afterwards.
    """
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
    twice = s.engine(**options)
    np.testing.assert_array_equal(together.edges, twice.edges)
    np.testing.assert_array_equal(together.nodes, twice.nodes)


def test_bits_do_not_depend_on_max_memory(zoo, rng):
    """From plenty of memory down to the least that is not refused, with samples of several position
    tiles.
    """
    import vksteer as vs

    model = zoo.engine("gemma2")
    draw = lambda n: rng.integers(0, model.config.d_vocab, n).tolist()
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model).astype(np.float32), 1)
    samples = [vs.patching.Sample(draw(p), draw(r)) for p, r in ((30, 70), (5, 8), (3, 60))]
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
    plenty, levels = run(1 << 29), 0
    refused, enough = 1, 1 << 29
    while enough - refused > 1 << 17:  # bisects to the least that is enough
        memory, message = (refused + enough) // 2, None
        try:
            less = run(memory)
        except ValueError as error:
            message = str(error)
        if message is not None:
            assert "max_memory" in message
            refused = memory
            continue
        enough, levels = memory, levels + 1
        for i in range(3):
            assert_same_bits(f"{memory} bytes, sample {i}", less.positions[i], plenty.positions[i])
        for what in ("edges", "nodes", "dims"):
            np.testing.assert_array_equal(getattr(less, what), getattr(plenty, what))
    assert levels >= 3


def test_an_interrupted_attribution_goes_on_from_its_checkpoint(zoo, rng, tmp_path, monkeypatch):
    """One group a sample: what is finished is not computed again, and the result is bit-identical;
    the checkpoint of other settings is refused and left as it was.
    """
    import vksteer as vs
    from vksteer.patching import attribution_layout

    monkeypatch.setattr(attribution_layout, "GROUP_TOKENS", 1)
    model, path = zoo.engine("gemma2"), tmp_path / "scores"
    draw = lambda n: rng.integers(0, model.config.d_vocab, n).tolist()
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model).astype(np.float32), 1)
    samples = [vs.patching.Sample(draw(p), draw(r)) for p, r in ((9, 20), (5, 8), (3, 26))]

    def run(**more):
        options = dict(steps=2, dims="all", per_position=True, progress=False) | more
        return attribute(model, samples, vector, 1.0, **options)

    def stop(done, total):
        if done > 2:  # in the second sample
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, progress=stop)
    reports = []
    monkeypatch.setattr(model, "name", "the same files by another path")
    resumed = run(checkpoint=path, progress=lambda done, total: reports.append((done, total)))
    assert reports[0] == (2, 6) and reports[-1] == (6, 6)
    whole, kept = run(), path.read_bytes()
    for got in (resumed, run(checkpoint=path)):
        for what in ("edges", "nodes", "dims"):
            np.testing.assert_array_equal(getattr(got, what), getattr(whole, what))
        for i in range(3):
            assert_same_bits(f"sample {i}", got.positions[i], whole.positions[i])
    with pytest.raises(ValueError, match="another attribution"):
        run(checkpoint=path, steps=3)
    assert path.read_bytes() == kept
    path.write_bytes(kept.replace(b"base64", b"base65", 1))
    with pytest.raises(ValueError, match="no checkpoint of an attribution"):
        run(checkpoint=path)


@pytest.mark.parametrize("metric", ["logit_diff", "directional_kl", "kl"])
@pytest.mark.parametrize("name", ["gemma2", "qwen3"])
def test_identical_runs_give_exact_zeros(setting, name, metric):
    """Without steering the two runs are the same: no sample has a metric position, and every score
    is 0.
    """
    s = setting(name)
    got = attribute(
        s.model, s.samples, s.vector, 0.0, metric=metric, steps=2, dims="all", progress=False
    )
    assert got.n_positions == 0
    assert not np.any(got.edges) and not np.any(got.nodes) and not np.any(got.dims)


@pytest.mark.parametrize("name", KINDS)
def test_completeness(setting, name):
    """With many steps, the score of the steering node is m(clean) - m(corrupt), averaged as the
    scores are. With 60 steps, the largest difference met is 6.5e-5 of the latter.
    """
    s = setting(name)
    for metric in ("logit_diff", "directional_kl", "kl"):
        got = s.engine(metric=metric, steps=60)
        found = [
            oracle.score(s.ref, c.sample, s.vector, s.coefficient, metric=metric, steps=1, case=c)
            for c in s.cases
        ]
        want = sum(f.n * f.difference for f in found) / sum(f.n for f in found)
        assert abs(got.nodes[0] - want) < 2e-3 * abs(want), (
            f"{metric}: {got.nodes[0]} against {want}"
        )


def test_samples_without_metric_positions_are_left_out(setting):
    s = setting("llama3")
    counts = [len(c.candidates()) for c in s.cases]
    largest = [float(c.divergence().max()) for c in s.cases]
    order = np.argsort(largest)
    threshold = (largest[order[0]] + largest[order[1]]) / 2  # one sample never exceeds it
    assert largest[order[1]] > 1.01 * largest[order[0]]
    got, want = s.both(metric="directional_kl", threshold=threshold, steps=2)
    assert 0 < want.n < sum(counts)
    check("one left out", got, want, "pre_norm")
    without = s.engine(
        [i for i in range(3) if i != order[0]],
        metric="directional_kl",
        threshold=threshold,
        steps=2,
    )
    np.testing.assert_array_equal(without.edges, got.edges)


# -- exact patches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "clean, metric, capped",
    [("steered", "logit_diff", True), ("base", "directional_kl", True), ("base", "kl", False)],
)
def test_exact_patches(setting, rng, name, clean, metric, capped):
    """Edges of every kind and all nodes; at all positions, the last of the prompt, and lists."""
    s = setting(name)
    names = edge_names(s.ref.facts, 1)
    edges = sorted(rng.choice(names, 24, replace=False).tolist()) + [
        "steer->logits",
        "steer->a1.h0<k>",
        names[-1],
    ]
    options = dict(clean=clean, metric=metric, capped=capped)
    largest = 0.0
    for positions in (None, [-1], [0, 3, -2], slice(-1, None)):
        for case, sample in zip(s.cases, s.samples):
            for what in (dict(edges=edges), dict(nodes=node_names(s.ref.facts, 1))):
                want = oracle.exact(
                    s.ref,
                    case.sample,
                    s.vector,
                    s.coefficient,
                    positions=positions,
                    case=case,
                    **what,
                    **options,
                )
                got = exact(
                    s.model, sample, s.vector, s.coefficient, positions=positions, **what, **options
                )
                assert np.issubdtype(np.asarray(got).dtype, np.floating)
                error = np.abs(np.asarray(got, np.float64) - want.numpy()).max()
                scale = max(
                    float(want.abs().max()),
                    abs(
                        float(
                            oracle.score(
                                s.ref,
                                case.sample,
                                s.vector,
                                s.coefficient,
                                case=case,
                                steps=1,
                                **options,
                            ).difference
                        )
                    ),
                )
                assert error <= BOUND * scale, (
                    f"{name} {options} {positions} {list(what)}: error {error:.3g} of {scale:.3g}"
                )
                largest = max(largest, float(want.abs().max()))
    assert largest > 0.1


# -- refused before any work -----------------------------------------------------------------------


def test_refusals(setting):
    import vksteer as vs

    s = setting("qwen2")
    D = s.ref.facts.d_model
    nan = np.ones(D, np.float32)
    nan[3] = np.nan
    run = lambda samples=s.samples, vector=s.vector, **options: attribute(
        s.model, samples, vector, 1.0, progress=False, **options
    )
    for wrong in (
        dict(rule="simpson"),
        dict(metric="accuracy"),
        dict(at="after"),
        dict(clean="corrupt"),
        dict(steps=0),
        dict(dims="some"),
        dict(threshold=float("nan")),
        dict(max_memory=1),
        dict(samples=[]),
        dict(vector=vs.SteeringVector(np.ones(D + 1, np.float32), 1)),
        dict(vector=vs.SteeringVector(np.ones(D, np.float32), s.ref.facts.n_layers)),
    ):
        with pytest.raises(ValueError):
            run(**wrong)
    with pytest.raises(ValueError):
        run(vector=vs.SteeringVector(nan, 1))
    with pytest.raises(ValueError):
        run(samples=[vs.patching.Sample([1, 2], [3] * 600)])  # longer than the context
    with pytest.raises(ValueError):
        vs.patching.Sample([1, 2], [])


def test_refusals_of_exact(setting):
    s = setting("qwen2")
    with pytest.raises((KeyError, ValueError)):
        exact(s.model, s.samples[0], s.vector, 1.0, edges=["a9.h0->logits"])
    with pytest.raises((KeyError, ValueError)):
        exact(s.model, s.samples[0], s.vector, 1.0, nodes=["m0"])  # below the steering layer
    with pytest.raises((TypeError, ValueError)):
        exact(s.model, s.samples[0], s.vector, 1.0)
