"""Steering the output of the last block, as the last direction of a repeng control vector does,
against transformers with forward hooks.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vksteer as vs
from oracle.compare import assert_close, assert_same_bits
from vksteer.patching import Sample
from vksteer.runtime.resume import last_logits

NAMES = (
    *("llama2", "gemma2", "gemma3", "qwen3"),
    *("gpt2", "gpt_neox", "gptj", "opt", "olmo2", "granite", "cohere2", "stablelm_parallel"),
)


def hooked(folder, vectors):
    """A transformers model in float32 that adds each vector to the output of the block before its
    layer. vectors: [(layer, float32 [D], first steered position)].
    """
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager"
    ).eval()

    def add(direction, start):
        def hook(module, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            hidden[:, start:] += torch.tensor(direction)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    assert len(blocks) == model.config.num_hidden_layers
    for layer, direction, start in vectors:
        blocks[layer - 1].register_forward_hook(add(direction, start))
    return model


def expected(folder, tokens, vectors):
    with torch.no_grad():
        return hooked(folder, vectors)(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(params=NAMES)
def case(request, zoo, rng):
    """(engine's model, its folder, rows of tokens, directions by layer)."""
    model, folder = zoo.engine(request.param, dtype="float32"), zoo.folder(request.param)
    c = model.config
    rows = [rng.integers(0, c.d_vocab, n).tolist() for n in (9, 4, 17)]
    scale = np.sqrt(c.d_model)
    directions = {
        layer: (rng.standard_normal(c.d_model) * scale / 4).astype(np.float32)
        for layer in range(1, c.n_layers + 1)
    }
    return model, folder, rows, directions


def test_run(case):
    """One row and rows of other lengths beside it; some positions only; all directions of a file at
    once.
    """
    model, folder, rows, directions = case
    last = model.config.n_layers
    vector = vs.SteeringVector(directions[last], last)
    edits = [vs.Steer(vector, 1.5)]
    run = model.run(rows, edits=edits)
    for row, logits in zip(rows, run.logits):
        want = expected(folder, row, [(last, 1.5 * directions[last], 0)])
        assert_close("all positions", logits[-len(row) :], want)
        assert_same_bits("alone", model.run([row], edits=edits).logits[0], logits[-len(row) :])
    row = rows[0]
    partly = [vs.Steer(vector, positions=slice(3, None))]
    assert_close(
        "from position 3",
        model.run([row], edits=partly).logits[0],
        expected(folder, row, [(last, directions[last], 3)]),
    )
    everything = [vs.Steer(vs.SteeringVector(d, layer)) for layer, d in directions.items()]
    assert_close(
        "every layer",
        model.run([row], edits=everything).logits[0],
        expected(folder, row, [(layer, d, 0) for layer, d in directions.items()]),
    )


def test_sites_and_logits(case):
    """The final norm and the logits read the edited stream, nothing below sees it."""
    model, _, rows, directions = case
    last = model.config.n_layers
    site = f"blocks.{last - 1}.hook_resid_post"
    below = f"blocks.{last - 1}.hook_mlp_out"
    steer = [vs.Steer(vs.SteeringVector(directions[last], last), 2.0)]
    plain, steered = (model.run(rows[:1], edits=e, capture=[site, below]) for e in ([], steer))
    assert_same_bits("the last MLP's output", plain[below], steered[below])
    change = steered[site][0] - plain[site][0]
    want = np.broadcast_to(2.0 * directions[last], change.shape)
    assert_close("the difference at the site", change, want)
    added = model.run(rows[:1], edits=[vs.Add(site, 2.0 * directions[last])])
    assert_close("as Add", steered.logits, added.logits)


def test_gradients(case):
    """The gradient below the last block is that of the same vector added at the site."""
    model, _, rows, directions = case
    last = model.config.n_layers
    site, below = f"blocks.{last - 1}.hook_resid_post", "blocks.0.hook_resid_pre"
    options = {"of": vs.LogitDiff(-1, 3, 5), "at": [site, below], "progress": False}
    steer = [vs.Steer(vs.SteeringVector(directions[last], last))]
    steered = model.gradients(rows[:1], edits=steer, **options)
    added = model.gradients(rows[:1], edits=[vs.Add(site, directions[last])], **options)
    plain = model.gradients(rows[:1], **options)
    for name in (site, below):
        assert_close(name, steered[name], added[name])
        assert np.abs(steered[name] - plain[name]).max() > 0


def test_last_logits_of_many_rows(case):
    """Rows that resume above the unedited layers give the bits of a whole run."""
    model, _, rows, directions = case
    last = model.config.n_layers
    vectors = {layer: vs.SteeringVector(d, layer) for layer, d in directions.items()}
    jobs = [(r, [vs.Steer(vectors[last], a)]) for r in rows for a in (1.0, -2.0)]
    jobs += [(rows[0], [vs.Steer(vectors[last]), vs.Steer(vectors[1])])]
    for batch in (jobs[:-1], jobs):
        for (row, edits), logits in zip(batch, last_logits(model, batch)):
            assert_same_bits("last", model.run([row], edits=edits).logits[0, -1], logits)


def test_generate(case):
    """Decoding with a cache: each new token is the first choice of transformers on the same
    prefix.
    """
    model, folder, rows, directions = case
    last = model.config.n_layers
    strong = 40 * directions[last]  # Gemma's stream is large
    edits = [vs.Steer(vs.SteeringVector(strong, last))]
    (plain,) = model.generate(rows[:1], max_new_tokens=8, ignore_eos=True, progress=False)
    (made,) = model.generate(
        rows[:1], max_new_tokens=8, edits=edits, ignore_eos=True, progress=False
    )
    new = [int(t) for t in made.tokens]
    logits = expected(folder, rows[0] + new, [(last, strong, 0)])
    for step, token in enumerate(new):
        at = logits[len(rows[0]) - 1 + step]
        assert at[token] >= at.max() - 1e-3
    assert new != [int(t) for t in plain.tokens]


def test_a_control_vector_of_repeng(case, tmp_path):
    """Every direction of a file with one for each block but the first, read layer by layer."""
    import gguf

    model, folder, rows, directions = case
    last = model.config.n_layers
    writer = gguf.GGUFWriter(str(tmp_path / "v.gguf"), "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", last - 1)
    for n in range(1, last):
        writer.add_tensor(f"direction.{n}", directions[n + 1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    layers = vs.SteeringVector.list(tmp_path / "v.gguf")
    assert layers == list(range(2, last + 1))
    edits = [
        vs.Steer(vs.SteeringVector.load(tmp_path / "v.gguf", layer=layer, model=model))
        for layer in layers
    ]
    want = expected(folder, rows[0], [(layer, directions[layer], 0) for layer in layers])
    assert_close("repeng", model.run(rows[:1], edits=edits).logits[0], want)


REFUSED = {
    "freeze": lambda m, v, rows: m.run(rows, edits=[vs.Steer(v)], freeze="qk"),
    "freeze some layers": lambda m, v, rows: m.generate(
        rows, edits=[vs.Steer(v)], freeze="ov", freeze_layers=[0], progress=False
    ),
    "ablate": lambda m, v, rows: m.run(rows, edits=[vs.Steer(v)], ablate="svv"),
    "attribute": lambda m, v, rows: vs.patching.attribute(
        m, [Sample(rows[0], rows[1])], v, 1.0, progress=False
    ),
    "samples": lambda m, v, rows: vs.patching.make_samples(m, rows, v, 1.0, progress=False),
    "exact": lambda m, v, rows: vs.patching.exact(
        m, Sample(rows[0], rows[1]), v, 1.0, nodes=["steer"]
    ),
    "value vectors": lambda m, v, rows: vs.ov.steering_value_vectors(m, v),
    "decompose": lambda m, v, rows: vs.ov.decompose(m, rows[:1], v, 1.0, 0),
    "ablation table": lambda m, v, rows: vs.freezing.ablation_table(m, v, rows, rows, 1.0),
    "loss": lambda m, v, rows: vs.steering.ntp_loss(
        m, [vs.steering.Example(rows[0], rows[1], rows[2], 1)], v, 1.0
    ),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_needs_a_layer_above_refuses_it(zoo, rng, call):
    """Nothing computes on the output of the last block: there is nothing to freeze or explain."""
    model = zoo.engine("llama2")
    c = model.config
    vector = vs.SteeringVector(rng.standard_normal(c.d_model), c.n_layers)
    rows = [rng.integers(0, c.d_vocab, n).tolist() for n in (5, 3, 4)]
    with pytest.raises(ValueError, match="output of the last block"):
        REFUSED[call](model, vector, rows)


def test_layers_that_do_not_exist(zoo, rng):
    model = zoo.engine("llama2")
    vector = vs.SteeringVector(rng.standard_normal(model.config.d_model), model.config.n_layers + 1)
    with pytest.raises(ValueError, match=r"layer 4.*0 to 2; 3 is the output of the last block"):
        model.run([[1, 2]], edits=[vs.Steer(vector)])
