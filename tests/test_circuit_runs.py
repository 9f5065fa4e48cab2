"""The model under circuits against the float64 oracle (tests/oracle/circuits.py): every metric,
ragged samples, bits that do not depend on how rows are packed.
"""

from __future__ import annotations

import numpy as np
import pytest

import vksteer as vs
from circuit_setting import Setting, check_metrics, same
from oracle import circuits as oc
from vksteer.circuits import runs as circuit_runs
from vksteer.circuits.circuit import Circuit

#: In llama_yarn, d_head is a multiple of 16; the other sizes are awkward.
KINDS = ["llama3", "gemma2", "qwen2", "qwen3", "llama_yarn", "llama_bias", "gemma3", "mistral"]


@pytest.fixture
def setting(zoo, rng):
    return lambda name="llama3", **options: Setting(zoo, name, rng, **options)


@pytest.mark.parametrize("name", KINDS)
def test_every_metric_is_the_oracles(setting, name):
    check_metrics(setting(name))


@pytest.mark.parametrize(
    "options", [dict(capped=False), dict(threshold=0.5)], ids=["uncapped", "threshold"]
)
def test_options_are_the_oracles(setting, options):
    s = setting("gemma2", coefficient=-1.5)
    for got, want in zip(s.evaluate(**options), s.oracle(**options), strict=True):
        for metric in set(oc.METRICS) - {"match"}:
            assert abs(got[metric].faithfulness - want[metric].faithfulness) <= 2e-3 * max(
                1.0, abs(want[metric].faithfulness)
            ), metric


@pytest.mark.parametrize("layer", [0, 2])
def test_first_and_last_layer(setting, layer):
    s = setting("qwen3", layer=layer)
    for got, want in zip(s.evaluate(), s.oracle(), strict=True):
        assert abs(got["logit_diff"].faithfulness - want["logit_diff"].faithfulness) <= 2e-3


@pytest.mark.parametrize("name", ["llama3", "gemma2", "llama_yarn"])
def test_alone_is_batched_and_memory_changes_no_bit(setting, name, monkeypatch):
    s = setting(name)
    want = s.evaluate()
    for i, circuit in enumerate(s.circuits):
        same(s.evaluate([circuit])[0], want[i])
    monkeypatch.setattr(circuit_runs, "CHUNK_TOKENS", 16)  # rows cut into chunks with caches
    for got, whole in zip(s.evaluate(), want, strict=True):
        same(got, whole)
    monkeypatch.setattr(circuit_runs, "CHUNK_TOKENS", 40)
    for got, whole in zip(s.evaluate([*s.circuits[::-1]]), want[::-1], strict=True):
        same(got, whole)
    alone = [
        vs.circuits.evaluate(
            [s.circuits[3]], s.model, [x], s.vector, s.coefficient, oc.METRICS, progress=False
        )[0]
        for x in s.samples
    ]
    for i, result in enumerate(alone):
        for metric in oc.METRICS:
            assert result[metric].per_sample["value"][0] == want[3][metric].per_sample["value"][i]


def test_max_memory(setting, monkeypatch):
    s = setting()
    want = s.evaluate()
    with pytest.raises(ValueError, match=r"max_memory=1000000 is too small: .* needs") as caught:
        s.evaluate(max_memory=1_000_000)
    needed = int(str(caught.value).split("needs ")[1].split(" bytes")[0])
    alone = []
    fit = circuit_runs.Passes.fit
    monkeypatch.setattr(
        circuit_runs.Passes, "fit", lambda *args: alone.append(fit(*args)[2]) or fit(*args)
    )
    for got, whole in zip(s.evaluate(max_memory=needed), want, strict=True):
        same(got, whole)
    assert alone.count(1) > 2  # circuits went one by one


def test_the_ends_are_the_runs_themselves(setting):
    """No edge gives the base run, all edges the steered run, and an edge that leads nowhere the
    base run, bit-identical.
    """
    s = setting("gemma2")
    nowhere = Circuit(s.graph, s.graph.find([f"m{s.layer}->a{s.layer + 1}.h0<q>"]))
    for result, end in zip(
        s.evaluate([Circuit(s.graph), Circuit(s.graph, np.arange(s.graph.n_edges)), nowhere]),
        ("empty", "full", "empty"),
        strict=True,
    ):
        for metric in oc.METRICS:
            assert np.array_equal(
                result[metric].per_sample["value"], result[metric].per_sample[end]
            )


def test_roles(setting):
    s = setting()
    a, b = s.evaluate(), s.evaluate(clean="base")
    for x, y in zip(a, b):
        for metric in ("logit_diff", "directional_kl", "logprob"):
            assert x[metric].faithfulness == pytest.approx(y[metric].faithfulness, abs=1e-9)
        assert y["kl"].empty == pytest.approx(0, abs=1e-6) and x["kl"].full == pytest.approx(
            0, abs=1e-6
        )


def test_a_single_edge_counts(setting):
    """The edge from steer to logits alone changes the logits, and all others without it do not give
    the steered run.
    """
    s = setting("qwen2")
    edges = np.delete(np.arange(s.graph.n_edges), s.graph.find(["steer->logits"]))
    whole, without = s.evaluate(
        [Circuit(s.graph, np.arange(s.graph.n_edges)), Circuit(s.graph, edges)]
    )
    straight = Circuit(s.graph, ["steer->logits"])
    assert (
        without["logit_diff"].value != whole["logit_diff"].value
        and s.evaluate([straight])[0]["logit_diff"].value != whole["logit_diff"].empty
    )


def test_wrong_arguments_before_any_work(setting):
    s = setting()
    other = Circuit(vs.patching.graph(s.model, 2), [0])
    args = s.model, s.samples, s.vector, 1.0
    for call, message in [
        (lambda: vs.circuits.evaluate([other], *args), "another graph"),
        (lambda: vs.circuits.evaluate(s.circuits, *args, ("nonsense",)), "metric 'nonsense'"),
        (lambda: vs.circuits.evaluate(s.circuits, s.model, [], s.vector, 1.0), "samples is empty"),
        (lambda: vs.circuits.evaluate(s.circuits, *args[:3], float("nan")), "coefficient"),
        (lambda: vs.circuits.evaluate(s.circuits, *args, clean="both"), "clean"),
        (lambda: vs.circuits.evaluate(s.circuits, *args, threshold=-1), "threshold"),
        (
            lambda: vs.circuits.evaluate(
                s.circuits, s.model, [vs.patching.Sample([1] * 500, [2] * 20)], s.vector, 1.0
            ),
            "context",
        ),
        (lambda: vs.SteeringVector(np.full(s.model.config.d_model, np.nan), 1), "finite"),
        (lambda: vs.patching.Sample([1], []), "empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_interrupt_and_progress(setting):
    s = setting()
    seen = []
    s_all = s.circuits[1:-1]
    vs.circuits.evaluate(
        s_all,
        *(s.model, s.samples, s.vector, 1.0),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] == len(s.samples) * (1 + len(s_all)) and seen == sorted(seen)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        vs.circuits.evaluate(s_all, s.model, s.samples, s.vector, 1.0, progress=stop)
    same(s.evaluate()[2], s.evaluate()[2])


# -- decoding --------------------------------------------------------------------------------------


def test_decoding_alone_batched_and_at_the_ends(setting):
    """Rows alone and together give the same tokens; all edges give plain steering, no edge the base
    run; an edit below the steering layer acts in both runs.
    """
    s = setting("gemma2")
    prompts = [list(x.prompt_tokens) for x in s.samples]
    steer = (vs.Steer(s.vector, 1.0),)
    make = lambda rows, circuit=None, edits=steer: [
        g.tokens.tolist()
        for g in s.model.generate(
            rows,
            max_new_tokens=12,
            edits=list(edits),
            circuit=circuit,
            ignore_eos=True,
            progress=False,
        )
    ]
    circuit = s.circuits[3]
    together = make(prompts, circuit)
    assert together == [make([p], circuit)[0] for p in prompts]
    assert make(prompts, Circuit(s.graph, np.arange(s.graph.n_edges))) == make(prompts) and make(
        prompts, Circuit(s.graph)
    ) == make(prompts, edits=())
    mixed = s.model.generate(
        prompts,
        max_new_tokens=12,
        circuit=circuit,
        ignore_eos=True,
        progress=False,
        edits=[[vs.Steer(s.vector, c)] for c in (1.0, -1.0, 1.0)],
    )
    assert [g.tokens.tolist() for g in mixed][::2] == together[::2]
    below = vs.Add("blocks.0.hook_resid_post", 0.3)
    assert make(prompts, Circuit(s.graph), (below, vs.Steer(s.vector, 1.0))) == make(
        prompts, edits=(below,)
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(edits=[]), "exactly one"),
        (dict(freeze="qk"), "freeze"),
        (dict(capture=["hook_embed"]), "captures"),
        (dict(circuit=[1]), "must be a Circuit"),
        (dict(edits="twice"), "exactly one"),
        (dict(edits="positions"), "every position"),
        (dict(edits="above"), "below the steering layer"),
    ],
)
def test_decoding_refuses(setting, wrong, message):
    s = setting()
    steer = vs.Steer(s.vector, 1.0)
    lists = {
        "twice": [steer, steer],
        "positions": [vs.Steer(s.vector, 1.0, positions=[0])],
        "above": [steer, vs.Scale("blocks.2.hook_mlp_out", 0.0)],
    }
    arguments = dict(edits=[steer], circuit=s.circuits[2]) | wrong
    if isinstance(arguments["edits"], str):
        arguments["edits"] = lists[arguments["edits"]]
    with pytest.raises(ValueError, match=message):
        s.model.generate([[1, 2, 3]], max_new_tokens=2, progress=False, **arguments)


# -- exact patches ---------------------------------------------------------------------------------


def test_exact_patches_do_not_depend_on_packing(setting):
    s = setting("gemma2")
    args = s.model, s.samples[2], s.vector, 1.0
    edges = list(s.graph.edge_names[:40:3])
    for positions in (None, "response"):
        want = vs.patching.exact(*args, edges=edges, positions=positions)
        assert np.array_equal(
            want,
            np.concatenate(
                [vs.patching.exact(*args, edges=[e], positions=positions) for e in edges]
            ),
        )
        assert np.array_equal(
            want, vs.patching.exact(*args, edges=s.graph.find(edges), positions=positions)
        )
    # The patch of node steer at all positions gives the steered run.
    everything = vs.patching.exact(*args, nodes=["steer"])
    full = vs.circuits.evaluate(
        [Circuit(s.graph)], s.model, [s.samples[2]], s.vector, 1.0, progress=False
    )[0]["logit_diff"]
    assert everything[0] == pytest.approx(full.full - full.empty, rel=1e-4)
    with pytest.raises(KeyError, match="no node 'm0'"):
        vs.patching.exact(*args, nodes=["m0"])
    with pytest.raises(ValueError, match="either"):
        vs.patching.exact(*args)
    with pytest.raises(ValueError, match="max_memory"):
        vs.patching.exact(*args, edges=edges, max_memory=1000)
