"""Python in a child process with its own environment, for tests that change the driver, fork, are
interrupted or end the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tools() -> dict:
    """Paths of drivers, layers and compilers, as tools/write_env.py wrote them."""
    return json.loads((ROOT / ".tools/env.json").read_text())


def tool(key) -> str:
    """The path of one of them. `tools/setup.sh test` provides all, so a missing one is a failure
    and not a reason to skip.
    """
    path = tools().get(key)
    assert path and os.path.exists(path), (
        f"{key} of .tools/env.json is {path!r}, which is not there: run tools/setup.sh test"
    )
    return path


#: What a child runs first. The folders of its models are on its command line.
PREAMBLE = """
import os, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np
import vksteer as vs

sys.path.append("tests")
from clocks import assert_within_a_second, clocks

def load(i=1, **options):
    options = {"progress": False, "dtype": "float32", **options}
    return vs.Model.from_pretrained(sys.argv[i], **options)

def rows_of(model, *lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, model.config.d_vocab, n).tolist() for n in lengths]

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
"""


def child(
    code,
    *arguments,
    timeout=120,
    preamble=PREAMBLE,
    python=(),
    executable=sys.executable,
    **environment,
):
    """Runs `code` with the arguments in sys.argv[1:]; returns subprocess.CompletedProcess with
    text.

    executable: another Python with the same packages, such as the newer Mesa's.
    environment: variables to set; None removes one. A software driver starts its own number of
    threads, also where conftest.py gave the processes of the test run fewer: workgroups of a kernel
    run at the same time in children, and nowhere else on a machine of two processors.
    """
    dropped = ("VKSTEER_DEVICE", "VK_", "LP_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    env["PYTHONFAULTHANDLER"] = "1"
    inherited = json.loads(os.environ.get("CHILD_ENVIRONMENT", "{}"))  # set by test_sanitizers.py
    for name, value in (inherited | environment).items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = str(value)
    return subprocess.run(
        [executable, *python, "-c", preamble + code, *map(str, arguments)],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        check=False,
    )


def quiet(done) -> str:
    """The output of a child that must have exited with 0 and written nothing to stderr."""
    assert done.returncode == 0 and not done.stderr, (
        f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout
