"""The asyncio face: the same replies, and a turn that is cancelled anywhere never was."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable, Generator
from typing import Any

import pytest

from stateful_kv.engine.engine import Engine
from stateful_kv.errors import InvalidRequestError, SessionBusyError, SessionClosedError
from stateful_kv.session.session import Session
from tests.e2e.agents_play import wait_until
from tests.e2e.conftest import MakeEngine
from tests.e2e.test_oracle import assert_text_is_right
from tests.e2e.tiny import CountingUp, Provenance

ENDLESS = {"max_tokens": 1 << 30, "ignore_eos": True}
SECONDS = 60.0
pytestmark = pytest.mark.timeout(120)


def run(test: Awaitable[Any]) -> Any:
    """Runs a test; one that hangs fails."""

    async def bounded() -> Any:
        return await asyncio.wait_for(test, SECONDS)

    return asyncio.run(bounded())


class CancelledAt:
    """Awaits a coroutine and cancels it at some of its awaits, counted from 1.

    What is awaited there is either not waited for, or has just ended: a task learns that it is
    cancelled when it is resumed.
    """

    def __init__(self, call: Awaitable[Any], at: set[int], *, is_late: bool) -> None:
        self._call = call
        self._at = at
        self._is_late = is_late
        self._num_awaits = 0
        self.was_cancelled = False
        self.on_cancel: Callable[[], object] = lambda: None

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self._call.__await__()
        error: BaseException | None = None
        while True:
            try:
                future: Any = next(inner) if error is None else inner.throw(error)
            except StopIteration as stop:
                return stop.value
            self._num_awaits += 1
            error = None
            is_cancelled = self._num_awaits in self._at
            if self._is_late or not is_cancelled:
                yield future
            else:
                future._asyncio_future_blocking = False
                future.cancel()
            if is_cancelled:
                self.was_cancelled = True
                self.on_cancel()
                error = asyncio.CancelledError()


async def read(session: Session, settings: dict[str, Any]) -> str:
    return "".join([piece async for piece in session.astream("second", **settings)])


CALLS = {
    "aturn": lambda session, settings: session.aturn("second", **settings),
    "astream": read,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("num_cancels", [1, 2])
class TestCancelled:
    @pytest.mark.parametrize("is_late", [False, True])
    def test_the_turn_never_was(
        self, make_engine: MakeEngine, name: str, is_late: bool, num_cancels: int
    ) -> None:
        engine = make_engine(Provenance(), kv_dtype="float32")
        settings = {"max_tokens": 12}
        alone = engine.session()
        expected = [alone.turn(text, **settings).token_ids for text in ("first", "second")]

        async def cancel_at(first: int) -> bool:
            session, other = engine.session(), engine.session()
            await session.aturn("first", **settings)
            before = session.token_ids
            others_first = asyncio.create_task(other.aturn("first", **settings))
            at = set(range(first, first + num_cancels))
            call = CancelledAt(CALLS[name](session, settings), at, is_late=is_late)
            try:
                await call
            except asyncio.CancelledError:
                assert session.token_ids == before
                assert session.num_turns == 1
                assert not session.is_busy
                assert session.last_reply is None
            else:
                # The second cancel may come when the call has done its work.
                assert not call.was_cancelled
            assert engine.check_integrity() is None
            if call.was_cancelled:
                assert (await session.aturn("second", **settings)).token_ids == expected[1]
            assert session.token_ids == alone.token_ids
            assert (await others_first).token_ids == expected[0]
            assert (await other.aturn("second", **settings)).token_ids == expected[1]
            session.close()
            other.close()
            return call.was_cancelled

        async def sweep() -> int:
            first = 1
            while await cancel_at(first):
                first += 1
            return first

        assert run(sweep()) > 1  # where the engine is quick there is nothing to wait for

    def test_it_ends_within_a_step(
        self, make_engine: MakeEngine, name: str, num_cancels: int
    ) -> None:
        engine = make_engine(CountingUp(), kv_tokens=65536)

        async def cancel_at(first: int) -> None:
            session = engine.session()
            at = set(range(first, first + num_cancels))
            call = CancelledAt(CALLS[name](session, ENDLESS), at, is_late=False)
            steps: list[int] = []
            call.on_cancel = lambda: steps.append(num_steps(engine))
            with pytest.raises(asyncio.CancelledError):
                await call
            assert num_steps(engine) <= steps[0] + 1
            await asyncio.sleep(0.01)
            assert num_steps(engine) <= steps[0] + 1
            assert session.token_ids == []
            session.close()

        async def sweep() -> None:
            for first in range(1, 3 if name == "aturn" else 12):
                await cancel_at(first)

        run(sweep())


def num_steps(engine: Engine) -> int:
    return engine._scheduler.stepper.num_steps


class TestClosingStreams:
    @pytest.mark.parametrize("is_late", [False, True])
    @pytest.mark.parametrize("num_cancels", [0, 1, 2])
    @pytest.mark.parametrize("num_read", [0, 1, 5])
    def test_what_was_read_stays(
        self, make_engine: MakeEngine, num_read: int, num_cancels: int, is_late: bool
    ) -> None:
        engine = make_engine(CountingUp())

        async def close() -> None:
            session = engine.session()
            stream = await session.astream("x", **ENDLESS)
            pieces = [await anext(stream) for _ in range(num_read)]
            at = set(range(1, 1 + num_cancels))
            try:
                await CancelledAt(stream.aclose(), at, is_late=is_late)
            except asyncio.CancelledError:
                assert num_cancels
            else:
                assert not num_cancels
            reply = session.last_reply
            assert reply is not None
            assert reply.text == "".join(pieces)
            assert reply.finish_reason == "cancelled"
            assert len(reply.token_ids) == num_read
            assert not session.is_busy
            assert session.num_turns == (1 if num_read else 0)
            await stream.aclose()
            assert await anext(stream, None) is None
            await session.aturn("y", max_tokens=3)

        run(close())

    def test_dropped(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())

        async def drop() -> None:
            session = engine.session()
            async for piece in session.astream("x", **ENDLESS):
                assert piece
                break
            gc.collect()
            await session.aturn("y", max_tokens=3)
            assert session.num_turns == 2
            assert session.turns[0].end - session.turns[0].reply_start == 1

        run(drop())

    def test_a_timeout_is_no_error_of_the_stream(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())

        async def time_out() -> None:
            session = engine.session()
            async with session.astream("x", **ENDLESS) as stream:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.05):
                        while True:
                            await anext(stream)
                            await asyncio.sleep(0)
            assert not session.is_busy
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await session.aturn("x", **ENDLESS)
            before = session.num_tokens
            await session.aturn("y", max_tokens=3)
            assert session.num_tokens > before

        run(time_out())


class TestWaiting:
    def test_tasks_and_threads_share_a_session(self, make_engine: MakeEngine) -> None:
        engine = make_engine(Provenance(), kv_dtype="float32")
        session = engine.session()

        async def take_turns() -> None:
            async def turn(number: int) -> None:
                if number % 2:
                    await session.aturn(f"{number}", max_tokens=7)
                else:
                    assert await read(session, {"max_tokens": 7})

            await asyncio.gather(*(turn(number) for number in range(8)))

        threads = [threading.Thread(target=run, args=[take_turns()]) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        assert session.num_turns == 16
        assert_text_is_right(session)

    def test_a_task_does_not_wait_for_its_own_stream(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())

        async def ask_twice() -> None:
            session = engine.session()
            stream = await session.astream("x", max_tokens=9)
            await anext(stream)
            for call in (session.aturn, session.astream):
                with pytest.raises(SessionBusyError, match="read its stream"):
                    await call("y")
            # It would stop the event loop, and with it the task that reads.
            for block in (session.turn, session.stream):
                with pytest.raises(SessionBusyError, match="read its stream"):
                    await asyncio.create_task(as_task(lambda block=block: block("y")))
            other = asyncio.create_task(session.aturn("y", max_tokens=3))
            thread = asyncio.create_task(asyncio.to_thread(session.turn, "z", max_tokens=3))
            assert len([piece async for piece in stream]) == 8
            assert len((await other).token_ids) == len((await thread).token_ids) == 3

        run(ask_twice())

    def test_a_stream_of_the_same_thread(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()
        with session.stream("x", max_tokens=9) as stream:
            next(stream)
            with pytest.raises(SessionBusyError):
                run(session.aturn("y"))
            assert len("".join(stream)) == 8

    def test_closing_a_session(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())

        async def close() -> None:
            session, other = engine.session(), engine.session()
            reading = asyncio.create_task(read(session, ENDLESS))
            waiting = asyncio.create_task(session.aturn("y"))
            while not session.is_busy:
                await asyncio.sleep(0.001)
            session.close()
            await reading
            with pytest.raises(SessionClosedError):
                await waiting
            calls = [asyncio.create_task(other.aturn("y", **ENDLESS)) for _ in range(3)]
            calls.append(asyncio.create_task(read(other, ENDLESS)))
            while not other.is_busy:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.close)
            for call in calls:
                with pytest.raises(SessionClosedError):
                    await call
            for call in (other.aturn, other.astream):
                with pytest.raises(SessionClosedError):
                    await call("z")

        run(close())

    def test_bad_input(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()

        async def ask(call: Any) -> None:
            await call("x", max_tokens=0)

        async def read() -> None:
            async for _ in session.astream("x", max_tokens=0):
                raise AssertionError

        for bad in (ask(session.aturn), ask(session.astream), read()):
            run(session.aturn("fine", max_tokens=2))
            with pytest.raises(InvalidRequestError):
                run(bad)
            assert session.last_reply is None
        assert session.num_turns == 3

    def test_a_failing_model(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        session = make_engine(model).session()
        run(session.aturn("fine", max_tokens=2))
        before = session.token_ids
        model.before_forward = lambda batch: 1 / 0
        for call in (lambda: session.aturn("x"), lambda: read(session, {})):
            with pytest.raises(ZeroDivisionError):
                run(call())
            assert session.token_ids == before


async def as_task(call: Callable[[], Any]) -> Any:
    return call()


class TestLoops:
    def test_a_closed_loop_stops_nobody(
        self, make_engine: MakeEngine, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = make_engine(CountingUp(), kv_tokens=65536)
        left, pending, other = (engine.session() for _ in range(3))
        loop = asyncio.new_event_loop()

        async def begin() -> Any:
            stream = await left.astream("x", **ENDLESS)
            await anext(stream)
            return stream

        stream = loop.run_until_complete(begin())
        coroutine = pending.aturn("x", max_tokens=30)
        task = loop.create_task(coroutine)
        while not pending.is_busy:
            loop.run_until_complete(asyncio.sleep(0.001))
        loop.close()
        assert len(other.turn("y", max_tokens=50).token_ids) == 50
        wait_until(lambda: pending.num_turns == 1)
        assert not caplog.records
        del stream
        gc.collect()
        other.turn("y", max_tokens=2)
        wait_until(lambda: not left.is_busy)
        assert left.num_turns == 1
        task._log_destroy_pending = False  # it is what is tested
        del task
        coroutine.close()
        assert engine.check_integrity() is None

    def test_one_loop_after_the_other(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()
        for _ in range(3):
            run(session.aturn("x", max_tokens=3))
            assert len(run(read(session, {"max_tokens": 3}))) == 3
        assert session.num_turns == 6

    def test_the_end_of_a_loop_ends_its_turns(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        sessions = [engine.session() for _ in range(4)]
        left: list[asyncio.Task[Any]] = []

        async def leave() -> None:
            left.extend(
                asyncio.create_task(session.aturn("x", **ENDLESS)) for session in sessions[:2]
            )
            left.extend(asyncio.create_task(read(session, ENDLESS)) for session in sessions[2:])
            while not all(session.is_busy for session in sessions):
                await asyncio.sleep(0.001)

        run(leave())
        for session in sessions:
            assert not session.is_busy
            assert session.token_ids == []


class TestSharedStreams:
    def test_a_stream_is_read_in_another_loop(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()

        async def begin() -> Any:
            stream = await session.astream("x", max_tokens=30)
            await anext(stream)
            return stream

        async def read(stream: Any) -> int:
            return len([piece async for piece in stream])

        assert run(read(run(begin()))) == 29

    def test_several_tasks_read_one_stream(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()

        async def read_together() -> list[int]:
            stream = session.astream("x", max_tokens=30)

            async def read() -> int:
                return len([piece async for piece in stream])

            return await asyncio.gather(read(), read(), read())

        assert sum(run(read_together())) == 30
        assert session.num_turns == 1
