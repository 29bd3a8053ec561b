#!/usr/bin/env bash
# Builds, tests and measures the CUDA backend on a GPU machine that has torch, nvcc, cmake and ninja,
# without network and without pip. A failed stage stops no other but those that need the build; each
# has a time limit and a log in OUTPUT_DIR; all limits together are below ten minutes. A table comes last.
# The status is 0 if no stage failed.
#
#   scripts/gpu_check.sh [--smoke] [--only STAGE,...] OUTPUT_DIR
#
#   --smoke   for a machine without a GPU: stages that need one are skipped, the others run on the
#             CPU in little, with the extension that is built already
#   --only    run these stages alone; the names are those of the table
#
# PYTHON            interpreter with torch (default python3)
# JOBS              parallel compiler runs (default all cores)
# SKV_GPU_WEIGHTS   what scripts/gpu/gpu_weights.sh unpacked: an entry of PYTHONPATH with the weights
# SKV_GPU_LIMITS    other time limits in seconds, such as "build=300 gpu-tests=60"
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
smoke=0 only="" out=""
usage="usage: scripts/gpu_check.sh [--smoke] [--only STAGE,...] OUTPUT_DIR"
while [ "$#" -gt 0 ]; do
  case "$1" in
    --smoke) smoke=1 ;;
    --only)
      [ -n "$(printf '%s' "${2:-}" | tr -d ', ')" ] || die "$usage"
      only=$2
      shift
      ;;
    -*) die "$usage" ;;
    *)
      [ -z "$out" ] || die "$usage"
      out=$1
      ;;
  esac
  shift
done
[ -n "$out" ] || die "$usage"
out=$(absolute "$out")
[ -z "${SKV_GPU_WEIGHTS:-}" ] || SKV_GPU_WEIGHTS=$(absolute "$SKV_GPU_WEIGHTS")
[ -d "${SKV_GPU_WEIGHTS:-/}" ] || die "SKV_GPU_WEIGHTS: expected a folder, got '$SKV_GPU_WEIGHTS'"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

python=${PYTHON:-python3}
export PYTHONPATH="$PWD/python:$PWD${SKV_GPU_WEIGHTS:+:$SKV_GPU_WEIGHTS}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export STATEFUL_KV_CACHE_DIR="${STATEFUL_KV_CACHE_DIR:-$out/cache}"

# Seconds; together at most 570.
declare -A limits=(
  [environment]=10 [build]=125 [cpu-tests]=25 [gpu-tests]=95 [memcheck]=35 [racecheck]=35
  [synccheck]=15 [bits]=20 [bench-attention]=40 [bench-splits]=30 [bench-flex]=35 [bench-model]=45
  [bench-workflow]=60
)
stages=(environment build cpu-tests gpu-tests memcheck racecheck synccheck bits
  bench-attention bench-splits bench-flex bench-model bench-workflow)
for limit in ${SKV_GPU_LIMITS:-}; do
  [[ "$limit" =~ ^([a-z-]+)=([1-9][0-9]*)$ && -n "${limits[${BASH_REMATCH[1]}]:-}" ]] ||
    die "SKV_GPU_LIMITS: expected STAGE=SECONDS, got '$limit' (stages: ${stages[*]})"
  limits[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
done
for stage in ${only//,/ }; do
  [ -n "${limits[$stage]:-}" ] || die "--only: no stage '$stage' (stages: ${stages[*]})"
done

mkdir -p "$out" || die "$out: cannot be made"
: >"$out/table.txt" || die "$out: cannot be written to"

table=() failures=0 child="" ran=" "
# `timeout` gives a stage a process group of its own, which Ctrl-C does not reach: so this script
# ends the running stage itself.
interrupted() { # interrupted SIGNAL STATUS
  [ -z "$child" ] || { kill -TERM "$child" && wait "$child"; } 2>/dev/null
  printf '%s\n' "${table[@]}" "interrupted by $1" | tee "$out/table.txt"
  exit "$2"
}
trap 'interrupted SIGINT 130' INT
trap 'interrupted SIGTERM 143' TERM
trap 'interrupted SIGHUP 129' HUP
note() { # note STAGE STATUS SECONDS REASON
  table+=("$(printf '%-16s %-8s %5s s  %s' "$1" "$2" "$3" "$4")")
  say "${table[-1]}"
  [ "$2" != FAILED ] || failures=$((failures + 1))
}
has_run() { [[ "$ran" == *" $1 "* ]]; } # now: OUTPUT_DIR may hold logs of earlier runs
wanted() { [ -z "$only" ] || [[ ",$only," == *",$1,"* ]]; }

# Of a failed stage the first errors and the end of its log are shown above the table.
run_stage() { # run_stage STAGE SIGNAL COMMAND...
  local stage=$1 signal=$2 begin=$SECONDS status
  shift 2
  timeout --signal="$signal" --kill-after=5 "${limits[$stage]}" "$@" >"$out/$stage.log" 2>&1 </dev/null &
  child=$! ran+="$stage "
  wait "$child"
  status=$?
  child=""
  case "$status" in
    0) note "$stage" passed "$((SECONDS - begin))" "" ;;
    124 | 137) note "$stage" FAILED "$((SECONDS - begin))" "cut at its limit of ${limits[$stage]} s" ;;
    *) note "$stage" FAILED "$((SECONDS - begin))" "status $status, see $stage.log" ;;
  esac
  if [ "$status" -ne 0 ]; then
    { grep -i -m 6 -E '\berrors?\b' "$out/$stage.log" && echo ...; tail -n 12 "$out/$stage.log"; } |
      cut -c1-180 | sed 's/^/    | /'
  fi
  return "$status"
}

missing_modules() { # missing_modules NAME...: those that cannot be found
  "$python" -c 'import sys
from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if find_spec(name) is None])' "$@" 2>/dev/null || printf '%s' "$*"
}

find_sanitizer() {
  if command -v compute-sanitizer; then return; fi
  local folder
  for folder in "$(dirname "$(find_nvcc)")" /usr/local/cuda/bin; do
    [ ! -x "$folder/compute-sanitizer" ] || { printf '%s\n' "$folder/compute-sanitizer" && return; }
  done
}

# Why stages cannot run; empty where they can.
gpu_missing="" build_missing=""
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
[[ "$capability" =~ ^[0-9]+\.[0-9]+$ ]] || gpu_missing="nvidia-smi names no GPU"

environment() {
  say "GPU: $(nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total --format=csv,noheader 2>&1 | head -n 1)"
  say "nvcc: $("$(find_nvcc)" --version 2>&1 | sed -n 's/.*\(release [0-9.]*\).*/\1/p')"
  say "compute-sanitizer: $(find_sanitizer)"
  say "cmake: $(cmake --version 2>&1 | head -n 1); ninja: $(ninja --version 2>&1 | head -n 1)"
  say "compiler: $("${CXX:-c++}" --version 2>&1 | head -n 1)"
  "$python" -c 'import platform, torch
print("python", platform.python_version(), "torch", torch.__version__, "cuda", torch.version.cuda)' || return 1
  local lacking
  lacking=$(missing_modules numpy pytest pytest_timeout hypothesis gguf jinja2 tokenizers)
  say "python packages that are missing: ${lacking:-none}"
}

build() {
  local archs=${capability/./}
  [ "$archs" != 90 ] || archs=90a # with the instructions that only Hopper has
  CUDACXX=$(find_nvcc) PYTHON="$python" MAX_JOBS="${JOBS:-$(nproc)}" STATEFUL_KV_CUDA=ON STATEFUL_KV_WERROR=OFF \
    STATEFUL_KV_CUDA_ARCHS="$archs" scripts/dev_build.sh
}

# Tests need pytest, its plugins that pyproject.toml configures, and hypothesis.
pytest_stage() { # pytest_stage STAGE ARGUMENTS...
  local stage=$1 lacking parallel=()
  shift
  lacking=$(missing_modules numpy pytest pytest_timeout hypothesis)
  if [ -n "$lacking" ]; then
    note "$stage" FAILED 0 "python packages that are missing: $lacking"
    return 1
  fi
  [ -n "$(missing_modules xdist)" ] || parallel=(-n "$(nproc | awk '{ print ($1 < 8) ? $1 : 8 }')")
  # With SIGINT pytest still reports which tests failed when the stage is cut at its limit.
  run_stage "$stage" INT "$python" -m pytest -q -p no:cacheprovider --continue-on-collection-errors \
    ${parallel[@]+"${parallel[@]}"} "$@"
}

sanitize() { # sanitize STAGE
  local tool options=()
  tool=$(find_sanitizer)
  if [ -z "$tool" ]; then
    note "$1" FAILED 0 "compute-sanitizer not found (looked at PATH and beside nvcc)"
    return 1
  fi
  # Each tensor an allocation of its own, so that reads beyond its end are seen.
  # torch asks the driver for features that may be missing; such answers are no errors of ours.
  [ "$1" != memcheck ] || options=(--report-api-errors no)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_stage "$1" TERM "$tool" --tool "$1" --error-exitcode 9 \
    ${options[@]+"${options[@]}"} "$python" scripts/gpu/gpu_ops_once.py
}

bench() { # bench STAGE SUITE ARGUMENTS...
  local stage=$1 suite=$2 json=$out/gpu_${1#bench-}.json
  shift 2
  [ ! -e "$json" ] || mv -f "$json" "$json.before" # an earlier run's result must not pass for this run's
  run_stage "$stage" TERM "$python" -m bench run "$suite" "${device_args[@]}" "$@" --out "$json"
}

cpu_selection=(tests/bindings tests/ops/test_paged_attention.py tests/ops/test_row_ops.py
  tests/ops/test_quantized_linear.py -m "not cuda and not slow")
device_args=(--device cuda)
if [ "$smoke" -eq 1 ]; then
  cpu_selection=(tests/ops/test_registration.py)
  device_args=(--device cpu --smoke)
fi

skip_reason() { # skip_reason STAGE: why it cannot run; nothing where it can
  case "$smoke $1" in
    ?" environment") return ;;
    "1 build") say "--smoke takes the extension that is there" && return ;;
    "1 gpu-tests" | 1\ *check) say "${gpu_missing:---smoke uses no GPU}" && return ;;
    1*) return ;;
  esac
  if [ -n "$gpu_missing" ]; then
    say "$gpu_missing"
  elif [ "$1" != bits ]; then # `bits` uses torch alone, not our build
    printf '%s' "$build_missing"
  fi
}

run_by_name() { # run_by_name STAGE
  case "$1" in
    environment)
      run_stage environment TERM bash -c 'python=$0 && environment' "$python"
      # Without a GPU nothing is checked, so that passes in a smoke run only.
      [ -z "$gpu_missing" ] || [ "$smoke" -eq 1 ] || note GPU FAILED 0 "$gpu_missing"
      ;;
    build) run_stage build TERM bash -c build || build_missing="the build failed" ;;
    cpu-tests) pytest_stage cpu-tests "${cpu_selection[@]}" ;;
    # Tests switch deterministic algorithms on, for which torch needs a fixed cuBLAS workspace.
    gpu-tests) SKV_REQUIRE_CUDA=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 pytest_stage gpu-tests tests -m cuda ;;
    memcheck | racecheck | synccheck) sanitize "$1" ;;
    bits) run_stage bits TERM "$python" scripts/gpu/gpu_bits.py "${device_args[@]}" --out "$out/bits.json" ;;
    bench-attention) bench "$1" gpu_attention --peer decode_step,not_shared,torch_sdpa,flashinfer ;;
    bench-splits) bench "$1" gpu_attention --peer own_splits,own_wgmma ;;
    # Only two cases, because each takes a run of the compiler.
    bench-flex) bench "$1" gpu_attention --only decode_32x4k,extend_512 --peer flex_attention ;;
    bench-model) bench "$1" gpu_model ;;
    # The other workflows take minutes, because `transformers` launches each kernel separately.
    bench-workflow) bench "$1" gpu_workflow --only coding35,demo ;;
  esac
}

export python capability
export -f environment build say find_nvcc find_sanitizer missing_modules
for stage in "${stages[@]}"; do
  wanted "$stage" || continue
  reason=$(skip_reason "$stage")
  if [ -n "$reason" ]; then note "$stage" SKIPPED 0 "$reason"; else run_by_name "$stage"; fi
done

say ""
say "=== figures"
! has_run bits || grep 'equal for' "$out/bits.log" | cut -c1-110
for name in attention splits flex model workflow; do
  ! has_run "bench-$name" || grep ' vs ' "$out/bench-$name.log" | cut -c1-150
done
say ""
say "=== targets"
results=()
for name in attention model workflow; do
  ! has_run "bench-$name" || [ ! -s "$out/gpu_$name.json" ] || results+=("$out/gpu_$name.json")
done
if [ "${#results[@]}" -gt 0 ]; then
  timeout 30 "$python" -m bench targets "${results[@]}" 2>&1 | cut -c1-150
fi
{
  say ""
  say "=== stages"
  printf '%s\n' "${table[@]}"
  if [ "$failures" -eq 0 ]; then say "no stage failed, $SECONDS s"; else say "$failures FAILED, $SECONDS s"; fi
} | tee "$out/table.txt"
[ "$failures" -eq 0 ]
