"""A model's architecture as data: what a config.json or a GGUF header says about it, as the facts
of docs/architecture.md.

The engine's one forward pass reads these facts and knows no model family by name. Every key of a
config.json is either read, known to have no influence on the numbers, neutral (null or false), or
refused by name.

`python -m vksteer.loading.config` prints the table of supported families that the README shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..base.json_files import read_json
from ..base.types import PathLike
from ..errors import ModelError
from . import rope as rotation
from .checkpoint_kinds import without_config
from .families import markdown
from .gguf_config import facts_from_gguf
from .gguf_file import GGUFFile
from .gguf_parts import open_gguf
from .hf_config import facts_from_hf
from .limits import LIMITS
from .locate import CONFIG_PATTERNS, is_gguf, locate, only_gguf

CONFIG_BYTES = 16 << 20  # a config.json is a few kilobytes; a larger file is something else


@dataclass(frozen=True, eq=False)
class Config:
    """The architecture of a decoder-only language model. Two configs are equal if all their facts
    are, with rotation tables that are equal in every bit.
    """

    architecture: str  # "LlamaForCausalLM", ...
    model_type: str  # "llama", ...
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int  # the longest context, in tokens
    norm_eps: float
    norm_offset: float  # 1.0 where the stored gain is (1 + w), else 0.0
    act: str  # "silu", "gelu_tanh", "gelu", "relu" or "relu2"
    embed_scale: float
    attn_scale: float
    attn_softcap: float  # 0.0: none
    final_softcap: float  # 0.0: none
    post_norms: bool  # norms on the outputs of attention and MLP
    # norm of each head of q and k before rotation: "" none; "head": RMS over d_head, one gain for
    # all heads; "wide": RMS over all heads together; "layer": LayerNorm over d_head, a gain for
    # each head
    qk_norm: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    tied: bool  # the unembedding is the embedding
    # [n_layers]: 0 = full attention, else a query sees the last `window` keys, itself included
    window: tuple[int, ...]
    rope_table: tuple[int, ...]  # [n_layers]: index into `rope`; -1: the layer rotates nothing
    # (inv_freq float64 [d_rot / 2], attention_factor) each; the first d_rot channels of a head are
    # rotated. Empty: no layer rotates
    rope: tuple[rotation.RopeTable, ...]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    norm: str = "rms"  # "rms", or "layer": LayerNorm, which subtracts the mean
    norm_bias: bool = False  # biases beside the gains of ln1, ln2 and ln_final
    pre_norms: bool = True  # norms on the inputs of attention and MLP
    parallel: bool = False  # attention and MLP both read the layer's input
    gated: bool = True  # MLP: act(gate) * up, else act(up)
    pos_embed: bool = False  # learned positions [n_ctx, d_model] are added to the embeddings
    rope_interleaved: bool = False  # channels (2i, 2i + 1) are a pair, not (i, i + d_rot / 2)
    # the tables of texts longer than `rope_switch` tokens, as many as `rope`; empty: the same
    rope_long: tuple[rotation.RopeTable, ...] = ()
    rope_switch: int = 0
    # queries after rotation are multiplied by 1 + beta log(1 + floor(position / length)); 0: not
    query_beta: float = 0.0
    query_length: int = 0
    qk_norm_bias: bool = False
    unembed_bias: bool = False
    residual_scale: float = 1.0  # factor on what attention and MLP add to the residual stream
    logit_scale: float = 1.0  # factor on the logits, before a soft cap
    clip_qkv: float = 0.0  # q, k and v are clamped to +-clip_qkv; 0: not

    @property
    def d_rot(self) -> int:
        """Channels of a head that are rotated, from the first one on."""
        return 2 * self.rope[0].inv_freq.size if self.rope else 0

    @classmethod
    def from_pretrained(
        cls,
        source: PathLike,
        *,
        revision: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
    ) -> Config:
        """The architecture alone, without weights and without a device.

        source: a folder, a path to a config.json, a .gguf file, a bundled name ("tiny-llama-chat")
        or a name on the hub. config_overrides: as in `Model.from_pretrained`. Raises ModelError
        where there is no such model or it is not supported.
        """
        path = locate(source, revision=revision, patterns=CONFIG_PATTERNS)
        if path.is_dir() and not (path / "config.json").exists():
            only = only_gguf(path)
            if only is None:
                raise ModelError(without_config(path))
            path = only
        if path.is_file() and is_gguf(path):
            check_overrides(config_overrides, path)
            with open_gguf(path) as file:
                return cls.from_gguf(file)
        config = path / "config.json" if path.is_dir() else path
        return cls.from_json(config, config_overrides=config_overrides)

    @classmethod
    def from_json(
        cls, path: PathLike, *, config_overrides: Mapping[str, Any] | None = None
    ) -> Config:
        """From a config.json file, with some of its keys replaced. Raises ModelError naming the
        file and the key at fault.
        """
        content = read_json(path, limit=CONFIG_BYTES)
        _override(content, check_overrides(config_overrides))
        try:
            return cls.from_hf(content)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """From the dictionary of a config.json, in the released or the newer style.

        Raises ModelError naming the key that is at fault, and for an architecture that is not
        supported.
        """
        return cls(**facts_from_hf(config))

    @classmethod
    def from_gguf(cls, reader: GGUFFile) -> Config:
        """The architecture that the metadata of a GGUF file describes.

        reader: an open GGUFFile; it stays open. `from_pretrained` takes a path. Raises ModelError,
        naming the file and the key at fault, for metadata that are missing or wrong and for an
        architecture that is not supported.
        """
        facts = facts_from_gguf(reader)
        try:
            return cls(**facts)
        except ModelError as error:
            raise ModelError(f"{reader.path}: {error}") from error

    def facts(self) -> dict[str, Any]:
        """All fields by name, as docs/architecture.md lists them (and C reads them)."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def replace(self, **changes: Any) -> Config:
        """A copy in which the named fields have other values, checked as at loading.

        changes: field=value. Raises TypeError for a name that is no field and ModelError for values
        that contradict one another or are out of range; the message names the field.
        """
        return replace(self, **changes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Config):
            return NotImplemented
        plain = all(
            getattr(self, f.name) == getattr(other, f.name)
            for f in fields(self)
            if f.name not in ("rope", "rope_long")
        )
        tables, others = (*self.rope, *self.rope_long), (*other.rope, *other.rope_long)
        return (
            plain
            and (len(self.rope), len(tables)) == (len(other.rope), len(others))
            and all(
                np.array_equal(a.inv_freq, b.inv_freq) and a.attention_factor == b.attention_factor
                for a, b in zip(tables, others, strict=True)
            )
        )

    def __hash__(self) -> int:
        return hash((self.architecture, self.n_layers, self.d_model, self.d_vocab, self.window))

    def __post_init__(self) -> None:
        _check(self)


def check_overrides(
    config_overrides: Mapping[str, Any] | None, gguf: Path | None = None
) -> dict[str, Any]:
    """The keys of a config.json to replace, as a dictionary that JSON can hold.

    gguf: the GGUF file that is loaded, which has no config.json. Raises TypeError for anything but
    a mapping of names, ValueError for values that JSON cannot hold and for a GGUF file.
    """
    if config_overrides is None:
        return {}
    if not isinstance(config_overrides, Mapping) or not all(
        isinstance(key, str) for key in config_overrides
    ):
        raise TypeError(
            "config_overrides must be a dictionary of keys of config.json, not"
            f" {config_overrides!r}"
        )
    if gguf is not None and config_overrides:
        raise ValueError(
            f"config_overrides replaces keys of a config.json; {gguf} is a GGUF file, whose"
            " metadata say what the model is"
        )
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(config_overrides)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"config_overrides holds a value that JSON cannot: {error}") from None
    return plain


def _override(content: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Replaces keys of a config.json's content; of a model that also sees images, those that its
    outer config lacks are keys of the text model.
    """
    text = content.get("text_config")
    for key, value in overrides.items():
        if isinstance(text, dict) and key not in content:
            text[key] = value
        else:
            content[key] = value


# -- checks on the facts, wherever they come from --------------------------------------------------


def _check(c: Config) -> None:
    for name, limit in LIMITS.items():
        value = getattr(c, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            raise ModelError(f"{name} = {value!r} must be an integer from 1 to {limit}")
    if c.n_heads % c.n_kv_heads:
        raise ModelError(
            f"{c.n_heads} query heads are not a multiple of {c.n_kv_heads} key/value heads"
        )
    if c.d_head % 2:
        raise ModelError(f"head size {c.d_head} must be even: rotation pairs channels")
    for name, low, high in (
        ("norm_eps", 0.0, 1.0),
        ("embed_scale", 0.0, 1e6),
        ("attn_scale", 0.0, 1e6),
    ):
        value = getattr(c, name)
        if not low < value < high:
            raise ModelError(f"{name} = {value!r} must lie between {low} and {high}")
    for name in ("attn_softcap", "final_softcap", "clip_qkv"):
        if not 0.0 <= getattr(c, name) < 1e9:
            raise ModelError(f"{name} = {getattr(c, name)!r} must be 0 (none) or positive")
    for name in ("residual_scale", "logit_scale", "query_beta"):
        if not abs(getattr(c, name)) < 1e6:
            raise ModelError(f"{name} = {getattr(c, name)!r} must lie between -1e6 and 1e6")
    for name, known in (("norm", ("rms", "layer")), ("qk_norm", ("", "head", "wide", "layer"))):
        if getattr(c, name) not in known:
            raise ModelError(f"{name} = {getattr(c, name)!r} must be one of {known}")
    if c.query_beta and not 1 <= c.query_length <= LIMITS["n_ctx"]:
        raise ModelError(f"query_length = {c.query_length!r} must be positive")
    if not c.pre_norms and not c.post_norms:
        raise ModelError("a layer without norms before or after attention is not supported")
    if c.post_norms and (c.norm != "rms" or c.parallel):
        raise ModelError("norms after attention must be RMS norms, in a sequential layer")
    if c.parallel and not c.pre_norms:
        raise ModelError("a parallel layer must have norms before attention and MLP")
    if c.norm_bias and c.norm != "layer":
        raise ModelError("a bias beside a norm's gain needs LayerNorm")
    if c.qk_norm_bias and c.qk_norm != "layer":
        raise ModelError("a bias in the norm of heads needs LayerNorm")
    if len(c.window) != c.n_layers or len(c.rope_table) != c.n_layers:
        raise ModelError(
            f"window and rope_table must have one entry for each of {c.n_layers} layers"
        )
    if any(not -1 <= t < len(c.rope) for t in c.rope_table):
        raise ModelError(
            f"rope_table {c.rope_table} points outside the {len(c.rope)} rotation tables"
        )
    if c.rope_long and (len(c.rope_long) != len(c.rope) or c.rope_switch < 1):
        raise ModelError("rotation tables for long texts need a rope_switch, and one for each")
    for table in (*c.rope, *c.rope_long):
        if table.inv_freq.shape != (c.d_rot // 2,) or c.d_rot > c.d_head:
            raise ModelError(
                f"a rotation table has {table.inv_freq.size} frequencies, expected"
                f" {c.d_rot // 2} and at most {c.d_head // 2}"
            )


if __name__ == "__main__":
    print(markdown())
