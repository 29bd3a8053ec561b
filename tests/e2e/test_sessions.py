"""What a session is: deltas, receipts, sharing, streams, stops, limits."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import OutOfPagesError, SessionBusyError
from stateful_kv.models.llama import LlamaModel
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import END, FIRST_BYTE, ByteTokenizer, CountingUp, Recorder, Scripted


def text_tokens(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def num_computed(engine: Engine) -> int:
    assert isinstance(engine.model, Recorder)
    return engine.model.num_tokens


class TestDeltas:
    def test_a_turn_computes_its_delta_and_one_token(self, make_engine: MakeEngine) -> None:
        tokenizer = ByteTokenizer()
        engine = make_engine(tokenizer=tokenizer, draft=False)
        session = engine.session(system="long " * 30)
        for number in range(6):
            before = session.num_tokens
            computed = num_computed(engine)
            reply = session.turn(f"message {number}", max_tokens=10, ignore_eos=True)
            receipt = reply.receipt
            delta = tokenizer.calls[-1][1]
            pending = 1 if number else 0
            assert receipt.prompt_tokens == before + delta
            assert receipt.computed_tokens == delta + pending
            assert receipt.reused_tokens == before - pending
            assert num_computed(engine) - computed == delta + pending + 9
            assert receipt.output_tokens == len(reply.token_ids) == 10
            assert receipt.pages_held == -(-(session.num_tokens - 1) // 16)
            assert receipt.total_s >= receipt.prefill_s + receipt.decode_s
            assert 0 < receipt.ttft_s <= receipt.total_s
        assert [kind for kind, _ in tokenizer.calls] == ["start"] + ["delta"] * 5
        assert session.num_turns == 6

    def test_generated_tokens_are_kept_as_they_are(self, make_engine: MakeEngine) -> None:
        # Two bytes that are no UTF-8: tokenising the text of the reply would give other tokens.
        script = [FIRST_BYTE + 0xC3, FIRST_BYTE + 0x28, END]
        session = make_engine(Scripted(script)).session()
        reply = session.turn("hi")
        assert reply.token_ids == script
        assert reply.text == "\ufffd("
        assert reply.finish_reason == "stop"
        assert session.token_ids[-3:] == script
        session.turn("again")
        record = session.turns[0]
        assert session.token_ids[record.reply_start : record.end] == script

    def test_a_cut_reply_is_closed_by_the_next_delta(self, make_engine: MakeEngine) -> None:
        session = make_engine(CountingUp()).session()
        session.turn("hi", max_tokens=3)
        end = session.turns[0].end
        session.turn("again", max_tokens=3)
        assert session.token_ids[end] == END

    def test_messages_may_be_dicts_and_lists(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        one, other = engine.session(), engine.session()
        one.turn("text", max_tokens=2)
        other.turn({"role": "user", "content": "text"}, max_tokens=2)
        assert one.token_ids == other.token_ids
        one.turn(
            [{"role": "tool", "content": ""}, {"role": "user", "content": "go on"}], max_tokens=2
        )
        assert one.num_turns == 2

    def test_truncate_in_the_middle_of_a_turn(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        session = engine.session()
        for _ in range(3):
            session.turn("hello", max_tokens=10, ignore_eos=True)
        keep = session.turns[1].end - 4
        kept = session.token_ids[:keep]
        session.truncate(tokens=keep)
        assert session.token_ids == kept
        assert session.num_turns == 1
        reply = session.turn("on", max_tokens=4)
        assert reply.receipt.reused_tokens == keep
        session.truncate(tokens=session.num_tokens)
        session.truncate(tokens=0)
        assert session.num_tokens == session.num_turns == 0


class TestSharing:
    def test_a_system_prompt_is_computed_once(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        system = "you are one of several agents " * 5
        first = engine.session(system=system).turn("a", max_tokens=40, ignore_eos=True)
        second = engine.session(system=system).turn("b", max_tokens=4, ignore_eos=True)
        assert first.receipt.reused_tokens == 0
        assert second.receipt.reused_tokens >= len(system)
        assert second.receipt.computed_tokens <= 6

    def test_sessions_that_start_together_share_too(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        system = "you are one of several agents " * 5
        sessions = [engine.session(system=system) for _ in range(4)]
        replies = engine.gather([(s, f"task {i}") for i, s in enumerate(sessions)], max_tokens=8)
        computed = [reply.receipt.computed_tokens for reply in replies]
        assert computed[0] > len(system)
        assert max(computed[1:]) < 16 + 12

    def test_equal_pages_are_folded(self, make_engine: MakeEngine) -> None:
        engine = make_engine(draft=False)
        one, other = engine.session(), engine.session()
        one.turn("same " * 20, max_tokens=30, ignore_eos=True)
        other.turn("same " * 20, max_tokens=30, ignore_eos=True)
        pages = engine.cache.num_pages - engine.cache.num_free_pages
        assert one.token_ids == other.token_ids
        assert pages == (one.num_tokens - 1) // 16 + 2  # each has a partial page of its own

    def test_a_closed_session_leaves_its_prefix(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        session = engine.session(system="s" * 50)
        session.turn("hello", max_tokens=10, ignore_eos=True)
        committed = session.num_cached_tokens
        tokens = session.token_ids
        session.close()
        assert engine.cache.match_len(np.array(tokens, dtype=np.int32)) == committed

    def test_pages_of_a_rewound_session_are_shared_again(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        session.turn("a" * 60, max_tokens=20)
        session.turn("b" * 60, max_tokens=20)
        session.rewind(turn=1)
        session.turn("c" * 60, max_tokens=20)
        length = session.num_cached_tokens
        session.suspend()
        reply = session.turn("d", max_tokens=2)
        assert reply.receipt.reused_tokens == length - length % 16

    def test_fork_takes_no_pages(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        session = engine.session()
        session.turn("hello " * 20, max_tokens=10)
        free = engine.cache.num_free_pages
        forks = [session.fork(str(number)) for number in range(8)]
        assert engine.cache.num_free_pages == free
        for fork in forks:
            fork.close()
        assert engine.check_integrity() is None


class TestStops:
    def reply(self, make_engine: MakeEngine, text: str, **sampling: object):
        engine = make_engine(Scripted([*text_tokens(text), END]))
        session = engine.session()
        reply = session.turn("go", max_tokens=100, **sampling)
        assert session.token_ids[session.turns[0].reply_start :] == reply.token_ids
        return reply

    def test_end_of_turn(self, make_engine: MakeEngine) -> None:
        reply = self.reply(make_engine, "hello")
        assert (reply.text, reply.finish_reason) == ("hello", "stop")
        assert reply.token_ids == [*text_tokens("hello"), END]

    def test_ignore_eos(self, make_engine: MakeEngine) -> None:
        reply = self.reply(make_engine, "hello", ignore_eos=True)
        assert reply.finish_reason == "length"
        assert len(reply.token_ids) == 100

    def test_stop_string_is_cut_and_its_tokens_kept(self, make_engine: MakeEngine) -> None:
        reply = self.reply(make_engine, "one two three", stop=("two",))
        assert (reply.text, reply.finish_reason) == ("one ", "stop")
        assert reply.token_ids == text_tokens("one two")

    def test_stop_string_ends_inside_a_character(self, make_engine: MakeEngine) -> None:
        reply = self.reply(make_engine, "größer", stop=("ö",))
        assert reply.text == "gr"
        assert reply.token_ids == text_tokens("grö")

    def test_stop_token(self, make_engine: MakeEngine) -> None:
        reply = self.reply(make_engine, "abcdef", stop_token_ids=(FIRST_BYTE + ord("d"),))
        assert (reply.text, reply.finish_reason) == ("abc", "stop")
        assert reply.token_ids == text_tokens("abcd")

    def test_an_unfinished_stop_string_is_shown_at_the_end(self, make_engine: MakeEngine) -> None:
        assert self.reply(make_engine, "wait for", stop=("forever",)).text == "wait for"

    @pytest.mark.parametrize("stop", ["b c", "c aa", "a b c a", "zz", "é"])
    @pytest.mark.parametrize("streamed", [False, True])
    def test_drafts_do_not_move_a_stop(
        self, make_engine: MakeEngine, stop: str, streamed: bool
    ) -> None:
        script = [*text_tokens("aa b c aa b c aa b c aa b c aé"), END]
        outcomes = []
        for draft in (False, True):
            session = make_engine(Scripted(script), draft=draft).session()
            session.turn("warm up", max_tokens=40)
            if streamed:
                text = "".join(session.stream("go", max_tokens=40, stop=(stop,)))
                reply = session.last_reply
                assert reply is not None
                assert text == reply.text
            else:
                reply = session.turn("go", max_tokens=40, stop=(stop,))
            outcomes.append((reply.text, reply.token_ids, reply.finish_reason, session.token_ids))
            drafted = reply.receipt.drafted_tokens
        assert outcomes[0] == outcomes[1]
        assert drafted > 0

    @pytest.mark.parametrize("max_tokens", [1, 2, 5, 17])
    def test_max_tokens_is_exact_with_drafts(
        self, make_engine: MakeEngine, max_tokens: int
    ) -> None:
        session = make_engine(Scripted(text_tokens("abab") * 20)).session()
        session.turn("x", max_tokens=50)
        reply = session.turn("x", max_tokens=max_tokens)
        assert len(reply.token_ids) == max_tokens
        assert reply.finish_reason == "length"
        if max_tokens <= 2:  # the first token comes with the prompt, the last is never a draft
            assert reply.receipt.drafted_tokens == 0

    @pytest.mark.parametrize("room", [1, 2, 5, 30])
    @pytest.mark.parametrize("draft", [False, True])
    def test_a_full_context_ends_the_reply(
        self, make_engine: MakeEngine, room: int, draft: bool
    ) -> None:
        prompt_len = 1 + 4 + 1 + 1
        model = Scripted(text_tokens("abab"), max_position=prompt_len + room)
        session = make_engine(model, draft=draft).session()
        reply = session.turn("long", max_tokens=1000)
        assert (len(reply.token_ids), reply.finish_reason) == (room, "length")
        assert session.num_tokens == prompt_len + room


class TestSampling:
    def test_a_seed_repeats_and_is_reported(self, make_engine: MakeEngine) -> None:
        engine = make_engine()
        params = SamplingParams(temperature=1.0, ignore_eos=True)
        first = engine.session(sampling=params).turn("hello", max_tokens=30)
        seed = first.receipt.seed
        assert seed is not None
        again = engine.session(sampling=params).turn("hello", max_tokens=30, seed=seed)
        other = engine.session(sampling=params).turn("hello", max_tokens=30, seed=seed + 1)
        assert again.token_ids == first.token_ids != other.token_ids
        assert engine.session().turn("hello", max_tokens=1).receipt.seed is None

    def test_one_turn_may_differ(self, make_engine: MakeEngine) -> None:
        session = make_engine().session(sampling=SamplingParams(temperature=5.0, seed=1))
        session.turn("a", max_tokens=5)
        session.rewind(0)
        greedy = session.turn("a", max_tokens=5, temperature=0.0).token_ids
        assert greedy == make_engine().session().turn("a", max_tokens=5).token_ids

    @pytest.mark.parametrize("draft", [False, True])
    def test_penalties_see_the_reply(self, make_engine: MakeEngine, draft: bool) -> None:
        session = make_engine(Scripted([40, 41]), draft=draft).session()
        session.turn("x", max_tokens=20)
        kept = session.turn("x", max_tokens=20, frequency_penalty=1.0).token_ids
        assert kept[:19] == [40, 41] * 9 + [40]
        assert kept[19] == 41
        reply = session.turn("x", max_tokens=6, presence_penalty=11.0)
        assert reply.token_ids == [40, 41, 0][: len(reply.token_ids)]


class TestStreams:
    def test_pieces_join_to_the_text(self, make_engine: MakeEngine) -> None:
        session = make_engine(Scripted([*text_tokens("naïve café"), END])).session()
        pieces = list(session.stream("go"))
        assert pieces == list("naïve café")
        assert session.last_reply is not None
        assert session.last_reply.text == "naïve café"
        assert session.last_reply.finish_reason == "stop"
        assert not session.is_busy

    @pytest.mark.parametrize("num_read", [0, 1, 7])
    @pytest.mark.parametrize("how", ["close", "drop", "with"])
    def test_closing_early_keeps_what_was_read(
        self, make_engine: MakeEngine, num_read: int, how: str
    ) -> None:
        outcomes = []
        for draft in (False, True):
            session = make_engine(Scripted(text_tokens("abé ")), draft=draft).session()
            session.turn("x", max_tokens=20)
            before = session.token_ids
            stream = session.stream("go", max_tokens=50)
            read = [next(stream) for _ in range(num_read)]
            assert session.is_busy
            if how == "close":
                stream.close()
                stream.close()
            elif how == "with":
                with stream:
                    pass
            else:
                del stream
                gc.collect()
            assert not session.is_busy
            reply = session.last_reply
            assert reply is not None
            assert reply.finish_reason == "cancelled"
            assert reply.text == "".join(read)
            if not num_read:
                assert session.token_ids == before
            else:
                assert session.token_ids[-len(reply.token_ids) :] == reply.token_ids
                assert reply.token_ids == text_tokens(reply.text)
                assert session.num_turns == 2
            outcomes.append(session.token_ids)
            session.turn("next", max_tokens=5)
        assert outcomes[0] == outcomes[1]

    def test_a_session_in_a_stream_is_busy(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        other = engine.session()
        stream = session.stream("go", max_tokens=10)
        next(stream)
        for call in (
            lambda: session.turn("x"),
            lambda: session.stream("x"),
            lambda: session.fork(),
            lambda: session.rewind(0),
            lambda: session.truncate(0),
            lambda: session.suspend(),
        ):
            with pytest.raises(SessionBusyError):
                call()
        other.turn("meanwhile", max_tokens=30)
        assert len("".join(stream)) == 9
        assert session.last_reply is not None
        assert len(session.last_reply.token_ids) == 10

    def test_closing_a_session_ends_its_stream(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp())
        session = engine.session()
        stream = session.stream("go", max_tokens=10)
        next(stream)
        session.close()
        assert list(stream) == []
        assert engine.check_integrity() is None


class TestPressure:
    def test_idle_sessions_give_way_in_order(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=16 * 16)
        old, recent, busy = engine.session(), engine.session(), engine.session()
        old.turn("o" * 50, max_tokens=4)
        recent.turn("r" * 50, max_tokens=4)
        stream = busy.stream("b" * 50, max_tokens=4)
        next(stream)
        engine.session().turn("n" * 70, max_tokens=4)
        assert old.num_cached_tokens == 0
        assert recent.num_cached_tokens > 0
        assert busy.num_cached_tokens > 0
        assert len("".join(stream)) == 3
        before = old.num_tokens
        reply = old.turn("again", max_tokens=4)
        assert reply.receipt.prompt_tokens > before

    def test_a_pool_that_is_too_small_names_its_pages(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=160)
        session = engine.session()
        session.turn("a", max_tokens=4)
        tokens = session.token_ids
        with pytest.raises(OutOfPagesError) as caught:
            session.turn("b" * 300)
        assert caught.value.wanted == -(-(len(tokens) + 304) // 16)
        # One page is the session's, one the tree's copy of its first prompt.
        assert (caught.value.free, caught.value.evictable, caught.value.pinned) == (8, 1, 1)
        assert session.token_ids == tokens
        with pytest.raises(OutOfPagesError):
            session.turn("b" * 60, max_tokens=1000)
        assert session.token_ids == tokens
        assert session.turn("c", max_tokens=4).finish_reason == "length"

    def test_one_starved_turn_leaves_the_others(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=160)
        one, other = engine.session(), engine.session()
        outcomes = engine.gather([(one, "a"), (other, "b")], max_tokens=140, return_exceptions=True)
        assert sum(isinstance(outcome, OutOfPagesError) for outcome in outcomes) == 1
        assert engine.check_integrity() is None

    @pytest.mark.parametrize("length", [15, 16, 17])
    def test_exactly_one_page(
        self, make_engine: MakeEngine, llama: LlamaModel, length: int
    ) -> None:
        engine = make_engine(kv_tokens=16)
        session = engine.session()
        message = "m" * (length - 3)
        if length > 16:
            with pytest.raises(OutOfPagesError):
                session.turn(message, max_tokens=1)
        else:
            reply = session.turn(message, max_tokens=1)
            assert reply.receipt.prompt_tokens == length
        assert engine.check_integrity() is None
