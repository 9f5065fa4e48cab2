"""GGUF files: values, facts and names of valid ones against the gguf package and config.json;
damaged and fuzzed ones are refused.
"""

from __future__ import annotations

import random
import struct

import numpy as np
import pytest

from model_writers import TINY, gguf_model, write_gguf
from vksteer.errors import ModelError
from vksteer.loading import dtypes, gguf_file
from vksteer.loading import model_files as source
from vksteer.loading.config import Config

# -- valid files -----------------------------------------------------------------------------------


def test_types_are_the_gguf_package_s():
    import gguf

    for type_id, (name, block, nbytes) in gguf_file.TYPES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (block, nbytes), name


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_gguf_llama_values(tmp_path, dtype):
    """The permutation is undone, quantised matrices are dequantised, vectors stay as stored."""
    import gguf

    values = gguf_model(tmp_path / "m.gguf", quantise=("wq", "wk", "wdown", "embed"))
    files = source.open_model(tmp_path / "m.gguf", dtype=dtype)
    assert files.config == Config.from_hf(TINY)
    for t in files.tensors:
        part, expected = t.name.split(".")[-1], values[t.name]
        if part in ("wq", "wk", "wdown", "embed"):
            kind = gguf.GGMLQuantizationType.Q8_0
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, kind), kind)
            target = "bfloat16" if dtype == "auto" else dtype
        else:
            target = dtype if dtype != "auto" and expected.ndim > 1 else "float32"
        assert t.dtype == target and t.shape == expected.shape
        array = t.array()
        assert array.nbytes == t.nbytes and array.flags.c_contiguous
        np.testing.assert_array_equal(array, dtypes.from_float32(expected, target), err_msg=t.name)
        if t.file is not None:
            assert (tmp_path / "m.gguf").read_bytes()[
                t.offset : t.offset + t.nbytes
            ] == array.tobytes()
    files.close()


def test_gguf_threads_and_chunks_do_not_matter(tmp_path, monkeypatch):
    gguf_model(tmp_path / "m.gguf", quantise=("wq", "wk", "wgate", "embed"))
    whole = {t.name: t.array() for t in source.open_model(tmp_path / "m.gguf").tensors}
    monkeypatch.setattr(gguf_file, "DEQUANTISE_ELEMENTS", 100)
    for t in source.open_model(tmp_path / "m.gguf").tensors:
        np.testing.assert_array_equal(t.array(), whole[t.name])


HF_OF_GGUF = {
    "llama": {**TINY, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "mistral": {
        **TINY,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 9,
        "rope_theta": 10000.0,
    },
    "gemma2": {
        **TINY,
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "sliding_window": 9,
        "query_pre_attn_scalar": 16,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        **TINY,
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "sliding_window": 9,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 7,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        **TINY,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rope_theta": 1e6,
    },
    "qwen3": {
        **TINY,
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 1e6,
    },
}


@pytest.mark.parametrize("family", HF_OF_GGUF)
def test_gguf_facts_equal_the_config_json(tmp_path, family):
    hf = HF_OF_GGUF[family]
    gemma = family.startswith("gemma")
    values = gguf_model(tmp_path / "m.gguf", hf, gemma=gemma)
    expected = Config.from_hf(hf)
    files = source.open_model(tmp_path / "m.gguf")
    assert (
        files.config == expected.replace(norm_offset=0.0)
        and Config.from_pretrained(tmp_path / "m.gguf") == files.config
    )
    for t in files.tensors:
        stored = values[t.name] + 1 if gemma and len(t.shape) == 1 else values[t.name]
        np.testing.assert_array_equal(t.array(), stored, err_msg=t.name)


def test_gguf_rope(tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    gguf_model(
        tmp_path / "a.gguf",
        {**TINY, "rope_theta": 500000.0},
        more=[("rope_freqs.weight", 0, (8,), factors.tobytes())],
    )
    c = Config.from_pretrained(tmp_path / "a.gguf")
    np.testing.assert_allclose(
        c.rope[0].inv_freq, 500000.0 ** -(np.arange(8) / 8) / factors.astype(np.float64), rtol=1e-15
    )
    gguf_model(
        tmp_path / "b.gguf",
        extra_metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    assert Config.from_pretrained(tmp_path / "b.gguf") == Config.from_hf(
        {**TINY, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    )
    gguf_model(
        tmp_path / "c.gguf",
        extra_metadata={
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 16,
        },
    )
    assert Config.from_pretrained(tmp_path / "c.gguf") == Config.from_hf(
        {
            **TINY,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        }
    )
    for bad in (np.zeros(8), np.ones(7), np.full(8, np.nan)):
        gguf_model(
            tmp_path / "d.gguf",
            more=[("rope_freqs.weight", 0, bad.shape, bad.astype(np.float32).tobytes())],
        )
        with pytest.raises(ModelError, match=r"rope_freqs.weight"):
            source.open_model(tmp_path / "d.gguf")


# -- damaged files ---------------------------------------------------------------------------------


def tensor_lie(name, **fields):
    def change(described):
        next(t for t in described if t["name"] == name).update(fields)

    return change


GGUF_LIES = {
    "cut in the data": (dict(cut=-40), "truncated"),
    "trailing bytes": (dict(tail=b"\0" * 64), "after the last tensor"),
    "empty": (dict(cut=0), "too short"),
    "cut in the header": (dict(cut=300), "truncated"),
    "version 1": (dict(version=1), "version 1"),
    "version 9": (dict(version=9), "version 9"),
    "big-endian": (dict(version=3 << 24), "big-endian"),
    "tensors: 2**60": (dict(n_tensors=1 << 60), "claims"),
    "keys: 2**63": (dict(n_keys=1 << 63), "claims"),
    "one tensor too many": (dict(n_tensors=22), "tensor"),
    "one key too many": (dict(n_keys=11), "."),
    "one key too few": (dict(n_keys=9), "."),
    "no dimensions": (dict(change=tensor_lie("output_norm.weight", dims=[])), "dimensions"),
    "five dimensions": (dict(change=tensor_lie("output_norm.weight", dims=[1] * 5)), "dimensions"),
    "zero size": (dict(change=tensor_lie("output_norm.weight", dims=[0])), "output_norm.weight"),
    "size 2**63": (
        dict(change=tensor_lie("output_norm.weight", dims=[1 << 63])),
        "output_norm.weight",
    ),
    "product overflows": (
        dict(change=tensor_lie("output.weight", dims=[1 << 39, 1 << 39])),
        "output.weight",
    ),
    "unknown type": (dict(change=tensor_lie("output.weight", type=4)), "unknown tensor type 4"),
    "type in blocks": (dict(change=tensor_lie("output_norm.weight", dims=[33], type=8)), "blocks"),
    "wrong shape": (
        dict(change=tensor_lie("output.weight", dims=[37, 32])),
        "contradicts the metadata",
    ),
    "offset outside": (dict(change=tensor_lie("output.weight", offset=1 << 40)), "outside"),
    "offset huge": (dict(change=tensor_lie("output.weight", offset=(1 << 64) - 32)), "outside"),
    "overlap": (dict(change=tensor_lie("output.weight", offset=0)), "overlap|gap"),
    "unaligned": (dict(change=lambda d: d[1].update(offset=d[1]["offset"] + 1)), "gap|overlap"),
    "named twice": (dict(change=lambda d: d[1].update(name=d[2]["name"])), "twice"),
    "name not UTF-8": (dict(change=lambda d: d[1].update(name=b"\xff\xfe")), "UTF-8"),
    "alignment 3": (dict(extra_metadata={"general.alignment": 3}), "general.alignment"),
    "alignment 0": (dict(extra_metadata={"general.alignment": 0}), "general.alignment"),
    "alignment 2**30": (dict(extra_metadata={"general.alignment": 1 << 30}), "general.alignment"),
    "unknown value type": (dict(extra_metadata={"x": (77, b"")}), "value type 77"),
    "string longer than the file": (
        dict(extra_metadata={"x": (8, struct.pack("<Q", 1 << 62))}),
        "x",
    ),
    "array of 2**62": (dict(extra_metadata={"x": (9, struct.pack("<IQ", 4, 1 << 62))}), "array of"),
    "array of arrays": (
        dict(extra_metadata={"x": (9, struct.pack("<IQ", 9, 1))}),
        "array of value type 9",
    ),
    "strings that end outside": (
        dict(extra_metadata={"x": (9, struct.pack("<IQ", 8, 1 << 20))}),
        "truncated",
    ),
    "unknown key of the architecture": (
        dict(extra_metadata={"llama.new_idea": 3}),
        "llama.new_idea.*not understood",
    ),
    "experts": (dict(extra_metadata={"llama.expert_count": 8}), "llama.expert_count"),
    "other architecture": (dict(extra_metadata={"general.architecture": "mamba"}), "mamba"),
    "architecture is a number": (
        dict(extra_metadata={"general.architecture": 3}),
        "architecture 3",
    ),
    "adapter": (dict(extra_metadata={"general.type": "adapter"}), "adapter"),
    "part of a split": (dict(extra_metadata={"split.count": 3}), "parts"),
    "heads differ by layer": (
        dict(extra_metadata={"llama.attention.head_count": [4, 2]}),
        "same for all layers",
    ),
    "no heads": (dict(extra_metadata={"llama.attention.head_count": 0}), "num_attention_heads"),
    "partial rotation": (dict(extra_metadata={"llama.rope.dimension_count": 8}), "dimension_count"),
    "longrope": (dict(extra_metadata={"llama.rope.scaling.type": "longrope"}), "longrope"),
    "stray tensor": (
        dict(more=[("blk.0.attn_q.scale", 0, (1,), b"\0\0\0\0")]),
        "attn_q.scale.*would change",
    ),
}


@pytest.mark.parametrize("case", GGUF_LIES)
def test_damaged_gguf(tmp_path, case):
    lies, message = GGUF_LIES[case]
    gguf_model(tmp_path / "m.gguf", **lies)
    with pytest.raises(ModelError, match=message):
        source.open_model(tmp_path / "m.gguf")


def test_duplicate_metadata_key(tmp_path):
    write_gguf(tmp_path / "m.gguf", [("a", 1), ("a", 2)], [])
    with pytest.raises(ModelError, match="'a' appears twice"):
        source.open_model(tmp_path / "m.gguf")


def test_gguf_block_that_is_not_finite(tmp_path):
    gguf_model(tmp_path / "m.gguf", quantise=("wv",))
    files = source.open_model(tmp_path / "m.gguf")
    tensor = files.gguf.tensors["blk.1.attn_v.weight"]
    files.close()
    blob = bytearray((tmp_path / "m.gguf").read_bytes())
    blob[tensor.offset : tensor.offset + 2] = b"\xff\x7f"  # a NaN scale
    (tmp_path / "m.gguf").write_bytes(blob)
    for dtype in ("auto", "float32", "float16"):
        entry = next(
            t
            for t in source.open_model(tmp_path / "m.gguf", dtype=dtype).tensors
            if t.name == "l.1.wv"
        )
        with pytest.raises(ModelError, match=r"blk.1.attn_v.weight.*not finite"):
            entry.array()


def test_fuzzed_gguf_headers(tmp_path):
    path = tmp_path / "m.gguf"
    gguf_model(
        path,
        quantise=("wq", "wk"),
        extra_metadata={"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [1.0, 2.0]},
    )
    good = path.read_bytes()
    with gguf_file.GGUFFile(path) as file:
        header = min(t.offset for t in file.tensors.values())
    rng = random.Random(5)
    special = [0, 1, 0xFF, 0x7F, 0x80, 0xFFFFFFFFFFFFFFFF, 1 << 63, 1 << 32, 1 << 40]
    refused = 0
    for _ in range(2500):
        blob = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(header)
            if rng.random() < 0.5:
                blob[at] = rng.randrange(256)
            else:
                blob[at : at + 8] = struct.pack("<Q", rng.choice(special))
        if rng.random() < 0.2:
            blob = blob[: rng.randrange(len(blob))]
        path.write_bytes(blob)
        message = None
        try:
            source.open_model(path).close()
        except ModelError as error:
            message = str(error)
        if message is not None:
            assert str(path) in message
            refused += 1
    assert refused > 1500
