"""The table of kernels, and what the build makes of it. Needs no device."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from child import tool
from source_tree import ROOT, tracked
from spirv_accesses import accesses

sys.path.insert(0, str(ROOT / "cmake"))
import kernels  # the build's own reader of kernels.def

SPIRV = ROOT / "build/generated/spirv"
TABLE = kernels.read_table(ROOT / "csrc/ops/kernels.def")
ROWS = TABLE.rows
ADDRESSES = kernels.addresses(TABLE)

# --- kernels --------------------------------------------------------------------------------------


def test_every_shader_has_a_row_and_every_row_a_shader():
    files = {p.stem for p in tracked("shaders/*.comp")}
    assert {row.file for row in ROWS} == files


def test_every_shader_include_is_used():
    text = "".join(p.read_text() for p in tracked("shaders/*"))
    assert not [p.name for p in tracked("shaders/include/*") if f'"{p.name}"' not in text]


@pytest.fixture(scope="session")
def params_sizes(tmp_path_factory) -> dict[str, int]:
    """{kernel: size of its arguments in C, in bytes}."""
    folder = tmp_path_factory.mktemp("params")
    lines = "".join(f'    printf("{r.name} %zu\\n", sizeof(struct {r.params}));\n' for r in ROWS)
    (folder / "sizes.c").write_text(
        f'#include <stdio.h>\n#include "params.h"\nint main(void)\n{{\n{lines}    return 0;\n}}\n'
    )
    subprocess.run(
        [
            "cc",
            "-std=c11",
            "-I",
            ROOT / "shaders/include",
            folder / "sizes.c",
            "-o",
            folder / "sizes",
        ],
        check=True,
    )
    out = subprocess.run([folder / "sizes"], capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in map(str.split, out.splitlines())}


def push_constant_size(data: bytes) -> int:
    """Bytes of the push constants of a SPIR-V module, from its types and decorations."""
    words = struct.unpack(f"<{len(data) // 4}I", data)
    assert words[0] == 0x07230203, "not SPIR-V"
    sizes, structs, pointers, constants, offsets, strides, block = {}, {}, {}, {}, {}, {}, None
    i = 5
    while i < len(words):
        count, op = words[i] >> 16, words[i] & 0xFFFF
        w = words[i + 1 : i + count]
        if op in (21, 22):  # OpTypeInt, OpTypeFloat
            sizes[w[0]] = w[1] // 8
        elif op == 23:  # OpTypeVector
            sizes[w[0]] = sizes.get(w[1], 0) * w[2]  # bools have no size
        elif op == 28:  # OpTypeArray
            structs[w[0]] = ("array", w[1], w[2])
        elif op == 30:  # OpTypeStruct
            structs[w[0]] = ("struct", w[1:])
        elif op == 32:  # OpTypePointer
            pointers[w[0]] = (w[1], w[2])
        elif op == 43:  # OpConstant
            constants[w[1]] = w[2]
        elif op == 71 and w[1] == 6:  # OpDecorate ArrayStride
            strides[w[0]] = w[2]
        elif op == 72 and w[2] == 35:  # OpMemberDecorate Offset
            offsets[w[0], w[1]] = w[3]
        elif op == 59 and w[2] == 9:  # OpVariable PushConstant
            block = pointers[w[0]][1]
        i += count

    def size(t: int) -> int:
        if t in sizes:
            return sizes[t]
        if t in pointers or t not in structs:
            return 8  # an address
        if structs[t][0] == "array":
            return strides[t] * constants[structs[t][2]]
        return max(
            (offsets[t, m] + size(member) for m, member in enumerate(structs[t][1])), default=0
        )

    return 0 if block is None else size(block)


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_arguments_have_one_size_in_c_and_glsl(row, params_sizes):
    path = SPIRV / f"{row.name}.spv"
    assert path.exists(), "not built: `make build` first"
    data = path.read_bytes()
    if not data and row.optional:
        left_out = (ROOT / "build/generated/kernels_left_out.txt").read_text().split()
        assert (
            row.name in left_out
            and not json.loads((ROOT / ".tools/env.json").read_text())["glslc_next"]
        ), "a compiler of this machine can build it"
        pytest.skip("optional: no compiler of this machine can build it, and the build reported it")
    in_c, in_glsl = params_sizes[row.name], push_constant_size(data)
    assert in_c <= 128, "the strictest driver offers 128 bytes of push constants"
    # The C struct may end in padding.
    assert in_c - 8 < in_glsl <= in_c, f"{row.params} has {in_c} bytes in C and {in_glsl} in GLSL"
    assert in_c == (in_glsl + 7) // 8 * 8 or in_c == in_glsl


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_loads_and_stores_are_declared(row):
    """The queue places barriers by what params.h and types.glsl declare. The compiled code stores
    through no address that they call readonly, and touches memory only through addresses.
    """
    data = (SPIRV / f"{row.name}.spv").read_bytes()
    if not data and row.optional:
        pytest.skip("optional: left out of this build")
    members = ADDRESSES[row.params]
    found = accesses(data)
    known = {8 * i for i in range(len(members))}
    assert found.stored, "a kernel without results"
    assert found.loaded | found.stored <= known, "through something that is no address"
    stored = {name for i, (name, _) in enumerate(members) if 8 * i in found.stored}
    assert stored <= {name for name, written in members if written}
    # an address that no variant stores through should be readonly: it costs barriers
    variants = [r for r in ROWS if r.params == row.params]
    if row == variants[0]:
        by_any = set().union(
            *(
                accesses((SPIRV / f"{r.name}.spv").read_bytes()).stored
                for r in variants
                if (SPIRV / f"{r.name}.spv").stat().st_size
            )
        )
        assert {name for name, written in members if written} == {
            members[at // 8][0] for at in by_any
        }


def test_spirv_is_valid():
    env = json.loads((ROOT / ".tools/env.json").read_text())
    if not env["spirv_val"] and not (ROOT / ".tools/bin/glslc").exists():
        pytest.skip(
            "the system's glslc is recent, so the set-up fetched no shader tools, and the system"
            " has no spirv-val (package spirv-tools)"
        )
    spirv_val = tool("spirv_val")
    for row in ROWS:
        path = SPIRV / f"{row.name}.spv"
        if path.stat().st_size or not row.optional:
            done = subprocess.run(
                [spirv_val, "--target-env", "vulkan1.2", "--scalar-block-layout", path],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{row.name}: {done.stdout}{done.stderr}"


#: SPIR-V capabilities that no kernel may require (docs/devices.md), except those of ALLOWED. The
#: engine uses these kernels only where the device has the feature.
NOT_BASELINE = {
    9: "Float16",
    10: "Float64",
    11: "Int64",
    22: "Int16",
    39: "Int8",
    4433: "StorageBuffer16BitAccess",
    4448: "StorageBuffer8BitAccess",
    6022: "CooperativeMatrixKHR",
}
#: -D flag of a row -> the capabilities it allows
ALLOWED = {"TEXELS": {"Int64"}}


@pytest.mark.parametrize("row", [r for r in ROWS if not r.optional], ids=lambda r: r.name)
def test_asks_only_for_what_its_row_says(row):
    data = (SPIRV / f"{row.name}.spv").read_bytes()
    words = struct.unpack(f"<{len(data) // 4}I", data)
    asked, i = set(), 5
    while i < len(words):
        if words[i] & 0xFFFF == 17:  # OpCapability
            asked.add(NOT_BASELINE.get(words[i + 1]))
        i += words[i] >> 16
    assert asked, "not a module: it declares no capability"
    allowed = set().union(*(what for define, what in ALLOWED.items() if f"-D{define}" in row.flags))
    assert not asked - {None} - allowed


# --- what the build makes -------------------------------------------------------------------------


def test_optional_row_is_left_out_loudly(tmp_path):
    """An optional kernel that the compiler cannot build becomes an empty module, and the build
    warns.
    """
    (tmp_path / "broken.comp").write_text(
        "#version 450\n#extension GL_XX_no_such_thing : require\nvoid main() {}\n"
    )
    glslc = json.loads((ROOT / ".tools/env.json").read_text())["glslc"]
    command = [glslc, "--target-env=vulkan1.2", "-o", tmp_path / "k.spv", tmp_path / "broken.comp"]
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "cmake/kernels.py",
            "try",
            "k",
            tmp_path / "k.spv",
            "no-other",
            *command,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "WARNING: optional kernel k left out" in done.stdout
    assert (tmp_path / "k.spv").read_bytes() == b""
    (tmp_path / "t.def").write_text('KERNELS_OPTIONAL(k, broken, "A=1 -O0", some_params)\n')
    assert kernels.read(tmp_path / "t.def")[0].flags == ["-DA=1", "-O0"]
    (tmp_path / "spirv").mkdir()
    shutil.move(tmp_path / "k.spv", tmp_path / "spirv/k.spv")
    kernels.embed(tmp_path / "t.def", tmp_path)
    assert "spirv_k_size = 0" in (tmp_path / "kernels_spirv.c").read_text()
    assert (tmp_path / "kernels_left_out.txt").read_text() == "k\n"


def test_a_row_expands_to_its_variants_and_their_lookup(tmp_path):
    """Axes, defines that come with a value, flags, a second row of one name; and that C finds by
    values what the table names.
    """
    (tmp_path / "t.def").write_text(
        'KERNELS(k, file, "WEIGHT=f32,f16 RM=1,16:RN=4 TEXELS? PAIRS -O0", linear_params)\n'
        'KERNELS(k, file, "WEIGHT=f16 RM=32", linear_params)\n'
        "OP_GRID(plain, clip_params, ONE(n), (n + 1) / 2, 1, 1,\n        2.0 * (n + 1))\n"
        "BYTES(linear_params, 4.0 * (p->n_rows + (1)), 1)\nBYTES(clip_params, 1, 1)\n"
    )
    kernels.rules(tmp_path / "t.def", tmp_path / "t.cmake", tmp_path / "kernel_table.h")
    rules = (tmp_path / "t.cmake").read_text().splitlines()
    assert len(rules) == 2 * 2 * 2 + 1 + 1
    assert "vksteer_kernel(k_f32_1 file OFF -DWEIGHT=0 -DRM=1 -DPAIRS -O0)" in rules
    texels = "-DWEIGHT=2 -DRM=16 -DRN=4 -DTEXELS -DPAIRS -O0"
    assert f"vksteer_kernel(k_f16_16_texels file OFF {texels})" in rules
    assert "vksteer_kernel(k_f16_32 file OFF -O -DWEIGHT=2 -DRM=32)" in rules
    assert "vksteer_kernel(plain plain OFF -O)" in rules
    (tmp_path / "main.c").write_text(
        '#include <assert.h>\n#include "kernel_table.h"\nint main(void)\n{\n'
        "    static const unsigned rm[] = KERNEL_k_RM;\n"
        "    assert(sizeof rm / sizeof *rm == 3 && rm[1] == 16 && KERNEL_COUNT == 10);\n"
        "    assert(kernel_k(0, 1, 0) == KERNEL_k_f32_1);\n"
        "    assert(kernel_k(2, 32, 0) == KERNEL_k_f16_32);\n"
        "    assert(kernel_k(2, 16, 1) == KERNEL_k_f16_16_texels);\n"
        "    assert(kernel_k(0, 32, 0) == -1 && kernel_k(1, 1, 0) == -1);\n"
        "    assert(kernel_k(9, 1, 0) == -1 && kernel_k(0, 99, 0) == -1);\n"
        "    assert(kernel_k_RN(0, 16, 1) == 4 && kernel_k_RN(0, 1, 0) == 0);\n    return 0;\n}\n"
    )
    subprocess.run(["cc", tmp_path / "main.c", "-o", tmp_path / "main"], check=True)
    subprocess.run([tmp_path / "main"], check=True)


def test_addresses_have_declared_directions(tmp_path):
    """Read or written, by the type of params.h. A missing struct or row stops the build."""
    assert ADDRESSES["linear_params"] == [
        (name, name == "dst") for name in ("x", "weights", "dst", "bias", "add", "gain")
    ]
    for text, said in (
        ('KERNELS(a, b, "", clip_params)', "no row BYTES\\(clip_params"),
        ('KERNELS(a, b, "", no_params)\nBYTES(no_params, 1, 1)', "no struct no_params"),
    ):
        (tmp_path / "t.def").write_text(text)
        with pytest.raises(SystemExit, match=said):
            kernels.rules(tmp_path / "t.def", tmp_path / "t.cmake", tmp_path / "t.h")


@pytest.mark.parametrize(
    "type, said", [("Nobody", "no buffer reference Nobody"), ("FloatsIn", "after numbers")]
)
def test_an_undeclared_address_stops_the_build(tmp_path, monkeypatch, type, said):
    for header in (ROOT / "shaders/include").glob("*"):
        shutil.copy(header, tmp_path)
    params = (tmp_path / "params.h").read_text()
    at = params.index("UINT width;", params.index("BLOCK(clip_params)"))
    (tmp_path / "params.h").write_text(params[:at] + f"UINT n; ADDRESS({type}) y;" + params[at:])
    if type == "Nobody":
        (tmp_path / "params.h").write_text(params[:at] + f"ADDRESS({type}) y;" + params[at:])
    (tmp_path / "t.def").write_text("OP(clip, clip_params, NONE)\nBYTES(clip_params, 1, 1)")
    monkeypatch.setattr(kernels, "HEADERS", tmp_path)
    with pytest.raises(SystemExit, match=said):
        kernels.addresses(kernels.read_table(tmp_path / "t.def"))


MISTAKES = """
#version 450
#extension GL_GOOGLE_include_directive : require
#extension GL_EXT_buffer_reference_uvec2 : require
#include "types.glsl"
layout(push_constant, scalar) uniform Params { copy_params p; };
FloatsIn chosen(FloatsIn a, FloatsIn b) { return p.n_rows > 3 ? a : b; }
void put(FloatsOut to, uint i) { to.at[i] = chosen(p.x, p.add).at[i]; }
void main() { %s }
"""


CHANGING = """
    FloatsOut to = p.dst;
    for (uint i = 0; i < p.width; i++) { to.at[i] = 1.0; to = FloatsOut(p.add); }
"""


@pytest.mark.parametrize("optimize", ["-O", "-O0"])
@pytest.mark.parametrize(
    "body, loaded, stored",
    [
        ("put(p.dst, 3);", "x add", "dst"),
        ("put(FloatsOut(p.rows), 3);", "x add", "rows"),
        ("put(FloatsOut(uvec2(p.rows) + uvec2(64, 0)), 3);", "x add", "rows"),
        (CHANGING, "", "dst add"),
        ("p.dst.at[p.rows.at[1]] = 0.0;", "rows", "dst"),
    ],
)
def test_the_walk_finds_what_a_kernel_touches(tmp_path, optimize, body, loaded, stored):
    """Through casts, sums of addresses, functions, and variables, with and without the
    compiler's inlining.
    """
    (tmp_path / "k.comp").write_text((MISTAKES % body).lstrip())
    glslc = json.loads((ROOT / ".tools/env.json").read_text())["glslc"]
    command = [glslc, "--target-env=vulkan1.2", optimize, "-I", ROOT / "shaders/include", "-o"]
    subprocess.run([*command, tmp_path / "k.spv", tmp_path / "k.comp"], check=True)
    found = accesses((tmp_path / "k.spv").read_bytes())
    names = [name for name, _ in ADDRESSES["copy_params"]]
    assert {names[at // 8] for at in found.loaded} == set(loaded.split())
    assert {names[at // 8] for at in found.stored} == set(stored.split())


@pytest.mark.parametrize(
    "bad",
    [
        'KERNELS(a, b, "", c) KERNELS(a',
        'KERNELS(a, b, "", c)\nKERNELS(a, b, "", c)',
        'KERNELS(a, b, "RM=1,2 TEXELS?", c)\nKERNELS(a, b, "RM=2", c)',
        'KERNELS(a, b, "WEIGHT=f32,f33", c)',
        "OP(a, b, ONE(n)",
        "hello",
    ],
)
def test_a_damaged_table_stops_the_build(tmp_path, bad):
    (tmp_path / "t.def").write_text(bad)
    with pytest.raises(SystemExit):
        kernels.read(tmp_path / "t.def")


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_builds_without_a_warning(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler}: the set-up asks for one C compiler, whichever it is")
    bin = Path(sys.executable).parent
    subprocess.run(
        [
            bin / "cmake",
            "-S",
            ROOT,
            "-B",
            tmp_path,
            "-G",
            "Ninja",
            f"-DCMAKE_C_COMPILER={compiler}",
            f"-DCMAKE_MAKE_PROGRAM={bin / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DVKSTEER_WERROR=ON",
        ],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [bin / "cmake", "--build", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "warning:" not in done.stdout, done.stdout[-4000:]
