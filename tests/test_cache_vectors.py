"""Cache vectors: extraction from pairs of prompts, files, and everything that is refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import vksteer as vs
from oracle.compare import assert_same_bits
from vksteer.kv import rotating

KINDS = ["gpt2", "llama3", "gemma2", "qwen3"]


@pytest.fixture
def setting(zoo, rng):
    def make(name, lengths=((7, 12, 5), (7, 3, 9))):
        model = zoo.engine(name)
        draw = lambda n: rng.integers(0, model.config.d_vocab, n).tolist()
        return model, *([draw(n) for n in part] for part in lengths)

    return make


def extract(model, *prompts, **options):
    return vs.kv.extract(model, *prompts, progress=False, **options)


def entries(model, rows, position, site):
    """float64 [rows, L, G, d_head]: a site of every layer at one position of each row."""
    names = [f"blocks.{l}.attn.{site}" for l in range(model.config.n_layers)]
    run = model.run(rows, capture=names, logits=None)
    width = run.tokens.shape[1]
    at = [(width - len(r) + position) if position >= 0 else width + position for r in rows]
    return np.stack([[run[name][b, at[b]] for name in names] for b in range(len(rows))]).astype(
        np.float64
    )


# -- extraction ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("position", [-1, -3, 1])
def test_a_vector_is_the_mean_difference_of_captures(setting, name, position):
    """Keys as in the cache are hook_rot_k, or hook_k where nothing rotates, bit for bit."""
    model, positive, negative = setting(name)
    key = "hook_rot_k" if model.config.rope else "hook_k"
    vector = extract(model, positive, negative, position=position)
    alone = extract(model, positive, position=position, difference=False)
    for array, only, site in (
        (vector.keys, alone.keys, key),
        (vector.values, alone.values, "hook_v"),
    ):
        high, low = (entries(model, rows, position, site) for rows in (positive, negative))
        want = (sum(high, np.zeros_like(high[0])) - sum(low, np.zeros_like(low[0]))) / 3
        assert_same_bits(site, array, want.astype(np.float32))
        assert_same_bits(site, only, (sum(high, np.zeros_like(high[0])) / 3).astype(np.float32))
    assert vector.meta["position"] == position and vector.meta["n"] == 3
    assert vector.meta["model_hash"] == model.fingerprint


def test_made_keys(setting, monkeypatch):
    """Two pairs whose caches are made by hand."""
    model, positive, negative = setting("llama3", ((2, 3), (4, 2)))
    c = model.config
    made = np.arange(4.0)[:, None] * np.ones(2 * c.n_layers * c.n_kv_heads * c.d_head)
    made = (made**2).reshape(4, 2, c.n_layers, c.n_kv_heads, c.d_head)  # 0, 1 | 4, 9
    made[:, 1] *= -1
    monkeypatch.setattr("vksteer.kv.extraction._entries", lambda *_: iter(made))
    vector = extract(model, positive, negative)
    assert (vector.keys == -6).all() and (vector.values == 6).all()


@pytest.mark.parametrize("rotate", ["cache", "unrotated"])
def test_equal_prompts_give_exact_zeros(setting, rotate):
    model, positive, _ = setting("qwen3")
    vector = extract(model, positive, positive, rotate=rotate)
    assert not vector.keys.any() and not vector.values.any()


def test_micro_batches_change_nothing(setting, monkeypatch):
    model, positive, negative = setting("gemma2")
    want = extract(model, positive, negative)
    monkeypatch.setattr("vksteer.kv.extraction.PASS_TOKENS", 10)
    seen = []
    vector = vs.kv.extract(model, positive, negative, progress=lambda *x: seen.append(x))
    assert_same_bits("keys", vector.keys, want.keys)
    assert_same_bits("values", vector.values, want.values)
    assert seen[-1] == (6, 6) and len(seen) > 2


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt_neox", "cohere_norm", "phi3_long"])
def test_unrotated_keys_do_not_depend_on_the_position(setting, name):
    """In the first layer the key of a token depends on its position only by the rotation. Prompts
    of both tables of longrope. The largest error met is 1.3e-7 of the largest key.
    """
    model, _, _ = setting(name)
    prompts = [[1] * n + [2] for n in (3, 11, 44)]
    keys = [
        extract(model, [p], difference=False, rotate="unrotated").keys[0].astype(np.float64)
        for p in prompts
    ]
    for other in keys[1:]:
        assert np.abs(other - keys[0]).max() < 5e-6 * np.abs(keys[0]).max()
    cached = [extract(model, [p], difference=False).keys[0] for p in prompts]
    assert np.abs(cached[0] - cached[1]).max() > 1e-2 * np.abs(keys[0]).max()


@pytest.mark.parametrize("name", ["llama_yarn", "gemma3", "gpt_neox", "cohere_norm", "phi3_long"])
def test_rotation_and_back(zoo, name, rng):
    config = vs.Config.from_pretrained(str(zoo.folder(name)))
    keys = rng.standard_normal((config.n_layers, config.n_kv_heads, config.d_head))
    for long in (False, True):
        there = rotating.rotated(config, keys, 37, long)
        back = rotating.rotated(config, there, 37, long, back=True)
        assert np.abs(back - keys).max() < 1e-14


def test_pruned_heads(rng):
    keys, values = rng.standard_normal((2, 3, 4, 5))
    values[0] = 1.0  # all heads of layer 0 are equally long: the lowest stay
    values[1, 2] *= 100
    vector = vs.kv.CacheVector(keys, values)
    for k in (1, 2, 4):
        pruned = vector.keep_heads(k)
        for l in range(3):
            order = sorted(range(4), key=lambda g: (-vector.head_norms[l, g], g))
            for g in range(4):
                kept = g in order[:k]
                assert (pruned.keys[l, g] == (vector.keys[l, g] if kept else 0)).all()
                assert (pruned.values[l, g] == (vector.values[l, g] if kept else 0)).all()
    assert vector.keep_heads(2).values[0, :2].all() and not vector.keep_heads(2).values[0, 2:].any()


# -- contrastive prompts ---------------------------------------------------------------------------


def test_contrastive_prompts(zoo):
    model = zoo.engine("llama3", "chat")
    questions, steps, answers = ([f"{kind}{i}" for i in range(5)] for kind in "qsa")
    make = lambda **options: vs.kv.contrastive_prompts(model, questions, steps, answers, **options)
    given = [[1, 2], [0], [4, 3], [1], [0, 1, 2]]
    positive, negative = make(choose=given)
    for i in range(5):
        for rows, turns in (
            (positive, [f"{s}\n{a}" for s, a in zip(steps, answers, strict=True)]),
            (negative, answers),
        ):
            messages = [
                {"role": role, "content": text[k]}
                for k in given[i]
                for role, text in (("user", questions), ("assistant", turns))
            ]
            messages.append({"role": "user", "content": questions[i]})
            want = model.tokenizer.encode(model.tokenizer.render(messages), add_bos=False)
            assert rows[i] == want
    drawn = make(n_shot=2, seed=3)
    assert drawn == make(n_shot=2, seed=3) and drawn != make(n_shot=2, seed=4)
    assert all(len(p) > len(n) for p, n in zip(*drawn, strict=True))
    vector = extract(model, *drawn)
    assert vector.values.any()
    for options, message in (
        (dict(n_shot=5), "at least 6 questions"),
        (dict(n_shot=0), "n_shot"),
        (dict(choose="distance"), "'random'"),
        (dict(choose=given[:3]), "3 lists of examples for 5"),
        (dict(choose=[[0], *given[1:]]), r"choose\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="5 questions, 4 steps"):
        vs.kv.contrastive_prompts(model, questions, steps[:4], answers)
    with pytest.raises(ValueError, match="answers must be"):
        vs.kv.contrastive_prompts(model, questions, steps, [*answers[:4], " "])


# -- files and copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_files(setting, tmp_path, ending):
    model, positive, negative = setting("llama3")
    vector = extract(model, positive, negative, rotate="unrotated", keep_heads=1, position=-2)
    path = tmp_path / f"v.{ending}"
    vector.save(path)
    loaded = vs.kv.CacheVector.load(path, model)
    for other in (
        loaded,
        vs.kv.load(path),
        copy.deepcopy(vector),
        pickle.loads(pickle.dumps(vector)),
    ):
        assert_same_bits("keys", other.keys, vector.keys)
        assert_same_bits("values", other.values, vector.values)
        assert (other.rotate, other.position) == ("unrotated", -2)
        assert dict(other.meta) == dict(vector.meta) and vector.meta["keep_heads"] == 1
        assert other.fingerprint == vector.fingerprint
    if ending == "npz":
        with np.load(path, allow_pickle=False) as file:
            names = set(file.files)
    else:
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            names = set(file.keys())
    layers = range(model.config.n_layers)
    assert {f"kv.{part}.{l}" for part in ("key", "value") for l in layers} <= names


@pytest.mark.parametrize("ending", ["safetensors", "npz"])
def test_damaged_files(tmp_path, ending):
    vector = vs.kv.CacheVector(np.ones((2, 1, 3)), np.ones((2, 1, 3)))
    path = tmp_path / f"v.{ending}"
    vector.save(path)
    data = path.read_bytes()
    for n in (0, 5, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        with pytest.raises(vs.ModelError):
            vs.kv.CacheVector.load(path)
    name = b"kv.value.1"
    path.write_bytes(data.replace(name, b"kv.value.7"))
    with pytest.raises(vs.ModelError, match=r"kv\.key\.l and kv\.value\.l"):
        vs.kv.CacheVector.load(path)
    for text in ("cache_vector", "rotate"):
        coding = "utf-32-le" if ending == "npz" and "_" in text else "ascii"
        changed = data.replace(text.encode(coding), text[::-1].encode(coding))
        assert changed != data
        path.write_bytes(changed)
        with pytest.raises(vs.ModelError):
            vs.kv.CacheVector.load(path)
    vs.SteeringVector(np.ones(3), 1).save(path)
    with pytest.raises(vs.ModelError):
        vs.kv.CacheVector.load(path)
    with pytest.raises(ValueError, match=r"\.safetensors or \.npz"):
        vector.save(tmp_path / "v.gguf")


# -- refused before work ---------------------------------------------------------------------------


def test_refused_vectors(setting):
    ones = np.ones((2, 1, 3))
    for keys, values, options, message in (
        (ones[0], ones, {}, "must have the axes"),
        (ones, np.ones((2, 1, 4)), {}, "must have one shape"),
        (ones * np.nan, ones, {}, "finite"),
        (ones, ones, dict(rotate="back"), "'cache' or 'unrotated'"),
        (ones, ones, dict(meta={"a": object()}), "JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            vs.kv.CacheVector(keys, values, **options)
    with pytest.raises(ValueError, match="keep_heads"):
        vs.kv.CacheVector(ones, ones).keep_heads(2)


def test_refused_extractions(setting):
    model, positive, negative = setting("llama3")
    for arguments, options, message in (
        ((positive, negative[:2]), {}, "3 positive and 2 negative"),
        ((positive,), {}, "negative is missing"),
        ((positive, [[1], [1, 2], [1, 2]]), {}, r"negative\[0\] has one token"),
        ((positive, negative), dict(position=-4), r"negative\[1\] has 3 tokens and no position"),
        ((positive, negative), dict(position=0.5), "position"),
        ((positive, negative), dict(rotate="none"), "'cache' or 'unrotated'"),
        ((positive, negative), dict(keep_heads=3), "2 key/value heads"),
        ((positive, negative), dict(keep_heads=0), "keep_heads"),
        (([], []), {}, "positive is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(model, *arguments, **options)


def test_refused_edits(setting, zoo):
    model, positive, _negative = setting("llama3")
    c = model.config
    vector = extract(model, positive, difference=False)
    with pytest.raises(TypeError, match="CacheVector"):
        vs.kv.CacheSteer(vector.keys)
    for options in (
        dict(key=np.nan),
        dict(value="2"),
        dict(position=-1.5),
        dict(append=""),
        dict(append=[]),
        dict(append=[-1]),
    ):
        with pytest.raises(ValueError, match="|".join(options)):
            vs.kv.CacheSteer(vector, **options)

    def refused(message, cache_edits, prompts=positive, error=ValueError, **options):
        dispatches = model._engine.dispatches
        with pytest.raises(error, match=message):
            model.generate(prompts, cache_edits=cache_edits, progress=False, **options)
        assert model._engine.dispatches == dispatches, "refused before any work"

    def steer(**options):
        return vs.kv.CacheSteer(vector, **options)

    plain = vs.kv.CacheVector(np.ones((c.n_layers, 1, 4)), np.ones((c.n_layers, 1, 4)))
    refused("belongs to another model", [vs.kv.CacheSteer(plain)])
    meta = dict(vector.meta, model_hash="0" * 64)
    stranger = vs.kv.CacheVector(vector.keys, vector.values, meta=meta)
    refused("made from another model", [vs.kv.CacheSteer(stranger)])
    refused("row 1 has one token", [steer()], [[1, 2], [3]])
    refused("row 0 has 7 tokens and no position -8", [steer(position=-8)])
    refused("row 0 has 7 tokens and no position 7", [steer(position=7)])
    refused("names none of the model's", [steer(layers=slice(90, None))])
    refused("is no layer of this model", [steer(layers=[c.n_layers])])
    refused("is not in the vocabulary", [steer(append=[c.d_vocab])])
    refused("needs a tokenizer", [steer(append="\n")])
    refused("append different tokens", [steer(), steer(append=[1])])
    refused("more than float32 holds", [steer(value=1e38), steer(value=-3e38)])
    refused("3 rows", [[steer()], []])
    refused("mixes edits and lists", [steer(), []], error=TypeError)
    refused("cache_edits", [vs.Steer(vs.SteeringVector(np.ones(c.d_model), 1))], error=TypeError)
    refused("the model's context holds", [steer(append=[1] * c.n_ctx)])
    graph = vs.patching.graph(c, 1)
    refused(
        "cache_edits do not combine",
        [steer()],
        circuit=vs.circuits.random(graph, 5, 0),
        edits=[vs.Steer(vs.SteeringVector(np.ones(c.d_model), 1))],
    )


def test_appended_text(zoo):
    model = zoo.engine("llama3", "chat")
    tokens = model.tokenizer.encode("ab", add_bos=False)
    c = model.config
    vector = vs.kv.CacheVector(*np.ones((2, c.n_layers, c.n_kv_heads, c.d_head)))
    options = dict(max_new_tokens=2, progress=False)
    (a,) = model.generate([[5, 6]], cache_edits=vs.kv.CacheSteer(vector, append="ab"), **options)
    (b,) = model.generate(
        [[5, 6]], cache_edits=[vs.kv.CacheSteer(vector, append=tokens)], **options
    )
    assert a.prompt_tokens.tolist() == [5, 6, *tokens] and (a.tokens == b.tokens).all()
    (said,) = a.cache_edits
    assert (said["position"], said["append"], said["value"]) == (-1, "ab", 1.0)
    assert said["vector"] == vector.fingerprint and b.cache_edits[0]["append"] == tokens


def test_slots_and_shapes_of_the_engine(zoo):
    from vksteer.runtime.device import _engine

    model = zoo.engine("llama3")
    c = model.config
    cache = _engine().Cache(model._engine, 4)
    words = lambda *x: np.array(x, np.uint32)
    one = np.ones((1, 2, c.n_layers, c.n_kv_heads * c.d_head), np.float32)
    for arguments, error, message in (
        ((words(4), words(0), one), ValueError, "slot 4 of a cache of 4"),
        ((words(1), words(1), one), ValueError, "addition 1 of 1"),
        ((words(1), words(0, 0), one), ValueError, "one addition has"),
        ((words(1), words(0), one[..., :-1].copy()), ValueError, "one addition has"),
        ((words(2, 2), words(0, 0), one), ValueError, "edited already"),
        ((words(1), words(0), one.astype(np.float64)), TypeError, "values"),
    ):
        with pytest.raises(error, match=message):
            cache.add(*arguments)
    with pytest.raises(ValueError, match="slot 9"):
        cache.read(words(9))
    with pytest.raises(ValueError, match="slot 4"):
        cache.edited(4)
    part = _engine().Cache(model._engine, 4, 1)
    for call in (lambda: part.read(words(0)), lambda: part.add(words(0), words(0), one)):
        with pytest.raises(ValueError, match="begins at layer 1"):
            call()
    assert not any(cache.edited(i) for i in range(4))
