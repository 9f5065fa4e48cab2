"""Damaged GGUF files of every architecture: sixteen kinds of damage, each at ten places. Each file
is refused with a message that names the tensor or the metadata key at fault.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from gguf_models import convert
from model_writers import write_gguf
from oracle import families
from test_gguf_families import CHANGES
from vksteer.errors import ModelError
from vksteer.loading.gguf_file import GGUFFile
from vksteer.loading.model_files import open_model

PLACES = 10
#: One small model for each architecture, and for each layout that it has.
NAMES = (
    *("gpt2", "gpt_neox", "gptj", "phi", "phi3", "phi3_long", "olmo", "olmo2", "olmo3", "smollm3"),
    *("granite", "cohere_norm", "cohere2", "stablelm", "stablelm_parallel", "glm4", "exaone4"),
    *("exaone4_window", "ministral3", "arcee", "nemotron", "seed_oss", "gemma"),
)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A function from a family's name to (metadata, [(name, type, shape, bytes)]) of its file."""
    made = {}

    def get(name):
        if name not in made:
            prefix, stored, arguments = families.ALL[name]
            arguments = {**arguments, **CHANGES.get(name, {})}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(families.ALL, name, (prefix, stored, arguments))
                folder = families.build(name, tmp_path_factory.mktemp(name))
            with GGUFFile(convert(folder, folder / "m.gguf")) as file:
                metadata = {
                    k: v.tolist() if isinstance(v, np.ndarray) else v
                    for k, v in file.metadata.items()
                }
                tensors = [
                    (t.name, 0, t.shape, file.raw(t).tobytes()) for t in file.tensors.values()
                ]
            made[name] = metadata, tensors
        return made[name]

    return get


def resized(tensor, shape):
    name, kind, _, data = tensor
    values = np.resize(np.frombuffer(data, np.float32), int(np.prod(shape)))
    return (name, kind, tuple(shape), values.tobytes())


def required(tensors):
    """Indices of tensors whose absence no flag explains: those of later layers and of the whole
    model.
    """
    top = ("token_embd.weight", "output_norm.weight", "position_embd.weight")
    return [
        i
        for i, (name, *_) in enumerate(tensors)
        if name in top or (name.startswith("blk.") and not name.startswith("blk.0."))
    ]


def sized(tensors):
    """Indices of tensors whose sizes the metadata give: not the vocabulary's."""
    return [i for i in required(tensors) if tensors[i][0] != "token_embd.weight"]


def matrices(tensors):
    """Of `sized`, those that have another shape when transposed. A norm of heads is also read as
    one vector.
    """
    return [
        i
        for i in sized(tensors)
        if len(tensors[i][2]) == 2
        and tensors[i][2][0] != tensors[i][2][1]
        and "norm" not in tensors[i][0]
    ]


# Each kind: (random generator, metadata, tensors) -> (what the message must name, lies for the
# writer). It may change its arguments.


def missing(rng, metadata, tensors):
    return [tensors.pop(rng.choice(required(tensors)))[0]], {}


def shaped(change, among=sized):
    def damage(rng, metadata, tensors):
        i = rng.choice(among(tensors))
        tensors[i] = resized(tensors[i], change(tensors[i][2]))
        return [tensors[i][0]], {}

    return damage


def renamed(rng, metadata, tensors):
    i = rng.choice(required(tensors))
    old, *rest = tensors[i]
    tensors[i] = (old.replace(".weight", "_.weight").replace(".bias", "_.bias"), *rest)
    return [old, tensors[i][0]], {}


def twice(rng, metadata, tensors):
    i, j = rng.sample(range(len(tensors)), 2)
    tensors[i] = (tensors[j][0], *tensors[i][1:])
    return [tensors[j][0]], {}


def stray(rng, metadata, tensors):
    name, *rest = tensors[rng.choice(sized(tensors))]
    tensors.append((name.replace(".weight", ".scale").replace(".bias", ".scale"), *rest))
    return [tensors[-1][0]], {}


def beyond(rng, metadata, tensors):
    i = rng.choice([i for i, (name, *_) in enumerate(tensors) if name.startswith("blk.")])
    _, _, part = tensors[i][0].split(".", 2)
    tensors.append((f"blk.{rng.randrange(7, 99)}.{part}", *tensors[i][1:]))
    return [tensors[-1][0]], {}


def halved_type(rng, metadata, tensors):
    # of a short vector only the padding would be longer
    i = rng.choice([i for i, t in enumerate(tensors[:-1]) if len(t[3]) > 64])
    return [t[0] for t in tensors], dict(change=lambda d: d[i].update(type=1))


def moved(rng, metadata, tensors):
    i = rng.randrange(1, len(tensors))
    step = rng.choice([32, -32, 1 << 20])
    return [t[0] for t in tensors], dict(change=lambda d: d[i].update(offset=d[i]["offset"] + step))


def cut(rng, metadata, tensors):
    size = sum(-(-len(data) // 32) * 32 for *_, data in tensors)
    return [t[0] for t in tensors], dict(cut=-rng.randrange(64, size))


def wrong_size(rng, metadata, tensors):
    arch = metadata["general.architecture"]
    sizes = ["embedding_length", "block_count", "feed_forward_length"]
    if f"{arch}.attention.key_length" in metadata:  # else another number of heads is another model
        sizes.append("attention.head_count")
    key = f"{arch}.{rng.choice(sizes)}"
    metadata[key] += rng.choice([1, 2, 17])
    return [key, key.partition(".")[2], "blk.", "position_embd", "output_norm", *USUAL], {}


#: How a config.json calls the sizes that a message may name.
USUAL = ("hidden_size", "num_attention_heads", "n_embd", "n_head", "heads", "layers", "head size")


def wrong_kind(rng, metadata, tensors):
    arch = metadata["general.architecture"]
    numbers = [
        k
        for k, v in metadata.items()
        if k.startswith(arch + ".") and isinstance(v, (int, float)) and k not in UNREAD
    ]
    key = rng.choice(sorted(numbers))
    metadata[key] = "many"
    return [key], {}


#: Of StableLM the tensors say what this key says; see gguf_layouts.py.
UNREAD = ("stablelm.use_parallel_residual",)

KINDS = {
    "missing": missing,
    "one row less": shaped(lambda s: (s[0] - 1, *s[1:])),
    "one row more": shaped(lambda s: (s[0] + 1, *s[1:])),
    "half the rows": shaped(lambda s: (max(1, s[0] // 2), *s[1:])),
    "one column less": shaped(lambda s: (*s[:-1], s[-1] - 1)),
    "transposed": shaped(lambda s: s[::-1], matrices),
    "flat": shaped(lambda s: (int(np.prod(s)),), matrices),
    "three axes": shaped(lambda s: (2, *s)),
    "renamed": renamed,
    "twice": twice,
    "stray": stray,
    "beyond the last layer": beyond,
    "half precision": halved_type,
    "moved": moved,
    "cut": cut,
    "another size": wrong_size,
    "text for a number": wrong_kind,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_damage_is_named(content, tmp_path, name, kind):
    for seed in range(PLACES):
        metadata, tensors = content(name)
        metadata, tensors = dict(metadata), list(tensors)
        rng = random.Random(f"{name} {kind} {seed}")
        named, lies = KINDS[kind](rng, metadata, tensors)
        path = write_gguf(tmp_path / "m.gguf", metadata, tensors, **lies)
        with pytest.raises(ModelError) as refused:
            open_model(path).close()
        message = str(refused.value)
        assert str(path) in message and any(n in message for n in named), (named, message)


def test_an_undamaged_file_is_read(content, tmp_path):
    for name in NAMES:
        metadata, tensors = content(name)
        open_model(write_gguf(tmp_path / "m.gguf", metadata, tensors)).close()
