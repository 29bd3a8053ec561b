#!/usr/bin/env bash
# Sees to it that the C++ tests find GoogleTest and says which one they will use:
# the installed one, else the system package where we may install it, else a copy fetched by CMake.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/common.sh

# The same question that find_package(GTest) asks: headers and a library to link.
have_gtest() {
  local folder status=0
  folder=$(mktemp -d)
  printf '#include <gtest/gtest.h>\nint main() { return 0; }\n' >"$folder/probe.cpp"
  "${CXX:-c++}" -std=c++17 "$folder/probe.cpp" -o "$folder/probe" -lgtest -pthread \
    >/dev/null 2>&1 || status=1
  rm -rf "$folder"
  return "$status"
}

if have_gtest; then
  say "GoogleTest: using the one installed on this system"
elif can_apt && apt_install libgtest-dev && have_gtest; then
  say "GoogleTest: installed the system package libgtest-dev"
else
  say "GoogleTest: not on this system; CMake fetches a copy into the build folder (needs network)"
fi
