"""The networks of the bundled tiny models. Parameter names are those of transformers'
LlamaForCausalLM and Gemma2ForCausalLM.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_recipe import Recipe
from tiny_tokenizer import SPECIALS
from torch import nn


class Norm(nn.Module):
    def __init__(self, d: int, offset: float):
        super().__init__()
        self.offset = offset
        self.weight = nn.Parameter(torch.full((d,), 1.0 - offset))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight + self.offset, 1e-6)


def linear(n_in: int, n_out: int, std: float) -> nn.Linear:
    layer = nn.Linear(n_in, n_out, bias=False)
    nn.init.normal_(layer.weight, std=std)
    return layer


class Layer(nn.Module):
    """One layer. Gemma adds post-norms, (1 + w) gains, a tanh GELU and soft-capped scores."""

    def __init__(self, r: Recipe):
        super().__init__()
        self.r, self.gemma = r, r.family == "gemma"
        d, q, kv, std = r.d_model, r.n_heads * r.d_head, r.n_kv_heads * r.d_head, r.d_model**-0.5
        out_std = std / math.sqrt(2 * r.n_layers)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": linear(d, q, std),
                "k_proj": linear(d, kv, std),
                "v_proj": linear(d, kv, std),
                "o_proj": linear(q, d, out_std),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": linear(d, r.d_mlp, std),
                "up_proj": linear(d, r.d_mlp, std),
                "down_proj": linear(r.d_mlp, d, out_std),
            }
        )
        offset = float(self.gemma)
        self.input_layernorm = Norm(d, offset)
        self.post_attention_layernorm = Norm(d, offset)
        if self.gemma:
            self.pre_feedforward_layernorm = Norm(d, offset)
            self.post_feedforward_layernorm = Norm(d, offset)

    def attention(self, x, visible, cos, sin):
        r, a, (b, s, _) = self.r, self.self_attn, x.shape
        heads = lambda name, n: a[name](x).view(b, s, n, r.d_head).transpose(1, 2)
        q, k, v = (
            heads("q_proj", r.n_heads),
            heads("k_proj", r.n_kv_heads),
            heads("v_proj", r.n_kv_heads),
        )
        rotate = lambda t: (
            t * cos + torch.cat((-t[..., r.d_head // 2 :], t[..., : r.d_head // 2]), -1) * sin
        )
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(r.n_heads // r.n_kv_heads, 1) for t in (k, v))
        if self.gemma:
            scores = q @ k.transpose(-1, -2) * r.d_head**-0.5
            z = (50 * torch.tanh(scores / 50) + visible).softmax(-1) @ v
        else:
            z = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return a["o_proj"](z.transpose(1, 2).reshape(b, s, -1))

    def feedforward(self, x):
        m, act = self.mlp, (lambda t: F.gelu(t, approximate="tanh")) if self.gemma else F.silu
        return m["down_proj"](act(m["gate_proj"](x)) * m["up_proj"](x))

    def forward(self, h, visible, cos, sin, add):
        if self.gemma:
            h = add(
                h,
                self.post_attention_layernorm(
                    self.attention(self.input_layernorm(h), visible, cos, sin)
                ),
            )
            return add(
                h,
                self.post_feedforward_layernorm(
                    self.feedforward(self.pre_feedforward_layernorm(h))
                ),
            )
        h = add(h, self.attention(self.input_layernorm(h), visible, cos, sin))
        return add(h, self.feedforward(self.post_attention_layernorm(h)))


class Net(nn.Module):
    def __init__(self, r: Recipe):
        super().__init__()
        self.r, self.jolts = r, False
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(r.vocab, r.d_model),
                "layers": nn.ModuleList(Layer(r) for _ in range(r.n_layers)),
                "norm": Norm(r.d_model, float(r.family == "gemma")),
            }
        )
        nn.init.normal_(self.model["embed_tokens"].weight, std=r.embed_std)
        if not r.tied:
            self.lm_head = linear(r.d_model, r.vocab, r.d_model**-0.5)

    def forward(self, tokens, positions, visible):
        """tokens, positions [B, S], visible [B, 1, S, S] -> logits [B, S, V] and the penalty on
        large additions (scalar).
        """
        r, penalties = self.r, []
        freq = 10000.0 ** (-torch.arange(0, r.d_head, 2) / r.d_head)
        angle = (positions[..., None] * torch.cat((freq, freq)))[:, None]  # [B, 1, S, d_head]
        cos, sin = angle.cos(), angle.sin()

        def add(h, out):
            if r.size_penalty:
                penalties.append(F.relu(out.pow(2).mean(-1) - r.size_limit).pow(2).mean())
            return h + F.dropout(out, r.dropout, self.training)

        visible = torch.zeros(visible.shape).masked_fill_(~visible, -1e9)  # added to the scores
        h = self.model["embed_tokens"](tokens) * (r.d_model**0.5 if r.family == "gemma" else 1.0)
        jolted = random.randint(1, r.n_layers - 1) if self.training and self.jolts else 0
        for i, layer in enumerate(self.model["layers"]):
            if i == jolted > 0:
                push = (
                    F.normalize(torch.randn(h.shape[0], 1, r.d_model), dim=-1)
                    * (torch.rand(h.shape[0], 1, 1) < r.jolt)
                    * torch.rand(h.shape[0], 1, 1)
                    * r.jolt_size
                )
                h = h + push * h.detach().norm(dim=-1).mean(-1)[:, None, None]
            if self.training and random.random() < r.layer_drop * i / (r.n_layers - 1):
                continue
            h = layer(h, visible, cos, sin, add)
        logits = F.linear(
            self.model["norm"](h),
            self.model["embed_tokens"].weight if r.tied else self.lm_head.weight,
        )
        if r.family == "gemma":
            logits = 30 * torch.tanh(logits / 30)
        return logits, sum(penalties) if penalties else torch.zeros(())


def hf_config(r: Recipe, tok) -> dict:
    common = dict(
        hidden_size=r.d_model,
        intermediate_size=r.d_mlp,
        num_hidden_layers=r.n_layers,
        num_attention_heads=r.n_heads,
        num_key_value_heads=r.n_kv_heads,
        head_dim=r.d_head,
        vocab_size=r.vocab,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=r.tied,
        torch_dtype="bfloat16",
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
        attention_bias=False,
        attention_dropout=0.0,
        initializer_range=0.02,
        use_cache=True,
    )
    if r.family == "llama":
        return dict(
            common,
            architectures=["LlamaForCausalLM"],
            model_type="llama",
            hidden_act="silu",
            mlp_bias=False,
        )
    # The window is wider than any chat of the training set: there are sliding-window layers, but
    # they hide nothing within 128 tokens.
    return dict(
        common,
        architectures=["Gemma2ForCausalLM"],
        model_type="gemma2",
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=r.d_head,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        sliding_window=128,
    )


def save(net: Net, tok, out: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: v.detach().to(torch.bfloat16).contiguous() for k, v in net.state_dict().items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "config.json").write_text(json.dumps(hf_config(net.r, tok), indent=1) + "\n")
    eos = [tok.convert_tokens_to_ids(SPECIALS[net.r.family][i]) for i in (3, 2)]
    (out / "generation_config.json").write_text(
        json.dumps(
            {
                "bos_token_id": tok.bos_token_id,
                "eos_token_id": eos,
                "pad_token_id": tok.pad_token_id,
                "do_sample": False,
            },
            indent=1,
        )
        + "\n"
    )
