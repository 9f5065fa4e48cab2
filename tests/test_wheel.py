"""What is published: the wheel and the source distribution, what is in them, and that each works in
an empty environment.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from child import ROOT, tool
from vksteer.study.steps import STEPS

sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "cmake")]
import build_wheel  # noqa: E402

import kernels  # noqa: E402  the build's own reader of kernels.def

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

ROWS = kernels.read(ROOT / "csrc/ops/kernels.def")
SPIRV_MAGIC = struct.pack("<I", 0x07230203)

GENERATE = """
import json, os
import vksteer as vs
with vs.Model.from_pretrained("tiny-llama-chat", device="llvmpipe", progress=False) as model:
    gen = model.generate("Where is the mill?", max_new_tokens=8, progress=False)[0]
    print(json.dumps([os.path.dirname(vs.__file__), gen.tokens.tolist()]))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A folder with both, as `make wheel` makes them, from a copy of what git has or would take."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("published")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    (source / ".tools").symlink_to((ROOT / ".tools").resolve())
    command = [sys.executable, source / "tools/build_wheel.py", out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]  # abi3audit and the sizes, too
    return out


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def test_wheel(published):
    """One abi3 wheel with a manylinux tag, the SPIR-V inside, small."""
    wheel = only(published, "*.whl")
    assert re.fullmatch(r"vksteer-[\w.]+-cp311-abi3-manylinux_2_\d+_\w+\.whl", wheel.name)
    assert wheel.stat().st_size <= 10_000_000
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        assert [n for n in names if ".so" in n] == ["vksteer/_engine.abi3.so"]
        assert z.read("vksteer/_engine.abi3.so").count(SPIRV_MAGIC) >= len(ROWS) - 1
        assert not [
            n for n in names if n.startswith("vksteer/") and n.endswith((".c", ".comp", ".h"))
        ]
        assert [n for n in names if n.endswith("licenses/LICENSE")]
        size = sum(i.compress_size for i in z.infolist() if "/models/" not in i.filename)
    assert size < 3e6


def test_source_distribution(published):
    """Every file of the build and of the package, but published studies, which are megabytes, and
    nothing that was built.
    """
    with tarfile.open(only(published, "*.tar.gz")) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    command = ["git", "ls-files", "csrc", "shaders", "cmake", "python", "docs"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {"CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml", "setup.py"}
    studies = "docs/results/studies/"
    files = {name for name in tracked.splitlines() if (ROOT / name).is_file()}
    files = {name for name in files if not name.startswith(studies)}
    assert len(files) > 100
    assert not (files | top) - names and not [n for n in names if n.startswith(studies)]
    assert not [n for n in names if n.endswith((".so", ".pyc", ".spv"))]


@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"], ids=["wheel", "source distribution"])
def test_works_in_an_empty_environment(published, pattern, tmp_path):
    """Installed by pip, which builds the source distribution in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    environment = build_wheel.build_environment() | {"VIRTUAL_ENV": str(tmp_path / "venv")}
    environment.pop("PYTHONPATH", None)
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, only(published, pattern)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    driver = {"VK_DRIVER_FILES": tool("lavapipe_icd"), "VK_ICD_FILENAMES": tool("lavapipe_icd")}
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VK", "PYTHON"))}
    alone = clean | driver | {"PATH": str(python.parent)}  # no compiler, no other tool
    options = {"env": alone, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([python, "-c", GENERATE], check=False, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    where, tokens = json.loads(done.stdout)
    assert Path(where).is_relative_to(tmp_path) and len(tokens) == 8
    command = [python.parent / "vksteer", "study", "--model", "tiny-llama-chat", "--out", "study"]
    command += ["--size", "tiny", "--device", "llvmpipe"]
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((tmp_path / "study/results.json").read_text())
    assert set(results["steps"]) == set(STEPS) and len(results["claims"]) == 5
    report = (tmp_path / "study/report.html").read_text()
    assert 'id="circuit-data"' in report and results["claims"][0]["verdict"] in report
