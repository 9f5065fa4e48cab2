"""Shared fixtures: random models of every family (built once per session), their float64 oracles,
and the engine's models of them.

Tests marked `long` run only with `--long` (or an explicit `-m long`). torch is imported only by
tests that need the oracle.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("op_bench")

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption(
        "--long", action="store_true", default=False, help="also run tests marked long"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "long: takes minutes or needs downloaded models; run with --long"
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--long") or "long" in (config.option.markexpr or ""):
        return
    kept = [item for item in items if "long" not in item.keywords]
    if len(kept) != len(items):
        config.hook.pytest_deselected(items=[item for item in items if "long" in item.keywords])
        items[:] = kept


class Zoo:
    """Random models by family name; folders, oracles and engine models are made on first use and
    kept for the session.
    """

    def __init__(self, root):
        self.root = Path(root)
        self._references, self._engines = {}, {}

    def folder(self, name, style="new"):
        """style: "new" (as transformers writes it), "released" (rope_theta at top level, no
        layer_types), "chat" (with a tokenizer).
        """
        from oracle import families

        to = self.root / f"{name}-{style}"
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
            self._engines[key] = vksteer.Model.from_pretrained(
                str(self.folder(name, style)), dtype=dtype, progress=False
            )
        return self._engines[key]

    def close(self):
        for model in self._engines.values():
            model.close()
        self._engines.clear()


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    zoo = Zoo(tmp_path_factory.mktemp("zoo"))
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
    """A generator whose seed is the test's own name: independent of order and selection."""
    return np.random.default_rng(sum(i * b for i, b in enumerate(request.node.name.encode(), 1)))
