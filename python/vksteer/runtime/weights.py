"""Loading a model's weights into the engine: what the engine reads of a config, which tensors are
stacked in which of its matrices, and the model's fingerprint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _engine as extension
from ..base.progress import Progress
from ..base.types import ProgressLike
from . import kernels, memory
from .device import _engine, cache_folder

if TYPE_CHECKING:
    from ..loading.config import Config
    from ..loading.model_files import ModelFiles
    from .device import Device

_ACTS = {
    name: extension.constants[f"ACT_{name.upper()}"]
    for name in ("silu", "gelu_tanh", "gelu", "relu", "relu2")
}
_NORMS = {name: extension.constants[f"NORM_KIND_{name.upper()}"] for name in ("rms", "layer")}
_QK_NORMS = {
    name: extension.constants[f"QK_NORM_{(name or 'none').upper()}"]
    for name in ("", "head", "wide", "layer")
}
#: The engine's matrices and vectors -> the tensors that are stacked in them.
_MATRICES = {
    "qkv": ("wq", "wk", "wv"),
    "o": ("wo",),
    "gate_up": ("wgate", "wup"),
    "down": ("wdown",),
}
_OLD_DEFAULTS = ("bos_id", "eos_ids")  # facts of 0.1.0 that have defaults
#: Of an MLP without a gate.
_UNGATED = {"gate_up": ("wup",), "b_gate_up": ("bup",)}
#: What belongs to no layer: (the engine's name, tensor, is a matrix).
_OUTSIDE = (
    ("embed", "embed", True),
    ("pos_embed", "pos_embed", True),
    ("ln_final", "ln_final", False),
    ("b_ln_final", "bln_final", False),
    ("unembed", "unembed", True),
    ("b_unembed", "bunembed", False),
)
_VECTORS = {
    "ln1": ("ln1",),
    "ln2": ("ln2",),
    "ln1_post": ("ln1_post",),
    "ln2_post": ("ln2_post",),
    "q_norm": ("q_norm",),
    "k_norm": ("k_norm",),
    "b_ln1": ("bln1",),
    "b_ln2": ("bln2",),
    "b_q_norm": ("bq_norm",),
    "b_k_norm": ("bk_norm",),
    "b_qkv": ("bq", "bk", "bv"),
    "b_o": ("bo",),
    "b_gate_up": ("bgate", "bup"),
    "b_down": ("bdown",),
}


def _facts(config: Config, weight_type: int) -> dict[str, Any]:
    """The config as the engine reads it (csrc/python/model_facts.c)."""
    names = (
        "n_layers",
        "d_model",
        "n_heads",
        "n_kv_heads",
        "d_head",
        "d_mlp",
        "d_vocab",
        "n_ctx",
        "norm_eps",
        "norm_offset",
        "embed_scale",
        "attn_scale",
        "attn_softcap",
        "final_softcap",
        "post_norms",
        "qkv_bias",
        "o_bias",
        "mlp_bias",
        "tied",
        "norm_bias",
        "pre_norms",
        "parallel",
        "gated",
        "pos_embed",
        "d_rot",
        "rope_interleaved",
        "rope_switch",
        "query_beta",
        "query_length",
        "qk_norm_bias",
        "unembed_bias",
        "residual_scale",
        "logit_scale",
        "clip_qkv",
    )
    facts = {n: getattr(config, n) for n in names}
    facts.update(
        act=_ACTS[config.act],
        norm=_NORMS[config.norm],
        qk_norm=_QK_NORMS[config.qk_norm],
        weight_type=weight_type,
        window=list(config.window),
        rope_table=list(config.rope_table),
        rope=[
            (np.asarray(t.inv_freq, np.float64).tolist(), float(t.attention_factor))
            for t in (*config.rope, *config.rope_long)
        ],
    )
    facts["n_ctx"] = min(facts["n_ctx"], 1 << 24)
    return facts


def load_weights(
    engine_device: extension.Device,
    device: Device,
    files: ModelFiles,
    name: str,
    fast: bool,
    progress: ProgressLike,
) -> tuple[extension.Model, str]:
    """The engine's model with all weights, and a hash over config and a sample of the weights.
    fast: the precision of products on matrix units.
    """
    kinds = {t.dtype for t in files.tensors if len(t.shape) == 2}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    memory.check_fits(engine_device, device, files.config, kind, name)
    facts = _facts(files.config, kernels.WEIGHT_TYPES[kind])
    model: extension.Model = _engine().Model(engine_device, facts)
    if progress is True:
        _print_plan(model, engine_device, device, name)
    weights, jobs = _Weights(files), _jobs(files)
    try:
        with Progress(progress, len(jobs), "load") as bar:
            for target, layer, names, matrix in jobs:
                load = model.load_matrix if matrix else model.load_vector
                load(target, layer, [weights.source(n) for n in names])
                bar.step()
        model.finish()
        if progress is True and not kernels.is_chosen(device, kind, fast):
            print(
                f"vksteer: testing and measuring the matrix kernels for {kind} on {device.name}"
                f" (once; stored in {cache_folder()})",
                file=sys.stderr,
            )
        kernels.choose(model, engine_device, device, kind, fast)
        if fast:
            kernels.say_fast(model.kernels, device)
        model.prepare()
        return model, _fingerprint(model, files.config)
    except BaseException:
        model.close()
        raise


def _print_plan(
    model: extension.Model, engine_device: extension.Device, device: Device, name: str
) -> None:
    plan = model.plan()
    print(
        f"vksteer: {name} on {device.name}: weights {plan['weights'] / 1e6:.0f} MB, work memory"
        f" {plan['work'] / 1e6:.0f} MB, {plan['cache_per_token'] / 1e3:.1f} kB per cached token;"
        f" {engine_device.available_bytes / 1e9:.1f} GB free",
        file=sys.stderr,
    )


def _jobs(files: ModelFiles) -> list[tuple[str, int, list[str], bool]]:
    """(the engine's matrix or vector, layer or -1, tensors that are stacked in it, is a matrix) for
    everything that is loaded.
    """
    present = {t.name for t in files.tensors}
    jobs = [
        (target, -1, [name], matrix)
        for target, name, matrix in _OUTSIDE
        if name in present and not (name == "unembed" and files.config.tied)
    ]
    other = {} if files.config.gated else _UNGATED
    for layer in range(files.config.n_layers):
        for table, matrix in ((_MATRICES, True), (_VECTORS, False)):
            for target, parts in {**table, **{t: other[t] for t in other if t in table}}.items():
                names = [f"l.{layer}.{p}" for p in parts]
                if present.issuperset(names):
                    jobs.append((target, layer, names, matrix))
    return jobs


class _Weights:
    """Tensors as the engine takes them: ranges of mapped files, or arrays."""

    def __init__(self, files: ModelFiles) -> None:
        self._paths, self._tensors = files.paths, {t.name: t for t in files.tensors}
        self._mapped: dict[int, extension.MappedFile] = {}

    def source(self, name: str) -> tuple[Any, ...]:
        """(type, rows, columns, mapped file, offset), or (type, rows, columns, array)."""
        tensor = self._tensors[name]
        rows, columns = tensor.shape if len(tensor.shape) == 2 else (tensor.shape[0], 1)
        shape = (kernels.WEIGHT_TYPES[tensor.dtype], rows, columns)
        if tensor.file is None:
            array = tensor.array()
            return (*shape, array if array.dtype != np.float16 else array.view(np.uint16))
        if tensor.file not in self._mapped:
            self._mapped[tensor.file] = _engine().MappedFile(self._paths[tensor.file])
        return (*shape, self._mapped[tensor.file], tensor.offset)


def _fingerprint(model: extension.Model, config: Config) -> str:
    digest = hashlib.sha256(_facts_text(config).encode())
    for vector in ("ln_final", "ln1" if config.pre_norms else "ln1_post"):
        digest.update(model.vector(vector, 0).tobytes())
    probe = np.random.default_rng(0).standard_normal((1, config.d_model)).astype(np.float32)
    digest.update(model.apply("qkv", config.n_layers // 2, probe).tobytes())
    return digest.hexdigest()[:16]


def _facts_text(config: Config) -> str:
    """The config as text for the fingerprint: facts added since 0.1.0 count only where a model has
    them, so that the fingerprint of every other model stays what it was.
    """
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == "qk_norm" and value in ("", "head"):
            value = bool(value)
        recent = field.default is not dataclasses.MISSING and field.name not in _OLD_DEFAULTS
        if not recent or value != field.default:
            parts.append(f"{field.name}={value!r}")
    return f"Config({', '.join(parts)})"
