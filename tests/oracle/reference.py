"""An independent forward pass in torch float64, written from docs/method.md and TransformerLens'
definitions of its hook points.

It shares no code with the engine or with transformers. It reads config.json and model.safetensors
itself, works on one row of tokens without padding, keeps the value of every site, and knows edits,
frozen runs and ablations. test_oracle.py compares it with transformers. Nothing is changed in
place, so that autograd can go through it.

    ref = Reference(folder)
    row = ref.forward(tokens, edits=[...], prompt_length=n)
    row.sites[name], row.logits, row.touched
    ref.generate(tokens, 24, edits=[...], freeze="qk")
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .config import read_facts
from .weights import read_weights

torch.set_num_threads(1)  # float64 sums do not depend on the number of cores


# -- edits -----------------------------------------------------------------------------------------
#
# They have the names and fields of vksteer's edits, and only these are read: either may be passed.


@dataclass(frozen=True, eq=False)
class Vector:
    direction: Any
    layer: int


@dataclass(frozen=True, eq=False)
class Steer:
    vector: Any
    coefficient: float = 1.0
    positions: Any = None


@dataclass(frozen=True, eq=False)
class Ablate:
    vector: Any
    sites: Any = None
    positions: Any = None


@dataclass(frozen=True, eq=False)
class Set:
    site: str
    values: Any
    positions: Any = None
    heads: Any = None


@dataclass(frozen=True, eq=False)
class Add:
    site: str
    values: Any
    positions: Any = None
    heads: Any = None


@dataclass(frozen=True, eq=False)
class Scale:
    site: str
    factor: Any
    positions: Any = None
    heads: Any = None


@dataclass(frozen=True, eq=False)
class MeanAblate:
    site: str
    mean: Any
    positions: Any = None
    heads: Any = None


ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x: torch.where(x > 0, x, 0.0),
    "relu2": lambda x: torch.where(x > 0, x, 0.0) ** 2,
}

ABLATE_SITES = ("blocks.*.hook_resid_pre", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")


def selected(positions, prompt_length, n):
    """The token indices that `positions` selects, in its order, among `n` tokens of which the
    first `prompt_length` are the prompt.
    """
    if positions is None:
        return list(range(n))
    if isinstance(positions, str):
        return {
            "prompt": list(range(min(prompt_length, n))),
            "response": list(range(prompt_length, n)),
        }[positions]
    place = lambda p: p if p >= 0 else prompt_length + p
    if isinstance(positions, slice):
        start = 0 if positions.start is None else max(place(positions.start), 0)
        stop = n if positions.stop is None else min(max(place(positions.stop), 0), n)
        return list(range(start, stop, positions.step or 1))
    return [place(int(p)) for p in positions if 0 <= place(int(p)) < n]


def is_pattern(site):
    return site.endswith(("hook_pattern", "hook_attn_scores"))


# -- one row ---------------------------------------------------------------------------------------


@dataclass
class Row:
    logits: torch.Tensor  # [S, V]
    sites: dict = field(default_factory=dict)  # name -> tensor without the batch axis
    touched: list = field(default_factory=list)  # per edit: how many tokens it changed
    # What a frozen run takes from its base run, by ("q" | "k" | "v" | "mlp", layer).
    store: dict = field(default_factory=dict)


class Reference:
    def __init__(self, folder, dtype=torch.float64):
        self.facts = read_facts(folder)
        self.dtype = dtype
        self.w = read_weights(folder, self.facts, dtype)
        self.embed = self.w["model.embed_tokens.weight"]
        self.unembed = self.w.get("lm_head.weight", self.embed)

    def site_names(self):
        """The names of all sites, in the order of the forward pass."""
        f, names = self.facts, ["hook_embed"]
        if "model.embed_positions.weight" in self.w:
            names.append("hook_pos_embed")
        norm = lambda name, there: (
            [f"{name}.hook_scale", f"{name}.hook_normalized"] if there else []
        )
        for l in range(f.n_layers):
            names += [
                f"blocks.{l}.{s}"
                for s in [
                    "hook_resid_pre",
                    *norm("ln1", f.pre_norms),
                    "attn.hook_q",
                    "attn.hook_k",
                    "attn.hook_v",
                    *(["attn.hook_rot_q", "attn.hook_rot_k"] if f.rope[l] else []),
                    "attn.hook_attn_scores",
                    "attn.hook_pattern",
                    "attn.hook_z",
                    "attn.hook_result",
                    *norm("ln1_post", f.post_norms),
                    "hook_attn_out",
                    *([] if f.parallel else ["hook_resid_mid"]),
                    *norm("ln2", f.pre_norms),
                    "mlp.hook_pre",
                    *(["mlp.hook_pre_linear"] if f.gated else []),
                    "mlp.hook_post",
                    *norm("ln2_post", f.post_norms),
                    "hook_mlp_out",
                    "hook_resid_post",
                ]
            ]
        return names + norm("ln_final", True)

    def forward(
        self,
        tokens,
        *,
        edits=(),
        prompt_length=None,
        freeze=None,
        ablate=None,
        hooks=None,
        keep=True,
    ):
        """Runs one row. hooks: {site: function(value) -> value}, called after the edits (for
        gradients and patches).
        """
        edits = list(edits)
        n = len(tokens)
        prompt_length = n if prompt_length is None else prompt_length
        base = steer = None
        if freeze or ablate:
            steers = [e for e in edits if type(e).__name__ == "Steer"]
            assert len(steers) == 1, "frozen runs need exactly one Steer"
            steer = steers[0]
        if freeze:
            base = self.forward(
                tokens,
                edits=[e for e in edits if e is not steer],
                prompt_length=prompt_length,
                keep=False,
            ).store
        return _Pass(
            self, tokens, edits, prompt_length, freeze, ablate, steer, base, hooks or {}, keep
        ).run()

    def generate(self, tokens, n_new, *, edits=(), freeze=None, ablate=None, eos=()):
        """Greedy decoding without a cache: for every new token, the row and its base run are
        computed again from the first token. Returns (new tokens, top-1 margins).
        """
        tokens, prompt_length, margins = list(map(int, tokens)), len(tokens), []
        for _ in range(n_new):
            with torch.no_grad():
                last = self.forward(
                    tokens,
                    edits=edits,
                    prompt_length=prompt_length,
                    freeze=freeze,
                    ablate=ablate,
                    keep=False,
                ).logits[-1]
            top = torch.topk(last, 2)
            margins.append(float(top.values[0] - top.values[1]))
            tokens.append(int(top.indices[0]))
            if tokens[-1] in eos:
                break
        return tokens[prompt_length:], margins


class _Pass:
    def __init__(self, ref, tokens, edits, prompt_length, freeze, ablate, steer, base, hooks, keep):
        self.ref, self.f, self.edits, self.hooks, self.keep = ref, ref.facts, edits, hooks, keep
        self.tokens = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        self.n, self.prompt_length = len(self.tokens), prompt_length
        self.freeze, self.ablate, self.steer, self.base = freeze, ablate, steer, base
        self.row = Row(
            None, touched=[len(selected(e.positions, prompt_length, self.n)) for e in edits]
        )

    def site(self, name, x, masked=None):
        """The value of a site after edits in their order, then after hooks; kept if asked for."""
        for e in self.edits:
            x = self.edit(e, name, x)
        # A masked key stays masked, whatever an edit wrote there.
        if masked is not None:
            x = torch.where(
                masked, torch.full_like(x, float("-inf") if name.endswith("scores") else 0.0), x
            )
        if name in self.hooks:
            x = self.hooks[name](x)
        if self.keep:
            self.row.sites[name] = x
        return x

    def tensor(self, values):
        values = getattr(values, "direction", values)
        return (
            values
            if isinstance(values, torch.Tensor)
            else torch.as_tensor(np.asarray(values, dtype=np.float64)).to(self.ref.dtype)
        )

    def edit(self, e, name, x):
        kind = type(e).__name__
        if kind == "Steer":
            if name != f"blocks.{e.vector.layer}.hook_resid_pre":
                return x
            change = lambda part: part + e.coefficient * self.tensor(e.vector)
        elif kind == "Ablate":
            patterns = (
                ABLATE_SITES
                if e.sites is None
                else [e.sites]
                if isinstance(e.sites, str)
                else e.sites
            )
            if not any(fnmatch.fnmatchcase(name, p) for p in patterns):
                return x
            u = self.tensor(e.vector)
            u = u / u.norm()
            change = lambda part: part - (part @ u)[..., None] * u
        else:
            if not fnmatch.fnmatchcase(name, e.site):
                return x
            change = {
                "Set": lambda part: self.tensor(e.values).expand_as(part),
                "Add": lambda part: part + self.tensor(e.values),
                "Scale": lambda part: part * self.tensor(e.factor),
                "DynamicScale": lambda part: (
                    part
                    * (1 + e.factor * (part @ self.tensor(e.w))[:, None] / part.shape[-1] ** 0.5)
                ),
                "MeanAblate": lambda part: self.tensor(e.mean).expand_as(part),
            }[kind]
        # The selected slice in the layout of the site: [position, head, ...], or
        # [head, query, key] for scores and pattern.
        index = [torch.arange(s) for s in x.shape]
        index[1 if is_pattern(name) else 0] = torch.tensor(
            selected(e.positions, self.prompt_length, self.n), dtype=torch.long
        )
        if getattr(e, "heads", None) is not None:
            heads = [e.heads] if isinstance(e.heads, (int, np.integer)) else list(e.heads)
            index[0 if is_pattern(name) else 1] = torch.tensor(heads, dtype=torch.long)
        if any(len(i) == 0 for i in index):
            return x
        grid = torch.meshgrid(*index, indexing="ij")
        return x.index_put(grid, change(x[grid]))

    def spread(self, x):
        """(what is divided by the scale, the scale [..., 1]) of a norm over the last axis."""
        if self.f.norm == "layer":
            x = x - x.mean(-1, keepdim=True)
        return x, torch.sqrt((x * x).mean(-1, keepdim=True) + self.f.eps)

    def norm(self, name, x, weight):
        """A norm with its two sites. Returns (scale [S, 1], input of the next projection
        [S, D], gain [D]).
        """
        gain = self.ref.w[weight + ".weight"] + self.f.norm_offset
        x, scale = self.spread(x)
        scale = self.site(name + ".hook_scale", scale)
        normed = self.site(name + ".hook_normalized", x / scale)
        return scale, normed * gain + self.ref.w.get(weight + ".bias", 0.0), gain

    def pre_norm(self, name, x, weight):
        """`norm`, or with norms after only the stream itself with a scale and a gain of 1."""
        if self.f.pre_norms:
            return self.norm(name, x, weight)
        return torch.ones_like(x[:, :1]), x, torch.ones_like(x[0])

    def linear(self, name, x):
        y = x @ self.ref.w[name + ".weight"].T
        bias = self.ref.w.get(name + ".bias")
        return y if bias is None else y + bias

    def rotate(self, x, layer, query):
        """Rotates the first channels of every head: [S, heads, d_head]."""
        f = self.f
        long = f.rope_long and self.n > f.rope_switch
        freq, factor = (f.rope_long if long else f.rope)[layer]
        place = torch.arange(self.n, dtype=torch.float64)
        if query and f.query_beta:
            factor = factor * (1 + f.query_beta * torch.log1p(torch.floor(place / f.query_length)))
            factor = factor[:, None]
            passed = factor[..., None]
        else:
            passed = 1.0
        angle = place[:, None] * freq
        cos, sin = ((g(angle) * factor).to(x.dtype)[:, None, :] for g in (torch.cos, torch.sin))
        x, rest = x[..., : 2 * len(freq)], x[..., 2 * len(freq) :]
        pairs = x.unflatten(-1, (-1, 2) if f.rope_interleaved else (2, -1))
        a, b = pairs.unbind(-1 if f.rope_interleaved else -2)
        turned = torch.stack(
            [a * cos - b * sin, b * cos + a * sin], dim=-1 if f.rope_interleaved else -2
        )
        return torch.cat([turned.flatten(-2), rest * passed], dim=-1)

    def head_norm(self, x, weight):
        """The norm of queries or keys [S, heads, d_head]: of each head, or over all of them."""
        gain = self.ref.w[weight + ".weight"] + self.f.norm_offset
        if self.f.qk_norm == "wide":
            flat = x.flatten(1)
            return (flat / self.spread(flat)[1] * gain).view(x.shape)
        x, scale = self.spread(x)
        return x / scale * gain + self.ref.w.get(weight + ".bias", 0.0)

    def without_steering(self, which, layer, x, scale, gain):
        """docs/method.md section 6: minus a*s*gain/scale where the Steer acts,
        from its layer on.
        """
        if self.ablate != which or layer < self.steer.vector.layer:
            return x
        acts = torch.zeros(self.n, 1, dtype=x.dtype)
        acts[selected(self.steer.positions, self.prompt_length, self.n)] = 1.0
        s = self.tensor(self.steer.vector)
        if self.f.norm == "layer":  # what the norm passes on of it
            s = s - s.mean()
        return x - acts * (self.steer.coefficient * s * gain / scale)

    def frozen(self, which, part, layer, x):
        """The value of the base run where this run is frozen, else x; either is kept for a run
        that has this one as its base.
        """
        if self.freeze == which and layer >= self.steer.vector.layer:
            x = self.base[part, layer]
        self.row.store[part, layer] = x
        return x

    def attention(self, l, x):
        f, block, hf = self.f, f"blocks.{l}.", f"model.layers.{l}."
        n, H, G, d = self.n, f.n_heads, f.n_kv_heads, f.d_head
        scale, normed, gain = self.pre_norm(block + "ln1", x, hf + "input_layernorm")
        attn = hf + "self_attn."
        clip = (lambda t: t.clamp(-f.clip_qkv, f.clip_qkv)) if f.clip_qkv else lambda t: t
        heads = lambda name, x, n_heads: self.site(
            f"{block}attn.hook_{name}",
            clip(self.linear(f"{attn}{name}_proj", x)).view(n, n_heads, d),
        )
        q, k = heads("q", normed, H), heads("k", normed, G)
        v = heads("v", self.without_steering("svv", l, normed, scale, gain), G)
        if f.qk_norm:
            q, k = self.head_norm(q, attn + "q_norm"), self.head_norm(k, attn + "k_norm")
        if f.rope[l]:
            q = self.site(block + "attn.hook_rot_q", self.rotate(q, l, query=True))
            k = self.site(block + "attn.hook_rot_k", self.rotate(k, l, query=False))
        q, k, v = (
            self.frozen("qk", "q", l, q),
            self.frozen("qk", "k", l, k),
            self.frozen("ov", "v", l, v),
        )

        k, v = (t.repeat_interleave(H // G, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * f.attn_scale
        if f.attn_softcap:
            scores = f.attn_softcap * torch.tanh(scores / f.attn_softcap)
        query, key = torch.arange(n)[:, None], torch.arange(n)[None, :]
        masked = (key > query) if not f.window[l] else (key > query) | (key <= query - f.window[l])
        masked = masked.expand(H, n, n)
        scores = self.site(
            block + "attn.hook_attn_scores", torch.where(masked, float("-inf"), scores), masked
        )
        pattern = self.site(block + "attn.hook_pattern", torch.softmax(scores, dim=-1), masked)
        z = self.site(block + "attn.hook_z", torch.einsum("hqk,khd->qhd", pattern, v))
        w_o = self.ref.w[attn + "o_proj.weight"].view(f.d_model, H, d)
        result = f.residual_scale * torch.einsum("qhd,mhd->qhm", z, w_o)
        result = self.site(block + "attn.hook_result", result)
        out = result.sum(dim=1)
        bias = self.ref.w.get(attn + "o_proj.bias")
        out = out if bias is None else out + f.residual_scale * bias
        if f.post_norms:
            out = self.norm(block + "ln1_post", out, hf + "post_attention_layernorm")[1]
        return self.site(block + "hook_attn_out", out)

    def mlp(self, l, x):
        f, block, hf = self.f, f"blocks.{l}.", f"model.layers.{l}."
        weight = "pre_feedforward_layernorm" if f.post_norms else "post_attention_layernorm"
        scale, normed, gain = self.pre_norm(block + "ln2", x, hf + weight)
        normed = self.without_steering("mlp_direct", l, normed, scale, gain)
        up = self.linear(hf + "mlp.up_proj", normed)
        if f.gated:
            gate = self.site(block + "mlp.hook_pre", self.linear(hf + "mlp.gate_proj", normed))
            post = ACTIVATIONS[f.act](gate) * self.site(block + "mlp.hook_pre_linear", up)
        else:
            post = ACTIVATIONS[f.act](self.site(block + "mlp.hook_pre", up))
        post = self.site(block + "mlp.hook_post", post)
        out = f.residual_scale * self.linear(hf + "mlp.down_proj", post)
        if f.post_norms:
            out = self.norm(block + "ln2_post", out, hf + "post_feedforward_layernorm")[1]
        # What the base run added to the residual stream, its edits included.
        if self.freeze == "mlp" and l >= self.steer.vector.layer:
            out = self.base["mlp", l]
            self.row.sites[block + "hook_mlp_out"] = out
        else:
            out = self.site(block + "hook_mlp_out", out)
        self.row.store["mlp", l] = out
        return out

    def run(self):
        f, w = self.f, self.ref.w
        x = self.site("hook_embed", self.ref.embed[self.tokens] * f.embed_scale)
        if "model.embed_positions.weight" in w:
            places = w["model.embed_positions.weight"][: self.n]
            x = x + self.site("hook_pos_embed", places)
        for l in range(f.n_layers):
            before = x = self.site(f"blocks.{l}.hook_resid_pre", x)
            x = x + self.attention(l, before)
            if f.parallel:
                x = x + self.mlp(l, before)
            else:
                x = self.site(f"blocks.{l}.hook_resid_mid", x)
                x = x + self.mlp(l, x)
            x = self.site(f"blocks.{l}.hook_resid_post", x)
        _, normed, _ = self.norm("ln_final", x, "model.norm")
        logits = f.logit_scale * (normed @ self.ref.unembed.T + w.get("lm_head.bias", 0.0))
        if f.final_softcap:
            logits = f.final_softcap * torch.tanh(logits / f.final_softcap)
        self.row.logits = logits
        return self.row
