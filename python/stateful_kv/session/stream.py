"""The text of a running turn, piece by piece: an iterator, and the same for asyncio.

A turn keeps the error that it failed with, and an error that was raised keeps the frames it came
through. So a method that raises it forgets its own names first, or a stream would keep itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

from stateful_kv.errors import SessionBusyError
from stateful_kv.session.runner import TurnRunner
from stateful_kv.session.turn import Turn
from stateful_kv.session.waiting import AsyncNews, finish, give_up


class TurnStream(Iterator[str]):
    """Iterator over the text of a running turn; see `Session.stream`."""

    def __init__(self, runner: TurnRunner, session: object) -> None:
        """Not for users. `begin` follows.

        It is there before its turn, so that the turn ends whenever the stream is dropped. It keeps
        the session, which would be closed if it were dropped.
        """
        self._runner = runner
        self._session = session
        self._news: SimpleQueue[None] = SimpleQueue()
        self.listener = partial(self._news.put, None)
        self._is_over = False
        self._turn: Turn

    def begin(self, turn: Turn) -> TurnStream:
        """Not for users."""
        self._turn = turn
        return self

    @property
    def error(self) -> BaseException | None:
        """Why the turn failed; None if it did not."""
        return self._turn.error

    def __next__(self) -> str:
        turn = self._turn
        if self._is_over:
            raise StopIteration
        try:
            while True:
                is_finished = turn.is_finished  # looked at first: no piece comes behind the end
                piece = turn.reader.take()
                if piece is not None:
                    return piece
                if is_finished:
                    break
                self._runner.wait_for_news(self._news)
            self._news.put(None)  # for another thread that reads the same stream
            if not turn.is_settled:
                self._runner.perform(turn.settle)
        except SessionBusyError:  # asked from within a step: the stream goes on
            raise
        except BaseException as error:
            turn.must_fail = True  # also if the next line is interrupted
            turn.has_reader = turn.has_reader and isinstance(error, Exception)
            self._runner.perform(partial(turn.fail, error))
            self._is_over = True
            del self, turn  # see the top of this file
            raise
        self._is_over = True
        if turn.error is not None:
            try:
                raise turn.error
            finally:
                del self, turn  # see the top of this file
        raise StopIteration

    def __enter__(self) -> TurnStream:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # else the error that leaves the block is the one to see
                raise

    def close(self) -> None:
        """Ends the turn early if it still runs. Idempotent.

        Raises:
            Exception: the one that the turn failed with, if the iterator has not raised it.
        """
        turn = self._turn
        if self._is_over:
            return
        if not turn.is_settled:
            self._runner.perform(turn.cancel)
        self._is_over = True
        if turn.error is not None:
            try:
                raise turn.error
            finally:
                del self, turn  # see the top of this file


class AsyncTurnStream(AsyncIterator[str]):
    """The same for asyncio; see `Session.astream`."""

    def __init__(
        self, runner: TurnRunner, open_turn: Callable[[AsyncTurnStream], Awaitable[Turn]]
    ) -> None:
        """Not for users; the turn is opened when the stream is awaited, entered or iterated."""
        self._runner = runner
        self._open_turn = open_turn
        self._news: AsyncNews
        self.listener: Callable[[], None]
        self._is_over = False
        self._turn: Turn | None = None
        self._opening = asyncio.Lock()

    def __await__(self) -> Generator[Any, None, AsyncTurnStream]:
        """Opens the turn, so that bad input raises here; returns the stream itself."""
        return self.__aenter__().__await__()

    @property
    def error(self) -> BaseException | None:
        """Why the turn failed; None if it did not."""
        return None if self._turn is None else self._turn.error

    async def __anext__(self) -> str:
        turn = await self._opened()
        if self._is_over:
            raise StopAsyncIteration
        if not self._news.is_of_running_loop:  # it was opened in another one
            self._news = AsyncNews()
            turn.request.listener = self._news.tell
        try:
            while True:
                self._news.clear()
                is_finished = turn.is_finished  # looked at first: no piece comes behind the end
                piece = turn.reader.take()
                if piece is not None:
                    return piece
                if is_finished:
                    break
                await self._news.wait()
            if not turn.is_settled:
                await finish(self._runner.submit(turn.settle))
        except BaseException as error:
            self._is_over = True
            turn.has_reader = False
            failure = error if isinstance(error, Exception) else asyncio.CancelledError()
            await give_up(self._runner, lambda: turn.withdraw(failure), error)
            raise
        self._is_over = True
        if turn.error is not None:
            try:
                raise turn.error
            finally:
                del self, turn  # see the top of this file
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncTurnStream:
        await self._opened()
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        try:
            await self.aclose()
        except Exception:
            if kind is None:  # else the error that leaves the block is the one to see
                raise

    async def aclose(self) -> None:
        """Ends the turn early if it still runs; see `TurnStream.close`.

        Cancelled, it does so all the same.
        """
        turn = self._turn
        if self._is_over:
            return
        self._is_over = True
        if turn is None:
            return
        if not turn.is_settled:
            await finish(self._runner.submit(turn.cancel))
        if turn.error is not None:
            try:
                raise turn.error
            finally:
                del self, turn  # see the top of this file

    async def _opened(self) -> Turn:
        async with self._opening:  # several tasks may read the same stream
            return self._turn or await self._open()

    async def _open(self) -> Turn:
        if self._is_over:
            raise StopAsyncIteration
        self._news = AsyncNews()  # of the event loop that reads
        self.listener = self._news.tell  # does not keep the stream, whose end is to be noticed
        try:
            self._turn = await self._open_turn(self)
        except BaseException:
            self._is_over = True
            raise
        if self._is_over:  # closed by another task meanwhile
            await finish(self._runner.submit(self._turn.cancel))
        return self._turn
