"""Tied embeddings as files have them, against transformers: under the other name, listed but left
out, and with two tensors that differ.
"""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import folders
from model_writers import TINY, hf_arrays, write_folder
from vksteer.errors import ModelError
from vksteer.loading import tied_tensors
from vksteer.loading.config import Config
from vksteer.loading.model_files import open_model

EMBED, UNEMBED = "model.embed_tokens.weight", "lm_head.weight"
TIED = ["llama3", "gemma2", "gemma3"]  # families of the zoo whose embeddings are tied


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(tied_tensors, "_said", set())


def stored(zoo, tmp_path, name, edit):
    """A float32 copy of a tied model's folder whose tensors `edit` has changed."""
    import torch
    from safetensors.torch import load_file as load_torch

    folder = folders.copy(zoo.folder(name), tmp_path / "m", dtype="float32")
    path = folder / "model.safetensors"
    tensors = {n: t.to(torch.float32).numpy() for n, t in load_torch(str(path)).items()}
    assert UNEMBED not in tensors
    edit(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def ids_of(folder):
    return folders.tokens(30, json.loads((folder / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("name", TIED)
def test_under_the_other_name(zoo, tmp_path, name):
    want = folders.hf_logits(zoo.folder(name), ids_of(zoo.folder(name)))
    folder = stored(zoo, tmp_path, name, lambda t: t.update({UNEMBED: t.pop(EMBED)}))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ties")
        folders.assert_close(folders.logits(folder, ids_of(folder)), want)
    folders.assert_close(folders.hf_logits(folder, ids_of(folder)), want)


@pytest.mark.parametrize("name", TIED)
def test_two_tensors_that_differ_are_both_used(zoo, tmp_path, name):
    def edit(tensors):
        noise = np.random.default_rng(0).standard_normal(tensors[EMBED].shape)
        tensors[UNEMBED] = tensors[EMBED] + np.float32(0.3) * noise.astype(np.float32)

    folder = stored(zoo, tmp_path, name, edit)
    with pytest.warns(UserWarning, match=r"'lm_head.weight' differs.*both are used"):
        ours = folders.logits(folder, ids_of(folder))
    folders.assert_close(ours, folders.hf_logits(folder, ids_of(folder)))
    tied = folders.hf_logits(zoo.folder(name), ids_of(folder))
    assert np.abs(ours - tied).max() > 1e-2
    with warnings.catch_warnings():  # it is said once
        warnings.filterwarnings("error", message=".*ties")
        open_model(folder)


def test_equal_values_of_another_dtype_are_tied(tmp_path):
    tied = {**TINY, "tie_word_embeddings": True}
    arrays = hf_arrays(Config.from_hf(tied), dtype="bfloat16")
    kind, bits = arrays[EMBED]
    arrays[UNEMBED] = ("float32", (bits.astype(np.uint32) << 16).view(np.float32))
    assert kind == "bfloat16" and open_model(write_folder(tmp_path / "m", tied, arrays)).config.tied
    arrays[UNEMBED] = ("float32", arrays[UNEMBED][1][::-1].copy())
    with pytest.warns(UserWarning, match="both are used"):
        assert not open_model(write_folder(tmp_path / "n", tied, arrays)).config.tied


@pytest.mark.parametrize("dropped, kept", [(UNEMBED, EMBED), (EMBED, UNEMBED)])
def test_listed_in_the_index_but_left_out(zoo, tmp_path, dropped, kept):
    want = folders.hf_logits(zoo.folder("llama3"), ids_of(zoo.folder("llama3")))
    folder = stored(zoo, tmp_path, "llama3", lambda t: t.update({kept: t.pop(EMBED)}))
    names = list(load_file(folder / "model.safetensors"))
    shard = "model-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys([*names, dropped], shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    folders.assert_close(folders.logits(folder, ids_of(folder)), want)
    folders.assert_close(folders.hf_logits(folder, ids_of(folder)), want)
    index["weight_map"]["model.layers.0.mlp.up_proj.scale"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"up_proj\.scale"):
        open_model(folder)


def test_untied_without_an_unembedding_names_the_remedy(tmp_path):
    arrays = hf_arrays(Config.from_hf(TINY))
    arrays.pop(UNEMBED)
    folder = write_folder(tmp_path / "m", TINY, arrays)
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing.*tie_word_embeddings"):
        open_model(folder)
    assert open_model(folder, config_overrides={"tie_word_embeddings": True}).config.tied


def test_another_number_of_rows_is_refused(tmp_path):
    tied = {**TINY, "tie_word_embeddings": True}
    arrays = hf_arrays(Config.from_hf(tied))
    rows = np.ascontiguousarray(arrays[EMBED][1][:-2])
    arrays[UNEMBED] = ("float32", rows)
    with (
        pytest.warns(UserWarning, match="both are used"),
        pytest.raises(ModelError, match=r"lm_head.weight.*shape"),
    ):
        open_model(write_folder(tmp_path / "m", tied, arrays))
