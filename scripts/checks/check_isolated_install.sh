#!/usr/bin/env bash
# pip install with build isolation into a throwaway environment: setup.py must find the torch of
# that environment from inside pip's build environment, which hides it. Twice, because the build
# folder is kept and pip's build environment (with its cmake and ninja) is not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/common.sh
VENV=$(absolute "${VENV:-.venv}")
# The folder that the editable install compiled in: only what differs is built again.
export STATEFUL_KV_BUILD_DIR=${STATEFUL_KV_BUILD_DIR:-$PWD/build/extension}
unset STATEFUL_KV_TORCH_DIR PYTHONPATH # nothing may help setup.py to find torch
export PIP_DISABLE_PIP_VERSION_CHECK=1

source_dir=$PWD
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
target=$folder/venv
"$VENV/bin/python" -m venv "$target"
site_packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
# A path line makes torch and the other dependencies visible; .pth files over there (that of the
# editable install is one) have no effect here.
site=$(site_packages "$target/bin/python")
site_packages "$VENV/bin/python" >"$site/borrowed.pth"

for round in first second; do
  # Away from the sources: the first entry of sys.path must not be what finds a package.
  (cd "$folder" && "$target/bin/python" -m pip install --quiet --no-deps --ignore-installed \
    "$source_dir") || die "the $round installation with build isolation failed"
done

cd "$folder"
"$target/bin/python" - "$site" <<'PYTHON'
import sys
from pathlib import Path

import stateful_kv

site = Path(sys.argv[1]).resolve()
package = Path(stateful_kv.__file__).resolve().parent
assert package == site / "stateful_kv", f"imported {package}, not what was installed"
assert list(package.glob("_C.*.so")), "the installation lacks the extension"
print(stateful_kv.build_info())
PYTHON
"$target/bin/stateful-kv" --help >/dev/null || die "the installed stateful-kv script does not start"
say "isolated install: builds, installs and imports"
