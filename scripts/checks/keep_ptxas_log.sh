#!/usr/bin/env bash
# A compiler launcher for CMake: runs nvcc with its arguments and keeps what the assembler says of the
# kernels (-Xptxas -v) as OBJECT.log. So an object that is up to date still has its log, for
# scripts/checks/cuda_report.py. Everything else the compiler says is passed on.
set -u
object=""
previous=""
for argument in "$@"; do
  if [ "$previous" = -o ]; then object=$argument; fi
  previous=$argument
done
if [ -z "$object" ]; then exec "$@"; fi

said=$("$@" 2>&1)
status=$?
if [ "$status" -ne 0 ]; then
  rm -f "$object.log"
  printf '%s\n' "$said" >&2
  exit "$status"
fi
printf '%s\n' "$said" >"$object.log"
grep -vE '^ptxas info|^ *[0-9]+ bytes (stack frame|gmem)|^ *Function properties|^$' "$object.log" >&2
exit 0
