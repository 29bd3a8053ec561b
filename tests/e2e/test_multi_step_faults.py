"""Faults in multi-steps: a plain step takes over, one clear error, the others go on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from stateful_kv.engine import batching
from stateful_kv.engine.loop.device_loop import DeviceLoop
from stateful_kv.engine.multi_step import MultiStep
from stateful_kv.errors import StatefulKVError
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.receipts import Reply
from stateful_kv.text.stopping import StopRules
from tests.e2e.conftest import MakeEngine
from tests.e2e.multi_step_play import multi_step
from tests.e2e.tiny import FIRST_BYTE, CountingUp, Scripted


class BoomError(Exception):
    """Raised by tests in the middle of things."""


class TestFaults:
    def test_bad_logits_end_only_their_turn(self, make_engine: MakeEngine) -> None:
        outcomes = []
        for steps in (1, 2, 3, 8):
            script = [*(FIRST_BYTE + 40 + i for i in range(7)), None, FIRST_BYTE + 48]
            engine = make_engine(Scripted(script), num_steps_per_sync=steps)
            good, bad = engine.session(), engine.session()
            items = [(good, "g"), (bad, "b")]
            engine.gather(items, 5)
            bad.truncate(bad.num_tokens)
            replies = [
                *engine.gather([(good, "g")], 6),
                *engine.gather([(bad, "b")], 12, return_exceptions=True),
            ]
            outcomes.append((replies[0].token_ids, str(replies[1]), bad.token_ids))
            assert isinstance(replies[1], StatefulKVError)
            assert "row_error" in str(replies[1])
            reply = bad.turn("b", max_tokens=6)
            assert reply.token_ids == script[:6]
            assert (multi_step(engine).num_syncs > 0) is (steps > 1)
        assert all(outcome == outcomes[0] for outcome in outcomes)

    def test_bad_logits_beside_a_good_turn(self, make_engine: MakeEngine) -> None:
        class BadAtPosition60(CountingUp):
            def next_tokens(self, batch: Any, cache: KVCache) -> list[int | None]:
                tokens = super().next_tokens(batch, cache)
                at = batch.positions[batch.logit_rows].tolist()
                return [None if i == 60 else token for i, token in zip(at, tokens, strict=True)]

        outcomes = []
        for steps in (1, 4, 8):
            engine = make_engine(BadAtPosition60(), num_steps_per_sync=steps)
            good, bad = engine.session(), engine.session()
            before = bad.turn("b", max_tokens=5).token_ids
            items = [(good, "g"), (bad, "b" * 30)]
            replies = engine.gather(items, max_tokens=40, return_exceptions=True)
            assert isinstance(replies[1], StatefulKVError)
            assert "row_error: logits for position 61 have" in str(replies[1])
            assert bad.token_ids[-5:] == before
            bad.turn("x", max_tokens=5)
            good.turn("x", max_tokens=5)
            outcomes.append((replies[0].token_ids, good.token_ids, bad.token_ids))
            assert (multi_step(engine).num_syncs > 0) is (steps > 1)
        assert outcomes[0] == outcomes[1] == outcomes[2]
        assert len(outcomes[0][0]) == 40

    def test_a_multi_step_that_fails_loses_nothing(self, make_engine: MakeEngine) -> None:
        model = CountingUp()
        engine = make_engine(model, num_steps_per_sync=4, draft=False)
        session = engine.session()
        calls = iter(range(1000))

        def before(batch: Any) -> None:
            if batch.slots.shape[0] == 1 and next(calls) in (1, 9):
                raise BoomError

        model.before_forward = before
        with pytest.warns(RuntimeWarning, match="BoomError"):
            reply = session.turn("x", max_tokens=40)
        expected = make_engine(CountingUp(), draft=False).session().turn("x", max_tokens=40)
        assert reply.token_ids == expected.token_ids
        assert multi_step(engine).num_syncs > 5

    def test_multi_steps_that_always_fail_become_rare(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        num_tries = 0

        def run(self: DeviceLoop, *_: Any) -> None:
            nonlocal num_tries
            num_tries += 1
            raise BoomError

        monkeypatch.setattr(DeviceLoop, "run", run)
        engine = make_engine(CountingUp(), num_steps_per_sync=4, draft=False)
        with pytest.warns(RuntimeWarning, match="several steps at once failed") as caught:
            reply = engine.session().turn("x", max_tokens=100)
        assert len(caught) == 1
        assert len(reply.token_ids) == 100
        assert num_tries == 7  # after 1, 2, 4, ... single steps

    def test_an_error_in_the_model_ends_only_its_row(self, make_engine: MakeEngine) -> None:
        """The multi-step fails as a whole; the plain step that follows finds whose fault it is."""
        model = CountingUp()
        engine = make_engine(model, num_steps_per_sync=4)
        good, bad = engine.session(), engine.session()

        def before(batch: Any) -> None:
            if 60 in batch.positions.tolist():
                raise BoomError

        model.before_forward = before
        items = [(good, "g"), (bad, "b" * 35)]
        with pytest.warns(RuntimeWarning, match="BoomError"):
            outcomes = engine.gather(items, max_tokens=40, return_exceptions=True)
        assert isinstance(outcomes[1], BoomError)
        assert bad.num_tokens == 0
        assert len(outcomes[0].token_ids) == 40
        assert multi_step(engine).num_syncs > 2

    @pytest.mark.parametrize("at", range(12))
    def test_an_interrupt_anywhere(self, make_engine: MakeEngine, at: int) -> None:
        model = CountingUp()
        engine = make_engine(model, num_steps_per_sync=4)
        session = engine.session()
        session.turn("x", max_tokens=10)
        tokens = session.token_ids
        calls = iter(range(1000))

        def before(batch: Any) -> None:
            if next(calls) == at:
                raise KeyboardInterrupt

        model.before_forward = before
        with pytest.raises(KeyboardInterrupt):
            session.turn("y", max_tokens=40)
        assert session.token_ids == tokens
        assert engine.check_integrity() is None
        model.before_forward = lambda batch: None
        single = make_engine(CountingUp()).session()
        for each in (single, session):
            if each is single:
                each.turn("x", max_tokens=10)
            each.turn("something else", max_tokens=30)
        assert session.token_ids == single.token_ids

    @pytest.mark.parametrize("at", [0, 1, 2, 3])
    def test_a_reservation_that_breaks_loses_nothing(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, at: int
    ) -> None:
        """KV that cannot be trusted any more is computed anew."""
        engine = make_engine(num_steps_per_sync=4)
        one, other = engine.session(), engine.session()
        reserve = MultiStep._reserve
        calls = iter(range(1000))

        def failing(self: KVCache, *arguments: Any, **options: Any) -> None:
            append(self, *arguments, **options)
            if is_multi_step and next(calls) == at:
                raise BoomError

        is_multi_step = False
        append = KVCache.reserve

        def watched(*arguments: Any, **options: Any) -> Any:
            nonlocal is_multi_step
            is_multi_step = True
            try:
                return reserve(*arguments, **options)
            finally:
                is_multi_step = False

        monkeypatch.setattr(KVCache, "reserve", failing)
        monkeypatch.setattr(MultiStep, "_reserve", watched)
        with pytest.warns(RuntimeWarning, match="BoomError"):
            replies = engine.gather([(one, "hello"), (other, "you")], max_tokens=30)
        monkeypatch.undo()
        single = make_engine()
        expected = single.gather(
            [(single.session(), "hello"), (single.session(), "you")], max_tokens=30
        )
        assert [r.token_ids for r in replies] == [r.token_ids for r in expected]
        assert multi_step(engine).num_syncs > 0

    @pytest.mark.parametrize("num_turns", [0, 1])
    def test_a_drafter_that_fails_ends_only_its_turn(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, num_turns: int
    ) -> None:
        """A turn that has failed takes part in no further step, a plain one included."""
        engine = make_engine(CountingUp(), num_steps_per_sync=4)
        good, bad = engine.session(), engine.session()
        for _ in range(num_turns):
            engine.gather([(good, "g"), (bad, "b")], max_tokens=6)
        before = bad.token_ids
        drafter = bad._state.drafter
        propose_all = batching.propose_all

        def failing(drafters: Any, *arguments: Any) -> Any:
            if drafter in drafters:
                raise BoomError
            return propose_all(drafters, *arguments)

        monkeypatch.setattr(batching, "propose_all", failing)
        monkeypatch.setattr(drafter, "propose", lambda *_: failing([drafter]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            replies = engine.gather([(good, "x"), (bad, "y")], 12, return_exceptions=True)
        assert isinstance(replies[1], BoomError)
        assert bad.token_ids == before
        assert bad._state.has_kv is (num_turns > 0)
        assert isinstance(replies[0], Reply)
        assert len(replies[0].token_ids) == 12

    def test_an_error_while_text_is_made(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = make_engine(CountingUp(), num_steps_per_sync=8)
        session, other = engine.session(), engine.session()
        engine.gather([(session, "x"), (other, "x")], max_tokens=4)
        tokens = session.token_ids
        push = StopRules.push
        calls = 0

        def failing(self: StopRules, token: int) -> Any:
            nonlocal calls
            calls += 1
            if calls == 9:
                raise BoomError
            return push(self, token)

        monkeypatch.setattr(StopRules, "push", failing)
        outcomes = engine.gather(
            [(session, "y"), (other, "y")], max_tokens=20, return_exceptions=True
        )
        monkeypatch.setattr(StopRules, "push", push)
        assert isinstance(outcomes[0], BoomError)
        assert session.token_ids == tokens
        assert len(outcomes[1].token_ids) == 20
        single = make_engine(CountingUp()).session()
        single.turn("x", max_tokens=4)
        for each in (session, single):
            each.turn("something else", max_tokens=20)
        assert session.token_ids == single.token_ids
