"""Waiting for another thread, so that an interrupt of one never blocks the other.

`Event`, `Condition` and `Future` of Python are written in Python: an interrupt right behind their
inner `acquire` leaves them locked for ever. What is here waits in C code alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Milestone:
    """Something that happens once, and then has happened for good."""

    def __init__(self) -> None:
        """Not yet."""
        self._is_reached = False
        self._listeners: list[Callable[[], object]] = []

    def reach(self) -> None:
        """It has happened. May be interrupted and called again."""
        self._is_reached = True
        for listener in tuple(self._listeners):
            listener()

    def listen(self, listener: Callable[[], object]) -> None:
        """Has `listener` called when it happens, perhaps more than once; now if it already has."""
        self._listeners.append(listener)
        if self._is_reached:
            listener()

    def wait(self) -> None:
        """Returns when it has happened."""
        if not self._is_reached:
            woken: SimpleQueue[None] = SimpleQueue()
            self.listen(partial(woken.put, None))
            woken.get()

    async def wait_async(self) -> None:
        """The same for asyncio."""
        if not self._is_reached:
            woken = asyncio.Event()
            self.listen(awakener(woken))
            await woken.wait()


class Result(Milestone, Generic[T]):
    """What an operation that another thread runs returns or raises.

    Attributes:
        error: what it raised.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        super().__init__()
        self.error: BaseException | None = None
        self._value: T | None = None

    def put(self, value: T) -> None:
        """The operation has returned."""
        self._value = value
        self.reach()

    def fail(self, error: BaseException) -> None:
        """The operation has raised."""
        self.error = error
        self.reach()

    def get(self) -> T:
        """Waits, then returns or raises what the operation did."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._value  # type: ignore[return-value]

    async def get_async(self) -> T:
        """The same for asyncio."""
        await self.wait_async()
        return self.get()


def awakener(event: asyncio.Event) -> Callable[[], None]:
    """Returns what sets an event of the running loop, from whichever thread."""
    loop = asyncio.get_running_loop()

    def awaken() -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(event.set)

    return awaken
