"""The C engine under AddressSanitizer and UndefinedBehaviorSanitizer: the driver cases, and what
the robustness tests do to it.

Built apart, into build/sanitize; nothing in python/vksteer changes. Leaks are counted by
test_leaks.py instead (Python itself is full of blocks that live until the end).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from child import ROOT, child, quiet
from file_lock import file_lock
from test_drivers import folders  # noqa: F401  a fixture

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> dict:
    """Environment in which `import vksteer` gives the sanitized engine."""
    library = subprocess.run(
        ["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(library):
        macros = subprocess.run(
            ["cc", "-dM", "-E", "-x", "c", "/dev/null"], capture_output=True, text=True, check=True
        ).stdout
        assert "__clang__" in macros, (
            "this gcc has no libasan: run tools/setup.sh test, whose gcc brings it, or install the"
            " distribution's libasan"
        )
        pytest.skip(
            "cc is clang, whose sanitizers are no library to be loaded before Python: this takes"
            " gcc's"
        )
    bin, build = Path(sys.executable).parent, ROOT / "build/sanitize"
    with file_lock(build.with_suffix(".lock")):
        subprocess.run(
            [
                bin / "cmake",
                "-S",
                ROOT,
                "-B",
                build,
                "-G",
                "Ninja",
                f"-DCMAKE_MAKE_PROGRAM={bin / 'ninja'}",
                f"-DPython_EXECUTABLE={sys.executable}",
                "-DVKSTEER_SANITIZE=address,undefined",
            ],
            check=True,
            capture_output=True,
        )
        subprocess.run([bin / "cmake", "--build", build, "-j2"], check=True, capture_output=True)
    package = tmp_path_factory.mktemp("sanitized") / "vksteer"
    shutil.copytree(
        ROOT / "python/vksteer", package, ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    shutil.copy(build / "_engine.abi3.so", package)
    return {
        "PYTHONPATH": str(package.parent),
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
    }


def test_the_sanitizer_is_awake(sanitized):
    done = child(
        "import vksteer._engine as e; print(e.__file__); import ctypes;"
        " ctypes.string_at(ctypes.create_string_buffer(8), 4096)",
        **sanitized,
    )
    assert (
        "AddressSanitizer" in done.stderr
        and done.returncode == 99
        and sanitized["PYTHONPATH"] in done.stdout
    ), done.stderr[-2000:]


def test_driver_cases(sanitized, folders):
    quiet(
        child(
            "import sys; sys.path.insert(0, 'tests'); import driver_cases;"
            " driver_cases.main(sys.argv[1:])",
            *folders,
            preamble="",
            timeout=900,
            **sanitized,
        )
    )


@pytest.mark.parametrize(
    "file, chosen",
    [
        # Not a fork beside a running thread: the sanitizer's own allocator may be locked there,
        # which the C library's sees to.
        ("test_robustness_driver.py", ""),
        (
            "test_robustness_processes.py",
            (
                "(fork and not busy) or bits or closing or interpreter or outlive"
                " or interrupting or handler"
            ),
        ),
        ("test_model_files.py", ""),
        ("test_gguf_files.py", ""),
    ],
)
def test_the_suite(sanitized, file, chosen):
    """Children of the robustness tests, or the whole process where no torch is needed, run
    the sanitized engine.
    """
    env = (
        os.environ | {"CHILD_ENVIRONMENT": json.dumps(sanitized)}
        if file.startswith("test_robustness")
        else os.environ | sanitized
    )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "no:cacheprovider",
            "-q",
            "--timeout=900",
            *(["-k", chosen] if chosen else []),
            str(ROOT / "tests" / file),
        ],
        env=env,
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0 and "AddressSanitizer" not in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )[-8000:]
    assert "runtime error" not in done.stdout + done.stderr
