"""Inputs of other packages and programs: bfloat16 arrays and tensors as vectors and values, JSON
Lines under another name, long CSV fields, and two classes of the same prompts.
"""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import vksteer as vs
from vksteer.base.arrays import as_float32, as_numpy
from vksteer.inputs.prompts import refuse_equal_classes

torch = pytest.importorskip("torch")
VALUES = [0.5, -1.25, 3.0, 1 / 3, 1e30]


def kinds():
    plain = torch.tensor(VALUES)
    yield "bfloat16", plain.to(torch.bfloat16)
    yield "float16", plain.clamp(max=100).to(torch.float16)
    yield "float32", plain
    yield "float64", plain.to(torch.float64)
    yield "gradient", plain.clone().requires_grad_()
    yield "bfloat16 with gradient", plain.to(torch.bfloat16).requires_grad_()
    yield "float8", plain.clamp(max=100).to(torch.float8_e4m3fn)
    yield "int64", torch.tensor([1, 2, 3, 4, 5])
    yield "parameter", torch.nn.Parameter(plain.to(torch.bfloat16))
    yield "view", torch.arange(10).to(torch.bfloat16)[::2]


@pytest.mark.parametrize("tensor", [pytest.param(t, id=n) for n, t in kinds()])
def test_tensors(tensor):
    want = tensor.detach().to(torch.float32).numpy()
    np.testing.assert_array_equal(as_float32(tensor), want)
    np.testing.assert_array_equal(vs.SteeringVector(tensor, 1).direction, want)
    assert vs.SteeringVector(want, 0).cosine(tensor) == pytest.approx(1)
    stack = as_float32([tensor, tensor])
    np.testing.assert_array_equal(stack, np.stack([want, want]))


def test_ml_dtypes():
    import ml_dtypes

    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        array = np.array([0.5, -1.25, 3.0], dtype)
        np.testing.assert_array_equal(vs.SteeringVector(array, 1).direction, [0.5, -1.25, 3.0])


def test_what_is_no_tensor_stays():
    for value in (None, "a", 3, [1, 2], (1.5, 2), {"a": 1}):
        assert as_numpy(value) is value
    with pytest.raises((TypeError, ValueError)):
        as_float32(["a"])


def test_tensors_as_values_of_edits(zoo):
    model = zoo.engine("llama2")
    width, rng = model.config.d_model, np.random.default_rng(0)
    values = torch.tensor(rng.standard_normal(width)).to(torch.bfloat16)
    want = values.to(torch.float32).numpy()
    site, row = "blocks.1.hook_resid_pre", [3, 4, 5, 6]
    for make in (
        lambda x: vs.Set(site, x),
        lambda x: vs.Add(site, x, positions=[1]),
        lambda x: vs.Scale(site, x),
        lambda x: vs.MeanAblate(site, x),
        lambda x: vs.Steer(vs.SteeringVector(x, 1), 2.0),
        vs.Ablate,
    ):
        a, b = (model.run([row], edits=[make(x)]).logits for x in (values, want))
        np.testing.assert_array_equal(a, b)
    reference = torch.tensor(rng.standard_normal((1, model.config.d_vocab))).to(torch.bfloat16)
    found = [
        model.gradients([row], of=vs.KL(x, [-1]), at="hook_embed", progress=False)["hook_embed"]
        for x in (reference, reference.to(torch.float32).numpy())
    ]
    np.testing.assert_array_equal(*found)


def test_tensors_as_scores_and_lens_vectors(zoo):
    model = zoo.engine("llama2")
    values = torch.tensor(np.random.default_rng(1).standard_normal(model.config.d_model))
    half = values.to(torch.bfloat16)
    want = half.to(torch.float32).numpy()
    vector = vs.SteeringVector(want, 1)
    for a, b in ((half, want), ([half, half], [want, want])):
        found = [vs.ov.logit_lens(model, x, top=3).values for x in (a, b)]
        np.testing.assert_array_equal(*found)
    chosen = [vs.sparsify.by_effect(vector, x, 5).kept for x in (half, want)]
    np.testing.assert_array_equal(*chosen)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_vector_files_in_half_precision(tmp_path, dtype):
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensor = torch.tensor(VALUES[:4]).to(getattr(torch, dtype))
    path = tmp_path / "v.safetensors"
    vs.SteeringVector(tensor, 3).save(path)
    with safe_open(path, "pt") as stream:
        facts = stream.metadata()
    save_file({"direction": tensor}, path, metadata=facts)
    vector = vs.SteeringVector.load(path)
    np.testing.assert_array_equal(vector.direction, tensor.to(torch.float32).numpy())
    assert vector.layer == 3


# ---- prompts ----

PROMPTS = ["one", 'two "quoted"', "three\u2028lines", "four"]
LINES = "\n".join(json.dumps({"prompt": p, "n": i}) for i, p in enumerate(PROMPTS))


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES + "\n\n",
        "\n".join(json.dumps(p) for p in PROMPTS),
        json.dumps(PROMPTS),
        json.dumps([{"prompt": p} for p in PROMPTS]),
        json.dumps([{"prompt": p} for p in PROMPTS], indent=2),
        json.dumps({"prompt": PROMPTS}),
    ],
)
def test_json_by_content(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert vs.data.load(tmp_path / name) == PROMPTS


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_one_line_is_one_prompt(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"prompt": "one", "n": 1}))
    assert vs.data.load(tmp_path / name) == ["one"]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_broken_lines_are_named(tmp_path, name):
    (tmp_path / name).write_text(LINES + '\n{"prompt": "fi')
    with pytest.raises(ValueError, match="line 5 is not valid JSON"):
        vs.data.load(tmp_path / name)


def test_broken_json_is_no_lines(tmp_path):
    (tmp_path / "p.json").write_text('["one", "two"')
    with pytest.raises(ValueError, match="not valid JSON"):
        vs.data.load(tmp_path / "p.json")


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_long_fields(tmp_path, ending):
    limit = csv.field_size_limit()
    long = "word, and more\n" * 40_000
    assert len(long) > 4 * limit
    with open(tmp_path / f"p.{ending}", "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, delimiter="," if ending == "csv" else "\t")
        writer.writerows([["prompt", "n"], [long, 1], ["short", 2]])
    assert vs.data.load(tmp_path / f"p.{ending}") == [long, "short"]
    assert csv.field_size_limit() == limit


def test_equal_classes_are_refused(zoo):
    for a, b in ((["x", "y"], ["y", "x"]), ([[1, 2], [3]], [[1, 2], [3]]), (["x"], ["x"])):
        with pytest.raises(ValueError, match=r"harmful and harmless are the same .* twice"):
            refuse_equal_classes(a, b)
    for a, b in ((["x", "x"], ["x", "y"]), (["x"], ["x", "x"]), ([[1]], [[1, 2]]), (["x"], [[1]])):
        refuse_equal_classes(a, b)
    model, rows = zoo.engine("llama2"), [[3, 4, 5], [6, 7, 8]]
    options = dict(positions=[-1], progress=False)
    with pytest.raises(ValueError, match="the same 2 prompts"):
        vs.steering.difference_in_means(model, rows, rows[::-1], **options)
    candidates = vs.steering.difference_in_means(model, rows, [[9, 10, 11]], **options)
    for call in (candidates.select, candidates.evaluate):
        with pytest.raises(ValueError, match="the same 2 prompts"):
            call(rows, rows, progress=False)
    vector = vs.SteeringVector(np.ones(model.config.d_model), 1)
    with pytest.raises(ValueError, match="the same 2 prompts"):
        vs.steering.sweep(model, vector, [1.0], rows, rows, progress=False)
