"""Decoding with the kernels of GPUs (`VKSTEER_KERNELS=tiled`), on whatever device runs the tests:
its dispatches a token, its bits, and its answers against the float64 oracle.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from oracle.compare import assert_close, assert_same_bits
from vksteer.runtime import decoding

#: family -> dispatches of a layer. The MLP's post-norm is one; heads whose size is no multiple of 4
#: (llama3 and gemma2 here) are rotated by one.
LAYER = {
    "gpt_neox": 5,
    "qwen3": 5,
    "mistral": 5,
    "cohere_norm": 5,
    "phi_norm": 5,
    "ministral3": 5,
    "gemma2": 7,
    "gemma3": 6,
    "glm4": 6,
    "olmo3": 6,
    "exaone4": 6,
    "llama3": 6,
    "gpt2": 6,
}
OUTSIDE = 2  # embedding, then norm and unembedding in one; learned positions are one more


@pytest.fixture(scope="module")
def lean(zoo):
    import vksteer

    opened = {}

    def model(name):
        if name not in opened:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("VKSTEER_KERNELS", "tiled")
                opened[name] = vksteer.Model.from_pretrained(
                    str(zoo.folder(name)), dtype="float32", progress=False
                )
        return opened[name]

    yield model
    for each in opened.values():
        each.close()


def prompts(model, rng, lengths=(17, 1, 40, 5)):
    return [rng.integers(0, model.config.d_vocab, n).tolist() for n in lengths]


def dispatches(model, prompt, n, **options):
    before = model._engine.dispatches
    model.generate([prompt], max_new_tokens=n, ignore_eos=True, progress=False, **options)
    return model._engine.dispatches - before


@pytest.mark.parametrize("name", LAYER)
def test_dispatches_a_token(lean, rng, monkeypatch, name):
    model = lean(name)
    (prompt,) = prompts(model, rng, (9,))
    two = [dispatches(model, prompt, 2) for _ in range(2)][1]  # the first prepares once
    outside = OUTSIDE + ("hook_pos_embed" in model.sites)
    a_token = LAYER[name] * model.config.n_layers + outside
    step = dispatches(model, prompt, 3, on_token=lambda *_: None) - two
    assert step == a_token
    # several steps at once: the device picks each token
    monkeypatch.setattr(decoding, "BLOCK_SECONDS", np.inf)
    assert dispatches(model, prompt, 7) - two == 5 * (a_token + 1)


@pytest.mark.parametrize("name", LAYER)
def test_bits(lean, rng, name):
    """A row alone, in a batch, beside a row with edits inside every fusion, and with all its sites
    captured.
    """
    import vksteer as vs

    model = lean(name)
    rows, last = prompts(model, rng), model.config.n_layers - 1
    sites = [f"blocks.{last}.hook_resid_post", "ln_final.hook_normalized"]
    options = dict(max_new_tokens=4, ignore_eos=True, progress=False)
    plain = model.generate(rows, capture=sites, **options)
    inside = ["attn.hook_pattern", "attn.hook_q", "mlp.hook_pre", "mlp.hook_post", "attn.hook_z"]
    inside += ["ln1.hook_normalized", "ln2.hook_scale"] * ("blocks.0.ln1.hook_scale" in model.sites)
    inside += ["ln1_post.hook_scale"] * ("blocks.0.ln1_post.hook_scale" in model.sites)
    edits = [vs.Scale(f"blocks.1.{site}", 1.25) for site in inside]
    everything = [s for s in model.sites if "scores" not in s and "pattern" not in s]
    after = [vs.Scale(f"blocks.1.{site}", 1.25) for site in ("hook_attn_out", "hook_mlp_out")]
    after += [vs.Scale("blocks.1.ln2_post.hook_normalized", 0.5)] * (
        "blocks.1.ln2_post.hook_normalized" in model.sites
    )
    others = {
        "beside an edited row": model.generate(
            rows, capture=sites, edits=[[], edits, [], []], **options
        ),
        "beside an edited row, after its sublayers": model.generate(
            rows, capture=sites, edits=[[], after, [], []], **options
        ),
        "all captured": model.generate(rows, capture=everything, **options),
        "alone": [model.generate([row], capture=sites, **options)[0] for row in rows],
    }
    for what, gens in others.items():
        for i in (0, 2, 3) if "edited" in what else range(4):
            for s in sites:
                assert_same_bits(
                    f"{name}, row {i} {what}: {s}", gens[i].captured[s], plain[i].captured[s]
                )
    for what in (w for w in others if "edited" in w):
        edited = others[what][1]
        assert not np.array_equal(edited.captured[sites[0]], plain[1].captured[sites[0]])


def test_decoding_takes_one_token_a_row(lean):
    """A row's second token would read a key that another workgroup is still writing."""
    from vksteer.runtime.batch import packed_rows
    from vksteer.runtime.device import _engine

    model = lean("mistral")
    cache = _engine().Cache(model._engine, 8)
    rows = packed_rows([[1], [1, 2]], start=[0, 0], slot=[0, 4], decode=True)
    with pytest.raises(ValueError, match="one token a row, row 1 has 2"):
        model._engine.forward(cache, rows, [], 0)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "olmo2"])
@pytest.mark.parametrize("freeze", ["qk", "ov", "mlp"])
def test_frozen_rows(lean, rng, freeze, name):
    """A steered row's base run decodes in the same batch; with coefficient 0 it is the row."""
    import vksteer as vs

    model = lean(name)
    rows = prompts(model, rng, (9, 4))
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model).astype(np.float32), 1)
    site = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    options = dict(max_new_tokens=4, ignore_eos=True, progress=False, capture=[site])
    steer = [vs.Steer(vector, 4.0)]
    both = model.generate(rows, edits=steer, freeze=freeze, **options)
    zero = model.generate(rows, edits=[vs.Steer(vector, 0.0)], freeze=freeze, **options)
    plain = model.generate(rows, **options)
    for i, row in enumerate(rows):
        alone = model.generate([row], edits=steer, freeze=freeze, **options)[0]
        assert_same_bits(f"row {i}", alone.captured[site], both[i].captured[site])
        assert_same_bits(f"row {i} unsteered", zero[i].captured[site], plain[i].captured[site])
        assert not np.array_equal(both[i].captured[site], plain[i].captured[site])


@pytest.mark.parametrize(
    "name",
    [
        "gpt2",
        "gpt_neox",
        "llama3",
        "gemma2",
        "gemma3",
        "glm4",
        "qwen3",
        "phi",
        "phi_norm",
        "cohere_norm",
        "olmo2",
        "exaone4",
    ],
)
def test_decoded_residual_streams_against_the_oracle(zoo, lean, rng, name):
    """Largest error 1.4e-6, of the bound of oracle/compare.py."""
    ref, model = zoo.reference(name), lean(name)
    rows = prompts(model, rng, (17, 3))
    sites = [f"blocks.{l}.hook_resid_post" for l in range(model.config.n_layers)]
    gens = model.generate(rows, max_new_tokens=5, ignore_eos=True, capture=sites, progress=False)
    for row, gen in zip(rows, gens, strict=True):
        with torch.no_grad():
            want = ref.forward(row + gen.tokens.tolist()).sites
        for s in sites:
            assert_close(f"{name}: {s}", gen.captured[s], want[s].numpy()[len(row) :])
