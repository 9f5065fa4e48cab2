"""What AMD's compiler makes of every kernel, without a GPU: registers, shared memory (LDS),
occupancy, and its own estimates of latency and inverse throughput, for chips that are not present.

    amd_table.py write     renews benchmarks/results/amd/kernels.json and the page made from it,
                           docs/results/amd-kernels.md
    amd_table.py compare   says which kernels got worse than the table by more than 10 %

Mesa's RADV compiles for a null device (RADV_FORCE_FAMILY), which Mesa 26.1 no longer has, so the
working Mesa of .tools/env.json is used and not the newer one. A table holds for one version of
Mesa: another version of the compiler gives other figures for the same kernels.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE, PAGE = ROOT / "benchmarks/results/amd/kernels.json", ROOT / "docs/results/amd-kernels.md"

#: chip -> its generation
CHIPS = {"navi31": "RDNA 3", "navi21": "RDNA 2", "vega10": "GCN 5"}
#: Statistics as the driver names them -> (heading, sign): +1 where more is worse.
STATISTICS = {
    "VGPRs": ("VGPRs", 1),
    "LDS size": ("LDS, bytes", 1),
    "Subgroups per SIMD": ("subgroups a SIMD", -1),
    "Latency": ("latency, cycles", 1),
    "Inverse Throughput": ("inverse throughput, cycles", 1),
}
SPILLS = ("Spilled SGPRs", "Spilled VGPRs", "Scratch size")
#: A kernel may get worse by this share before the table has to be renewed.
ALLOWED = 0.1

INTRODUCTION = """# Kernels on AMD GPUs, as compiled

<!-- Written by tools/amd_table.py; edit INTRODUCTION there. -->

What the compiler of Mesa {mesa} (RADV) makes of every kernel for {chips}.
No such GPU was at hand. The two estimates in cycles are the compiler's: for one subgroup, with a
loop counted as 8 rounds. They show which of two versions of a kernel is leaner, and not how long
one takes. No kernel spills registers. `tools/amd_table.py write` renews this page, and
`tests/test_amd_table.py` fails where a kernel is worse than it says by more than {allowed:.0f} %.

- VGPRs: vector registers of a lane. Fewer leave room for more subgroups.
- LDS: shared memory of a workgroup.
- Subgroups a SIMD: how many the registers and LDS allow at the same time (occupancy).
- Latency, inverse throughput: the compiler's estimates.

Kernels that need what a chip lacks (cooperative matrices before RDNA 3) are missing in its table.
"""


def report(chip: str) -> tuple[str, dict[str, dict[str, int]]]:
    """Compiles every kernel for a chip: the version of Mesa, and all statistics of each kernel."""
    icd = json.loads((ROOT / ".tools/env.json").read_text())["radeon_icd"]
    if not icd or not os.path.exists(icd):
        raise FileNotFoundError(f"AMD's driver {icd} is not there: run tools/setup.sh test")
    dropped = ("VK_", "VKSTEER_", "LP_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    env |= {
        "RADV_FORCE_FAMILY": chip,
        "VK_DRIVER_FILES": icd,
        "VK_ICD_FILENAMES": icd,
        "MESA_SHADER_CACHE_DISABLE": "true",
    }
    done = subprocess.run(
        [sys.executable, __file__, "compile"], env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{chip}: {done.stderr}")
    driver, *lines = done.stdout.splitlines()
    version = re.search(r"Mesa (\d+(?:\.\d+)*)", driver)
    if not version:
        raise RuntimeError(f"{chip}: not Mesa's driver: {driver}")
    return version[1], dict(map(json.loads, lines))


def compile_all() -> None:
    """Prints the driver and then [kernel, statistics], a line for each: the child of report()."""
    from vksteer.errors import DeviceError
    from vksteer.runtime.device import _engine, devices

    (device,) = devices()
    if (device.type, device.vendor, device.suitable) != ("discrete", "AMD", True):
        sys.exit(f"not a null AMD device: {device}")
    print(device.driver)
    engine = _engine().Device(0)
    for name in (name for name, spirv, _ in _engine().kernels() if spirv):
        try:
            lines = [line.split("=") for line in engine.describe(name).splitlines()]
        except DeviceError as error:
            if "does not offer" not in str(error):
                raise
            continue  # worse() names it if the table has it
        print(json.dumps([name, {k: int(v) for k, v in lines}]))


def shown(statistics: dict[str, int]) -> list[int]:
    return [statistics[name] for name in STATISTICS]


def worse(table: dict, chip: str, reported: dict[str, dict[str, int]]) -> list[str]:
    """What is worse than the table allows, or not in it: a sentence for each."""
    found = []
    for kernel, statistics in reported.items():
        before = table["kernels"].get(kernel, {}).get(chip)
        if before is None:
            found.append(f"{kernel} on {chip} is not in the table")
            continue
        for (name, (_, sign)), then, now in zip(STATISTICS.items(), before, shown(statistics)):
            if sign * (now - then) > ALLOWED * then:
                found.append(f"{kernel} on {chip}: {name} was {then} and is {now}")
    missing = {k for k, chips in table["kernels"].items() if chip in chips} - reported.keys()
    found += [f"{kernel} on {chip} is in the table and was not compiled" for kernel in missing]
    return found


def text(table: dict) -> str:
    """The table as JSON, a line for each kernel and chip."""
    kernels = ",\n".join(
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"   {json.dumps(chip)}: {json.dumps(row)}" for chip, row in chips.items())
        + "\n  }"
        for name, chips in sorted(table["kernels"].items())
    )
    head = {k: v for k, v in table.items() if k != "kernels"}
    return json.dumps(head, indent=1)[:-2] + f',\n "kernels": {{\n{kernels}\n }}\n}}\n'


def page(table: dict) -> str:
    """The same as a page of the documentation."""
    chips = ", ".join(CHIPS)
    parts = [INTRODUCTION.format(mesa=table["mesa"], chips=chips, allowed=100 * ALLOWED)]
    headings = [heading for heading, _ in STATISTICS.values()]
    for chip, generation in CHIPS.items():
        lines = [
            f"## {chip}, {generation}\n",
            "| kernel | " + " | ".join(headings) + " |",
            "|---|" + "---:|" * len(headings),
        ]
        lines += [
            f"| `{kernel}` | " + " | ".join(map(str, rows[chip])) + " |"
            for kernel, rows in sorted(table["kernels"].items())
            if chip in rows
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def stored() -> dict:
    return json.loads(TABLE.read_text())


def spilled(chip: str, reported: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{kernel} on {chip} spills: " + ", ".join(f"{s} {statistics[s]}" for s in SPILLS)
        for kernel, statistics in reported.items()
        if any(statistics[s] for s in SPILLS)
    ]


def write(reports: dict[str, tuple[str, dict[str, dict[str, int]]]]) -> None:
    kernels: dict[str, dict[str, list[int]]] = {}
    for chip, (_, reported) in reports.items():
        for kernel, statistics in reported.items():
            kernels.setdefault(kernel, {})[chip] = shown(statistics)
    mesa = next(iter(reports.values()))[0]
    table = {"mesa": mesa, "statistics": list(STATISTICS), "kernels": kernels}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(text(table))
    PAGE.write_text(page(table))
    print(f"{len(kernels)} kernels on {', '.join(CHIPS)}, Mesa {mesa}")


def main(action: str) -> int:
    if action == "compile":
        compile_all()
        return 0
    reports = {chip: report(chip) for chip in CHIPS}
    if action == "write":
        write(reports)
    table, found = stored(), []
    for chip, (mesa, reported) in reports.items():
        if mesa != table["mesa"]:
            sys.exit(f"the table is of Mesa {table['mesa']}, and this is Mesa {mesa}")
        found += spilled(chip, reported) + worse(table, chip, reported)
    print("\n".join(found) or "no kernel spills or got worse")
    return bool(found)


if __name__ == "__main__":
    if sys.argv[1:] not in (["write"], ["compare"], ["compile"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
