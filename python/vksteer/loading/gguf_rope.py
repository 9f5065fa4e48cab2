"""The rotation of a GGUF file, as the rope keys of a config.json."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import ModelError
from .family_type import Family
from .gguf_metadata import Metadata

_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"


def rope_keys(get: Metadata, family: Family, d_head: int) -> dict[str, Any]:
    """rope_theta, rope_scaling and the rotated part of a head, as the family calls them."""
    d_rot = _rotated(get, family, d_head)
    theta = get.number("rope.freq_base", _default_theta(family))
    hf: dict[str, Any] = {}
    if "rotary_dim" in family.defaults:
        if theta != family.default_theta:
            raise get.error("rope.freq_base", f"must be {family.default_theta} for {get.arch}")
        _refuse_scaling(get)
        return {"rotary_dim": d_rot}
    if family.partial is not None:
        hf[family.partial_key] = d_rot / d_head
    scaling = _longrope(get, d_rot) or _scaling(get)
    local = get.number("rope.freq_base_swa", theta)
    if family.local_theta is None:
        if local != theta:
            raise get.error("rope.freq_base_swa", f"differs from the base {theta}")
        return hf | {family.theta_key: theta, "rope_scaling": scaling}
    if family.local_theta_key:
        local = get.number("rope.freq_base_swa", family.local_theta)
        return hf | {"rope_theta": theta, family.local_theta_key: local, "rope_scaling": scaling}
    full = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
    sliding = {"rope_type": "default", "rope_theta": local}
    return hf | {"rope_parameters": {"full_attention": full, "sliding_attention": sliding}}


def _default_theta(family: Family) -> float:
    """The base where a file has none: llama.cpp's; of Gemma 3 its configuration class's."""
    return family.default_theta if family.local_theta_key else 10000.0


def _rotated(get: Metadata, family: Family, d_head: int) -> int:
    """Rotated channels of a head."""
    key = "rope.dimension_count"
    d_rot = get.integer(key, d_head)
    if family.partial is None and "rotary_dim" not in family.defaults and d_rot != d_head:
        raise get.error(key, f"differs from the head size {d_head}, which is not supported")
    if not 2 <= d_rot <= d_head or d_rot % 2:
        raise get.error(key, f"must be even and at most the head size {d_head}")
    return d_rot


def _refuse_scaling(get: Metadata) -> None:
    if _scaling(get) is not None:
        raise get.error("rope.scaling.type", f"is not understood for {get.arch}")


def _scaling(get: Metadata) -> dict[str, Any] | None:
    """The rope_scaling of a config.json; None for unscaled rotation."""
    kind = get.text("rope.scaling.type")
    factor = get.number("rope.scaling.factor", 0.0) or get.number("rope.scale_linear", 0.0)
    if get.arch == "granite" and get.flag("rope.scaling.finetuned") is False:
        raise get.error("rope.scaling.finetuned", "turns rotation off, which is not supported")
    if kind == "yarn":
        return _yarn(get, factor)
    if get.number("rope.scaling.attn_factor", 1.0) not in (0.0, 1.0):
        raise get.error("rope.scaling.attn_factor", f"is not understood for scaling {kind!r}")
    if kind == "none" or (kind in (None, "linear") and factor in (0.0, 1.0)):
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    if kind == "longrope":
        raise get.error("rope.scaling.type", f"needs the tensors {_SHORT!r} and {_LONG!r}")
    return {"rope_type": kind}  # refused by name, with its reason


def _yarn(get: Metadata, factor: float) -> dict[str, Any]:
    """Yarn. The factor on cos and sin is yarn's own, over that of yarn_log_multiplier, times
    attn_factor.
    """
    entry: dict[str, Any] = {"rope_type": "yarn", "factor": factor or None}
    for ours, theirs in (
        ("original_max_position_embeddings", "original_context_length"),
        ("beta_fast", "yarn_beta_fast"),
        ("beta_slow", "yarn_beta_slow"),
    ):
        entry[ours] = get.number("rope.scaling." + theirs, 0.0) or None
    original = entry["original_max_position_embeddings"]
    if original is not None:
        entry["original_max_position_embeddings"] = int(original)
    if get.number("rope.scaling.yarn_ext_factor", 1.0) != 1.0:
        raise get.error("rope.scaling.yarn_ext_factor", "must be 1")
    log_multiplier = get.number("rope.scaling.yarn_log_multiplier", 0.0)
    own = _magnitude(factor, 1.0) / _magnitude(factor, log_multiplier)
    # llama.cpp puts its own factor in the place of this one
    stated = get.number("rope.scaling.yarn_attn_factor", own)
    if not math.isclose(stated, own, rel_tol=1e-6):
        raise get.error(
            "rope.scaling.yarn_attn_factor",
            f"differs from yarn's own factor {own}, and readers of GGUF disagree which one holds",
        )
    if log_multiplier:
        entry |= {"mscale": 1.0, "mscale_all_dim": log_multiplier}
    multiplied = get.number("rope.scaling.attn_factor", 0.0) or 1.0
    if multiplied != 1.0:
        entry["attention_factor"] = multiplied * own
    return entry | _query_factor(get, original)


def _magnitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _query_factor(get: Metadata, original: float | None) -> dict[str, float]:
    """Ministral 3: queries grow with the logarithm of the position over the original length."""
    if get.arch != "mistral3":
        return {}
    beta = get.number("attention.temperature_scale", 0.0)
    if get.number("attention.temperature_length", original or 0.0) != (original or 0.0):
        raise get.error(
            "attention.temperature_length", "differs from 'rope.scaling.original_context_length'"
        )
    return {"llama_4_scaling_beta": beta} if beta else {}


def _longrope(get: Metadata, d_rot: int) -> dict[str, Any] | None:
    """Phi 3's rotation: a factor on each frequency, one list for short texts and one for long ones;
    None where a file has no such lists.
    """
    file = get.file
    found = [name for name in (_SHORT, _LONG) if name in file.tensors]
    if get.arch != "phi3" or not found:
        return None
    if len(found) == 1:
        missing = _LONG if found == [_SHORT] else _SHORT
        raise ModelError(f"{file.path}: tensor {missing!r} is missing")
    if get.text("rope.scaling.type") not in (None, "longrope"):
        raise get.error("rope.scaling.type", f"contradicts the tensor {_LONG!r}")
    entry: dict[str, Any] = {"rope_type": "longrope"}
    for name, key in ((_SHORT, "short_factor"), (_LONG, "long_factor")):
        tensor = file.tensors[name]
        if tensor.shape != (d_rot // 2,):
            raise ModelError(
                f"{file.path}: tensor {name!r}: shape {list(tensor.shape)}, expected one factor for"
                f" each of {d_rot // 2} rotated pairs of channels"
            )
        factors = file.array(name, "float32").astype(np.float64)
        if not (factors > 0).all():
            raise ModelError(f"{file.path}: tensor {name!r}: factors must be positive")
        entry[key] = factors.tolist()
    stated = get.number("rope.scaling.attn_factor", 0.0)
    if stated and not math.isclose(stated, _longrope_factor(get), rel_tol=1e-6):
        entry["attention_factor"] = stated
    return entry


def _longrope_factor(get: Metadata) -> float:
    """The factor on cos and sin that a config.json implies; a GGUF file has it in float32."""
    context = get.integer("context_length")
    original = get.integer("rope.scaling.original_context_length", context)
    if not 1 < original < context:
        return 1.0
    return math.sqrt(1 + math.log(context / original) / math.log(original))
