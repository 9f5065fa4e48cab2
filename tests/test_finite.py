"""NaN and infinity in results: which call notices, where they begin, and what the cause is."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import folders
import vksteer as vs
from vksteer.runtime import finite
from vksteer.runtime.edits import Set, Steer

ROWS = [[3, 4, 5, 6, 7], [8, 9, 10]]


def steer(model, coefficient, layer=1, positions=None):
    direction = np.ones(model.config.d_model, np.float32)
    direction[::2] = -1  # LayerNorm takes a mean away
    return Steer(vs.SteeringVector(direction, layer), coefficient, positions)


def calls(model, edits):
    """Every call that notices, with the same edits."""
    options = dict(edits=edits, progress=False)
    return {
        "run": lambda: model.run(ROWS, edits=edits),
        "run, last logits": lambda: model.run(ROWS, edits=edits, logits="last"),
        "run, captures": lambda: model.run(
            ROWS, edits=edits, logits=None, capture=["blocks.*.hook_scale"]
        ),
        "generate": lambda: model.generate(ROWS, max_new_tokens=3, ignore_eos=True, **options),
        "gradients": lambda: model.gradients(
            ROWS, of=vs.LogitDiff(-1, 3, 4), at="blocks.0.hook_resid_pre", **options
        ),
    }


#: The first norm that reads the stream, in which 1e30 squared overflows; without norms before
#: attention that is the one of attention's output.
FIRST_NORM = {
    **dict.fromkeys(["llama2", "gemma2", "qwen3", "gpt2", "gpt_neox"], "ln1"),
    "exaone4": "ln1_post",
}


@pytest.mark.parametrize("name", FIRST_NORM)
@pytest.mark.parametrize("call", ["run", "run, last logits", "run, captures", "generate"])
def test_an_edit_that_is_too_strong(zoo, name, call):
    model = zoo.engine(name)
    calls(model, [steer(model, 10.0)])[call]()
    with pytest.raises(ValueError) as error:
        calls(model, [steer(model, 1e30)])[call]()
    said, site = str(error.value), f"blocks.1.{FIRST_NORM[name]}.hook_scale"
    assert "row 0" in said and f"{site} (layer 1), position 0: inf" in said
    assert "without the edits every value is finite" in said
    assert "Steer at layer 1 with coefficient 1e+30" in said


def test_gradients_of_an_edit_that_is_too_strong(zoo):
    model = zoo.engine("llama2")
    calls(model, [steer(model, 10.0)])["gradients"]()
    with pytest.raises(
        ValueError, match=r"blocks.1.ln1.hook_scale \(layer 1\).*coefficient 1e\+30"
    ):
        calls(model, [steer(model, 1e30)])["gradients"]()


def test_the_row_the_layer_and_the_position_are_named(zoo):
    model = zoo.engine("llama2")
    strong = [[], [steer(model, 1e30, layer=2, positions=[1])]]
    with pytest.raises(ValueError, match=r"row 1: .*blocks.2.ln1.hook_scale \(layer 2\), pos.* 1:"):
        model.run(ROWS, edits=strong)
    values = np.full(model.config.d_mlp, 3e38, np.float32)
    edit = Set("blocks.1.mlp.hook_pre", values, positions=[2])
    with pytest.raises(ValueError, match=r"row 0: .*layer 1\), position 2.*Set at blocks.1.mlp"):
        model.run(ROWS[:1], edits=[edit])


def test_attribution_of_an_edit_that_is_too_strong(zoo):
    model = zoo.engine("llama2")
    samples = [vs.patching.Sample((3, 4, 5), (6, 7)), vs.patching.Sample((8, 9), (10,))]
    vector = steer(model, 1.0).vector
    options = dict(steps=2, progress=False)
    vs.patching.attribute(model, samples, vector, 1.0, **options)
    with pytest.raises(ValueError, match=r"samples\[0\]: .*blocks.1.ln1.hook_scale.*1e\+30"):
        vs.patching.attribute(model, samples, vector, 1e30, **options)


@pytest.mark.parametrize(
    "tensor, site",
    [
        ("model.layers.1.self_attn.o_proj.weight", "blocks.1.hook_attn_out"),
        ("model.layers.2.mlp.down_proj.weight", "blocks.2.hook_mlp_out"),
        ("model.layers.0.mlp.up_proj.weight", "blocks.0.mlp.hook_pre_linear"),
        ("model.embed_tokens.weight", "hook_embed"),
    ],
)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights(zoo, tmp_path, tensor, site, value):
    folder = folders.copy(zoo.folder("llama2"), tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = {n: np.array(t) for n, t in load_file(path).items()}
    tensors[tensor][4] = value
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    with vs.Model.from_pretrained(folder, progress=False) as model:
        for edits in ((), [steer(model, 1.0)]):
            with pytest.raises(ValueError) as error:
                model.run(ROWS, edits=edits)
            said = str(error.value)
            assert f"values stop being finite at {site} (" in said, said
            assert "the model is the cause" in said
            assert ("without the edits, too" in said) == bool(edits)


def test_finite_results_are_left_alone(zoo):
    model = zoo.engine("gemma2")
    run = model.run(ROWS, capture=["*"])
    for name, values in run.items():
        # masked scores are minus infinity by contract
        assert name.endswith("hook_attn_scores") or np.isfinite(values).all()
    # logits of zero without an overflow: the final norm's output replaced by zeros
    zeros = Set("ln_final.hook_normalized", np.zeros(model.config.d_model, np.float32))
    assert not model.run(ROWS, edits=[zeros]).logits.any()


def test_logits_of_biases_alone(zoo):
    """Norms with biases put these out where their scale overflows; without an overflow nothing is
    wrong with them. They are equal to those of a run on lavapipe.
    """
    for name in ("gpt2", "gptj", "phi_norm"):
        model = zoo.engine(name)
        zeros = Set("ln_final.hook_normalized", np.zeros(model.config.d_model, np.float32))
        logits, empty = model.run(ROWS, edits=[zeros]).logits, model._bias_logits
        assert np.abs(logits[0] - empty).max() <= 1e-6 * np.abs(empty).max() and empty.any()
        assert finite.suspect_row(logits, (), [5, 3], empty) == 0
        plain = model.run(ROWS).logits
        assert finite.suspect_row(plain, (), [5, 3], empty) is None
    assert zoo.engine("llama2")._bias_logits is None


def test_which_rows_are_suspect():
    logits = np.ones((3, 4, 5), np.float32)
    assert finite.suspect_row(logits, ()) is None
    for value in (np.nan, np.inf, -np.inf):
        bad = logits.copy()
        bad[1, 2, 3] = value
        assert finite.suspect_row(bad, ()) == 1 and finite.suspect_row(None, [bad]) == 1
    zero = logits.copy()
    zero[2, 1] = 0
    assert finite.suspect_row(zero, ()) == 2
    assert finite.suspect_row(zero, (), [4, 4, 2]) is None  # padding
    zero[2, 1, 4] = 1
    assert finite.suspect_row(zero, ()) is None
    huge = np.full(1000, 3e38, np.float32)
    assert finite.all_finite(huge) and not finite.all_finite(np.append(huge, np.inf))
