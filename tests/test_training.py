"""NTP and PO: losses and gradients against float64 autograd, training against a float64 reference,
bit-identical resumption, bad input.

Measured here (llvmpipe): losses within 2e-7, gradients within 2e-6 of the largest entry.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from oracle import losses as oracle
from oracle.compare import assert_close
from vksteer import Steer, SteeringVector, steering
from vksteer.steering import losses

FAMILIES = ["llama3", "gemma2", "qwen2", "qwen3"]
#: LayerNorm, parallel layers, clamped values, no norm before attention, a factor on what is added.
KINDS = ["gpt2", "gpt_neox", "olmo", "olmo2", "granite", "cohere2"]
#: The project's bounds.
LOSS, GRADIENT, TRAINING = 1e-4, 1e-3, 1e-3


def example(rng, vocabulary, sign, prompt=7, winning=9, losing=5):
    draw = lambda n: rng.integers(0, vocabulary, n).tolist()
    return SimpleNamespace(
        prompt=draw(prompt), winning=draw(winning), losing=draw(losing), sign=sign
    )


def ragged(rng, vocabulary):
    """Both signs, ragged, one and more than 64 tokens."""
    sizes = ((7, 9, 5), (1, 70, 3), (12, 1, 66), (4, 17, 17))
    return [example(rng, vocabulary, sign, *size) for sign, size in zip((1, -1, -1, 1), sizes)]


def vector(rng, model, layer, norm=4.0):
    direction = rng.standard_normal(model.config.d_model)
    return SteeringVector(direction * norm / np.linalg.norm(direction), layer)


@pytest.mark.parametrize("name", FAMILIES + KINDS)
@pytest.mark.parametrize("where", ["first", "low", "last"])
@pytest.mark.parametrize("which", ["ntp", "ntp sum", "po"])
def test_loss_and_gradient_against_autograd(zoo, rng, name, where, which):
    model, ref = zoo.engine(name), zoo.reference(name)
    layer = {"first": 0, "low": 1, "last": model.config.n_layers - 1}[where]
    examples, v = ragged(rng, model.config.d_vocab), vector(rng, model, layer)
    if which == "po":
        phi = 0.3  # some b above 1
        want = oracle.with_gradient(oracle.po, ref, examples, v.direction, layer, 0.7, phi=phi)
        got = steering.po_loss(model, examples, v, 0.7, phi=phi)
    else:
        reduction = "sum" if which == "ntp sum" else "mean"
        want = oracle.with_gradient(
            oracle.ntp, ref, examples, v.direction, layer, 0.7, reduction=reduction
        )
        got = steering.ntp_loss(model, examples, v, 0.7, reduction=reduction)
    assert got[1].dtype == np.float32 and got[1].shape == (model.config.d_model,)
    assert abs(got[0] - want[0]) <= LOSS * max(1.0, abs(want[0]))
    print(
        name,
        where,
        which,
        abs(got[0] - want[0]) / max(1.0, abs(want[0])),
        assert_close(f"{which} gradient", got[1], want[1], GRADIENT),
    )


@pytest.mark.parametrize("name", ["llama3", "gemma2"])
def test_batches_change_no_bit(zoo, rng, name):
    model = zoo.engine(name)
    examples, v = ragged(rng, model.config.d_vocab), vector(rng, model, 1)
    prepared = losses.prepare(model, examples, losing=True)
    together, apart = (
        losses.Objective(losses.LogProbs(model, 1, n), 0.3)(prepared, v.direction, [0.7] * 4)
        for n in (4096, 1)
    )
    assert (together[0] == apart[0]).all() and (together[1] == apart[1]).all()
    values, none = losses.Objective(losses.LogProbs(model, 1, 200), 0.3)(
        prepared, v.direction, [0.7] * 4, gradient=False
    )
    assert none is None and (values == together[0]).all()
    kept = losses.LogProbs(model, 1).references([prepared[1].losing])
    assert kept[0] == losses.LogProbs(model, 1)([prepared[1].losing], None, [0], False)[0][0]


def test_texts_get_their_end_of_turn(zoo, rng):
    """A text prompt goes through the template, a text response gets the end-of-turn token; the
    first 64 tokens count.
    """
    model = zoo.engine("llama2", "chat")
    v = vector(rng, model, 1)
    end = list(model.tokenizer.end_of_turn)
    text = SimpleNamespace(prompt="abc", winning="def", losing="ghi" * 50, sign=-1)
    encode = lambda t: model.tokenizer.encode(t, add_bos=False) + end
    tokens = SimpleNamespace(
        prompt=model.chat_tokens("abc")[0],
        winning=encode("def"),
        losing=encode("ghi" * 50),
        sign=-1,
    )
    assert (
        len(end) == 1
        and steering.po_loss(model, [text], v, 1.0)[0]
        == steering.po_loss(model, [tokens], v, 1.0)[0]
    )
    (prepared,) = losses.prepare(model, [text], losing=True)
    assert (
        prepared.winning.response[-1] == end[0]
        and len(prepared.losing.response) == 64
        and end[0] not in prepared.losing.response
    )


# -- training --------------------------------------------------------------------------------------


def reference_training(
    ref,
    examples,
    layer,
    width,
    *,
    loss,
    seed,
    batch_size,
    lr,
    epochs,
    init,
    coefficients,
    steps,
    optimizer,
    **options,
):
    """The same training in torch float64: (losses, vectors after each step)."""
    v = torch.tensor(
        init * np.random.default_rng([seed, 0]).standard_normal(width), requires_grad=True
    )
    adam = optimizer([v])
    values, vectors, epoch = [], [], 0
    while len(values) < steps:
        order = np.random.default_rng([seed, 3, epoch]).permutation(len(examples))
        adam.param_groups[0]["lr"] = lr * (1 - epoch / epochs)
        strength = coefficients(epoch, len(examples))
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            value = torch.stack(
                [loss(ref, examples[i], v, layer, strength[i], **options) for i in batch]
            ).mean()
            adam.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_([v], 1.0)
            adam.step()
            values.append(value.item())
            vectors.append(v.detach().numpy().copy())
        epoch += 1
    return values[:steps], vectors[:steps]


@pytest.mark.parametrize(
    "name, which, optimizer",
    [
        ("llama3", "ntp", "adamw"),
        ("gemma2", "po", "adamw"),
        ("qwen2", "ntp", "adam"),
        ("qwen3", "po", "adam"),
    ],
)
def test_ten_steps_follow_a_float64_reference(zoo, rng, name, which, optimizer):
    model, ref = zoo.engine(name), zoo.reference(name)
    examples = [
        example(rng, model.config.d_vocab, 1 if i % 2 else -1, 3 + i, 2 + 2 * i, 8 - i)
        for i in range(5)
    ]
    common = dict(batch_size=2, lr=0.05, seed=7)
    factors = (2, 4, 6) if which == "po" else None
    draw = lambda epoch, n: (
        np.full(n, 1.5)
        if factors is None
        else np.random.default_rng([7, 1, epoch]).choice(factors, n)
    )
    kinds = {
        "adamw": lambda p: torch.optim.AdamW(p, weight_decay=0.1),
        "adam": lambda p: torch.optim.Adam(p, weight_decay=0.1),
    }
    options = dict(phi=0.3) if which == "po" else {}
    train = steering.train_po if which == "po" else steering.train_ntp
    got = train(
        model,
        examples,
        layer=1,
        coefficient=1.5,
        factors=factors,
        epochs=4,
        init=0.3,
        weight_decay=0.1,
        optimizer=optimizer,
        progress=False,
        **common,
        **options,
    )
    values, vectors = reference_training(
        ref,
        examples,
        1,
        model.config.d_model,
        loss=getattr(oracle, which),
        epochs=4,
        init=0.3,
        coefficients=draw,
        steps=12,
        optimizer=kinds[optimizer],
        **common,
        **options,
    )
    assert np.abs(np.array(got.losses[:10]) - values[:10]).max() <= TRAINING * max(
        1.0, np.abs(values).max()
    )
    assert_close("vector after 9 steps", got.vectors[2], vectors[8], TRAINING)
    assert_close("vector after 12 steps", got.vectors[3], vectors[11], TRAINING)
    assert [round(c["lr"], 9) for c in got.curve[::3]] == [
        0.05,
        0.0375,
        0.025,
        0.0125,
    ] and got.epoch == 3


@pytest.fixture
def small(zoo, rng):
    """A model, training and validation examples, and arguments of a short training."""
    model = zoo.engine("llama3")
    make = lambda n: [
        example(rng, model.config.d_vocab, 1 if i % 2 else -1, 3 + i % 3, 4 + i % 5, 6)
        for i in range(n)
    ]
    return (
        model,
        make(7),
        dict(
            layer=2,
            validation=make(3),
            epochs=3,
            batch_size=3,
            factors="authors",
            phi=0.5,
            progress=False,
        ),
    )


def same_training(a, b):
    assert (
        (a.vector.direction == b.vector.direction).all()
        and (a.vectors == b.vectors).all()
        and a.losses == b.losses
        and a.curve == b.curve
    )
    assert a.validation == b.validation and a.epoch == b.epoch


@pytest.mark.parametrize("stop", [1, 3, 4, 8, 9])
def test_resume_gives_the_same_bits(small, tmp_path, stop):
    """Interrupted after any step, and killed between two checkpoints (checkpoint_every=2)."""
    model, examples, options = small
    whole, path = steering.train_po(model, examples, **options), tmp_path / "training.npz"

    def interrupt(done, total):
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        steering.train_po(model, examples, checkpoint=path, **options | {"progress": interrupt})
    asked = []
    resumed = steering.train_po(
        model,
        examples,
        checkpoint=path,
        batch_tokens=30,
        **options | {"progress": lambda done, total: asked.append(done)},
    )
    assert asked[0] == stop and asked[-1] == 9
    same_training(whole, resumed)
    # finished: nothing left to do
    same_training(whole, steering.train_po(model, examples, checkpoint=path, **options))
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_of_another_training_is_refused(small, tmp_path):
    model, examples, options = small
    path = tmp_path / "training.npz"
    steering.train_po(model, examples, checkpoint=path, **options)
    before = path.read_bytes()
    for change in (dict(lr=0.02), dict(seed=1), dict(layer=1), dict(phi=0.4), dict(epochs=4)):
        with pytest.raises(ValueError, match=f"another training: {next(iter(change))}"):
            steering.train_po(model, examples, checkpoint=path, **options | change)
    with pytest.raises(ValueError, match="examples_hash"):
        steering.train_po(model, examples[1:], checkpoint=path, **options)
    assert path.read_bytes() == before
    for damaged in (before[:-40], b"", b"PK\3\4 nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no checkpoint of a training"):
            steering.train_po(model, examples, checkpoint=path, **options)
    with pytest.raises(ValueError, match="there is no folder"):
        steering.train_po(model, examples, checkpoint=tmp_path / "none" / "x.npz", **options)


def test_what_training_returns(small):
    model, examples, options = small
    po = steering.train_po(model, examples, **options)
    assert (
        len(po.losses) == 9
        and po.vectors.shape == (3, model.config.d_model)
        and [v["epoch"] for v in po.validation] == [0, 1, 2]
    )
    assert (
        (po.vector.direction == po.vectors[po.epoch].astype(np.float32)).all()
        and po.vector.layer == 2
        and po.vector.method == "po"
    )
    # PO: within one phi of the least loss, then the best match, then the earlier epoch
    least = min(v["loss"] for v in po.validation)
    assert all((v["match"] is not None) == (v["loss"] <= least + 0.5) for v in po.validation)
    near = [v for v in po.validation if v["match"] is not None]
    assert po.epoch == max(near, key=lambda v: (v["match"], -v["epoch"]))["epoch"]
    assert (
        po.vector.meta["training"]["factors"] == list(range(2, 21, 2))
        and po.vector.meta["training"]["n_examples"] == 7
    )
    assert (
        abs(po.normalized_to(3.5).norm - 3.5) < 1e-5
        and abs(po.normalized_to(po.vector * 2).norm - 2 * po.vector.norm) < 1e-5
    )
    assert "| 1 |" in po.to_markdown() and po.to_dict()["settings"]["phi"] == 0.5
    options.pop("phi")
    ntp = steering.train_ntp(model, examples, **options | {"factors": None})
    assert ntp.epoch == int(np.argmin([v["loss"] for v in ntp.validation])) and all(
        v["match"] is None for v in ntp.validation
    )
    assert np.mean(ntp.losses[-3:]) < np.mean(ntp.losses[:3])
    alone = steering.train_ntp(
        model,
        [SimpleNamespace(prompt=e.prompt, winning=e.winning, sign=e.sign) for e in examples],
        **options | {"factors": None, "validation": None},
    )
    assert alone.losses == ntp.losses and alone.epoch == 2 and alone.validation == []


def test_match_score(zoo, rng):
    model, v = zoo.engine("gemma2"), vector(rng, zoo.engine("gemma2"), 1)
    (e,) = losses.prepare(model, [example(rng, model.config.d_vocab, -1, 6, 12, 3)], losing=True)
    row = list(e.winning.prompt + e.winning.response)
    said = model.run([row], edits=[Steer(v, -0.7)]).logits[0, 5:17].argmax(-1)
    half = np.where(np.arange(12) % 2, said, (said + 1) % model.config.d_vocab)
    for response in (e.winning.response, tuple(half.tolist())):
        s = losses.Continuation(e.winning.prompt, response)
        row = list(s.prompt + s.response)
        want = float(
            np.mean(
                model.run([row], edits=[Steer(v, -0.7)]).logits[0, 5:17].argmax(-1)
                == np.array(s.response)
            )
        )
        assert losses.LogProbs(model, 1, 5).matches([s, s], v.direction, [-0.7, -0.7]) == want


# -- bad input -------------------------------------------------------------------------------------


def test_bad_examples(zoo, rng, monkeypatch):
    model = zoo.engine("llama3")
    v, good = vector(rng, model, 1), example(rng, model.config.d_vocab, 1)
    monkeypatch.setattr(losses, "differentiate", None)  # nothing may run
    change = lambda **fields: SimpleNamespace(**vars(good) | fields)
    bad = [
        ("is empty", []),
        ("list of examples", None),
        ("sign is 0", [change(sign=0)]),
        ("sign is 2", [good, change(sign=2)]),
        ("sign is True", [change(sign=True)]),
        ("sign is nan", [change(sign=float("nan"))]),
        ("winning is", [change(winning=[])]),
        ("winning is", [change(winning=None)]),
        ("losing is", [change(losing=" ")]),
        ("has no losing", [SimpleNamespace(prompt=[1], winning=[1], sign=1)]),
        ("prompt", [change(prompt=[])]),
        ("prompt", [change(prompt=3)]),
        ("not in the vocabulary", [change(losing=[1, model.config.d_vocab])]),
        ("prompt holds token", [change(prompt=[999])]),
        ("context", [change(prompt=[1] * 505)]),
        ("context", [change(prompt=[1] * 513)]),
        ("tokenizer", [change(winning="a text")]),
    ]
    for message, examples in bad:
        for call in (
            lambda: steering.po_loss(model, examples, v, 1.0),
            lambda: steering.train_po(model, examples, layer=1, progress=False),
            lambda: steering.train_po(
                model,
                [good],
                layer=1,
                validation=7 if examples is None else examples,
                progress=False,
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_bad_settings(zoo, rng, monkeypatch):
    model = zoo.engine("llama3")
    v, good = vector(rng, model, 1), [example(rng, model.config.d_vocab, 1)]
    monkeypatch.setattr(losses, "differentiate", None)
    zero, wide, high = (
        SteeringVector(np.zeros(model.config.d_model), 1),
        SteeringVector(np.ones(7), 1),
        SteeringVector(v.direction, 4),
    )
    for message, other in (
        ("zero", zero),
        ("width 7", wide),
        ("layers 0 to 3", high),
        ("SteeringVector", v.direction),
    ):
        for loss in (steering.ntp_loss, steering.po_loss):
            with pytest.raises(ValueError, match=message):
                loss(model, good, other, 1.0)
    with pytest.raises(ValueError, match="finite"):
        SteeringVector(np.full(model.config.d_model, np.nan), 1)
    for phi in (0, -1.0, float("nan"), float("inf"), True, "a"):
        with pytest.raises(ValueError, match="phi"):
            steering.po_loss(model, good, v, 1.0, phi=phi)
        with pytest.raises(ValueError, match="phi"):
            steering.train_po(model, good, layer=1, phi=phi, progress=False)
    for coefficient in (float("nan"), "1", True):
        with pytest.raises(ValueError, match="coefficient"):
            steering.ntp_loss(model, good, v, coefficient)
    for change in (
        dict(layer=4),
        dict(layer=-1),
        dict(layer=1.0),
        dict(epochs=0),
        dict(batch_size=0),
        dict(lr=0),
        dict(lr=float("nan")),
        dict(clip=0),
        dict(init=0),
        dict(weight_decay=-1),
        dict(optimizer="sgd"),
        dict(seed=-1),
        dict(limit=0),
        dict(reduction="max"),
        dict(factors=[]),
        dict(factors=[0]),
        dict(factors="all"),
        dict(coefficient=0),
        dict(coefficient=-1),
        dict(batch_tokens=0),
        dict(checkpoint_every=0),
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            steering.train_ntp(model, good, **{"layer": 1, "progress": False} | change)
    with pytest.raises(ValueError, match="progress"):
        steering.train_ntp(model, good, layer=1, progress="yes")
