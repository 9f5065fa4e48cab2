"""Recorded calls: configuration, forward passes, generation, gradients and steering vectors."""

from __future__ import annotations

import tempfile
from dataclasses import asdict

from recorded_case import QUIET, TEXTS, by_kind, call, of_generations, of_run

import vksteer as vs

# -- configuration, forward passes, generation -------------------------------------------------


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
    for options in freezes_and_ablations():
        run = case.model.run(
            case.rows,
            case.responses,
            edits=[case.steer],
            **options,
            capture=["blocks.*.attn.hook_z", "blocks.*.hook_mlp_out"],
        )
        found |= {f"{options}, {name}": value for name, value in of_run(run).items()}
    return found


def freezes_and_ablations() -> list[dict]:
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
        for options in freezes_and_ablations()
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


# -- vectors -----------------------------------------------------------------------------------


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
