"""The oracle itself, against transformers: float32, and float64 with norms, softmax
and rotary promoted.

Measured here (12 families, 61 tokens, 16 kinds of site): float64 within 5e-15 of the largest value
everywhere, float32 within 5e-6; edits, freezing and ablations, made again with hooks on
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
from oracle.reference import Ablate, Add, Reference, Scale, Set, Steer, Vector, selected

transformers.utils.logging.disable_progress_bar()


def hooked(module, when, change):
    """The handle of a hook that replaces what enters ("pre") or leaves ("post") a module."""
    if when == "post":
        return module.register_forward_hook(lambda m, a, out: change(out))

    def before(m, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, dict(kwargs, hidden_states=change(kwargs["hidden_states"]))

    return module.register_forward_pre_hook(before, with_kwargs=True)


def hf_sites(model, tokens, changes=()):
    """Transformers' values at the oracle's sites, gathered with forward hooks. changes: (module,
    "pre"|"post", function(value)).
    """
    config, sites, handles = model.config, {}, []
    H, G = config.num_attention_heads, config.num_key_value_heads
    d = model.model.layers[0].self_attn.head_dim
    n = len(tokens)

    def keep(name, module, pre=False, shape=None):
        view = lambda x: x.reshape(n, *shape) if shape else x.reshape(n, -1)
        first = lambda x: x[0] if isinstance(x, tuple) else x
        if pre:
            handles.append(
                module.register_forward_pre_hook(
                    lambda m, a: sites.__setitem__(name, view(first(a)).detach())
                )
            )
        else:
            handles.append(
                module.register_forward_hook(
                    lambda m, a, out: sites.__setitem__(name, view(first(out)).detach())
                )
            )

    handles += [hooked(*change) for change in changes]
    for l, layer in enumerate(model.model.layers):
        b, attn, mlp = f"blocks.{l}.", layer.self_attn, layer.mlp
        post = hasattr(layer, "pre_feedforward_layernorm")
        keep(b + "hook_resid_pre", layer, pre=True)
        keep(b + "ln1.normed", layer.input_layernorm)
        keep(b + "attn.hook_q", attn.q_proj, shape=(H, d))
        keep(b + "attn.hook_k", attn.k_proj, shape=(G, d))
        keep(b + "attn.hook_v", attn.v_proj, shape=(G, d))
        keep(b + "attn.hook_z", attn.o_proj, pre=True, shape=(H, d))
        keep(b + "hook_attn_out", layer.post_attention_layernorm if post else attn.o_proj)
        keep(
            b + "hook_resid_mid",
            layer.pre_feedforward_layernorm if post else layer.post_attention_layernorm,
            pre=True,
        )
        keep(
            b + "ln2.normed",
            layer.pre_feedforward_layernorm if post else layer.post_attention_layernorm,
        )
        keep(b + "mlp.hook_pre", mlp.gate_proj)
        keep(b + "mlp.hook_pre_linear", mlp.up_proj)
        keep(b + "mlp.hook_post", mlp.down_proj, pre=True)
        keep(b + "hook_mlp_out", layer.post_feedforward_layernorm if post else mlp)
        keep(b + "hook_resid_post", layer)
    keep("final.normed", model.model.norm)
    keep("hook_embed", model.model.embed_tokens)
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_attentions=True)
    for h in handles:
        h.remove()
    for l, pattern in enumerate(out.attentions):
        sites[f"blocks.{l}.attn.hook_pattern"] = pattern[0]
    return sites, out.logits[0]


def with_gains(ref, sites):
    """The oracle's sites plus `hook_normalized * gain`, which is what
    transformers' norms return.
    """
    sites = dict(sites)
    gain = lambda name: ref.w[name] + ref.facts.norm_offset
    for l in range(ref.facts.n_layers):
        second = "pre_feedforward_layernorm" if ref.facts.post_norms else "post_attention_layernorm"
        for ln, weight in (("ln1", "input_layernorm"), ("ln2", second)):
            sites[f"blocks.{l}.{ln}.normed"] = sites[f"blocks.{l}.{ln}.hook_normalized"] * gain(
                f"model.layers.{l}.{weight}.weight"
            )
    sites["final.normed"] = sites["ln_final.hook_normalized"] * gain("model.norm.weight")
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
    for change in ("window", "rope", "attn_softcap", "final_softcap", "norm_offset"):
        value = getattr(f, change)
        if change == "rope":
            other = [(freq * 1.1, factor) for freq, factor in value]
        elif change == "window":
            other = [0] * len(value)
        else:
            other = 0.0
        if change != "rope" and other == value:
            continue
        setattr(f, change, other)
        try:
            assert share(ref.forward(tokens, keep=False).logits, logits)[0] > 1e-2, (
                f"{name}: {change} makes no difference"
            )
        finally:
            setattr(f, change, value)
    patterns = torch.stack([row.sites[f"blocks.{l}.attn.hook_pattern"] for l in range(f.n_layers)])
    assert patterns.amax(-1).mean() > 0.15
    assert torch.allclose(patterns.sum(-1), torch.ones((), dtype=torch.float64))
    # a head's part of the output, summed, is the output before bias and post-norm
    for l in range(f.n_layers):
        z, result = row.sites[f"blocks.{l}.attn.hook_z"], row.sites[f"blocks.{l}.attn.hook_result"]
        flat = z.reshape(len(tokens), -1) @ ref.w[f"model.layers.{l}.self_attn.o_proj.weight"].T
        assert torch.allclose(result.sum(1), flat, atol=1e-11)


def at(positions, function):
    """`function` at these positions, nothing elsewhere."""

    def change(x):
        mask = torch.zeros(x.shape[1], 1, dtype=torch.bool)
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


def edit_cases(ref, model, s, rng):
    """(edits, the same as hooks on transformers' modules)"""
    f, d, layers = ref.facts, ref.facts.d_head, model.model.layers
    post, mid = f.post_norms, layers[1]
    u = torch.tensor(s / np.linalg.norm(s))
    project = lambda x: x - (x @ u)[..., None] * u
    added = lambda a: lambda x: x + a * torch.tensor(s)
    head = rng.standard_normal(d)
    other = torch.tensor(rng.standard_normal((2, f.d_mlp)))
    attn_out = [x.post_attention_layernorm if post else x.self_attn.o_proj for x in layers]
    mlp_out = [x.post_feedforward_layernorm if post else x.mlp for x in layers]
    second = mid.pre_feedforward_layernorm if post else mid.post_attention_layernorm
    every = [(x, "pre", project) for x in layers]
    every += [(x, "post", project) for x in [*attn_out, *mlp_out]]
    one_head = written((0, slice(5, 9), slice(d, 2 * d)), torch.tensor(head))
    even = slice(0, None, 2)
    return [
        ([Steer(Vector(s, 1), -0.7)], [(mid, "pre", added(-0.7))]),
        (
            [Steer(Vector(s, 1), 0.7, positions=slice(-4, None))],
            [(mid, "pre", at(slice(17, None), added(0.7)))],
        ),
        ([Ablate(s)], every),
        (
            [Set("blocks.1.attn.hook_z", head, positions=slice(5, 9), heads=[1])],
            [(mid.self_attn.o_proj, "pre", one_head)],
        ),
        (
            [Set("blocks.1.mlp.hook_post", other, positions=[-3, 3])],
            [(mid.mlp.down_proj, "pre", written((0, [18, 3]), other))],
        ),
        (
            [Scale("blocks.1.attn.hook_v", 0.5), Add("blocks.1.attn.hook_v", 0.25)],
            [(mid.self_attn.v_proj, "post", lambda x: x * 0.5 + 0.25)],
        ),
        (
            [Add("blocks.1.attn.hook_q", 0.7)],
            [(mid.self_attn.q_proj, "post", lambda x: x + 0.7)],
        ),
        ([Scale("blocks.1.ln2.hook_normalized", 0.5)], [(second, "post", lambda x: x * 0.5)]),
        (
            [Scale("blocks.1.ln1.hook_scale", 2.0, positions=even)],
            [(mid.input_layernorm, "post", at(even, lambda x: x * 0.5))],
        ),
    ]


@pytest.mark.parametrize("name", ["llama3", "llama_bias", "gemma2", "gemma3", "qwen2"])
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


def without_steering(module, norm, s, coefficient, eps, offset):
    """Hooks that take the steering vector, as the norm passes it on, out of `module`'s input."""
    held = {}

    def keep_scale(x):
        held["scale"] = torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
        return x

    gain = norm.weight + offset
    return [
        (norm, "pre", keep_scale),
        (module, "pre", lambda x: x - coefficient * s * gain / held["scale"]),
    ]


def freezing_hooks(ref, model, base, s, layer, coefficient):
    """(freeze, ablate) -> hooks on transformers' modules; base: the base run's sites."""
    f, layers = ref.facts, model.model.layers
    post, later = f.post_norms, range(layer, f.n_layers)
    second = lambda l: (
        layers[l].pre_feedforward_layernorm if post else layers[l].post_attention_layernorm
    )
    added = lambda l: layers[l].post_feedforward_layernorm if post else layers[l].mlp

    def replace(site, module):
        return module, "post", lambda out: base[site].reshape(out.shape)

    def minus(module, norm):
        return without_steering(module, norm, s, coefficient, f.eps, f.norm_offset)

    def frozen(l, name):
        attn = layers[l].self_attn
        return replace(f"blocks.{l}.attn.hook_{name}", getattr(attn, f"{name}_proj"))

    changes = {
        ("qk", None): [frozen(l, name) for l in later for name in "qk"],
        ("ov", None): [frozen(l, "v") for l in later],
        ("mlp", None): [replace(f"blocks.{l}.hook_mlp_out", added(l)) for l in later],
        (None, "svv"): [
            c for l in later for c in minus(layers[l].self_attn.v_proj, layers[l].input_layernorm)
        ],
        (None, "mlp_direct"): [c for l in later for c in minus(layers[l].mlp, second(l))],
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
        steering = (model.model.layers[layer], "pre", lambda x: x + coefficient * s)
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
