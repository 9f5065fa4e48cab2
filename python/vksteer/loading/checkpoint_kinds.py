"""What a folder holds that is no full-precision safetensors checkpoint: adapters, pickles,
quantised weights, incomplete downloads. Each message names the cause and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..base.json_files import read_json
from ..errors import ModelError

#: Keys of a config.json that say how the weights are quantised.
QUANTISATION_KEYS = ("quantization_config", "quantization", "compression_config")

_UNQUANTISED = "load the unquantised checkpoint or a GGUF file instead"
_METHODS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "fp8": "FP8",
    "exl2": "ExLlamaV2",
    "aqlm": "AQLM",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "quanto": "Quanto",
    "torchao": "torchao",
    "mxfp4": "MXFP4",
}

#: Endings of tensor names that only quantised checkpoints have -> what they are.
_QUANTISED_TENSORS = (
    (r"\.(qweight|qzeros|g_idx)$", "GPTQ or AWQ"),
    (r"\.weight\.(absmax|quant_map|quant_state\..*|nested_.*)$|\.SCB$", "bitsandbytes"),
    (r"\.(q_weight|q_scale|q_groups|q_invperm)$", "ExLlamaV2"),
    (r"\.(weight_scale_inv|weight_scale|weight_packed|input_scale)$", "FP8 or compressed-tensors"),
    (r"\.(scales|biases)$", "MLX"),
)
_ADAPTER_TENSOR = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\b")
_SHARD = re.compile(r"model-\d+-of-(\d+)\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_OTHERS = {
    "*.onnx": "an ONNX model",
    "*.msgpack": "Flax weights",
    "*.h5": "TensorFlow weights",
    "*.nemo": "a NeMo archive",
    "*.mlmodel": "a Core ML model",
    "*.tflite": "a TensorFlow Lite model",
}


def quantised(key: str, value: Any) -> str:
    """Why weights that a config's key calls quantised are not read, and what to do."""
    settings = value if isinstance(value, Mapping) else {}
    method = settings.get("quant_method")
    if key == "quantization" or (method is None and {"bits", "group_size"} <= set(settings)):
        kind = "MLX"
    else:
        kind = _METHODS.get(str(method), str(method)) if method is not None else "an unnamed method"
    bits = settings.get("bits")
    detail = f", {bits} bits" if isinstance(bits, int) else ""
    return (
        f"the weights are quantised ({kind}{detail}); quantised safetensors checkpoints are not"
        f" supported: {_UNQUANTISED}"
    )


def refuse_tensors(where: str, names: Collection[str]) -> None:
    """Raises ModelError where the names of a checkpoint's tensors show adapters or quantised
    weights.
    """
    adapter = next((n for n in names if _ADAPTER_TENSOR.search(n)), None)
    if adapter is not None:
        raise ModelError(
            f"{where}: tensor {adapter[:200]!r} belongs to a LoRA adapter;"
            f" {_merge('its base model')}"
        )
    for pattern, kind in _QUANTISED_TENSORS:
        found = next((n for n in names if re.search(pattern, n)), None)
        if found is not None:
            raise ModelError(
                f"{where}: tensor {found[:200]!r} shows that the weights are quantised ({kind});"
                f" quantised safetensors checkpoints are not supported: {_UNQUANTISED}"
            )


def without_config(folder: Path) -> str:
    """Why a folder has no config.json, as far as its other files tell, and what to do."""
    if (folder / "adapter_config.json").exists() or list(folder.glob("adapter_model.*")):
        return adapter(folder)
    if (folder / "params.json").exists():
        return (
            f"{folder} has params.json but no config.json: it is the vendor's own format; load the"
            " transformers conversion of this model, or convert it"
        )
    if (folder / "model_index.json").exists():
        return f"{folder} is a diffusers pipeline (model_index.json), not a language model"
    if len(list(folder.glob("*.gguf"))) > 1:
        return f"{folder} has no config.json and more than one .gguf file: name one"
    inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
    if inner:
        return f"{folder} has no config.json; its folder {inner[0]!r} has one: name that folder"
    if (folder / "snapshots").is_dir():
        return f"{folder} is a folder of the hub's cache: name one of {folder / 'snapshots'}"
    return f"{folder} has no config.json"


def adapter(folder: Path) -> str:
    """What a PEFT adapter's folder is, and what to do with it."""
    base = None
    path = folder / "adapter_config.json"
    if path.exists():
        try:
            base = read_json(path, limit=1 << 20).get("base_model_name_or_path")
        except ModelError:
            base = None
    named = f"its base model {base!r}" if isinstance(base, str) and base else "its base model"
    return f"{folder} holds a PEFT adapter (LoRA), not a model; {_merge(named)}"


def _merge(base: str) -> str:
    return (
        f"merge it into {base} with peft (PeftModel.from_pretrained(...).merge_and_unload(), then"
        " save_pretrained) and load the merged folder"
    )


def without_weights(folder: Path) -> str:
    """Why a folder with a config.json has no safetensors weights that can be read, and what to
    do.
    """
    none = f"{folder} has no model.safetensors, model.safetensors.index.json or .gguf file"
    if (folder / "adapter_config.json").exists() or list(folder.glob("adapter_model.*")):
        return f"{none}: {adapter(folder)}"
    gguf = sorted(p.name for p in folder.glob("*.gguf"))
    if gguf:
        return f"{folder} has no model.safetensors, but {gguf[0]!r}: name that file, not the folder"
    shards = sorted(p.name for p in folder.glob("*.safetensors") if _SHARD.fullmatch(p.name))
    if shards:
        return (
            f"{none}, but {len(shards)} shards ({shards[0]}, ...): the index is missing; download"
            " model.safetensors.index.json into the folder"
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if others:
        return (
            f"{none}; it has {others[0]!r}: if that holds the weights under transformers' names,"
            " rename it to model.safetensors"
        )
    pickled = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
    if pickled:
        return (
            f"{none}; {pickled[0]} is a pickle, which can run code and is never read: convert it to"
            " safetensors, for example with transformers:"
            " AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    for pattern, kind in _OTHERS.items():
        found = sorted(p.name for p in folder.glob(pattern))
        if found:
            return f"{none}; {found[0]} is {kind}: load the safetensors version of the model"
    if list(folder.glob("*.incomplete")):
        return f"{none}; the download was interrupted (*.incomplete): download the folder again"
    return none


def missing_shards(index: Path, names: Collection[str]) -> str | None:
    """What is missing of the shards that an index names, and what to do; None where all are
    there.
    """
    missing = [n for n in sorted(names) if not (index.parent / n).exists()]
    if not missing:
        return None
    return (
        f"{index}: the shard {missing[0]!r} is missing ({len(missing)} of {len(names)} shards are):"
        " the download is incomplete; download the folder again"
    )
