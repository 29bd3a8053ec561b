#!/usr/bin/env bash
# Builds a wheel into build/wheel, unpacks it beside nothing else of ours and imports it from there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/common.sh
VENV=$(absolute "${VENV:-.venv}")
export PATH="$VENV/bin:$PATH"
# The folder that the editable install compiled in: only what differs is built again.
export STATEFUL_KV_BUILD_DIR=${STATEFUL_KV_BUILD_DIR:-$PWD/build/extension}

rm -rf build/wheel
python -m pip wheel . --quiet --no-build-isolation --no-deps --wheel-dir build/wheel
wheels=(build/wheel/stateful_kv-*.whl)
[ "${#wheels[@]}" -eq 1 ] || die "expected one wheel, got: ${wheels[*]}"
python -m pip install --quiet --no-deps --target build/wheel/installed "${wheels[0]}"

site=$PWD/build/wheel/installed
cd build/wheel # away from the sources, so that only the wheel can be found
PYTHONPATH=$site python - "$site" <<'PYTHON'
import sys
from pathlib import Path

import stateful_kv

site = Path(sys.argv[1])
package = Path(stateful_kv.__file__).parent
assert package == site / "stateful_kv", f"imported {package}, not the wheel"
assert list(package.glob("data/*.json")), "the wheel lacks the workflows of the demo"
assert list(site.glob("stateful_kv-*.dist-info/licenses/LICENSE")), "the wheel lacks LICENSE"
outside = [p.name for p in site.iterdir() if p.name in {"tests", "bench", "csrc", "scripts"}]
assert not outside, f"the wheel installs {outside} at top level"
print(stateful_kv.build_info())
PYTHON
say "wheel: ${wheels[0]} builds, installs and imports"
