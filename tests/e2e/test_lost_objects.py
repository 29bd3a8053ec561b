"""Streams, sessions and errors that nobody has any more; steps that lead nowhere."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from stateful_kv.engine.batching import Planner
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import InvalidRequestError, InvariantError
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.ledger import Ledger, TurnRecord
from stateful_kv.session.session import Session
from stateful_kv.session.state import SessionState
from stateful_kv.session.turn import Turn
from stateful_kv.system.promise import Promise
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import FIRST_BYTE, CountingUp


class BoomError(Exception):
    """Raised by tests in the middle of things."""


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Only what reference counting frees is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def in_a_cycle(thing: object) -> None:
    """Drops something so that only a collection finds it."""
    cycle: list[object] = [thing]
    cycle.append(cycle)


def failing_at(mark: str) -> Callable[[Any], None]:
    def before(batch: Any) -> None:
        if FIRST_BYTE + ord(mark) in batch.token_ids.tolist():
            raise BoomError

    return before


CALLS: dict[str, Callable[[Engine, Session], object]] = {
    "turn": lambda engine, session: session.turn("y", max_tokens=5),
    "truncate": lambda engine, session: session.truncate(3),
    "rewind": lambda engine, session: session.rewind(0),
    "suspend": lambda engine, session: session.suspend(),
    "close": lambda engine, session: session.close(),
    "clear_cache": lambda engine, session: engine.clear_cache(),
}


class TestDropped:
    @pytest.mark.parametrize("call", CALLS)
    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (KVCache, "truncate"),
            (KVCache, "commit"),
            (KVCache, "release"),
            (KVCache, "evict_all"),
            (Ledger, "append"),
            (Ledger, "truncate"),
            (Ledger, "end_turn"),
            (SessionState, "insert"),
            (Turn, "settle"),
        ],
    )
    @pytest.mark.usefixtures("no_collection")
    def test_a_collection_in_the_middle_of_an_operation(
        self,
        make_engine: MakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        owner: type,
        name: str,
        call: str,
    ) -> None:
        """It finds a stream and a session, which must not act in the middle of something else."""
        engine = make_engine(CountingUp())
        session, streaming, lost = (engine.session(name) for name in ("a", "b", "c"))
        for other in (session, streaming, lost):
            other.turn("x", max_tokens=5)
        before = streaming.token_ids
        stream = streaming.stream("go", max_tokens=20)
        read = next(stream) + next(stream)
        in_a_cycle(stream)
        in_a_cycle(lost)
        del stream, lost, other
        original = getattr(owner, name)

        def collecting(*args: Any, **kwargs: Any) -> Any:
            gc.collect()
            result = original(*args, **kwargs)
            gc.collect()
            return result

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, collecting)
            CALLS[call](engine, session)
        gc.collect()
        assert engine.check_integrity() is None
        assert not streaming.is_busy
        assert streaming.num_turns == 2
        assert streaming.last_reply is not None
        assert streaming.last_reply.text == read
        assert streaming.token_ids[: len(before)] == before
        assert streaming.turns[-1].end == streaming.num_tokens
        assert len(engine._scheduler.sessions) == (1 if call == "close" else 2)

    def test_a_stream_keeps_its_session(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        stream = engine.session().stream("x", max_tokens=6)
        gc.collect()
        assert len("".join(stream)) == 6
        del stream
        assert engine.check_integrity() is None
        assert engine._scheduler.sessions == []

    @pytest.mark.parametrize("is_threaded", [False, True])
    def test_nothing_is_kept_of_what_was_dropped(
        self, make_engine: MakeEngine, is_threaded: bool
    ) -> None:
        engine = make_engine(CountingUp())
        if is_threaded:
            engine.start()
        session = engine.session()
        session.turn("x", max_tokens=3)
        engine.check_integrity()
        before = len(engine._scheduler.owner._watches)
        for _ in range(20):
            stream = session.stream("x", max_tokens=3)
            next(stream)
            del stream
            engine.session().turn("y", max_tokens=2)
        for _ in range(2):
            engine.check_integrity()
        assert len(engine._scheduler.owner._watches) == before

    @pytest.mark.usefixtures("no_collection")
    def test_a_promise_keeps_nothing_that_waited(self) -> None:
        class Big:
            """What was promised."""

        promise: Promise[Big] = Promise()
        queue: SimpleQueue[object] = SimpleQueue()  # of a thread that was interrupted and is gone
        promise.add_done_callback(queue.put)
        big = Big()
        seen = weakref.ref(big)
        promise.set_result(big)
        del promise, queue, big
        assert seen() is None


class TestRecords:
    @pytest.mark.parametrize(
        ("records", "problem"),
        [
            ([(0, 3, 6), (5, 8, 10)], "turn 2"),  # they overlap
            ([(6, 8, 10), (0, 3, 6)], "turn 2"),  # in the wrong order
            ([(0, 3, 6), (0, 3, 6)], "turn 2"),  # twice the same
            ([(0, 3, 99)], "turn 1"),  # beyond the end
            ([(0, 7, 6)], "turn 1"),
            ([(-1, 3, 6)], "turn 1"),
        ],
    )
    def test_broken_records_are_seen(
        self, make_engine: MakeEngine, records: list[tuple[int, int, int]], problem: str
    ) -> None:
        engine = make_engine(CountingUp())
        session = engine.session("mine")
        session.turn("x", max_tokens=20)
        ledger = session._state.ledger
        good = ledger._records
        ledger._records = [TurnRecord(*record) for record in records]
        found = engine.check_integrity()
        assert found is not None
        assert "'mine'" in found
        assert problem in found
        ledger._records = good


class TestErrors:
    @pytest.mark.parametrize("how", ["close", "read", "with"])
    @pytest.mark.parametrize("num_read", [0, 2])
    def test_a_stream_that_fails_in_the_step_of_another(
        self, make_engine: MakeEngine, how: str, num_read: int
    ) -> None:
        model = CountingUp()
        engine = make_engine(model, draft=False)
        session, other = engine.session(), engine.session()
        older = session.turn("x", max_tokens=3)
        assert session.last_reply is older
        tokens = session.token_ids
        stream = session.stream("p", max_tokens=50)
        for _ in range(num_read):
            next(stream)
        assert session.last_reply is None
        model.before_forward = lambda batch: _fail_if_positions_beyond(batch, len(tokens))
        other.turn("y", max_tokens=3)
        model.before_forward = lambda batch: None
        assert not session.is_busy
        assert session.token_ids == tokens
        assert isinstance(stream.error, BoomError)
        with pytest.raises(BoomError):
            if how == "close":
                stream.close()
            elif how == "read":
                list(stream)
            else:
                with stream:
                    pass
        assert session.last_reply is None
        stream.close()
        assert session.turn("x", max_tokens=3).token_ids == older.token_ids

    @pytest.mark.usefixtures("no_collection")
    def test_an_error_keeps_no_frames(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        session, other = engine.session(), engine.session()
        seen: list[weakref.ref[object]] = []
        cause_of = failing_at("!")

        class Big:
            """What a step has in hand."""

        def before(batch: Any) -> None:
            big = Big()
            seen.append(weakref.ref(big))
            try:
                cause_of(batch)
            except BoomError as error:
                raise RuntimeError from error

        model.before_forward = before
        stream = session.stream("b!", max_tokens=5)
        other.turn("y", max_tokens=3)
        assert isinstance(stream.error, RuntimeError)
        assert isinstance(stream.error.__cause__, BoomError)
        assert all(reference() is None for reference in seen)
        dropped = weakref.ref(stream)
        del stream
        assert dropped() is None, "only a collection would find it"
        model.before_forward = failing_at("!")
        stream = session.stream("b!", max_tokens=5)
        with pytest.raises(BoomError):
            next(stream)
        dropped = weakref.ref(stream)
        del stream
        assert dropped() is None

    @pytest.mark.parametrize("message", ["b!", ""])
    @pytest.mark.parametrize("how", ["turn", "gather", "stream", "read"])
    @pytest.mark.usefixtures("no_collection")
    def test_a_session_that_is_dropped_after_an_error_is_closed(
        self, make_engine: MakeEngine, message: str, how: str
    ) -> None:
        model = CountingUp()
        engine = make_engine(model)
        model.before_forward = failing_at("!")
        session = engine.session()
        with contextlib.suppress(BoomError, InvalidRequestError):
            if how == "turn":
                session.turn(message)
            elif how == "gather":
                engine.gather([(session, message)])
            elif how == "stream":
                next(session.stream(message))
            else:
                list(session.stream(message))
        assert engine.check_integrity() is None
        assert len(engine._scheduler.sessions) == 1
        del session
        assert engine.check_integrity() is None
        assert engine._scheduler.sessions == []


def _fail_if_positions_beyond(batch: Any, position: int) -> None:
    if int(batch.positions.max()) >= position:
        raise BoomError


class TestStepsThatLeadNowhere:
    @pytest.mark.parametrize("num_steps", [1, 4])
    @pytest.mark.parametrize("is_threaded", [False, True])
    def test_a_planner_that_plans_nothing(
        self,
        make_engine: MakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        num_steps: int,
        is_threaded: bool,
    ) -> None:
        engine = make_engine(CountingUp(), num_steps_per_sync=num_steps)
        if is_threaded:
            engine.start()
        session, other = engine.session(), engine.session()
        expected = session.turn("x", max_tokens=3).token_ids
        tokens = session.token_ids
        stream = other.stream("y", max_tokens=100)
        next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(Planner, "plan", lambda *_: [])
            with pytest.raises(InvariantError, match="no turn can make progress"):
                session.turn("x", max_tokens=3)
        assert session.token_ids == tokens
        assert session.turn("x", max_tokens=3).token_ids == expected
        stream_error = stream.error
        assert stream_error is None or isinstance(stream_error, InvariantError)
        if stream_error is not None:
            with pytest.raises(InvariantError):
                list(stream)
        stream.close()
        assert engine.check_integrity() is None
