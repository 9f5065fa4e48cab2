"""GGUF files of random transformers models, written with the `gguf` package's own writer and table
of names, and with what llama.cpp's converter does to each architecture: facts of its own, apart
from those of the loader.
"""

from __future__ import annotations

import json
import math

import numpy as np

#: model_type -> general.architecture
ARCHITECTURES = {
    "gpt2": "gpt2",
    "gpt_neox": "gptneox",
    "gptj": "gptj",
    "phi": "phi2",
    "phi3": "phi3",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "smollm3": "smollm3",
    "granite": "granite",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "stablelm": "stablelm",
    "glm4": "glm4",
    "exaone4": "exaone4",
    "ministral3": "mistral3",
    "mistral": "llama",
    "arcee": "arcee",
    "nemotron": "nemotron",
    "seed_oss": "seed_oss",
    "gemma": "gemma",
    "llama": "llama",
}
PERMUTED = ("llama", "mistral", "granite", "smollm3", "arcee", "ministral3", "olmo")
PLUS_ONE = ("gemma", "nemotron")


def permute(w, heads):
    """The rows of each head, (0 .. d/2, d/2 .. d), become (0, d/2, 1, d/2 + 1, ...)."""
    return w.reshape(heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def thirds(w, heads):
    """GPT-NeoX's rows (head by head: queries, keys, values) as all queries, keys, values."""
    w = w.reshape(heads, 3, -1, *w.shape[1:])
    return np.concatenate([w[:, i].reshape(-1, *w.shape[3:]) for i in range(3)])


def tensors_of(folder, hf):
    """{name in the folder: array} as the converter hands it to the writer."""
    from safetensors.torch import load_file

    kind = hf["model_type"]
    heads = hf.get("num_attention_heads", hf.get("n_head"))
    kv = hf.get("num_key_value_heads") or heads
    found = {}
    for name, tensor in load_file(str(folder / "model.safetensors")).items():
        w = tensor.float().numpy()
        if kind == "gpt2" and w.ndim == 2 and any(c in name for c in ("c_attn", "c_proj", "c_fc")):
            w = w.T
        if "query_key_value" in name:
            w = thirds(w, heads)
        permuted = kind in PERMUTED and (kind != "olmo" or name.endswith("weight"))
        if permuted and ".q_proj." in name:
            w = permute(w, heads)
        if permuted and ".k_proj." in name:
            w = permute(w, kv)
        if kind in PLUS_ONE and name.endswith("norm.weight"):
            w = w + np.float32(1)
        if ".norms." in name:  # StableLM: one for each head, stacked
            stacked, _, head = name.removesuffix(".weight").rpartition(".norms.")
            found.setdefault(stacked + ".weight", {})[int(head)] = w
            continue
        found[name] = np.ascontiguousarray(w)
    for name, w in found.items():
        if isinstance(w, dict):
            found[name] = np.stack([w[i] for i in sorted(w)])
    return found


def rope_of(hf):
    """(rope dictionary of the full layers, of the sliding layers)."""
    rope = hf.get("rope_parameters") or {}
    return rope.get("full_attention", rope), rope.get("sliding_attention", {})


def write_sizes(w, hf):
    kind = hf["model_type"]
    gpt = {"gpt2": True, "gptj": True}.get(kind, False)
    names = ("n_embd", "n_head", "n_layer", "n_inner", "n_positions") if gpt else ()
    usual = (
        "hidden_size",
        "num_attention_heads",
        "num_hidden_layers",
        "intermediate_size",
        "max_position_embeddings",
    )
    width, heads, layers, inner, positions = (hf[k] for k in names or usual)
    w.add_embedding_length(width)
    w.add_head_count(heads)
    w.add_block_count(layers)
    w.add_feed_forward_length(inner or 4 * width)
    w.add_context_length(positions)
    if hf.get("num_key_value_heads") is not None:
        w.add_head_count_kv(hf["num_key_value_heads"])
    if hf.get("head_dim") is not None:
        w.add_key_length(hf["head_dim"])
        w.add_value_length(hf["head_dim"])
    if "rms_norm_eps" in hf:
        w.add_layer_norm_rms_eps(hf["rms_norm_eps"])
    for key in ("layer_norm_epsilon", "layer_norm_eps", "norm_eps"):
        if key in hf:
            w.add_layer_norm_eps(hf[key])
    if kind == "olmo":
        w.add_layer_norm_eps(1e-5)
    return width, heads


def write_extras(w, hf):
    """The keys that single architectures have."""
    for key, add in (
        ("clip_qkv", w.add_clamp_kqv),
        ("embedding_multiplier", w.add_embedding_scale),
        ("attention_multiplier", w.add_attention_scale),
        ("residual_multiplier", w.add_residual_scale),
        ("logits_scaling", w.add_logit_scale),
        ("logit_scale", w.add_logit_scale),
    ):
        if hf.get(key) is not None:
            add(hf[key])
    if hf["model_type"] == "gpt_neox":
        w.add_parallel_residual(hf["use_parallel_residual"])
    if hf["model_type"] == "stablelm":
        w.add_parallel_residual(True)  # as the converter does where the config does not say it
    if hf["model_type"] == "phi3":
        w.add_sliding_window(hf.get("sliding_window") or 0)
    elif hf.get("sliding_window") is not None:
        w.add_sliding_window(hf["sliding_window"])
        if "layer_types" in hf:
            w.add_sliding_window_pattern([t == "sliding_attention" for t in hf["layer_types"]])


def write_rope(w, hf, d_head):
    """Keys of the rotation, and (name, array) of the tensors that hold factors."""
    import gguf

    full, sliding = rope_of(hf)
    kind, scaling = hf["model_type"], full.get("rope_type", "default")
    if kind == "gptj":
        w.add_rope_dimension_count(hf["rotary_dim"])
    if not full:
        return []
    part = full.get("partial_rotary_factor", 1.0)
    w.add_rope_dimension_count(int(d_head * part))
    if kind not in ("stablelm", "phi", "gpt_neox"):  # they leave it out: 10000
        w.add_rope_freq_base(full["rope_theta"])
    if sliding:
        w.add_rope_freq_base_swa(sliding["rope_theta"])
    if scaling == "linear":
        w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(full["factor"])
    if scaling == "yarn":
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(full["factor"])
        w.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", w.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", w.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", w.add_rope_scaling_yarn_beta_slow),
            ("mscale_all_dim", w.add_rope_scaling_yarn_log_mul),
            ("llama_4_scaling_beta", w.add_attn_temperature_scale),
        ):
            if full.get(key) is not None:
                add(full[key])
    if kind in ("cohere", "cohere2", "nemotron"):
        w.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if kind == "phi3":
        w.add_rope_scaling_orig_ctx_len(hf["original_max_position_embeddings"])
    if scaling == "longrope":
        original = hf["original_max_position_embeddings"]
        scale = hf["max_position_embeddings"] / original
        w.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        return [
            (f"rope_factors_{k}.weight", np.array(full[k + "_factor"], np.float32))
            for k in ("long", "short")
        ]
    if scaling == "llama3":
        return [("rope_freqs.weight", llama3_factors(full, d_head))]
    return []


def llama3_factors(rope, d_head):
    """By what each frequency is divided, as the converter stores it."""
    frequencies = rope["rope_theta"] ** -(np.arange(0, d_head, 2, dtype=np.float32) / d_head)
    low, high = (
        rope["original_max_position_embeddings"] / rope[k]
        for k in ("low_freq_factor", "high_freq_factor")
    )
    factors = []
    for length in 2 * np.pi / frequencies:
        smooth = (rope["original_max_position_embeddings"] / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1 if length < high else rope["factor"] if length > low else between)
    return np.array(factors, np.float32)


def convert(folder, path, changes=None, edit=None, types=None):
    """Writes the model of a folder (config.json in the newer style) as a GGUF file; returns its
    path. changes: metadata below the architecture that are replaced, None: left out. edit(tensors):
    may change {GGUF name: array}. types: {dtype of an array: its type in the file}.
    """
    import gguf

    hf = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[hf["model_type"]]
    w = gguf.GGUFWriter(path, arch)
    width, heads = write_sizes(w, hf)
    write_extras(w, hf)
    factors = write_rope(w, hf, hf.get("head_dim") or width // heads)
    layers = hf.get("num_hidden_layers", hf.get("n_layer"))
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch)
    names = gguf.get_tensor_name_map(kind, layers)
    tensors = {}
    for name, array in tensors_of(folder, hf).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        tensors[stored] = array
    tensors.update(factors)
    if edit:
        edit(tensors)
    for name, array in tensors.items():
        w.add_tensor(name, array, raw_dtype=(types or {}).get(array.dtype))
    for key, value in (changes or {}).items():
        w.kv_data[0].pop(f"{arch}.{key}", None)
        if value is not None:
            w.add_key_value(f"{arch}.{key}", value, value_type(value))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def value_type(value):
    import gguf

    kinds = gguf.GGUFValueType
    types = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    return types.get(type(value), kinds.ARRAY)
