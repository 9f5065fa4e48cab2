"""`make bench`: the engine beside PyTorch and llama.cpp, as JSON in
benchmarks/results/<machine>-<date>.json.

    run.py [--rounds N] [--only smollm2|processes|training|attribution|ov|tiny|qwen ...] [--device
    D] [--name NAME] [--no-write]

A ratio is the peer's time divided by ours; both sides take turns in one process. Figures are
medians. See table.py for the README's table.
"""

from __future__ import annotations

import os
import sys

# Some machines set these because older OpenBLAS builds fail there. They slow a current NumPy, which
# is one of the peers, so they are removed before NumPy is imported.
REMOVED = {
    name: value
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    if (value := os.environ.pop(name, None)) is not None
}

import argparse  # noqa: E402  the environment first
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import re  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
BUSY = 0.4  # cores of other load above which figures do not count
#: What runs by default. "qwen" takes long and runs only on request.
GROUPS = ("processes", "smollm2", "training", "attribution", "ov", "tiny")


def busy_cores(seconds: float = 3.0) -> float:
    """The load of other processes, in cores, over some seconds."""

    def idle() -> float:
        first = Path("/proc/stat").read_text().partition("\n")[0]
        fields = [int(x) for x in first.split()[1:]]
        return (fields[3] + fields[4]) / os.sysconf("SC_CLK_TCK")

    before, start = idle(), time.perf_counter()
    time.sleep(seconds)
    return max(0.0, os.cpu_count() - (idle() - before) / (time.perf_counter() - start))


def machine(device) -> dict:
    """The machine, device and versions that figures belong to."""
    from vksteer.runtime.device import choose

    d = choose(device)
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    versions = {}
    for package in ("vksteer", "numpy", "torch", "transformers", "gguf"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%F %H:%M"),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "device": {"name": d.name, "type": d.type, "driver": d.driver, "uuid": d.uuid},
        "busy_cores_before": round(busy_cores(), 2),
        "removed_from_environment": REMOVED,
        "environment": {
            k: v
            for k, v in os.environ.items()
            if k.startswith(("VKSTEER_", "VK_", "LP_", "OMP_", "MKL_"))
        },
    }


def commit() -> str:
    """The commit of the tree, with "+changes" where the engine's sources differ from it."""
    run = lambda *words: subprocess.run(
        ["git", *words], cwd=RESULTS.parent, capture_output=True, text=True, check=False
    ).stdout.strip()
    return run("rev-parse", "--short", "HEAD") + (
        "+changes"
        if run("status", "--porcelain", "--", "../csrc", "../shaders", "../python")
        else ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of each comparison (default: 5)"
    )
    parser.add_argument("--only", nargs="+", choices=(*GROUPS, "qwen"), default=GROUPS)
    parser.add_argument("--device")
    parser.add_argument("--name", help="file name instead of <machine>-<date>")
    parser.add_argument("--no-write", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="no GPU found")
    where = machine(arguments.device)
    print(
        f"{where['device']['name']} ({where['device']['driver']}), {where['cpu']}, {where['cores']}"
        f" cores; load of other processes: {where['busy_cores_before']:.1f} cores",
        flush=True,
    )
    where["busy"] = where["busy_cores_before"] > BUSY
    if where["busy"]:
        print(
            "Other processes load this machine: neither figures nor ratios mean much (PyTorch's"
            " threads wait for each other and suffer most). They are written under a name with"
            " -busy, which the README does not take.",
            flush=True,
        )
    rows, seconds = [], {}
    for group in arguments.only:
        start = time.perf_counter()
        for r in measure(group, arguments):
            rows.append(r)
            verdict = "" if r["met"] is None else "  met" if r["met"] else "  NOT met"
            print(
                f"  {r['what']}: {r['value']:.3g} {r['unit']}  {r['target']}{verdict}", flush=True
            )
        seconds[group] = round(time.perf_counter() - start, 1)
    if not arguments.no_write:
        path = result_path(where, arguments.name)
        write(path, where, arguments, rows, seconds)
        shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        print(f"written: {shown}")
    return 0


def result_path(where: dict, name: str | None) -> Path:
    """The file of a result: <machine>-<date>.json, or the given name; with -busy under load."""
    parts = f"{where['cpu']} {where['cores']} cores {where['device']['name'].split('(')[0]}"
    slug = re.sub(r"[^a-z0-9]+", "-", parts.lower()).strip("-")
    stem = name or f"{slug}-{where['date'][:10]}"
    return RESULTS / f"{stem}{'-busy' if where['busy'] else ''}.json"


def write(path: Path, where: dict, arguments, rows: list[dict], seconds: dict) -> None:
    """Writes a result. Where only some groups ran, their rows replace those in the file."""
    RESULTS.mkdir(exist_ok=True)
    if path.exists() and set(arguments.only) != set(GROUPS):
        old = json.loads(path.read_text())
        names = {r["what"] for r in rows}
        rows = [r for r in old["rows"] if r["what"] not in names] + rows
        seconds = old["seconds"] | seconds
    content = {
        "machine": where,
        "commit": commit(),
        "rounds": arguments.rounds,
        "seconds": seconds,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def measure(group: str, arguments):
    """Yields the rows of one group."""
    import processes

    if group == "processes":
        yield from processes.import_time(arguments.rounds)
        yield from processes.load(max(2, arguments.rounds - 2))
        yield from processes.memory()
    elif group == "smollm2":
        import smollm2

        yield from smollm2.run(arguments.rounds, arguments.device)
    elif group == "training":
        import training

        yield from training.run(arguments.rounds, arguments.device)
    elif group == "attribution":
        import attribution

        yield from attribution.run(arguments.rounds, arguments.device)
    elif group == "ov":
        import ov_circuit

        yield from ov_circuit.run(arguments.rounds, arguments.device)
    else:
        import steering

        yield from (
            steering.tiny(arguments.device) if group == "tiny" else steering.qwen(arguments.device)
        )


if __name__ == "__main__":
    sys.exit(main())
