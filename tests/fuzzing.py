"""Inputs for fuzzing the readers of model files: good files from `fuzz_seeds/`, with a few changes
drawn by hypothesis. A reader accepts a file or raises what it documents; anything else is a defect.

`tools/fuzz.py` runs a reader for minutes, tests/test_fuzz.py for seconds.
"""

from __future__ import annotations

import base64
import copy
import json
import signal
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from model_writers import gguf_value, write_gguf
from vksteer.errors import ModelError
from vksteer.loading.config import Config
from vksteer.loading.model_files import open_model
from vksteer.loading.tensor_names import engine_tensors
from vksteer.loading.tokenizer import Tokenizer

SEEDS = Path(__file__).with_name("fuzz_seeds")
FOUND = SEEDS / "found"  # inputs that once raised something else
SECONDS = 20  # no small file may take longer; the loader's own limits are lower

#: A case is a folder's files by name.
Case = dict[str, bytes]


class Reader(NamedTuple):
    """What is fuzzed: how cases are drawn, and what reads a folder with one."""

    cases: Callable[[], st.SearchStrategy[Case]]
    read: Callable[[Path], None]


@cache
def seeds(name):
    """The good files of a reader; not to be changed."""
    if name == "config":  # the published ones and those of the small models
        configs = {**PUBLISHED, **seeds("safetensors")}
        return {model: entry["config"] for model, entry in configs.items()}
    return json.loads((SEEDS / f"{name}.json").read_text())


# -- changes ---------------------------------------------------------------------------------------

_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 65536, 2**31, 2**32, 2**53, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, -0.0, 0.5, 1.5, -1.0, 1e-320, 1e-30, 1e30, 1e308, float("inf"), float("nan")),
)
_OTHERS = (
    *(None, True, False, "", "0", "8", "full_attention", "yarn", "longrope", "silu", "x" * 5000),
    *(
        "\u0000",
        "\ud800",
        "\U0001f600",
        [],
        {},
        [[]],
        [None],
        [1, 2, 3],
        ["a", "b"],
        [{}],
        {"a": 1},
    ),
    *([0] * 3000, {"": ""}, {"rope_type": "yarn"}, {"rope_type": "llama3", "factor": 8.0}),
)
ODD = st.one_of(
    st.sampled_from(_NUMBERS),
    st.sampled_from(_OTHERS).map(copy.deepcopy),  # they are changed further
    st.integers(-4, 40),
    st.floats(width=32),
    st.text(max_size=8),
)
PUBLISHED = json.loads(Path(__file__).with_name("published_configs.json").read_text())
KEYS = sorted({key for entry in PUBLISHED.values() for key in entry["config"]})


def places(value, here=()):
    """The paths of everything inside a JSON value, ten levels deep."""
    if len(here) == 10:
        return
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value[:40]))
    else:
        return
    for key, child in children:
        yield (*here, key)
        yield from places(child, (*here, key))


def at(value, path):
    for key in path:
        value = value[key]
    return value


@st.composite
def changed(draw, value, most=3, keys=KEYS):
    """A JSON value with one to `most` changes."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        known = list(places(value))
        if not known:
            return value
        path = draw(st.sampled_from(known))
        parent, key = at(value, path[:-1]), path[-1]
        what = draw(st.integers(0, 9))
        if what < 5:
            parent[key] = draw(ODD)
        elif what == 5:
            del parent[key]
        elif what == 6 and isinstance(parent, dict):
            parent[draw(st.sampled_from(keys)) if keys else draw(st.text(max_size=9))] = draw(ODD)
        elif what == 7 and isinstance(parent, dict):
            parent[draw(st.text(max_size=12))] = parent.pop(key)
        elif what == 8:
            parent[key] = copy.deepcopy(at(value, draw(st.sampled_from(known))))
        elif type(parent[key]) in (int, float) and abs(parent[key]) < 1e300:
            parent[key] = parent[key] * draw(st.sampled_from((-1, 2, 0.5, 1.1))) + draw(
                st.sampled_from((0, 1, -1))
            )
        else:
            parent[key] = [parent[key]]
    return value


@st.composite
def torn(draw, data, head):
    """Bytes with a few replaced, mostly among the first `head`, or the end missing."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        near = min(head, len(data)) - 1
        place = draw(st.one_of(st.integers(0, near), st.integers(0, len(data) - 1)))
        what = draw(st.integers(0, 5))
        if what < 2:
            data[place] = draw(st.integers(0, 255))
        elif what < 4:
            word = draw(st.sampled_from((0, 1, 255, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)))
            data[place : place + 8] = struct.pack("<Q", word)
        elif what == 4:
            del data[place : place + draw(st.integers(1, 64))]
        else:
            del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


def as_json(value):
    """Text of a JSON file; surrogates are escaped."""
    return json.dumps(value).encode()


# -- config.json -----------------------------------------------------------------------------------


@st.composite
def config_cases(draw):
    config = draw(st.sampled_from(list(seeds("config").values())))
    text = as_json(draw(changed(config)))
    if draw(st.integers(0, 9)) == 0:
        text = draw(torn(text, len(text)))
    return {"config.json": text}


def read_config(folder):
    config = Config.from_pretrained(folder)
    assert config == Config.from_json(folder / "config.json")
    assert len(config.window) == len(config.rope_table) == config.n_layers
    assert all(1 <= size < 2**40 for _, shape in engine_tensors(config) for size in shape)
    for table in (*config.rope, *config.rope_long):
        assert np.isfinite(table.inv_freq).all() and np.isfinite(table.attention_factor)


# -- GGUF ------------------------------------------------------------------------------------------


@st.composite
def gguf_cases(draw):
    model = draw(st.sampled_from(list(seeds("gguf").values())))
    metadata, tensors = model["metadata"], model["tensors"]
    keys = sorted({k.partition(".")[2] for k in metadata})
    if draw(st.booleans()):
        metadata = draw(changed(metadata, keys=keys))
    if draw(st.booleans()):
        tensors = draw(changed(tensors, keys=sorted(tensors)))
    written = [(str(name), *stored(shape)) for name, shape in tensors.items()]
    data = gguf_bytes({str(k): v for k, v in metadata.items()}, written)
    if draw(st.booleans()):
        data = draw(torn(data, 8000))
    return {"m.gguf": data}


def stored(shape):
    """(type, shape, bytes) of a tensor of ones; what is no shape becomes one."""
    shape = shape if isinstance(shape, list) else [shape]
    shape = [n if isinstance(n, int) and 0 <= n < 2**64 else 1 for n in shape[:6]]
    count = int(np.prod(np.array(shape, dtype=object))) if shape else 1
    return 0, shape, np.ones(min(count, 1 << 15), np.float32).tobytes()


def gguf_bytes(metadata, tensors):
    """The bytes of a GGUF file; metadata that the format cannot hold are left out."""
    kept = {}
    for key, value in metadata.items():
        try:
            gguf_value(value)
            gguf_value(key)
        except (struct.error, TypeError, OverflowError, UnicodeEncodeError, IndexError):
            continue
        kept[key] = value
    tensors = [t for t in tensors if encodable(t[0])]
    with tempfile.TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "m.gguf", kept, tensors).read_bytes()


def encodable(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_gguf(folder):
    files = open_model(folder / "m.gguf")
    try:
        read_arrays(files)
        use_tokenizer(files.tokenizer())
    finally:
        files.close()


def read_arrays(files):
    """Every array that is not larger than a small model's."""
    for entry in files.tensors:
        if entry.nbytes < 1 << 20:
            assert entry.array().shape == entry.shape


def use_tokenizer(tokenizer):
    if tokenizer is None:
        return
    try:
        ids = tokenizer.encode("Hello <|user|> wörld 12\n", add_bos=False)
        tokenizer.decode(ids, skip_special=True)
        assert all(isinstance(i, int) for i in (*tokenizer.eos_ids, *tokenizer.special_ids))
        tokenizer.chat_tokens("Hi")
    except ValueError:  # of a template or a doubled token: documented
        pass


# -- safetensors -----------------------------------------------------------------------------------


def header_of(tensors):
    """(header of a safetensors file with these tensors, bytes of data)."""
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = int(np.prod(shape)) * {"F32": 4, "F16": 2, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def safetensors_bytes(header, size):
    text = as_json(header)
    return struct.pack("<Q", len(text)) + text + b"\0" * size


@st.composite
def safetensors_cases(draw):
    model = draw(st.sampled_from(list(seeds("safetensors").values())))
    config, (header, size) = model["config"], header_of(model["tensors"])
    files = {}
    what = draw(st.integers(0, 3))
    if what == 0:
        config = draw(changed(config))
    elif what in (1, 2):
        header = draw(changed(header, keys=sorted(header)))
    else:  # in two parts
        index = {"metadata": {}, "weight_map": dict.fromkeys(header, "model.safetensors")}
        index = draw(changed(index, keys=["weight_map", "metadata", "total_size"]))
        files["model.safetensors.index.json"] = as_json(index)
    data = safetensors_bytes(header, size)
    if draw(st.integers(0, 3)) == 0:
        data = draw(torn(data, len(data) - size))
    return {"config.json": as_json(config), "model.safetensors": data, **files}


def read_safetensors(folder):
    read_arrays(open_model(folder, dtype="float32"))


# -- tokenizer files -------------------------------------------------------------------------------


@st.composite
def tokenizer_cases(draw):
    texts = dict(draw(st.sampled_from(list(seeds("tokenizer").values()))))
    files = {name: text.encode() for name, text in texts.items()}
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        if name.endswith(".json") and draw(st.integers(0, 5)):
            keys = ["bos_token", "eos_token", "add_bos_token", "chat_template", "added_tokens"]
            files[name] = as_json(draw(changed(json.loads(texts[name]), keys=keys)))
        else:
            files[name] = draw(torn(files[name], len(files[name])))
    return files


def read_tokenizer(folder):
    use_tokenizer(Tokenizer.from_folder(folder, eos_ids=(1,), bos_id=2))


def unchanged(name):
    """The good files of a reader as cases."""
    for seed in seeds(name).values():
        if name == "config":
            yield {"config.json": as_json(seed)}
        elif name == "gguf":
            tensors = [(tensor, *stored(shape)) for tensor, shape in seed["tensors"].items()]
            yield {"m.gguf": gguf_bytes(seed["metadata"], tensors)}
        elif name == "safetensors":
            data = safetensors_bytes(*header_of(seed["tensors"]))
            yield {"config.json": as_json(seed["config"]), "model.safetensors": data}
        else:
            yield {file: text.encode() for file, text in seed.items()}


READERS = {
    "config": Reader(config_cases, read_config),
    "gguf": Reader(gguf_cases, read_gguf),
    "safetensors": Reader(safetensors_cases, read_safetensors),
    "tokenizer": Reader(tokenizer_cases, read_tokenizer),
}

# -- running ---------------------------------------------------------------------------------------


@contextmanager
def at_most(seconds):
    """Raises TimeoutError in a call that takes longer."""

    def late(number, frame):
        raise TimeoutError(f"a small file took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(name: str, case: Case, folder: Path) -> bool:
    """Writes a case's files into an empty folder and reads them; whether they were accepted. Every
    exception but ModelError passes through, those of Rust's panics too.
    """
    for old in folder.iterdir():
        old.unlink()
    for file, data in case.items():
        (folder / file).write_bytes(data)
    with warnings.catch_warnings(), at_most(SECONDS):
        warnings.simplefilter("ignore")
        try:
            READERS[name].read(folder)
        except ModelError:
            return False
    return True


def keep(name: str, case: Case) -> Path:
    """Keeps a case that raised something else, to be tried in every test run."""
    FOUND.mkdir(exist_ok=True)
    files = {f: base64.b64encode(zlib.compress(data, 9)).decode() for f, data in case.items()}
    text = json.dumps({"reader": name, "files": files}, indent=1)
    number = 1 + len(list(FOUND.glob(f"{name}-*.json")))
    path = FOUND / f"{name}-{number:03}.json"
    path.write_text(text + "\n")
    return path


def kept() -> list[tuple[str, str, Case]]:
    """(file name, reader, case) of all kept cases."""
    result = []
    for path in sorted(FOUND.glob("*.json")):
        content = json.loads(path.read_text())
        files = {f: zlib.decompress(base64.b64decode(t)) for f, t in content["files"].items()}
        result.append((path.name, content["reader"], files))
    return result
