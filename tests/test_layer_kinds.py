"""What is particular to other kinds of layers: learned positions, parallel layers, layers without
norms before attention, plain MLPs. That their numbers are right is tested with all families.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vksteer as vs
from oracle.compare import assert_close, assert_same_bits
from oracle.families import MAX_POSITIONS
from vksteer.runtime import gradients

PARALLEL = ("gpt_neox", "gptj", "phi", "cohere", "stablelm_parallel")


def rows_of(model, rng, *lengths):
    return [rng.integers(0, model.config.d_vocab, n).tolist() for n in lengths]


# -- learned positions -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_stream_is_embeddings_plus_positions(zoo, name, rng):
    """What both sites hold is bit-identical to what is added, captured or not; positions count from
    a row's first token.
    """
    model = zoo.engine(name)
    rows = rows_of(model, rng, 9, 4)
    run = model.run(rows, capture=["hook_embed", "hook_pos_embed", "blocks.0.hook_resid_pre"])
    total = run["hook_embed"] + run["hook_pos_embed"]
    assert_same_bits(name, run["blocks.0.hook_resid_pre"], total)
    assert_same_bits(name, run["hook_pos_embed"][1, -4:], run["hook_pos_embed"][0, :4])
    assert_same_bits(name, run.logits, model.run(rows).logits)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_the_last_position_is_used_and_the_next_is_refused(zoo, name, rng):
    ref, model = zoo.reference(name), zoo.engine(name)
    row = rows_of(model, rng, MAX_POSITIONS)[0]
    with torch.no_grad():
        want = ref.forward(row, keep=False).logits[-1]
    assert_close(name, model.run([row], logits="last").logits[0], want)
    decoded = model.generate([row[:-2]], max_new_tokens=2, ignore_eos=True, progress=False)
    assert len(decoded[0].tokens) == 2
    for call in (
        lambda: model.run([[*row, 1]]),
        lambda: model.run([row], [[1]]),
        lambda: model.generate([row], max_new_tokens=1, ignore_eos=True, progress=False),
    ):
        with pytest.raises(ValueError, match=f"context holds {MAX_POSITIONS}"):
            call()


def test_an_edit_of_the_positions_leaves_the_embeddings_gradient_alone(zoo, rng):
    model = zoo.engine("gpt2")
    rows = rows_of(model, rng, 7)
    options = dict(of=vs.LogitDiff(-1, 3, 5), at=["hook_embed", "hook_pos_embed"])
    plain = model.gradients(rows, **options)
    assert_same_bits("the sum's", plain["hook_embed"], plain["hook_pos_embed"])
    zero = vs.Set("hook_pos_embed", np.zeros(model.config.d_model, np.float32))
    without = model.gradients(rows, edits=[zero], **options)
    assert_same_bits("the sum's", without["hook_embed"], without["hook_pos_embed"])
    assert np.abs(without["hook_embed"] - plain["hook_embed"]).max() > 1e-3


# -- parallel layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARALLEL)
def test_attention_does_not_reach_its_own_layers_mlp(zoo, name, rng):
    """The MLP's output has the same bits whatever attention adds; the next layer sees both."""
    model = zoo.engine(name)
    rows = rows_of(model, rng, 9, 4)
    sites = ["blocks.0.hook_mlp_out", "blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    plain = model.run(rows, capture=sites)
    edit = vs.Scale("blocks.0.hook_attn_out", -2.0)
    edited = model.run(rows, capture=sites, edits=[edit])
    assert_same_bits(name, plain[sites[0]], edited[sites[0]])
    assert "blocks.0.hook_resid_mid" not in model.sites
    for site in sites[1:]:
        assert np.abs(plain[site] - edited[site]).max() > 1e-3, site
    out = model.run(rows, capture=["*"])
    stream = out["blocks.0.hook_resid_pre"] + out["blocks.0.hook_attn_out"]
    assert_same_bits(name, out["blocks.0.hook_resid_post"], stream + out["blocks.0.hook_mlp_out"])


# -- the tape --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "olmo2", "glm4", *PARALLEL])
def test_a_layer_run_again_has_the_bits_of_the_kept_one(zoo, name, rng, monkeypatch):
    """Gradients with all intermediate values on the tape, and with the layers' inputs alone."""
    model = zoo.engine(name)
    rows = rows_of(model, rng, 9, 4)
    steer = vs.Steer(vs.SteeringVector(rng.standard_normal(model.config.d_model), 1), 0.7)
    both = []
    for share in (gradients.MEMORY_SHARE, 0.0):
        monkeypatch.setattr(gradients, "MEMORY_SHARE", share)
        model._tape = None
        both.append(model.gradients(rows, of=vs.LogitDiff(-1, 3, 5), at=["*"], edits=[steer]))
        assert model._tape[-1] == (share > 0)
    for site in model.sites:
        assert_same_bits(f"{name} {site}", both[0][site], both[1][site])
    model._tape = None


# -- values that are not finite --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, site, arises",
    [
        ("gpt2", "hook_pos_embed", "hook_pos_embed"),
        ("olmo2", "blocks.1.hook_mlp_out", "blocks.1.hook_mlp_out"),
        ("arcee", "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_pre"),
    ],
)
def test_where_infinity_arises(zoo, name, site, arises, rng):
    model = zoo.engine(name)
    rows = rows_of(model, rng, 5)
    edit = vs.Scale(site, 3e38, positions=[2])
    with pytest.raises(ValueError, match=f"finite at {arises} .*position 2"):
        model.run(rows, edits=[edit, edit])
