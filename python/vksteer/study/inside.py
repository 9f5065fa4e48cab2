"""Steps of a study that look inside: through which edges, heads and dimensions the vector acts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from .. import circuits, ov, patching, sparsify
from ..circuits.circuit import Circuit
from ..circuits.curve import bootstrap
from ..circuits.faithfulness import halves_of
from ..inputs.samples import Samples
from ..inputs.vectors import SteeringVector
from ..patching.edge_scores import EdgeScores
from .agreeing import agreement
from .meaning import LARGEST, meaning
from .settings import DATA_SETS
from .steps import Context, Outcome, step
from .vectors import load_vector, stable, strengths, vectors

MAIN = DATA_SETS[0]
LEARNED = ("ntp", "po")
THRESHOLD = 0.85
#: Fewest samples that are halved.
LEAST_HALVED = 4
TOP_TOKENS = 8
SAMPLED = ("samples", "new_tokens", "steps", "seed", "data_hash")


def coefficient(c: Context, data_set: str) -> float:
    """Harmful prompts are steered against the vector, harmless ones along it."""
    plus, minus = strengths(c)
    return -minus if data_set.startswith("harmful") else plus


def _samples(c: Context, vector: SteeringVector, data_set: str, name: str) -> Samples:
    """The samples of a data set; those that an interrupted call of this step left are taken."""
    path = c.folder / f"{name}.samples.json"
    if path.exists():
        return Samples.load(path)
    kind, responses = data_set.split(".")
    harmful, harmless = c.data.pair("test")
    prompts = (harmful if kind == "harmful" else harmless)[: c.settings.samples]
    samples = patching.make_samples(
        c.model,
        prompts,
        vector,
        coefficient(c, data_set),
        responses=responses,
        max_new_tokens=c.settings.new_tokens,
        progress=False,
    )
    samples.save(path)
    return samples


def _scores(
    c: Context, samples: Samples, vector: SteeringVector, data_set: str, name: str
) -> EdgeScores:
    path = c.folder / f"{name}.scores.safetensors"
    if path.exists():
        return EdgeScores.load(path, c.model)
    scores = patching.attribute(
        c.model,
        samples,
        vector,
        coefficient(c, data_set),
        steps=c.settings.steps,
        dims="steer",
        per_sample=True,
        checkpoint=c.checkpoint(f"{name}.checkpoint.jsonl"),
        progress=c.progress,
    )
    scores.provenance = stable(dict(scores.provenance))
    scores.save(path)
    return scores


def _said(samples: Samples, scores: EdgeScores | None) -> dict[str, Any]:
    """What results.json says of one attribution."""
    content: dict[str, Any] = {
        "samples": len(samples),
        "asked": samples.asked,
        "line": samples.line,
    }
    if scores is None:
        return content
    shares = {
        str(n): scores.distribution(n)
        for n in (scores.graph.n_edges // 100 or 1, scores.graph.n_edges // 10 or 1)
    }
    return content | {
        "positions": scores.n_positions,
        "edges": scores.graph.n_edges,
        "top": [[e.name, e.score, e.share] for e in scores.top(20)],
        "by_type": scores.by_type(),
        "top_by_type": shares,
    }


@step(
    "attribution",
    "edge scores on the four data sets",
    needs=("candidates", "strength"),
    uses=SAMPLED,
)
def attribution(c: Context) -> Outcome:
    vector = load_vector(c, "dim")
    content, files = _attributed(c, [(name, vector, name) for name in DATA_SETS])
    return Outcome({"data_sets": content}, files)


def _attributed(
    c: Context, jobs: Sequence[tuple[str, SteeringVector, str]]
) -> tuple[dict[str, Any], list[str]]:
    """(What results.json says of each job, the files). jobs: (name, vector, data set)."""
    content, files = {}, []
    for name, vector, data_set in jobs:
        samples = _samples(c, vector, data_set, name)
        files.append(f"{name}.samples.json")
        scores = None
        if len(samples):
            scores = _scores(c, samples, vector, data_set, name)
            files.append(f"{name}.scores.safetensors")
        content[name] = _said(samples, scores)
    return content, files


def load_samples(c: Context, from_step: str, name: str) -> tuple[Samples, EdgeScores] | None:
    """The samples and scores of a data set or vector; None where steering flips no prompt."""
    made = c.inputs[from_step]
    samples = Samples.load(made.file(f"{name}.samples.json"))
    if not len(samples):
        return None
    return samples, EdgeScores.load(made.file(f"{name}.scores.safetensors"), c.model)


@step(
    "attribution_learned",
    "edge scores of the learned vectors",
    needs=("candidates", "strength", "ntp", "po"),
    uses=SAMPLED,
)
def attribution_learned(c: Context) -> Outcome:
    learned = [(name, vector, MAIN) for name, vector in vectors(c).items() if name != "dim"]
    content, files = _attributed(c, learned)
    return Outcome({"vectors": content}, files)


@step(
    "exact",
    "exact patches beside the estimates",
    needs=("candidates", "strength", "attribution"),
    uses=("patches", "seed"),
)
def exact(c: Context) -> Outcome:
    """The strongest edges and as many at random, each patched by itself on the first sample."""
    found = load_samples(c, "attribution", MAIN)
    if found is None:
        return Outcome({"why": "steering flips no prompt of this data set"})
    samples, scores = found
    assert scores.sample_edges is not None and scores.weights is not None
    first = int(np.flatnonzero(scores.weights)[0])
    estimate = scores.sample_edges[first]
    half = max(1, min(c.settings.patches // 2, scores.graph.n_edges // 2))
    order = np.argsort(-np.abs(estimate), kind="stable")
    rest = np.random.default_rng([c.settings.seed, 7]).permutation(order[half:])[:half]
    chosen = np.concatenate([order[:half], np.sort(rest)])
    measured = patching.exact(
        c.model,
        samples[first],
        load_vector(c, "dim"),
        coefficient(c, MAIN),
        edges=[int(i) for i in chosen],
        progress=c.progress,
    )
    agreement = patching.agreement(estimate[chosen], measured)
    content = agreement.to_dict() | {
        "sample": first,
        "half_strongest": half,
        "edge_names": [scores.edge_names[i] for i in chosen],
        "estimates": estimate[chosen],
        "measured": measured,
    }
    return Outcome(content)


def _sizes(c: Context, n_edges: int) -> list[int]:
    return sorted({max(1, round(share * n_edges)) for share in c.settings.shares} | {n_edges})


@dataclass(frozen=True)
class _Job:
    """What a circuit is found for. name: of a data set or a learned vector. a: coefficient."""

    name: str
    samples: Samples
    scores: EdgeScores
    vector: SteeringVector
    a: float


@step(
    "circuits",
    "circuits, faithfulness and overlaps",
    needs=("candidates", "strength", "attribution", "attribution_learned", "ntp", "po"),
    uses=("shares", "grid", "seed"),
    version=4,
)
def circuit_curves(c: Context) -> Outcome:
    """The curve and the smallest faithful circuits are found on one half of the samples and judged
    on the other. Circuits of a tenth of the edges are those of all samples: no faithfulness chooses
    them.
    """
    jobs: list[_Job] = []
    content: dict[str, Any] = {}
    every = [("attribution", name, load_vector(c, "dim"), name) for name in DATA_SETS]
    learned = [(n, v) for n, v in vectors(c).items() if n != "dim"]
    every += [("attribution_learned", name, vector, MAIN) for name, vector in learned]
    for from_step, name, vector, data_set in every:
        found = load_samples(c, from_step, name)
        content[name] = {"why": "steering flips none of the prompts"}
        if found is not None:
            jobs.append(_Job(name, *found, vector, coefficient(c, data_set)))
    curve: dict[str, Any] = {"why": content[MAIN]["why"]}
    smallest: dict[str, Circuit] = {}
    tenths: dict[str, Circuit] = {}
    for job in jobs:
        if job.name == MAIN:
            curve = c.once("curve", partial(_curve, c, job))
        file = f"{job.name}.circuit.json"
        content[job.name] = c.once(job.name, partial(_smallest, c, job), file)
        graph = job.scores.graph
        if "size" in content[job.name]:
            smallest[job.name] = Circuit.load(c.folder / file, graph)
        tenths[job.name] = job.scores.circuit(max(1, graph.n_edges // 10))
    compared = {job.name: (job.scores, job.samples) for job in jobs if job.name in (MAIN, *LEARNED)}
    alone = [name for name, _ in learned if name not in compared]
    made = {
        "smallest": content,
        "curve": curve,
        "overlap": _overlaps(smallest),
        "overlap_of_tenths": _overlaps(tenths),
        "agreement": {"why": f"steering with {alone[0]} flips no prompt, so it has no circuit"}
        if alone
        else c.once("agreement", partial(agreement, compared, c.settings.seed)),
    }
    return Outcome(made, [f"{name}.circuit.json" for name in smallest])


def _overlaps(found: dict[str, Circuit]) -> dict[str, Any]:
    """{"names", "values" [n, n]}: shared edges over those of the smaller circuit."""
    values = [[a.overlap(b) for b in found.values()] for a in found.values()]
    return {"names": list(found), "values": values}


def _too_few(job: _Job) -> str | None:
    """Why the samples cannot be halved, or None."""
    assert job.scores.weights is not None
    n = int((job.scores.weights > 0).sum())
    if n >= LEAST_HALVED:
        return None
    return (
        f"{n} samples have metric positions: halves, one to find circuits and one to judge them,"
        f" need at least {LEAST_HALVED}"
    )


def _curve(c: Context, job: _Job) -> dict[str, Any]:
    """The curve judged on samples that did not choose the circuits."""
    if why := _too_few(job):
        return {"why": why}
    curve = circuits.faithfulness_curve(
        job.scores,
        c.model,
        job.samples,
        job.vector,
        job.a,
        _sizes(c, job.scores.graph.n_edges),
        random=2,
        halves=True,
        seed=c.settings.seed,
        progress=c.progress,
    )
    content: dict[str, Any] = stable(curve.to_dict())
    return content


def _smallest(c: Context, job: _Job) -> dict[str, Any]:
    """What results.json says of the smallest circuit that is faithful on the first half of the
    samples, with its faithfulness on the second half; the circuit is saved. Or why there is none.
    """
    if why := _too_few(job):
        return {"why": why}
    first, second = halves_of(job.scores, job.samples, c.settings.seed)
    try:
        circuit = circuits.minimum_faithful(
            job.scores.of_samples(first),
            c.model,
            [job.samples[i] for i in first],
            job.vector,
            job.a,
            THRESHOLD,
            step=c.settings.grid,
            whole_grid=False,
            progress=c.progress,
        )
    except ValueError as error:  # no size reaches the threshold, or steering changes nothing
        return {"why": f"on the {len(first)} samples that choose it: {error}"}
    others = [job.samples[i] for i in second]
    judged = circuit.evaluate(c.model, others, job.vector, job.a, progress=False)["logit_diff"]
    low, high = bootstrap(judged.per_sample, seed=c.settings.seed)
    circuit.save(c.folder / f"{job.name}.circuit.json")
    assert circuit.curve is not None  # minimum_faithful sets it
    measured = circuit.curve.edges, circuit.curve.faithfulness
    return {
        "size": len(circuit),
        "searched": {"edges": measured[0].tolist(), "faithfulness": measured[1].tolist()},
        "edges": circuit.graph.n_edges,
        "share": len(circuit) / circuit.graph.n_edges,
        "faithfulness": judged.faithfulness,
        "low": low,
        "high": high,
        "faithfulness_found": circuit.meta["faithfulness"],
        "samples_judged": len(second),
        "samples_found": len(first),
        "distribution": circuit.distribution(),
    }


@step(
    "rerouting",
    "how far attention moves",
    needs=("candidates", "strength"),
    uses=("samples", "data_hash"),
    version=2,
)
def rerouting(c: Context) -> Outcome:
    harmful, _ = c.data.pair("test")
    found = ov.rerouting(
        c.model,
        harmful[: c.settings.samples],
        load_vector(c, "dim"),
        coefficient(c, MAIN),
        progress=c.progress,
    )
    layer, head = np.unravel_index(int(found.distance.argmax()), found.distance.shape)
    return Outcome(
        {
            "prompts": len(found),
            "coefficient": found.coefficient,
            "distance": found.distance,
            "mean": float(found.distance[load_vector(c, "dim").layer :].mean()),
            "largest": [int(layer), int(head), float(found.distance[layer, head])],
            "top": _most_moved(found),
        }
    )


def _most_moved(found: ov.Rerouting, n: int = 10) -> list[list[Any]]:
    """[[prompt, layer, head, query, key, before, after]] of the entries that change most."""
    rows = [[i, *change] for i in range(len(found)) for change in found.top(n, i)]
    return sorted(rows, key=lambda row: -abs(row[-1] - row[-2]))[:n]


@step(
    "values",
    "steering value vectors and what they promote",
    needs=("candidates",),
    uses=("seed",),
    version=3,
)
def values(c: Context) -> Outcome:
    vector = load_vector(c, "dim")
    svv = ov.steering_value_vectors(c.model, vector)
    places = svv.largest(svv.norms.size)
    lens = ov.logit_lens(
        c.model, [svv[place] for place in places], top=TOP_TOKENS, progress=c.progress
    )
    texts = lens.text()
    whole = ov.logit_lens(c.model, [vector, -vector], top=TOP_TOKENS, progress=False)
    content = {
        "largest": [list(place) for place in places[:LARGEST]],
        "norms": svv.norms,
        "heads": texts[:LARGEST],
        "tokens": {f"a{l}.h{h}": text for (l, h), text in zip(places, texts, strict=True)},
        "vector": whole.text()[0],
        "negated": whole.text()[1],
        "meaning": meaning(
            c.model,
            vector,
            c.data.pair("train"),
            c.result("candidates")["table"]["refusal_token_texts"],
            seed=c.settings.seed,
            progress=c.progress,
        ),
    }
    return Outcome(content, arrays={"values": svv.values})


def _kept(vector: SteeringVector, scores: EdgeScores, tau: float) -> SteeringVector | None:
    """The sparse vector, or None where the threshold keeps nothing."""
    try:
        return sparsify.by_gradient(vector, scores, tau)
    except ValueError:
        return None


def _iou(sparse: dict[str, SteeringVector]) -> list[list[Any]]:
    """[[first, second, intersection over union, p-value of the overlap]] of all pairs."""
    names = list(sparse)
    return [
        [
            a,
            b,
            sparsify.iou(sparse[a], sparse[b]),
            sparsify.overlap_test(sparse[a], sparse[b]),
        ]
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]


@step(
    "sparsity",
    "how few dimensions it needs",
    needs=("candidates", "strength", "attribution", "attribution_learned", "ntp", "po"),
    uses=("taus", "new_tokens", "seed", "samples", "data_hash"),
    version=3,
)
def sparsity(c: Context) -> Outcome:
    found = load_samples(c, "attribution", MAIN)
    if found is None:
        return Outcome({"why": "steering flips no prompt, so no gradient chooses dimensions"})
    harmful, harmless = c.data.pair("test")
    unseen = harmful[c.settings.samples :]  # their gradients chose no dimension
    table = sparsify.sweep(
        c.model,
        load_vector(c, "dim"),
        found[1],
        unseen or harmful,
        harmless,
        strengths(c),
        taus=c.settings.taus,
        methods=("gradient", "random"),
        max_new_tokens=c.settings.new_tokens,
        seed=c.settings.seed,
        out=c.folder / "answers.jsonl",
        progress=c.progress,
    )
    scores = {"dim": found[1]} | _learned_scores(c)
    pairs = {}
    for tau in c.settings.taus:
        sparse = {n: _kept(v, scores[n], tau) for n, v in vectors(c).items() if n in scores}
        kept = {n: v for n, v in sparse.items() if v is not None}
        if tau > 0 and len(kept) > 1:
            pairs[f"{tau:g}"] = _iou(kept)
    content = {"overlaps": pairs, "unseen": len(unseen), "vectors": list(vectors(c))}
    return Outcome(stable(table.to_dict()) | content)


def _learned_scores(c: Context) -> dict[str, EdgeScores]:
    names: Sequence[str] = [n for n in LEARNED if c.result(n)["trained"]]
    found = {n: load_samples(c, "attribution_learned", n) for n in names}
    return {n: f[1] for n, f in found.items() if f is not None}
