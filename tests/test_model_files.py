"""Safetensors folders and sources: what good ones give, bit for bit, and that no damaged
one loads or crashes.
"""

from __future__ import annotations

import json
import random
import shutil
import struct

import numpy as np
import pytest

from model_writers import TINY, gguf_model, hf_arrays, write_folder, write_shards
from vksteer.errors import ModelError
from vksteer.loading import dtypes, safetensors_files
from vksteer.loading import model_files as source
from vksteer.loading.config import Config
from vksteer.loading.tensor_names import engine_tensors, hf_name

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
    assert (
        files.config == config
        and [t.name for t in files.tensors] == [w.name for w in engine_tensors(config)]
        and files.extra == ()
    )
    for t in files.tensors:
        expected = arrays[hf_name(t.name, config, "model.", "lm_head.weight")][1]
        assert t.dtype == dtype and t.shape == expected.shape and t.nbytes == expected.nbytes
        np.testing.assert_array_equal(t.array().view(np.uint8), expected.view(np.uint8))
        with open(files.paths[t.file], "rb") as f:
            f.seek(t.offset)
            assert f.read(t.nbytes) == expected.tobytes()
    assert files.nbytes == sum(a.nbytes for _, a in arrays.values())


@pytest.mark.parametrize(
    "prefix, unembed",
    [
        ("model.", "lm_head.weight"),
        ("", "lm_head.weight"),
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
    ],
)
def test_prefixes(tmp_path, prefix, unembed):
    arrays = hf_arrays(Config.from_hf(TINY), prefix=prefix, unembed=unembed)
    arrays["vision_tower.patch.weight"] = ("float32", np.zeros((2, 3), np.float32))
    arrays[prefix + "layers.0.self_attn.rotary_emb.inv_freq"] = ("float32", np.zeros(8, np.float32))
    files = source.open_model(write_folder(tmp_path, arrays=arrays))
    assert sorted(files.extra) == sorted(list(arrays)[-2:])


@pytest.mark.parametrize("to", dtypes.STORAGE)
@pytest.mark.parametrize("stored", dtypes.STORAGE)
def test_conversion_equals_torch(tmp_path, stored, to):
    import torch

    arrays = hf_arrays(Config.from_hf(TINY), dtype=stored)
    files = source.open_model(write_folder(tmp_path, arrays=arrays), dtype=to)
    for t in files.tensors:
        _kind, array = arrays[hf_name(t.name, files.config, "model.", "lm_head.weight")]
        if array.ndim < 2:
            assert t.dtype == stored
            continue
        assert t.dtype == to and t.nbytes == t.array().nbytes
        view = {"bfloat16": torch.bfloat16}.get(stored)
        tensor = (
            torch.from_numpy(array.copy()).view(view) if view else torch.from_numpy(array.copy())
        )
        expected = tensor.to(getattr(torch, to))
        got = torch.from_numpy(t.array())
        assert torch.equal(got.view(torch.bfloat16) if to == "bfloat16" else got, expected)


def test_bfloat16_rounding_equals_torch():
    import torch

    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint64).astype(np.uint32)
    bits = np.concatenate(
        [
            bits,
            np.array(
                [
                    0x3F808000,
                    0x3F818000,
                    0x7F7FFFFF,
                    0x7F800000,
                    0x7F800001,
                    0xFF800001,
                    0x7FFFFFFF,
                    0,
                    0x80000000,
                ],
                np.uint32,
            ),
        ]
    )
    values = bits.view(np.float32)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    ours = dtypes.from_float32(values, "bfloat16")
    nan = np.isnan(values)
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    assert np.isnan(dtypes.to_float32(ours, "bfloat16")[nan]).all()


def test_families_of_the_oracle(zoo):
    """The first families as transformers saves them: all tensors found, values those of the
    state_dict. test_family_tensors.py has those whose files hold other tensors.
    """
    from safetensors import safe_open

    from oracle.families import FAMILIES
    from oracle.more_families import MORE_FAMILIES

    for name in FAMILIES.keys() - MORE_FAMILIES.keys():
        files = source.open_model(zoo.folder(name))
        tensors = {t.name: t for t in files.tensors}
        with safe_open(str(zoo.folder(name) / "model.safetensors"), "pt") as f:
            total = sum(f.get_tensor(k).numel() for k in f.keys())  # noqa: SIM118  no mapping
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
    with pytest.warns(UserWarning, match=r"lm_head.weight.*differs"):
        other = source.open_model(write_folder(tmp_path / "other", tied, arrays))
    assert not other.config.tied and "unembed" in {t.name for t in other.tensors}


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
    "shape of the same product": (
        dict(change=lie(EMBED, shape=[32, 37])),
        "contradicts the config",
    ),
    "more dimensions": (dict(change=lie(EMBED, shape=[1] * 9)), EMBED),
    "negative size": (dict(change=lie(EMBED, shape=[-37, -32])), EMBED),
    "float size": (dict(change=lie(EMBED, shape=[37.0, 32])), EMBED),
    "true size": (dict(change=lie(EMBED, shape=[True, 1184])), EMBED),
    "size that overflows 64 bits": (dict(change=lie(EMBED, shape=[1 << 61, 1 << 61])), EMBED),
    "product that wraps to the right one": (
        dict(change=lie(EMBED, shape=[37 + (1 << 59), 32])),
        EMBED,
    ),
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
    "overlap": (
        dict(
            change=lambda h: h[NORM].update(
                data_offsets=h[EMBED]["data_offsets"][:1] + [h[EMBED]["data_offsets"][0] + 128]
            )
        ),
        "overlap",
    ),
    "gap": (dict(change=lambda h: h.pop("model.layers.0.mlp.up_proj.weight")), "gap"),
    "trailing bytes": (dict(tail=b"\0"), "after the last tensor"),
    "cut in the data": (dict(cut=-1), "truncated"),
    "cut in the header": (dict(cut=100), "truncated"),
    "cut in the length": (dict(cut=5), "too short"),
    "empty": (dict(cut=0), "too short"),
    "header length huge": (dict(length=1 << 62), "header claims"),
    "header length 101 MB": (dict(length=101 << 20), "header claims"),
    "header length short": (dict(length=50), "JSON"),
    "header length 0": (dict(length=0), "JSON"),
    "header is a list": (dict(raw_header=b"[1,2]"), "JSON object"),
    "header is not JSON": (dict(raw_header=b"{'a': 1}"), "JSON"),
    "header is not UTF-8": (dict(raw_header=b'{"\xff": 1}'), "UTF-8"),
    "header nests deeply": (dict(raw_header=b'{"a":' + b"[" * 50000), "JSON"),
    "header full of commas": (dict(raw_header=b'{"a":[' + b"0," * 5_100_000), "more entries"),
    "header is a number of 6,000 digits": (dict(raw_header=b'{"a":' + b"9" * 6000 + b"}"), "JSON"),
    "metadata is a list": (dict(change=lambda h: h.update(__metadata__=[1])), "__metadata__"),
    "tensor named twice": (
        dict(
            raw_header=b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'
            b'"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
        ),
        "twice",
    ),
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
    for i, name in enumerate(
        (
            "model.layers.0.self_attn.q_proj.bias",
            "model.layers.2.mlp.up_proj.weight",
            "model.layers.1.self_attn.q_norm.weight",
        )
    ):
        arrays = {**hf_arrays(config), name: ("float32", np.zeros(3, np.float32))}
        with pytest.raises(ModelError, match=name + ".*would change the numbers"):
            source.open_model(write_folder(tmp_path / f"stray{i}", arrays=arrays))
    both = {**hf_arrays(config), **hf_arrays(config, prefix="")}
    with pytest.raises(ModelError, match="exactly one"):
        source.open_model(write_folder(tmp_path / "both", arrays=both))
    arrays = {n: (d, a * np.float32(1e6)) for n, (d, a) in hf_arrays(config).items()}
    embed = next(
        t
        for t in source.open_model(
            write_folder(tmp_path / "overflow", arrays=arrays), dtype="float16"
        ).tensors
        if t.name == "embed"
    )
    with pytest.raises(ModelError, match="float16"):
        embed.array()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, d: m.update({EMBED: "../evil.safetensors"}), "plain name"),
        (lambda m, d: m.update({EMBED: "/etc/passwd"}), "plain name"),
        (lambda m, d: m.update({EMBED: "a/b.safetensors"}), "plain name"),
        (lambda m, d: m.update({EMBED: "..\\b.safetensors"}), "plain name"),
        (lambda m, d: m.update({EMBED: "x\0.safetensors"}), "plain name"),
        (lambda m, d: m.update({EMBED: "pytorch_model.bin"}), "plain name"),
        (lambda m, d: m.update({EMBED: 3}), "plain name"),
        (lambda m, d: m.update({EMBED: "absent.safetensors"}), "missing"),
        (lambda m, d: m.update({"ghost": m[EMBED]}), "ghost"),
        (
            lambda m, d: m.update(
                {EMBED: m[NORM] if m[NORM] != m[EMBED] else sorted(set(m.values()))[1]}
            ),
            "lies in",
        ),
        (lambda m, d: m.clear(), "weight_map"),
        (
            lambda m, d: shutil.copy(
                d / sorted(set(m.values()))[0], d / sorted(set(m.values()))[1]
            ),
            "is also in",
        ),
        (lambda m, d: (d / m[EMBED]).write_bytes(b""), "too short"),
        (lambda m, d: ((d / m[EMBED]).unlink(), (d / m[EMBED]).mkdir()), "cannot read"),
    ],
)
def test_damaged_shard_index(tmp_path, change, message):
    folder = write_shards(tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"], folder)
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message):
        source.open_model(folder)


def opened_or_refused(folder):
    """(the opened files, "") or (None, the refusal)."""
    try:
        return source.open_model(folder), ""
    except ModelError as error:
        return None, str(error)


def test_fuzzed_safetensors_headers(tmp_path):
    """Random bytes, tokens and cuts in a header: ModelError, or a model whose every tensor
    lies inside its file.
    """
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    length = struct.unpack_from("<Q", good)[0]
    rng = random.Random(11)
    tokens = [
        b"0",
        b"-1",
        b"18446744073709551616",
        b"[]",
        b"{}",
        b'"',
        b",",
        b"null",
        b"1e9",
        b"NaN",
        b"\0",
        b"\xff",
        b"F16",
        b"BF16",
    ]
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
                blob[at : at + (len(token) if rng.random() < 0.5 else 0)] = token
            elif kind < 0.9:
                del blob[at : at + rng.randint(1, 9)]
            else:
                digit = next((i for i in range(at, 8 + length) if 48 <= blob[i] < 58), at)
                blob[digit] = 48 + rng.randrange(10)
        if rng.random() < 0.5:  # keep the length honest, so that the JSON itself is reached
            blob[:8] = struct.pack("<Q", max(0, length + len(blob) - len(good)))
        path.write_bytes(blob)
        files, message = opened_or_refused(tmp_path)
        if files is None:
            assert str(tmp_path) in message
            refused += 1
        else:
            assert all(t.offset + t.nbytes <= len(blob) for t in files.tensors)
    assert refused > 1200


# ---- sources ----


@pytest.mark.parametrize(
    "name",
    [
        "",
        "no/such/folder",
        "./nowhere",
        "missing.gguf",
        "/tmp/none/config.json",
        "a\0b",
        "../x",
        "bad name",
        "x.safetensors",
        "~nobody-at-all/x/y",
        "x" * 5000,
    ],
)
def test_sources_that_are_not_there(name):
    with pytest.raises(ModelError):
        source.open_model(name)
    with pytest.raises(ModelError):
        Config.from_pretrained(name)


def test_hub_names_fail_offline_with_a_reason(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"tiny-llama-chat.*hub"):
        source.open_model("nobody/tiny-no-such-model")


def test_other_wrong_arguments(tmp_path):
    for wrong in (3, None, [tmp_path], b"model"):
        with pytest.raises((TypeError, ModelError)):
            source.open_model(wrong)
    with pytest.raises(ValueError, match="int8"):
        source.open_model(tmp_path, dtype="int8")
    with pytest.raises(ModelError, match=r"no config.json"):
        source.open_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    with pytest.raises(ModelError, match=r"model.safetensors"):
        source.open_model(tmp_path)
    with pytest.raises(ModelError, match="alone"):
        source.open_model(tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickle"):
        source.open_model(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="neither"):
        source.open_model(tmp_path / "notes.txt")
    assert Config.from_pretrained(tmp_path) == Config.from_hf(TINY)


def test_folder_with_one_gguf(tmp_path):
    gguf_model(tmp_path / "m.gguf")
    assert (
        source.open_model(tmp_path).config
        == Config.from_pretrained(tmp_path)
        == Config.from_hf(TINY)
    )
    assert safetensors_files.BITS["BF16"] == 16
    gguf_model(tmp_path / "n.gguf")
    with pytest.raises(ModelError, match="more than one"):
        source.open_model(tmp_path)


def test_importing_is_light():
    import subprocess
    import sys

    code = (
        "import sys; import vksteer.loading.model_files, vksteer.loading.config,"
        " vksteer.loading.tokenizer; print([m for m in ('tokenizers', 'huggingface_hub', 'gguf',"
        " 'jinja2', 'torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
