"""``python -m stateful_kv.apps.cli``: the same as ``stateful-kv``."""

from stateful_kv.apps.cli import main

main()
