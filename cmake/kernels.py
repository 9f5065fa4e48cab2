"""The build's reader of csrc/ops/kernels.def, the one table of kernels.

    KERNEL(name, file, "DEFINE=1 OTHER=2", params_struct)            must compile
    KERNEL_OPTIONAL(name, file, "...", params_struct)                left out, loudly, where the
    compiler is too old for it

A word of the third column that starts with "-" goes to glslc as it stands (e.g. "-O0");
without one, -O is used.

    kernels.py rules TABLE OUT.cmake         one CMake rule a row
    kernels.py try NAME SPIRV NEXT COMMAND...  compile an optional row, with the compiler NEXT where
                                             COMMAND's cannot; a failure leaves an empty file
    kernels.py embed TABLE FOLDER            FOLDER/spirv/*.spv -> FOLDER/kernels_spirv.c and .h
"""

import re
import subprocess
import sys
from array import array
from pathlib import Path
from typing import NamedTuple

ROW = re.compile(
    r'\b(KERNEL|KERNEL_OPTIONAL)\s*\(\s*(\w+)\s*,\s*(\w+)\s*,\s*"([^"]*)"\s*,\s*(\w+)\s*\)'
)


class Row(NamedTuple):
    name: str
    file: str
    flags: list[str]
    params: str
    optional: bool


def read(table: Path) -> list[Row]:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", table.read_text(), flags=re.S)
    # preprocessor lines are the C side's business
    text = re.sub(r"^[ \t]*#.*(\\\n.*)*$", "", text, flags=re.M)
    rows = []
    for kind, name, file, words, params in ROW.findall(text):
        words = words.split()
        flags = [w if w.startswith("-") else f"-D{w}" for w in words]
        if not any(f.startswith("-O") for f in flags):
            flags.insert(0, "-O")
        rows.append(Row(name, file, flags, params, kind == "KERNEL_OPTIONAL"))
    rest = ROW.sub("", text).strip()
    if rest:
        sys.exit(f"{table}: not a row: {rest.splitlines()[0]!r}")
    names = [row.name for row in rows]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        sys.exit(f"{table}: twice in the table: {', '.join(sorted(twice))}")
    return rows


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def rules(table: Path, out: Path) -> None:
    lines = [
        f"vksteer_kernel({r.name} {r.file} {'ON' if r.optional else 'OFF'} {' '.join(r.flags)})"
        for r in read(table)
    ]
    write_if_changed(out, "\n".join(lines) + "\n")


def try_row(name: str, spirv: Path, following: str, command: list[str]) -> None:
    compilers = [command[0]] + ([following] if Path(following).exists() else [])
    for compiler in compilers:
        done = subprocess.run([compiler, *command[1:]], capture_output=True, text=True)
        if done.returncode == 0:
            return
    reason = next((line for line in done.stderr.splitlines() if "error" in line), "glslc failed")
    print(
        f"WARNING: optional kernel {name} left out: {' and '.join(compilers)} cannot build it"
        f" ({reason.strip()})",
        flush=True,
    )
    spirv.write_bytes(b"")
    # the rule must still know its shader
    spirv.with_name(spirv.name + ".d").write_text(f"{spirv}: {command[-1]}\n")


def embed(table: Path, folder: Path) -> None:
    names = [row.name for row in read(table)]
    c = ['#include "kernels_spirv.h"\n']
    h = [
        (
            "// Made by cmake/kernels.py from csrc/ops/kernels.def. Sizes are in bytes; 0 = left"
            " out by this build."
        ),
        "#pragma once",
        "#include <stddef.h>",
        "#include <stdint.h>",
        "",
    ]
    left_out = []
    for name in names:
        words = array("I", (folder / "spirv" / f"{name}.spv").read_bytes())
        if not words:
            left_out.append(name)
        body = ",".join(map(hex, words)) or "0"
        c.append(
            f"const uint32_t spirv_{name}[] = {{{body}}};\nconst size_t spirv_{name}_size ="
            f" {4 * len(words)};\n"
        )
        h.append(f"extern const uint32_t spirv_{name}[];\nextern const size_t spirv_{name}_size;")
    (folder / "kernels_spirv.c").write_text("".join(c))
    (folder / "kernels_spirv.h").write_text("\n".join(h) + "\n")
    (folder / "kernels_left_out.txt").write_text("".join(n + "\n" for n in left_out))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "rules":
        rules(Path(rest[0]), Path(rest[1]))
    elif verb == "try":
        try_row(rest[0], Path(rest[1]), rest[2], rest[3:])
    elif verb == "embed":
        embed(Path(rest[0]), Path(rest[1]))
    else:
        sys.exit(__doc__)
