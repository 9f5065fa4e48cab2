"""Greedy decoding of several steps at once (`Decoding._block`): the same tokens, keys and values as
by single steps, with the kernels of CPUs and of GPUs.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import folders
import vksteer as vs
from oracle.compare import assert_same_bits
from vksteer.runtime import decoding
from vksteer.runtime.batch import Batch, packed_rows
from vksteer.runtime.device import _engine

LENGTHS = (17, 1, 40, 5)
FAMILIES = ("gpt2", "llama3", "gemma2", "qwen3")


@pytest.fixture(params=["own", "tiled"])
def opened(request, monkeypatch):
    """Opens a folder with the device's own kernels (on software devices those of CPUs) or with
    those of GPUs.
    """
    models = []
    if request.param == "tiled":
        monkeypatch.setenv("VKSTEER_KERNELS", "tiled")
    # a slow machine takes as many steps at once as any other
    monkeypatch.setattr(decoding, "BLOCK_SECONDS", np.inf)

    def model(folder):
        models.append(vs.Model.from_pretrained(str(folder), dtype="float32", progress=False))
        return models[-1]

    yield model
    for each in models:
        each.close()


class Watch:
    """What generate did: the steps of every block, and keys and values at its end."""

    def __init__(self, monkeypatch):
        self.blocks, self.caches = [], []
        block, run = Batch.decode_block, decoding.Decoding.run

        def decode_block(batch, cache, newest, n_steps, **options):
            self.blocks.append((n_steps, len(newest)))
            return block(batch, cache, newest, n_steps, **options)

        def run_and_read(this):
            run(this)
            slots = [
                np.arange(start, start + state.length - 1)  # the last token is not run
                for i, state in enumerate(this.states)
                for start in this.starts[this.double * i :][: this.double]
            ]
            self.caches.append(this.cache.read(np.concatenate(slots).astype(np.uint32)))

        monkeypatch.setattr(Batch, "decode_block", decode_block)
        monkeypatch.setattr(decoding.Decoding, "run", run_and_read)

    def generate(self, monkeypatch, steps, model, rows, **options):
        """(generations, keys and values, blocks) with at most so many steps at once."""
        self.blocks, self.caches = [], []
        monkeypatch.setattr(decoding, "BLOCK_STEPS", steps)
        gens = model.generate(rows, progress=False, **options)
        return gens, self.caches, self.blocks


@pytest.fixture
def compare(monkeypatch):
    """Runs generate by single steps and by several at once, which must agree in every bit. Returns
    the generations and the blocks of each number of steps.
    """
    watch = Watch(monkeypatch)

    def run(model, rows, sizes=(3, 16), **options):
        want, caches, none = watch.generate(monkeypatch, 1, model, rows, **options)
        assert not none
        blocks = {}
        for steps in sizes:
            got, found, blocks[steps] = watch.generate(monkeypatch, steps, model, rows, **options)
            for a, b in zip(got, want, strict=True):
                assert a.tokens.tolist() == b.tokens.tolist()
                assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
            for a, b in zip(found, caches, strict=True):
                assert_same_bits(f"{steps} steps", a, b)
        return want, blocks

    return run


def drawn(model, rng, lengths=LENGTHS):
    return [rng.integers(0, model.config.d_vocab, n).tolist() for n in lengths]


def vector(model, rng, layer=1):
    return vs.SteeringVector(rng.standard_normal(model.config.d_model).astype(np.float32), layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_single_steps(opened, compare, zoo, rng, name):
    model = opened(zoo.folder(name))
    rows = drawn(model, rng)
    edits = [[], [vs.Steer(vector(model, rng), 4.0)], [], [vs.Scale("blocks.0.hook_mlp_out", 2.0)]]
    options = dict(max_new_tokens=20, ignore_eos=True)
    _, blocks = compare(model, rows, edits=edits, **options)
    # the first token comes with the prompt, and the second shows how long a step takes
    assert blocks == {3: [(3, 4)] * 6, 16: [(16, 4), (2, 4)]}
    _, blocks = compare(model, rows, batch_size=3, sizes=(16,), **options)
    assert blocks[16] == [(16, 3), (2, 3), (16, 1), (2, 1)]


def test_edits_of_some_positions(opened, compare, zoo, rng):
    """Commands are recorded again where an edit begins, ends or changes inside a block."""
    model = opened(zoo.folder("llama3"))
    rows = drawn(model, rng, (9, 4, 1))
    some = [
        vs.Scale("blocks.0.hook_resid_pre", 1.5, positions=slice(14, 20)),
        vs.Scale("blocks.1.mlp.hook_post", 0.5, positions=slice(10, 26, 3)),
        vs.Scale("blocks.1.attn.hook_pattern", 1.25, positions=[21]),
        vs.Steer(vector(model, rng), 6.0, positions=[12, 17, 18]),
    ]
    options = dict(max_new_tokens=20, ignore_eos=True)
    plain, _ = compare(model, rows, sizes=(16,), **options)
    for edits in ([some, [], some[:1]], [[], some[3:], some[1:2]], [[], some[1:3], []]):
        edited, blocks = compare(model, rows, sizes=(16,), edits=edits, **options)
        assert blocks[16] == [(16, 3), (2, 3)]
        for a, b, of in zip(edited, plain, edits, strict=True):
            assert of or a.tokens.tolist() == b.tokens.tolist()
        assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(edited, plain))


def test_steps_are_recorded_once(opened, zoo):
    """The processor time of the thread that records, of one call for 16 steps and of one for a
    step: 2 to 3 times that.
    """
    model = opened(zoo.folder("llama3"))
    cache = _engine().Cache(model._engine, 64)
    model._engine.forward(cache, packed_rows([[1, 2, 3]], start=[0], slot=[0]), [], 0)
    spent = {1: [], 16: []}
    for _ in range(9):
        for n_steps, times in spent.items():
            rows = packed_rows([[5]], start=[3], slot=[0], decode=True)
            begin = time.thread_time()
            model._engine.decode_block(cache, rows, n_steps, 1, 1e9, 0.0)
            times.append(time.thread_time() - begin)
    assert min(spent[16]) < 8 * min(spent[1])


@pytest.mark.parametrize("freeze", ["qk", "ov", "mlp"])
def test_frozen_rows(opened, compare, zoo, rng, freeze):
    model = opened(zoo.folder("llama3"))
    rows = drawn(model, rng, (9, 4, 1))
    steer = [vs.Steer(vector(model, rng), 6.0)]
    steered, blocks = compare(
        model, rows, edits=steer, freeze=freeze, max_new_tokens=12, ignore_eos=True
    )
    assert blocks[16] == [(10, 3)]
    plain = model.generate(rows, max_new_tokens=12, ignore_eos=True, progress=False)
    assert any(a.tokens.tolist() != b.tokens.tolist() for a, b in zip(steered, plain, strict=True))


def test_rows_that_end_at_different_times(opened, compare, zoo, rng):
    plain = opened(zoo.folder("llama3"))
    rows = drawn(plain, rng, (17, 1, 40, 5, 8, 3))
    free = [
        g.tokens.tolist()
        for g in plain.generate(rows, max_new_tokens=24, ignore_eos=True, progress=False)
    ]
    ends = [free[0][6], free[1][3], free[3][13]]
    model = opened(zoo.variant("llama3", "ends-in-blocks", eos_token_id=ends))
    gens, blocks = compare(model, rows, max_new_tokens=24)
    lengths = {len(g.tokens) for g in gens}
    assert len(lengths) > 2, "the test needs rows that end at different times"
    # a CPU would compute what follows an end token in vain
    assert bool(blocks[16]) == (model.kernels[0] in ("tiled", "matrix"))
    assert sum(steps for steps, _ in blocks[16]) <= 1.5 * max(lengths)


def test_a_switch_of_rotation_tables(opened, compare, zoo, rng):
    """Rows that pass the switch of longrope, at 40 tokens, at different times."""
    model = opened(zoo.folder("phi3_long"))
    assert model.config.rope_switch == 40
    _, blocks = compare(model, drawn(model, rng, (30, 37, 45)), max_new_tokens=20, ignore_eos=True)
    assert blocks[16][0] == (2, 3) and len(blocks[16]) > 2


def changed(zoo, tmp_path, change):
    folder = folders.copy(zoo.folder("llama2"), tmp_path / "m")
    path = folder / "model.safetensors"
    tensors = {n: np.array(t) for n, t in load_file(path).items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            change(tensors[name])
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_equal_logits(opened, compare, zoo, rng, tmp_path):
    """Every second token has the logit of the one before it: the first of the two is picked."""

    def pairs(weights):
        weights[1::2] = weights[: len(weights) // 2 * 2 : 2][: len(weights[1::2])]

    model = opened(changed(zoo, tmp_path, pairs))
    gens, blocks = compare(model, drawn(model, rng), max_new_tokens=20, ignore_eos=True)
    assert blocks[16] and all((g.tokens % 2 == 0).all() for g in gens)
    assert len({t for g in gens for t in g.tokens.tolist()}) > 3


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_logits_that_become_infinite(opened, monkeypatch, zoo, rng, name):
    """At the sixth new token of one row: the message is that of single steps."""
    model = opened(zoo.folder(name))
    rows = drawn(model, rng, (9, 4))
    direction = np.ones(model.config.d_model, np.float32)
    direction[::2] = -1
    steer = vs.Steer(vs.SteeringVector(direction, 1), 1e30, [4 + 5])
    said = []
    watch = Watch(monkeypatch)
    for steps in (1, 16):
        with pytest.raises(ValueError) as error:
            watch.generate(
                monkeypatch,
                steps,
                model,
                rows,
                edits=[[], [steer]],
                max_new_tokens=20,
                ignore_eos=True,
            )
        said.append(str(error.value))
    assert said[0] == said[1] and "row 1: values are not finite after 6 new tokens" in said[0]
    assert watch.blocks == [(16, 2)]


@pytest.mark.parametrize("name", ["llama2", "gpt2"])
def test_logits_of_nothing(opened, compare, zoo, rng, name):
    """Zero or those of the biases alone without an overflow, which the host looks at and leaves."""
    model = opened(zoo.folder(name))
    zeros = vs.Set(
        "ln_final.hook_normalized", np.zeros(model.config.d_model, np.float32), positions=[4 + 5]
    )
    _, blocks = compare(
        model, drawn(model, rng, (9, 4)), edits=[[], [zeros]], max_new_tokens=12, ignore_eos=True
    )
    assert blocks[16] == [(10, 2)]


def test_what_needs_every_token(opened, monkeypatch, zoo, rng):
    model = opened(zoo.folder("llama2", "chat"))
    rows, watch = drawn(model, rng, (9, 4)), Watch(monkeypatch)
    for options in (
        dict(on_token=lambda row, token, text: None),
        dict(stop="zzz"),
        dict(temperature=0.5),
        dict(capture="ln_final.hook_scale"),
    ):
        *_, blocks = watch.generate(
            monkeypatch, 16, model, rows, max_new_tokens=5, ignore_eos=True, **options
        )
        assert not blocks
    *_, blocks = watch.generate(monkeypatch, 16, model, rows, max_new_tokens=5, ignore_eos=True)
    assert blocks == [(3, 2)]


def test_slow_steps_are_few_at_once(zoo, monkeypatch, rng):
    """Between two blocks progress is shown."""
    model, watch = zoo.engine("llama2"), Watch(monkeypatch)
    options = dict(max_new_tokens=20, ignore_eos=True)
    for seconds, many in ((0.0, False), (np.inf, True)):
        monkeypatch.setattr(decoding, "BLOCK_SECONDS", seconds)
        *_, blocks = watch.generate(monkeypatch, 16, model, drawn(model, rng), **options)
        assert bool(blocks) == many
