"""The text of a running turn, piece by piece: an iterator, and the same for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from queue import SimpleQueue

from stateful_kv.session.host import Host
from stateful_kv.session.turn import Turn


class TurnStream(Iterator[str]):
    """Iterator over the text of a running turn; see `Session.stream`."""

    def __init__(self, host: Host, turn: Turn, news: SimpleQueue[None]) -> None:
        """Not for users."""
        self._host = host
        self._news = news
        self._is_over = False
        self._turn = turn
        host.watch(self, turn)
        turn.has_reader = True

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
                piece = turn.reader.take()
                if piece is not None:
                    return piece
                if turn.is_finished:
                    break
                self._host.wait_for_news(self._news)
            if not turn.is_settled:
                self._host.perform(turn.close_books)
        except BaseException as error:
            failure = error
            self._host.perform(lambda: turn.fail(failure))
            raise
        self._is_over = True
        turn.result()  # raises if the turn failed
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
            self._host.perform(turn.cancel)
        self._is_over = True
        if turn.error is not None:
            turn.result()


class AsyncTurnStream(AsyncIterator[str]):
    """The same for asyncio; see `Session.astream`."""

    def __init__(self, host: Host, turn: Turn, news: asyncio.Event) -> None:
        """Not for users."""
        self._host = host
        self._turn = turn
        self._news = news
        self._is_over = False
        host.watch(self, turn)

    @property
    def error(self) -> BaseException | None:
        """Why the turn failed; None if it did not."""
        return self._turn.error

    async def __anext__(self) -> str:
        turn = self._turn
        if self._is_over:
            raise StopAsyncIteration
        try:
            while True:
                self._news.clear()
                piece = turn.reader.take()
                if piece is not None:
                    return piece
                if turn.is_finished:
                    break
                await self._news.wait()
            if not turn.is_settled:
                await self._host.submit(turn.close_books).get_async()
        except BaseException as error:
            failure = error
            self._host.post(lambda: turn.fail(failure))
            raise
        self._is_over = True
        turn.result()  # raises if the turn failed
        raise StopAsyncIteration

    async def __aenter__(self) -> AsyncTurnStream:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        try:
            await self.aclose()
        except Exception:
            if kind is None:  # else the error that leaves the block is the one to see
                raise

    async def aclose(self) -> None:
        """Ends the turn early if it still runs; see `TurnStream.close`."""
        turn = self._turn
        if self._is_over:
            return
        if not turn.is_settled:
            await self._host.submit(turn.cancel).get_async()
        self._is_over = True
        if turn.error is not None:
            turn.result()
