"""Bad input and faults: one clear error, nothing changed, the others go on."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from stateful_kv import ops
from stateful_kv.choosing.sampler import Sampler
from stateful_kv.engine.engine import Engine
from stateful_kv.engine.scheduler import Scheduler
from stateful_kv.engine.thread import Owner
from stateful_kv.errors import (
    ContextLengthError,
    InvalidRequestError,
    OutOfPagesError,
    SessionBusyError,
    SessionClosedError,
    StatefulKVError,
)
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.session import Session
from stateful_kv.session.state import SessionState
from stateful_kv.session.turn import Turn
from stateful_kv.text.stopping import StopRules
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import VOCAB_SIZE, ByteTokenizer, CountingUp, Provenance, Scripted


class BoomError(Exception):
    """Raised by tests in the middle of things."""


def pages(engine: Engine) -> tuple[int, int]:
    return engine.cache.num_free_pages, engine.cache.num_evictable_pages


def _all_kinds_of_calls(engine: Engine, session: Session) -> list[Callable[[], object]]:
    return [
        lambda: session.turn("x", max_tokens=3),
        lambda: session.fork().turn("y", max_tokens=3),
        lambda: list(session.stream("z", max_tokens=3)),
        lambda: engine.gather([(session, "v"), (engine.session(), "w")], 3),
        lambda: session.rewind(1),
    ]


class TestBadInput:
    @pytest.mark.parametrize(
        ("message", "settings"),
        [
            ("", {}),
            ([], {}),
            (None, {}),
            (3, {}),
            ([3], {}),
            ({"role": "user", "content": ""}, {}),
            ({"role": "wizard", "content": "x"}, {}),
            ("x", {"max_tokens": 0}),
            ("x", {"max_tokens": -1}),
            ("x", {"max_tokens": "5"}),
            ("x", {"max_tokens": True}),
            ("x", {"max_tokens": None}),
            ("x", {"temperature": -1.0}),
            ("x", {"temperature": float("nan")}),
            ("x", {"top_p": 0.0}),
            ("x", {"stop": ("",)}),
            ("x", {"stop": None}),
            ("x", {"seed": 2**64}),
            ("x", {"stop_token_ids": (-1,)}),
            ("x", {"stop_token_ids": (VOCAB_SIZE,)}),
            ("x", {"no_such_setting": 1}),
        ],
    )
    @pytest.mark.parametrize("how", ["turn", "stream", "gather"])
    def test_requests(
        self, make_engine: MakeEngine, message: Any, settings: dict, how: str
    ) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        session.turn("fine", max_tokens=5)
        tokens, before = session.token_ids, pages(engine)
        with pytest.raises(InvalidRequestError) as caught:
            if how == "gather":
                engine.gather([(session, message)], **settings)
            else:
                getattr(session, how)(message, **settings)
        assert isinstance(caught.value, ValueError)
        assert isinstance(caught.value, StatefulKVError)
        assert (session.token_ids, pages(engine)) == (tokens, before)
        assert not session.is_busy
        assert session.turn("go on", max_tokens=5).finish_reason == "length"

    def test_stop_token_of_the_last_row_is_legal(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()
        session.turn("x", max_tokens=2, stop_token_ids=(VOCAB_SIZE - 1,), top_k=10**9)

    @pytest.mark.parametrize("bad", [-1, VOCAB_SIZE, 2**31 - 1])
    def test_tokens_outside_the_vocabulary(self, make_engine: MakeEngine, bad: int) -> None:
        class Broken(ByteTokenizer):
            def render_start(self, messages: Any, tools: Any = None) -> np.ndarray:
                return np.array([1, bad, 2], dtype=np.int32)

        engine = make_engine(CountingUp(), tokenizer=Broken())
        session = engine.session()
        with pytest.raises(InvalidRequestError, match=f"token id {bad} is out of range"):
            session.turn("x")
        assert session.num_tokens == 0
        assert pages(engine) == (engine.cache.num_pages, 0)

    @pytest.mark.parametrize("over", [-1, 0, 1, 1000])
    def test_prompt_over_the_context(self, make_engine: MakeEngine, over: int) -> None:
        engine = make_engine(CountingUp(max_position=100))
        session = engine.session()
        message = "m" * (100 + over - 3)
        if over < 0:
            reply = session.turn(message)
            assert (len(reply.token_ids), reply.finish_reason) == (1, "length")
            with pytest.raises(ContextLengthError, match="100 before this turn and 5 new"):
                session.turn("x")
            assert session.num_tokens == 100
        else:
            with pytest.raises(ContextLengthError, match=rf"{100 + over} tokens.* 100 tokens"):
                session.turn(message)
            assert session.num_tokens == 0
            assert pages(engine) == (engine.cache.num_pages, 0)

    @pytest.mark.parametrize("value", [-1, 2, 10**9, True, "1", None])
    def test_rewind_and_truncate(self, make_engine: MakeEngine, value: Any) -> None:
        session = make_engine(CountingUp()).session()
        session.turn("x", max_tokens=2)
        tokens = session.token_ids
        with pytest.raises(InvalidRequestError, match=r"turn: expected 0\.\.1"):
            session.rewind(turn=value)
        if value != 2:
            with pytest.raises(InvalidRequestError, match=r"tokens: expected 0\.\."):
                session.truncate(tokens=value)
        assert session.token_ids == tokens

    def test_closed_session(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session, other = engine.session("one"), engine.session("two")
        session.turn("x", max_tokens=2)
        session.close()
        session.close()
        calls: list[Callable[[], Any]] = [
            lambda: session.turn("x"),
            lambda: session.stream("x"),
            lambda: session.fork(),
            lambda: session.rewind(0),
            lambda: session.truncate(0),
            lambda: session.suspend(),
        ]
        for call in calls:
            with pytest.raises(SessionClosedError, match="one"):
                call()
        with pytest.raises(SessionClosedError):
            engine.gather([(other, "x"), (session, "x")], max_tokens=3)
        assert other.num_turns == 1, "the other turn runs to its end"

    def test_closed_engine(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        stream = session.stream("x")
        next(stream)
        engine.close()
        engine.close()
        for call in (engine.session, engine.step, engine.clear_cache, lambda: session.turn("x")):
            with pytest.raises(SessionClosedError):
                call()
        session.close()
        stream.close()

    def test_gather_refuses_a_session_twice(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        with pytest.raises(InvalidRequestError, match="twice"):
            engine.gather([(session, "a"), (session, "b")])
        assert session.num_tokens == 0
        with pytest.raises(InvalidRequestError, match="another engine"):
            make_engine(CountingUp()).gather([(session, "a")])
        assert engine.gather([]) == []

    def test_gather_finishes_the_others(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        sessions = [engine.session() for _ in range(3)]
        items = [(sessions[0], "a"), (sessions[1], ""), (sessions[2], "c")]
        with pytest.raises(InvalidRequestError):
            engine.gather(items, max_tokens=4)
        assert [session.num_turns for session in sessions] == [1, 0, 1]
        outcomes = engine.gather(items, max_tokens=4, return_exceptions=True)
        assert isinstance(outcomes[1], InvalidRequestError)
        assert sessions[2].last_reply is outcomes[2]

    def test_a_step_cannot_call_the_engine_again(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        session, other = engine.session(), engine.session()
        errors: list[BaseException] = []

        def intrude(batch: object) -> None:
            for call in (lambda: other.turn("x"), engine.step, other.close, engine.close):
                try:
                    call()
                except SessionBusyError as error:
                    errors.append(error)

        model.before_forward = intrude
        session.turn("x", max_tokens=1)
        assert len(errors) == 4
        model.before_forward = lambda batch: None
        other.turn("x", max_tokens=1)


class TestFaults:
    def test_an_error_in_the_model_ends_only_its_row(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        good, bad = engine.session(), engine.session()
        engine.gather([(good, "g"), (bad, "b")], max_tokens=5)
        tokens = bad.token_ids
        held = bad.num_cached_tokens

        def before(batch: Any) -> None:
            if 8 + ord("!") in batch.token_ids.tolist():
                raise BoomError

        model.before_forward = before
        outcomes = engine.gather([(good, "g"), (bad, "b!")], max_tokens=5, return_exceptions=True)
        assert isinstance(outcomes[1], BoomError)
        assert (bad.token_ids, bad.num_cached_tokens) == (tokens, held)
        assert good.num_turns == 2
        model.before_forward = lambda batch: None
        assert bad.turn("b", max_tokens=5).receipt.reused_tokens == held

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_rows_of_nan(self, make_engine: MakeEngine, temperature: float) -> None:
        engine = make_engine(Scripted([40, 41, 42, None, 44]))
        session, other = engine.session(), engine.session()
        sampling = {"temperature": temperature, "top_k": 1}
        other_reply = other.turn("x", max_tokens=3, **sampling)
        assert other_reply.finish_reason == "length"
        outcomes = engine.gather([(session, "x")], 10, return_exceptions=True, **sampling)
        assert isinstance(outcomes[0], StatefulKVError)
        assert "row_error" in str(outcomes[0])
        assert session.num_tokens == 0
        assert other.turn("x", max_tokens=3, **sampling).token_ids == other_reply.token_ids

    @pytest.mark.parametrize("penalty", [0.0, 0.5])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_an_error_of_one_sampled_row(
        self,
        make_engine: MakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        temperature: float,
        penalty: float,
    ) -> None:
        engine = make_engine(CountingUp())
        good, bad = engine.session(), engine.session()
        choose_run, sample = Sampler.choose_run, ops.sample

        def fail_run(sampler: Sampler, *args: Any) -> Any:
            if sampler.seed == 13:
                raise BoomError
            return choose_run(sampler, *args)

        def fail_draw(logits: torch.Tensor, seeds: torch.Tensor, *args: Any) -> Any:
            if 13 in seeds.tolist():
                raise BoomError
            return sample(logits, seeds, *args)

        monkeypatch.setattr(Sampler, "choose_run", fail_run)
        monkeypatch.setattr(ops, "sample", fail_draw)
        running = good.stream("g", max_tokens=20, temperature=temperature, seed=3, top_k=1)
        text = next(running)
        with pytest.raises(BoomError):
            bad.turn("b", max_tokens=5, temperature=1.0, seed=13, presence_penalty=penalty)
        assert (bad.num_tokens, bad.is_busy) == (0, False)
        text += "".join(running)
        assert text == make_engine(CountingUp()).session().turn("g", max_tokens=20).text

    def test_a_model_that_gives_too_few_rows(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        session = engine.session()
        session.turn("x", max_tokens=3)
        tokens = session.token_ids
        recorder = engine.model
        forward = recorder.forward
        recorder.forward = lambda batch, cache: model.forward(batch, cache)[:0]  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match="split"):
            session.turn("x", max_tokens=3)
        recorder.forward = forward  # type: ignore[method-assign]
        assert session.token_ids == tokens
        assert session.turn("x", max_tokens=3).finish_reason == "length"

    def test_a_failed_pass_is_no_host_time(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model, draft=False)

        def before(batch: Any) -> None:
            if batch.num_sequences > 1:
                time.sleep(0.2)
                raise BoomError

        model.before_forward = before
        replies = engine.gather([(engine.session(), "a"), (engine.session(), "b")], max_tokens=1)
        assert all(reply.receipt.host_s < 0.1 for reply in replies)
        assert all(reply.receipt.total_s >= 0.2 for reply in replies)

    @pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (KVCache, "reserve"),
            (KVCache, "prepare"),
            (KVCache, "batch_pages"),
            (KVCache, "commit"),
            (KVCache, "insert"),
            (KVCache, "insert_tail_copy"),
            (Sampler, "choose_run"),
            (ops, "argmax"),
            (ops, "sample"),
            (KVCache, "match_and_adopt"),
            (ops, "copy_pages"),
            (Provenance, "next_tokens"),
            (StopRules, "push"),
        ],
    )
    def test_every_place_that_can_fail(
        self,
        make_engine: MakeEngine,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        error: type[BaseException],
    ) -> None:
        """The n-th call of one function fails, for each n until none does."""
        expected = _story(make_engine(Provenance(), kv_dtype="float32"))
        original = getattr(owner, name)
        num_failures = 0
        for fatal_call in range(1, 100):
            engine = make_engine(Provenance(), kv_dtype="float32")
            calls = 0

            def fail(*args: Any, fatal_call: int = fatal_call, **kwargs: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == fatal_call:
                    raise error
                return original(*args, **kwargs)

            with monkeypatch.context() as patch:
                if name in ("reserve", "batch_pages"):  # as if pages were short
                    patch.setattr(KVCache, "prepare", lambda *_: None)
                patch.setattr(owner, name, fail)
                outcome = _story(engine, error)
            assert outcome == expected
            if calls < fatal_call:
                break
            num_failures += 1
        assert num_failures >= 1

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (Scheduler, "open"),
            (Scheduler, "register"),
            (Scheduler, "run_turns"),
            (Scheduler, "step"),
            (Owner, "run"),
            (Session, "_make_request"),
            (KVCache, "fork"),
            (KVCache, "match_and_adopt"),
            (KVCache, "reserve"),
            (KVCache, "prepare"),
            (KVCache, "commit"),
            (Turn, "of"),
            (Turn, "begin"),
            (Turn, "settle"),
            (SessionState, "truncate"),
        ],
    )
    def test_an_interrupt_right_after_any_operation(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
    ) -> None:
        """What was made and not yet handed over has no owner; no page or session may be lost."""
        original = getattr(owner, name)
        for fatal_call in range(1, 8):
            engine = make_engine(CountingUp())
            session = engine.session("a")
            session.turn("hello", max_tokens=3)
            calls = 0

            def interrupt(*args: Any, fatal_call: int = fatal_call, **kwargs: Any) -> Any:
                nonlocal calls
                result = original(*args, **kwargs)
                calls += 1
                if calls == fatal_call:
                    raise KeyboardInterrupt
                return result

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, interrupt)
                for act in _all_kinds_of_calls(engine, session):
                    with contextlib.suppress(KeyboardInterrupt):
                        act()
            gc.collect()
            assert engine.check_integrity() is None
            assert not session.is_busy
            session.turn("again", max_tokens=3)
            if calls < fatal_call:
                break

    def test_an_interrupt_leaves_other_streams_running(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model)
        session, other = engine.session(), engine.session()
        stream = other.stream("s", max_tokens=20)
        text = next(stream)

        def interrupt(batch: Any) -> None:
            raise KeyboardInterrupt

        model.before_forward = interrupt
        with pytest.raises(KeyboardInterrupt):
            session.turn("x", max_tokens=5)
        assert session.num_tokens == 0
        assert not session.is_busy
        model.before_forward = lambda batch: None
        text += "".join(stream)
        alone = make_engine(CountingUp()).session().turn("s", max_tokens=20)
        assert text == alone.text

    def test_a_failing_stream_restores_its_session(self, make_engine: MakeEngine) -> None:
        engine = make_engine(Scripted([50, 51, 52, None]), draft=False)
        session = engine.session()
        stream = session.stream("x", max_tokens=20)
        with pytest.raises(StatefulKVError, match="row_error"):
            list(stream)
        assert session.num_tokens == 0
        assert not session.is_busy
        stream.close()

    def test_out_of_pages_in_the_middle_of_a_reply(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=64)
        session = engine.session()
        session.turn("x", max_tokens=10)
        tokens, held = session.token_ids, session.num_cached_tokens
        with pytest.raises(OutOfPagesError):
            session.turn("x", max_tokens=100)
        assert (session.token_ids, session.num_cached_tokens) == (tokens, held)
        assert session.turn("x", max_tokens=10).receipt.reused_tokens == held

    def test_nothing_requires_grad(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        engine.session().turn("x", max_tokens=2)
        assert torch.is_grad_enabled()
        assert not engine.cache.k.requires_grad


def _story(engine: Engine, error: type[BaseException] | None = None) -> list[list[int]]:
    """A fork writes into a shared page, two sessions run at once; what fails is done again."""

    def again(action: Callable[[], Any], *sessions: Session) -> None:
        before = [(session.token_ids, session.num_turns) for session in sessions]
        for _ in range(3):
            try:
                action()
                return
            except BaseException as raised:
                assert error is not None and isinstance(raised, error), raised
                assert engine.check_integrity() is None
                after = [(session.token_ids, session.num_turns) for session in sessions]
                assert after == before or len(sessions) > 1
                for session, (_, num_turns) in zip(sessions, before, strict=True):
                    assert not session.is_busy
                    session.rewind(num_turns)
        raise AssertionError("it fails again and again")

    parent = engine.session("parent", system="shared")
    again(lambda: parent.turn("one", max_tokens=9), parent)
    child = parent.fork("child")
    again(lambda: engine.gather([(parent, "p"), (child, "c")], max_tokens=9), parent, child)
    again(lambda: child.turn("more", max_tokens=9), child)
    again(lambda: child.turn("dice", max_tokens=5, temperature=0.5, seed=7), child)
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.1}
    again(lambda: child.turn("more dice", 5, temperature=0.5, seed=7, **penalties), child)
    tokens = [parent.token_ids, child.token_ids]
    for session in (parent, child):
        again(session.close)
    return tokens
