"""The architecture: what lies at the top of the tree, which C module includes which, which one
knows Vulkan or Python, names of files, documented environment variables. Needs no device.

test_imports.py does the same for the Python packages.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from source_tree import ROOT, tracked

sys.path.insert(0, str(ROOT / "tools"))
import lint

#: Top to bottom. A module includes only itself and modules before it.
MODULES = ["base", "gpu", "ops", "reference", "model", "run", "analysis", "python"]

#: What must lie at the top of the tree.
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
#: What may lie there, too.
ALSO = {
    "MANIFEST.in",
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
    ".git-blame-ignore-revs",
    ".clang-format",
    ".editorconfig",
    ".pre-commit-config.yaml",
}


def without_comments(path: Path) -> str:
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", path.read_text(), flags=re.S)


def c_files() -> list[Path]:
    return tracked("csrc/*.c", "csrc/*.h", "csrc/*.def")


def module(path: Path) -> str:
    return path.relative_to(ROOT / "csrc").parts[0]


def test_top_level():
    # Only what git tracks: results of a demo may lie about.
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    top = {line.split("/")[0] for line in listed.stdout.splitlines()}
    assert not TOP_LEVEL - top, "missing at the top of the tree"
    stray = sorted(top - TOP_LEVEL - ALSO)
    assert not stray, f"{stray} at the top is neither in TOP_LEVEL nor in ALSO, and git knows it"


def test_modules_are_known():
    assert not {module(p) for p in c_files()} - set(MODULES)


def test_includes_go_downward():
    upward = []
    for path in c_files():
        for target in re.findall(r'#\s*include\s+"([^"]+)"', without_comments(path)):
            there = target.split("/")[0] if "/" in target else module(path)
            assert not target.startswith("."), (
                f"{path}: includes are written from csrc/, not relative: {target}"
            )
            if there in MODULES and MODULES.index(there) > MODULES.index(module(path)):
                upward.append(f"{path.relative_to(ROOT)} includes {target}")
    assert not upward


# What a C file defines for others: functions and objects at the left margin that are not static.
DEFINITION = re.compile(
    r"^(?!static\b|typedef\b|extern\b)[A-Za-z_][\w"
    r" \t*]*?\b(\w+)(?:\([^;{}]*\)\s*\{|(?:\[[^\]\n]*\])?\s*=)",
    re.M,
)
STATIC = re.compile(r"^static\b[^;={]*?\b(\w+)\s*(?:\(|\[|=)", re.M)


#: Headers that the build makes.
MADE = r"(?:kernels_spirv|kernel_table|op_fields)\.h"


def preprocessed(files: dict[str, str], folder: Path) -> dict[str, str]:
    """The .c files (path under csrc/ -> text) with macros expanded, without what their headers
    bring and without system headers.
    """
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(
            re.sub(rf"^[ \t]*#\s*include\s*(<.*>|\"{MADE}\").*$", "", text, flags=re.M)
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
        lines, inside = [], []  # files that are being read, the innermost last
        for line in done.stdout.splitlines():
            if marker := re.match(r'# \d+ "([^"]*)"((?: \d)*)', line):
                if "1" in marker[2].split():
                    inside.append(marker[1])
                else:
                    inside = [*inside[: -1 - ("2" in marker[2].split())], marker[1]]
            elif inside[0] == str(folder / name) and all(f.endswith(".def") for f in inside[1:]):
                lines.append(line)  # of the file itself, or of a table that it includes
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


@pytest.fixture(scope="module")
def c_sources(tmp_path_factory) -> dict[str, str]:
    """Every .c file (path under csrc/ -> text) as `preprocessed` returns it."""
    files = {str(p.relative_to(ROOT / "csrc")): p.read_text() for p in c_files()}
    return preprocessed(files, tmp_path_factory.mktemp("c"))


def test_what_only_one_c_file_uses_is_static(c_sources):
    files = uses_between_files(c_sources).values()
    used = {name for names_of in files for names in names_of.values() for name in names}
    defined = {name for text in c_sources.values() for name in DEFINITION.findall(text)}
    assert len(used) > 100, "uses are seen"
    assert defined - used == {"PyInit__engine"}, "make these static, or remove them"


def test_no_circle_between_c_files(c_sources):
    uses = uses_between_files(c_sources)
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
        if module(path) != "gpu" and (
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
        if module(path) != "python" and (
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
        and (n := len(p.read_text().splitlines())) > lint.FILE_LINES
    }
    assert not long, f"a file has at most {lint.FILE_LINES} lines"


@pytest.mark.parametrize(
    ("file", "functions"),
    [
        ("csrc/run/attention.c", ("queries_keys_values", "rotate")),
        ("csrc/run/mlp.c", ("activation",)),
    ],
)
def test_a_fused_kernel_passes_over_no_site(file, functions):
    """Every site that the separate kernels visit lies between the two that step_fusable is given,
    in the order of sites.def.
    """
    order = re.findall(r"^SITE\((\w+),", (ROOT / "csrc/run/sites.def").read_text(), re.M)
    text = (ROOT / file).read_text()
    bodies = "".join(
        re.search(rf"^static int {name}\(.*?^}}\n", text, re.S | re.M)[0] for name in functions
    )
    ((first, last),) = re.findall(r"step_fusable\(work, SITE_(\w+), SITE_(\w+), l\)", bodies)
    visited = set(re.findall(r"step_visit(?:_normed)?\(work, SITE_(\w+),", bodies))
    for norm in re.findall(r"norm_step_of\(work->model, (\w+), l\)", bodies):
        visited |= {f"{norm}_SCALE", f"{norm}_NORMALIZED"}
    assert visited == set(order[order.index(first) : order.index(last) + 1])


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
