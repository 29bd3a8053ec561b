#!/usr/bin/env bash
# Compiles the CUDA kernels for sm_80 and sm_90, and the CUDA bindings against torch's headers.
# A check only: nothing is linked or run, so no GPU is needed. It fails if a kernel spills registers
# or if docs/cuda-kernels.md lists other kernels than were compiled.
# Without nvcc it says so and succeeds; SKV_REQUIRE_NVCC=1 turns that into a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/common.sh
VENV=$(absolute "${VENV:-.venv}")
export PATH="$VENV/bin:$PATH"

nvcc=$(find_nvcc)
if [ -z "$nvcc" ]; then
  [ "${SKV_REQUIRE_NVCC:-0}" != 1 ] || die "nvcc not found and SKV_REQUIRE_NVCC=1"
  say "CUDA compile check: SKIPPED, nvcc not found (looked at CUDACXX, PATH, /usr/local/cuda/bin)"
  exit 0
fi

say "CUDA compile check: $nvcc, $("$nvcc" --version | sed -n 's/.*\(release [0-9.]*\).*/\1/p')"
build=build/cuda-check
torch_dir=${STATEFUL_KV_TORCH_DIR:-$(python3 -c \
  'import importlib.util as u; s = u.find_spec("torch"); print(s.submodule_search_locations[0] if s else "")')}
[ -n "$torch_dir" ] || say "CUDA compile check: no torch in $VENV, the CUDA bindings are left out"

mkdir -p "$build"
cmake -S . -B "$build" -G Ninja -DSTATEFUL_KV_TORCH=OFF "-DSTATEFUL_KV_TORCH_DIR=$torch_dir" \
  -DCMAKE_CUDA_COMPILER="$nvcc" -DSTATEFUL_KV_CUDA=AUTO "-DSTATEFUL_KV_CUDA_ARCHS=80;90a" \
  "-DSTATEFUL_KV_WERROR=${WERROR:-OFF}" >"$build/configure.log" 2>&1 || {
  cat "$build/configure.log" >&2
  die "the configure step of the CUDA compile check failed"
}
cmake --build "$build" --target cuda_check --parallel "${JOBS:-$(nproc)}"
python3 scripts/checks/cuda_report.py --build "$build" --check docs/cuda-kernels.md
say "CUDA compile check: passed for sm_80 and sm_90, no kernel spills"
