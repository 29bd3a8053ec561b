"""The ``stateful-kv`` script, outside the package so that it can tell why the package fails.

Importing ``stateful_kv`` loads torch and the extension. That takes seconds, in which Ctrl-C may be
pressed, and it fails where they do not fit together or ``STATEFUL_KV_CPU_ISA`` is wrong.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def main() -> None:
    """Runs the command line; any failure is one line and an exit code."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # Nothing is open yet, so nothing needs to be closed.
        signal.signal(signal.SIGINT, _leave)
    try:
        from stateful_kv.apps.cli import process
    except Exception as error:
        message = ascii(" ".join(str(error).split()))[1:-1]
        sys.exit(_say(f"error: {message or type(error).__name__}"))
    sys.exit(process.run_process(sys.argv[1:]))


def _leave(*_: Any) -> None:
    os.write(2, b"stateful-kv: stopped\n")
    os._exit(128 + signal.SIGINT)


def _say(message: str) -> int:
    if sys.stderr is not None:
        sys.stderr.write(f"stateful-kv: {message}\n")
    return 2


if __name__ == "__main__":
    main()
