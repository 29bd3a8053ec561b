#!/usr/bin/env bash
# Builds the extension in build/dev and puts it beside the Python sources: the quick inner loop.
# Needs cmake, ninja and a compiler, no pip. PYTHON, MAX_JOBS and the variables STATEFUL_KV_* of
# docs/building.md are obeyed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
python=$(command -v "$python") || { echo "error: ${PYTHON:-.venv/bin/python}: no such interpreter" >&2; exit 1; }
mkdir -p build
exec 9>build/dev.lock
flock 9
torch_dir=$("$python" -c "from importlib.util import find_spec as f; print(f('torch').submodule_search_locations[0])")
# What an earlier build was told is forgotten.
options=("-USTATEFUL_KV_*" -DSTATEFUL_KV_WERROR="${STATEFUL_KV_WERROR:-ON}")
[ -z "${STATEFUL_KV_CUDA:-}" ] || options+=(-DSTATEFUL_KV_CUDA="$STATEFUL_KV_CUDA")
[ -z "${STATEFUL_KV_CUDA_ARCHS:-}" ] || options+=(-DSTATEFUL_KV_CUDA_ARCHS="$STATEFUL_KV_CUDA_ARCHS")
cmake -S . -B build/dev -G Ninja "${options[@]}" -DPython3_EXECUTABLE="$(cd "$(dirname "$python")" && pwd)/$(basename "$python")" \
  -DSTATEFUL_KV_TORCH_DIR="$torch_dir" >build/dev-configure.log \
  || { cat build/dev-configure.log; exit 1; }
cmake --build build/dev --target _C -j "${MAX_JOBS:-2}"
cmake --install build/dev --component python --prefix python >/dev/null
