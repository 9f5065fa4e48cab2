"""Shared fixtures: random models of every family (built once per run of pytest, for all its
processes), their float64 oracles, the same models in the engine, and the bench for single ops.

Tests marked `long` run only with `--long` or an explicit `-m long`. torch is imported only by
tests that need the oracle.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("op_bench")

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from file_lock import file_lock  # noqa: E402  found through sys.path above


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", default=False, help="also run tests marked long"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "long: takes minutes or needs downloaded models; run with --long"
    )
    # A shell that starts a command in the background may have it ignore SIGINT. Tests send it, to
    # themselves and to their children, which inherit what is ignored.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(config, "workerinput"):
        share_processors(config.workerinput["workercount"])


def share_processors(processes):
    """Divides the processors among the processes of the test run: lavapipe and PyTorch start one
    thread for each processor otherwise, and threads that wait for each other lose their turn.

    With one processor each, lavapipe works on the thread that submits (LP_NUM_THREADS=0), which
    takes 15 % less processor time than one thread beside it.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    os.environ.setdefault("LP_NUM_THREADS", str(threads if threads > 1 else 0))
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long") or "long" in (config.option.markexpr or ""):
        return
    kept = [item for item in items if "long" not in item.keywords]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if "long" in item.keywords])
        items[:] = kept


MODELS = 10  # that a process of the run keeps open


class Zoo:
    """Random models by family name. Folders and oracles are made on first use and kept until the
    end of the run, as are the last engine models. The processes of a run share folders, which are
    made under a lock.
    """

    def __init__(self, root):
        self.root = Path(root)
        self._references, self._engines = {}, {}

    def lock(self):
        return file_lock(self.root / ".lock")

    def folder(self, name, style="new"):
        """style: "new" (as transformers writes it), "released" (rope_theta at top level, no
        layer_types), "chat" (with a tokenizer).
        """
        from oracle import families

        to = self.root / f"{name}-{style}"
        with self.lock():
            if not (to / "model.safetensors").exists():
                if style == "new":
                    families.build(name, to)
                elif style == "released":
                    families.released_style(self.folder(name), to)
                else:
                    families.with_config(self.folder(name), to)
                    families.add_tokenizer(to)
        return to

    def variant(self, name, tag, **config):
        """A copy of the family's folder with other values in its config.json."""
        from oracle import families

        to = self.root / f"{name}-{tag}"
        with self.lock():
            if not to.exists():
                families.with_config(self.folder(name), to, **config)
        return to

    def reference(self, name):
        from oracle.reference import Reference

        if name not in self._references:
            self._references[name] = Reference(self.folder(name))
        return self._references[name]

    def engine(self, name, style="new", dtype="float32"):
        import vksteer

        key = name, style, dtype
        if key not in self._engines:
            # Each takes some 100 MB. The one used longest ago is forgotten, not closed: a test may
            # still hold it.
            while len(self._engines) >= MODELS:
                del self._engines[next(iter(self._engines))]
                gc.collect()
            self._engines[key] = vksteer.Model.from_pretrained(
                str(self.folder(name, style)), dtype=dtype, progress=False
            )
        self._engines[key] = self._engines.pop(key)  # the newest comes last
        return self._engines[key]

    def close(self):
        for model in self._engines.values():
            model.close()
        self._engines.clear()


@pytest.fixture(scope="session")
def zoo(request, tmp_path_factory):
    # Each process of pytest-xdist has its own folder within that of the run.
    base = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):
        base = base.parent
    zoo = Zoo(base / "zoo")
    zoo.root.mkdir(exist_ok=True)
    yield zoo
    zoo.close()


@pytest.fixture(scope="module")
def on():
    """The bench of the default device, on which single ops run (op_bench.py)."""
    import op_bench

    bench, _ = op_bench.verify.bench(None)
    yield bench
    for op, (error, label) in sorted(op_bench.WORST.items()):  # shown with pytest -s
        print(f"\n{op}: {error:.1e} at {label}", end="")


@pytest.fixture(scope="module")
def families(on):
    """The numbers of the kernel families that this device runs."""
    return [number for number, _ in on.families()]


@pytest.fixture(scope="session")
def llama(zoo):
    """The folder of a small random Llama, for child processes that open a model of their own."""
    return zoo.folder("llama2")


@pytest.fixture
def fusing():
    """For tests of kernels that normalise their own input: the order of their sums is norm.comp's
    only where a workgroup is one subgroup.
    """
    from vksteer.runtime.device import choose

    if choose(None).type != "software":
        pytest.skip("only software devices fuse: a GPU's workgroup has more than one subgroup")


@pytest.fixture
def rng(request):
    """A generator seeded by the name of the test, so that it does not depend on which other tests
    run.
    """
    return np.random.default_rng(sum(i * b for i, b in enumerate(request.node.name.encode(), 1)))
