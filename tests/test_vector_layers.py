"""Files that hold one direction for each layer: their layers, and each of their directions."""

from __future__ import annotations

import numpy as np
import pytest

from control_vectors import write_control_vector
from vksteer import ModelError, SteeringVector

ENDINGS = ("safetensors", "npz", "gguf")


def test_layers_of_a_file(tmp_path, rng):
    """`list` names what `load` takes, in every kind of file."""
    write_control_vector(tmp_path / "v.gguf", {n: rng.standard_normal(9) for n in (3, 1, 2)})
    assert SteeringVector.list(tmp_path / "v.gguf") == [2, 3, 4]
    vector = SteeringVector(rng.standard_normal(9), 5)
    for ending in ENDINGS:
        vector.save(tmp_path / f"one.{ending}")
        assert SteeringVector.list(tmp_path / f"one.{ending}") == [5]
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError):
        SteeringVector.list(tmp_path / "bad.gguf")
    with pytest.raises(OSError):
        SteeringVector.list(tmp_path / "none.gguf")


@pytest.mark.parametrize("name", ["{}", "direction.{}"])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_direction_for_each_layer(tmp_path, rng, name, kind, dtype):
    """Directions of repeng in npz and safetensors: N is added to the output of block N."""
    from safetensors.numpy import save_file

    rows = {n: rng.standard_normal(33).astype(dtype) for n in (0, 1, 11)}
    arrays = {name.format(n): row for n, row in rows.items()}
    path = tmp_path / f"v.{kind}"
    np.savez(path, **arrays) if kind == "npz" else save_file(arrays, path)
    assert SteeringVector.list(path) == [1, 2, 12]
    with pytest.raises(ValueError, match=r"\[1, 2, 12\]"):
        SteeringVector.load(path)
    with pytest.raises(ValueError, match=r"layer 11.*\[1, 2, 12\]"):
        SteeringVector.load(path, layer=11)
    for n, row in rows.items():
        v = SteeringVector.load(path, layer=n + 1)
        np.testing.assert_array_equal(v.direction, row.astype(np.float32))
        assert v.layer == n + 1 and kind in v.meta["read_from"]
    np.savez(tmp_path / "matrix.npz", **{"1": np.ones((1, 3))})
    with pytest.raises(ModelError):
        SteeringVector.load(tmp_path / "matrix.npz")
    save_file({"1": np.ones((1, 3), np.float32)}, tmp_path / "matrix.safetensors")
    with pytest.raises(ModelError, match="one row"):
        SteeringVector.load(tmp_path / "matrix.safetensors")
