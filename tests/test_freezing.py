"""Frozen and ablated runs and generation against the float64 oracle.

By definition, the row and its base run are computed again from the first token for every new
token; `test_generation_token_for_token` does this. `greedy_check` uses one causal pass of the
oracle over prompt and response, which is equal (test_oracle.py). Near ties (top-1 margin below
TIE) are reported as warnings.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from oracle.compare import assert_close, assert_same_bits, share
from oracle.families import FAMILIES

MODES = [
    ("qk", None),
    ("ov", None),
    ("mlp", None),
    (None, "svv"),
    (None, "mlp_direct"),
    ("qk", "svv"),
    ("ov", "mlp_direct"),
    ("mlp", "svv"),
    ("qk", "mlp_direct"),
]
LENGTHS = (11, 3, 26)
TIE = 1e-3
#: One of each kind of layer: LayerNorm, parallel or not, clamped values, no norm before attention.
KINDS = ["gpt2", "gpt_neox", "gptj", "phi_norm", "olmo", "olmo2", "granite", "cohere2", "exaone4"]


def greedy_check(ref, prompt, new, what, **options):
    """Every new token must be the first choice of the oracle on the same prefix. Returns near ties:
    (step, token of the engine, token of the oracle, margin).
    """
    whole, switch = prompt + new, ref.facts.rope_switch
    said = lambda tokens: (
        ref.forward(tokens, prompt_length=len(prompt), keep=False, **options).logits
    )
    with torch.no_grad():
        logits = said(whole)
        if len(prompt) <= switch < len(whole):  # a longer text has other rotation tables
            logits = torch.cat([said(whole[:switch]), logits[switch:]])
        logits = logits[len(prompt) - 1 : -1]
    ties = []
    for step, token in enumerate(new):
        best = int(logits[step].argmax())
        if token != best:
            margin = float(logits[step, best] - logits[step, token])
            assert margin < TIE, (
                f"{what}, step {step}: token {token}, the oracle says {best}, by a margin of"
                f" {margin:.4g}"
            )
            ties.append((step, token, best, margin))
    if ties:
        warnings.warn(f"{what}: near ties (step, engine, oracle, margin): {ties}", stacklevel=2)
    return ties


def setting(zoo, name, rng, size=1.0):
    import vksteer as vs

    ref, model = zoo.reference(name), zoo.engine(name)
    prompts = [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in LENGTHS]
    vector = vs.SteeringVector(
        (size * rng.standard_normal(ref.facts.d_model)).astype(np.float32), 1
    )
    return ref, model, prompts, vector


@pytest.mark.parametrize("name", FAMILIES)
def test_teacher_forced(zoo, name, rng):
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    responses = [rng.integers(0, ref.facts.d_vocab, n).tolist() for n in (5, 9, 0)]
    L = ref.facts.n_layers
    sites = [
        f"blocks.{L - 1}.hook_resid_post",
        "blocks.1.hook_attn_out",
        "blocks.1.hook_mlp_out",
        "blocks.1.attn.hook_pattern",
        "blocks.1.attn.hook_v",
        "blocks.1.attn.hook_z",
    ]
    for freeze, ablate in MODES:
        for coefficient, positions in ((1.0, None), (-0.8, slice(-2, None))):
            edits = [vs.Steer(vector, coefficient, positions)]
            run = model.run(
                prompts, responses, edits=edits, freeze=freeze, ablate=ablate, capture=sites
            )
            for b, (p, r) in enumerate(zip(prompts, responses)):
                n = len(p) + len(r)
                with torch.no_grad():
                    want = ref.forward(
                        p + r, prompt_length=len(p), edits=edits, freeze=freeze, ablate=ablate
                    )
                what = f"{name} freeze={freeze} ablate={ablate} a={coefficient}, row {b}"
                assert_close(f"{what}: logits", run.logits[b, -n:], want.logits)
                assert_close(f"{what}: {sites[0]}", run[sites[0]][b, -n:], want.sites[sites[0]])
                if ablate is None:
                    assert_close(
                        f"{what}: hook_mlp_out", run[sites[2]][b, -n:], want.sites[sites[2]]
                    )
                    assert_close(f"{what}: hook_z", run[sites[5]][b, -n:], want.sites[sites[5]])
                if freeze == "qk":  # the pattern that is used is the base run's
                    assert_close(
                        f"{what}: pattern", run[sites[3]][b][:, -n:, -n:], want.sites[sites[3]]
                    )


@pytest.mark.parametrize("coefficient", [1.0, -0.8])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation(zoo, name, coefficient, rng):
    """24 tokens of three ragged rows in every mode: each token is the choice of the oracle."""
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    edits = [vs.Steer(vector, coefficient)]
    texts = {}
    for freeze, ablate in [(None, None)] + MODES:
        gens = model.generate(
            prompts,
            max_new_tokens=24,
            edits=edits,
            freeze=freeze,
            ablate=ablate,
            ignore_eos=True,
            progress=False,
        )
        for b, gen in enumerate(gens):
            assert (
                len(gen.tokens) == 24
                and gen.finish_reason == "length"
                and gen.prompt_tokens.tolist() == prompts[b]
            )
            greedy_check(
                ref,
                prompts[b],
                gen.tokens.tolist(),
                f"{name} a={coefficient} freeze={freeze} ablate={ablate}, row {b}",
                edits=edits,
                freeze=freeze,
                ablate=ablate,
            )
        texts[freeze, ablate] = [g.tokens.tolist() for g in gens]
    assert sum(texts[mode] != texts[None, None] for mode in MODES) >= 7, (
        "the test needs modes that change some text"
    )


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3", "qwen2", "gpt_neox", "olmo2"])
def test_generation_token_for_token(zoo, name, rng):
    """The definition: base and steered run are computed again from the first token for every new
    one.
    """
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    edits = [vs.Steer(vector, 0.9)]
    for freeze, ablate in (
        ("qk", None),
        ("ov", None),
        ("mlp", None),
        (None, "svv"),
        (None, "mlp_direct"),
    ):
        gens = model.generate(
            prompts[:2],
            max_new_tokens=20,
            edits=edits,
            freeze=freeze,
            ablate=ablate,
            ignore_eos=True,
            progress=False,
        )
        for b, gen in enumerate(gens):
            want, margins = ref.generate(prompts[b], 20, edits=edits, freeze=freeze, ablate=ablate)
            got = gen.tokens.tolist()
            if got != want:
                step = next(i for i in range(20) if got[i] != want[i])
                assert margins[step] < TIE, (
                    f"{name} {freeze} {ablate} row {b}: step {step} differs at a margin of"
                    f" {margins[step]:.4g}:\n{got}\n{want}"
                )
                warnings.warn(
                    f"{name} {freeze} {ablate} row {b}: near tie at step {step}, margin"
                    f" {margins[step]:.2g}",
                    stacklevel=2,
                )


@pytest.mark.parametrize(
    "name", ["llama3", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", *KINDS]
)
def test_positions_other_edits_and_rows(zoo, name, rng):
    """The base run gets every edit except the Steer; ablations act where the Steer acts; each row
    has its own edits.
    """
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    D = ref.facts.d_model
    u = rng.standard_normal(D).astype(np.float32)
    add = vs.Add("blocks.0.hook_mlp_out", rng.standard_normal(D).astype(np.float32))
    late = vs.Scale(
        "blocks.2.attn.hook_z" if ref.facts.n_layers > 2 else "blocks.1.attn.hook_z",
        1.3,
        positions="response",
    )
    lists = (
        [vs.Steer(vector, 1.0, positions="prompt"), add],
        [add, vs.Steer(vector, -1.0, positions="response")],
        [vs.Ablate(u), vs.Steer(vector, 1.0, positions=slice(-3, None)), late],
    )
    for freeze, ablate in MODES:
        gens = model.generate(
            prompts,
            max_new_tokens=10,
            edits=[list(e) for e in lists],
            freeze=freeze,
            ablate=ablate,
            ignore_eos=True,
            progress=False,
        )
        run = model.run(
            prompts,
            [g.tokens for g in gens],
            edits=[list(e) for e in lists],
            freeze=freeze,
            ablate=ablate,
        )
        for b, gen in enumerate(gens):
            new, what = gen.tokens.tolist(), f"{name} freeze={freeze} ablate={ablate}, row {b}"
            options = dict(edits=lists[b], freeze=freeze, ablate=ablate)
            greedy_check(ref, prompts[b], new, what, **options)
            with torch.no_grad():
                want = ref.forward(
                    prompts[b] + new, prompt_length=len(prompts[b]), keep=False, **options
                ).logits
            assert_close(what, run.logits[b, -len(want) :], want)


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3", "qwen2", "qwen3", *KINDS])
def test_alone_and_batched_are_bit_identical(zoo, name, rng):
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    last = f"blocks.{ref.facts.n_layers - 1}.hook_resid_post"
    for freeze, ablate in MODES[:5]:
        options = dict(edits=[vs.Steer(vector, 1.0)], freeze=freeze, ablate=ablate)
        run = model.run(prompts, **options)
        gens = model.generate(
            prompts, max_new_tokens=6, ignore_eos=True, progress=False, capture=[last], **options
        )
        for b, p in enumerate(prompts):
            assert_same_bits(
                f"{name} {freeze} {ablate}",
                model.run([p], **options).logits[0],
                run.logits[b, -len(p) :],
            )
            alone = model.generate(
                [p], max_new_tokens=6, ignore_eos=True, progress=False, capture=[last], **options
            )[0]
            assert alone.tokens.tolist() == gens[b].tokens.tolist()
            assert_same_bits(
                f"{name} {freeze} {ablate} decoding", alone.captured[last], gens[b].captured[last]
            )


@pytest.mark.parametrize("name", FAMILIES)
def test_coefficient_zero_changes_nothing(zoo, name, rng):
    """Bit-identical to the run without any steering."""
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    last = f"blocks.{ref.facts.n_layers - 1}.hook_resid_post"
    plain = model.run(prompts)
    gens = model.generate(
        prompts, max_new_tokens=8, ignore_eos=True, progress=False, capture=[last]
    )
    for freeze, ablate in MODES:
        options = dict(edits=[vs.Steer(vector, 0.0)], freeze=freeze, ablate=ablate)
        assert_same_bits(
            f"{name} {freeze} {ablate}", model.run(prompts, **options).logits, plain.logits
        )
        for a, b in zip(
            model.generate(
                prompts,
                max_new_tokens=8,
                ignore_eos=True,
                progress=False,
                capture=[last],
                **options,
            ),
            gens,
            strict=True,
        ):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert_same_bits(
                f"{name} {freeze} {ablate} decoding", a.captured[last], b.captured[last]
            )


@pytest.mark.parametrize("name", ["llama3", "gemma2", "gemma3", "qwen2"])
def test_base_equal_to_steered_changes_nothing(zoo, name, rng):
    """The vector is added by a second edit, which the base run gets, too, and the Steer acts
    nowhere or with 0: freezing changes nothing.
    """
    import vksteer as vs

    _ref, model, prompts, vector = setting(zoo, name, rng)
    add = vs.Add("blocks.1.hook_resid_pre", np.asarray(vector.direction))
    steered = model.run(prompts, edits=[vs.Steer(vector, 1.0)]).logits
    assert share(steered, model.run(prompts).logits)[0] > 1e-3
    added = model.run(prompts, edits=[add]).logits
    # On lavapipe the two are equal.
    assert_close("added as Add and as Steer", added, steered, 1e-6)
    for freeze in ("qk", "ov", "mlp"):
        for steer in (vs.Steer(vector, 0.0), vs.Steer(vector, 3.0, positions=[])):
            run = model.run(prompts, edits=[add, steer], freeze=freeze)
            assert_same_bits(f"{name} {freeze}", run.logits, added)


@pytest.mark.parametrize("name", ["llama_bias", "gemma2", "qwen3", *KINDS])
def test_ablations_come_before_edits_of_what_they_change(zoo, name, rng):
    """An ablation takes the vector out of the input of a projection, so that an edit of the output
    of this projection acts on what is left.
    """
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    steer = vs.Steer(vector, 1.0)
    for ablate, site in (
        ("svv", "blocks.1.attn.hook_v"),
        ("mlp_direct", "blocks.1.mlp.hook_pre"),
        ("mlp_direct", "blocks.1.mlp.hook_pre_linear"),
        ("svv", "blocks.1.ln1.hook_scale"),
        ("mlp_direct", "blocks.1.ln2.hook_scale"),
    ):
        if site not in model.sites:
            continue
        for edits in ([vs.Scale(site, 0.5), steer], [steer, vs.Set(site, 0.7, positions=[-1, 1])]):
            run = model.run(prompts, edits=edits, ablate=ablate, capture=[site])
            for b, p in enumerate(prompts):
                with torch.no_grad():
                    want = ref.forward(p, edits=edits, ablate=ablate)
                assert_close(
                    f"{name} {ablate} {edits}, row {b}", run.logits[b, -len(p) :], want.logits
                )
                assert_close(
                    f"{name} {ablate} {edits}, row {b}: {site}",
                    run[site][b, -len(p) :],
                    want.sites[site],
                )


@pytest.mark.parametrize("name", ["gemma2", "qwen2", *KINDS])
def test_steering_at_the_first_and_last_layer(zoo, name, rng):
    import vksteer as vs

    ref, model, prompts, vector = setting(zoo, name, rng)
    for layer in (0, ref.facts.n_layers - 1):
        edits = [vs.Steer(vs.SteeringVector(np.asarray(vector.direction), layer), 1.0)]
        for freeze, ablate in MODES:
            options = dict(edits=edits, freeze=freeze, ablate=ablate)
            run = model.run(prompts, **options)
            for b, p in enumerate(prompts):
                with torch.no_grad():
                    want = ref.forward(p, keep=False, **options).logits
                what = f"{name} layer {layer} {freeze} {ablate}"
                assert_close(what, run.logits[b, -len(p) :], want)


def test_sampling_and_micro_batches(zoo, rng):
    import vksteer as vs

    _ref, model, prompts, vector = setting(zoo, "gemma3", rng)
    prompts = prompts * 2
    options = dict(
        edits=[vs.Steer(vector, 1.0)],
        freeze="ov",
        max_new_tokens=12,
        ignore_eos=True,
        progress=False,
    )
    greedy = model.generate(prompts, **options)
    for size in (1, 2, 4):
        for a, b in zip(model.generate(prompts, batch_size=size, **options), greedy, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
    first, second = (model.generate(prompts, temperature=1.0, seed=5, **options) for _ in range(2))
    assert [g.tokens.tolist() for g in first] == [g.tokens.tolist() for g in second]
    assert [g.tokens.tolist() for g in first] != [g.tokens.tolist() for g in greedy]
    for a, b in zip(
        model.generate(prompts, temperature=1.0, top_k=1, seed=5, **options), greedy, strict=True
    ):
        assert a.tokens.tolist() == b.tokens.tolist()


@pytest.mark.parametrize(
    "what",
    [
        "no steer",
        "two steers",
        "one row without",
        "ov + svv",
        "mlp + mlp_direct",
        "unknown freeze",
        "unknown ablate",
        "no edits",
    ],
)
def test_contradictions_are_refused(zoo, rng, what):
    import vksteer as vs

    _ref, model, prompts, vector = setting(zoo, "llama2", rng)
    s = vs.Steer(vector, 1.0)
    options = {
        "no steer": dict(freeze="qk", edits=[vs.Scale("blocks.1.hook_mlp_out", 0.5)]),
        "two steers": dict(freeze="qk", edits=[s, vs.Steer(vector, 0.5)]),
        "one row without": dict(freeze="ov", edits=[[s], [], [s]]),
        "ov + svv": dict(freeze="ov", ablate="svv", edits=[s]),
        "mlp + mlp_direct": dict(freeze="mlp", ablate="mlp_direct", edits=[s]),
        "unknown freeze": dict(freeze="kv", edits=[s]),
        "unknown ablate": dict(ablate="mlp", edits=[s]),
        "no edits": dict(ablate="svv"),
    }[what]
    for call in (
        model.run,
        lambda p, **o: model.generate(p, max_new_tokens=1, progress=False, **o),
    ):
        with pytest.raises(ValueError) as error:
            call(prompts, **options)
        assert len(str(error.value)) > 15
