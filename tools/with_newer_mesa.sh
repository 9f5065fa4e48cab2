#!/bin/bash
# Runs a command on the newer Mesa that `tools/setup.sh test` unpacks, whose software driver has
# cooperative matrices, with subgroups of 8 (the only size that works there).
#
#   tools/with_newer_mesa.sh python -m pytest tests/test_ops.py
#   tools/with_newer_mesa.sh .venv/bin/vksteer verify
#
# The driver needs its own C library, so a process that loads it has to be started through the
# unpacked dynamic loader. `python`, the Python of .venv and the scripts in .venv/bin are; so are
# their children, since sys.executable names a script that does it. Other programs run as they are,
# with that `python` first in PATH.
set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
NEWER=$ROOT/.tools/mesa-next

(( $# )) || { echo "usage: $0 COMMAND ARGUMENT..." >&2; exit 2; }
[[ -x $NEWER/python/bin/python ]] ||
    { echo "$0: no newer Mesa in .tools/mesa-next: run tools/setup.sh test" >&2; exit 1; }

export VK_DRIVER_FILES=$NEWER/vksteer_lvp.json
export VK_ICD_FILENAMES=$VK_DRIVER_FILES
export LP_NATIVE_VECTOR_WIDTH=256   # 128: no cooperative matrices; 512: the driver crashes
export MESA_SHADER_CACHE_DIR=${VKSTEER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vksteer}/mesa-next
export PATH=$NEWER/python/bin:$PATH

program=$(command -v -- "$1" || true)
if [[ $(basename -- "$1") =~ ^python[0-9.]*$ ]]; then
    shift
    exec python "$@"
elif [[ $program == *.venv/bin/* && $(head -c 200 "$program" | tr -d "\0") == "#!"*python* ]]; then
    shift
    exec python "$program" "$@"
fi
exec "$@"
