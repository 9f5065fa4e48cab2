"""One session on a real GPU: checks and comparisons with PyTorch on the same card, in under eight
minutes.

    gpu.py [--out FILE.json] [--shapes smollm2 llama-3b llama-8b] [--only PART ...] [--device D]
    gpu.py --tiny                the same with tiny sizes on any device, PyTorch on the CPU

Parts, in this order: `vksteer verify`; for each shape the time of loading, forward passes,
decoding, frozen decoding, attribution, the logit lens and bare products; then the tests of the
engine. Each part has a time budget and is cut when it is over, and all of them share --total
seconds. The file is written after every figure, so that a cut loses nothing.

Models have random weights in the shapes of real ones, so nothing is downloaded. Both sides hold the
same bfloat16 weights. The engine is compared with PyTorch in float32 on the same weights (TF32 off)
and in bfloat16. Results are compared before they are timed. A ratio is the peer's time divided by
ours. Needs a built vksteer, PyTorch with CUDA or ROCm, transformers, and for the tests pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import gpu_rows
from run import commit, machine
from shapes import SHAPES

ROOT = Path(__file__).resolve().parent.parent
#: Seconds of the parts that are programs of their own, and of making a model on both sides.
VERIFY, TESTS, MAKING = 45, 150, 45
#: On a CPU that may be loaded, --tiny multiplies every budget by this.
PATIENCE = 4
#: The tests of the engine that need no other driver, model or tool.
SUITE = (
    "test_ops.py",
    "test_ops_linear.py",
    "test_ops_attention.py",
    "test_backward_ops.py",
    "test_bits.py",
    "test_forward_parity.py",
    "test_gradients.py",
    "test_generate.py",
    "test_freezing.py",
    "test_edits.py",
)
TINY_SUITE = ("test_lens_ops.py",)


class OutOfTime(BaseException):
    """A part's budget is over. No handler for errors catches it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the body when the seconds are over."""

    def end(signum, frame):
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Session:
    """What was found so far, in a file that is written anew after every figure."""

    def __init__(self, out: Path, total: float, head: dict, patience: float = 1):
        """patience: a factor of every budget."""
        self.out, self.total, self.start = out, total, time.perf_counter()
        self.patience = patience
        self.content = head | {"total_s": total, "parts": [], "rows": []}

    def left(self) -> float:
        return self.total - (time.perf_counter() - self.start)

    def write(self) -> None:
        self.content["seconds"] = round(time.perf_counter() - self.start, 1)
        new = self.out.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self.out)

    def part(self, name: str, budget: float, rows: Callable[[dict], Iterable[dict]]) -> bool:
        """Runs one part within its budget and what is left of the total; whether it was done.
        `rows` is given the part's entry, to which it may add.
        """
        budget = min(budget * self.patience, self.left())
        entry = {"part": name, "budget_s": round(budget, 1), "state": "begun"}
        self.content["parts"].append(entry)
        start = time.perf_counter()
        try:
            if budget <= 0:
                raise OutOfTime
            with limited(budget):
                for r in rows(entry):
                    self.content["rows"].append(r)
                    show(r)
                    self.write()
            entry["state"] = "done"
        except OutOfTime:
            entry["state"] = "cut"
        except Exception as error:  # the other parts still run
            entry |= {"state": "failed", "error": f"{type(error).__name__}: {error}"}
        entry["seconds"] = round(time.perf_counter() - start, 1)
        said = entry.get("error") or entry.get("said") or ""
        print(f"{name}: {entry['state']}, {entry['seconds']} s  {said}", flush=True)
        self.write()
        return entry["state"] == "done"


def show(r: dict) -> None:
    extra = ", ".join(f"{k} {v:.3g}" for k, v in r.items() if isinstance(v, float) and k != "value")
    print(f"  {r['what']}: {r['value']:.3g} {r['unit']}  ({extra})", flush=True)


# -- parts that are programs of their own ----------------------------------------------------------


def program(*words) -> Iterator[str]:
    """The lines of a Python program's output, as they come; it is ended with the generator."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            yield from process.stdout
            process.wait()
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def verify(device: str | None) -> Callable[[dict], Iterator[dict]]:
    def run(entry: dict) -> Iterator[dict]:
        text = "".join(
            program("-m", "vksteer", "verify", "--json", *(["--device", device] if device else []))
        )
        found = json.loads(text[text.index("{") :])
        wrong = [op for op in found["ops"] if not op["ok"]]
        entry |= {
            "device": found["device"],
            "wrong": wrong,
            "said": f"{len(found['ops'])} ops, {len(wrong)} wrong",
        }
        if wrong:
            raise RuntimeError(f"wrong: {wrong}")
        yield from ()

    return run


def tests(files: Iterable[str]) -> Callable[[dict], Iterator[dict]]:
    """The tests of these files; what has run is counted also when it is cut."""

    def run(entry: dict) -> Iterator[dict]:
        several = importlib.util.find_spec("xdist") and (os.cpu_count() or 1) > 2
        words = ["-m", "pytest", "-p", "no:cacheprovider", "-v", "-rfE", "-W", "ignore"]
        words += ["-n", "8"] if several else []
        entry["outcomes"], entry["wrong"] = counts, wrong = {}, []
        last = ""
        for line in program(*words, *(f"tests/{name}" for name in files)):
            last = line.strip() or last
            found = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
            # The summary at the end begins with the outcome.
            if found and "tests/" in line and not line.startswith(("FAILED", "ERROR")):
                counts[found[1]] = counts.get(found[1], 0) + 1
                if found[1] in ("FAILED", "ERROR"):
                    wrong.append(line.strip())
            entry["said"] = ", ".join(f"{n} {name.lower()}" for name, n in counts.items())
        if not counts.get("PASSED") or wrong:
            raise RuntimeError(f"{len(wrong)} failed; the last line: {last}")
        yield from ()

    return run


# -- order -----------------------------------------------------------------------------------------


def shape_parts(session: Session, shape: str, sizes, on: str, arguments) -> None:
    """All comparisons on one shape. The model is made within a budget of its own."""

    def named(compare, p):
        return lambda entry: (r | {"what": f"{shape}: {r['what']}"} for r in compare(p))

    with contextlib.ExitStack() as stack:
        held = []

        def making(entry: dict) -> Iterator[dict]:
            made = gpu_rows.pair(shape, sizes, on, arguments.device)
            held.append(stack.enter_context(made))
            yield from ()

        if session.part(f"{shape}: making", MAKING, making):
            for name, (compare, budget) in gpu_rows.COMPARISONS.items():
                if not arguments.only or name in arguments.only:
                    session.part(f"{shape}: {name}", budget, named(compare, held[0]))
        held.clear()
    gc.collect()
    if on == "cuda":
        import torch

        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parts = ("verify", *gpu_rows.COMPARISONS, "tests")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", choices=SHAPES)
    parser.add_argument("--only", nargs="+", choices=parts, help="parts to run (default: all)")
    parser.add_argument("--device", help="the engine's device")
    parser.add_argument("--rounds", type=int, help="turns of each comparison (default: 3)")
    parser.add_argument("--total", type=float, default=465, help="seconds for all parts")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu.json")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, PyTorch on the CPU")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    import torch

    tiny, sizes = arguments.tiny, gpu_rows.TINY if arguments.tiny else gpu_rows.Sizes()
    if arguments.rounds:
        sizes = dataclasses.replace(sizes, rounds=arguments.rounds)
    on = "cpu" if tiny else "cuda"
    if not tiny and not torch.cuda.is_available():
        print("PyTorch finds no GPU; --tiny tries the script without one", file=sys.stderr)
        return 2
    where = machine(arguments.device)
    where["peer_device"] = "cpu" if tiny else torch.cuda.get_device_name()
    print(
        f"{where['device']['name']} ({where['device']['driver']}); PyTorch {torch.__version__} on"
        f" {where['peer_device']}",
        flush=True,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    head = {"machine": where, "commit": commit(), "rounds": sizes.rounds, "tiny": tiny}
    session = Session(arguments.out, arguments.total, head, PATIENCE if tiny else 1)
    asked = lambda part: not arguments.only or part in arguments.only
    if asked("verify"):
        session.part("verify", VERIFY, verify(arguments.device))
    shapes = arguments.shapes
    if shapes is None:
        shapes = ["tiny"] if tiny else ["smollm2", "llama-3b", "llama-8b"]
    if any(map(asked, gpu_rows.COMPARISONS)):
        for shape in shapes:
            shape_parts(session, shape, sizes, on, arguments)
    if asked("tests"):
        session.part("tests", TESTS, tests(TINY_SUITE if tiny else SUITE))
    states = [part["state"] for part in session.content["parts"]]
    counted = ", ".join(f"{states.count(s)} {s}" for s in sorted(set(states)))
    seconds, figures = session.content["seconds"], len(session.content["rows"])
    print(f"{seconds} s, {figures} figures in {arguments.out}; parts: {counted}")
    return 1 if "failed" in states else 0


if __name__ == "__main__":
    sys.exit(main())
