"""Ctrl-C and requests to end: the first leaves in order, the second leaves at once."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from stateful_kv.apps.cli.faults import complain
from stateful_kv.apps.output import remove_unfinished

STOPPED = 128 + signal.SIGINT
# SIGHUP: the terminal was closed.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Whether the message of `say_stopped` is out.
_is_said = False


class Interrupts:
    """Handlers of signals for one command.

    The first signal raises an exception, so that files and engines are closed on the way out. That
    may take a moment, and an exception in the middle of it would end in a traceback: a second
    signal ends the process at once. So does a signal whose exception was swallowed, as Python does
    in destructors.
    """

    def __init__(self) -> None:
        """Nothing is handled yet; see `install`."""
        self._received: int | None = None

    def install(self) -> None:
        """Handles the signals, except those that the parent process told us to ignore."""
        global _is_said
        _is_said = False
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)
        sys.unraisablehook = self._unraisable

    def ignore_more(self) -> None:
        """After a signal: the interpreter ends by itself, and a further one must not disturb it."""
        if self._received is not None:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            leave_at_once(number)
        self._received = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _unraisable(self, unraisable: Any) -> None:
        is_ours = isinstance(unraisable.exc_value, (KeyboardInterrupt, SystemExit))
        if is_ours and self._received is not None:
            leave_at_once(self._received)
        sys.__unraisablehook__(unraisable)


def say_stopped() -> None:
    """Tells that Ctrl-C ended the command."""
    global _is_said
    _is_said = True
    complain("stopped")


def leave_at_once(number: int) -> NoReturn:
    """Ends the process without further ado, as the signal `number` would."""
    remove_unfinished()
    for stream in (1, 2):
        with suppress(OSError):
            if os.isatty(stream):
                os.write(stream, b"\x1b[?25h")  # a progress display may have hidden the cursor
    if number == signal.SIGINT and not _is_said:
        # Not `complain`: the signal may have come while the stream was being written.
        with suppress(OSError):
            os.write(2, b"stateful-kv: stopped\n")
    os._exit(128 + number)
