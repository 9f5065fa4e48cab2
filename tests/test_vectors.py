"""Steering vectors: what is refused, algebra, provenance, round trips, GGUF against the gguf
package's own writer and reader, hostile files.
"""

from __future__ import annotations

import copy
import io
import pickle
import struct
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from control_vectors import write_control_vector
from vksteer.base.provenance import digest
from vksteer.errors import ModelError
from vksteer.inputs.vectors import SteeringVector

ENDINGS = ("safetensors", "npz", "gguf")


@pytest.fixture
def vector(rng):
    return SteeringVector(
        rng.standard_normal(37),
        5,
        position=-4,
        method="dim",
        meta={
            "model_hash": "ab" * 32,
            "prompts": {"n": 64},
            "architecture": "llama",
            "note": "Größe ’quoted’",
        },
    )


def config(width=37, layers=8):
    return SimpleNamespace(d_model=width, n_layers=layers, architecture="llama")


# -- the object ------------------------------------------------------------------------------------


def test_direction_is_an_owned_read_only_float32_row(rng):
    mine = rng.standard_normal(9)
    v = SteeringVector(mine, np.int64(3))
    mine[:] = 0
    assert (
        v.direction.dtype == np.float32
        and v.direction.flags.c_contiguous
        and v.direction.any()
        and type(v.layer) is int
    )
    with pytest.raises(ValueError):
        v.direction[0] = 1
    with pytest.raises(TypeError):
        v.meta["a"] = 1
    with pytest.raises(AttributeError):
        v.layer = 4


@pytest.mark.parametrize(
    "direction, layer, more, says",
    [
        ([1.0, np.nan], 1, {}, "entry 1 is nan"),
        ([np.inf, 1.0], 1, {}, "entry 0 is inf"),
        ([1e300, 1.0], 1, {}, "finite in float32"),
        ([[1.0, 2.0]], 1, {}, "one row"),
        ([], 1, {}, "one row"),
        (3.0, 1, {}, "one row"),
        ([1.0], -1, {}, "-1"),
        ([1.0], 1.5, {}, "1.5"),
        ([1.0], True, {}, "True"),
        ([1.0], "2", {}, "'2'"),
        ([1.0], 1, {"position": 0.5}, "0.5"),
        ([1.0], 1, {"meta": {"f": print}}, "JSON"),
    ],
)
def test_bad_arguments_are_refused(direction, layer, more, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        SteeringVector(direction, layer, **more)


def test_algebra(vector):
    d = vector.direction
    np.testing.assert_array_equal((-vector).direction, -d)
    np.testing.assert_array_equal((0.5 * vector).direction, d * np.float32(0.5))
    np.testing.assert_array_equal((vector * np.float32(2)).direction, 2 * d)
    np.testing.assert_array_equal((np.float64(2) * vector).direction, 2 * d)
    np.testing.assert_array_equal((vector / 4).direction, d / 4)
    assert vector.norm == pytest.approx(np.linalg.norm(d.astype(np.float64)))
    assert vector.with_norm(3.0).norm == pytest.approx(3.0, rel=1e-6)
    assert (
        (-(0.5 * vector)).meta["scaled_by"] == -0.5
        and (-vector).layer == 5
        and (-vector).position == -4
        and (-vector).method == "dim"
    )
    for wrong in (
        lambda: vector * vector,
        lambda: vector * "2",
        lambda: vector * True,
        lambda: vector * d,
    ):
        with pytest.raises(TypeError):
            wrong()
    for wrong in (lambda: vector * np.nan, lambda: vector / 0, lambda: (0.0 * vector).with_norm(1)):
        with pytest.raises(ValueError):
            wrong()


def test_cosine(vector, rng):
    assert vector.cosine(vector) == pytest.approx(1) and vector.cosine(
        -2 * vector
    ) == pytest.approx(-1)
    u = rng.standard_normal(37)
    want = (
        u
        @ vector.direction
        / np.linalg.norm(u)
        / np.linalg.norm(vector.direction.astype(np.float64))
    )
    assert vector.cosine(u) == pytest.approx(want) and vector.cosine(
        SteeringVector(u, 1)
    ) == pytest.approx(want, abs=1e-6)
    with pytest.raises(ValueError, match="37"):
        vector.cosine(np.ones(36))
    with pytest.raises(ValueError, match="zero"):
        vector.cosine(np.zeros(37))


def test_copies(vector):
    for copied in (copy.deepcopy(vector), pickle.loads(pickle.dumps(vector))):
        np.testing.assert_array_equal(copied.direction, vector.direction)
        assert (copied.layer, copied.position, copied.method, dict(copied.meta)) == (
            5,
            -4,
            "dim",
            dict(vector.meta),
        )


def test_check_against_a_model(vector):
    vector.check(config())
    vector.check(SimpleNamespace(config=config(), fingerprint="ab" * 32))
    with pytest.raises(ValueError, match=r"37.*36"):
        vector.check(config(width=36))
    with pytest.raises(ValueError, match=r"layer 5.*0 to 3"):
        vector.check(config(layers=4))
    vector.check(config(layers=5))  # the output of the last block
    with pytest.raises(ValueError, match=r"output of the last block.*0 to 4"):
        vector.check(config(layers=5), output=False)
    with pytest.warns(UserWarning, match="another model"):
        vector.check(SimpleNamespace(config=config(), fingerprint="cd" * 32))


def test_digest_depends_on_content_alone():
    assert digest("a", [1, 2]) == digest("a", np.array([1, 2])) != digest("a", [2, 1])


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("width", [1, 7, 33, 256])
def test_round_trip(tmp_path, rng, ending, width):
    v = SteeringVector(
        rng.standard_normal(width), 2, position=-1, method="ntp", meta={"a": [1, {"b": "Größe ’"}]}
    )
    path = tmp_path / f"v.{ending}"
    for again in (v, 2 * v):  # saving twice replaces the file
        again.save(path)
        u = SteeringVector.load(str(path))
        np.testing.assert_array_equal(u.direction, again.direction)
        assert (u.layer, u.position, u.method, dict(u.meta)) == (2, -1, "ntp", dict(again.meta))
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]
    with pytest.raises(ValueError, match="3"):
        SteeringVector.load(path, layer=3)
    assert SteeringVector.load(path, layer=2).layer == 2
    with pytest.raises(ValueError, match="width"):
        SteeringVector.load(path, model=config(width=width + 1))


@pytest.mark.parametrize("ending", ENDINGS)
def test_without_position_and_meta(tmp_path, ending):
    SteeringVector([1.0, 2.0], 4).save(tmp_path / f"v.{ending}")
    v = SteeringVector.load(tmp_path / f"v.{ending}")
    assert (v.position, v.method, dict(v.meta)) == (None, "", {})


def test_what_is_not_saved(tmp_path, vector):
    for name in ("v.pt", "v", "v.pkl"):
        with pytest.raises(ValueError, match="safetensors"):
            vector.save(tmp_path / name)
        with pytest.raises(ValueError, match="safetensors"):
            SteeringVector.load(tmp_path / name)
    with pytest.raises(ValueError, match="zero"):
        (0.0 * vector).save(tmp_path / "v.npz")
    for layer in (0, 1):
        with pytest.raises(ValueError, match=f"layer {layer}"):
            SteeringVector([1.0], layer).save(tmp_path / "v.gguf")
    with pytest.raises(FileNotFoundError):
        SteeringVector.load(tmp_path / "none.gguf")
    assert not list(tmp_path.iterdir())


def test_warns_when_it_is_of_another_model(tmp_path, vector):
    vector.save(tmp_path / "v.safetensors")
    with pytest.warns(UserWarning, match="another model"):
        SteeringVector.load(
            tmp_path / "v.safetensors",
            model=SimpleNamespace(config=config(), fingerprint="ef" * 32),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SteeringVector.load(
            tmp_path / "v.safetensors",
            model=SimpleNamespace(config=config(), fingerprint="ab" * 32),
        )


# -- the off-by-one, against the gguf package ------------------------------------------------------


def test_what_we_write_the_gguf_package_reads(tmp_path, vector):
    import gguf

    vector.save(tmp_path / "v.gguf")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    text = lambda key: bytes(reader.get_field(key).parts[-1]).decode()
    assert (
        text("general.architecture") == "controlvector"
        and text("controlvector.model_hint") == "llama"
        and text("vksteer.operation") == "add"
    )
    assert reader.get_field("controlvector.layer_count").parts[-1][0] == 1
    (tensor,) = reader.tensors
    assert tensor.name == "direction.4"  # resid_pre of layer 5 is the output of block 4
    assert list(tensor.shape) == [37] and tensor.data.dtype == np.float32
    np.testing.assert_array_equal(tensor.data, vector.direction)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_what_the_gguf_package_writes_we_read(tmp_path, rng, dtype):
    rows = {n: rng.standard_normal(33).astype(dtype) for n in (1, 2, 11)}
    write_control_vector(tmp_path / "v.gguf", rows, dtype, hint="gemma2")
    with pytest.raises(ValueError, match=r"\[2, 3, 12\]"):
        SteeringVector.load(tmp_path / "v.gguf")
    with pytest.raises(ValueError, match=r"layer 11.*\[2, 3, 12\]"):
        SteeringVector.load(tmp_path / "v.gguf", layer=11)
    for n, row in rows.items():
        v = SteeringVector.load(tmp_path / "v.gguf", layer=n + 1)
        np.testing.assert_array_equal(v.direction, row.astype(np.float32))
        assert v.layer == n + 1 and v.meta["architecture"] == "gemma2"
    write_control_vector(tmp_path / "one.gguf", {7: rows[1]})
    assert SteeringVector.load(tmp_path / "one.gguf").layer == 8


def test_a_gguf_that_contradicts_itself(tmp_path, vector):
    vector.save(tmp_path / "v.gguf")
    data = (tmp_path / "v.gguf").read_bytes()
    (tmp_path / "v.gguf").write_bytes(data.replace(b"direction.4", b"direction.5"))
    with pytest.raises(ModelError, match=r"layer 5.*layer 6"):
        SteeringVector.load(tmp_path / "v.gguf")


def test_other_gguf_files_are_refused(tmp_path, rng):
    import gguf

    write_control_vector(tmp_path / "zero.gguf", {0: [1.0]})
    with pytest.raises(ModelError, match=r"direction.0"):
        SteeringVector.load(tmp_path / "zero.gguf")
    write_control_vector(tmp_path / "matrix.gguf", {1: np.ones((2, 3))})
    with pytest.raises(ModelError, match="one row"):
        SteeringVector.load(tmp_path / "matrix.gguf")
    write_control_vector(tmp_path / "nan.gguf", {1: [1.0, np.nan]})
    with pytest.raises(ModelError, match="nan"):
        SteeringVector.load(tmp_path / "nan.gguf")
    write_control_vector(tmp_path / "nothing.gguf", {})
    with pytest.raises(ModelError, match="no direction"):
        SteeringVector.load(tmp_path / "nothing.gguf")
    write_control_vector(tmp_path / "null.gguf", {1: [0.0, 0.0]})
    with pytest.raises(ModelError, match="zero"):
        SteeringVector.load(tmp_path / "null.gguf")
    writer = gguf.GGUFWriter(tmp_path / "llama.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'llama'"):
        SteeringVector.load(tmp_path / "llama.gguf")


# -- hostile files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_truncation_is_refused(tmp_path, vector, ending):
    path = tmp_path / f"v.{ending}"
    vector.save(path)
    data = path.read_bytes()
    # The last bytes of a GGUF file are padding, which other writers leave out.
    end = len(data) - (-len(vector.direction) * 4 % 32 if ending == "gguf" else 0)
    for n in list(range(0, end, 13)) + [end - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(ModelError, match="v." + ending):
            SteeringVector.load(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_bytes_never_do_more_than_raise(tmp_path, vector, rng, ending):
    """Six hundred flipped bytes and runs of 0xff: a ModelError, a ValueError of the arguments, or a
    vector; nothing else, and no big allocation.
    """
    path = tmp_path / f"v.{ending}"
    vector.save(path)
    data = path.read_bytes()
    refused = 0
    for i in range(600):
        hurt = bytearray(data)
        at, n = int(rng.integers(len(data))), int(rng.integers(1, 9))
        hurt[at : at + n] = (
            b"\xff" * len(hurt[at : at + n])
            if i % 2
            else bytes(rng.integers(0, 256, len(hurt[at : at + n]), dtype=np.uint8))
        )
        path.write_bytes(hurt)
        try:
            v = SteeringVector.load(path)
        except ModelError:
            refused += 1
        else:
            assert np.isfinite(v.direction).all()
    assert refused > 60


@pytest.mark.parametrize("ending", ENDINGS)
def test_trailing_bytes(tmp_path, vector, ending):
    path = tmp_path / f"v.{ending}"
    vector.save(path)
    path.write_bytes(path.read_bytes() + b"\1" * 64)
    if ending != "npz":  # a zip may carry a comment or a tail: its directory is found from the end
        with pytest.raises(ModelError):
            SteeringVector.load(path)
    else:
        np.testing.assert_array_equal(SteeringVector.load(path).direction, vector.direction)


def test_gguf_with_absurd_counts(tmp_path):
    cases = {
        "tensors": struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0),
        "fields": struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60),
        "string": struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, (1 << 64) - 1) + b"x" * 64,
        "array": (
            struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IIQ", 9, 0, 1 << 62)
        ),
        "nested": (
            struct.pack("<4sIQQ", b"GGUF", 3, 0, 1)
            + struct.pack("<Q", 1)
            + b"a"
            + struct.pack("<IIQ", 9, 9, 1) * 9
        ),
        "shape": (
            struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
            + struct.pack("<Q", 11)
            + b"direction.1"
            + struct.pack("<IQQIQ", 2, 1 << 33, 1 << 33, 0, 0)
        ),
        "big endian": struct.pack(">4sIQQ", b"GGUF", 3, 1, 1),
        "magic": b"GGML" + bytes(60),
        "empty": b"",
    }
    for data in cases.values():
        (tmp_path / "v.gguf").write_bytes(data)
        with pytest.raises(ModelError):
            SteeringVector.load(tmp_path / "v.gguf")


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name + ".npy", data)


def npy(array, allow_pickle=False):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def test_npz_neither_unpickles_nor_believes_shapes(tmp_path):
    facts = {
        "format": "vksteer.steering_vector",
        "version": "1",
        "layer": "3",
        "position": "",
        "method": "",
        "meta": "{}",
    }
    texts = {k: npy(np.array(v)) for k, v in facts.items()}
    path = tmp_path / "v.npz"

    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was executed",))

    good = npy(np.ones(4, np.float32))
    lying = good.replace(b"(4,)", b"(9999999999,)").replace(b" " * 10, b"", 1)
    cases = {
        "pickle": npy(np.array([Bomb()], dtype=object), allow_pickle=True),
        "lying shape": lying,
        "complex": npy(np.ones(3, complex)),
        "matrix": npy(np.ones((2, 2))),
        "bomb": npy(np.zeros(40_000_000, np.float32)),
        "text": npy(np.array("x")),
        "no npy": b"hello",
    }
    for direction in cases.values():
        npz(path, direction=direction, **texts)
        with pytest.raises(ModelError):
            SteeringVector.load(path)
    npz(path, direction=good, **(texts | {"meta": npy(np.array("[1]"))}))
    with pytest.raises(ModelError, match="object"):
        SteeringVector.load(path)
    npz(path, direction=good, **(texts | {"layer": npy(np.array("x"))}))
    with pytest.raises(ModelError, match="layer"):
        SteeringVector.load(path)
    npz(path, direction=good, **(texts | {"meta": npy(np.array("[" * 100_000))}))
    with pytest.raises(ModelError):
        SteeringVector.load(path)
    npz(path, direction=good, **texts)
    assert SteeringVector.load(path).layer == 3
    np.savez(path, direction=np.ones(3))
    with pytest.raises(ModelError, match="format"):
        SteeringVector.load(path)


def test_safetensors_of_others_are_refused(tmp_path):
    from safetensors.numpy import save_file

    ours = {
        "format": "vksteer.steering_vector",
        "version": "1",
        "layer": "3",
        "position": "",
        "method": "",
        "meta": "{}",
    }
    path = tmp_path / "v.safetensors"
    for tensors, metadata in [
        ({"w": np.ones(3, np.float32)}, None),
        ({"w": np.ones(3, np.float32)}, ours),
        ({"direction": np.ones((1, 3), np.float32)}, ours),
        ({"direction": np.ones(3, np.float64)}, ours),
        ({"direction": np.ones(3, np.float32)}, ours | {"version": "2"}),
        ({"direction": np.ones(3, np.float32)}, ours | {"layer": "-1"}),
        ({"direction": np.array([1, np.nan], np.float32)}, ours),
    ]:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ModelError):
            SteeringVector.load(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(ModelError):
        SteeringVector.load(path)
