#!/usr/bin/env bash
# Builds the CUDA kernels as plain C++ in build/emulation: libskv_emulated.so, which makes them the
# kernels of CPU tensors when it is loaded, and a test of the emulator. Needs torch, no CUDA.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh
python=${PYTHON:-$(absolute "${VENV:-.venv}")/bin/python}
command -v "$python" >/dev/null || die "PYTHON: '$python' not found; it has to import torch"
python=$(command -v "$python")
export PATH="$(dirname "$python"):$PATH" # cmake and ninja of the environment
build=build/emulation
mkdir -p "$build"
exec 9>"$build/lock"
flock 9
torch_dir=${STATEFUL_KV_TORCH_DIR:-$("$python" -c \
  "from importlib.util import find_spec as f; print(f('torch').submodule_search_locations[0])")}
cmake -S tests/emulation -B "$build" -G Ninja "-DSTATEFUL_KV_TORCH_DIR=$torch_dir" \
  "-DSTATEFUL_KV_WERROR=${WERROR:-OFF}" >"$build/configure.log" 2>&1 || {
  cat "$build/configure.log" >&2
  die "the configure step of the CUDA emulation failed"
}
cmake --build "$build" --parallel "${MAX_JOBS:-$(nproc)}"
say "CUDA emulation: $PWD/$build/libskv_emulated.so"
