"""The one file of finished items that long work goes on from. No device needed."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

from vksteer.base.store import Store


@pytest.fixture(params=["items", "rows", None])
def field(request):
    """Both layouts of the file."""
    return request.param


def store(path, key="k", **more) -> Store:
    named = {"argument": "out", "what": "file of a test", "other": "another test"}
    return Store(path, format="test", key=key, **named | more)


ITEM = {
    "edges": np.array([[1.5, np.nan, -0.0], [np.inf, 1e-310, 0.1]]),
    "small": np.arange(3, dtype=np.float32)[::2],
    "empty": np.zeros((0, 4)),
    "kept": np.array([True, False]),
    "text": "ä\u2028\n",
    "number": 0.1,
    "nothing": None,
    "list": [1, [np.int32([7])]],
}


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[n], b[n]) for n in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_items_come_back_bit_identical(tmp_path, field):
    path = tmp_path / "store"
    first = store(path, field=field)
    assert not path.exists() and not len(first)
    first.put("a", ITEM)
    first.put("b", None)
    first.put("a", ITEM | {"number": 2})
    read = store(path, field=field)
    assert list(read) == ["a", "b"] and same(read["a"], ITEM | {"number": 2})
    assert read["b"] is None and "b" in read and "c" not in read
    read.replace({"c": (1, 2)})
    again = store(path, field=field)
    assert {name: again[name] for name in again} == {"c": [1, 2]}
    assert field is None or json.loads(path.read_text())[field] == {"c": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_without_a_path_nothing_is_written(tmp_path, field):
    memory = store(None, field=field)
    memory.put("a", ITEM)
    memory.put("b", 1)
    assert memory["a"] is ITEM and len(memory) == 2 and not list(tmp_path.iterdir())


def test_a_cut_last_line_is_dropped_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "store"
    first = store(path, field=None)
    for i in range(3):
        first.put(str(i), i)
    whole = path.read_bytes()
    end = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in (end + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        read = store(path, field=None)
        assert list(read) == ["0", "1"] and path.read_bytes() == whole[:end]
        read.put("2", 2)
        assert path.read_bytes() == whole


def test_damaged_lines_are_refused(tmp_path):
    path = tmp_path / "store"
    first = store(path, field=None)
    first.put("a", 1)
    first.put("b", 2)
    whole = path.read_bytes()
    head, a, b = whole.splitlines(keepends=True)
    refused(
        path,
        None,
        head,
        head + a[:-1],
        whole.replace(b'"value": 1', b'"value": 3'),
        a + b,
        head + b"{}\n" + b,
        b"PK\3\4\n",
        whole.replace(b'"test"', b'"best"'),
    )


def test_a_damaged_object_is_refused(tmp_path):
    path = tmp_path / "store"
    store(path).put("a", 1)
    whole = path.read_bytes()
    refused(
        path,
        "items",
        b"",
        whole[:-2],
        b"{",
        b'{"key": 3}',
        whole.replace(b'"a": 1', b'"a": 3'),
        whole.replace(b'"test"', b'"best"'),
        whole + whole,
    )
    refused(path, "rows", whole)


def refused(path, field, *contents):
    for damaged in contents:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"out: .*store is damaged or no file of a test"):
            store(path, field=field)
        assert path.read_bytes() == damaged


def test_an_empty_file_of_lines_holds_nothing(tmp_path):
    path = tmp_path / "store"
    path.touch()
    empty = store(path, field=None)
    assert not len(empty)
    empty.put("a", 1)
    assert list(store(path, field=None)) == ["a"]
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty"):
        store(path)


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "old",
    [
        npz(content=[0], vector=[0], first=[0], second=[0], curve=[0], vectors=[0]),
        npz(key="k", samples=np.array([0]), weights=np.array([1]), edges0=np.ones(3)),
        b'{"key": "k", "rows": {"none": {"harmful": []}}}',
        b'{"format": "vksteer sparsity sweep 1", "key": "k", "kernels": "texels"}\n{"run": "a"}\n',
        json.dumps({"samples.json": "0" * 64, "scores.safetensors": "a" * 64}, indent=1).encode(),
    ],
    ids=["training", "attribution", "ablation table", "sweep", "circuit folder"],
)
def test_files_of_the_first_version_are_named_so(tmp_path, field, old):
    path = tmp_path / "store"
    path.write_bytes(old)
    with pytest.raises(ValueError, match=r"format of version 0\.1\.0, .* resumed; ask me$"):
        store(path, field=field, remedy="ask me")
    assert path.read_bytes() == old


def test_another_key_is_refused(tmp_path, field):
    path = tmp_path / "store"
    store(path, {"lr": 0.1, "seed": 0}, field=field, about={"kernels": "x"}).put("a", 1)
    assert json.loads(path.read_text().splitlines()[0])["kernels"] == "x"
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"another test: lr \(0.1 there, 0.2 here\); name"):
        store(path, {"lr": 0.2, "seed": 0}, field=field)
    with pytest.raises(ValueError, match="another test; name"):
        store(path, "k", field=field)
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="there is no folder"):
        store(tmp_path / "none" / "x")


def test_what_cannot_be_kept_leaves_the_file_as_it_was(tmp_path, field):
    path = tmp_path / "store"
    first = store(path, field=field)
    first.put("a", 1)
    whole = path.read_bytes()
    for item in (object(), np.array(["x"]), np.array([None])):
        with pytest.raises(TypeError):
            first.put("b", item)
    assert path.read_bytes() == whole and "b" not in store(path, field=field)
