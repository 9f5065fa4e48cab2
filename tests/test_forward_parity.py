"""Logits and every site of `model.run` against the float64 oracle, on random models of every
family.

One ragged, left-padded batch with rows of 1, 5, 17, 29 and 257 tokens, weights as float32. The
bound is that of oracle/compare.py. Largest error met on lavapipe: 5.1e-6.
"""

from __future__ import annotations

import fnmatch
from itertools import pairwise

import numpy as np
import pytest
import torch

from oracle.compare import assert_close, assert_same_bits, padding, real
from oracle.families import FAMILIES, WIDE

LENGTHS = (17, 1, 257, 5, 29)


def prompts_of(ref, lengths, rng):
    return [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in lengths]


def oracle_rows(ref, rows, **options):
    with torch.no_grad():
        return [ref.forward(tokens, **options) for tokens in rows]


def expected_shape(ref, site, B, S):
    f = ref.facts
    last = site.rsplit(".", 1)[-1]
    return {
        "hook_q": (B, S, f.n_heads, f.d_head),
        "hook_rot_q": (B, S, f.n_heads, f.d_head),
        "hook_z": (B, S, f.n_heads, f.d_head),
        "hook_k": (B, S, f.n_kv_heads, f.d_head),
        "hook_rot_k": (B, S, f.n_kv_heads, f.d_head),
        "hook_v": (B, S, f.n_kv_heads, f.d_head),
        "hook_attn_scores": (B, f.n_heads, S, S),
        "hook_pattern": (B, f.n_heads, S, S),
        "hook_result": (B, S, f.n_heads, f.d_model),
        "hook_scale": (B, S, 1),
        "hook_pre": (B, S, f.d_mlp),
        "hook_pre_linear": (B, S, f.d_mlp),
        "hook_post": (B, S, f.d_mlp),
    }.get(last, (B, S, f.d_model))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_every_site(zoo, name, rng):
    ref, model = zoo.reference(name), zoo.engine(name)
    rows = prompts_of(ref, LENGTHS, rng)
    run = model.run(rows, capture=["*"])
    B, S = len(rows), max(LENGTHS)

    assert (
        run.tokens.shape == run.mask.shape == (B, S)
        and run.tokens.dtype == np.int32
        and run.mask.dtype == bool
    )
    for b, tokens in enumerate(rows):
        assert run.mask[b].tolist() == [False] * (S - len(tokens)) + [True] * len(tokens)
        assert (
            run.tokens[b, -len(tokens) :].tolist() == tokens
            and not run.tokens[b, : -len(tokens) or None][: S - len(tokens)].any()
        )
    assert (
        run.logits.shape == (B, S, ref.facts.d_vocab)
        and run.logits.dtype == np.float32
        and run.logits.flags.c_contiguous
    )

    assert set(model.sites) == set(ref.site_names())
    for site in model.sites:
        assert run[site].shape == expected_shape(ref, site, B, S), site
        assert run[site].dtype == np.float32 and run[site].flags.c_contiguous, site

    failures, worst = [], (0.0, "")
    for b, (tokens, want) in enumerate(zip(rows, oracle_rows(ref, rows))):
        n = len(tokens)
        for site, got, value in [("logits", run.logits, want.logits)] + [
            (s, run[s], want.sites[s]) for s in ref.site_names()
        ]:
            try:
                worst = max(
                    worst,
                    (
                        assert_close(
                            f"{name} {site}, row of {n} tokens", real(site, got, b, n), value
                        ),
                        site,
                    ),
                )
                assert not padding(site, got, b, n).any(), (
                    f"{name} {site}, row of {n} tokens: padded entries are not 0"
                )
            except AssertionError as e:
                failures.append(str(e).splitlines()[0])
    print(f"{name}: worst share {worst[0]:.2e} at {worst[1]}")
    assert not failures, (
        f"{len(failures)} comparisons failed, first in the order of the forward pass:\n"
        + "\n".join(failures[:12])
    )


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_arrays_are_the_callers_own(zoo, name, rng):
    """Every array is writable, shares no memory with another of this or another run, and keeps its
    values after further runs and after the run and the model are gone.
    """
    import gc

    import vksteer as vs

    rows = prompts_of(zoo.reference(name), (7, 1, 12), rng)
    model = vs.Model.from_pretrained(str(zoo.folder(name)), dtype="float32", progress=False)
    first, second = (model.run(rows, capture=["*"]) for _ in range(2))
    arrays = lambda run: {
        "logits": run.logits,
        "tokens": run.tokens,
        "mask": run.mask,
        **dict(run.items()),
    }
    mine, others = arrays(first), arrays(second)
    assert set(mine) == {"logits", "tokens", "mask", *model.sites}
    # Every array is contiguous, so that in the order of addresses only neighbours can overlap.
    spans = sorted(
        (a.__array_interface__["data"][0], a.nbytes, f"{what} of run {i}")
        for i, some in enumerate((mine, others))
        for what, a in some.items()
    )
    for (start, n, what), (after, _, beside) in pairwise(spans):
        assert start + n <= after, f"{what} and {beside} share memory"
    assert not np.shares_memory(first.logits, second.logits) and not np.shares_memory(
        first["hook_embed"], first["blocks.0.hook_resid_pre"]
    )
    copies = {what: a.copy() for what, a in mine.items()}
    # What is written into one array reaches neither another array nor the model.
    for what, a in others.items():
        assert a.flags.writeable and a.flags.c_contiguous, what
        a[...] = 1 if a.dtype == bool else 7
    assert_same_bits(
        "a run after the writing", model.run(rows[::-1]).logits[::-1], copies["logits"]
    )
    model.close()
    del model, first, second, others
    gc.collect()
    for what, a in mine.items():
        assert np.array_equal(a, copies[what]), f"{what} changed"


@pytest.mark.parametrize("name", FAMILIES)
def test_released_config_style_gives_the_same_bits(zoo, name, rng):
    ref = zoo.reference(name)
    rows = prompts_of(ref, (9, 40), rng)
    released = zoo.engine(name, "released")
    assert_same_bits(name, zoo.engine(name).run(rows).logits, released.run(rows).logits)
    released.close()


@pytest.mark.parametrize(
    "name", [n for n, (_, stored, _) in (FAMILIES | WIDE).items() if stored != "float32"]
)
def test_weights_held_as_stored(zoo, name, rng):
    """bfloat16 and float16 weights are exact in float32, so holding them as stored changes no
    weight.
    """
    ref, model = zoo.reference(name), zoo.engine(name, dtype="auto")
    rows = prompts_of(ref, (33, 6), rng)
    run = model.run(rows, capture=["blocks.*.hook_resid_post"])
    for b, (tokens, want) in enumerate(zip(rows, oracle_rows(ref, rows))):
        n = len(tokens)
        assert_close(f"{name} logits", run.logits[b, -n:], want.logits)
        for l in range(ref.facts.n_layers):
            site = f"blocks.{l}.hook_resid_post"
            assert_close(f"{name} {site}", run[site][b, -n:], want.sites[site])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_rounded_on_request(zoo, dtype, rng):
    """A float32 model held in fewer bits is the model with rounded weights and nothing else."""
    from oracle.reference import Reference

    ref = Reference(zoo.folder("qwen3"))
    narrow = getattr(torch, dtype)
    small = {
        k: v.to(narrow).double() if "norm" not in k and not k.endswith("bias") else v
        for k, v in ref.w.items()
    }
    rows = prompts_of(ref, (12,), rng)
    run = zoo.engine("qwen3", dtype=dtype).run(rows, logits="last")
    everything = {k: v.to(narrow).double() for k, v in ref.w.items()}
    errors = []
    for weights in (everything, small):  # the engine may round gains or not
        ref.w, ref.embed, ref.unembed = (
            weights,
            weights["model.embed_tokens.weight"],
            weights["lm_head.weight"],
        )
        want = oracle_rows(ref, rows)[0].logits[-1]
        errors.append(
            float((torch.from_numpy(run.logits[0]).double() - want).abs().max() / want.abs().max())
        )
    assert min(errors) < 2e-4, errors


def test_what_logits_asks_for(zoo, rng):
    ref, model = zoo.reference("gemma2"), zoo.engine("gemma2")
    rows = prompts_of(ref, (7, 3), rng)
    every, last, none = (model.run(rows, logits=which) for which in ("all", "last", None))
    assert last.logits.shape == (2, ref.facts.d_vocab) and none.logits is None
    assert_same_bits("last", every.logits[:, -1], last.logits)
    with pytest.raises(ValueError):
        model.run(rows, logits="first")


def test_one_prompt_and_arrays(zoo, rng):
    ref, model = zoo.reference("llama3"), zoo.engine("llama3")
    tokens = prompts_of(ref, (6,), rng)[0]
    want = model.run([tokens]).logits
    for prompt in (
        tokens,
        np.array(tokens),
        [np.array(tokens, dtype=np.int64)],
        np.array([tokens], dtype=np.int32),
    ):
        assert_same_bits(type(prompt).__name__, model.run(prompt).logits, want)


def test_responses_are_teacher_forced(zoo, rng):
    ref, model = zoo.reference("gemma3"), zoo.engine("gemma3")
    prompts, responses = prompts_of(ref, (4, 9, 1), rng), prompts_of(ref, (6, 2, 0), rng)
    run = model.run(prompts, responses, capture=["blocks.2.hook_resid_post"])
    whole = [p + r for p, r in zip(prompts, responses)]
    for b, want in enumerate(oracle_rows(ref, whole)):
        n = len(whole[b])
        assert run.tokens[b, -n:].tolist() == whole[b]
        assert_close("logits", run.logits[b, -n:], want.logits)
    assert_same_bits("as one prompt", run.logits, model.run(whole).logits)


def test_captures_by_name_and_pattern(zoo, rng):
    ref, model = zoo.reference("qwen2"), zoo.engine("qwen2")
    rows = prompts_of(ref, (5, 8), rng)
    everything = model.run(rows, capture=["*"])
    for patterns in (
        ["blocks.1.attn.hook_z"],
        ["blocks.*.hook_resid_post", "hook_embed"],
        "blocks.*.mlp.*",
        ["ln_final.*"],
        ("*hook_pattern",),
    ):
        run = model.run(rows, capture=patterns)
        wanted = [patterns] if isinstance(patterns, str) else patterns
        for site in model.sites:
            if any(fnmatch.fnmatchcase(site, p) for p in wanted):
                assert_same_bits(site, run[site], everything[site])
            else:
                with pytest.raises(KeyError):
                    run[site]


def test_shapes_in_words(zoo):
    sites = zoo.engine("gemma2").sites
    assert sites["blocks.3.attn.hook_pattern"] == "batch head query key"
    assert all(isinstance(shape, str) and shape.startswith("batch") for shape in sites.values())


def test_config_is_read_without_weights(zoo):
    import vksteer as vs

    for name in FAMILIES:
        f = zoo.reference(name).facts
        for source in (
            zoo.folder(name),
            zoo.folder(name, "released"),
            zoo.folder(name) / "config.json",
        ):
            c = vs.Config.from_pretrained(str(source))
            assert (
                c.n_layers,
                c.d_model,
                c.n_heads,
                c.n_kv_heads,
                c.d_head,
                c.d_mlp,
                c.d_vocab,
            ) == (f.n_layers, f.d_model, f.n_heads, f.n_kv_heads, f.d_head, f.d_mlp, f.d_vocab), (
                name,
                source,
            )


@pytest.mark.parametrize(
    "key, value, named",
    [
        (
            "rope_parameters",
            {"rope_type": "novel", "rope_theta": 1e4, "factor": 2.0},
            "rope type 'novel'",
        ),
        ("partial_rotary_factor", 0.5, "config key 'partial_rotary_factor' = 0.5"),
        ("hidden_act", "laplace", "config key 'hidden_act' = 'laplace'"),
        ("logit_scale", 0.0625, "config key 'logit_scale' = 0.0625"),
        ("residual_multiplier", 0.22, "config key 'residual_multiplier' = 0.22"),
        ("model_type", "mamba", "architecture 'MambaForCausalLM' (model_type 'mamba')"),
    ],
)
def test_a_key_that_changes_the_numbers_is_refused_by_name(zoo, key, value, named):
    import vksteer as vs

    folder = zoo.variant("llama2", f"refuse-{key}", **{key: value})
    if key == "model_type":
        folder = zoo.variant(
            "llama2", "refuse-model-type", model_type="mamba", architectures=["MambaForCausalLM"]
        )
    with pytest.raises(vs.ModelError) as e:
        vs.Model.from_pretrained(str(folder))
    assert named in str(e.value)


def test_an_unknown_key_at_its_neutral_value_is_accepted(zoo, rng):
    import vksteer as vs

    rows = prompts_of(zoo.reference("llama2"), (5,), rng)
    folder = zoo.variant("llama2", "neutral", some_new_key=None, another_new_key=False)
    with vs.Model.from_pretrained(str(folder), dtype="float32") as model:
        assert_same_bits("logits", model.run(rows).logits, zoo.engine("llama2").run(rows).logits)
