"""GGUF models in several files, in files of any name, and as Ollama writes Gemma 3; made with the
gguf package.
"""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from model_writers import TINY, gguf_model
from vksteer.errors import ModelError
from vksteer.loading.config import Config
from vksteer.loading.gguf_parts import open_gguf
from vksteer.loading.model_files import open_model


def write_part(path, source, keep, number, count, *, whole_metadata, total):
    """One part of a model, with some of its tensors, as gguf-split writes it."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    if whole_metadata:
        for key, value in source.metadata.items():
            if key == "general.architecture":
                continue
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](key, value)
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name in keep:
        tensor = source.tensors[name]
        kind = gguf.GGMLQuantizationType[tensor.type]
        raw = source.raw(tensor)
        if tensor.type == "F32":
            writer.add_tensor(name, raw.reshape(-1).view(np.float32).reshape(tensor.shape))
        else:
            writer.add_tensor(name, raw.copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def split(tmp_path):
    """(folder of three parts, the same model in one file)."""
    whole = tmp_path / "whole.gguf"
    hf = TINY | {"hidden_size": 64, "intermediate_size": 96}
    gguf_model(whole, hf=hf, quantise=("w_up", "wq"))
    folder = tmp_path / "parts"
    folder.mkdir()
    with open_gguf(whole) as source:
        names = list(source.tensors)
        for i in range(3):
            write_part(
                folder / f"m-{i + 1:05}-of-00003.gguf",
                source,
                names[i::3],
                i,
                3,
                whole_metadata=i == 0,
                total=len(names),
            )
    return folder, whole


def values(path):
    files = open_model(path, dtype="float32")
    try:
        return files.config, {t.name: t.array() for t in files.tensors}
    finally:
        files.close()


@pytest.mark.parametrize("by", ["first part", "folder", "folder with a projector"])
def test_split_model_equals_the_whole(split, by):
    folder, whole = split
    if by == "folder with a projector":
        shutil.copy(whole, folder / "mmproj-m.gguf")
    source = folder if by != "first part" else folder / "m-00001-of-00003.gguf"
    config, tensors = values(source)
    expected_config, expected = values(whole)
    assert config == expected_config == Config.from_pretrained(source)
    assert list(tensors) == list(expected)
    for name, array in tensors.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def test_split_model_runs_as_the_whole(split):
    import vksteer as vs

    folder, whole = split
    rows = [[1, 5, 7, 9]]
    with vs.Model.from_pretrained(whole, progress=False) as model:
        expected = model.run(rows).logits
    with vs.Model.from_pretrained(folder, progress=False) as model:
        np.testing.assert_array_equal(model.run(rows).logits, expected)


def test_parts_that_do_not_make_a_model(split):
    folder, _ = split
    first, second, third = sorted(folder.iterdir())
    with pytest.raises(ModelError, match=r"part 2 of 3 parts: name the first, m-00001-of-00003"):
        open_model(second)
    with pytest.raises(ModelError, match=r"part 2 of 3"):
        Config.from_pretrained(second)
    third.rename(folder / "other.gguf")
    with pytest.raises(ModelError, match=r"1 of 3 parts are missing.*m-00003-of-00003\.gguf"):
        open_model(first)
    shutil.copy(second, third)
    with pytest.raises(ModelError, match=r"metadata say part 2 of 3, its name says 3 of 3"):
        open_model(first)
    (folder / "other.gguf").rename(third)
    renamed = first.rename(folder / "renamed.gguf")
    with pytest.raises(ModelError, match=r"called NAME-00001-of-00003\.gguf"):
        open_model(renamed)
    with pytest.raises(ModelError, match=r"part 2 of 3.*which is missing"):
        open_model(second)
    renamed.rename(first)
    second.write_bytes(second.read_bytes()[:-40])
    with pytest.raises(ModelError, match=r"m-00002-of-00003\.gguf.*truncated"):
        open_model(first)


def test_parts_of_two_models(split, tmp_path):
    """A tensor in two parts, or one too few, is found."""
    folder, whole = split
    with open_gguf(whole) as source:
        names = list(source.tensors)
        path = folder / "m-00003-of-00003.gguf"
        more = {"whole_metadata": False, "total": len(names)}
        write_part(path, source, [*names[2::3], names[0]], 2, 3, **more)
        with pytest.raises(ModelError, match="is in another part"):
            open_model(folder)
        write_part(path, source, names[2::3][:-1], 2, 3, **more)
        with pytest.raises(ModelError, match=r"split\.tensors\.count"):
            open_model(folder)


@pytest.mark.parametrize("name", ["sha256-6a0746a1ec1a", "model", "model.bin", "model.json"])
def test_the_content_decides_not_the_name(tmp_path, name):
    gguf_model(tmp_path / "m.gguf")
    expected = values(tmp_path / "m.gguf")
    folder = tmp_path / "blobs"
    folder.mkdir()
    (tmp_path / "m.gguf").rename(folder / name)
    for source in (folder / name, folder):
        config, tensors = values(source)
        assert config == expected[0] == Config.from_pretrained(source)
        for part, array in tensors.items():
            np.testing.assert_array_equal(array, expected[1][part])


def test_files_that_are_no_models(tmp_path):
    (tmp_path / "weights").write_bytes(b"PK\3\4" * 20)
    with pytest.raises(ModelError, match="neither a folder, a GGUF file nor"):
        open_model(tmp_path / "weights")
    (tmp_path / "m.gguf").write_bytes(b"PK\3\4" * 20)
    with pytest.raises(ModelError, match="does not begin with 'GGUF'"):
        open_model(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert Config.from_pretrained(tmp_path / "config.json").n_layers == TINY["num_hidden_layers"]


# -- Ollama's Gemma 3 ------------------------------------------------------------------------------

GEMMA3 = {
    **TINY,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "sliding_window": 8,
    "query_pre_attn_scalar": TINY["head_dim"],
    "tie_word_embeddings": True,
}


def ollama(path, hf, drop=(), more=None, tensors=()):
    """A Gemma 3 with metadata as Ollama's converter names them."""
    gguf_model(path, hf=hf, gemma=True, extra_metadata=more, more=tensors, drop=drop)


@pytest.mark.parametrize("names", ["old", "new"])
def test_ollama_gemma3_text(tmp_path, names):
    """The one-billion model: other names for the rotation's bases."""
    hf = GEMMA3 | {"rope_theta": 500000.0, "rope_local_base_freq": 20000.0}
    more = {"gemma3.rope.local.freq_base": 20000.0, "tokenizer.ggml.add_padding_token": False}
    drop = []
    if names == "old":
        drop = ["rope.freq_base"]
        more["gemma3.rope.global.freq_base"] = 500000.0
    ollama(tmp_path / "m.gguf", hf, drop, more)
    ours, theirs = Config.from_pretrained(tmp_path / "m.gguf"), Config.from_hf(hf)
    np.testing.assert_array_equal(ours.rope[0][0], theirs.rope[0][0])
    assert ours.rope_table == theirs.rope_table and ours.window == theirs.window
    assert ours.norm_eps == theirs.norm_eps


def test_ollama_gemma3_with_vision(tmp_path):
    """Larger models: the vision tower's keys and tensors beside those of the language model, no
    epsilon and bases, a scaled rotation, and tokens of images without a row in the embedding.
    """
    hf = GEMMA3 | {
        "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    vision = {
        "gemma3.vision.block_count": 2,
        "gemma3.vision.embedding_length": 24,
        "gemma3.vision.attention.layer_norm_epsilon": 1e-6,
        "gemma3.mm.tokens_per_image": 256,
        "tokenizer.ggml.eos_token_ids": (9, _array_of_u32([1, 5])),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(TINY["vocab_size"] + 1)],
        "tokenizer.ggml.unknown_token_id": 3,
    }
    ollama(
        tmp_path / "m.gguf",
        hf,
        ["attention.layer_norm_rms_epsilon", "rope.freq_base"],
        vision,
        [("v.blk.0.attn_q.weight", 0, (2, 2), b"\0" * 16), ("mm.w", 0, (2,), b"\0" * 8)],
    )
    files = open_model(tmp_path / "m.gguf")
    ours, theirs = files.config, Config.from_hf(hf)
    assert ours.norm_eps == theirs.norm_eps == 1e-6
    assert [len(t[0]) for t in ours.rope] == [len(t[0]) for t in theirs.rope]
    for mine, right in zip(ours.rope, theirs.rope):
        np.testing.assert_array_equal(mine[0], right[0])
    assert set(files.extra) == {"v.blk.0.attn_q.weight", "mm.w"}
    assert ours.eos_ids == (1, 5)
    assert len(files.tokenizer()) == TINY["vocab_size"]
    files.close()


def _array_of_u32(items):
    import struct

    return struct.pack("<IQ", 4, len(items)) + b"".join(struct.pack("<I", i) for i in items)
