"""One command as a process: streams, signals, and an exit code for whatever may happen."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from stateful_kv._extras import needs
from stateful_kv.apps.cli.faults import REFUSED, complain, report_fault
from stateful_kv.apps.cli.interrupts import STOPPED, Interrupts, say_stopped
from stateful_kv.apps.printable import printable

_MAX_COLUMNS = 10_000


def run_process(arguments: Sequence[str]) -> int:
    """Runs the command line ``stateful-kv ARGUMENTS`` and returns the exit code."""
    interrupts = Interrupts()
    interrupts.install()
    try:
        open_missing_streams()
        escape_what_cannot_be_encoded()
        ignore_bad_widths()
        _log_safely()
        code = _run_app(list(arguments))
        if code == 0:
            # While an error can still be told: at its end the interpreter would print a traceback.
            sys.stdout.flush()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        say_stopped()
        code = STOPPED
    except Exception as error:
        code = report_fault(error)
    interrupts.ignore_more()
    _drop_output()
    return code


def _run_app(arguments: list[str]) -> int:
    with needs("cli", "the command line"):
        from stateful_kv.apps.cli.commands import app
    try:
        code = app(arguments, prog_name="stateful-kv", standalone_mode=False)
    except Exception as error:
        # The classes of these errors live in `click` or in a copy of it inside `typer`.
        if not hasattr(error, "format_message"):
            raise
        return _usage_error(error)
    return code if isinstance(code, int) else 0


def _usage_error(error: Exception) -> int:
    message, context = error.format_message(), getattr(error, "ctx", None)  # type: ignore[attr-defined]
    command = context.command_path if context is not None else "stateful-kv"
    if type(error).__name__ == "NoArgsIsHelpError":
        if message:
            print(message, file=sys.stderr)
    else:
        complain(f"error: {message} (try: {command} --help)")
    return int(getattr(error, "exit_code", REFUSED))


def open_missing_streams() -> None:
    """Opens what the parent closed: else the next file becomes the standard output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # To write to the standard output fails then, as it should.
            os.open(os.devnull, os.O_RDWR if number == 2 else os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)


def escape_what_cannot_be_encoded() -> None:
    """Lets an ASCII terminal show other letters as escapes instead of failing on them."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def ignore_bad_widths() -> None:
    """Removes widths from the environment that the libraries would stumble over."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        value = os.environ.get(name, "")
        is_number = value.isascii() and value.isdecimal() and len(value) <= 5
        if value and not (is_number and 1 <= int(value) <= _MAX_COLUMNS):
            del os.environ[name]


class _SafeFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n")


def _log_safely() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_SafeFormatter("stateful-kv: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _drop_output() -> None:
    """Keeps the interpreter from writing, at its end, what could not be written before."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
