"""A result that another thread will have, so that an interrupt of one never blocks the other.

`Event`, `Condition` and `Future` of the standard library are written in Python: an interrupt right
behind their inner `acquire` leaves them locked for ever. What is here waits in C code alone.
"""

from __future__ import annotations

from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Promise(Generic[T]):
    """Kept once, with a result or an exception. The methods are those of `Future`."""

    def __init__(self) -> None:
        """Not kept yet."""
        self._is_kept = False
        self._result: T | None = None
        self._exception: BaseException | None = None
        self._callbacks: list[Callable[[Promise[T]], object]] = []

    def done(self) -> bool:
        """Whether it is kept."""
        return self._is_kept

    def set_result(self, result: T) -> None:
        """Keeps it. May be interrupted and called again."""
        self._result = result
        self._is_kept = True
        self._call_back()

    def set_exception(self, exception: BaseException) -> None:
        """Keeps it with an exception."""
        self._exception = exception
        self._is_kept = True
        self._call_back()

    def add_done_callback(self, callback: Callable[[Promise[T]], object]) -> None:
        """Has `callback` called once it is kept, perhaps twice; now if it already is."""
        self._callbacks.append(callback)
        if self._is_kept:
            callback(self)

    def wait(self) -> None:
        """Returns when it is kept."""
        if not self._is_kept:
            kept: SimpleQueue[Any] = SimpleQueue()
            self.add_done_callback(kept.put)
            kept.get()

    def result(self) -> T:
        """Waits; returns the result or raises the exception."""
        self.wait()
        if self._exception is not None:
            raise self._exception
        return self._result  # type: ignore[return-value]

    def exception(self) -> BaseException | None:
        """Waits; returns the exception, or None if there is a result."""
        self.wait()
        return self._exception

    def _call_back(self) -> None:
        for callback in tuple(self._callbacks):
            callback(self)
        self._callbacks.clear()  # else they would keep this, and this them
