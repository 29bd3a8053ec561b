"""How asyncio tasks wait for what the engine's thread does.

A wait may be cancelled; what it waits for may not. No event loop, open or closed, can make a step
of the engine fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from stateful_kv.session.runner import TurnRunner
from stateful_kv.system.promise import Promise

T = TypeVar("T")


def call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Calls a function in the thread of an event loop soon; does nothing if it is closed."""
    with suppress(RuntimeError):  # closed: nobody waits there any more
        loop.call_soon_threadsafe(function)


async def wait_for(promise: Promise[Any]) -> None:
    """Returns when the promise is kept."""
    if promise.done():
        return
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not waiter.done():
            waiter.set_result(None)

    promise.add_done_callback(lambda _: call_in(loop, wake))
    await waiter


async def finish(operation: Promise[T]) -> T:
    """Returns what a submitted operation returns; cancelled meanwhile, it raises that behind it."""
    cancelled: asyncio.CancelledError | None = None
    while not operation.done():
        try:
            await wait_for(operation)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return operation.result()


async def give_up(
    runner: TurnRunner, operation: Callable[[], object], error: BaseException
) -> None:
    """Runs what ends the turn of a coroutine that `error` ends.

    A task that is cancelled goes on when that is done: its session can be used at once. Where a
    coroutine is thrown away it cannot wait.
    """
    if isinstance(error, asyncio.CancelledError):
        await finish(runner.submit(operation))
    else:
        runner.post(operation)


class AsyncNews:
    """Lets a task wait for something new; any thread may tell it."""

    def __init__(self) -> None:
        """For a task of the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()
        self._is_told = False

    @property
    def is_of_running_loop(self) -> bool:
        """Whether the running task can wait here."""
        return self._loop is asyncio.get_running_loop()

    def tell(self) -> None:
        """There is something new. Wakes the event loop only if the task knows of nothing yet."""
        if not self._is_told:
            self._is_told = True
            call_in(self._loop, self._event.set)

    def clear(self) -> None:
        """Whoever calls looks at all that is new now, right after this call."""
        self._is_told = False
        self._event.clear()

    async def wait(self) -> None:
        """Returns when there is something new since `clear`."""
        await self._event.wait()
