"""The weights of a model folder under the names that Llama and Gemma 2 have, whatever the family
calls and stores them: fused tensors cut, transposed ones turned, gains that a family lacks as ones.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

_TRANSFORMER = {
    "wte": "model.embed_tokens",
    "wpe": "model.embed_positions",
    "ln_f": "model.norm",
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "attn.out_proj": "self_attn.o_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.fc_in": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "mlp.fc_out": "mlp.down_proj",
}
#: The parts of Gemma 2's names and what they are called elsewhere.
NAMES = {
    "gpt2": _TRANSFORMER,
    "gptj": _TRANSFORMER | {f"attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkv"},
    "gpt_neox": {
        "embed_in": "model.embed_tokens",
        "embed_out": "lm_head",
        "final_layer_norm": "model.norm",
        "attention.query_key_value": "self_attn.qkv_by_head",
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    "opt": {
        "embed_tokens": "model.embed_tokens",
        "embed_positions": "model.embed_positions",
        "self_attn_layer_norm": "input_layernorm",
        "self_attn.out_proj": "self_attn.o_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
    },
    "phi": {
        "final_layernorm": "model.norm",
        "self_attn.dense": "self_attn.o_proj",
        "self_attn.q_layernorm": "self_attn.q_norm",
        "self_attn.k_layernorm": "self_attn.k_norm",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
    "stablelm": {
        "self_attn.q_layernorm": "self_attn.q_norm",
        "self_attn.k_layernorm": "self_attn.k_norm",
    },
    "glm4": {
        "post_self_attn_layernorm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    },
}
PREFIXES = ("model.decoder.", "decoder.", "model.", "transformer.", "gpt_neox.")


def _renamed(name, kind):
    """(name without layer, layer or None): "self_attn.q_proj.weight", 3."""
    prefix = next((p for p in PREFIXES if name.startswith(p)), "")
    name = name[len(prefix) :]
    layer = None
    for word in ("layers.", "h."):
        if name.startswith(word):
            number, name = name[len(word) :].split(".", 1)
            layer = int(number)
    if kind == "opt" and name.startswith("final_layer_norm."):  # of a layer, or of the model
        to = "model.norm" if layer is None else "post_attention_layernorm"
        return to + name.removeprefix("final_layer_norm"), layer
    part, last = name.rsplit(".", 1)
    head = part.split(".norms.")[0]  # StableLM has a module for each head
    part = NAMES.get(kind, {}).get(head, head) + part[len(head) :]
    if layer is None and not part.startswith(("model.", "lm_head")):
        part = "model." + part
    return f"{part}.{last}", layer


def _cut(name, w, f):
    """The parts of one stored tensor, by name."""
    d, rows = f.d_head, (f.n_heads * f.d_head, f.n_kv_heads * f.d_head)
    part, last = name.rsplit(".", 1)
    if part in ("attn.c_attn", "self_attn.qkv_proj"):
        pieces = w.split([rows[0], rows[1], rows[1]])
    elif part == "self_attn.qkv_by_head":
        pieces = [p.reshape(rows[0], *w.shape[1:]) for p in w.unflatten(0, (-1, 3, d)).unbind(1)]
    elif part == "mlp.gate_up_proj":
        return {f"mlp.{p}_proj.{last}": x for p, x in zip(("gate", "up"), w.chunk(2))}
    else:
        return {name: w}
    return {f"self_attn.{p}_proj.{last}": x for p, x in zip("qkv", pieces, strict=True)}


def read_weights(folder, facts, dtype):
    """{name: tensor} of the family's folder."""
    kind, out = facts.kind, {}
    for stored, value in load_file(str(Path(folder) / "model.safetensors")).items():
        if stored.endswith((".attn.bias", ".attention.bias", "masked_bias", "inv_freq")):
            continue  # masks and frequencies that old checkpoints hold
        name, layer = _renamed(stored, kind)
        conv1d = kind == "gpt2" and value.ndim == 2 and layer is not None
        w = (value.T if conv1d else value).to(dtype)
        for part, x in _cut(name, w, facts).items():
            out[part if layer is None else f"model.layers.{layer}.{part}"] = x
    if kind == "opt":
        out["model.embed_positions.weight"] = out["model.embed_positions.weight"][2:]
    if kind == "olmo":
        out["model.norm.weight"] = torch.ones(facts.d_model, dtype=dtype)
    for l in range(facts.n_layers):
        _complete(out, f"model.layers.{l}.", facts, dtype)
    return out


def _complete(w, layer, f, dtype):
    """What a layer shares or lacks."""
    first, second = (layer + n for n in ("input_layernorm", "post_attention_layernorm"))
    if f.kind == "olmo":
        w[first + ".weight"] = w[second + ".weight"] = torch.ones(f.d_model, dtype=dtype)
    if f.parallel and second + ".weight" not in w:
        for part in (".weight", ".bias"):
            if first + part in w:
                w[second + part] = w[first + part]
    for kind, heads in (("q", f.n_heads), ("k", f.n_kv_heads)):
        norm = f"{layer}self_attn.{kind}_norm"
        if f"{norm}.norms.0.weight" in w:
            gains = [w.pop(f"{norm}.norms.{h}.weight") for h in range(heads)]
            w[norm + ".weight"] = torch.stack(gains)
        if f.qk_norm == "layer":  # one gain for all heads (Phi), or one for each
            for part in (".weight", ".bias"):
                if norm + part in w:
                    w[norm + part] = w[norm + part].expand(heads, f.d_head)
