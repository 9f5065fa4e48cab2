"""The hash of a model in the keys of stored work: where models differ, their hashes do."""

from __future__ import annotations

import json
import shutil

import pytest

import vksteer as vs
from vksteer.base.provenance import identity


def opened(folder, **options):
    return vs.Model.from_pretrained(str(folder), progress=False, **options)


@pytest.fixture(scope="module")
def folder(zoo):
    return zoo.folder("llama3")


@pytest.fixture(scope="module")
def own(folder):
    with opened(folder) as model:
        return identity(model), model.fingerprint


def test_a_copy_is_the_same_model(folder, own, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    with opened(tmp_path / "elsewhere") as model:
        assert identity(model) == own[0]


def test_one_weight_that_the_fingerprint_does_not_see(folder, own, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (path,) = (tmp_path / "m").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    name = next(n for n in header if n.endswith("o_proj.weight"))
    content[8 + size + header[name]["data_offsets"][0]] ^= 1  # the last bit of one weight
    path.write_bytes(content)
    with opened(tmp_path / "m") as model:
        assert model.fingerprint == own[1], "else this tests nothing"
        assert identity(model) != own[0]


def test_the_ends_of_texts_and_the_type_of_matrices(folder, own, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m/generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [3, 5]}))
    with opened(tmp_path / "m") as model:
        assert 5 in model.eos_ids and identity(model) != own[0]
    with opened(folder, dtype="bfloat16") as model:
        assert identity(model) != own[0]


def test_files_that_are_gone(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    with opened(tmp_path / "m") as model:
        (path,) = (tmp_path / "m").glob("*.safetensors")
        path.unlink()
        with pytest.raises(vs.ModelError, match=r"from which .* was loaded: No such file"):
            identity(model)
