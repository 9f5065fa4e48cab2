"""The model under circuits for families with other layers than Llama's, against the float64 oracle:
metrics, decoding, exact patches; the ends; bits that do not depend on how rows are packed.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import vksteer as vs
from circuit_setting import Setting, check_metrics, same
from oracle import attribution as oracle
from oracle import circuits as oc
from oracle.more_families import MORE_FAMILIES
from oracle.separated import Separated, edge_names, node_names
from vksteer.circuits import runs as circuit_runs
from vksteer.circuits.circuit import Circuit
from vksteer.circuits.final_rows import final_rows
from vksteer.circuits.plan import Rows, kept_matrix
from vksteer.circuits.readings import Reader, measure_ends

#: One of each kind of layer: LayerNorm with learned positions, in parallel with a bias of the
#: unembedding, with a norm of every head; norms over all heads after attention and MLP only; norms
#: before and after; a norm of each head and none before; multipliers; layers without rotation; a
#: factor on queries.
KINDS = ["gpt2", "phi", "phi_norm", "olmo2", "glm4", "exaone4", "granite", "smollm3", "ministral3"]
#: (prompt, response) lengths: of phi3_long both sides of 40 tokens, where its rotation changes.
SIZES = {"phi3_long": ((7, 9), (30, 21), (4, 1))}
#: A token of the engine may be another than the oracle's where the two are this close.
TIE = 1e-3


@pytest.fixture
def setting(zoo, rng):
    def make(name, layer=None, **options):
        if name in SIZES:
            options.setdefault("sizes", SIZES[name])
        last_but_one = zoo.engine(name).config.n_layers - 2
        return Setting(zoo, name, rng, last_but_one if layer is None else layer, **options)

    return make


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_every_metric_is_the_oracles(setting, name):
    check_metrics(setting(name))


@pytest.mark.parametrize("name", KINDS)
def test_first_and_last_layer(zoo, setting, name):
    for layer in (0, zoo.engine(name).config.n_layers - 1):
        check_metrics(setting(name, layer))


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_all_edges_carry_what_steering_does(setting, name):
    """The run of all edges, which evaluate takes from the steered run itself, comes out of the
    circuits' own pass, too; circuits without an edge or with a complete one are the runs' bits.
    """
    s = setting(name)
    graph, samples = s.graph, s.samples
    everything = Circuit(graph, np.arange(graph.n_edges))
    softcap = s.model.config.final_softcap
    finals = final_rows(s.model, samples, s.vector, s.coefficient)
    readers = [Reader(f, oc.METRICS, "steered", 0.0) for f in finals]
    ends = measure_ends(s.model, readers, oc.METRICS, softcap)
    jobs = [
        circuit_runs.sample_job(s.model, x, r, s.layer)
        for x, r in zip(samples, readers, strict=True)
    ]
    steer = np.float32(s.coefficient) * s.vector.direction
    passes = circuit_runs.Passes(s.model, graph, steer, None)
    rows = [Rows(kept_matrix(graph, everything.edges))]
    (found,) = passes.run(rows, jobs, softcap, oc.METRICS, lambda n: None)
    largest = max(np.abs(pairs).max() for pairs, _ in ends)
    for (pairs, distributions), (end_pairs, end_distributions) in zip(found, ends, strict=True):
        # in units of the largest logit; met on lavapipe: 3.9e-7
        assert np.abs(pairs - end_pairs[0]).max() <= 2e-5 * largest
        assert np.abs(distributions - end_distributions[0])[:, :3].max() <= 2e-5 * largest
    whole, nothing = s.evaluate([everything, Circuit(graph)])
    for result, end in ((whole, "full"), (nothing, "empty")):
        for metric in oc.METRICS:
            per = result[metric].per_sample
            assert np.array_equal(per["value"], per[end])


@pytest.mark.parametrize("name", [*KINDS, "phi3_long", "olmo"])
def test_packing_and_memory_change_no_bit(setting, name, monkeypatch):
    s = setting(name)
    want = s.evaluate()
    for i in (1, 3):
        same(s.evaluate([s.circuits[i]])[0], want[i])
    for chunk in (16, 40):
        monkeypatch.setattr(circuit_runs, "CHUNK_TOKENS", chunk)
        for got, whole in zip(s.evaluate([*s.circuits[::-1]]), want[::-1], strict=True):
            same(got, whole)


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_decoding_is_the_oracles(setting, name):
    """With a cache, token for token against the oracle, which has none; all edges are plain
    steering, no edge the base run.
    """
    s = setting(name, sizes=((7, 9), (4, 3)))
    prompts = [list(x.prompt_tokens) for x in s.samples]
    options = dict(max_new_tokens=8, ignore_eos=True, progress=False)
    steer = [vs.Steer(s.vector, s.coefficient)]
    tokens = lambda circuit=None, edits=steer: [
        g.tokens.tolist()
        for g in s.model.generate(prompts, circuit=circuit, edits=edits, **options)
    ]
    for circuit in s.circuits[2:4]:
        for prompt, new in zip(prompts, tokens(circuit), strict=True):
            net = Separated(s.ref, prompt + new, s.exact, s.layer)
            runs = oc.run(net, net.run([0.0]), s.coefficient, [set(circuit.edge_names)])
            for step, (logits, token) in enumerate(
                zip(runs.logits[0, len(prompt) - 1 : -1], new, strict=True)
            ):
                best = int(logits.argmax())
                margin = float(logits[best] - logits[token])
                assert margin < TIE, f"{len(circuit)} edges, step {step}: {token}, not {best}"
                if token != best:
                    warnings.warn(f"{name}, step {step}: a near tie", stacklevel=2)
    assert tokens(Circuit(s.graph, np.arange(s.graph.n_edges))) == tokens()
    assert tokens(Circuit(s.graph)) == tokens(edits=[])


@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_exact_patches_are_the_oracles(setting, rng, name):
    """Edges of every kind and all nodes, at all positions and at a few."""
    s = setting(name)
    facts, sample = s.ref.facts, s.samples[0]
    names = edge_names(facts, s.layer)
    edges = sorted(rng.choice(names, 20, replace=False).tolist()) + ["steer->logits", names[-1]]
    for positions in (None, [0, 3, -2]):
        for what in (dict(edges=edges), dict(nodes=node_names(facts, s.layer))):
            options = dict(positions=positions, **what)
            got = vs.patching.exact(s.model, sample, s.vector, s.coefficient, **options)
            want = oracle.exact(s.ref, sample, s.exact, s.coefficient, **options)
            error = np.abs(got - want.numpy()).max() / max(np.abs(want.numpy()).max(), 1e-2)
            assert error <= 1e-4, f"{what}: {error:.1e}"  # largest met on lavapipe: 1.7e-6


def test_decoding_beyond_the_switch_of_longrope(setting):
    """A text that grows beyond 40 tokens has all of its tokens rotated by the other table from then
    on, in the base run and in the circuit's.
    """
    s = setting("phi3_long", sizes=((37, 4), (12, 3)))
    circuit, prompts = s.circuits[3], [list(x.prompt_tokens) for x in s.samples]
    options = dict(max_new_tokens=8, ignore_eos=True, progress=False)
    options["edits"] = [vs.Steer(s.vector, s.coefficient)]
    generated = s.model.generate(prompts, circuit=circuit, **options)
    for prompt, new in zip(prompts, (g.tokens.tolist() for g in generated), strict=True):
        for step, token in enumerate(new):
            net = Separated(s.ref, prompt + new[:step], s.exact, s.layer)
            runs = oc.run(net, net.run([0.0]), s.coefficient, [set(circuit.edge_names)])
            logits = runs.logits[0, -1]
            margin = float(logits.max() - logits[token])
            assert margin < TIE, f"{len(prompt)} tokens, step {step}: {token} by {margin:.3g}"
    everything = Circuit(s.graph, np.arange(s.graph.n_edges))
    plain = s.model.generate(prompts, **options)
    for a, b in zip(s.model.generate(prompts, circuit=everything, **options), plain, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
