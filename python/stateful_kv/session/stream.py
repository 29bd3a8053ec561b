"""The text of a running turn, piece by piece: an iterator, and the same for asyncio."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator

from stateful_kv.errors import SessionBusyError
from stateful_kv.session.host import Host
from stateful_kv.session.receipts import Reply
from stateful_kv.session.turn import Turn
from stateful_kv.session.waiting import AsyncNews, finish, give_up

KeepReply = Callable[[Reply | None], None]


class TurnStream(Iterator[str]):
    """Iterator over the text of a running turn; see `Session.stream`."""

    _turn: Turn | None = None  # so that one whose making was interrupted can be dropped

    def __init__(
        self, host: Host, turn: Turn, news: threading.Event, keep_reply: KeepReply
    ) -> None:
        """Not for users."""
        self._host = host
        self._news = news
        self._keep_reply = keep_reply
        self._is_over = False
        self._turn = turn
        turn.has_reader = True
        keep_reply(None)

    @property
    def error(self) -> BaseException | None:
        """Why the turn failed; None if it did not."""
        return None if self._turn is None else self._turn.error

    def __next__(self) -> str:
        turn = self._turn
        if turn is None or self._is_over:
            raise StopIteration
        try:
            while True:
                is_finished = turn.is_finished  # looked at first: no piece comes behind the end
                piece = turn.reader.take()
                if piece is not None:
                    return piece
                if is_finished:
                    break
                self._host.wait_for_news(self._news)
            if not turn.is_settled:
                self._host.perform(turn.close_books)
        except SessionBusyError:  # asked from within a step: the stream goes on
            raise
        except BaseException as error:
            failure = error
            self._host.perform(lambda: turn.fail(failure))
            self._is_over = True
            raise
        self._is_over = True
        self._keep_reply(turn.reply)
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

    def __del__(self) -> None:
        turn = self._turn
        if turn is not None and not turn.is_settled:
            turn.has_reader = False
            self._host.post(_canceller(turn, self._keep_reply))

    def close(self) -> None:
        """Ends the turn early if it still runs. Idempotent.

        Raises:
            Exception: the one that the turn failed with, if the iterator has not raised it.
        """
        turn = self._turn
        if turn is None or self._is_over:
            return
        if not turn.is_settled:
            self._host.perform(turn.cancel)
        self._is_over = True
        self._keep_reply(turn.reply)
        if turn.error is not None:
            turn.result()


class AsyncTurnStream(AsyncIterator[str]):
    """The same for asyncio; see `Session.astream`."""

    def __init__(self, host: Host, turn: Turn, news: AsyncNews, keep_reply: KeepReply) -> None:
        """Not for users."""
        self._host = host
        self._turn = turn
        self._news = news
        self._keep_reply = keep_reply
        self._is_over = False

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
                is_finished = turn.is_finished  # looked at first: no piece comes behind the end
                piece = turn.reader.take()
                if piece is not None:
                    return piece
                if is_finished:
                    break
                await self._news.wait()
            if not turn.is_settled:
                await finish(self._host.submit(turn.close_books))
        except BaseException as error:
            self._is_over = True
            turn.has_reader = False
            await give_up(self._host, lambda: turn.withdraw(asyncio.CancelledError()), error)
            raise
        self._is_over = True
        self._keep_reply(turn.reply)
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

    def __del__(self) -> None:
        turn = self._turn
        if not turn.is_settled:
            turn.has_reader = False
            self._host.post(_canceller(turn, self._keep_reply))

    async def aclose(self) -> None:
        """Ends the turn early if it still runs; see `TurnStream.close`.

        Cancelled, it does so all the same.
        """
        turn = self._turn
        if self._is_over:
            return
        self._is_over = True
        try:
            if not turn.is_settled:
                await finish(self._host.submit(turn.cancel))
        finally:
            self._keep_reply(turn.reply)
        if turn.error is not None:
            turn.result()


def _canceller(turn: Turn, keep_reply: KeepReply) -> Callable[[], None]:
    """What ends the turn of a stream that was dropped; does not keep its session alive."""
    kept = weakref.WeakMethod(keep_reply)

    def cancel() -> None:
        keep = kept()
        if not turn.is_settled:
            turn.cancel()
            if keep is not None:
                keep(turn.reply)

    return cancel
