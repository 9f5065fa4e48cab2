"""Builds what is published: a source distribution, and from it a wheel with a manylinux tag.

    build_wheel.py FOLDER

The source distribution is built first and the wheel from its contents alone, so that a file that is
missing in it stops here. The wheel serves every CPython from 3.11 on (the stable ABI, checked by
abi3audit); auditwheel gives it the oldest manylinux tag that its C library symbols allow.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".tools"
MOST_BYTES = 10_000_000


def vulkan_arguments() -> list[str]:
    """CMake's arguments for what tools/setup.sh unpacked; CMake finds what the system has."""
    include, bin = TOOLS / "vulkan/usr/include", TOOLS / "bin"
    places = {
        "VULKAN_INCLUDE": (include, include / "vulkan/vulkan_core.h"),
        "VOLK_DIR": (include, include / "volk.c"),
        "GLSLC": (bin / "glslc", bin / "glslc"),
        "GLSLC_NEXT": (bin / "glslc-next", bin / "glslc-next"),
    }
    return [f"-D{name}={value}" for name, (value, file) in places.items() if file.exists()]


def build_environment() -> dict[str, str]:
    """CMAKE_ARGS reaches CMake through pip and scikit-build-core, wherever the source lies."""
    given = shlex.split(os.environ.get("CMAKE_ARGS", ""))
    path = os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()])  # for ninja
    return os.environ | {"PATH": path, "CMAKE_ARGS": shlex.join([*vulkan_arguments(), *given])}


def run(*command, **options) -> None:
    subprocess.run([sys.executable, *map(str, command)], check=True, **options)


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def build_source_distribution(out: Path) -> Path:
    code = "from setuptools import build_meta as b; import sys; b.build_sdist(sys.argv[1])"
    environment = build_environment() | {"VKSTEER_BUILD_ENGINE": "0"}
    run("-c", code, out, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    return only(out, "vksteer-*.tar.gz")


def build_wheel(source_distribution: Path, out: Path) -> Path:
    """The repaired wheel in `out`."""
    environment = build_environment()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with tarfile.open(source_distribution) as archive:
            archive.extractall(work / "source", filter="data")
        options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check")
        source = only(work / "source", "vksteer-*")
        run("-m", "pip", "wheel", "-q", *options, "-w", work / "built", source, env=environment)
        built = only(work / "built", "vksteer-*.whl")
        run("-m", "auditwheel", "repair", "-w", out, built, env=environment)
    return only(out, "vksteer-*.whl")


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    source_distribution = build_source_distribution(out)
    wheel = build_wheel(source_distribution, out)
    run("-m", "abi3audit", "--strict", wheel)
    for path in (source_distribution, wheel):
        size = path.stat().st_size
        print(f"{path}: {size / 1e6:.1f} MB")
        if size > MOST_BYTES:
            sys.exit(f"{path.name} has {size} bytes; at most {MOST_BYTES} are allowed")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]).resolve())
