"""Where transformers' modules compute the oracle's sites, for every family: what enters or leaves
which module, and which part of it. Values are gathered and changed with forward hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tap:
    """A value that enters ("pre") or leaves ("post") a module, or a part of it."""

    module: Any
    when: str
    part: Any = None  # function(value) -> view of the part; None: all of it
    scale: float = 1.0  # the site's value is this times the module's

    def get(self, x):
        x = x if self.part is None else self.part(x)
        return x if self.scale == 1.0 else self.scale * x  # a view, where it can be one

    def change(self, function):
        """The hook, as `hooked` takes it, that puts function(site's value) in its place."""

        def changed(x):
            new = function(self.get(x)) / self.scale
            if self.part is None:
                return new
            y = x.clone()
            self.part(y).copy_(new)
            return y

        return self.module, self.when, changed


def hooked(module, when, change):
    """The handle of a hook that replaces what enters ("pre") or leaves ("post") a module."""
    first = lambda x: x[0] if isinstance(x, tuple) else x
    if when == "post":

        def after(m, args, out):
            new = change(first(out))
            return (new, *out[1:]) if isinstance(out, tuple) and new is not None else new

        return module.register_forward_hook(after)

    def before(m, args, kwargs):
        new = change(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, dict(kwargs, hidden_states=new)

    return module.register_forward_pre_hook(before, with_kwargs=True)


def _first(module, *names):
    """The first of these attributes, each a path with dots, that the module has."""
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


class Layer:
    """The taps of one layer."""

    def __init__(self, layer, config):
        self.layer, c = layer, config
        H = c.num_attention_heads
        G = getattr(c, "num_key_value_heads", None) or H
        attn = _first(layer, "self_attn", "attn", "attention")
        self.d = d = getattr(c, "head_dim", None) or c.hidden_size // H
        added = getattr(c, "residual_multiplier", 1.0)
        mlp = _first(layer, "mlp")
        down = _first(layer, "mlp.down_proj", "mlp.dense_4h_to_h", "mlp.c_proj", "mlp.fc_out")
        down = down or _first(layer, "mlp.fc2", "fc2")
        up = _first(layer, "mlp.up_proj", "mlp.dense_h_to_4h", "mlp.c_fc", "mlp.fc_in", "mlp.fc1")
        up = up or _first(layer, "fc1", "mlp.gate_up_proj")
        self.o_proj = _first(attn, "o_proj", "dense", "c_proj", "out_proj")
        self.resid_pre, self.resid_post = Tap(layer, "pre"), Tap(layer, "post")

        first = _first(layer, "input_layernorm", "ln_1", "self_attn_layer_norm")
        post = _first(layer, "post_self_attn_layernorm")  # GLM 4, whose names differ
        if post is not None:
            second, post_mlp = layer.post_attention_layernorm, layer.post_mlp_layernorm
        elif hasattr(layer, "post_feedforward_layernorm"):
            post, post_mlp = layer.post_attention_layernorm, layer.post_feedforward_layernorm
            second = _first(layer, "pre_feedforward_layernorm")
        else:
            post = post_mlp = None
            second = _first(layer, "post_attention_layernorm", "ln_2", "final_layer_norm")
        self.pre_norms, self.parallel = first is not None, False
        if self.pre_norms and second is None:
            self.parallel = True
        self.parallel |= getattr(c, "use_parallel_residual", False)
        self.mlp_input = Tap(up if mlp is None else mlp, "pre")
        self.attn_input = Tap(attn, "pre")
        self.resid_mid = Tap(second, "pre") if self.pre_norms else self.mlp_input
        self.attn_out = Tap(post or self.o_proj, "post", scale=1.0 if post else added)
        self.mlp_out = Tap(post_mlp or down, "post", scale=1.0 if post_mlp else added)
        self.z, self.post = Tap(self.o_proj, "pre"), Tap(down, "pre")

        self.separate = hasattr(attn, "q_proj")
        if self.separate:
            self.q, self.k, self.v = (Tap(getattr(attn, f"{n}_proj"), "post") for n in "qkv")
        elif hasattr(attn, "query_key_value"):
            parts = [lambda x, i=i: x.unflatten(-1, (H, 3, d))[..., i, :] for i in range(3)]
            self.q, self.k, self.v = (Tap(attn.query_key_value, "post", p) for p in parts)
        else:
            edges = [0, H * d, (H + G) * d, (H + 2 * G) * d]
            parts = [lambda x, i=i: x[..., edges[i] : edges[i + 1]] for i in range(3)]
            whole = _first(attn, "qkv_proj", "c_attn")
            self.q, self.k, self.v = (Tap(whole, "post", p) for p in parts)
        gate = _first(layer, "mlp.gate_proj")
        self.pre, self.pre_linear = Tap(gate or up, "post"), Tap(up, "post") if gate else None
        if hasattr(mlp, "gate_up_proj"):
            self.pre, self.pre_linear = (
                Tap(up, "post", lambda x, i=i: x.chunk(2, -1)[i]) for i in (0, 1)
            )

    def sites(self):
        """{site without the block's name: tap}; "ln1.normed" is what attention reads."""
        sites = {
            "hook_resid_pre": self.resid_pre,
            "attn.hook_q": self.q,
            "attn.hook_k": self.k,
            "attn.hook_v": self.v,
            "attn.hook_z": self.z,
            "hook_attn_out": self.attn_out,
            "mlp.hook_pre": self.pre,
            "mlp.hook_post": self.post,
            "hook_mlp_out": self.mlp_out,
            "hook_resid_post": self.resid_post,
        }
        if self.pre_linear is not None:
            sites["mlp.hook_pre_linear"] = self.pre_linear
        if self.pre_norms:
            sites |= {"ln1.normed": self.attn_input, "ln2.normed": self.mlp_input}
        if not self.parallel:
            sites["hook_resid_mid"] = self.resid_mid
        return sites


class Modules:
    """The taps of a whole model."""

    def __init__(self, model):
        inner = _first(model, "model.decoder", "model", "transformer", "gpt_neox")
        self.layers = [Layer(l, model.config) for l in _first(inner, "layers", "h")]
        self.embed = _first(inner, "embed_tokens", "embed_in", "wte")
        self.positions = _first(inner, "embed_positions", "wpe")
        self.norm = _first(inner, "norm", "final_layernorm", "final_layer_norm", "ln_f")

    def sites(self, config):
        factor = getattr(config, "embedding_multiplier", 1.0)
        sites = {
            f"blocks.{l}.{name}": tap
            for l, layer in enumerate(self.layers)
            for name, tap in layer.sites().items()
        }
        sites |= {
            "final.normed": Tap(self.norm, "post"),
            "hook_embed": Tap(self.embed, "post", scale=factor),
        }
        if self.positions is not None:
            sites["hook_pos_embed"] = Tap(self.positions, "post")
        return sites


def hf_sites(model, tokens, changes=()):
    """Transformers' values at the oracle's sites, gathered with forward hooks. changes: (module,
    "pre"|"post", function(value)), as Tap.change gives them.
    """
    modules, n = Modules(model), len(tokens)
    sites, handles = {}, [hooked(*change) for change in changes]
    d = modules.layers[0].d

    def keep(name, tap):
        heads = name.endswith(("hook_q", "hook_k", "hook_v", "hook_z"))
        shape = (n, -1, d) if heads else (n, -1)

        def gather(x):
            # of OLMo this must be a view: it clips in place what the modules returned
            sites[name] = tap.get(x).reshape(shape).detach()

        handles.append(hooked(tap.module, tap.when, gather))

    for name, tap in modules.sites(model.config).items():
        keep(name, tap)
    with torch.no_grad():
        out = model(torch.tensor([tokens]), output_attentions=True)
    for h in handles:
        h.remove()
    for l, pattern in enumerate(out.attentions):
        sites[f"blocks.{l}.attn.hook_pattern"] = pattern[0]
    return sites, out.logits[0]
