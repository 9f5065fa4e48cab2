"""The calls that tools/record_outputs.py records, on one open model and its inputs.

Each function marked `call` takes a Case and returns {result's name: value}; a value is an array or
plain data whose JSON is exact. Values of one kind of site are stacked over the layers. Only the
public interface is used, so that the calls run unchanged on other trees. All seeds are fixed.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

import vksteer as vs

GGUF = Path(__file__).resolve().parent.parent / ".models/SmolLM2-135M-Instruct.Q4_1.gguf"
#: name -> (source, coefficient of steering, tokens of a response)
MODELS = {
    "tiny-llama-chat": ("tiny-llama-chat", -1.0, 40),
    "tiny-gemma-chat": ("tiny-gemma-chat", -0.7, 40),
    "SmolLM2": (str(GGUF), 4.0, 6),
}
METRICS = ("logit_diff", "logit_diff_per_sample", "kl", "directional_kl", "match", "logprob")
METHODS = ("pruned", "top", "greedy_backward", "greedy_forward")
TEXTS = ["I cannot help with that.", "Sure. Take the hammer and go to the river.", "", "no no " * 9]
QUIET = {"progress": False}

CALLS = []


def call(function):
    """Mark a function of a Case as one recorded call. It returns {result's name: value}."""
    CALLS.append(function)
    return function


class Case:
    """One open model and the inputs that its calls share."""

    def __init__(self, name: str):
        source, self.coefficient, self.new_tokens = MODELS[name]
        self.source, self.small = source, name.startswith("tiny")
        self.model = vs.Model.from_pretrained(source, progress=False)
        self.layers = self.model.config.n_layers
        harmful, harmless = vs.data.tiny_pair("train", 64 if self.small else 3)
        self.candidates = vs.steering.difference_in_means(self.model, harmful, harmless, **QUIET)
        self.validation = vs.data.tiny_pair("validation", 12 if self.small else 2)
        self.harmful, self.harmless = vs.data.tiny_pair("test", 4 if self.small else 2)
        if self.small:
            self.vector = self.candidates.select(*self.validation, **QUIET)
        else:
            self.vector = self.candidates.vector(-1, self.layers - 4)
        rng = np.random.default_rng(1)
        top = self.model.config.d_vocab
        self.rows = [rng.integers(0, top, n).tolist() for n in (9, 4, 14, 1, 6, 11)]
        self.responses = [rng.integers(0, top, n).tolist() for n in (3, 0, 5, 2, 4, 1)]
        self.samples = vs.patching.make_samples(
            self.model,
            self.harmful[:3],
            self.vector,
            self.coefficient,
            keep="all",
            max_new_tokens=self.new_tokens // 2,
            **QUIET,
        )
        self.scored = (self.model, self.samples, self.vector, self.coefficient)
        self.steer = vs.Steer(self.vector, self.coefficient)
        self._scores = None

    @property
    def scores(self):
        """Scores of all edges, which the calls on circuits start from."""
        if self._scores is None:
            self._scores = vs.patching.attribute(*self.scored, steps=3, per_sample=True, **QUIET)
        return self._scores

    def noise(self, seed: int, *shape: int) -> np.ndarray:
        """Random numbers whose spread is that of the steering vector's entries."""
        size = self.vector.norm / np.sqrt(self.vector.width)
        return (size * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


# -- what results are made of ------------------------------------------------------------------


def by_kind(sites) -> dict:
    """Arrays of sites, stacked over layers: "blocks.{l}.hook_resid_pre" -> [L, ...]."""
    kinds: dict[str, list] = {}
    for name, array in sites:
        head, _, rest = name.partition(".")
        layer, _, rest = rest.partition(".")
        kinds.setdefault("blocks.{l}." + rest if head == "blocks" else name, []).append(array)
    return {kind: np.stack(arrays) for kind, arrays in kinds.items()}


def of_run(run) -> dict:
    found = {"tokens": run.tokens, "mask": run.mask, "touched": run.touched}
    return found | {"logits": run.logits} | by_kind(run.items())


def of_generations(generations) -> dict:
    captured = {
        f"{name}, row {i}": array
        for i, g in enumerate(generations)
        for name, array in g.captured.items()
    }
    plain = [[g.text, g.tokens, g.finish_reason, g.prompt_tokens] for g in generations]
    return {"generations": plain} | captured


def of_scores(scores) -> dict:
    names = ("edges", "nodes", "dims", "weights", "sample_edges", "sample_nodes", "n_positions")
    found = {name: getattr(scores, name) for name in names}
    for i, array in enumerate(scores.positions or ()):
        found[f"positions of sample {i}"] = array
    return found


def of_metrics(result) -> dict:
    names = ("faithfulness", "value", "full", "empty")
    return {metric: {name: getattr(r, name) for name in names} for metric, r in result.items()}


# -- calls: configuration, forward passes, generation ------------------------------------------


@call
def configuration(case):
    model, tok = case.model, case.model.tokenizer
    texts = [*TEXTS, "Gr\u00fc\u00dfe \u2014 \u4f60\u597d\n\tTab", *case.harmful]
    ids = [tok.encode(text) for text in texts]
    return {
        "config": asdict(model.config),
        "alone": asdict(vs.Config.from_pretrained(case.source)),
        "sites": list(model.sites.items()),
        "eos": list(model.eos_ids),
        "encode": ids,
        "without bos": [tok.encode(text, add_bos=False) for text in texts],
        "decode": [tok.decode(some) for some in ids],
        "skip special": [tok.decode(some, skip_special=True) for some in ids],
        "chat tokens": model.chat_tokens(case.harmful),
        "answered": model.chat_tokens(case.harmful[:1], response="Certainly."),
        "post-instruction length": model.post_instruction_length,
        "bundled prompts": [vs.data.tiny_pair(s, 8) for s in ("train", "validation", "test")],
    }


@call
def run_logits(case):
    found = of_run(case.model.run(case.rows, case.responses))
    found["last logits"] = case.model.run(case.rows, logits="last").logits
    answers = ["Sure. I"] * len(case.harmful)
    found["of texts"] = case.model.run(case.harmful, answers, logits="last").logits
    return found


@call
def run_captures(case):
    return of_run(
        case.model.run(
            case.rows[:4], case.responses[:4], capture=list(case.model.sites), logits=None
        )
    )


def every_edit(case) -> list[list]:
    """One list of edits a row, each kind at least once, at several kinds of sites and positions."""
    c, v = case.model.config, case.vector
    width, z = case.noise(2, c.d_model), case.noise(3, c.n_heads, c.d_head)
    head, mlp = case.noise(4, c.d_head), case.noise(5, c.d_mlp)
    last = f"blocks.{c.n_layers - 1}"
    return [
        [vs.Steer(v, case.coefficient), vs.Ablate(case.noise(6, c.d_model), positions=slice(1, 5))],
        [vs.Ablate(v), vs.Steer(v, 0.5, positions=[-1, 0])],
        [
            vs.Set("blocks.1.attn.hook_z", head, positions=slice(-3, None), heads=[1]),
            vs.Set("blocks.0.hook_resid_mid", width, positions="response"),
        ],
        [vs.Add(f"{last}.hook_mlp_out", width), vs.Add("blocks.1.attn.hook_q", z)],
        [
            vs.Scale("blocks.1.mlp.hook_post", 0.5, positions="prompt"),
            vs.Scale("blocks.2.attn.hook_pattern", 0.25, heads=[0]),
        ],
        [
            vs.MeanAblate("blocks.1.mlp.hook_post", mlp, positions=slice(2, -1)),
            vs.MeanAblate("blocks.2.attn.hook_z", z),
        ],
    ]


@call
def run_edits(case):
    sites = ["blocks.*.hook_resid_post", "blocks.2.attn.hook_pattern", "blocks.1.mlp.hook_post"]
    edits = every_edit(case)
    found = of_run(case.model.run(case.rows, case.responses, edits=edits, capture=sites))
    for i, some in enumerate(edits):
        run = case.model.run(case.rows[:3], case.responses[:3], edits=some, logits="last")
        found[f"list {i} for all rows"] = run.logits
        found[f"list {i}, touched"] = run.touched
    return found


@call
def run_frozen(case):
    found = {}
    for options in treatments():
        run = case.model.run(
            case.rows,
            case.responses,
            edits=[case.steer],
            **options,
            capture=["blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"],
        )
        found |= {f"{options}, {name}": value for name, value in of_run(run).items()}
    return found


def treatments() -> list[dict]:
    frozen = [{"freeze": name} for name in ("qk", "ov", "mlp")]
    ablated = [{"ablate": name} for name in ("svv", "mlp_direct")]
    return frozen + ablated + [{"freeze": "qk", "ablate": "svv"}]


@call
def generate(case):
    model, n = case.model, case.new_tokens
    options = {"max_new_tokens": n, **QUIET}
    edits = [[case.steer] if i % 2 else [] for i in range(len(case.harmful))]
    sampled = {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 7}
    made = {
        "greedy": model.generate(case.harmful, **options),
        "steered by row": model.generate(case.harmful, edits=edits, batch_size=2, **options),
        "sampled": model.generate(case.harmful, **sampled, **options),
        "every edit": model.generate(case.rows, edits=every_edit(case), ignore_eos=True, **options),
        "stopped": model.generate(case.harmless, stop=[".", " the"], **options),
        "captured": model.generate(
            case.harmless,
            **options,
            edits=[case.steer],
            capture=["blocks.1.hook_resid_post", "blocks.1.attn.hook_z"],
        ),
    }
    return {
        f"{name}: {what}": value
        for name, some in made.items()
        for what, value in of_generations(some).items()
    }


@call
def generate_frozen(case):
    prompts = case.harmful[:2] + case.harmless[:2] if case.small else case.harmful[:1]
    return {
        str(options): of_generations(
            case.model.generate(
                prompts, edits=[case.steer], max_new_tokens=case.new_tokens, **options, **QUIET
            )
        )
        for options in treatments()
    }


@call
def gradients(case):
    model, rows = case.model, case.rows[:3]
    reference = model.run(rows).logits  # the gradients are of the steered rows
    scalars = {
        "LogitDiff": vs.LogitDiff(-1, 3, 5),
        "LogProb": vs.LogProb([-1, 0], [4, 2]),
        "KL": [vs.KL(reference[b, -2:], [-2, -1]) for b in range(len(rows))],
    }
    found = {}
    for name, of in scalars.items():
        grads = model.gradients(rows, of=of, at=list(model.sites), edits=[case.steer], **QUIET)
        parts = {"values": grads.values, "tokens": grads.tokens, **by_kind(grads.items())}
        found |= {f"{name}: {what}": value for what, value in parts.items()}
    return found


# -- calls: vectors ----------------------------------------------------------------------------


@call
def difference_in_means(case):
    cands = case.candidates
    layers = [case.vector.layer - 1, case.vector.layer] if case.small else [case.vector.layer]
    ids = vs.steering.derive_refusal_tokens(case.model, case.harmful, case.harmless).ids
    few = [prompts[:4] for prompts in case.validation]
    table = cands.evaluate(*few, refusal_tokens=list(ids), layers=layers, **QUIET)
    found = {name: getattr(table, name) for name in ("bypass", "induce", "kl", "bypass_ablation")}
    found |= {"vectors": cands.vectors, "positions": list(cands.positions), "refusal tokens": ids}
    if case.small:
        found["paper"] = [case.vector.direction, case.vector.layer, case.vector.position]
        try:
            v = cands.select(*few, criterion="arditi", **QUIET)
            found["arditi"] = [v.direction, v.layer, v.position]
        except ValueError as error:  # none is left: which filter took them is an output, too
            found["arditi"] = str(error)
    return found


@call
def vector_files(case):
    v, found = case.vector, {}
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("gguf", "safetensors", "npz"):
            v.save(f"{folder}/v.{ending}")
            u = vs.SteeringVector.load(f"{folder}/v.{ending}")
            found[ending] = [u.direction, u.layer, u.position, u.method]
    scaled = [-v, 0.3 * v, v / 3, v.with_norm(2.0)]
    found["algebra"] = [u.direction for u in scaled] + [v.norm, v.cosine(case.noise(7, v.width))]
    return found


def examples_of(case):
    texts = [case.harmful[:2], case.harmless[:2]]
    prompts = [p for pair in zip(*texts) for p in case.model.chat_tokens(list(pair))]
    return [
        vs.steering.Example(p, win, lose, sign)
        for p, win, lose, sign in zip(
            prompts, case.responses[2:], case.responses[:1] * 4, (1, -1, 1, -1)
        )
    ]


@call
def training(case):
    model, examples, v = case.model, examples_of(case), case.vector
    hyper = {"layer": v.layer, "epochs": 2, "batch_size": 2, **QUIET}
    found = {
        "ntp loss": vs.steering.ntp_loss(model, examples, v, 0.8),
        "ntp loss, sum": vs.steering.ntp_loss(model, examples, v, 0.8, reduction="sum"),
        "po loss": vs.steering.po_loss(model, examples, v, 0.8, phi=0.1),
    }
    for name, train in (("ntp", vs.steering.train_ntp), ("po", vs.steering.train_po)):
        result = train(model, examples, **hyper)
        found |= {
            f"train {name}: vectors": result.vectors,
            f"train {name}: losses": result.losses,
            f"train {name}: direction": result.vector.direction,
        }
    if case.small:
        data = vs.steering.training_data(
            model, case.harmful, case.harmless, v, 1.0, max_new_tokens=24, **QUIET
        )
        found["data"] = [[[e.prompt, e.winning, e.losing, e.sign] for e in data], data.counts]
    return found


@call
def behaviour(case):
    """Sweeps, the ablation table and comparisons: generation, judged."""
    n, v = case.new_tokens, case.vector
    arguments = (case.harmful[:3], case.harmless[:3])
    found = {
        "refused": vs.judge.refused(TEXTS),
        "repetition": vs.judge.repetition(TEXTS),
        "compression": vs.judge.compression_ratio(TEXTS),
        "wilson": vs.judge.wilson(3, 11),
        "success": vs.judge.attack_success_rate(TEXTS),
    }
    if case.small:
        table = vs.freezing.ablation_table(
            case.model,
            v,
            *arguments,
            abs(case.coefficient),
            max_new_tokens=n,
            random_control=1,
            **QUIET,
        )
        content = table.to_dict(texts=True)
        found |= {"ablation table": content["rows"], "its texts": content["texts"]}
        found["sweep"] = vs.steering.sweep(
            case.model, v, [0.5, 1.0], *arguments, max_new_tokens=n, **QUIET
        ).to_dict()
        sparse = vs.sparsify.sweep(
            case.model,
            {"v": v},
            {"v": case.scores},
            *arguments,
            abs(case.coefficient),
            taus=(0.0, 1.0),
            max_new_tokens=n,
            **QUIET,
        )
        found["sparsity sweep"] = sparse.to_dict()["rows"]
    return found


# -- calls: patching and circuits --------------------------------------------------------------


@call
def samples(case):
    found = {}
    for responses, keep in (("steered", "flipped"), ("base", "all")):
        made = vs.patching.make_samples(
            case.model,
            case.harmful,
            case.vector,
            case.coefficient,
            responses=responses,
            keep=keep,
            max_new_tokens=case.new_tokens,
            **QUIET,
        )
        pairs = [[list(s.prompt_tokens), list(s.response_tokens)] for s in made]
        found[f"{responses}, {keep}"] = [pairs, made.dropped, made.index, made.line]
    return found


@call
def attribute(case):
    choices = {
        "pre_norm": {"per_sample": True, "per_position": case.small, "dims": "all"},
        "normed": {"at": "normed", "per_sample": True},
        "kl from base": {"metric": "kl", "clean": "base", "rule": "left"},
        "directional kl": {"metric": "directional_kl", "rule": "right", "threshold": 0.01},
    }
    found = {"order": case.scores.edge_names, "nodes' order": case.scores.node_names}
    for name, options in choices.items():
        scores = vs.patching.attribute(*case.scored, steps=3, **options, **QUIET)
        found |= {f"{name}: {what}": value for what, value in of_scores(scores).items()}
    return found


@call
def exact(case):
    m, sample = case.model, case.samples[0]
    edges = [edge.name for edge in case.scores.top(6)]
    nodes = [node.name for node in case.scores.top_nodes(4)]
    arguments = (m, sample, case.vector, case.coefficient)
    return {
        "edges": vs.patching.exact(*arguments, edges=edges),
        "edges from base": vs.patching.exact(*arguments, edges=edges, clean="base", metric="kl"),
        "nodes": vs.patching.exact(*arguments, nodes=nodes),
        "at positions": vs.patching.exact(*arguments, nodes=nodes, positions="response"),
    }


def sizes_of(case) -> list[int]:
    return [len(case.scores.edges) * share // 100 for share in (2, 10, 40)]


@call
def circuits(case):
    found = {}
    for method in METHODS if case.small else METHODS[:2]:
        for n in sizes_of(case):
            c = case.scores.circuit(n, method=method)
            found[f"{method}, {n}"] = [c.edge_names, c.distribution()]
    c, d = case.scores.circuit(sizes_of(case)[1]), vs.circuits.random(case.scores.graph, 40, 3)
    found["random"] = d.edge_names
    found["sets"] = [c.complement().edge_names, c.pruned().edge_names, c.overlap(d), c.counts()]
    found["distribution"] = case.scores.distribution(40)
    return found


@call
def evaluate(case):
    some = [case.scores.circuit(n) for n in sizes_of(case)[: 3 if case.small else 1]]
    metrics = METRICS if case.small else METRICS[:1]
    results = vs.circuits.evaluate(some, *case.scored, metrics=metrics, **QUIET)
    found = {f"circuit {i}": of_metrics(result) for i, result in enumerate(results)}
    generated = case.model.generate(
        case.harmful[:2], edits=[case.steer], circuit=some[0], max_new_tokens=8, **QUIET
    )
    found |= {f"decoding: {k}": value for k, value in of_generations(generated).items()}
    if case.small:
        found["alone"] = of_metrics(some[0].evaluate(*case.scored, **QUIET))
        least = vs.circuits.minimum_faithful(case.scores, *case.scored, threshold=0.5, **QUIET)
        found["minimum faithful"] = least.edge_names
        curve = vs.circuits.faithfulness_curve(
            case.scores, *case.scored, sizes=sizes_of(case), random=1, bootstrap=50, **QUIET
        )
        for name in ("sizes", "edges", "faithfulness", "low", "high", "random", "random_edges"):
            found[f"curve: {name}"] = getattr(curve, name)
    return found


@call
def plan(case):
    config = case.model.config
    choices = [{}, {"dims": "all", "at": "normed"}, {"metric": "kl", "max_memory": "200MB"}]
    return {
        str(options): vs.patching.plan(config, case.vector.layer, 300, **options).to_dict()
        for options in choices
    }


# -- calls: OV circuits and sparsity -----------------------------------------------------------


@call
def ov(case):
    m, v, last = case.model, case.vector, case.layers - 1
    svv = vs.ov.steering_value_vectors(m, v)
    found = {"values": svv.values, "layers": svv.layers, "sums": svv.sum_over_heads()}
    for by in ("logit", "cosine"):
        lens = vs.ov.logit_lens(m, svv.values, top=5, by=by, **QUIET)
        found |= {f"lens, {by}: tokens": lens.tokens, f"lens, {by}: values": lens.values}
        found[f"lens, {by}: text"] = lens.text()
    parts = vs.ov.decompose(
        m, case.rows[:3], v, case.coefficient, last, responses=case.responses[:3]
    )
    names = ("direct", "indirect", "scales", "base", "heads_share", "share")
    found |= {f"decompose: {name}": getattr(parts, name) for name in names}
    shares = vs.ov.direct_shares(m, case.rows[:3], v, case.coefficient, **QUIET)
    found["direct shares"] = shares.to_dict()
    for name, weight in zip(("W_Q", "W_K", "W_V", "W_O"), vs.ov.head_weights(m, last, 1)):
        found[name] = np.asarray(weight)
    return found


@call
def sparsify(case):
    v, scores = case.vector, case.scores
    k = v.width // 3
    sparse = {
        "gradient": vs.sparsify.by_gradient(v, scores, 1.0),
        "effect": vs.sparsify.by_effect(v, scores, k),
        "magnitude": vs.sparsify.by_magnitude(v, k),
        "random": vs.sparsify.by_random(v, k, 11),
    }
    found = {name: [u.direction, u.kept, u.norm] for name, u in sparse.items()}
    pair = sparse["effect"], sparse["magnitude"]
    return found | {
        "ratio": vs.sparsify.gradient_ratio(v, scores),
        "iou": vs.sparsify.iou(*pair),
        "overlap test": vs.sparsify.overlap_test(*pair),
    }
