"""Several steps between two looks of the host give what as many single steps give.

Engines that take several steps at once are compared with engines that take single steps:
replies, books, KV.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.drafts.ngram import NgramDrafter
from stateful_kv.drafts.proposer import Draft
from stateful_kv.engine.config import EngineConfig
from tests.e2e.conftest import MakeEngine, on_devices
from tests.e2e.multi_step_play import MESSAGES, STEPS, kv_of, multi_step, play
from tests.e2e.tiny import END, FIRST_BYTE, CountingUp, Recorder, Scripted

SAMPLED = {"temperature": 0.8, "seed": 11, "top_p": 0.9, "min_p": 0.01}
SETTINGS = [{}, SAMPLED, {"temperature": 1.3, "seed": 2**64 - 1, "top_k": 40}]


class TestSameReplies:
    @on_devices
    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("draft", [True, False])
    @pytest.mark.parametrize("sampling", SETTINGS)
    @pytest.mark.parametrize("kv_dtype", ["float16", "int8"])
    def test_tokens_books_and_kv(
        self, make_engine: MakeEngine, steps: int, draft: bool, sampling: dict, kv_dtype: str
    ) -> None:
        single = make_engine(draft=draft, kv_dtype=kv_dtype).session()
        engine = make_engine(
            draft=draft, kv_dtype=kv_dtype, num_steps_per_sync=steps, is_recorded=False
        )
        session = engine.session()
        assert play(session, **sampling) == play(single, **sampling)
        assert session.turns == single.turns
        assert session.num_cached_tokens == single.num_cached_tokens == session.num_tokens - 1
        assert kv_of(session) == kv_of(single)
        assert 0 < multi_step(engine).num_syncs <= 4 * (24 // steps + 1)

    @pytest.mark.parametrize("steps", STEPS)
    def test_rows_have_the_bits_of_single_steps(self, make_engine: MakeEngine, steps: int) -> None:
        plain, engine = make_engine(draft=False), make_engine(num_steps_per_sync=steps)
        play(plain.session())
        play(engine.session())
        assert isinstance(plain.model, Recorder)
        assert isinstance(engine.model, Recorder)
        assert set(plain.model.rows) <= set(engine.model.rows)

    @on_devices
    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("draft", [True, False])
    @pytest.mark.parametrize("num_sessions", [2, 3, 5])
    def test_several_sessions(
        self, make_engine: MakeEngine, steps: int, draft: bool, num_sessions: int
    ) -> None:
        """They end at different times, and some draft while others do not."""
        replies = []
        for config in ({}, {"num_steps_per_sync": steps}):
            engine = make_engine(draft=draft, is_recorded=False, **config)
            sessions = [
                engine.session(
                    system="shared",
                    draft=draft and index != 1,
                    sampling=SamplingParams(**SETTINGS[index % len(SETTINGS)]),
                )
                for index in range(num_sessions)
            ]
            texts = []
            for turn, message in enumerate(MESSAGES):
                items = [
                    (session, f"{message} {index * turn}")
                    for index, session in enumerate(sessions)
                    if (index + turn) % 3 < 2
                ]
                texts += [r.token_ids for r in engine.gather(items, 10 + 7 * turn)]
            replies.append((texts, [session.token_ids for session in sessions]))
            assert (multi_step(engine).num_syncs > 0) is bool(config)
        assert replies[0] == replies[1]

    @on_devices
    @pytest.mark.parametrize("steps", STEPS)
    def test_forks_rewinds_and_truncates(self, make_engine: MakeEngine, steps: int) -> None:
        """What the device knows of a session ends where its ledger was cut."""
        texts = []
        for config in ({}, {"num_steps_per_sync": steps}):
            session = make_engine(is_recorded=False, **config).session()
            play(session, MESSAGES[:2])
            child = session.fork()
            play(session, ("left",))
            play(child, ("right", "more"))
            session.rewind(1)
            play(session, ("again, but not as before",))
            child.truncate(child.num_tokens - 9)
            play(child, ("on",))
            session.suspend()
            play(session, ("on",))
            texts.append((session.token_ids, child.token_ids))
        assert texts[0] == texts[1]

    @pytest.mark.parametrize("max_tokens", range(1, 12))
    def test_max_tokens(self, make_engine: MakeEngine, max_tokens: int) -> None:
        engine = make_engine(CountingUp(), num_steps_per_sync=4, draft=False)
        single = make_engine(CountingUp())
        for each in (engine, single):
            session = each.session()
            for message in ("a", "b"):
                reply = session.turn(message, max_tokens=max_tokens)
                assert (len(reply.token_ids), reply.finish_reason) == (max_tokens, "length")
        left = max_tokens - 1  # the first token comes with the prompt; a last one alone is a step
        assert multi_step(engine).num_syncs == 2 * (left // 4 + (left % 4 > 1))

    def test_the_end_of_the_context(self, make_engine: MakeEngine) -> None:
        replies = []
        for steps in (1, 8):
            engine = make_engine(CountingUp(max_position=50), num_steps_per_sync=steps)
            replies.append(engine.session().turn("m" * 30, max_tokens=100))
        assert replies[0].token_ids == replies[1].token_ids
        assert replies[1].finish_reason == "length"
        assert len(replies[1].token_ids) == 50 - 33

    def test_a_session_goes_on_after_the_model_was_changed_for_single_steps(
        self, make_engine: MakeEngine
    ) -> None:
        """Tokens of plain steps between two multi-steps reach the device with the next one."""
        single = make_engine(CountingUp()).session()
        session = make_engine(CountingUp(), num_steps_per_sync=3).session()
        for sampling in ({}, {"presence_penalty": 0.5}, {}, {"frequency_penalty": 0.5}, {}):
            for each in (single, session):
                each.turn("x", max_tokens=11, **sampling)
        assert session.token_ids == single.token_ids


class TestStops:
    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("place", range(2, 12))
    def test_the_end_token(self, make_engine: MakeEngine, steps: int, place: int) -> None:
        script = [FIRST_BYTE + 65 + i for i in range(place)] + [END, 99, 98]
        session = make_engine(Scripted(script), num_steps_per_sync=steps).session()
        for _ in range(3):
            reply = session.turn("hi", max_tokens=40)
            assert reply.token_ids == script[: place + 1]
            assert reply.finish_reason == "stop"
            assert session.num_cached_tokens == session.num_tokens - 1

    @pytest.mark.parametrize("steps", STEPS)
    @pytest.mark.parametrize("draft", [True, False])
    def test_stop_strings_in_the_middle_of_a_multi_step(
        self, make_engine: MakeEngine, steps: int, draft: bool
    ) -> None:
        script = [FIRST_BYTE + byte for byte in b"abcabcabcabcX stop here, abcabc"]
        outcomes = []
        for config in ({}, {"num_steps_per_sync": steps}):
            engine = make_engine(Scripted(script), draft=draft, **config)
            one, other = engine.session(), engine.session()
            found = []
            for stop in ("bcX", "stop", "p h", "no such", "caX"):
                items = [(one, "hi"), (other, "ho")]
                replies = engine.gather(items, 26, stop=(stop,))
                found += [(r.text, r.token_ids, r.finish_reason) for r in replies]
                assert one.num_cached_tokens == one.num_tokens - 1
            outcomes.append((found, one.token_ids, other.token_ids, kv_of(one)))
        assert outcomes[0] == outcomes[1]

    def test_more_stop_tokens_than_the_device_knows(self, make_engine: MakeEngine) -> None:
        stops = tuple(FIRST_BYTE + 100 + i for i in range(30))
        for last in (stops[0], stops[-1]):
            script = [FIRST_BYTE + i for i in (60, 61, 62, 63)] + [last, 77, 78]
            engine = make_engine(Scripted(script), num_steps_per_sync=8)
            reply = engine.session().turn("x", max_tokens=30, stop_token_ids=stops)
            assert reply.token_ids == script[:5]
            assert reply.receipt.steps <= 5
            assert multi_step(engine).num_syncs == 1


class TestBooks:
    @pytest.mark.parametrize("steps", STEPS)
    def test_every_token_comes_from_a_step_or_a_draft(
        self, make_engine: MakeEngine, steps: int
    ) -> None:
        engine = make_engine(num_steps_per_sync=steps)
        session = engine.session()
        accepted = 0
        for message in MESSAGES:
            receipt = session.turn(message, max_tokens=60, ignore_eos=True).receipt
            assert receipt.steps == 60 - receipt.accepted_tokens
            assert receipt.accepted_tokens <= receipt.drafted_tokens
            assert receipt.total_s >= receipt.prefill_s + receipt.decode_s
            assert min(receipt.prefill_s, receipt.decode_s, receipt.host_s) > 0
            accepted += receipt.accepted_tokens
        assert accepted > 10

    def test_what_was_dropped_is_not_in_the_receipt(self, make_engine: MakeEngine) -> None:
        script = [FIRST_BYTE + byte for byte in b"abcdeX and so on, on and on"]
        engine = make_engine(Scripted(script), num_steps_per_sync=8, draft=False)
        receipt = engine.session().turn("hi", stop=("eX",)).receipt
        assert (receipt.steps, receipt.output_tokens) == (6, 6)
        assert (receipt.drafted_tokens, receipt.accepted_tokens) == (0, 0)

    def test_without_drafts_nothing_is_drafted(self, make_engine: MakeEngine) -> None:
        engine = make_engine(num_steps_per_sync=4)
        silent, other = engine.session(draft=False), engine.session()
        for _ in range(3):
            replies = engine.gather([(silent, "again"), (other, "again")], 30, ignore_eos=True)
            assert replies[0].receipt.drafted_tokens == 0
        assert replies[1].receipt.accepted_tokens > 0

    def test_the_host_drafter_follows(self, make_engine: MakeEngine) -> None:
        """After a multi-step a plain step drafts from all of the text."""
        engine = make_engine(num_steps_per_sync=8)
        session = engine.session()
        play(session, MESSAGES * 2)
        multi_step(engine)._max_steps = 1
        receipt = session.turn(MESSAGES[0], max_tokens=60, ignore_eos=True).receipt
        assert receipt.accepted_tokens > 0

    @pytest.mark.parametrize("right", [True, False])
    def test_the_first_step_takes_the_draft_of_the_host(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, right: bool
    ) -> None:
        """The text counts up and repeats nothing: on its own the device drafts nothing."""
        expected = make_engine(CountingUp()).session().turn("x", 40, ignore_eos=True)
        observed: list[tuple[int, int]] = []

        def propose(turns: Any, max_draft: int) -> list[Draft]:
            drafts = []
            for turn in turns:
                ids = [int(turn.state.ledger.tokens[-1]) + (not right)]
                for _ in range(3):
                    ids.append(FIRST_BYTE + (ids[-1] + 1) % 200)  # as the model counts
                drafts.append(Draft(np.array(ids[1:], dtype=np.int32), 5, "test"))
            return drafts

        def observe(self: Any, draft: Draft, num_accepted: int) -> None:
            observed.append((len(draft), num_accepted))

        monkeypatch.setattr("stateful_kv.engine.multi_step.propose", propose)
        monkeypatch.setattr(NgramDrafter, "worthwhile", lambda self, draft, *_: draft)
        monkeypatch.setattr(NgramDrafter, "observe", observe)
        engine = make_engine(CountingUp(), num_steps_per_sync=4)
        reply = engine.session().turn("x", 40, ignore_eos=True)
        assert reply.token_ids == expected.token_ids
        assert len(observed) >= multi_step(engine).num_syncs > 3
        assert observed[:4] == [(3, 3 if right else 0)] * 4  # the last ones have less room
        assert reply.receipt.drafted_tokens == sum(drafted for drafted, _ in observed)
        assert reply.receipt.accepted_tokens == sum(accepted for _, accepted in observed)


class TestConfig:
    @pytest.mark.parametrize("value", [0, -1, 65, 1.5, "8", True])
    def test_values(self, value: Any) -> None:
        with pytest.raises(ValueError, match="num_steps_per_sync: expected"):
            EngineConfig(num_steps_per_sync=value)

    def test_defaults(self) -> None:
        assert EngineConfig().num_steps_per_sync == 1
        assert EngineConfig(device="cuda").num_steps_per_sync == 8
        assert EngineConfig(device="cuda", num_steps_per_sync=64).num_steps_per_sync == 64
