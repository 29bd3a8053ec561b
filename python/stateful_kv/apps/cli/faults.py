"""What a command says when it fails: one line on the standard error, and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress

from stateful_kv.apps.printable import printable
from stateful_kv.errors import InvariantError, StatefulKVError

DIFFERENT, REFUSED, BUG, NO_READER = 1, 2, 70, 141
# Set to anything: a fault of the program shows where it happened.
TRACEBACK_VARIABLE = "STATEFUL_KV_TRACEBACK"
_MAX_LENGTH = 1000


def complain(message: str) -> None:
    """Writes one line to the standard error, if there is one."""
    line = printable(" ".join(message.split()))
    if len(line) > _MAX_LENGTH:
        line = line[:_MAX_LENGTH] + "..."
    # Where it is closed, there is nobody to tell.
    with suppress(OSError, ValueError, AttributeError):
        print(f"stateful-kv: {line}", file=sys.stderr, flush=True)


def report_fault(error: Exception) -> int:
    """Says in one line why a command ended; returns its exit code."""
    if isinstance(error, BrokenPipeError):
        return NO_READER  # who reads our output, such as `head`, has seen enough
    if isinstance(error, MemoryError):
        complain("error: the memory of this machine is not enough")
        return REFUSED
    is_expected = isinstance(error, (StatefulKVError, OSError, ImportError))
    if is_expected and not isinstance(error, InvariantError):
        complain(f"error: {error}" if str(error).strip() else f"error: {type(error).__name__}")
        return REFUSED
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(error)
    complain(
        f"internal error, please report it: {type(error).__name__}: {error} "
        f"({TRACEBACK_VARIABLE}=1 shows where)"
    )
    return BUG
