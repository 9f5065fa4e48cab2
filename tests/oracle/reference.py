"""An independent forward pass in torch float64, written from the project's method page and
TransformerLens' definitions of its hook points.

It shares no code with the engine or with transformers: it reads config.json and model.safetensors
itself, works on one row of real tokens at a time (so there is no padding to get wrong), keeps every
site, and knows the edits, the frozen runs and the ablations. test_oracle.py compares it with
transformers. Nothing is changed in place: autograd can go through it.

    ref = Reference(folder)
    row = ref.forward(tokens, edits=[...], prompt_length=n)         # row.sites[name], row.logits
    [S,V], row.touched ref.generate(tokens, 24, edits=[...], freeze="qk")              # greedy,
    everything run again from the first token for every new token
"""

from __future__ import annotations

import fnmatch
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

torch.set_num_threads(1)  # the tests share two cores with people who measure


# -- edits, with the fields of vksteer's own (which may be passed instead: only names and fields are
# read) --------------------------------


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


ABLATE_SITES = ("blocks.*.hook_resid_pre", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out")


def selected(positions, prompt_length, n):
    """The row's token indices that `positions` names, in its order, among `n` tokens of which the
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


# -- the architecture ------------------------------------------------------------------------------


@dataclass
class Facts:
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    eps: float
    norm_offset: float
    embed_scale: float
    attn_scale: float
    attn_softcap: float
    final_softcap: float
    act: str
    post_norms: bool
    qk_norm: bool
    window: list
    rope: list  # per layer: (inv_freq float64 tensor [d_head/2], attention_factor)


def rope_table(rope, d_head, max_positions):
    """Inverse frequencies from their published definitions. rope: theta, type and
    the scaling's own keys.
    """
    theta = rope["rope_theta"]
    kind = rope.get("rope_type") or rope.get("type") or "default"
    i = torch.arange(d_head // 2, dtype=torch.float64)
    freq = theta ** (-2.0 * i / d_head)
    if kind == "default":
        return freq, 1.0
    factor = float(rope["factor"])
    if kind == "linear":
        return freq / factor, 1.0
    original = rope.get("original_max_position_embeddings") or max_positions
    # Llama 3.1: long waves are stretched by `factor`, short ones kept, blended between
    if kind == "llama3":
        turns = original * freq / (2 * math.pi)
        blend = (
            (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        ).clamp(0, 1)
        return freq * ((1 - blend) / factor + blend), 1.0
    if kind == "yarn":  # Peng et al. 2023, with the correction range rounded outwards
        at = lambda turns: (
            d_head * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )
        low, high = at(rope.get("beta_fast") or 32), at(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d_head - 1)
        ramp = ((i - low) / ((high - low) or 0.001)).clamp(0, 1)
        attention = rope.get("attention_factor")
        if attention is None:
            scale = lambda m: 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
            m, m_all = rope.get("mscale"), rope.get("mscale_all_dim")
            attention = scale(m) / scale(m_all) if m and m_all else scale(1)
        return freq * (ramp / factor + (1 - ramp)), attention
    raise NotImplementedError(kind)


def read_facts(folder):
    c = json.loads((Path(folder) / "config.json").read_text())
    kind = c["model_type"]
    gemma = kind.startswith("gemma")
    n = c["num_hidden_layers"]
    d_head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]

    types = c.get("layer_types")
    window = c.get("sliding_window")
    if types is not None:
        slides = [t == "sliding_attention" for t in types]
    elif kind == "mistral":
        slides = [True] * n
    elif kind == "gemma2":
        slides = [i % 2 == 0 for i in range(n)]
    elif kind == "gemma3_text":
        slides = [(i + 1) % c.get("sliding_window_pattern", 6) != 0 for i in range(n)]
    else:
        slides = [
            bool(c.get("use_sliding_window")) and i >= c["max_window_layers"] for i in range(n)
        ]
    windows = [window if s and window else 0 for s in slides]

    positions = c["max_position_embeddings"]
    stored = c.get("rope_parameters")
    if kind == "gemma3_text":
        if stored is None:
            full = dict(c.get("rope_scaling") or {}, rope_theta=c["rope_theta"])
            stored = {
                "full_attention": full,
                "sliding_attention": {"rope_theta": c["rope_local_base_freq"]},
            }
        tables = {k: rope_table(v, d_head, positions) for k, v in stored.items()}
        rope = [tables["sliding_attention" if s else "full_attention"] for s in slides]
    else:
        if stored is None:
            stored = dict(c.get("rope_scaling") or {}, rope_theta=c.get("rope_theta", 10000.0))
        rope = [rope_table(stored, d_head, positions)] * n
    return Facts(
        n_layers=n,
        d_model=c["hidden_size"],
        n_heads=c["num_attention_heads"],
        n_kv_heads=c["num_key_value_heads"],
        d_head=d_head,
        d_mlp=c["intermediate_size"],
        d_vocab=c["vocab_size"],
        eps=c["rms_norm_eps"],
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=math.sqrt(c["hidden_size"]) if gemma else 1.0,
        attn_scale=(c["query_pre_attn_scalar"] if gemma else d_head) ** -0.5,
        attn_softcap=c.get("attn_logit_softcapping") or 0.0,
        final_softcap=c.get("final_logit_softcapping") or 0.0,
        act="gelu_tanh" if gemma else "silu",
        post_norms=gemma,
        qk_norm=kind in ("qwen3", "gemma3_text"),
        window=windows,
        rope=rope,
    )


# -- one row ---------------------------------------------------------------------------------------


@dataclass
class Row:
    logits: torch.Tensor  # [S, V]
    sites: dict = field(default_factory=dict)  # name -> tensor without the batch axis
    touched: list = field(default_factory=list)  # per edit: how many tokens it changed
    # what a frozen run takes from its base run: ("q"|"k"|"v"|"mlp", layer)
    store: dict = field(default_factory=dict)


class Reference:
    def __init__(self, folder, dtype=torch.float64):
        self.facts = read_facts(folder)
        self.dtype = dtype
        self.w = {
            k: v.to(dtype) for k, v in load_file(str(Path(folder) / "model.safetensors")).items()
        }
        self.embed = self.w["model.embed_tokens.weight"]
        self.unembed = self.w.get("lm_head.weight", self.embed)

    # Names of all sites, in the order of the forward pass.
    def site_names(self):
        f, names = self.facts, ["hook_embed"]
        for l in range(f.n_layers):
            post1 = ["ln1_post.hook_scale", "ln1_post.hook_normalized"] if f.post_norms else []
            post2 = ["ln2_post.hook_scale", "ln2_post.hook_normalized"] if f.post_norms else []
            names += [
                f"blocks.{l}.{s}"
                for s in [
                    "hook_resid_pre",
                    "ln1.hook_scale",
                    "ln1.hook_normalized",
                    "attn.hook_q",
                    "attn.hook_k",
                    "attn.hook_v",
                    "attn.hook_rot_q",
                    "attn.hook_rot_k",
                    "attn.hook_attn_scores",
                    "attn.hook_pattern",
                    "attn.hook_z",
                    "attn.hook_result",
                    *post1,
                    "hook_attn_out",
                    "hook_resid_mid",
                    "ln2.hook_scale",
                    "ln2.hook_normalized",
                    "mlp.hook_pre",
                    "mlp.hook_pre_linear",
                    "mlp.hook_post",
                    *post2,
                    "hook_mlp_out",
                    "hook_resid_post",
                ]
            ]
        return names + ["ln_final.hook_scale", "ln_final.hook_normalized"]

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
        """One row. hooks: {site: function(value) -> value}, called after the edits (for
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
        """Greedy; prefix and base run are computed again from the first token for every new token.
        Returns (new tokens, top-1 margins).
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

    # A value arrives at its site: edits in their order, then hooks, then it is kept.
    def site(self, name, x, masked=None):
        for e in self.edits:
            x = self.edit(e, name, x)
        # what a query may not see stays unseen, whatever an edit wrote there
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
                "MeanAblate": lambda part: self.tensor(e.mean).expand_as(part),
            }[kind]
        # The selected slice, in the site's own layout: [position, head, ...], or [head, query, key]
        # for scores and pattern.
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

    def norm(self, name, x, weight):
        """RMS norm with its two sites. Returns (scale [S,1], what the next projection
        multiplies [S,D], gain [D]).
        """
        gain = self.ref.w[weight] + self.f.norm_offset
        scale = self.site(
            name + ".hook_scale", torch.sqrt((x * x).mean(-1, keepdim=True) + self.f.eps)
        )
        normed = self.site(name + ".hook_normalized", x / scale)
        return scale, normed * gain, gain

    def linear(self, name, x):
        y = x @ self.ref.w[name + ".weight"].T
        bias = self.ref.w.get(name + ".bias")
        return y if bias is None else y + bias

    def rotate(self, x, table):
        freq, factor = table
        angle = torch.arange(self.n, dtype=torch.float64)[:, None] * freq
        cos, sin = ((f(angle) * factor).to(x.dtype)[:, None, :] for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def head_norm(self, x, weight):
        return (
            x
            / torch.sqrt((x * x).mean(-1, keepdim=True) + self.f.eps)
            * (self.ref.w[weight] + self.f.norm_offset)
        )

    def without_steering(self, which, layer, x, scale, gain):
        """method.md section 6: minus a*s*gain/RMS where the Steer acts, from its layer on."""
        if self.ablate != which or layer < self.steer.vector.layer:
            return x
        acts = torch.zeros(self.n, 1, dtype=x.dtype)
        acts[selected(self.steer.positions, self.prompt_length, self.n)] = 1.0
        return x - acts * (self.steer.coefficient * self.tensor(self.steer.vector) * gain / scale)

    def frozen(self, which, part, layer, x):
        """The base run's value where this run is frozen; what a later frozen run may want
        is kept in any case.
        """
        if self.freeze == which and layer >= self.steer.vector.layer:
            x = self.base[part, layer]
        self.row.store[part, layer] = x
        return x

    def attention(self, l, x):
        f, block, hf = self.f, f"blocks.{l}.", f"model.layers.{l}."
        n, H, G, d = self.n, f.n_heads, f.n_kv_heads, f.d_head
        scale, normed, gain = self.norm(block + "ln1", x, hf + "input_layernorm.weight")
        attn = hf + "self_attn."
        q = self.site(block + "attn.hook_q", self.linear(attn + "q_proj", normed).view(n, H, d))
        k = self.site(block + "attn.hook_k", self.linear(attn + "k_proj", normed).view(n, G, d))
        v = self.site(
            block + "attn.hook_v",
            self.linear(attn + "v_proj", self.without_steering("svv", l, normed, scale, gain)).view(
                n, G, d
            ),
        )
        if f.qk_norm:
            q, k = (
                self.head_norm(q, attn + "q_norm.weight"),
                self.head_norm(k, attn + "k_norm.weight"),
            )
        q = self.site(block + "attn.hook_rot_q", self.rotate(q, f.rope[l]))
        k = self.site(block + "attn.hook_rot_k", self.rotate(k, f.rope[l]))
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
        result = self.site(block + "attn.hook_result", torch.einsum("qhd,mhd->qhm", z, w_o))
        out = result.sum(dim=1)
        bias = self.ref.w.get(attn + "o_proj.bias")
        out = out if bias is None else out + bias
        if f.post_norms:
            out = self.norm(block + "ln1_post", out, hf + "post_attention_layernorm.weight")[1]
        return self.site(block + "hook_attn_out", out)

    def mlp(self, l, x):
        f, block, hf = self.f, f"blocks.{l}.", f"model.layers.{l}."
        weight = (
            "pre_feedforward_layernorm.weight"
            if f.post_norms
            else "post_attention_layernorm.weight"
        )
        scale, normed, gain = self.norm(block + "ln2", x, hf + weight)
        normed = self.without_steering("mlp_direct", l, normed, scale, gain)
        gate = self.site(block + "mlp.hook_pre", self.linear(hf + "mlp.gate_proj", normed))
        up = self.site(block + "mlp.hook_pre_linear", self.linear(hf + "mlp.up_proj", normed))
        if f.act == "silu":
            act = gate * torch.sigmoid(gate)
        else:
            act = (
                0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
            )
        out = self.linear(hf + "mlp.down_proj", self.site(block + "mlp.hook_post", act * up))
        if f.post_norms:
            out = self.norm(block + "ln2_post", out, hf + "post_feedforward_layernorm.weight")[1]
        # what the base run added to the stream, its edits included
        if self.freeze == "mlp" and l >= self.steer.vector.layer:
            out = self.base["mlp", l]
            self.row.sites[block + "hook_mlp_out"] = out
        else:
            out = self.site(block + "hook_mlp_out", out)
        self.row.store["mlp", l] = out
        return out

    def run(self):
        f = self.f
        x = self.site("hook_embed", self.ref.embed[self.tokens] * f.embed_scale)
        for l in range(f.n_layers):
            x = self.site(f"blocks.{l}.hook_resid_pre", x)
            x = self.site(f"blocks.{l}.hook_resid_mid", x + self.attention(l, x))
            x = self.site(f"blocks.{l}.hook_resid_post", x + self.mlp(l, x))
        _, normed, _ = self.norm("ln_final", x, "model.norm.weight")
        logits = normed @ self.ref.unembed.T
        if f.final_softcap:
            logits = f.final_softcap * torch.tanh(logits / f.final_softcap)
        self.row.logits = logits
        return self.row
