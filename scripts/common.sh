# Helpers shared by the scripts of this folder. Source it; it runs nothing by itself.
# shellcheck shell=bash

say() { printf '%s\n' "$*"; }
die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

absolute() {
  case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$PWD" "$1" ;;
  esac
}

# Prints the path of the CUDA compiler; nothing where there is none.
find_nvcc() {
  if [ -n "${CUDACXX:-}" ]; then
    printf '%s\n' "$CUDACXX"
  elif ! command -v nvcc && [ -x /usr/local/cuda/bin/nvcc ]; then
    printf '%s\n' /usr/local/cuda/bin/nvcc
  fi
}

# True where the script may install system packages without asking anybody.
can_apt() { [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; }

apt_updated=0
apt_install() {
  say "apt-get install: $*"
  if [ "$apt_updated" -eq 0 ]; then
    apt-get update -qq
    apt_updated=1
  fi
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

# Half-built trees must not be mistaken for finished ones, so a step writes its stamp last, and the
# stamp holds a hash of everything the step depends on.
stamp_is() { [ -f "$VENV/.stamps/$1" ] && [ "$(cat "$VENV/.stamps/$1")" = "$2" ]; }
stamp_set() {
  mkdir -p "$VENV/.stamps"
  printf '%s\n' "$2" >"$VENV/.stamps/$1"
}
