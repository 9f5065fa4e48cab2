"""Damaged folders of every stored layout: each of 16 kinds of damage, ten times with other tensors,
gives a ModelError that names a tensor at fault and the reason.
"""

from __future__ import annotations

import random
import re
import shutil

import numpy as np
import pytest

from model_writers import write_safetensors
from vksteer.errors import ModelError
from vksteer.loading.model_files import open_model

#: A family of the zoo for each layout -> the tensors that make it one (half of the tries take
#: these).
LAYOUTS = {
    "llama3": r"q_proj|embed_tokens",
    "gpt2": r"c_attn|c_fc|wpe",  # transposed, fused by thirds, positions
    "gpt_neox": r"query_key_value",  # interleaved by head
    "gptj": r"ln_1|lm_head",  # a shared norm, a bias of the unembedding
    "opt": r"embed_positions|fc1|out_proj",  # positions after two rows
    "phi_norm": r"layernorm|lm_head",  # norms repeated for all heads
    "phi3": r"qkv_proj|gate_up_proj",  # fused by rows, fewer keys and values
    "olmo": r"q_proj|lm_head",  # norms without parameters
    "olmo2": r"q_norm|post_feedforward",  # norms over all heads, norms after only
    "cohere_norm": r"[qk]_norm",  # norms stored as [heads, d_head]
    "stablelm_parallel": r"norms\.\d",  # a tensor for each head's norm
    "glm4": r"gate_up_proj|post_mlp",  # fused gate and up, norms before and after
    "nemotron": r"layernorm|up_proj",  # plain MLP, (1 + w)
}
TRIES = 10


def arrays_of(folder):
    """{name: (dtype, array)} of a checkpoint; bfloat16 as uint16 bits."""
    import torch
    from safetensors.torch import load_file

    found = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dtype == torch.bfloat16:
            found[name] = "bfloat16", tensor.view(torch.uint16).numpy()
        else:
            found[name] = str(tensor.dtype).removeprefix("torch."), tensor.numpy()
    return found


class Damage:
    """One damage: which tensors it suits, what it does to arrays or header, what is said."""

    def __init__(self, message, suits=lambda a: True, array=None, change=None, write=None):
        self.message, self.suits, self.array, self.change = message, suits, array, change
        self.write = write


def without(arrays, name, rng):
    del arrays[name]


def renamed(arrays, name, rng):
    arrays["x." + name] = arrays.pop(name)


def stray(arrays, name, rng):
    kind, array = arrays[name]
    arrays[re.sub(r"(\.\d+\.).*", r"\1extra.weight", name)] = kind, array


def entry(change):
    """A change of the tensor's entry in the header."""
    return lambda header, name, rng: change(header[name], rng)


def shape_lies(item, rng):
    item["shape"][rng.randrange(len(item["shape"]))] += rng.choice([-1, 1, 7])


def overlaps(item, rng):
    begin, end = item["data_offsets"]
    step = 4 * rng.randint(1, 3)
    item["data_offsets"] = [begin - step, end - step] if begin >= step else [begin, end + step]
    if begin < step:
        item["shape"] = [(end + step - begin) // 4]
        item["dtype"] = "F32"


def is_matrix(array):
    return array.ndim == 2


def is_vector(array):
    return array.ndim == 1


SHAPE = r"shape \[.*\] contradicts the config, which asks for \["
KINDS = {
    "missing": Damage(r"is missing|expected exactly one of", write=without),
    "renamed": Damage(r"is missing|expected exactly one of", write=renamed),
    "rows cut off": Damage(SHAPE, array=lambda a, rng: a[: -rng.randint(1, len(a) - 1)]),
    "rows doubled": Damage(SHAPE, array=lambda a, rng: np.concatenate([a, a])),
    "one row more": Damage(SHAPE, array=lambda a, rng: np.concatenate([a, a[:1]])),
    "columns cut off": Damage(SHAPE, is_matrix, lambda a, rng: a[:, : -rng.randint(1, 5)]),
    "transposed": Damage(
        SHAPE + r".*it is transposed",
        lambda a: a.ndim == 2 and a.shape[0] != a.shape[1],
        lambda a, rng: a.T,
    ),
    "one dimension more": Damage(
        SHAPE, array=lambda a, rng: a[None] if rng.random() < 0.5 else a[..., None]
    ),
    "flattened": Damage(SHAPE, is_matrix, lambda a, rng: a.reshape(-1)),
    "wrong vector": Damage(
        SHAPE, is_vector, lambda a, rng: np.resize(a, len(a) + rng.choice([-1, 1, 64]))
    ),
    "a number": Damage(SHAPE, array=lambda a, rng: a.reshape(-1)[0].reshape(())),
    "empty": Damage(SHAPE, array=lambda a, rng: a[:0]),
    "other dtype": Damage(
        r"dtype '(I32|F64|I8|U8|BOOL|I64)' is not supported",
        write=lambda arrays, name, rng: arrays.update({name: other_dtype(arrays[name][1], rng)}),
    ),
    "stray": Damage(r"belongs to no part of a", write=stray),
    "shape lies": Damage(
        r"does not take [\d,]+ bytes|non-negative integers", change=entry(shape_lies)
    ),
    "overlap": Damage(r"overlaps|does not take|lie outside the file", change=entry(overlaps)),
    "truncated": Damage(r"lie outside the file's .* the file is truncated"),
}


def other_dtype(array, rng):
    kind, numpy = rng.choice([("I32", "<i4"), ("F64", "<f8"), ("I8", "i1"), ("I64", "<i8")])
    return kind, np.zeros(array.shape, numpy)


def damaged(folder, arrays, kind, pattern, rng, special):
    """Writes one damaged checkpoint into `folder`; returns the damage and the tensor's name."""
    damage = KINDS[kind]
    names = [n for n, (_, a) in arrays.items() if damage.suits(a)]
    chosen = [n for n in names if special and re.search(pattern, n)] or names
    if kind == "stray":
        chosen = [n for n in names if re.search(r"\.\d+\.", n)]
    name, changed, change, cut = rng.choice(chosen), dict(arrays), None, None
    if damage.write:
        damage.write(changed, name, rng)
    elif damage.array:
        stored, array = changed[name]
        changed[name] = stored, np.ascontiguousarray(damage.array(array, rng))
    elif damage.change:
        change = lambda header: damage.change(header, name, rng)
    path = folder / "model.safetensors"
    if kind == "truncated":
        write_safetensors(path, arrays)
        cut = path.stat().st_size - rng.randint(1, 500)
    write_safetensors(path, changed, change=change, cut=cut)
    return damage, name


# OLMo stores no vectors
CASES = [(x, kind) for x in LAYOUTS for kind in KINDS if (x, kind) != ("olmo", "wrong vector")]


@pytest.mark.parametrize("layout, kind", CASES)
def test_damage_is_named(zoo, tmp_path, layout, kind):
    plain = zoo.folder(layout)
    arrays = arrays_of(plain)
    shutil.copy(plain / "config.json", tmp_path)
    rng = random.Random(layout + kind)
    for i in range(TRIES):
        damage, name = damaged(tmp_path, arrays, kind, LAYOUTS[layout], rng, special=i % 2)
        with pytest.raises(ModelError) as error:
            open_model(tmp_path)
        said = str(error.value)
        assert re.search(damage.message, said), f"{name}: {said}"
        named = re.findall(r"'([\w.]+)'", said)
        if kind == "stray":
            assert any(n.endswith(".extra.weight") for n in named), said
        elif kind in ("overlap", "truncated"):
            assert any(n in arrays for n in named), said
        else:
            assert name in named, f"{name}: {said}"


def test_undamaged_layouts_are_read(zoo, tmp_path):
    """What the writer of this file writes is fine where nothing is damaged."""
    for layout in LAYOUTS:
        plain = zoo.folder(layout)
        shutil.copy(plain / "config.json", tmp_path)
        write_safetensors(tmp_path / "model.safetensors", arrays_of(plain))
        ours, theirs = open_model(tmp_path).tensors, open_model(plain).tensors
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.array(), b.array(), err_msg=a.name)


@pytest.mark.parametrize("layout, rows", [("gpt2", "wpe"), ("opt", "embed_positions")])
def test_a_table_of_positions_without_its_last_or_first_rows(zoo, tmp_path, layout, rows):
    plain = zoo.folder(layout)
    arrays = arrays_of(plain)
    shutil.copy(plain / "config.json", tmp_path)
    name = next(n for n in arrays if rows in n)
    kind, table = arrays[name]
    for shorter in (table[2:], table[:-1], table[:-2]):
        write_safetensors(tmp_path / "model.safetensors", arrays | {name: (kind, shorter)})
        with pytest.raises(ModelError, match=rf"tensor '{name}': shape.*contradicts"):
            open_model(tmp_path)


def test_heads_of_different_dtypes(zoo, tmp_path):
    plain = zoo.folder("stablelm_parallel")
    arrays = arrays_of(plain)
    shutil.copy(plain / "config.json", tmp_path)
    name = next(n for n in arrays if "q_layernorm.norms.1" in n)
    arrays[name] = "float16", arrays[name][1].astype(np.float16)
    write_safetensors(tmp_path / "model.safetensors", arrays)
    with pytest.raises(ModelError, match=r"norms.0.weight' and those of the other heads"):
        open_model(tmp_path)


def test_a_file_that_shrinks_after_it_was_opened(zoo, tmp_path):
    """Arrays are read on demand: what is no longer there is said, with the tensor's name."""
    plain = zoo.folder("gpt2")
    shutil.copytree(plain, tmp_path / "m")
    files = open_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").write_bytes(b"x" * 100)
    for tensor in files.tensors:
        with pytest.raises(ModelError, match=rf"'{tensor.name}' ends outside the file"):
            tensor.array()
