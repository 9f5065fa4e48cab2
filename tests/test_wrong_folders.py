"""Folders and files that are no model: the message names the cause and what to do."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

import vksteer as vs
from model_writers import TINY, hf_arrays, write_folder, write_shards
from tokenizer_texts import train
from vksteer.base.lfs import lfs_pointer
from vksteer.errors import ModelError
from vksteer.loading.config import Config
from vksteer.loading.model_files import open_model
from vksteer.loading.safetensors_files import read_checkpoint

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4976698672\n"
LFS = r"git-lfs pointer to a file of 4,976,698,672 bytes.*git lfs pull"


# ---- git-lfs pointers ----


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_pointers_among_model_files(tmp_path, name):
    folder = write_folder(tmp_path / "m")
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=LFS):
        open_model(folder)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
    ],
)
def test_pointers_among_tokenizer_files(tmp_path, name):
    folder = train(tmp_path)
    (folder / name).write_text(POINTER)
    with pytest.raises(ModelError, match=LFS):
        vs.Tokenizer.from_folder(folder)


def test_pointers_of_shards_gguf_vectors_and_prompts(tmp_path):
    folder = write_shards(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").write_text(POINTER)
    with pytest.raises(ModelError, match=f"model-00002-of-00003.*{LFS}"):
        open_model(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(ModelError, match=LFS):
        open_model(folder)
    for name in ("x.gguf", "v.gguf", "v.safetensors", "v.npz"):
        (tmp_path / name).write_text(POINTER)
    with pytest.raises(ModelError, match=LFS):
        open_model(tmp_path / "x.gguf")
    for name in ("v.gguf", "v.safetensors", "v.npz"):
        with pytest.raises(ModelError, match=LFS):
            vs.SteeringVector.load(tmp_path / name)
    for name in ("p.csv", "p.jsonl", "p.parquet", "p.txt"):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(ValueError, match=LFS):
            vs.data.load(tmp_path / name)


def test_what_a_pointer_is(tmp_path):
    path = tmp_path / "f"
    assert lfs_pointer(path) is None and lfs_pointer(tmp_path) is None
    path.write_text(POINTER.replace("size 4976698672\n", ""))
    assert "pointer to a file, not" in lfs_pointer(path)
    for text in ("", "version 1", "x" + POINTER, POINTER + "y" * 2000):
        path.write_text(text)
        assert lfs_pointer(path) is None


# ---- adapters, pickles, other formats ----


def tensors_named(folder, names):
    """Adds empty-ish tensors of these names to the folder's checkpoint."""
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    found = load_file(path)
    path.unlink()
    save_file({**found, **{n: np.zeros((2, 2), np.float32) for n in names}}, path)


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("config", [{"base_model_name_or_path": "x/y"}, {}, None])
def test_adapter_folders(tmp_path, with_config, config):
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(TINY))
    base = "'x/y'" if config else "its base model"
    with pytest.raises(ModelError, match=rf"adapter \(LoRA\), not a model.*{base}.*merge_and_unl"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "LoRA adapter.*merge_and_unload"),
        ("base_model.model.model.layers.0.q_proj.lora_B.default.weight", "LoRA adapter"),
        ("model.layers.0.self_attn.q_proj.qweight", "GPTQ or AWQ.*unquantised checkpoint or a GG"),
        ("model.layers.1.mlp.up_proj.qzeros", "GPTQ or AWQ"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.SCB", "bitsandbytes"),
        ("model.layers.0.mlp.up_proj.q_scale", "ExLlamaV2"),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", "FP8"),
        ("model.layers.0.mlp.up_proj.weight_packed", "compressed-tensors"),
        ("model.embed_tokens.scales", "MLX"),
        ("model.layers.0.mlp.up_proj.biases", "MLX"),
    ],
)
def test_tensors_of_adapters_and_quantised_weights(tmp_path, name, message):
    folder = write_folder(tmp_path / "m")
    tensors_named(folder, [name])
    with pytest.raises(ModelError, match=message):
        open_model(folder)


@pytest.mark.parametrize(
    "config, kind",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, "AWQ"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "fp8"}}, "FP8"),
        ({"quantization_config": {"quant_method": "new-one"}}, "new-one"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX, 4 bits"),
        ({"quantization_config": {"group_size": 64, "bits": 8}}, "MLX, 8 bits"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ],
)
def test_quantised_configs(config, kind):
    with pytest.raises(ModelError, match=rf"quantised \({kind}.*unquantised checkpoint or a GGUF"):
        Config.from_hf({**TINY, **config})


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model.bin"], r"pytorch_model.bin is a pickle.*save_pretrained"),
        (["pytorch_model-00001-of-00002.bin"], "pickle"),
        (["consolidated.00.pth"], "pickle"),
        (["model.ckpt"], "pickle"),
        (["model-00001-of-00002.safetensors"], r"1 shards.*index is missing; download"),
        (["consolidated.safetensors"], r"'consolidated.safetensors'.*rename"),
        (["flax_model.msgpack"], "Flax weights"),
        (["tf_model.h5"], "TensorFlow weights"),
        (["model.onnx"], "ONNX"),
        (["model.safetensors.incomplete"], "download was interrupted"),
        (["model-q4.gguf", "README.md"], "'model-q4.gguf': name that file"),
        ([], "has no model.safetensors"),
    ],
)
def test_folders_without_safetensors(tmp_path, files, message):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    for name in files:
        (tmp_path / name).write_bytes(b"\0" * 9)
    with pytest.raises(ModelError, match=message):
        open_model(tmp_path)


@pytest.mark.parametrize(
    "files, message",
    [
        (["params.json", "consolidated.00.pth"], "vendor's own format"),
        (["model_index.json"], "diffusers"),
        (["a.gguf", "b.gguf"], "more than one .gguf file: name one"),
        (["inner/config.json"], "'inner' has one: name that folder"),
        (["snapshots/abc/config.json"], "hub's cache"),
        ([], "has no config.json"),
    ],
)
def test_folders_without_config(tmp_path, files, message):
    for name in files:
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        (tmp_path / name).write_text("{}")
    for call in (open_model, Config.from_pretrained):
        with pytest.raises(ModelError, match=message):
            call(tmp_path)


def test_missing_shards(tmp_path):
    folder = write_shards(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    message = r"'model-00002-of-00003.safetensors' is missing \(1 of 3.*download the folder again"
    with pytest.raises(ModelError, match=message):
        read_checkpoint(folder)


def test_tensors_under_another_prefix_are_named(tmp_path):
    arrays = {f"module.{n}": a for n, a in hf_arrays(Config.from_hf(TINY)).items()}
    folder = write_folder(tmp_path / "m", TINY, arrays)
    with pytest.raises(ModelError, match=r"found: 'module.model.embed_tokens.weight'"):
        open_model(folder)
