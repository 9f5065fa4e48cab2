"""Edits, sites and prompts that are refused before any work."""

from __future__ import annotations

import numpy as np
import pytest

# -- refused, before any work ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("blocks.0.hook_resid_prr", "blocks.0.hook_resid_pre"),
        ("blocks.1.attn.hook_patern", "blocks.1.attn.hook_pattern"),
        ("ln_final.hook_normalised", "ln_final.hook_normalized"),
        ("blocks.1.mlp.hook_prelinear", "blocks.1.mlp.hook_pre_linear"),
    ],
)
def test_an_unknown_site_names_the_nearest(zoo, wrong, near):
    import vksteer as vs

    model = zoo.engine("llama2")
    for call in (
        lambda: model.run([[1, 2]], capture=[wrong]),
        lambda: model.run([[1, 2]], edits=[vs.Scale(wrong, 2.0)]),
        lambda: model.generate([[1, 2]], max_new_tokens=1, capture=[wrong], progress=False),
        lambda: model.run([[1, 2]], edits=[vs.Ablate(np.ones(40, np.float32), sites=[wrong])]),
    ):
        with pytest.raises(KeyError) as e:
            call()
        assert wrong in str(e.value) and near in str(e.value)


@pytest.mark.parametrize(
    "wrong",
    ["blocks.7.hook_resid_pre", "blocks.*.hook_nothing", "blocks.1.ln1_post.hook_scale", ""],
)
def test_sites_this_model_does_not_have(zoo, wrong):
    model = zoo.engine("llama2")
    with pytest.raises(KeyError):
        model.run([[1, 2]], capture=[wrong])


def refusals(vs, rng):
    D, H, d, L = 40, 5, 6, 3  # llama2 of the zoo
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    nan = draw(D)
    nan[7] = np.nan
    z, resid = "blocks.1.attn.hook_z", "blocks.1.hook_resid_mid"
    return {
        "steer: width": lambda: [vs.Steer(vs.SteeringVector(draw(D + 1), 1), 1.0)],
        "steer: NaN": lambda: [vs.Steer(vs.SteeringVector(nan, 1), 1.0)],
        "steer: layer": lambda: [vs.Steer(vs.SteeringVector(draw(D), L + 1), 1.0)],
        "steer: negative layer": lambda: [vs.Steer(vs.SteeringVector(draw(D), -1), 1.0)],
        "ablate: width": lambda: [vs.Ablate(draw(D - 1))],
        "ablate: zero": lambda: [vs.Ablate(np.zeros(D, np.float32))],
        "ablate: site of another width": lambda: [
            vs.Ablate(draw(D), sites=["blocks.1.mlp.hook_post"])
        ],
        "set: last axis": lambda: [vs.Set(resid, draw(D + 2))],
        "set: number of positions": lambda: [vs.Set(resid, draw(3, D), positions=[0, 1])],
        "set: too many axes": lambda: [vs.Set(resid, draw(2, 3, D), positions=[0, 1, 2])],
        "set: heads": lambda: [vs.Set(z, draw(3, d), heads=[0, 1])],
        "heads: out of range": lambda: [vs.Set(z, 0.0, heads=[H])],
        "heads: negative": lambda: [vs.Set(z, 0.0, heads=[-H - 1])],
        "heads: a site without": lambda: [vs.Set(resid, 0.0, heads=[0])],
        "positions: a word": lambda: [
            vs.Steer(vs.SteeringVector(draw(D), 1), 1.0, positions="answer")
        ],
        "one list per row, too few": lambda: [[vs.Scale(resid, 2.0)]],
    }


@pytest.mark.parametrize(
    "what",
    [
        "steer: width",
        "steer: NaN",
        "steer: layer",
        "steer: negative layer",
        "ablate: width",
        "ablate: zero",
        "ablate: site of another width",
        "set: last axis",
        "set: number of positions",
        "set: too many axes",
        "set: heads",
        "heads: out of range",
        "heads: negative",
        "heads: a site without",
        "positions: a word",
        "one list per row, too few",
    ],
)
def test_bad_edits_are_refused(zoo, rng, what):
    import vksteer as vs

    model = zoo.engine("llama2")
    make = refusals(vs, rng)[what]
    for call in (
        lambda e: model.run([[1, 2, 3], [4, 5, 6]], edits=e),
        lambda e: model.generate([[1, 2, 3], [4, 5, 6]], edits=e, max_new_tokens=2, progress=False),
    ):
        with pytest.raises(ValueError) as error:
            call(make())
        assert len(str(error.value)) > 15, "the message says too little"


@pytest.mark.parametrize("wrong", [1.5, "a", True, None])
@pytest.mark.parametrize(
    "place",
    [
        lambda x: dict(positions=[x]),
        lambda x: dict(positions=slice(x or 1.5, None)),
        lambda x: dict(positions=slice(None, x or 1.5)),
        lambda x: dict(positions=slice(None, None, x or 1.5)),
        lambda x: dict(heads=[x]),
    ],
    ids=["position", "start", "stop", "step", "head"],
)
def test_what_is_no_whole_number_is_a_type_error(zoo, place, wrong):
    import vksteer as vs

    edit = vs.Set("blocks.1.attn.hook_z", 0.0, **place(wrong))
    with pytest.raises(TypeError, match="must be a whole number, not"):
        zoo.engine("llama2").run([[1, 2, 3]], edits=[edit])


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.run([]),
        lambda m: m.run([[]]),
        lambda m: m.run([[1], []]),
        lambda m: m.run([[1, 101]]),
        lambda m: m.run([[-1]]),
        lambda m: m.run([[1] * 513]),
        lambda m: m.run([[1]], [[2], [3]]),
        lambda m: m.run([[1] * 300], [[2] * 300]),
        lambda m: m.generate([], progress=False),
        lambda m: m.generate([[1] * 513], progress=False),
    ],
)
def test_bad_prompts_are_refused(zoo, call):
    with pytest.raises(ValueError) as error:
        call(zoo.engine("llama2"))
    assert len(str(error.value)) > 15, "the message says too little"


@pytest.mark.parametrize("edits, error", [([3.0], TypeError), ("steer", TypeError), (7, TypeError)])
def test_what_is_no_edit_is_refused(zoo, edits, error):
    with pytest.raises(error):
        zoo.engine("llama2").run([[1, 2]], edits=edits)


def test_text_without_a_tokenizer_is_refused(zoo):
    with pytest.raises(ValueError, match="token"):
        zoo.engine("llama2").run("Tell me about villages.")
