"""Every engine tensor of every family against transformers' own model of the same folder, in both
styles of folders: names, prefixes, fused, transposed and interleaved tensors, norms without
parameters, old buffers.
"""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

import folders
from oracle.families import ALL, WIDE
from vksteer.errors import ModelError
from vksteer.loading import dtypes
from vksteer.loading.config import Config
from vksteer.loading.model_files import open_model
from vksteer.loading.tensor_names import hf_name

NAMES = [name for name in ALL if name not in WIDE]

#: Engine's name in a layer -> names of modules that transformers may give it, without suffix.
PLAIN = {
    "q": ("self_attn.q_proj", "attn.q_proj"),
    "k": ("self_attn.k_proj", "attn.k_proj"),
    "v": ("self_attn.v_proj", "attn.v_proj"),
    "o": (
        "self_attn.o_proj",
        "attn.out_proj",
        "self_attn.out_proj",
        "self_attn.dense",
        "attention.dense",
    ),
    "gate": ("mlp.gate_proj",),
    "up": ("mlp.up_proj", "mlp.fc_in", "mlp.fc1", "fc1", "mlp.dense_h_to_4h"),
    "down": ("mlp.down_proj", "mlp.fc_out", "mlp.fc2", "fc2", "mlp.dense_4h_to_h"),
}


def base_of(model):
    """The module that has the embeddings and the layers."""
    inner = getattr(model, model.base_model_prefix)
    return inner.decoder if hasattr(inner, "decoder") else inner


def first(module, *names):
    for name in names:
        found = module
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def layer_tensors(layer, config, kind):
    """The engine's names -> torch tensors of one layer, as transformers' forward pass uses them."""
    import torch

    found = {}
    for name, modules in PLAIN.items():
        module = first(layer, *modules)
        if module is not None:
            found["w" + name], found["b" + name] = module.weight, module.bias
    d, q = (
        config.hidden_size,
        config.num_attention_heads
        * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
    )
    if kind == "gpt2":  # y = x W + b
        for part in ("weight", "bias"):
            pieces = getattr(layer.attn.c_attn, part).split(d, dim=-1)
            for name, piece in zip("qkv", pieces):
                found[part[0] + name] = piece.T if part == "weight" else piece
        for name, module in (
            ("o", layer.attn.c_proj),
            ("up", layer.mlp.c_fc),
            ("down", layer.mlp.c_proj),
        ):
            found["w" + name], found["b" + name] = module.weight.T, module.bias
    if kind == "gpt_neox":
        heads, module = config.num_attention_heads, layer.attention.query_key_value
        for part in ("weight", "bias"):
            whole = getattr(module, part)
            if whole is None:
                continue
            rows = whole.view(heads, 3 * (d // heads), *whole.shape[1:]).chunk(3, dim=1)
            for name, piece in zip("qkv", rows):
                found[part[0] + name] = piece.reshape(d, *whole.shape[1:])
    if kind == "phi3":
        kv = (layer.self_attn.qkv_proj.weight.shape[0] - q) // 2
        pieces = layer.self_attn.qkv_proj.weight.split([q, kv, kv])
        found.update(zip(("wq", "wk", "wv"), pieces))
    if kind in ("phi3", "glm4"):
        found.update(zip(("wgate", "wup"), layer.mlp.gate_up_proj.weight.chunk(2)))
    found.update(norms(layer, config, kind))
    return {name: torch.as_tensor(t) for name, t in found.items() if t is not None}


def norms(layer, config, kind):
    import torch

    def of(name, module):
        if module is None:
            return {}
        gain = getattr(module, "weight", None)
        gain = torch.ones(config.hidden_size) if gain is None else gain
        return {name: gain, "b" + name: getattr(module, "bias", None)}

    before = first(layer, "ln_1", "input_layernorm", "self_attn_layer_norm")
    after = first(layer, "ln_2", "post_attention_layernorm", "final_layer_norm")
    pre_mlp = first(layer, "pre_feedforward_layernorm")
    post_mlp = first(layer, "post_feedforward_layernorm")
    found = of("ln1", before)
    if kind == "glm4":
        found |= of("ln1_post", layer.post_self_attn_layernorm) | of("ln2", after)
        found |= of("ln2_post", layer.post_mlp_layernorm)
    elif post_mlp is not None:  # OLMo 2 and 3, EXAONE 4, Gemma 2 and 3
        found |= of("ln1_post", after) | of("ln2", pre_mlp) | of("ln2_post", post_mlp)
    else:
        found |= of("ln2", after if after is not None else before)
    for name in ("q_norm", "k_norm"):
        module = first(layer, "self_attn." + name, f"self_attn.{name[0]}_layernorm")
        if module is None:
            continue
        heads = config.num_attention_heads if name == "q_norm" else config.num_key_value_heads
        if kind == "stablelm":
            found[name] = torch.cat([norm.weight for norm in module.norms])
        elif kind == "phi":
            found[name], found["b" + name] = (t.repeat(heads) for t in (module.weight, module.bias))
        else:
            found[name] = module.weight.reshape(-1)
    return found


def expected(folder, kind):
    import torch

    model = folders.hf_model(folder)
    config, base = model.config, base_of(model)
    found = {"embed": model.get_input_embeddings().weight}
    positions = first(base, "wpe", "embed_positions")
    if positions is not None:
        found["pos_embed"] = positions.weight[2:] if kind == "opt" else positions.weight
    for i, layer in enumerate(first(base, "h", "layers")):
        found |= {f"l.{i}.{n}": t for n, t in layer_tensors(layer, config, kind).items()}
    final = first(base, "ln_f", "norm", "final_layer_norm", "final_layernorm")
    gain = getattr(final, "weight", None)
    found["ln_final"] = gain if gain is not None else torch.ones(config.hidden_size)
    found["bln_final"] = getattr(final, "bias", None)
    head = model.get_output_embeddings()
    found["unembed"], found["bunembed"] = head.weight, head.bias
    return {n: t.detach().float().numpy() for n, t in found.items() if t is not None}


def values(tensor):
    return dtypes.to_float32(tensor.array(), tensor.dtype)


def kind_of(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.parametrize("style", ["new", "released"])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_what_transformers_uses(zoo, name, style):
    folder = zoo.folder(name, style)
    files, theirs = open_model(folder), expected(folder, kind_of(folder))
    assert files.config == Config.from_pretrained(zoo.folder(name))
    if files.config.tied:
        theirs.pop("unembed")
    assert {t.name for t in files.tensors} == set(theirs)
    for tensor in files.tensors:
        array = tensor.array()
        assert array.shape == tensor.shape and array.flags.c_contiguous, tensor.name
        assert array.nbytes == tensor.nbytes
        np.testing.assert_array_equal(values(tensor), theirs[tensor.name], err_msg=tensor.name)
        if tensor.file is not None:  # what the engine maps
            with open(files.paths[tensor.file], "rb") as stream:
                stream.seek(tensor.offset)
                assert stream.read(tensor.nbytes) == array.tobytes(), tensor.name


@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes(zoo, name):
    folder = zoo.folder(name)
    stored = {t.name: values(t) for t in open_model(folder).tensors}
    for dtype in dtypes.STORAGE:
        for tensor in open_model(folder, dtype=dtype).tensors:
            kept = len(tensor.shape) < 2
            assert kept or tensor.dtype == dtype
            want = stored[tensor.name]
            if not kept:
                want = dtypes.to_float32(dtypes.from_float32(want, dtype), dtype)
            assert tensor.array().nbytes == tensor.nbytes
            np.testing.assert_array_equal(values(tensor), want, err_msg=tensor.name)


#: Families whose tensors are views of the mapped file, but for what is listed.
TURNED = {
    "gpt2": r"\.w",
    "gpt_neox": r"\.[wb][qkv]$",
    "olmo": r"\.ln[12]$|ln_final$",
    "phi_norm": r"[qk]_norm$",
    "stablelm_parallel": r"[qk]_norm$",
}


@pytest.mark.parametrize("name", NAMES)
def test_only_what_must_be_turned_is_an_array(zoo, name):
    turned = TURNED.get(name, TURNED["gpt_neox"] if name.startswith("gpt_neox") else r"^$")
    for tensor in open_model(zoo.folder(name)).tensors:
        assert (tensor.file is None) == bool(re.search(turned, tensor.name)), tensor.name


def test_shards(zoo, tmp_path):
    """Fused tensors in several files."""
    from safetensors.torch import load_file, save_file

    for name in ("phi3", "gpt2", "gpt_neox"):
        plain = zoo.folder(name)
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(plain / "config.json", folder)
        tensors = sorted(load_file(plain / "model.safetensors").items())
        shards = {f"model-0000{i + 1}-of-00003.safetensors": tensors[i::3] for i in range(3)}
        for file, part in shards.items():
            save_file(dict(part), folder / file)
        index = {n: file for file, part in shards.items() for n, _ in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        ours, whole = open_model(folder).tensors, open_model(plain).tensors
        for a, b in zip(ours, whole, strict=True):
            assert a.name == b.name
            np.testing.assert_array_equal(a.array(), b.array(), err_msg=a.name)


def test_unembedding_of_an_untied_gpt2_must_be_there(zoo, tmp_path):
    folder = folders.copy(zoo.folder("gpt2"), tmp_path / "m", tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"'lm_head.weight' is missing.*tie_word_embeddings"):
        open_model(folder)


#: Families with other names of the embedding -> that name, and the unembedding's.
EMBEDDINGS = {
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "opt": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
    "gpt_neox_sequential": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "cohere": ("model.embed_tokens.weight", "lm_head.weight"),
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_tied_embeddings_under_the_other_name(zoo, tmp_path, name):
    from safetensors.torch import load_file, save_file

    embed, unembed = EMBEDDINGS[name]
    folder = folders.copy(zoo.folder(name), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    whole = {t.name: values(t) for t in open_model(folder).tensors}
    tensors[unembed] = tensors.pop(embed)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")
    files = open_model(folder)
    assert files.config.tied and {t.name for t in files.tensors} == set(whole)
    for tensor in files.tensors:
        np.testing.assert_array_equal(values(tensor), whole[tensor.name])
    tensors[embed] = tensors[unembed] + 1  # two that differ: both are used
    save_file(tensors, folder / "model.safetensors")
    with pytest.warns(UserWarning, match=f"'{unembed}' differs from '{embed}'"):
        files = open_model(folder)
    assert not files.config.tied
    found = {t.name: values(t) for t in files.tensors}
    np.testing.assert_array_equal(found["unembed"], whole["embed"])
    assert (found["embed"] != whole["embed"]).any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("text", ["ministral3", "mistral"])
def test_the_text_model_of_one_that_also_sees_images(zoo, tmp_path, text, tied):
    """Ministral 3 and Mistral Small 3.1: Mistral3ForConditionalGeneration, in the layout that
    transformers writes and in the one with the text model inside `model`.
    """
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    plain = zoo.folder(text)
    inner = json.loads((plain / "config.json").read_text())
    inner = {k: v for k, v in inner.items() if k not in ("architectures", "dtype")}
    vision = transformers.PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        head_dim=8,
    )
    config = transformers.Mistral3Config(
        vision_config=vision,
        text_config=transformers.AutoConfig.for_model(**json.loads(json.dumps(inner))),
        tie_word_embeddings=tied,
    )
    model = transformers.Mistral3ForConditionalGeneration(config).to(torch.float32)
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    outer = tmp_path / "outer"
    outer.mkdir()
    shutil.copy(tmp_path / "config.json", outer)
    stored = load_file(tmp_path / "model.safetensors")
    save_file(
        {
            n.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head", "lm_head"
            ): t
            for n, t in stored.items()
        },
        outer / "model.safetensors",
    )
    for folder in (tmp_path, outer):
        files = open_model(folder)
        facts = files.config.replace(architecture="", tied=False)
        assert facts == Config.from_pretrained(plain).replace(architecture="", tied=False)
        assert files.config.tied == tied and files.config.model_type == text
        for tensor in files.tensors:
            name = hf_name(tensor.name, files.config, "model.language_model.", "lm_head.weight")
            np.testing.assert_array_equal(values(tensor), state[name].numpy(), err_msg=name)
