#!/usr/bin/env bash
# Gives a wheel the tag of the oldest platform that it runs on. The libraries of torch stay outside;
# any other that would have to be copied into the wheel is a mistake.
#
#   scripts/repair_wheel.sh WHEEL FOLDER
#
# AUDITWHEEL_PLAT  the newest platform allowed, such as manylinux_2_28_x86_64; images for building
#                  wheels set it. Symbols that are newer are an error.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
[ "$#" -eq 2 ] || die "usage: scripts/repair_wheel.sh WHEEL FOLDER"
auditwheel repair "$1" --wheel-dir "$2" --exclude 'libtorch*.so*' --exclude 'libc10*.so*' \
  --exclude 'libcudart.so*' --exclude 'libshm*.so*'
for wheel in "$2"/*.whl; do
  copied=$(python3 -c 'import sys, zipfile
print(*[n for n in zipfile.ZipFile(sys.argv[1]).namelist() if ".libs/" in n])' "$wheel")
  [ -z "$copied" ] || die "$wheel: expected no library but ours, got copies: $copied"
done
