"""Writers of model files for the tests: safetensors folders and GGUF files of random models, in
which any field can be made wrong.
"""

from __future__ import annotations

import json
import struct

import numpy as np

from vksteer.loading import dtypes
from vksteer.loading.config import Config
from vksteer.loading.gguf_layouts import gguf_name
from vksteer.loading.tensor_names import engine_tensors, hf_name

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
ST_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def hf_arrays(config, seed=0, prefix="model.", dtype="float32", unembed="lm_head.weight"):
    """{Hugging Face name: (dtype, array)} of a random model."""
    rng = np.random.default_rng(seed)
    return {
        hf_name(name, config, prefix, unembed): (
            dtype,
            dtypes.from_float32(rng.standard_normal(shape, dtype=np.float32), dtype),
        )
        for name, shape in engine_tensors(config)
    }


def write_safetensors(
    path, arrays, change=None, tail=b"", metadata=None, raw_header=None, cut=None, length=None
):
    """arrays: {name: (dtype, array)}. change(header) may change any field; raw_header replaces the
    JSON; length replaces the length of the header; cut shortens the file.
    """
    header, data, at = ({} if metadata is None else {"__metadata__": metadata}), [], 0
    for name, (dtype, array) in arrays.items():
        data.append(array.tobytes())
        header[name] = {
            "dtype": ST_NAMES.get(dtype, dtype),
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    if change:
        change(header)
    text = raw_header if raw_header is not None else json.dumps(header).encode()
    blob = struct.pack("<Q", len(text) if length is None else length) + text + b"".join(data) + tail
    path.write_bytes(blob[:cut] if cut is not None else blob)


def write_folder(folder, config=TINY, arrays=None, **lies):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(
        folder / "model.safetensors",
        hf_arrays(Config.from_hf(config)) if arrays is None else arrays,
        **lies,
    )
    return folder


def write_shards(folder, config=TINY, parts=3, arrays=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = hf_arrays(Config.from_hf(config)) if arrays is None else arrays
    weight_map, names = {}, list(arrays)
    for i in range(parts):
        file = f"model-{i + 1:05}-of-{parts:05}.safetensors"
        part = {n: arrays[n] for n in names[i::parts]}
        write_safetensors(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def gguf_string(text):
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value):
    """Python value -> (type, bytes): int as u32, float as f32, str, bool, list of these."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, gguf_string(value)
    items = [gguf_value(v) for v in value]
    return 9, struct.pack("<IQ", items[0][0] if items else 4, len(items)) + b"".join(
        b for _, b in items
    )


def write_gguf(
    path,
    metadata,
    tensors,
    *,
    version=3,
    n_tensors=None,
    n_keys=None,
    change=None,
    tail=b"",
    cut=None,
    alignment=32,
):
    """tensors: [(name, type id, shape with the slowest axis first, bytes)]. change(list of dicts
    with name, dims, type and offset) may change any field.
    """
    described, at = [], 0
    for name, kind, shape, data in tensors:
        described.append({"name": name, "dims": list(reversed(shape)), "type": kind, "offset": at})
        at += -(-len(data) // alignment) * alignment
    if change:
        change(described)
    head = b"GGUF" + struct.pack(
        "<IQQ",
        version,
        len(tensors) if n_tensors is None else n_tensors,
        len(metadata) if n_keys is None else n_keys,
    )
    for key, value in metadata.items() if isinstance(metadata, dict) else metadata:
        kind, data = value if isinstance(value, tuple) else gguf_value(value)
        head += gguf_string(key) + struct.pack("<I", kind) + data
    for t in described:
        head += (
            gguf_string(t["name"])
            + struct.pack("<I", len(t["dims"]))
            + b"".join(struct.pack("<Q", d) for d in t["dims"])
        )
        head += struct.pack("<IQ", t["type"], t["offset"])
    head += b"\0" * (-len(head) % alignment)
    blob = head + b"".join(data + b"\0" * (-len(data) % alignment) for *_, data in tensors) + tail
    path.write_bytes(blob[:cut] if cut is not None else blob)
    return path


def gguf_metadata(hf, arch=None, **extra):
    arch = arch or {"gemma3_text": "gemma3", "mistral": "llama"}.get(
        hf["model_type"], hf["model_type"]
    )
    keys = {
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "attention.sliding_window": "sliding_window",
        "rope.freq_base": "rope_theta",
    }
    md = {
        "general.architecture": arch,
        **{f"{arch}.{k}": hf[v] for k, v in keys.items() if hf.get(v) is not None},
    }
    return {**md, **extra}


def permuted(array, heads):
    """The order of rows that llama.cpp's converter gives to q and k of a Llama."""
    return np.ascontiguousarray(
        array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    )


def gguf_model(
    path, hf=TINY, seed=0, quantise=(), extra_metadata=None, gemma=False, more=(), drop=(), **lies
):
    """Writes a GGUF file of a random model; returns its float32 values by engine name, before
    quantisation. quantise: names of parts that are stored in Q8_0. drop: metadata keys left out,
    without the architecture.
    """
    import gguf

    config = Config.from_hf(hf)
    rng = np.random.default_rng(seed)
    values, tensors = {}, []
    for name, shape in engine_tensors(config):
        part = name.split(".")[-1]
        array = rng.standard_normal(shape, dtype=np.float32)
        values[name] = array
        stored = array
        if hf["model_type"] in ("llama", "mistral") and part in ("wq", "wk"):
            stored = permuted(array, config.n_heads if part == "wq" else config.n_kv_heads)
        if gemma and len(shape) == 1:
            stored = array + 1
        if part in quantise:
            tensors.append(
                (
                    gguf_name(name),
                    8,
                    shape,
                    gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0).tobytes(),
                )
            )
        else:
            tensors.append((gguf_name(name), 0, shape, stored.tobytes()))
    metadata = gguf_metadata(hf, **(extra_metadata or {}))
    metadata = {k: v for k, v in metadata.items() if k.partition(".")[2] not in drop}
    write_gguf(path, metadata, tensors + list(more), **lies)
    return values
