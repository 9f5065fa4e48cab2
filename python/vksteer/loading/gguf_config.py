"""A GGUF header's facts: metadata is translated into the keys of a config.json, so that both kinds
of files pass the same checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import ModelError
from . import rope as rotation
from .families import FAMILIES
from .family_type import Family
from .gguf_file import GGUFFile, end_tokens
from .hf_config import facts_from_hf

_ARCHITECTURES = {"llama", "gemma2", "gemma3", "qwen2", "qwen3"}  # that are read here

#: Keys below "{architecture}." that are read here.
_READ = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "attn_logit_softcapping",
    "final_logit_softcapping",
}
#: Keys without influence on the numbers of these architectures.
_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "name", "description", "author"}

#: Keys of Ollama's Gemma 3 files -> the usual ones. Their files hold the vision tower, too, whose
#: keys and tensors say nothing about the language model.
_OLLAMA_NAMES = {
    "rope.global.freq_base": "rope.freq_base",
    "rope.local.freq_base": "rope.freq_base_swa",
    "rope.scaling.beta_fast": "rope.scaling.yarn_beta_fast",
    "rope.scaling.beta_slow": "rope.scaling.yarn_beta_slow",
}
_OLLAMA_VISION = ("vision.", "mm.")

#: Models whose query_pre_attn_scalar is d_model / n_heads rather than the head size; GGUF files do
#: not say so, llama.cpp tells them by size.
_SCALE_BY_WIDTH = {("gemma2", 46), ("gemma3", 62)}  # the 27B ones


def facts_from_gguf(file: GGUFFile) -> dict[str, Any]:
    """The facts of an opened GGUF file, as `Config` takes them. Gemma's norm gains are stored as 1
    + w, so norm_offset is 0.
    """
    try:
        return _facts(file)
    except ModelError as error:
        if str(file.path) in str(error):
            raise
        raise ModelError(f"{file.path}: {error}") from error


def _facts(file: GGUFFile) -> dict[str, Any]:
    family, get = _opened(file)
    hf, family = _as_hf(file, family, get)
    facts = facts_from_hf(hf)
    changes: dict[str, Any] = {
        "norm_offset": 0.0,
        "o_bias": "blk.0.attn_output.bias" in file.tensors,
    }
    if get.raw("attention.scale"):
        changes["attn_scale"] = get.number("attention.scale")
    if "rope_freqs.weight" in file.tensors:
        factors = file.array("rope_freqs.weight", "float32")
        changes["rope"] = (rotation.divided(facts["rope"][0], factors), *facts["rope"][1:])
    return facts | changes


def _opened(file: GGUFFile) -> tuple[Family, _Metadata]:
    """The family and the metadata of a file that holds a model of a supported family."""
    md = file.metadata
    arch = md.get("general.architecture")
    known = isinstance(arch, str) and arch in _ARCHITECTURES
    family = next((f for f in FAMILIES if arch in f.gguf), None) if known else None
    if family is None or not isinstance(arch, str):
        supported = sorted(_ARCHITECTURES)
        raise ModelError(
            f"{file.path}: GGUF architecture {arch!r} is not supported; supported:"
            f" {', '.join(supported)}"
        )
    if md.get("general.type", "model") != "model":
        raise ModelError(f"{file.path}: is a {md['general.type']!r}, not a model")
    get = _Metadata(file, arch, _ollama_gemma3(file) if arch == "gemma3" else {})
    get.refuse_unknown()
    return family, get


def _ollama_gemma3(file: GGUFFile) -> dict[str, Any]:
    """What Ollama's converter leaves out of Gemma 3 files, or names in its own way, under the usual
    keys (without "gemma3."); empty for files of other converters.
    """
    own = {k.removeprefix("gemma3."): v for k, v in file.metadata.items() if "gemma3." in k}
    if not any(k in _OLLAMA_NAMES or k.startswith(_OLLAMA_VISION) for k in own) and not any(
        name.startswith(("v.", "mm.")) for name in file.tensors
    ):
        return {}
    found = {usual: own[k] for k, usual in _OLLAMA_NAMES.items() if k in own}
    found.setdefault("attention.layer_norm_rms_epsilon", 1e-6)
    context = own.get("context_length")
    # The models with vision were stretched from 16k to 128k positions by a factor of 8.
    if isinstance(context, int) and context >= 131072 and "rope.scaling.factor" not in own:
        found |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    return {k: v for k, v in found.items() if k not in own}


def _as_hf(file: GGUFFile, family: Family, get: _Metadata) -> tuple[dict[str, Any], Family]:
    """The metadata under the keys of a config.json, and the family whose keys they are: a llama
    file with a sliding window is a Mistral.
    """
    md, arch = file.metadata, get.arch
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ModelError(f"{file.path}: tensor 'token_embd.weight' is missing or not a matrix")

    n_heads, n_layers = get.integer("attention.head_count"), get.integer("block_count")
    d_model = get.integer("embedding_length")
    d_head = get.integer(
        "attention.key_length", d_model // n_heads if n_heads and d_model % n_heads == 0 else None
    )
    _check_sizes(get, d_head, embed.shape[0])
    window = get.integer("attention.sliding_window", 0)
    if arch == "llama" and window:
        family = next(f for f in FAMILIES if f.model_type == "mistral")

    hf: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_type,
        "vocab_size": embed.shape[0],
        "hidden_size": d_model,
        "intermediate_size": get.integer("feed_forward_length"),
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": get.integer("attention.head_count_kv", n_heads),
        "head_dim": d_head,
        "max_position_embeddings": get.integer("context_length"),
        "rms_norm_eps": get.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": get.number("rope.freq_base", family.default_theta),
        "rope_scaling": _scaling(get),
        "bos_token_id": md.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_tokens(md),
    }
    hf.update(_biases(file, family))
    if "query_pre_attn_scalar" in family.defaults:
        hf.update(_gemma_keys(get, n_layers, d_model, n_heads, d_head, family))
    if family.local_theta is not None:
        hf["rope_local_base_freq"] = get.number("rope.freq_base_swa", family.local_theta)
    if "sliding_window" in family.defaults:
        hf["sliding_window"] = window or (
            None if arch != "gemma2" else family.defaults["sliding_window"]
        )
        if "use_sliding_window" in family.defaults:
            hf["use_sliding_window"] = bool(window)
            hf["max_window_layers"] = 0
    if arch == "gemma3" and not window:
        raise ModelError(f"{file.path}: metadata 'gemma3.attention.sliding_window' is missing")
    hf.update(_pattern(get, family, n_layers))
    return hf, family


def _check_sizes(get: _Metadata, d_head: int, n_rows: int) -> None:
    """ModelError where a size contradicts the head size or the embedding's rows."""
    for key in ("attention.value_length", "rope.dimension_count"):
        if get.integer(key, d_head) != d_head:
            raise ModelError(
                f"{get.file.path}: metadata '{get.arch}.{key}' = {get.raw(key)} differs from the"
                f" head size {d_head}, which is not supported"
            )
    if get.integer("vocab_size", n_rows) != n_rows:
        raise ModelError(
            f"{get.file.path}: metadata '{get.arch}.vocab_size' = {get.raw('vocab_size')}"
            f" contradicts tensor 'token_embd.weight' with {n_rows} rows"
        )


def _biases(file: GGUFFile, family: Family) -> dict[str, bool]:
    hf = {}
    if "attention_bias" in family.defaults and family.qkv_bias is not True:
        # transformers' flag sets q, k, v and o together; what the file has is corrected below
        hf["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if "mlp_bias" in family.defaults:
        hf["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return hf


def _gemma_keys(
    get: _Metadata, n_layers: int, d_model: int, n_heads: int, d_head: int, family: Family
) -> dict[str, Any]:
    """The scale of attention scores and the soft caps."""
    by_width = (get.arch, n_layers) in _SCALE_BY_WIDTH
    hf: dict[str, Any] = {"query_pre_attn_scalar": d_model / n_heads if by_width else d_head}
    caps = ["final_logit_softcapping"]
    if get.arch == "gemma2":
        caps.append("attn_logit_softcapping")
    elif get.raw("attn_logit_softcapping"):
        raise ModelError(
            f"{get.file.path}: metadata '{get.arch}.attn_logit_softcapping' is not understood for"
            f" {get.arch}"
        )
    return hf | {key: get.number(key, family.defaults[key]) for key in caps}


def _scaling(get: _Metadata) -> dict[str, Any] | None:
    """The rope_scaling of a config.json; None for unscaled rotation."""
    kind = get.raw("rope.scaling.type")
    factor = get.number("rope.scaling.factor", 0.0) or get.number("rope.scale_linear", 0.0) or 0.0
    if kind in (None, "none"):
        return (
            {"rope_type": "linear", "factor": factor}
            if kind is None and factor not in (0.0, 1.0)
            else None
        )
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor or 1.0}
    if kind == "yarn":
        optional = {
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        values = {
            ours: get.number("rope.scaling." + theirs, 0.0) or None
            for ours, theirs in optional.items()
        }
        # in GGUF it multiplies yarn's own factor rather than replacing it
        stated = values["attention_factor"]
        if stated is not None and factor > 1:
            values["attention_factor"] = stated * (0.1 * float(np.log(factor)) + 1.0)
        return {"rope_type": "yarn", "factor": factor or None, **values}
    return {"rope_type": kind}  # refused by name, with its reason


def _pattern(get: _Metadata, family: Family, n_layers: int) -> dict[str, Any]:
    """Which layers have a sliding window: newer files list booleans, or give the period."""
    value = get.raw("attention.sliding_window_pattern")
    if value is None:
        return {}
    if isinstance(value, np.ndarray):
        if len(value) < n_layers or "layer_types" not in family.defaults:
            raise get.error(
                "attention.sliding_window_pattern",
                f"must have one entry for each of {n_layers} layers",
            )
        return {
            "layer_types": [
                "sliding_attention" if v else "full_attention" for v in value[:n_layers].tolist()
            ]
        }
    if "sliding_window_pattern" not in family.defaults:
        raise get.error("attention.sliding_window_pattern", "is not understood")
    return {"sliding_window_pattern": value}


class _Metadata:
    """Typed reads below "{architecture}."; errors name the key. more: values for keys that the file
    does not have.
    """

    def __init__(self, file: GGUFFile, arch: str, more: Mapping[str, Any]) -> None:
        self.file, self.arch, self.prefix, self.more = file, arch, arch + ".", more

    def raw(self, key: str) -> Any:
        value = self.file.metadata.get(self.prefix + key)
        return self.more.get(key) if value is None else value

    def error(self, key: str, what: str) -> ModelError:
        value = repr(self.raw(key))
        return ModelError(f"{self.file.path}: metadata {self.prefix + key!r} = {value[:80]} {what}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw(key)
        # one number for each layer is accepted where all are equal
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "must be one integer, the same for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float | None:
        value = self.raw(key)
        if value is None:
            if (
                default is None
                and self.prefix + key not in self.file.metadata
                and key == "attention.layer_norm_rms_epsilon"
            ):
                raise self.error(key, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, "must be a number")
        return float(value)

    def refuse_unknown(self) -> None:
        for key, value in self.file.metadata.items():
            name = key.removeprefix(self.prefix)
            if name == key or name in _READ | _HARMLESS:
                continue
            if self.arch == "gemma3" and (
                name in _OLLAMA_NAMES
                or name.startswith(_OLLAMA_VISION)
                or (name == "rope.scaling.extrapolation_factor" and value == 1)
            ):
                continue
            neutral = not isinstance(value, (np.ndarray, list)) and value in (0, 0.0, False, "")
            if not neutral:
                raise ModelError(
                    f"{self.file.path}: metadata {key!r} = {repr(value)[:80]} would change the"
                    " numbers and is not understood"
                )
