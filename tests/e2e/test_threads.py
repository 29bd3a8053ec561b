"""Many threads on one engine: each session as if it were alone, and no end that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import InvalidRequestError, SessionBusyError, SessionClosedError
from stateful_kv.kv.eviction import Eviction
from tests.e2e.agents_play import play_together, wait_until
from tests.e2e.conftest import MakeEngine
from tests.e2e.test_oracle import assert_text_is_right
from tests.e2e.tiny import COSTS, ByteTokenizer, CountingUp, Provenance

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = {"max_tokens": 1 << 30, "ignore_eos": True}
pytestmark = pytest.mark.timeout(120)
# How long all agents play together; a release is checked with 60.
SECONDS = float(os.environ.get("SKV_SOAK_SECONDS", "1"))


def in_thread(call: Callable[[], Any]) -> Future[Any]:
    """Runs a call in a daemon thread: one that hangs fails its test and nothing else."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stateful-kv engine"]


class Gate:
    """Holds the model inside a step until it is opened."""

    def __init__(self, model: Any) -> None:
        self.is_reached, self._is_open = threading.Event(), threading.Event()
        model.before_forward = self._wait

    def _wait(self, batch: object) -> None:
        self.is_reached.set()
        assert self._is_open.wait(60)

    def open(self) -> None:
        self._is_open.set()


class TestTogether:
    @pytest.mark.timeout(300 + 20 * SECONDS)
    @pytest.mark.parametrize("name", ["oracle", "llama"])
    def test_every_reply_is_that_of_the_session_alone(
        self,
        make_engine: MakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
    ) -> None:
        # The longer they play, the longer their sessions are.
        kv_tokens = 3072 if SECONDS <= 2 else 8192
        evicted = []
        next_at_rest = Eviction.next_at_rest
        monkeypatch.setattr(
            Eviction,
            "next_at_rest",
            lambda eviction: evicted.append(next_at_rest(eviction)) or evicted[-1],
        )
        model = Provenance() if name == "oracle" else None
        config = {"kv_dtype": "float32", "is_recorded": False}
        engine = make_engine(model, kv_tokens=kv_tokens, num_steps_per_sync=2, **config)
        agents = play_together(engine, num_threads=16, num_tasks=64, seconds=SECONDS)
        assert engine.check_integrity() is None
        engine.clear_cache()
        assert engine.cache.num_free_pages == engine.cache.num_pages
        num_turns = sum(agent.num_turns for agent in agents)
        num_starved = sum(agent.num_starved for agent in agents)
        print(f"{num_turns} turns, {num_starved} out of pages, {len(evicted)} evictions")
        assert num_turns > 80
        assert num_starved < num_turns / 2
        assert len([sequence for sequence in evicted if sequence is not None]) > 10
        assert sum(agent.num_cancelled for agent in agents) > 10
        alone = make_engine(model, kv_tokens=16384, **config)
        stories = [story for agent in agents for story in agent.all_stories]
        print(f"{sum(story.check_alone(alone) for story in stories)} calls are those made alone")

    def test_turns_of_one_session_follow_each_other(self, make_engine: MakeEngine) -> None:
        session = make_engine(Provenance(), kv_dtype="float32").session()

        def take_turns(number: int) -> list[list[int]]:
            if number % 2:
                return [session.turn(f"from {number}", max_tokens=9).token_ids for _ in range(5)]
            replies = []
            for _ in range(5):
                with session.stream(f"from {number}", max_tokens=9) as stream:
                    assert len("".join(stream)) > 0
                replies.append([0] * 9)
            return replies

        with ThreadPoolExecutor(4) as pool:
            replies = [reply for replies in pool.map(take_turns, range(4)) for reply in replies]
        assert [len(reply) for reply in replies] == [9] * 20
        assert session.num_turns == 20
        fork = session.fork()
        while fork.num_turns:  # looks at the last turns only
            assert_text_is_right(fork)
            fork.rewind(max(0, fork.num_turns - 2))

    def test_callers_that_never_pause_let_turns_go_on(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        engine.start()
        is_over = False

        def again() -> None:
            if not is_over:
                engine._scheduler.post(again)

        again()
        turn = in_thread(lambda: engine.session().turn("x", max_tokens=20))
        try:
            assert len(turn.result(30).token_ids) == 20
        finally:
            is_over = True


class TestWaiting:
    def test_a_reader_does_not_wait_for_itself(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        engine.start()
        session = engine.session()
        with session.stream("x", max_tokens=9) as stream:
            next(stream)
            for call in (
                lambda: session.turn("x"),
                lambda: session.stream("x"),
                lambda: session.fork(),
                lambda: session.rewind(0),
                lambda: session.suspend(),
            ):
                with pytest.raises(SessionBusyError, match="read its stream"):
                    call()
            other = in_thread(lambda: session.turn("y", max_tokens=3))
            assert len("".join(stream)) == 8
        assert len(other.result(30).token_ids) == 3
        assert session.num_turns == 2

    @pytest.mark.parametrize("is_threaded", [False, True])
    def test_a_dropped_stream_is_in_nobodys_way(
        self, make_engine: MakeEngine, is_threaded: bool
    ) -> None:
        engine = make_engine(CountingUp())
        if is_threaded:
            engine.start()
        for call in (
            lambda session: session.turn("y", max_tokens=3),
            lambda session: session.fork(),
            lambda session: session.rewind(0),
            lambda session: session.close(),
        ):
            session = engine.session()
            stream = session.stream("x", **ENDLESS)
            next(stream)
            del stream
            call(session)

    def test_closing_waits_for_a_turn(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        session = engine.session()
        gate = Gate(model)
        turn = in_thread(lambda: session.turn("x", max_tokens=5))
        assert gate.is_reached.wait(30)
        closing = in_thread(session.close)
        time.sleep(0.05)
        assert not closing.done()
        gate.open()
        assert len(turn.result(30).token_ids) == 5
        closing.result(30)
        assert session.is_closed

    def test_closing_ends_a_stream_of_another_thread(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        is_reading = threading.Event()
        pieces: list[str] = []

        def read() -> None:
            for piece in session.stream("x", **ENDLESS):
                pieces.append(piece)
                is_reading.set()

        reading = in_thread(read)
        assert is_reading.wait(30)
        session.close()
        reading.result(30)
        reply = session.last_reply
        assert reply is not None
        assert reply.finish_reason == "cancelled"
        assert reply.text == "".join(pieces)

    def test_closing_the_engine_ends_all_waiting(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        sessions = [engine.session() for _ in range(8)]
        gate = Gate(model)
        calls = [
            in_thread(lambda session=session: session.turn("x", **ENDLESS)) for session in sessions
        ]
        calls += [
            in_thread(lambda session=session: session.turn("y", **ENDLESS)) for session in sessions
        ]
        assert gate.is_reached.wait(30)
        closing = [in_thread(engine.close) for _ in range(2)]
        gate.open()
        for closed in closing:
            closed.result(30)
        for call in calls:
            with pytest.raises(SessionClosedError):
                call.result(30)
        assert not engine_threads()
        for call in (engine.session, sessions[0].fork, engine.step):
            with pytest.raises(SessionClosedError):
                in_thread(call).result(30)
        assert not engine_threads(), "a closed engine needs no thread"

    @pytest.mark.parametrize("attempt", range(20))
    def test_closing_the_engine_at_any_time(self, make_engine: MakeEngine, attempt: int) -> None:
        engine = make_engine(CountingUp())

        def call_until_closed(number: int) -> None:
            session = engine.session()
            while True:
                if number % 2:
                    session.turn("x", max_tokens=2)
                else:
                    "".join(session.stream("x", max_tokens=2))
                session.rewind(0)

        calls = [in_thread(lambda number=number: call_until_closed(number)) for number in range(6)]
        time.sleep(0.003 * attempt)
        in_thread(engine.close).result(30)
        for call in calls:
            with pytest.raises(SessionClosedError):
                call.result(30)

    def test_no_piece_comes_behind_the_end(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The last step may be taken between a look for a piece and a look for the end."""
        engine = make_engine(CountingUp())
        stream = engine.session().stream("x", max_tokens=1)
        reader = stream._turn.reader
        take = reader.take

        def take_before_a_step() -> str | None:
            piece = take()
            engine.step()
            return piece

        monkeypatch.setattr(reader, "take", take_before_a_step)
        assert len("".join(stream)) == 1


class TestBadUse:
    def test_a_step_cannot_call_the_engine_again(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        engine.start()
        session, other = engine.session(), engine.session()
        stream = other.stream("x", max_tokens=5)
        errors: list[BaseException] = []
        pieces: list[str] = []
        calls = (
            lambda: engine.session(),
            lambda: pieces.extend(stream),
            lambda: other.turn("x"),
            lambda: other.close(),
            lambda: session.fork(),
            lambda: session.turn("x"),
            engine.step,
            engine.check_integrity,
            engine.close,
        )

        def intrude(batch: object) -> None:
            for call in calls:
                try:
                    call()
                except SessionBusyError as error:
                    errors.append(error)

        model.before_forward = intrude
        assert len(in_thread(lambda: session.turn("x", max_tokens=1)).result(30).token_ids) == 1
        model.before_forward = lambda batch: None
        assert len(errors) % len(calls) == 0
        assert errors
        assert len("".join([*pieces, *stream])) == 5, "it goes on as if nothing had been"

    def test_an_error_reaches_its_caller_only(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        engine.start()

        def before(batch: Any) -> None:
            if 8 + ord("!") in batch.token_ids.tolist():
                raise ZeroDivisionError

        model.before_forward = before

        def play(number: int) -> list[str]:
            session = engine.session()
            outcomes = []
            for turn in range(6):
                try:
                    if number % 3 == 0 and turn % 2:
                        session.turn("!", max_tokens=3)
                    elif number % 3 == 1 and turn % 2:
                        session.turn("x", max_tokens=0)
                    else:
                        session.turn("x", max_tokens=3)
                    outcomes.append("fine")
                except Exception as error:
                    outcomes.append(type(error).__name__)
            return outcomes

        with ThreadPoolExecutor(9) as pool:
            outcomes = list(pool.map(play, range(9)))
        for number, outcome in enumerate(outcomes):
            odd = [ZeroDivisionError, InvalidRequestError, None][number % 3]
            assert outcome == ["fine", odd.__name__ if odd else "fine"] * 3

    def test_an_error_of_the_whole_step(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine(CountingUp())
        engine.start()
        session = engine.session()
        with monkeypatch.context() as patch:
            patch.setattr(engine._scheduler.multi_step, "advance", lambda running: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                session.turn("x")
        assert session.token_ids == []
        assert len(session.turn("x", max_tokens=2).token_ids) == 2

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_the_thread_survives_what_ends_others(
        self, make_engine: MakeEngine, kind: type[BaseException]
    ) -> None:
        model = CountingUp()
        engine = make_engine(model)
        engine.start()
        session = engine.session()

        def interrupt(batch: object) -> None:
            model.before_forward = lambda batch: None
            raise kind

        model.before_forward = interrupt
        with pytest.raises(kind):
            session.turn("x")
        assert session.token_ids == []
        assert len(session.turn("x", max_tokens=2).token_ids) == 2


class TestEnds:
    @pytest.mark.parametrize("is_threaded", [False, True])
    def test_a_dropped_engine_is_gone(self, is_threaded: bool) -> None:
        before = set(engine_threads())
        config = EngineConfig(kv_tokens=1024, page_size=16, num_steps_per_sync=1)
        engine = Engine(CountingUp(), ByteTokenizer(), config, cost_curve=COSTS)
        if is_threaded:
            engine.start()
        threads = set(engine_threads()) - before
        assert len(threads) == is_threaded
        session = engine.session()
        session.turn("x", max_tokens=2)
        stream = session.stream("x", **ENDLESS)
        next(stream)
        other = engine.session().stream("x", **ENDLESS)
        pool = weakref.ref(engine.cache.k)
        del engine, session
        next(stream)  # what is left of the engine still works
        del stream, other
        if is_threaded:
            wait_until(lambda: pool() is None)
            threads.pop().join(30)
            assert set(engine_threads()) <= before
        else:
            assert pool() is None, "at once, without the help of the garbage collector"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    @pytest.mark.parametrize("attempt", range(5))
    def test_a_forked_child_goes_on_alone(self, make_engine: MakeEngine, attempt: int) -> None:
        engine = make_engine(Provenance(), kv_dtype="float32")
        session, other = engine.session(), engine.session()
        before = session.turn("x", max_tokens=5)
        stop = threading.Event()

        def keep_busy() -> None:
            while not stop.is_set():
                other.turn("more", max_tokens=50)
                other.rewind(0)

        busy = in_thread(keep_busy)
        stream = engine.session().stream("y", max_tokens=40)
        next(stream)
        time.sleep(0.01 * attempt)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert engine.check_integrity() is None
                session.turn("y", max_tokens=5)
                assert_text_is_right(session)
                other.turn("the turn of a thread that is gone is gone too", max_tokens=5)
                assert_text_is_right(other)
                assert sum(1 for _ in stream) > 0
                in_thread(lambda: session.turn("z", max_tokens=5)).result(30)
                assert_text_is_right(session)
                assert engine.check_integrity() is None
                engine.close()
                assert engine.cache.num_free_pages == engine.cache.num_pages
                status = 0
            finally:
                os._exit(status)
        assert wait_for_child(child) == 0
        stop.set()
        busy.result(30)
        "".join(stream)
        session.turn("y", max_tokens=5)
        assert_text_is_right(session)
        assert len(before.token_ids) == 5

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
    def test_a_fork_within_a_step(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        session = engine.session()
        children: list[int] = []

        def fork(batch: object) -> None:
            if not children:
                children.append(os.fork())

        model.before_forward = fork
        status = 1
        try:
            reply = session.turn("x", max_tokens=5)
            assert len(reply.token_ids) == 5
            assert engine.check_integrity() is None
            status = 0
        finally:
            if children == [0]:
                os._exit(status)
        assert wait_for_child(children[0]) == 0

    @pytest.mark.parametrize(
        ("state", "last_words"),
        [
            ("stream", ""),
            ("turn", ""),
            ("inline", ""),
            ("idle", ""),
            ("closed in atexit", ""),
            ("stream", "sys.exit(3)"),
            ("turn", "engine.close()"),
            ("inline", "1 / 0"),
        ],
    )
    def test_the_process_ends(self, state: str, last_words: str) -> None:
        lines = {
            "stream": "engine.start(); stream = session.stream('x', **ENDLESS); next(stream)",
            "turn": "daemon(lambda: session.turn('x', **ENDLESS)); time.sleep(0.3)",
            # The daemon thread is the first to call, so it does the work itself.
            "inline": "daemon(lambda: engine.session().turn('x', **ENDLESS)); time.sleep(0.3)",
            "idle": "engine.start(); session.turn('x', max_tokens=3)",
            "closed in atexit": "engine.start(); stream = session.stream('x', **ENDLESS)",
        }
        script = f"""
            import atexit, sys, threading, time
            atexit.register(lambda: engine.close() if {state == "closed in atexit"} else None)
            import torch
            torch.set_num_threads(1)
            from stateful_kv.engine.config import EngineConfig
            from stateful_kv.engine.engine import Engine
            from tests.e2e.tiny import COSTS, ByteTokenizer, tiny_llama

            ENDLESS = dict(max_tokens=1 << 30, ignore_eos=True)
            def daemon(call):
                threading.Thread(target=call, daemon=True).start()
            config = EngineConfig(kv_tokens=65536, page_size=16, num_steps_per_sync=1)
            model = tiny_llama(max_position=60000)
            engine = Engine(model, ByteTokenizer(), config, cost_curve=COSTS)
            session = {"None" if state == "inline" else "engine.session()"}
            {lines[state]}
            {last_words}
        """
        path = os.pathsep.join([str(ROOT), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=60,
        )
        expected = {"": 0, "engine.close()": 0, "sys.exit(3)": 3, "1 / 0": 1}[last_words]
        assert done.returncode == expected, done.stderr
        assert "terminate called" not in done.stderr
        assert "Fatal" not in done.stderr
        if not last_words:
            assert done.stderr == ""


def wait_for_child(child: int) -> int:
    """Its exit code; a child that hangs fails the test."""
    codes: list[int] = []

    def has_ended() -> bool:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            codes.append(os.waitstatus_to_exitcode(status))
        return bool(done)

    wait_until(has_ended)
    return codes[0]


class TestOddErrors:
    @pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_what_a_model_raises_ends_the_turns(
        self, make_engine: MakeEngine, error: type[BaseException]
    ) -> None:
        model = CountingUp()
        engine = make_engine(model)
        engine.start()
        session = engine.session(draft=False)

        def fail(batch: Any) -> None:
            if batch.num_tokens == 1:  # behind the first token
                raise error

        model.before_forward = fail
        stream = session.stream("x", max_tokens=9)
        with pytest.raises(error):
            list(stream)
        model.before_forward = lambda batch: None
        assert (session.num_turns, session.is_busy) == (0, False)
        assert len(session.turn("y", max_tokens=3).token_ids) == 3

    @pytest.mark.parametrize("is_threaded", [False, True])
    def test_stop_iteration_is_no_end_of_the_text(
        self, make_engine: MakeEngine, is_threaded: bool
    ) -> None:
        model = CountingUp()
        engine = make_engine(model)
        if is_threaded:
            engine.start()

        def fail(batch: Any) -> None:
            if batch.num_tokens == 1:  # behind the first token
                raise StopIteration

        model.before_forward = fail
        with pytest.raises(RuntimeError, match="StopIteration"):
            list(engine.session(draft=False).stream("x", max_tokens=9))

    def test_an_engine_whose_thread_starts_while_a_turn_is_opened(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The thread falls asleep before the first thread has opened its turn, and is woken."""
        engine = make_engine(CountingUp())
        session, other = engine.session(), engine.session()
        owner = engine._scheduler.owner
        is_inline = type(owner).is_inline
        calls = iter(range(1000))

        def watched(self: Any) -> bool:
            result = is_inline(self)
            if result and next(calls) == 1:
                in_thread(lambda: other.turn("y", max_tokens=2)).result(30)
                time.sleep(0.2)
            return result

        monkeypatch.setattr(type(owner), "is_inline", watched)
        assert len(session.turn("x", max_tokens=5).token_ids) == 5
