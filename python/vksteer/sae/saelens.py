"""What the keys of SAELens's cfg.json mean, old and new ones: which change the numbers, which do
not, and which are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..base.types import Array
from ..errors import ModelError

#: architecture -> our kind
ARCHITECTURES = {
    "standard": "relu",
    "relu": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batchtopk",
    "gated": "gated",
}
#: Keys that change no number of the encoder and decoder: provenance, and how it was trained.
_HARMLESS = (
    "metadata meta model_name model_class_name model_from_pretrained_kwargs model_kwargs hook_layer"
    " hook_point_layer hook_head hook_eval dtype device d_in d_sae expansion_factor prepend_bos"
    " context_size dataset_path dataset_trust_remote_code is_dataset_tokenized streaming"
    " sae_lens_version sae_lens_training_version neuronpedia_id seqpos_slice seqpos"
    " exclude_special_tokens use_cached_activations cached_activations_path"
    " n_batches_in_buffer store_batch_size store_batch_size_prompts train_batch_size"
    " train_batch_size_tokens training_tokens total_training_tokens total_training_steps lr"
    " lr_scheduler_name lr_warm_up_steps lr_decay_steps lr_end n_restart_cycles adam_beta1"
    " adam_beta2 l1_coefficient l1_warm_up_steps l0_coefficient l0_warm_up_steps lp_norm"
    " mse_loss_normalization noise_scale decoder_init_norm decoder_orthogonal_init"
    " decoder_heuristic_init normalize_sae_decoder init_encoder_as_decoder_transpose"
    " apply_b_dec_to_input b_dec_init_method use_ghost_grads ghost_grads feature_sampling_window"
    " feature_sampling_method dead_feature_window dead_feature_threshold dead_feature_estimation"
    " resample_batches feature_reinit_scale seed from_pretrained_path checkpoint_path"
    " checkpoints_path n_checkpoints run_name log_to_wandb wandb_project wandb_entity wandb_id"
    " wandb_log_frequency wandb_group eval_every_n_wandb_logs eval_every_n_steps n_eval_batches"
    " n_eval_seqs eval_batch_size_prompts log_activations_store_to_wandb"
    " log_optimizer_state_to_wandb verbose act_store_device autocast autocast_lm compile_llm"
    " llm_compilation_mode compile_sae sae_compilation_mode tokens_per_buffer d_head"
    " finetuning_tokens finetuning_method scale_sparsity_penalty_by_decoder_norm"
    " jumprelu_init_threshold jumprelu_bandwidth jumprelu_init_bandwidth"
    " jumprelu_sparsity_loss_mode pre_act_loss_coefficient jumprelu_tanh_scale"
    " aux_loss_coefficient decoder_norm"
    " topk_threshold_lr sae_lens_release release name tokenizer layer mse sparsity"
)
HARMLESS = frozenset(_HARMLESS.split())


def arguments(
    where: str, config: Mapping[str, Any], tensors: Mapping[str, Array], scale: float | None
) -> tuple[dict[str, Any], list[str]]:
    """(arguments of SAE, what to warn of) for one folder."""
    inner = config.get("metadata") or config.get("meta") or {}
    if not isinstance(inner, Mapping):
        raise ModelError(f"{where}: metadata must be an object")
    both = {**inner, **config}
    kind, k = _kind(where, both)
    arrays = _arrays(where, kind, both, tensors)
    _check_refused(where, both)
    _normalised(where, both.get("normalize_activations"), scale, arrays)
    _rescaled(where, kind, both, arrays)
    noted = _unknown(config)
    if kind in ("jumprelu", "batchtopk") and (arrays["threshold"] < 0).any():
        noted.append(
            "some thresholds are negative: negative activations above them are kept, where SAELens"
            " sets them to 0"
        )
    subtract = both.get("apply_b_dec_to_input", True)  # SAELens's default
    if not isinstance(subtract, bool):
        raise ModelError(f"{where}: apply_b_dec_to_input={subtract!r} must be true or false")
    meta = {"read_from": "SAELens", "config": dict(config)}
    made = dict(kind=kind, k=k, subtract_b_dec=subtract, site=_site(where, both), meta=meta)
    return {**arrays, **made}, noted


def _kind(where: str, config: Mapping[str, Any]) -> tuple[str, int | None]:
    name = config.get("architecture", "standard")
    kind = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ValueError(
            f"{where}: architecture {name!r} is not known: {', '.join(ARCHITECTURES)} are read"
        )
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu")) or "relu"
    options = config.get("activation_fn_kwargs") or {}
    if activation == "topk" and kind in ("relu", "topk"):
        kind = "topk"
    elif activation != "relu":
        raise ValueError(f"{where}: activation_fn {activation!r} is not known to {name!r}")
    if kind != "topk":
        return kind, None
    k = config.get("k", options.get("k") if isinstance(options, Mapping) else None)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ModelError(f"{where}: k={k!r}: a topk autoencoder needs a whole number from 1 on")
    return kind, k


def _arrays(
    where: str, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Array]
) -> dict[str, Array]:
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec", "b_enc": "b_enc"}
    if kind == "gated":
        names |= {"b_enc": "b_gate", "r_mag": "r_mag", "b_mag": "b_mag"}
    if kind in ("jumprelu", "batchtopk"):
        scalar = kind == "batchtopk" and "threshold" not in tensors
        names["threshold"] = "topk_threshold" if scalar else "threshold"
    missing = [stored for stored in names.values() if stored not in tensors]
    if missing:
        raise ModelError(
            f"{where}: {', '.join(missing)} missing: found {sorted(tensors)}, and this architecture"
            f" has {', '.join(names.values())}"
        )
    stray = sorted(set(tensors) - set(names.values()))
    if stray:
        raise ModelError(f"{where}: {', '.join(stray)} would be ignored, which changes the numbers")
    arrays = {name: tensors[stored] for name, stored in names.items()}
    said = (config.get("d_in"), config.get("d_sae"))
    for what, number, axis in (("d_in", said[0], 0), ("d_sae", said[1], 1)):
        shape = arrays["W_enc"].shape
        if number is not None and (len(shape) != 2 or number != shape[axis]):
            raise ValueError(
                f"{where}: cfg.json says {what}={number!r}, W_enc has the shape {list(shape)}"
            )
    return arrays


#: Keys whose values other than these are refused.
_ONLY: dict[str, tuple[Any, ...]] = {
    "finetuning_scaling_factor": (None, False),
    "reshape_activations": (None, "none", False),
    "hook_head_index": (None,),
    "hook_point_head_index": (None,),
    "use_error_term": (None, False),
    "hook_name_out": (None,),
    "hook_layer_out": (None,),
    "d_out": (None,),
    "skip": (None, False),
    "is_transcoder": (None, False),
}


def _check_refused(where: str, config: Mapping[str, Any]) -> None:
    for key, allowed in _ONLY.items():
        value = config.get(key)
        if not any(value is other or value == other for other in allowed):
            raise ValueError(f"{where}: {key}={value!r} is not supported, and changes the numbers")


def _normalised(where: str, how: Any, scale: float | None, arrays: dict[str, Array]) -> None:
    """Folds the factor on activations into the arrays, as SAELens does."""
    if how == "expected_average_only_in":
        if scale is None:
            raise ValueError(
                f"{where}: normalize_activations={how!r}: activations are multiplied by a factor"
                " that this folder does not hold. Give it as scale= (1.0 where it is folded in)"
            )
        arrays["W_enc"] = arrays["W_enc"] * np.float32(scale)
        arrays["W_dec"] = arrays["W_dec"] / np.float32(scale)
        arrays["b_dec"] = arrays["b_dec"] / np.float32(scale)
    elif how in (None, "none", False):
        if scale is not None:
            raise ValueError(f"{where}: scale={scale}: its activations are not normalised")
    else:
        raise ValueError(
            f"{where}: normalize_activations={how!r} is not supported: every token would have a"
            " scale of its own, which a steering vector has not"
        )


def _rescaled(where: str, kind: str, config: Mapping[str, Any], arrays: dict[str, Array]) -> None:
    """rescale_acts_by_decoder_norm: features count times the norm of their decoder row."""
    rescale = config.get("rescale_acts_by_decoder_norm", False)
    if rescale in (None, False):
        return
    if rescale is not True or kind != "topk":
        raise ValueError(
            f"{where}: rescale_acts_by_decoder_norm={rescale!r} is supported for topk only"
        )
    norms = np.linalg.norm(arrays["W_dec"].astype(np.float64), axis=1).astype(np.float32)
    if not norms.all():
        raise ModelError(f"{where}: rescale_acts_by_decoder_norm, and a row of W_dec is zero")
    arrays["W_enc"] = arrays["W_enc"] * norms
    arrays["b_enc"] = arrays["b_enc"] * norms
    arrays["W_dec"] = arrays["W_dec"] / norms[:, None]


def _site(where: str, config: Mapping[str, Any]) -> str | None:
    name = config.get("hook_name", config.get("hook_point"))
    if name is not None and not isinstance(name, str):
        raise ModelError(f"{where}: hook_name={name!r} must be a text")
    if name is None:
        return None
    layer = config.get("hook_layer", config.get("hook_point_layer"))
    if layer is not None and not name.startswith(f"blocks.{layer}."):
        raise ValueError(f"{where}: hook_layer={layer!r} contradicts hook_name={name!r}")
    return name


#: Keys that are followed.
_FOLLOWED = {
    *("architecture", "activation_fn", "activation_fn_str", "activation_fn_kwargs", "k"),
    *("hook_name", "hook_point", "normalize_activations", "rescale_acts_by_decoder_norm"),
}


def _unknown(config: Mapping[str, Any]) -> list[str]:
    known = HARMLESS | _FOLLOWED | set(_ONLY)
    keys = sorted(
        key for key, value in config.items() if key not in known and value not in (None, False)
    )
    return [f"{', '.join(keys)} not known, and not followed"] if keys else []
