"""The build's reader of csrc/ops/kernels.def, the one table of kernels and ops.

    KERNELS(name, file, "words", params_struct)      the variants of shaders/<file>.comp
    KERNELS_OPTIONAL(...)                            left out, with a warning, where no compiler of
                                                     this machine can build them
    OP(name, params_struct, ...), OP_GRID(...)       the C side's business; here: one kernel without
                                                     variants, unless a KERNELS row has that name
    BYTES(params_struct, reads, writes)              the C side's business; here: every struct that
                                                     a kernel takes must have such a row

Words of a KERNELS row:

    AXIS=a,b,c      one variant for each value, with -DAXIS=value. A value that is no number is a
                    constant of params.h: WEIGHT=f32 means -DWEIGHT=<value of WEIGHT_F32>
    16:RN=4         as a value: with -DRN=4 besides
    AXIS?           two variants, without and with -DAXIS
    NAME, NAME=v    a define of all variants; NAME=v is an axis if another row of that name says so
    -O0             a flag of glslc; without one of -O..., -O is used

Several rows of one name add up. A variant is called name_value_..., with the values in the order of
the axes; the present half of AXIS? is called axis.

Which of a kernel's arguments it reads and which it writes is said once, by their types: the struct
of params.h names a buffer reference for every address, and types.glsl declares each reference with
or without `readonly`. An address of a readonly type is read, any other is read and written. The
queue places its barriers by this (csrc/gpu/hazards.c), and a test compares it with the loads and
stores of the compiled kernels.

    kernels.py rules TABLE OUT.cmake OUT.h     one CMake rule for each variant; the header for C
    kernels.py try NAME SPIRV NEXT COMMAND...  compile an optional variant, with the compiler NEXT
                                               where COMMAND's cannot; else leave an empty file
    kernels.py embed TABLE FOLDER              FOLDER/spirv/*.spv -> FOLDER/kernels_spirv.c and .h
"""

import itertools
import re
import subprocess
import sys
from array import array
from pathlib import Path
from typing import NamedTuple

import fields

HEADERS = Path(__file__).resolve().parent.parent / "shaders/include"
ROW = re.compile(
    r'\b(KERNELS|KERNELS_OPTIONAL)\s*\(\s*(\w+)\s*,\s*(\w+)\s*,\s*"([^"]*)"\s*,\s*(\w+)\s*\)'
)
PARENTHESES = r"\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"  # four deep
OP = re.compile(rf"\bOP(?:_GRID)?\s*(?=\(\s*(\w+)\s*,\s*(\w+)\s*,){PARENTHESES}")
BYTES = re.compile(rf"\bBYTES\s*(?=\(\s*(\w+)\s*,){PARENTHESES}")
REFERENCE = re.compile(
    r"^layout\(buffer_reference, scalar[^)]*\) (?:(readonly|writeonly) )?buffer (\w+) \{", re.M
)


class Row(NamedTuple):
    """One variant: a SPIR-V module."""

    name: str
    file: str
    flags: list[str]
    params: str
    optional: bool
    kernel: str  # the name of its row
    values: dict[str, str]  # axis -> value as the table says it; "" and "1" for AXIS?
    extra: dict[str, str]  # defines that came with a value


class Table(NamedTuple):
    rows: list[Row]
    axes: dict[str, list[str]]  # name of a row -> its axes in order
    moved: list[str]  # the structs of the BYTES rows


def uncommented(path: Path) -> str:
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)
    return re.sub(r"^[ \t]*#.*(\\\n.*)*$", "", text, flags=re.M)  # preprocessor lines are C's


def constants() -> dict[str, str]:
    """NAME -> number, of every `#define NAME number` of the headers that C and GLSL share."""
    found = {}
    for path in sorted(HEADERS.glob("params*.h")):
        found |= dict(re.findall(r"^#define (\w+) (\w+)\b", path.read_text(), re.M))
    return found


def number(axis: str, value: str, known: dict[str, str]) -> str:
    if re.fullmatch(r"\d+", value):
        return value
    name = f"{axis}_{value.upper()}"
    if name not in known:
        sys.exit(f"{axis}={value}: neither a number nor, as {name}, a constant of params.h")
    return known[name]


def is_axis(word: str) -> bool:
    return word.endswith("?") or ("=" in word and "," in word.split("=", 1)[1])


def axis_of(word: str) -> str:
    return word.rstrip("?").split("=")[0]


def choices(axis: str, word: str, known: dict[str, str]) -> list[tuple[str, list[str], dict]]:
    """(value, flags, defines that come with it) of one axis."""
    if word.endswith("?"):
        return [("", [], {}), ("1", [f"-D{axis}"], {})]
    out = []
    for item in word.split("=", 1)[1].split(","):
        value, *extra = item.split(":")
        defines = dict(e.split("=") for e in extra)
        flags = [f"-D{axis}={number(axis, value, known)}"] + [
            f"-D{k}={v}" for k, v in defines.items()
        ]
        out.append((value, flags, defines))
    return out


def expand(kind: str, kernel: str, file: str, words: list[str], params: str, axes: list[str]):
    """The variants of one row of the table."""
    known = constants()
    given = {axis_of(w): w for w in words if axis_of(w) in axes}
    plain = [w if w.startswith("-") else f"-D{w}" for w in words if axis_of(w) not in axes]
    optimize = [] if any(f.startswith("-O") for f in plain) else ["-O"]
    present = [axis for axis in axes if axis in given]
    for combination in itertools.product(*(choices(a, given[a], known) for a in present)):
        chosen = dict(zip(present, combination, strict=True))
        suffix = [
            axis.lower() if given[axis].endswith("?") else value
            for axis, (value, _, _) in chosen.items()
            if value
        ]
        yield Row(
            "_".join([kernel, *suffix]),
            file,
            optimize + [flag for _, flags, _ in combination for flag in flags] + plain,
            params,
            kind == "KERNELS_OPTIONAL",
            kernel,
            {axis: value for axis, (value, _, _) in chosen.items()},
            {k: v for _, _, extra in combination for k, v in extra.items()},
        )


def read_table(table: Path) -> Table:
    text = uncommented(table)
    found = [
        (kind, name, file, words.split(), params)
        for kind, name, file, words, params in ROW.findall(text)
    ]
    named = {name for _, name, *_ in found}
    found += [
        ("KERNELS", name, name, [], params)
        for name, params in OP.findall(text)
        if name not in named
    ]
    rest = BYTES.sub("", OP.sub("", ROW.sub("", text))).strip()
    if rest:
        sys.exit(f"{table}: not a row: {rest.splitlines()[0]!r}")
    axes: dict[str, list[str]] = {}
    for _, name, _, words, _ in found:
        mine = axes.setdefault(name, [])
        mine += [axis_of(w) for w in words if is_axis(w) and axis_of(w) not in mine]
    rows = [
        row
        for kind, name, file, words, params in found
        for row in expand(kind, name, file, words, params, axes[name])
    ]
    names = [row.name for row in rows]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        sys.exit(f"{table}: twice in the table: {', '.join(sorted(twice))}")
    return Table(rows, axes, BYTES.findall(text))


def read(table: Path) -> list[Row]:
    return read_table(table).rows


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def lookup(name: str, axes: list[str], entries: list[tuple[list[int], str]], missing: str) -> str:
    """A C function of the axes' values; entries: (values, what it returns)."""
    sizes = [max(values[i] for values, _ in entries) + 1 for i in range(len(axes))]
    arguments = [axis.lower() for axis in axes]
    cells = "".join(
        f"        {''.join(f'[{v}]' for v in values)} = 1 + {result},\n"
        for values, result in entries
    )
    inside = " && ".join(f"{a} < {n}" for a, n in zip(arguments, sizes, strict=True))
    return (
        f"static inline int {name}({', '.join(f'uint32_t {a}' for a in arguments)}) {{\n"
        f"    static const short table{''.join(f'[{n}]' for n in sizes)} = {{\n{cells}    }};\n"
        f"    int found = {inside} ? table{''.join(f'[{a}]' for a in arguments)} : 0;\n"
        f"    return found ? found - 1 : {missing};\n}}\n"
    )


def variant_lookups(kernel: str, axes: list[str], rows: list[Row]) -> str:
    """For the variants of one kernel: kernel_<name>(axes), its defines, the values of its axes."""
    known = constants()
    values = [[int(number(a, r.values.get(a) or "0", known)) for a in axes] for r in rows]
    entries = [(v, f"KERNEL_{r.name}") for v, r in zip(values, rows, strict=True)]
    out = lookup(f"kernel_{kernel}", axes, entries, "-1")
    for define in dict.fromkeys(k for r in rows for k in r.extra):
        given = [
            (v, r.extra[define]) for v, r in zip(values, rows, strict=True) if define in r.extra
        ]
        out += lookup(f"kernel_{kernel}_{define}", axes, given, "0")
    for i, axis in enumerate(axes):
        if not all(r.values.get(axis, "0").isdigit() for r in rows):
            continue
        listed = ", ".join(map(str, dict.fromkeys(v[i] for v in values)))
        out += f"#define KERNEL_{kernel}_{axis} {{{listed}}}\n"
    return out


def written_types() -> dict[str, bool]:
    """Name of a buffer reference of types.glsl -> may a kernel write through it?"""
    found = REFERENCE.findall((HEADERS / "types.glsl").read_text())
    written: dict[str, bool] = {}
    for qualifier, name in found:
        written[name] = written.get(name, False) or qualifier != "readonly"
    return written


def addresses(table: Table) -> dict[str, list[tuple[str, bool]]]:
    """Struct of arguments -> its addresses in order: (name, may the kernel write through it?)."""
    written = written_types()
    bodies = {}
    for path in sorted(HEADERS.glob("params*.h")):
        bodies |= {a or b: body for a, b, body in fields.STRUCT.findall(uncommented(path))}
    found: dict[str, list[tuple[str, bool]]] = {}
    for row in table.rows:
        if row.params in found:
            continue
        if row.params not in bodies:
            sys.exit(f"kernel {row.name}: no struct {row.params} in shaders/include/params*.h")
        if row.params not in table.moved:
            sys.exit(
                f"kernel {row.name}: kernels.def has no row BYTES({row.params}, reads, writes):"
                " add one that says how many bytes such a kernel reads and writes"
            )
        members = [m.strip() for m in bodies[row.params].split(";") if m.strip()]
        found[row.params] = []
        for i, member in enumerate(members):
            match = re.fullmatch(r"ADDRESS\((\w+)\)\s+(\w+)", member)
            if not match:
                continue
            if i != len(found[row.params]):
                sys.exit(f"{row.params}.{match[2]}: an address after numbers; addresses come first")
            if match[1] not in written:
                sys.exit(
                    f"{row.params}.{match[2]}: types.glsl declares no buffer reference {match[1]},"
                    " so nothing says whether kernels read or write it"
                )
            found[row.params].append((match[2], written[match[1]]))
    return found


def address_macros(table: Table) -> list[str]:
    """For every struct, ADDRESSES_<struct>(A): A(struct, field, position), and WRITTEN_<struct>."""
    lines = []
    for struct, members in addresses(table).items():
        entries = [f"    A({struct}, {name}, {i}) \\" for i, (name, _) in enumerate(members)]
        mask = sum(1 << i for i, (_, written) in enumerate(members) if written)
        lines += [f"#define ADDRESSES_{struct}(A) \\", *entries, ""]
        lines.append(f"#define WRITTEN_{struct} {mask:#x}u")
    return [*lines, ""]


def header(table: Table) -> str:
    rows = table.rows
    lines = [
        "/* Made by cmake/kernels.py from csrc/ops/kernels.def: every variant, and for rows with",
        " * axes kernel_<name>(values), which is -1 where the table has no such variant, and the",
        " * numbers of an axis as KERNEL_<name>_<AXIS>, an initialiser. */",
        "#pragma once",
        "#include <stdint.h>",
        "",
        "enum op_kernel {",
        *(f"    KERNEL_{row.name}," for row in rows),
        "    KERNEL_COUNT",
        "};",
        "",
        "#define KERNEL_ROWS(ROW) \\",
        *(f"    ROW({row.name}, {row.params}) \\" for row in rows),
        "",
        "/* The addresses of each struct of arguments in order; bit i of WRITTEN: may kernels",
        " * write through address i? */",
        *address_macros(table),
    ]
    for kernel, axes in table.axes.items():
        if axes:
            lines.append(variant_lookups(kernel, axes, [r for r in rows if r.kernel == kernel]))
    return "\n".join(lines) + "\n"


def rules(table: Path, out: Path, out_header: Path) -> None:
    read_ = read_table(table)
    lines = [
        f"vksteer_kernel({r.name} {r.file} {'ON' if r.optional else 'OFF'} {' '.join(r.flags)})"
        for r in read_.rows
    ]
    write_if_changed(out, "\n".join(lines) + "\n")
    write_if_changed(out_header, header(read_))


def try_row(name: str, spirv: Path, following: str, command: list[str]) -> None:
    compilers = [command[0]] + ([following] if Path(following).exists() else [])
    for compiler in compilers:
        done = subprocess.run([compiler, *command[1:]], check=False, capture_output=True, text=True)
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
        "/* Made by cmake/kernels.py. Sizes are in bytes; 0: left out by this build. */",
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
        rules(*map(Path, rest))
    elif verb == "try":
        try_row(rest[0], Path(rest[1]), rest[2], rest[3:])
    elif verb == "embed":
        embed(Path(rest[0]), Path(rest[1]))
    else:
        sys.exit(__doc__)
