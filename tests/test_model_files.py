"""Model files: what good ones give, bit for bit, and that no damaged one loads or crashes.

The writers here are this file's own, so that a lie can be told in any field.
"""

from __future__ import annotations

import json
import random
import shutil
import struct

import numpy as np
import pytest

from vksteer import dtypes, gguf_file, safetensors_files, source
from vksteer.config import Config
from vksteer.errors import ModelError
from vksteer.tensor_names import HF_UNEMBED, gguf_name, hf_name, wanted

TINY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 37, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False}
ST_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


# ---- writers ----

def hf_arrays(config, seed=0, prefix="model.", dtype="float32", unembed=HF_UNEMBED[0]):
    """{Hugging Face name: (dtype, array)} of a random model."""
    rng = np.random.default_rng(seed)
    return {hf_name(name, config, prefix, unembed): (dtype, dtypes.from_float32(rng.standard_normal(shape, dtype=np.float32), dtype))
            for name, shape in wanted(config)}


def write_safetensors(path, arrays, change=None, tail=b"", metadata=None, raw_header=None, cut=None, length=None):
    """arrays: {name: (dtype, array)}. change(header) may lie; raw_header replaces the JSON; cut shortens the file; length lies about the header."""
    header, data, at = ({} if metadata is None else {"__metadata__": metadata}), [], 0
    for name, (dtype, array) in arrays.items():
        data.append(array.tobytes())
        header[name] = {"dtype": ST_NAMES.get(dtype, dtype), "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    if change:
        change(header)
    text = raw_header if raw_header is not None else json.dumps(header).encode()
    blob = struct.pack("<Q", len(text) if length is None else length) + text + b"".join(data) + tail
    path.write_bytes(blob[:cut] if cut is not None else blob)


def write_folder(folder, config=TINY, arrays=None, **lies):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", hf_arrays(Config.from_hf(config)) if arrays is None else arrays, **lies)
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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
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
    return 9, struct.pack("<IQ", items[0][0] if items else 4, len(items)) + b"".join(b for _, b in items)


def write_gguf(path, metadata, tensors, *, version=3, n_tensors=None, n_keys=None, change=None, tail=b"", cut=None, alignment=32):
    """tensors: [(name, type id, shape slowest first, bytes)]. change(list of dicts with name, dims, type, offset) may lie."""
    described, at = [], 0
    for name, kind, shape, data in tensors:
        described.append({"name": name, "dims": list(reversed(shape)), "type": kind, "offset": at})
        at += -(-len(data) // alignment) * alignment
    if change:
        change(described)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors, len(metadata) if n_keys is None else n_keys)
    for key, value in metadata.items() if isinstance(metadata, dict) else metadata:
        kind, data = value if isinstance(value, tuple) else gguf_value(value)
        head += gguf_string(key) + struct.pack("<I", kind) + data
    for t in described:
        head += gguf_string(t["name"]) + struct.pack("<I", len(t["dims"])) + b"".join(struct.pack("<Q", d) for d in t["dims"])
        head += struct.pack("<IQ", t["type"], t["offset"])
    head += b"\0" * (-len(head) % alignment)
    blob = head + b"".join(data + b"\0" * (-len(data) % alignment) for *_, data in tensors) + tail
    path.write_bytes(blob[:cut] if cut is not None else blob)
    return path


def gguf_metadata(hf, arch=None, **extra):
    arch = arch or {"gemma3_text": "gemma3", "mistral": "llama"}.get(hf["model_type"], hf["model_type"])
    keys = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
            "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
            "attention.key_length": "head_dim", "attention.value_length": "head_dim", "attention.layer_norm_rms_epsilon": "rms_norm_eps",
            "attention.sliding_window": "sliding_window", "rope.freq_base": "rope_theta"}
    md = {"general.architecture": arch, **{f"{arch}.{k}": hf[v] for k, v in keys.items() if hf.get(v) is not None}}
    return {**md, **extra}


def permuted(array, heads):
    """What llama.cpp's converter does to llama's q and k."""
    return np.ascontiguousarray(array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape))


def gguf_model(path, hf=TINY, seed=0, quantise=(), extra_metadata=None, gemma=False, more=(), **lies):
    """A GGUF of a random model; returns its float32 values by engine name (before quantisation). quantise: engine part names in Q8_0."""
    import gguf

    config = Config.from_hf(hf)
    rng = np.random.default_rng(seed)
    values, tensors = {}, []
    for name, shape in wanted(config):
        part = name.split(".")[-1]
        array = rng.standard_normal(shape, dtype=np.float32)
        values[name] = array
        stored = array
        if hf["model_type"] in ("llama", "mistral") and part in ("wq", "wk"):
            stored = permuted(array, config.n_heads if part == "wq" else config.n_kv_heads)
        if gemma and len(shape) == 1:
            stored = array + 1
        if part in quantise:
            tensors.append((gguf_name(name), 8, shape, gguf.quants.quantize(stored, gguf.GGMLQuantizationType.Q8_0).tobytes()))
        else:
            tensors.append((gguf_name(name), 0, shape, stored.tobytes()))
    write_gguf(path, gguf_metadata(hf, **(extra_metadata or {})), tensors + list(more), **lies)
    return values


# ---- safetensors: good files ----

@pytest.mark.parametrize("dtype", dtypes.STORAGE)
@pytest.mark.parametrize("shards", [0, 1, 3])
def test_every_tensor_is_found(tmp_path, dtype, shards):
    config = Config.from_hf(TINY)
    arrays = hf_arrays(config, dtype=dtype)
    if shards:
        write_shards(tmp_path, arrays=arrays, parts=shards)
    else:
        write_folder(tmp_path, arrays=arrays, metadata={"format": "pt"})
    files = source.open_model(tmp_path)
    assert files.config == config and [t.name for t in files.tensors] == [w.name for w in wanted(config)] and files.extra == ()
    for t in files.tensors:
        expected = arrays[hf_name(t.name, config, "model.", "lm_head.weight")][1]
        assert t.dtype == dtype and t.shape == expected.shape and t.nbytes == expected.nbytes
        np.testing.assert_array_equal(t.array().view(np.uint8), expected.view(np.uint8))
        with open(files.paths[t.file], "rb") as f:
            f.seek(t.offset)
            assert f.read(t.nbytes) == expected.tobytes()
    assert files.nbytes == sum(a.nbytes for _, a in arrays.values())


@pytest.mark.parametrize("prefix, unembed", [("model.", "lm_head.weight"), ("", "lm_head.weight"), ("language_model.model.", "language_model.lm_head.weight"),
                                             ("model.language_model.", "lm_head.weight")])
def test_prefixes(tmp_path, prefix, unembed):
    arrays = hf_arrays(Config.from_hf(TINY), prefix=prefix, unembed=unembed)
    arrays["vision_tower.patch.weight"] = ("float32", np.zeros((2, 3), np.float32))
    arrays[prefix + "layers.0.self_attn.rotary_emb.inv_freq"] = ("float32", np.zeros(8, np.float32))
    files = source.open_model(write_folder(tmp_path, arrays=arrays))
    assert sorted(files.extra) == sorted(list(arrays)[-2:])


@pytest.mark.parametrize("to", dtypes.STORAGE)
@pytest.mark.parametrize("stored", dtypes.STORAGE)
def test_conversion_equals_torch(tmp_path, stored, to):
    torch = pytest.importorskip("torch")
    arrays = hf_arrays(Config.from_hf(TINY), dtype=stored)
    files = source.open_model(write_folder(tmp_path, arrays=arrays), dtype=to)
    for t in files.tensors:
        kind, array = arrays[hf_name(t.name, files.config, "model.", "lm_head.weight")]
        if array.ndim < 2:
            assert t.dtype == stored
            continue
        assert t.dtype == to and t.nbytes == t.array().nbytes
        view = {"bfloat16": torch.bfloat16}.get(stored)
        tensor = torch.from_numpy(array.copy()).view(view) if view else torch.from_numpy(array.copy())
        expected = tensor.to(getattr(torch, to))
        got = torch.from_numpy(t.array())
        assert torch.equal(got.view(torch.bfloat16) if to == "bfloat16" else got, expected)


def test_bfloat16_rounding_equals_torch():
    torch = pytest.importorskip("torch")
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate([bits, np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0, 0x80000000], np.uint32)])
    values = bits.view(np.float32)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    ours = dtypes.from_float32(values, "bfloat16")
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(dtypes.to_float32(ours, "bfloat16")[nan]).all()


def test_families_of_the_oracle(zoo):
    """Every family as transformers saves it: all tensors found, values those of its state_dict."""
    from oracle.families import FAMILIES
    from safetensors import safe_open

    for name in FAMILIES:
        files = source.open_model(zoo.folder(name))
        tensors = {t.name: t for t in files.tensors}
        with safe_open(str(zoo.folder(name) / "model.safetensors"), "pt") as f:
            total = sum(f.get_tensor(k).numel() for k in f.keys())
            embed = f.get_tensor("model.embed_tokens.weight").float().numpy()
        assert sum(int(np.prod(t.shape)) for t in files.tensors) == total, name
        t = tensors["embed"]
        np.testing.assert_array_equal(dtypes.to_float32(t.array(), t.dtype), embed)


def test_tied_copies(tmp_path):
    tied = {**TINY, "tie_word_embeddings": True}
    arrays = hf_arrays(Config.from_hf(tied))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"]
    files = source.open_model(write_folder(tmp_path / "same", tied, arrays))
    assert files.extra == ("lm_head.weight",)
    arrays["lm_head.weight"] = ("float32", arrays["lm_head.weight"][1] + np.float32(1e-6))
    with pytest.raises(ModelError, match="lm_head.weight.*differs"):
        source.open_model(write_folder(tmp_path / "other", tied, arrays))


def test_generation_config_ends(tmp_path):
    write_folder(tmp_path, {**TINY, "eos_token_id": 2})
    assert source.open_model(tmp_path).eos_ids == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert source.open_model(tmp_path).eos_ids == (7, 2)


# ---- safetensors: damaged files ----

def lie(name, **fields):
    def change(header):
        header[name].update(fields)
    return change


EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
LIES = {
    "shape of another product": (dict(change=lie(EMBED, shape=[38, 32])), EMBED),
    "shape of the same product": (dict(change=lie(EMBED, shape=[32, 37])), "contradicts the config"),
    "more dimensions": (dict(change=lie(EMBED, shape=[1] * 9)), EMBED),
    "negative size": (dict(change=lie(EMBED, shape=[-37, -32])), EMBED),
    "float size": (dict(change=lie(EMBED, shape=[37.0, 32])), EMBED),
    "true size": (dict(change=lie(EMBED, shape=[True, 1184])), EMBED),
    "size that overflows 64 bits": (dict(change=lie(EMBED, shape=[1 << 61, 1 << 61])), EMBED),
    "product that wraps to the right one": (dict(change=lie(EMBED, shape=[37 + (1 << 59), 32])), EMBED),
    "shape is text": (dict(change=lie(EMBED, shape="37,32")), EMBED),
    "other dtype of the same width": (dict(change=lie(EMBED, dtype="I32")), "I32"),
    "dtype of another width": (dict(change=lie(EMBED, dtype="BF16")), EMBED),
    "unknown dtype": (dict(change=lie(EMBED, dtype="F33")), "F33"),
    "dtype is no text": (dict(change=lie(EMBED, dtype=7)), EMBED),
    "offsets reversed": (dict(change=lie(EMBED, data_offsets=[4736, 0])), EMBED),
    "offsets outside": (dict(change=lie(NORM, data_offsets=[1 << 40, (1 << 40) + 128])), NORM),
    "offsets huge": (dict(change=lie(NORM, data_offsets=[1 << 63, (1 << 63) + 128])), NORM),
    "offsets negative": (dict(change=lie(EMBED, data_offsets=[-4736, 0])), EMBED),
    "offsets float": (dict(change=lie(EMBED, data_offsets=[0.0, 4736.0])), EMBED),
    "three offsets": (dict(change=lie(EMBED, data_offsets=[0, 4736, 4737])), EMBED),
    "no offsets": (dict(change=lambda h: h[EMBED].pop("data_offsets")), EMBED),
    "extra field": (dict(change=lie(EMBED, strides=[1])), EMBED),
    "entry is a number": (dict(change=lambda h: h.update({EMBED: 3})), EMBED),
    "overlap": (dict(change=lambda h: h[NORM].update(data_offsets=h[EMBED]["data_offsets"][:1] + [h[EMBED]["data_offsets"][0] + 128])), "overlap"),
    "gap": (dict(change=lambda h: h.pop("model.layers.0.mlp.up_proj.weight")), "gap"),
    "trailing bytes": (dict(tail=b"\0"), "after the last tensor"),
    "cut in the data": (dict(cut=-1), "truncated"), "cut in the header": (dict(cut=100), "truncated"), "cut in the length": (dict(cut=5), "too short"),
    "empty": (dict(cut=0), "too short"),
    "header length huge": (dict(length=1 << 62), "header claims"), "header length 101 MB": (dict(length=101 << 20), "header claims"),
    "header length short": (dict(length=50), "JSON"), "header length 0": (dict(length=0), "JSON"),
    "header is a list": (dict(raw_header=b"[1,2]"), "JSON object"), "header is not JSON": (dict(raw_header=b"{'a': 1}"), "JSON"),
    "header is not UTF-8": (dict(raw_header=b'{"\xff": 1}'), "UTF-8"), "header nests deeply": (dict(raw_header=b'{"a":' + b"[" * 50000), "JSON"),
    "header full of commas": (dict(raw_header=b'{"a":[' + b"0," * 5_100_000), "more entries"),
    "header is a number of 6,000 digits": (dict(raw_header=b'{"a":' + b"9" * 6000 + b"}"), "JSON"),
    "metadata is a list": (dict(change=lambda h: h.update(__metadata__=[1])), "__metadata__"),
    "tensor named twice": (dict(raw_header=b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "twice"),
}


@pytest.mark.parametrize("case", LIES)
def test_damaged_safetensors(tmp_path, case):
    lies, message = LIES[case]
    with pytest.raises(ModelError, match=message):
        source.open_model(write_folder(tmp_path, **lies))


def test_missing_and_stray_tensors(tmp_path):
    config = Config.from_hf(TINY)
    for i, name in enumerate(hf_arrays(config)):
        arrays = hf_arrays(config)
        del arrays[name]
        with pytest.raises(ModelError, match=name):
            source.open_model(write_folder(tmp_path / str(i), arrays=arrays))
    for i, name in enumerate(("model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight", "model.layers.1.self_attn.q_norm.weight")):
        arrays = {**hf_arrays(config), name: ("float32", np.zeros(3, np.float32))}
        with pytest.raises(ModelError, match=name + ".*would change the numbers"):
            source.open_model(write_folder(tmp_path / f"stray{i}", arrays=arrays))
    both = {**hf_arrays(config), **hf_arrays(config, prefix="")}
    with pytest.raises(ModelError, match="exactly one"):
        source.open_model(write_folder(tmp_path / "both", arrays=both))
    with pytest.raises(ModelError, match="float16"):
        arrays = {n: (d, a * np.float32(1e6)) for n, (d, a) in hf_arrays(config).items()}
        for t in source.open_model(write_folder(tmp_path / "overflow", arrays=arrays), dtype="float16").tensors:
            t.array()


@pytest.mark.parametrize("change, message", [
    (lambda m, d: m.update({EMBED: "../evil.safetensors"}), "plain name"), (lambda m, d: m.update({EMBED: "/etc/passwd"}), "plain name"),
    (lambda m, d: m.update({EMBED: "a/b.safetensors"}), "plain name"), (lambda m, d: m.update({EMBED: "..\\b.safetensors"}), "plain name"),
    (lambda m, d: m.update({EMBED: "x\0.safetensors"}), "plain name"), (lambda m, d: m.update({EMBED: "pytorch_model.bin"}), "plain name"),
    (lambda m, d: m.update({EMBED: 3}), "plain name"), (lambda m, d: m.update({EMBED: "absent.safetensors"}), "missing"),
    (lambda m, d: m.update({"ghost": m[EMBED]}), "ghost"), (lambda m, d: m.update({EMBED: m[NORM] if m[NORM] != m[EMBED] else sorted(set(m.values()))[1]}), "lies in"),
    (lambda m, d: m.clear(), "weight_map"), (lambda m, d: shutil.copy(d / sorted(set(m.values()))[0], d / sorted(set(m.values()))[1]), "is also in"),
    (lambda m, d: (d / m[EMBED]).write_bytes(b""), "too short"), (lambda m, d: ((d / m[EMBED]).unlink(), (d / m[EMBED]).mkdir()), "cannot read"),
])
def test_damaged_shard_index(tmp_path, change, message):
    folder = write_shards(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"], folder)
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        source.open_model(folder)


def test_fuzzed_safetensors_headers(tmp_path):
    """Random bytes, tokens and cuts in a header: ModelError, or a model whose every tensor lies inside its file."""
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    length = struct.unpack_from("<Q", good)[0]
    rng = random.Random(11)
    tokens = [b"0", b"-1", b"18446744073709551616", b"[]", b"{}", b'"', b",", b"null", b"1e9", b"NaN", b"\0", b"\xff", b"F16", b"BF16"]
    refused = 0
    for _ in range(1500):
        blob = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(8 + length)
            kind = rng.random()
            if kind < 0.5:
                blob[at] = rng.randrange(256)
            elif kind < 0.8:
                token = rng.choice(tokens)
                blob[at:at + (len(token) if rng.random() < 0.5 else 0)] = token
            elif kind < 0.9:
                del blob[at:at + rng.randint(1, 9)]
            else:
                digit = next((i for i in range(at, 8 + length) if 48 <= blob[i] < 58), at)
                blob[digit] = 48 + rng.randrange(10)
        if rng.random() < 0.5:  # keep the length honest, so that the JSON itself is reached
            blob[:8] = struct.pack("<Q", max(0, length + len(blob) - len(good)))
        path.write_bytes(blob)
        try:
            files = source.open_model(tmp_path)
        except ModelError as error:
            assert str(tmp_path) in str(error)
            refused += 1
        else:
            assert all(t.offset + t.nbytes <= len(blob) for t in files.tensors)
    assert refused > 1200


# ---- GGUF: good files ----

def test_types_are_the_gguf_package_s():
    import gguf

    for type_id, (name, block, nbytes) in gguf_file.TYPES.items():
        try:
            kind = gguf.GGMLQuantizationType(type_id)
        except ValueError:
            continue  # newer than the installed package
        assert kind.name == name and gguf.GGML_QUANT_SIZES[kind] == (block, nbytes), name


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_gguf_llama_values(tmp_path, dtype):
    """Permutation undone, quantised matrices dequantised, vectors as stored."""
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
            assert (tmp_path / "m.gguf").read_bytes()[t.offset:t.offset + t.nbytes] == array.tobytes()
    files.close()


def test_gguf_threads_and_chunks_do_not_matter(tmp_path, monkeypatch):
    gguf_model(tmp_path / "m.gguf", quantise=("wq", "wk", "wgate", "embed"))
    whole = {t.name: t.array() for t in source.open_model(tmp_path / "m.gguf").tensors}
    monkeypatch.setattr(gguf_file, "CHUNK", 100)
    for t in source.open_model(tmp_path / "m.gguf").tensors:
        np.testing.assert_array_equal(t.array(), whole[t.name])


HF_OF_GGUF = {
    "llama": {**TINY, "rope_theta": 500000.0, "tie_word_embeddings": True},
    "mistral": {**TINY, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 9, "rope_theta": 10000.0},
    "gemma2": {**TINY, "model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "sliding_window": 9, "query_pre_attn_scalar": 16, "rope_theta": 10000.0,
               "tie_word_embeddings": True},
    "gemma3_text": {**TINY, "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"], "sliding_window": 9, "query_pre_attn_scalar": 16,
                    "num_hidden_layers": 7, "rope_theta": 1e6, "tie_word_embeddings": True},
    "qwen2": {**TINY, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6},
    "qwen3": {**TINY, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6},
}


@pytest.mark.parametrize("family", HF_OF_GGUF)
def test_gguf_facts_equal_the_config_json(tmp_path, family):
    hf = HF_OF_GGUF[family]
    gemma = family.startswith("gemma")
    values = gguf_model(tmp_path / "m.gguf", hf, gemma=gemma)
    expected = Config.from_hf(hf)
    files = source.open_model(tmp_path / "m.gguf")
    assert files.config == expected.replace(norm_offset=0.0) and Config.from_pretrained(tmp_path / "m.gguf") == files.config
    for t in files.tensors:
        stored = values[t.name] + 1 if gemma and len(t.shape) == 1 else values[t.name]
        np.testing.assert_array_equal(t.array(), stored, err_msg=t.name)


def test_gguf_rope(tmp_path):
    factors = np.linspace(1, 8, 8, dtype=np.float32)
    gguf_model(tmp_path / "a.gguf", {**TINY, "rope_theta": 500000.0}, more=[("rope_freqs.weight", 0, (8,), factors.tobytes())])
    c = Config.from_pretrained(tmp_path / "a.gguf")
    np.testing.assert_allclose(c.rope[0].inv_freq, 500000.0 ** -(np.arange(8) / 8) / factors.astype(np.float64), rtol=1e-15)
    gguf_model(tmp_path / "b.gguf", extra_metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert Config.from_pretrained(tmp_path / "b.gguf") == Config.from_hf({**TINY, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})
    gguf_model(tmp_path / "c.gguf", extra_metadata={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
                                                    "llama.rope.scaling.original_context_length": 16})
    assert Config.from_pretrained(tmp_path / "c.gguf") == Config.from_hf(
        {**TINY, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}})
    for bad in (np.zeros(8), np.ones(7), np.full(8, np.nan)):
        gguf_model(tmp_path / "d.gguf", more=[("rope_freqs.weight", 0, bad.shape, bad.astype(np.float32).tobytes())])
        with pytest.raises(ModelError, match="rope_freqs.weight"):
            source.open_model(tmp_path / "d.gguf")


# ---- GGUF: damaged files ----

def tensor_lie(name, **fields):
    def change(described):
        next(t for t in described if t["name"] == name).update(fields)
    return change


GGUF_LIES = {
    "cut in the data": (dict(cut=-40), "truncated"), "trailing bytes": (dict(tail=b"\0" * 64), "after the last tensor"), "empty": (dict(cut=0), "too short"),
    "cut in the header": (dict(cut=300), "truncated"), "version 1": (dict(version=1), "version 1"), "version 9": (dict(version=9), "version 9"),
    "big-endian": (dict(version=3 << 24), "big-endian"), "tensors: 2**60": (dict(n_tensors=1 << 60), "claims"), "keys: 2**63": (dict(n_keys=1 << 63), "claims"),
    "one tensor too many": (dict(n_tensors=22), "tensor"), "one key too many": (dict(n_keys=11), "."), "one key too few": (dict(n_keys=9), "."),
    "no dimensions": (dict(change=tensor_lie("output_norm.weight", dims=[])), "dimensions"),
    "five dimensions": (dict(change=tensor_lie("output_norm.weight", dims=[1] * 5)), "dimensions"),
    "zero size": (dict(change=tensor_lie("output_norm.weight", dims=[0])), "output_norm.weight"),
    "size 2**63": (dict(change=tensor_lie("output_norm.weight", dims=[1 << 63])), "output_norm.weight"),
    "product overflows": (dict(change=tensor_lie("output.weight", dims=[1 << 39, 1 << 39])), "output.weight"),
    "unknown type": (dict(change=tensor_lie("output.weight", type=4)), "unknown tensor type 4"),
    "type in blocks": (dict(change=tensor_lie("output_norm.weight", dims=[33], type=8)), "blocks"),
    "wrong shape": (dict(change=tensor_lie("output.weight", dims=[37, 32])), "contradicts the metadata"),
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
    "string longer than the file": (dict(extra_metadata={"x": (8, struct.pack("<Q", 1 << 62))}), "x"),
    "array of 2**62": (dict(extra_metadata={"x": (9, struct.pack("<IQ", 4, 1 << 62))}), "array of"),
    "array of arrays": (dict(extra_metadata={"x": (9, struct.pack("<IQ", 9, 1))}), "array of value type 9"),
    "strings that end outside": (dict(extra_metadata={"x": (9, struct.pack("<IQ", 8, 1 << 20))}), "truncated"),
    "unknown key of the architecture": (dict(extra_metadata={"llama.new_idea": 3}), "llama.new_idea.*not understood"),
    "experts": (dict(extra_metadata={"llama.expert_count": 8}), "llama.expert_count"),
    "other architecture": (dict(extra_metadata={"general.architecture": "mamba"}), "mamba"),
    "architecture is a number": (dict(extra_metadata={"general.architecture": 3}), "architecture 3"),
    "adapter": (dict(extra_metadata={"general.type": "adapter"}), "adapter"), "part of a split": (dict(extra_metadata={"split.count": 3}), "parts"),
    "heads differ by layer": (dict(extra_metadata={"llama.attention.head_count": [4, 2]}), "same for all layers"),
    "no heads": (dict(extra_metadata={"llama.attention.head_count": 0}), "num_attention_heads"),
    "partial rotation": (dict(extra_metadata={"llama.rope.dimension_count": 8}), "dimension_count"),
    "longrope": (dict(extra_metadata={"llama.rope.scaling.type": "longrope"}), "longrope"),
    "stray tensor": (dict(more=[("blk.0.attn_q.scale", 0, (1,), b"\0\0\0\0")]), "attn_q.scale.*would change"),
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
    blob[tensor.offset:tensor.offset + 2] = b"\xff\x7f"  # a NaN scale
    (tmp_path / "m.gguf").write_bytes(blob)
    for dtype in ("auto", "float32", "float16"):
        entry = next(t for t in source.open_model(tmp_path / "m.gguf", dtype=dtype).tensors if t.name == "l.1.wv")
        with pytest.raises(ModelError, match="blk.1.attn_v.weight.*not finite"):
            entry.array()


def test_fuzzed_gguf_headers(tmp_path):
    path = tmp_path / "m.gguf"
    gguf_model(path, quantise=("wq", "wk"), extra_metadata={"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.scores": [1.0, 2.0]})
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
                blob[at:at + 8] = struct.pack("<Q", rng.choice(special))
        if rng.random() < 0.2:
            blob = blob[:rng.randrange(len(blob))]
        path.write_bytes(blob)
        try:
            with_files = source.open_model(path)
        except ModelError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            with_files.close()
    assert refused > 1500


# ---- sources ----

@pytest.mark.parametrize("name", ["", "no/such/folder", "./nowhere", "missing.gguf", "/tmp/none/config.json", "a\0b", "../x", "bad name", "x.safetensors", "~nobody-at-all/x/y", "x" * 5000])
def test_sources_that_are_not_there(name):
    with pytest.raises(ModelError):
        source.open_model(name)
    with pytest.raises(ModelError):
        Config.from_pretrained(name)


def test_hub_names_fail_offline_with_a_reason(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="tiny-llama-chat.*hub"):
        source.open_model("nobody/tiny-no-such-model")


def test_other_wrong_arguments(tmp_path):
    for wrong in (3, None, [tmp_path], b"model"):
        with pytest.raises((TypeError, ModelError)):
            source.open_model(wrong)
    with pytest.raises(ValueError, match="int8"):
        source.open_model(tmp_path, dtype="int8")
    with pytest.raises(ModelError, match="no config.json"):
        source.open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ModelError, match="model.safetensors"):
        source.open_model(tmp_path)
    with pytest.raises(ModelError, match="alone"):
        source.open_model(tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickle"):
        source.open_model(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="neither"):
        source.open_model(tmp_path / "notes.txt")
    assert source.Config.from_pretrained(tmp_path) == Config.from_hf(TINY)


def test_folder_with_one_gguf(tmp_path):
    gguf_model(tmp_path / "m.gguf")
    assert source.open_model(tmp_path).config == Config.from_pretrained(tmp_path) == Config.from_hf(TINY)
    assert safetensors_files.BITS["BF16"] == 16
    gguf_model(tmp_path / "n.gguf")
    with pytest.raises(ModelError, match="more than one"):
        source.open_model(tmp_path)


def test_importing_is_light():
    import subprocess
    import sys

    code = ("import sys; import vksteer.source, vksteer.config, vksteer.tokenizer; "
            "print([m for m in ('tokenizers', 'huggingface_hub', 'gguf', 'jinja2', 'torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
