"""What a row of the table of model families holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One configuration class of transformers, as data: the keys that it reads, and those facts of
    the architecture that no key controls.

    A bias, `parallel` and `qk_norm` may depend on a key: then the field is that key's name.
    """

    title: str
    architectures: tuple[str, ...]  # values of `architectures` that it serves
    model_type: str
    defaults: Mapping[str, Any]  # every key that is read, with transformers' default
    gguf: tuple[str, ...] = ()  # `general.architecture` in GGUF files
    # usual key -> the family's own; `aliases` are those that transformers takes by either name
    keys: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    # key -> (the only value that is supported, what another value would need)
    only: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    outer: str = ""  # model_type of a config that holds this family's as its text_config

    norm: str = "rms"  # "rms" or "layer"
    norm_bias: bool = False
    norm_parameters: bool = True  # False: norms have neither gains nor biases (OLMo)
    norm_offset: float = 0.0  # 1.0 where gains are stored as w of (1 + w)
    eps: str | float = "rms_norm_eps"  # key, or the number where none says it
    pre_norms: bool = True
    post_norms: bool = False
    parallel: str | bool = False
    shared_norm: bool = False  # attention and MLP of a parallel layer read the same norm
    qk_norm: str = ""  # as in Config, if `qk_norm_key` is "" or set
    qk_norm_key: str = ""
    qk_norm_bias: bool = False

    gated: bool = True
    act: str = "hidden_act"  # key
    # transformers' names of activations that mean another one in this family
    activations: Mapping[str, str] = field(default_factory=dict)
    qkv_bias: str | bool = False
    o_bias: str | bool = False
    mlp_bias: str | bool = False
    unembed_bias: bool = False

    positions: str = "rotary"  # "rotary", or "learned": a table that is added to the embeddings
    default_theta: float = 10000.0
    theta_key: str = "rope_theta"
    # a rotation of their own for sliding layers: its default base, and the key that says it
    local_theta: float | None = None
    local_theta_key: str = ""
    partial: float | None = None  # default part of a head that is rotated; None: all, always
    partial_key: str = "partial_rotary_factor"
    rope_interleaved: bool = False
    rope_types: tuple[str, ...] = ()  # rope scalings that transformers takes; empty: all
    unrotated: str = ""  # "full": layers with full attention (beside windows); "listed": by a key

    # which layers slide where no layer_types say it: "" none, "all", "even", "period" (all but each
    # sliding_window_pattern-th), "from" (from max_window_layers on), "unrotated"
    windows: str = ""
    period: int = 0  # default of sliding_window_pattern
    scaled_embeddings: bool = False  # embeddings times sqrt(d_model)
    window_note: str = "full attention"
