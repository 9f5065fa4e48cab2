"""The oracle itself, against transformers: float32, and float64 with norms, softmax
and rotary promoted.

Measured here (39 models, 61 tokens, 17 kinds of site): float64 within 5e-15 of the largest value
everywhere, float32 within 7e-6; edits, freezing and ablations, made again with hooks on
transformers' modules, within 1e-12.
"""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import transformers

from oracle import promoted
from oracle.compare import assert_close, share
from oracle.families import FAMILIES
from oracle.hf_modules import Modules, Tap, hf_sites
from oracle.more_families import MORE_FAMILIES
from oracle.reference import Ablate, Add, Reference, Scale, Set, Steer, Vector, selected

transformers.utils.logging.disable_progress_bar()


def passed_on(ref, normalized, norm):
    """What a norm returns for its `hook_normalized`."""
    gain = ref.w[norm + ".weight"] + ref.facts.norm_offset
    return normalized * gain + ref.w.get(norm + ".bias", 0.0)


def second_norm(ref, l):
    name = "pre_feedforward" if ref.facts.post_norms else "post_attention"
    return f"model.layers.{l}.{name}_layernorm"


def with_gains(ref, sites):
    """The oracle's sites plus what attention, MLP and unembedding read: the norms' outputs."""
    sites = dict(sites)
    for l in range(ref.facts.n_layers) if ref.facts.pre_norms else ():
        first = f"model.layers.{l}.input_layernorm"
        for ln, norm in (("ln1", first), ("ln2", second_norm(ref, l))):
            name = f"blocks.{l}.{ln}."
            sites[name + "normed"] = passed_on(ref, sites[name + "hook_normalized"], norm)
    normalized = sites["ln_final.hook_normalized"]
    sites["final.normed"] = passed_on(ref, normalized, "model.norm")
    return sites


def tokens_of(ref, n, seed=0):
    return np.random.default_rng(seed).integers(0, ref.facts.d_vocab, n).tolist()


def both(zoo, name, float64=True):
    context = promoted.Promote() if float64 else contextlib.nullcontext()
    return zoo.reference(name), promoted.load(zoo.folder(name), float64), context


@pytest.mark.parametrize("float64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_sites_are_those_of_transformers(zoo, name, float64):
    ref, model, context = both(zoo, name, float64)
    tokens = tokens_of(ref, 61)
    with context:
        theirs, logits = hf_sites(model, tokens)
    row = ref.forward(tokens)
    ours = with_gains(ref, row.sites)
    bound = 1e-12 if float64 else 2e-5
    worst = assert_close(f"{name} logits", logits, row.logits, bound)
    for site, value in theirs.items():
        worst = max(worst, assert_close(f"{name} {site}", value, ours[site], bound))
    print(
        f"{name} {'float64' if float64 else 'float32'}: worst share {worst:.2e}; largest logit"
        f" {row.logits.abs().max():.1f}"
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_released_config_style_means_the_same(zoo, name):
    from transformers import AutoModelForCausalLM

    ref, released = zoo.reference(name), Reference(zoo.folder(name, "released"))
    tokens = tokens_of(ref, 61)
    logits = ref.forward(tokens, keep=False).logits
    assert torch.equal(logits, released.forward(tokens, keep=False).logits)
    model = AutoModelForCausalLM.from_pretrained(
        zoo.folder(name, "released"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        assert_close(
            "transformers, released style", model(torch.tensor([tokens])).logits[0], logits, 2e-5
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_is_awake(zoo, name):
    """A random model whose windows, soft caps or rotations did nothing would test nothing."""
    ref = zoo.reference(name)
    tokens = tokens_of(ref, 40)
    row = ref.forward(tokens)
    f = ref.facts
    assert set(row.sites) == set(ref.site_names())
    logits = row.logits
    spread = float(logits.std())
    assert spread > 0.5, spread
    neutral = dict(
        window=[0] * f.n_layers,
        rope=[table and (table[0] * 1.1, table[1]) for table in f.rope],
        attn_softcap=0.0,
        final_softcap=0.0,
        norm_offset=0.0,
        clip_qkv=0.0,
        residual_scale=1.0,
        logit_scale=1.0,
        query_beta=0.0,
        rope_switch=len(tokens),
        rope_interleaved=False,
        parallel=False,
    )
    for change, other in neutral.items():
        value = getattr(f, change)
        still = value == other if change != "rope" else not any(value)
        if still or (change == "rope_switch" and not value):
            continue
        setattr(f, change, other)
        try:
            assert share(ref.forward(tokens, keep=False).logits, logits)[0] > 1e-2, (
                f"{name}: {change} makes no difference"
            )
        finally:
            setattr(f, change, value)
    for weight, value in ref.w.items():
        if weight.endswith("k_proj.bias") and not any(f.rope):
            continue  # adds the same to all of a query's scores
        other = torch.zeros_like(value) if weight.endswith("bias") else value.roll(1, dims=-1)
        if torch.equal(other, value):
            assert ref.facts.kind == "olmo"  # gains of 1
            continue
        ref.w[weight] = other
        moved = share(ref.forward(tokens, keep=False).logits, logits)[0]
        ref.w[weight] = value
        tied = weight in ("model.embed_tokens.weight", "lm_head.weight")  # held twice
        assert tied or moved > 1e-3, f"{name}: {weight} makes no difference"
    patterns = torch.stack([row.sites[f"blocks.{l}.attn.hook_pattern"] for l in range(f.n_layers)])
    assert patterns.amax(-1).mean() > 0.15
    assert torch.allclose(patterns.sum(-1), torch.ones((), dtype=torch.float64))
    # a head's part of the output, summed, is the output before bias and post-norm
    for l in range(f.n_layers):
        z, result = row.sites[f"blocks.{l}.attn.hook_z"], row.sites[f"blocks.{l}.attn.hook_result"]
        flat = z.reshape(len(tokens), -1) @ ref.w[f"model.layers.{l}.self_attn.o_proj.weight"].T
        assert torch.allclose(result.sum(1), f.residual_scale * flat, atol=1e-11)


def at(positions, function):
    """`function` at these positions, nothing elsewhere."""

    def change(x):
        mask = torch.zeros(x.shape[-2], 1, dtype=torch.bool)
        mask[positions] = True
        return torch.where(mask, function(x), x)

    return change


def written(index, values):
    """Sets a part of what a module passes on."""

    def change(x):
        y = x.clone()
        y[index] = values
        return y

    return change


def rows_written(rows, values):
    """Sets these positions; OPT's MLP has no batch axis."""
    return written((..., rows, slice(None)), values)


def edit_cases(ref, model, s, rng):
    """(edits, the same as hooks on transformers' modules)"""
    f, d, layers = ref.facts, ref.facts.d_head, Modules(model).layers
    mid, block = layers[1], "model.layers.1."
    u = torch.tensor(s / np.linalg.norm(s))
    project = lambda x: x - (x @ u)[..., None] * u
    added = lambda a: lambda x: x + a * torch.tensor(s)
    head = rng.standard_normal(d)
    other = torch.tensor(rng.standard_normal((2, f.d_mlp)))
    every = [tap.change(project) for x in layers for tap in (x.resid_pre, x.attn_out, x.mlp_out)]
    one_head = written((0, slice(5, 9), slice(d, 2 * d)), torch.tensor(head))
    every_head = lambda x: torch.tensor(head).repeat(f.n_heads if x.ndim == 3 else 1)
    to_all_heads = lambda x: x + every_head(x)
    even = slice(0, None, 2)

    def halved(norm):
        """Half of a norm's output before its bias."""
        bias = ref.w.get(norm + ".bias", torch.zeros(()))
        return lambda x: (x - bias) * 0.5 + bias

    cases = [
        ([Steer(Vector(s, 1), -0.7)], [mid.resid_pre.change(added(-0.7))]),
        (
            [Steer(Vector(s, 1), 0.7, positions=slice(-4, None))],
            [mid.resid_pre.change(at(slice(17, None), added(0.7)))],
        ),
        ([Ablate(s)], every),
        (
            [Set("blocks.1.attn.hook_z", head, positions=slice(5, 9), heads=[1])],
            [mid.z.change(one_head)],
        ),
        (
            [Set("blocks.1.mlp.hook_post", other, positions=[-3, 3])],
            [mid.post.change(rows_written([18, 3], other))],
        ),
        (
            [Scale("blocks.1.attn.hook_v", 0.5), Add("blocks.1.attn.hook_v", 0.25)],
            [mid.v.change(lambda x: x * 0.5 + 0.25)],
        ),
        ([Add("blocks.1.attn.hook_q", head)], [mid.q.change(to_all_heads)]),
        ([Scale("blocks.1.hook_mlp_out", 0.5)], [mid.mlp_out.change(lambda x: x * 0.5)]),
    ]
    if f.clip_qkv:  # transformers' hooks come before the clipping
        del cases[5:7]
    if f.pre_norms:
        cases += [
            (
                [Scale("blocks.1.ln2.hook_normalized", 0.5)],
                [mid.mlp_input.change(halved(second_norm(ref, 1)))],
            ),
            (
                [Scale("blocks.1.ln1.hook_scale", 2.0, positions=even)],
                [mid.attn_input.change(at(even, halved(block + "input_layernorm")))],
            ),
        ]
    return cases


@pytest.mark.parametrize(
    "name", ["llama3", "llama_bias", "gemma2", "gemma3", "qwen2", *MORE_FAMILIES]
)
def test_edits_are_those_of_forward_hooks(zoo, name, rng):
    ref, model, context = both(zoo, name)
    f = ref.facts
    tokens = tokens_of(ref, 21)
    s = rng.standard_normal(f.d_model)
    plain = ref.forward(tokens, keep=False).logits
    for edits, changes in edit_cases(ref, model, s, rng):
        with context:
            _, logits = hf_sites(model, tokens, changes)
        row = ref.forward(tokens, edits=edits, keep=False)
        assert_close(f"{name} {edits}", row.logits, logits, 1e-12)
        assert share(row.logits, plain)[0] > 1e-3, f"{edits} changes nothing"


def without_steering(ref, l, tap, norm, stream, s, coefficient, project=None):
    """Hooks that take the steering vector, as the norm passes it on, out of a module's input.
    stream: the tap of what the norm reads. project: of a tap after a projection, its weight.
    """
    held = {}
    layer_norm, w, f = ref.facts.norm == "layer", ref.w, ref.facts

    def keep_scale(x):
        y = x - x.mean(-1, keepdim=True) if layer_norm else x
        held["scale"] = torch.sqrt((y * y).mean(-1, keepdim=True) + f.eps)
        return x

    change = coefficient * (s - s.mean() if layer_norm else s)
    if f.pre_norms:
        change = change * (w[norm + ".weight"] + f.norm_offset)
    if project is not None:
        change = project @ change
    scale = lambda x: held["scale"].view(*x.shape[:-1], 1) if f.pre_norms else 1.0

    def take_out(x):
        part = change.view(x.shape[-2:]) if project is not None and x.ndim == 4 else change
        divisor = scale(x) if x.ndim != 4 else held["scale"].view(*x.shape[:2], 1, 1)
        return x - part / divisor

    return [stream.change(keep_scale), tap.change(take_out)]


def freezing_hooks(ref, model, base, s, layer, coefficient):
    """(freeze, ablate) -> hooks on transformers' modules; base: the base run's sites."""
    f, layers = ref.facts, Modules(model).layers
    later = range(layer, f.n_layers)
    replace = lambda site, tap: tap.change(lambda x: base[site].reshape(x.shape))
    frozen = lambda l, name: replace(f"blocks.{l}.attn.hook_{name}", getattr(layers[l], name))

    def values(l):
        x = layers[l]
        norm = f"model.layers.{l}.input_layernorm"
        if x.separate:
            tap, project = Tap(x.v.module, "pre"), None
        else:
            tap, project = x.v, ref.w[f"model.layers.{l}.self_attn.v_proj.weight"]
        return without_steering(ref, l, tap, norm, x.resid_pre, s, coefficient, project)

    def mlp(l):
        x = layers[l]
        stream = x.resid_pre if f.parallel else x.resid_mid
        return without_steering(ref, l, x.mlp_input, second_norm(ref, l), stream, s, coefficient)

    changes = {
        ("qk", None): [frozen(l, name) for l in later for name in "qk"],
        ("ov", None): [frozen(l, "v") for l in later],
        ("mlp", None): [replace(f"blocks.{l}.hook_mlp_out", layers[l].mlp_out) for l in later],
        (None, "svv"): [c for l in later for c in values(l)],
        (None, "mlp_direct"): [c for l in later for c in mlp(l)],
    }
    changes["qk", "mlp_direct"] = changes["qk", None] + changes[None, "mlp_direct"]
    return changes


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_is_that_of_forward_hooks(zoo, name, rng):
    """QK, OV and MLP freezing and both ablations, made a second time with hooks on
    transformers' modules.
    """
    ref, model, context = both(zoo, name)
    f, layer = ref.facts, 1
    tokens = tokens_of(ref, 19)
    s = torch.tensor(rng.standard_normal(f.d_model))
    plain = ref.forward(tokens, keep=False).logits
    for coefficient in (1.0, -0.8):
        steering = Modules(model).layers[layer].resid_pre.change(lambda x, a=coefficient: x + a * s)
        with context:
            base, _ = hf_sites(model, tokens)

        changes = freezing_hooks(ref, model, base, s, layer, coefficient)
        steered = ref.forward(
            tokens, edits=[Steer(Vector(s, layer), coefficient)], keep=False
        ).logits
        for (freeze, ablate), hooks in changes.items():
            with context:
                _, logits = hf_sites(model, tokens, [steering, *hooks])
            row = ref.forward(
                tokens,
                edits=[Steer(Vector(s, layer), coefficient)],
                freeze=freeze,
                ablate=ablate,
                keep=False,
            )
            assert_close(
                f"{name} a={coefficient} freeze={freeze} ablate={ablate}", row.logits, logits, 1e-12
            )
            assert share(row.logits, steered)[0] > 1e-3, f"{freeze} {ablate} changes nothing"
            assert share(row.logits, plain)[0] > 1e-3


@pytest.mark.parametrize("name", ["llama3", "mistral", "gemma2", "gemma3", "qwen2", "qwen3"])
def test_full_rerun_equals_one_teacher_forced_pass(zoo, name, rng):
    """The re-run at every token is the definition; one causal pass over prefix and response gives
    the same logits, and tests may use it.
    """
    ref = zoo.reference(name)
    prompt = tokens_of(ref, 7)
    steer = Steer(
        Vector(rng.standard_normal(ref.facts.d_model), 1), -0.9, positions=slice(-2, None)
    )
    new, margins = ref.generate(prompt, 12, edits=[steer], freeze="qk", ablate="mlp_direct")
    logits = ref.forward(
        prompt + new,
        edits=[steer],
        prompt_length=len(prompt),
        freeze="qk",
        ablate="mlp_direct",
        keep=False,
    ).logits
    top = torch.topk(logits[len(prompt) - 1 : -1], 2)
    assert top.indices[:, 0].tolist() == new
    np.testing.assert_allclose(
        (top.values[:, 0] - top.values[:, 1]).numpy(), margins, rtol=0, atol=1e-12
    )


def test_greedy_is_that_of_transformers(zoo):
    for name in ("llama3", "gemma2", "qwen2_window"):
        ref, model, context = both(zoo, name)
        prompt = tokens_of(ref, 6)
        with context, torch.no_grad():
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, 6, dtype=torch.long),
                max_new_tokens=20,
                do_sample=False,
                pad_token_id=0,
            )
        assert out[0, 6:].tolist() == ref.generate(prompt, 20)[0]


def test_gradients_go_through(zoo):
    """d(logit difference)/d(steering vector), against a central difference."""
    ref = zoo.reference("gemma2")
    tokens = tokens_of(ref, 9)
    s = torch.randn(
        ref.facts.d_model,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
        requires_grad=True,
    )
    value = lambda v: ref.forward(tokens, edits=[Steer(Vector(v, 1), 0.5)], keep=False).logits[
        -1, 3
    ]
    (grad,) = torch.autograd.grad(value(s), s)
    with torch.no_grad():
        for i in (0, 11, 51):
            e = torch.zeros_like(s)
            e[i] = 1e-6
            assert abs((value(s + e) - value(s - e)) / 2e-6 - grad[i]) < 1e-7


def test_positions():
    assert selected(None, 3, 5) == [0, 1, 2, 3, 4]
    assert selected("prompt", 3, 5) == [0, 1, 2] and selected("response", 3, 5) == [3, 4]
    assert selected([0, -1, 4, 9], 3, 5) == [0, 2, 4]
    assert selected(slice(-2, None), 3, 5) == [1, 2, 3, 4] and selected(slice(None, -1), 3, 5) == [
        0,
        1,
    ]
    assert selected(slice(-9, None, 2), 3, 5) == [0, 2, 4]
