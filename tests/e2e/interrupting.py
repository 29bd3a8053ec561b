"""Lets signals arrive at chosen instructions of the interpreter, as a real Ctrl-C would."""

from __future__ import annotations

import _thread
import dis
import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

Place = tuple[CodeType, int]
# Frames of these files are not ours: the tests themselves and what runs them.
_OUTSIDE = ("/tests/", "/_pytest/", "/pluggy/", "<frozen importlib")


@dataclass(frozen=True)
class Point:
    """A moment at which a signal makes a difference.

    Attributes:
        index: number of the instruction that is about to run, counted from the begin.
        place: the instruction in its code.
    """

    index: int
    place: Place


class _SetPending:
    """`signum in self` makes a signal pending.

    The interpreter calls Python's handler at its next look for signals: after a call, when a loop
    jumps back, at the start of a function. A comparison with C code behind it is none of these, so
    the look that follows is the one of the traced instruction.
    """

    __contains__ = staticmethod(_thread.interrupt_main)


@dataclass
class Interrupter:
    """Runs something and raises KeyboardInterrupt at chosen instructions.

    Attributes:
        at: numbers of instructions; each further one is counted from the one before it.
        is_listing: keep a list of all points too.
        points: of the run so far.
        num_delivered: interrupts so far.
        swallowed: those that were raised in a destructor or a callback, where nobody sees them.
    """

    at: tuple[int, ...] = ()
    is_listing: bool = False
    points: list[Point] = field(default_factory=list)
    num_delivered: int = 0
    swallowed: int = 0
    _count: int = 0
    _target: int = -1
    _last: Point | None = None

    def run(self, act: Callable[[], object]) -> BaseException | None:
        """Runs `act`; returns the interrupt that left it, or None."""
        self._arm()
        pending = _SetPending()
        local = self._listing(pending) if self.is_listing else self._counting(pending)
        with self._handler(), self._hook():
            try:
                sys.settrace(local)
                act()
            except KeyboardInterrupt as error:
                return error
            finally:
                sys.settrace(None)
        return None

    def _arm(self) -> None:
        self._target = self.at[self.num_delivered] if self.num_delivered < len(self.at) else -1

    def _counting(self, pending: _SetPending) -> Callable[..., Any]:
        def local(frame: FrameType, event: str, arg: object) -> Any:
            if event == "opcode":
                self._count += 1
                if self._count == self._target:
                    return None if signal.SIGINT in pending else local
            return local

        return self._enter(local)

    def _listing(self, pending: _SetPending) -> Callable[..., Any]:
        def local(frame: FrameType, event: str, arg: object) -> Any:
            if event == "opcode":
                self._count += 1
                code, at = frame.f_code, frame.f_lasti
                self._last = Point(self._count, (code, at))
                if _looks_for_signals(code).get(at, False):
                    self.points.append(self._last)
                if self._count == self._target:
                    return None if signal.SIGINT in pending else local
            return local

        return self._enter(local)

    def _enter(self, local: Callable[..., Any]) -> Callable[..., Any]:
        def enter(frame: FrameType, event: str, arg: object) -> Any:
            if self.is_listing and self._count and self.points[-1:] != [self._last]:
                self.points.append(self._last)  # it called Python code, which looks as it starts
            if any(part in frame.f_code.co_filename for part in _OUTSIDE):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            return local

        return enter

    @contextmanager
    def _handler(self) -> Iterator[None]:
        def handle(signum: int, frame: FrameType | None) -> None:
            if frame is not None and frame.f_code.co_filename == __file__:
                # The instruction ended without a look for signals: let the next one try.
                self._target = self._count + 1
                return
            self.num_delivered += 1
            self._count = 0
            self.points.clear()
            self._arm()
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def _hook(self) -> Iterator[None]:
        def hook(unraisable: Any) -> None:
            if unraisable.exc_type is not KeyboardInterrupt:
                before(unraisable)
            self.swallowed += 1

        before = sys.unraisablehook
        sys.unraisablehook = hook
        try:
            yield
        finally:
            sys.unraisablehook = before


@functools.cache
def _looks_for_signals(code: CodeType) -> dict[int, bool]:
    """Of each instruction, by its offset, whether the interpreter looks for signals after it."""
    return {
        step.offset: step.opname.startswith("CALL") or step.opname.startswith("JUMP_BACKWARD")
        for step in dis.get_instructions(code)
    }
