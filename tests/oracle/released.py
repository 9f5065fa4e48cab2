"""Folders that look like a released checkpoint's: rotation and windows under the older keys of
config.json, tensors under the names and with the buffers that older checkpoints have.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def released_style(folder, to):
    """A copy of `folder` whose config.json looks like a released checkpoint's: rope_theta and
    rope_scaling at top level, no layer_types.
    """
    to = Path(to)
    to.mkdir(parents=True, exist_ok=True)
    for path in Path(folder).iterdir():
        shutil.copy(path, to / path.name)
    config = json.loads((to / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    kind = config["model_type"]
    if kind == "gemma":
        config["hidden_act"] = "gelu"  # released so; the tanh approximation is meant
    if kind != "ministral3":  # released with rope_parameters
        _rotation(config, kind)
    if kind not in ("olmo3", "exaone4", "smollm3"):  # released with layer_types
        types = config.pop("layer_types", None)
        if kind == "cohere2":
            config["sliding_window_pattern"] = types.index("full_attention") + 1
    (to / "config.json").write_text(json.dumps(config, indent=2))
    if kind in ("gpt2", "opt", "gpt_neox", "gptj"):
        _tensors(to / "model.safetensors", kind, config)
    return to


def _rotation(config, kind):
    """Moves rope_parameters to the keys that came before it."""
    rope = config.pop("rope_parameters", None)
    if rope is None:  # learned positions, or GPT-J's rotary_dim
        return
    if "full_attention" in rope:  # Gemma 3, OLMo 3
        full = rope["full_attention"]
        config["rope_theta"] = full.pop("rope_theta")
        config["rope_scaling"] = full if full["rope_type"] != "default" else None
        if kind == "gemma3_text":
            config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
            config.pop("_sliding_window_pattern", None)
            types = config["layer_types"]
            config["sliding_window_pattern"] = types.index("full_attention") + 1
        return
    part = rope.pop("partial_rotary_factor", 1.0)
    if kind == "gpt_neox":
        config["rotary_pct"], config["rotary_emb_base"] = part, rope.pop("rope_theta")
        return
    if part != 1.0:
        config["partial_rotary_factor"] = part
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope["rope_type"]
    config["rope_scaling"] = rope if kind != "default" else None
    if kind == "longrope":
        del rope["original_max_position_embeddings"]  # Phi 3 has it at top level
    if kind in ("linear", "yarn", "longrope"):
        rope["type"] = rope.pop("rope_type")  # the older key


def _tensors(path, kind, config):
    """Names without the prefix of the causal model (GPT-2, OPT), and the masks that attention of
    old checkpoints kept as buffers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(str(path))
    if kind in ("gpt2", "opt"):
        prefix = {"gpt2": "transformer.", "opt": "model."}[kind]
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items()}
    layer = {
        "gpt2": "h.{}.attn.",
        "gptj": "transformer.h.{}.attn.",
        "gpt_neox": "gpt_neox.layers.{}.attention.",
    }.get(kind)
    layers = config.get("num_hidden_layers") or config["n_layer"]
    for i in range(layers) if layer else ():
        name = layer.format(i)
        mask = torch.ones(8, 8, dtype=torch.uint8).tril()[None, None]
        tensors[name + "bias"] = mask
        if kind != "gpt2":
            tensors[name + "masked_bias"] = torch.tensor(-1e9)
        if kind == "gpt_neox":
            tensors[name + "rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, str(path), metadata={"format": "pt"})
