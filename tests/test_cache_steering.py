"""Cache steering on random models: a vector added to one entry of a prompt's keys and values,
against a float64 pass without a cache, and what must not change bit for bit.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import vksteer as vs
from oracle import cache_steering
from oracle.compare import BOUND, assert_close, assert_same_bits
from vksteer.runtime.batch import Batch
from vksteer.runtime.cache_edits import add_to_cache, row_cache_edits
from vksteer.runtime.device import _engine

KINDS = ["gpt2", "llama3", "gemma2", "qwen3"]
NEW = 6
LAST = "ln_final.hook_normalized"


@pytest.fixture
def setting(zoo, rng):
    return lambda name: Setting(zoo, name, rng)


class Setting:
    """A family in both implementations, prompts, a continuation, and a random vector."""

    def __init__(self, zoo, name, rng):
        self.ref, self.model, self.rng = zoo.reference(name), zoo.engine(name), rng
        self.config = self.model.config
        self.prompts = [self.draw(n) for n in (9, 2, 14)]
        self.answer = self.draw(5)
        self.vector = self.random_vector()

    def draw(self, n):
        return self.rng.integers(0, self.ref.facts.d_vocab, n).tolist()

    def random_vector(self, **options):
        c = self.config
        keys, values = (
            self.rng.standard_normal((c.n_layers, c.n_kv_heads, c.d_head)) for _ in range(2)
        )
        return vs.kv.CacheVector(keys, values, **options)

    def forward(self, prompt, rest, edit=None, capture=()):
        """(logits, captures, cache) of `rest`, run after the prompt and the edit."""
        model, n = self.model, len(prompt)
        cache = _engine().Cache(model._engine, n + len(rest))
        batch = Batch(model, [n], [None], ([[]], True), None)
        common = dict(slots=[0], columns=[0])
        batch.forward(cache, [prompt], n_columns=n, **common)
        if edit is not None:
            (row,) = row_cache_edits(model, [edit], [list(prompt)], 1)
            add_to_cache(model, cache, [row], [np.array([0], np.uint32)], [False])
        keys = {name: model._sites.by_name[name].key for name in capture}
        logits, found = batch.forward(
            cache,
            [rest],
            starts=[n],
            slots=[0],
            columns=[-n],
            n_columns=len(rest),
            key_columns=[0],
            n_keys=n + len(rest),
            capture=list(keys.values()),
            logits="all",
        )
        return logits[0], {name: found[key][0] for name, key in keys.items()}, cache

    def generate(self, prompts=None, **options):
        options = {"max_new_tokens": NEW, "ignore_eos": True, "progress": False, **options}
        return self.model.generate(prompts or self.prompts, **options)


def one_layer(config, vector, layer):
    """The vector with zeros in every other layer."""
    mask = (np.arange(config.n_layers) == layer)[:, None, None]
    return vs.kv.CacheVector(vector.keys * mask, vector.values * mask)


# -- against float64 -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("position", [-1, -3])
def test_cached_is_uncached(setting, name, position):
    """Teacher forced: every site of the tokens after the prompt. The largest error met is 2.0e-6
    of a site's largest value.
    """
    s = setting(name)
    prompt, first = s.prompts[0], len(s.prompts[0])
    edit = vs.kv.CacheSteer(s.vector, key=0.7, value=1.3, layers=None, position=position)
    hooks = cache_steering.hooks(
        s.ref, first + position, first, 0.7 * s.vector.keys, 1.3 * s.vector.values
    )
    want = s.ref.forward(prompt + s.answer, hooks=hooks)
    plain = s.ref.forward(prompt + s.answer)
    sites = [n for n in s.model.sites if "scores" not in n and "pattern" not in n]
    logits, found, _ = s.forward(prompt, s.answer, edit, sites)
    assert_close("logits", logits, want.logits[first:], 2e-5)
    for site in sites:
        assert_close(site, found[site], want.sites[site][first:], 2e-5)
    # the edit matters, and the reference leaves the prompt alone
    assert (want.logits[first:] - plain.logits[first:]).abs().max() > 100 * BOUND
    assert torch.equal(want.logits[:first], plain.logits[:first])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("append", [None, [3, 1]])
def test_generated_values_are_those_of_a_pass_without_a_cache(setting, name, append):
    """Ragged prompts of one batch; the tokens are those that were generated. The largest error met
    is 1.3e-6 of the largest value.
    """
    s = setting(name)
    edit = vs.kv.CacheSteer(s.vector, key=0.5, value=2.0, append=append)
    site = f"blocks.{s.config.n_layers - 1}.hook_resid_post"
    gens = s.generate(cache_edits=[edit], capture=[site])
    mask = (np.arange(s.config.n_layers) >= 1)[:, None, None]
    for prompt, gen in zip(s.prompts, gens, strict=True):
        n, whole = len(prompt), prompt + list(append or [])
        assert gen.prompt_tokens.tolist() == whole
        added = 0.5 * mask * s.vector.keys, 2.0 * mask * s.vector.values
        tokens = whole + gen.tokens.tolist()
        want = s.ref.forward(tokens, hooks=cache_steering.hooks(s.ref, n - 1, n, *added))
        assert_close(site, gen.captured[site], want.sites[site][len(whole) :], 2e-5)
        # the first new token is drawn after the prompt: unsteered, unless something was appended
        assert gen.tokens[0] == int(want.logits[len(whole) - 1].argmax())


@pytest.mark.parametrize("name", KINDS)
def test_one_layers_values_change_heads_by_pattern_times_value(setting, name):
    """The last layer, values only: what a head adds changes by A[q, p] c S_V W_O. The largest
    error met is 2.0e-7 of the largest head's output.
    """
    s = setting(name)
    prompt, p, l = s.prompts[0], len(s.prompts[0]) - 1, s.config.n_layers - 1
    at = f"blocks.{l}.attn.hook_"
    names = [at + "pattern", at + "result"]
    _, plain, _ = s.forward(prompt, s.answer, capture=names)
    edit = vs.kv.CacheSteer(s.vector, value=1.5, layers=[l])
    _, found, _ = s.forward(prompt, s.answer, edit, capture=names)
    assert_same_bits("pattern", found[at + "pattern"], plain[at + "pattern"])
    group = s.config.n_heads // s.config.n_kv_heads
    change = found[at + "result"].astype(np.float64) - plain[at + "result"]  # [q, h, D]
    for h in range(s.config.n_heads):
        w_o = np.asarray(vs.ov.head_weights(s.model, l, h)[3], np.float64)  # [d_head, D]
        seen = plain[at + "pattern"][h, :, p].astype(np.float64)
        want = seen[:, None] * (1.5 * s.vector.values[l, h // group].astype(np.float64) @ w_o)
        largest = np.abs(plain[at + "result"]).max()
        assert np.abs(change[:, h] - want).max() < 5e-6 * largest


@pytest.mark.parametrize("name", ["llama3", "gemma2", "qwen3"])
def test_one_group_leaves_the_other_heads_alone(setting, name):
    s = setting(name)
    c, g = s.config, s.config.n_kv_heads - 1
    assert c.n_kv_heads > 1 and c.n_heads > c.n_kv_heads
    mask = (np.arange(c.n_kv_heads) == g)[None, :, None]
    vector = vs.kv.CacheVector(s.vector.keys * mask, s.vector.values * mask)
    site = f"blocks.{c.n_layers - 1}.attn.hook_z"
    edit = vs.kv.CacheSteer(vector, key=1.0, value=1.0, layers=[c.n_layers - 1])
    _, plain, _ = s.forward(s.prompts[0], s.answer, capture=[site])
    _, found, _ = s.forward(s.prompts[0], s.answer, edit, capture=[site])
    inside = np.arange(c.n_heads) // (c.n_heads // c.n_kv_heads) == g
    assert_same_bits(site, found[site][:, ~inside], plain[site][:, ~inside])
    assert not np.isclose(found[site][:, inside], plain[site][:, inside]).all(axis=(0, 2)).any()


@pytest.mark.parametrize("name", KINDS)
def test_one_layers_keys_change_one_column_of_scores(setting, name):
    """Column p of the scores changes by c q . S_K, scaled and before the cap; the largest error met
    is 1.5e-7 of the largest score. Other columns keep their bits, and rows sum to 1.
    """
    s = setting(name)
    c, prompt, l = s.config, s.prompts[0], s.config.n_layers - 1
    p, at = len(prompt) - 1, f"blocks.{l}.attn.hook_"
    query = at + ("rot_q" if c.rope_table[l] >= 0 else "q")
    names = [at + "attn_scores", at + "pattern", query]
    _, plain, _ = s.forward(prompt, s.answer, capture=names)
    edit = vs.kv.CacheSteer(s.vector, key=0.8, value=0.0, layers=[l])
    _, found, _ = s.forward(prompt, s.answer, edit, capture=names)
    old, new = (x[at + "attn_scores"].astype(np.float64) for x in (plain, found))
    others = np.arange(old.shape[2]) != p
    assert_same_bits(
        "other columns",
        found[at + "attn_scores"][:, :, others],
        plain[at + "attn_scores"][:, :, others],
    )
    keys = np.repeat(s.vector.keys[l].astype(np.float64), c.n_heads // c.n_kv_heads, axis=0)
    change = 0.8 * c.attn_scale * np.einsum("qhd,hd->hq", plain[query].astype(np.float64), keys)
    cap = c.attn_softcap
    before = cap * np.arctanh(old[:, :, p] / cap) if cap else old[:, :, p]
    want = cap * np.tanh((before + change) / cap) if cap else before + change
    assert np.abs(new[:, :, p] - want).max() < 1e-5 * np.abs(old[np.isfinite(old)]).max()
    assert np.abs(found[at + "pattern"].sum(axis=2) - 1).max() < 1e-6


# -- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("append", [None, [5]])
def test_coefficient_zero_changes_no_bit(setting, name, append):
    s = setting(name)
    edit = vs.kv.CacheSteer(s.vector, key=0.0, value=0.0, append=append)
    plain = s.generate([p + list(append or []) for p in s.prompts], capture=[LAST])
    for a, b in zip(s.generate(cache_edits=[edit], capture=[LAST]), plain, strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert_same_bits("logits' input", a.captured[LAST], b.captured[LAST])


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_a_batch_are_rows_alone(setting, name):
    """Every row has its own coefficients, positions and appended tokens, or no cache edit."""
    s = setting(name)
    other = s.random_vector(rotate="unrotated")
    edits = [
        [vs.kv.CacheSteer(s.vector, key=0.2, value=3.0), vs.kv.CacheSteer(other, key=1.0)],
        [],
        [vs.kv.CacheSteer(s.vector, value=-1.0, position=10, append=[7], layers=slice(0, 2))],
    ]
    steer = [vs.Steer(vs.SteeringVector(s.rng.standard_normal(s.config.d_model), 1), 0.5)]
    options = dict(capture=[LAST], edits=steer, temperature=0.7, seed=3)
    seen = []
    gens = s.generate(cache_edits=edits, on_token=lambda *t: seen.append(t[:2]), **options)
    streamed = [[t for row, t in seen if row == i] for i in range(3)]
    parts = s.generate(cache_edits=edits, batch_size=2, **options)
    for i, (gen, part) in enumerate(zip(gens, parts, strict=True)):
        assert streamed[i] == gen.tokens.tolist()
        assert_same_bits(f"row {i} of parts", part.captured[LAST], gen.captured[LAST])
        greedy = dict(options, temperature=0.0)
        (alone,) = s.generate([s.prompts[i]], cache_edits=edits[i], **greedy)
        together = s.generate(cache_edits=edits, **greedy)[i]
        assert_same_bits(f"row {i} alone", alone.captured[LAST], together.captured[LAST])


def test_only_the_entry_changes_and_only_once(setting):
    """Every other slot keeps its bits, the entry is rounded once, copies carry the edit, and none
    can be edited again until the model writes it anew.
    """
    s = setting("llama3")
    prompt, n = s.prompts[0], len(s.prompts[0])
    edit = vs.kv.CacheSteer(s.vector, key=0.3, value=2.0, position=-2)
    _, _, plain = s.forward(prompt, s.answer)
    _, _, cache = s.forward(prompt, s.answer, edit)
    slots = np.arange(n, dtype=np.uint32)
    before, after = plain.read(slots), cache.read(slots)
    added = np.stack(
        [
            0.3 * s.vector.keys.astype(np.float64),
            2.0 * s.vector.values.astype(np.float64),
        ]
    ).astype(np.float32)
    added[:, 0] = 0  # layer 0 is left alone
    want = before.copy()
    want[:, :, n - 2] += added.reshape(*added.shape[:2], -1)
    assert_same_bits("entries", after, want)
    assert [cache.edited(int(i)) for i in slots] == [i == n - 2 for i in range(n)]

    row = row_cache_edits(s.model, [edit], [list(prompt)], 1)
    again = lambda slot: add_to_cache(s.model, cache, row, [np.array([slot], np.uint32)], [False])
    with pytest.raises(ValueError, match="edited already"):
        again(0)
    cache.copy(n - 2, np.array([0], np.uint32), 1)
    assert cache.edited(0) and not cache.edited(1)
    assert_same_bits("copy", cache.read(slots[:1]), after[:, :, n - 2 : n - 1])
    size = n + len(s.answer)
    for first, to, count in ((0, size - 1, 2), (size - 1, 0, 2), (2**32 - 1, 0, 2)):
        with pytest.raises(ValueError, match="of a cache of"):
            # no layer is copied, so that no copy of memory could refuse
            cache.copy(first, np.array([to], np.uint32), count, s.config.n_layers)
    with pytest.raises(ValueError, match="copies carry it"):
        cache.add(np.array([1, 0], np.uint32), np.zeros(2, np.uint32), added[None])
    assert not cache.edited(1), "a refused call marks nothing"
    batch = Batch(s.model, [n], [None], ([[]], True), None)
    batch.forward(cache, [prompt], slots=[0], columns=[0], n_columns=n)
    assert not cache.edited(n - 2)
    assert_same_bits("written anew", cache.read(slots), before)
    again(0)
    assert_same_bits("edited anew", cache.read(slots), after)


def test_an_interrupted_generation_leaves_no_edit_behind(setting):
    s = setting("qwen3")
    edit = vs.kv.CacheSteer(s.vector, key=0.3, value=2.0, append=[4])
    want = s.generate(cache_edits=[edit], capture=[LAST])

    def stop(row, token, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.generate(cache_edits=[edit], on_token=stop)
    again = s.generate(cache_edits=[edit], capture=[LAST])
    plain = s.generate([p + [4] for p in s.prompts], capture=[LAST])
    for a, b, c in zip(again, want, plain, strict=True):
        assert_same_bits("again", a.captured[LAST], b.captured[LAST])
        assert not np.array_equal(a.captured[LAST], c.captured[LAST])


@pytest.mark.parametrize("freeze", ["qk", "ov", "mlp"])
def test_both_runs_of_a_pair_are_edited(setting, freeze):
    """Under freezing the base run gets every edit but the Steer, cache edits too: with a Steer of
    coefficient 0 both runs are the plain cache-steered run.
    """
    s = setting("llama3")
    edit = vs.kv.CacheSteer(s.vector, key=0.4, value=2.0)
    vector = vs.SteeringVector(s.rng.standard_normal(s.config.d_model), 1)
    want = s.generate(cache_edits=[edit], capture=[LAST])
    gens = s.generate(
        cache_edits=[edit], edits=[vs.Steer(vector, 0.0)], freeze=freeze, capture=[LAST]
    )
    for a, b in zip(gens, want, strict=True):
        assert_same_bits(freeze, a.captured[LAST], b.captured[LAST])


# -- rotation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "gemma3", "gpt_neox", "cohere_norm", "phi3_long"])
def test_unrotated_keys_are_rotated_to_the_entry(setting, name):
    """Per-layer tables, partial and interleaved rotation, scalings, both tables of longrope. The
    largest error met is 2.4e-16 of the largest number added.
    """
    s = setting(name)
    vector = s.random_vector(rotate="unrotated")
    for prompt in (s.prompts[0], s.draw(45)):
        edit = vs.kv.CacheSteer(vector, key=1.0, value=0.0, layers=None, position=-2)
        (row,) = row_cache_edits(s.model, [edit], [list(prompt)], 1)
        n, (p,) = len(prompt), row.positions
        long = 0 < s.config.rope_switch < n
        found = edit._addition(s.model, p, long)
        want = cache_steering.rotated(s.ref, vector.keys, p, n)
        assert_close(name, found[0], want, 1e-14)
        assert not found[1].any()


@pytest.mark.parametrize("rotate", ["cache", "unrotated"])
def test_texts_that_grow_beyond_the_switch(setting, rotate):
    """All tokens of such a row are run again (longrope); the edit stays, once, with keys rotated by
    the other table. One row crosses the switch by what is appended. The largest error met is
    1.7e-6 of the largest value.
    """
    s = setting("phi3_long")
    switch = s.config.rope_switch
    vector = s.random_vector(rotate=rotate)
    prompts = [s.draw(n) for n in (switch - 2, 5, switch - 1, switch, switch + 3)]
    append = [3, 9]
    edit = vs.kv.CacheSteer(vector, key=0.5, value=2.0, append=append, layers=None)
    site = f"blocks.{s.config.n_layers - 1}.hook_resid_post"
    gens = s.generate(prompts, cache_edits=[edit], capture=[site])
    for prompt, gen in zip(prompts, gens, strict=True):
        n, whole = len(prompt), prompt + append
        for i in range(NEW):
            tokens = whole + gen.tokens[: i + 1].tolist()
            keys = vector.keys
            if rotate == "unrotated":
                keys = cache_steering.rotated(s.ref, keys, n - 1, len(tokens))
            hooks = cache_steering.hooks(s.ref, n - 1, n, 0.5 * keys, 2.0 * vector.values)
            want = s.ref.forward(tokens, hooks=hooks)
            assert_close(f"{n}, step {i}", gen.captured[site][i], want.sites[site][-1], 2e-5)
        (alone,) = s.generate([prompt], cache_edits=[edit], capture=[site])
        assert_same_bits(f"{n} alone", alone.captured[site], gen.captured[site])


# -- windows ---------------------------------------------------------------------------------------


def test_an_entry_that_leaves_the_window(setting):
    """gemma2 has windows in every other layer: warned about where new tokens outlive the entry,
    refused where no token after the prompt sees it.
    """
    s = setting("gemma2")
    local = [l for l, w in enumerate(s.config.window) if w]
    window, prompt = s.config.window[local[0]], s.prompts[0]
    edit = vs.kv.CacheSteer(s.vector, layers=None)
    fits = window - 1  # new tokens, up to prompt + new = position + window
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s.generate([prompt], cache_edits=[edit], max_new_tokens=fits)
        others = [l for l in range(s.config.n_layers) if l not in local]
        edit_of_others = vs.kv.CacheSteer(s.vector, layers=others)
        s.generate([prompt], cache_edits=[edit_of_others], max_new_tokens=fits + 1)
    with pytest.warns(UserWarning, match=f"after the first {fits} do not see it") as caught:
        s.generate([prompt], cache_edits=[edit], max_new_tokens=fits + 1)
    assert caught[0].filename == __file__
    long = s.draw(window + 3)
    with pytest.raises(ValueError, match="outside the sliding window of every token"):
        s.generate([long], cache_edits=[vs.kv.CacheSteer(s.vector, layers=None, position=2)])
