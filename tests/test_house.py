"""The house rules: layout, rooms, sizes, one table of kernels, what the build makes. Nothing
here needs a device.
"""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPIRV = ROOT / "build/generated/spirv"
sys.path.insert(0, str(ROOT / "cmake"))
import kernels  # noqa: E402  the build's own reader of kernels.def
from child import tool  # noqa: E402

ROWS = kernels.read(ROOT / "csrc/ops/kernels.def")

# Top to bottom; a room includes only itself and what stands before it.
ROOMS = ["base", "gpu", "ops", "reference", "model", "run", "analysis", "python"]

# as ordered
TOP_LEVEL = {
    "setup.py",
    "CMakeLists.txt",
    "csrc",
    "shaders",
    "python",
    "tests",
    "notebooks",
    "README.md",
}
ALSO = {
    "Makefile",
    "pyproject.toml",
    ".ci",
    ".gitignore",
    "benchmarks",
    "docs",
    "cmake",
    "tools",
    "LICENSE",
    "CITATION.cff",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
}
ALSO |= {".git-blame-ignore-revs", ".clang-format", ".editorconfig", ".pre-commit-config.yaml"}


def tracked(*patterns: str) -> list[Path]:
    """What git has or would take; every pattern finds something, or a rule over it
    would hold of nothing.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = {}
    for pattern in patterns or ("*",):
        lines = subprocess.run(
            [*command, pattern], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        files = [p for line in lines if (p := ROOT / line).is_file()]
        assert files, f"no file is like {pattern}"
        found |= dict.fromkeys(files)
    return list(found)


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)


def c_files() -> list[Path]:
    return tracked("csrc/*.c", "csrc/*.h", "csrc/*.def")


def room(path: Path) -> str:
    return path.relative_to(ROOT / "csrc").parts[0]


def test_top_level():
    top = {p.relative_to(ROOT).parts[0] for p in tracked()}
    assert not TOP_LEVEL - top, "ordered and missing"
    assert not top - TOP_LEVEL - ALSO, "not in the plan of the house"


def test_rooms_are_known():
    assert not {room(p) for p in c_files()} - set(ROOMS)


def test_includes_go_downward():
    upward = []
    for path in c_files():
        for target in re.findall(r'#\s*include\s+"([^"]+)"', without_comments(path)):
            there = target.split("/")[0] if "/" in target else room(path)
            assert not target.startswith("."), (
                f"{path}: includes are written from csrc/, not relative: {target}"
            )
            if there in ROOMS and ROOMS.index(there) > ROOMS.index(room(path)):
                upward.append(f"{path.relative_to(ROOT)} includes {target}")
    assert not upward


# What a C file defines for others: functions and objects at the left margin that are not static.
DEFINITION = re.compile(
    r"^(?!static\b|typedef\b|extern\b)[A-Za-z_][\w"
    r" \t*]*?\b(\w+)(?:\([^;{}]*\)\s*\{|(?:\[[^\]\n]*\])?\s*=)",
    re.M,
)
STATIC = re.compile(r"^static\b[^;={]*?\b(\w+)\s*(?:\(|\[|=)", re.M)


def preprocessed(files: dict[str, str], folder: Path) -> dict[str, str]:
    """The .c files (path under csrc/ -> text) with macros expanded, without what their headers
    bring and without system headers.
    """
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            re.sub(r"^[ \t]*#\s*include\s*(<.*>|\"kernels_spirv.h\").*$", "", text, flags=re.M)
        )
    out = {}
    for name in files:
        if not name.endswith(".c"):
            continue
        command = [
            "cc",
            "-E",
            "-std=c11",
            "-I",
            folder,
            "-I",
            folder / Path(name).parent,
            "-I",
            ROOT / "shaders/include",
            folder / name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        lines, here = [], False
        for line in done.stdout.splitlines():
            if marker := re.match(r'# \d+ "([^"]*)"', line):
                here = marker[1] == str(folder / name)
            elif here:
                lines.append(line)
        out[name] = re.sub(r'"(?:\\.|[^"\\])*"', '""', "\n".join(lines))
    return out


def uses_between_files(sources: dict[str, str]) -> dict[str, dict[str, set[str]]]:
    """File -> file whose functions or objects it uses -> their names."""
    home = {name: path for path, text in sources.items() for name in DEFINITION.findall(text)}
    uses = {path: {} for path in sources}
    for path, text in sources.items():
        words = set(re.findall(r"(?<![\w.])(?<!->)[A-Za-z_]\w*", text)) - set(STATIC.findall(text))
        for word in words & home.keys():
            if home[word] != path:
                uses[path].setdefault(home[word], set()).add(word)
    return uses


def levels(uses: dict[str, dict[str, set[str]]]) -> list[list[str]]:
    """Files that use nothing, then those that use only these, ...; files on a circle, or
    above one, are in none.
    """
    done, out = set(), []
    while ready := sorted(path for path in uses if path not in done and uses[path].keys() <= done):
        out.append(ready)
        done |= set(ready)
    return out


def test_no_circle_between_c_files(tmp_path):
    files = {str(p.relative_to(ROOT / "csrc")): p.read_text() for p in c_files()}
    uses = uses_between_files(preprocessed(files, tmp_path))
    assert (
        "ops/attention.c" in uses["reference/calls.c"] and "base/error.c" in uses["gpu/check.c"]
    ), "uses through macros are seen"
    stuck = uses.keys() - {path for level in levels(uses) for path in level}
    assert not stuck, {
        path: {to: sorted(names) for to, names in uses[path].items() if to in stuck}
        for path in sorted(stuck)
    }


def test_a_circle_between_c_files_is_found(tmp_path):
    files = {
        "a.h": "#define CALL(x) b_##x()\nint a_one(void);\n",
        "low.c": "int low(void)\n{\n    return 0;\n}\n",
        "a.c": '#include "a.h"\nint a_one(void) {\n    return CALL(two) + low();\n}\n',
        "b.c": '#include "a.h"\nint b_two(void) {\n    return a_one();\n}\n',
    }
    uses = uses_between_files(preprocessed(files, tmp_path))
    assert uses == {
        "low.c": {},
        "a.c": {"b.c": {"b_two"}, "low.c": {"low"}},
        "b.c": {"a.c": {"a_one"}},
    }
    assert levels(uses) == [["low.c"]]


def test_only_gpu_knows_vulkan():
    found = []
    for path in c_files():
        if room(path) != "gpu" and (
            words := re.findall(
                r"\b(?:Vk[A-Z]\w+|vk[A-Z]\w+\s*\(|VK_[A-Z]\w+|volk\w+\s*\(|<vulkan/[^>]+>|volk\.h)",
                without_comments(path),
            )
        ):
            found.append(f"{path.relative_to(ROOT)}: {words[0]}")
    assert not found


def test_only_python_knows_python():
    found = []
    for path in c_files():
        if room(path) != "python" and (
            words := re.findall(r"<Python\.h>|\bPy[A-Z]\w*_\w+|\bnumpy/", without_comments(path))
        ):
            found.append(f"{path.relative_to(ROOT)}: {words[0]}")
    assert not found


def test_names_and_sizes():
    sources = tracked(
        "csrc/*", "shaders/*", "python/*.py", "tests/*.py", "tools/*", "cmake/*", "benchmarks/*.py"
    )
    vague = [p for p in sources if re.fullmatch(r"utils?|helpers?|misc|stuff|common", p.stem)]
    assert not vague, "a file is named after what it owns"
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources
        if p.suffix in (".c", ".h", ".comp", ".glsl", ".py", ".sh")
        and (n := len(p.read_text().splitlines())) > 600
    }
    assert not long, "files stay under about 600 lines"


def test_nothing_of_others_is_copied():
    names = {p.name for p in tracked()}
    assert not names & {
        "volk.c",
        "volk.h",
        "vulkan_core.h",
        "vk_mem_alloc.h",
        "cJSON.c",
        "stb_image.h",
    }
    assert not [
        p for p in tracked() if p.suffix in (".spv", ".so", ".whl", ".gguf", ".deb", ".a", ".o")
    ]


def test_every_environment_variable_is_documented():
    page = (ROOT / "docs/environment.md").read_text()
    used = {}
    for path in tracked(
        "csrc/*", "python/*.py", "setup.py", "CMakeLists.txt", "Makefile", "tools/*"
    ):
        text = path.read_text(errors="replace")
        names = re.findall(
            r'getenv\(\s*"(\w+)"|environ(?:\.get|\.setdefault|\.pop)?\s*[\[(]\s*["\'](\w+)', text
        )
        names = [a or b for a, b in names] + re.findall(r'["\'](VKSTEER_[A-Z_]+)["\']', text)
        for name in names:
            used.setdefault(name, path.relative_to(ROOT))
    missing = {name: str(path) for name, path in used.items() if f"`{name}`" not in page}
    assert not missing, "read by the code, not in docs/environment.md"


# --- kernels --------------------------------------------------------------------------------------


def test_every_shader_has_a_row_and_every_row_a_shader():
    files = {p.stem for p in tracked("shaders/*.comp")}
    assert {row.file for row in ROWS} == files


def test_every_shader_include_is_used():
    text = "".join(p.read_text() for p in tracked("shaders/*"))
    assert not [p.name for p in tracked("shaders/include/*") if f'"{p.name}"' not in text]


@pytest.fixture(scope="session")
def params_sizes(tmp_path_factory) -> dict[str, int]:
    """Sizeof of every row's argument block, as the C compiler sees it."""
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
    """Bytes of a module's push-constant block, from its types and decorations."""
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
def test_argument_block_is_what_c_fills(row, params_sizes):
    path = SPIRV / f"{row.name}.spv"
    assert path.exists(), "not built: `make build` first"
    data = path.read_bytes()
    if not data and row.optional:
        left_out = (ROOT / "build/generated/kernels_left_out.txt").read_text().split()
        assert (
            row.name in left_out
            and not json.loads((ROOT / ".tools/env.json").read_text())["glslc_next"]
        ), "this machine has a compiler for it"
        pytest.skip(
            "optional: neither compiler of this distribution builds it, and the build said so"
        )
    in_c, in_glsl = params_sizes[row.name], push_constant_size(data)
    assert in_c <= 128, "the strictest driver offers 128 bytes of push constants"
    # C may end in padding
    assert in_c - 8 < in_glsl <= in_c, f"{row.params} has {in_c} bytes in C and {in_glsl} in GLSL"
    assert in_c == (in_glsl + 7) // 8 * 8 or in_c == in_glsl


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
            )
            assert done.returncode == 0, f"{row.name}: {done.stdout}{done.stderr}"


# What no kernel may ask of a device (design: the baseline), but for the rows whose define says so:
# those are chosen behind the feature's bit.
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
    assert asked, "no module: its shader asks for nothing"
    allowed = set().union(*(what for define, what in ALLOWED.items() if f"-D{define}" in row.flags))
    assert not asked - {None} - allowed


# --- what the build makes -------------------------------------------------------------------------


def test_optional_row_is_left_out_loudly(tmp_path):
    """A kernel that the compiler cannot build becomes an empty module and a warning; a required
    one stops the build.
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
    )
    assert done.returncode == 0 and "WARNING: optional kernel k left out" in done.stdout
    assert (tmp_path / "k.spv").read_bytes() == b""
    (tmp_path / "t.def").write_text('KERNEL_OPTIONAL(k, broken, "A=1 -O0", some_params)\n')
    assert kernels.read(tmp_path / "t.def")[0].flags == ["-DA=1", "-O0"]
    (tmp_path / "spirv").mkdir()
    shutil.move(tmp_path / "k.spv", tmp_path / "spirv/k.spv")
    kernels.embed(tmp_path / "t.def", tmp_path)
    assert "spirv_k_size = 0" in (tmp_path / "kernels_spirv.c").read_text()
    assert (tmp_path / "kernels_left_out.txt").read_text() == "k\n"


@pytest.mark.parametrize(
    "bad", ['KERNEL(a, b, "", c) KERNEL(a', 'KERNEL(a, b, "", c)\nKERNEL(a, b, "", c)', "hello"]
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
    done = subprocess.run([bin / "cmake", "--build", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0 and "warning:" not in done.stdout, done.stdout[-4000:]


@pytest.mark.long
def test_wheel(tmp_path):
    """One abi3 wheel, the SPIR-V inside, small, and it imports from where it was unpacked."""
    source = tmp_path / "source"  # a copy: setuptools leaves traces where it builds
    for path in tracked():
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / path.relative_to(ROOT))
    os.symlink(ROOT / ".tools", source / ".tools")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            source,
        ],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"vksteer-[\w.]+-cp311-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        assert [n for n in names if n.endswith(".so")] == ["vksteer/_engine.abi3.so"]
        assert z.read("vksteer/_engine.abi3.so").count(b"\x03\x02\x23\x07") >= len(ROWS) - 1
        assert not [
            n for n in names if n.startswith("vksteer/") and n.endswith((".c", ".comp", ".h"))
        ]
        size = sum(i.compress_size for i in z.infolist() if "/models/" not in i.filename)
        z.extractall(tmp_path / "unpacked")
    assert size < 3e6
    subprocess.run([Path(sys.executable).parent / "abi3audit", "--strict", wheel], check=True)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'unpacked')!r}); import vksteer._engine as"
        " e; print(e.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert str(tmp_path) in out
