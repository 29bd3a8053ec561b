#!/usr/bin/env bash
# The installed command line on the default model: the same workflow with state and without gives
# the same tokens, and the demo writes its report.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. scripts/common.sh
VENV=$(absolute "${VENV:-.venv}")
export PATH="$VENV/bin:$PATH"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder" # away from the sources, so that only what is installed can run
stateful-kv run demo --max-tokens 4 --json a.json
stateful-kv run demo --max-tokens 4 --stateless --json b.json
python -c 'import json, sys
a, b = ([t["token_ids"] for t in json.load(open(f))["turns"]] for f in ("a.json", "b.json"))
sys.exit(0 if a and a == b else f"tokens differ with and without state: {a} and {b}")'
stateful-kv demo --max-tokens 4 --output report
for file in report.json latency.png index.html; do
  [ -s "report/$file" ] || die "the demo wrote no $file"
done
say "command line: equal tokens with and without state, and a report"
