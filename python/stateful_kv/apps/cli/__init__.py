"""The command line: ``stateful-kv run``, ``profile``, ``demo`` and ``info``.

`main` can be imported without the packages of the extra ``cli``, so that it can name them.
"""

from __future__ import annotations


def main() -> None:
    """Entry point of the ``stateful-kv`` script."""
    import sys

    from stateful_kv.apps.cli.process import run_process

    sys.exit(run_process(sys.argv[1:]))
