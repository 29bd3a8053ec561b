"""Who gives way when pages run out, and what open sessions share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stateful_kv import ops
from stateful_kv.engine.engine import Engine
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.cache import KVCache
from stateful_kv.kv.roots import DEFAULT_ROOT, RootIds, RootKey
from stateful_kv.session.session import Session
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import CountingUp, Provenance, Recorder


def pages(engine: Engine) -> tuple[int, int]:
    return engine.cache.num_free_pages, engine.cache.num_evictable_pages


def match_len(engine: Engine, tokens: list[int]) -> int:
    return engine.cache.match_len(np.array(tokens, dtype=np.int32))


class TestHopelessRequests:
    @pytest.mark.parametrize("max_batch_tokens", [1024, 20])
    def test_nothing_is_given_up_in_vain(
        self, make_engine: MakeEngine, max_batch_tokens: int
    ) -> None:
        engine = make_engine(CountingUp(), kv_tokens=160, max_batch_tokens=max_batch_tokens)
        closed, idle, busy = engine.session(), engine.session(), engine.session()
        closed.turn("c" * 20, max_tokens=4)
        left = closed.token_ids
        closed.close()
        idle.turn("i" * 20, max_tokens=4)
        stream = busy.stream("b" * 40, max_tokens=4)
        text = next(stream)
        tokens = [left, idle.token_ids, busy.token_ids]
        before = pages(engine), idle.num_cached_tokens, [match_len(engine, t) for t in tokens]
        assert before[1] > 0
        assert before[2][0] > 0
        newcomer = engine.session()
        with pytest.raises(OutOfPagesError) as caught:
            newcomer.turn("n" * 120)  # 8 pages of 10; 3 are the stream's
        after = pages(engine), idle.num_cached_tokens, [match_len(engine, t) for t in tokens]
        assert after == before
        assert (caught.value.free, caught.value.evictable) == before[0]
        assert caught.value.wanted == 8
        # All but the stream's own pages is enough: now they give way.
        text += "".join(stream)
        receipt = newcomer.turn("n" * 120, max_tokens=1).receipt
        assert receipt.reused_tokens + receipt.computed_tokens == 123
        assert idle.num_cached_tokens == 0
        assert len(text) == 4

    def test_the_bound_is_exact(self, make_engine: MakeEngine) -> None:
        for fits in (True, False):
            engine = make_engine(CountingUp(), kv_tokens=160, draft=False)
            idle, busy = engine.session(), engine.session()
            idle.turn("i" * 60, max_tokens=4)
            stream = busy.stream("b" * 40, max_tokens=4)
            next(stream)
            held = idle.num_cached_tokens
            # Of 10 pages the stream has three. One more stays with the tree: both prompts begin
            # with the same token, which lies in the page of the older one.
            length = 6 * 16 - (3 if fits else 2)
            if fits:
                engine.session().turn("n" * length, max_tokens=1)
            else:
                with pytest.raises(OutOfPagesError):
                    engine.session().turn("n" * length, max_tokens=1)
            assert idle.num_cached_tokens == (0 if fits else held)

    def test_a_tail_shared_with_an_idle_fork_needs_no_copy(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=32, draft=False)
        session = engine.session()
        session.turn("s" * 17, max_tokens=3)
        fork = session.fork()
        assert pages(engine) == (0, 0)
        fork.turn("x", max_tokens=2)
        assert session.num_cached_tokens == 0
        assert fork.num_cached_tokens > 0

    def test_a_reply_takes_what_it_needs_page_by_page(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=160, draft=False)
        idle, session = engine.session(), engine.session()
        idle.turn("i" * 20, max_tokens=4)
        stream = session.stream("s" * 20, max_tokens=1000)
        for _ in range(60):
            next(stream)
        assert idle.num_cached_tokens > 0, "there is still room for both"
        with pytest.raises(OutOfPagesError):
            list(stream)
        assert session.num_tokens == 0
        assert idle.turn("again", max_tokens=4).finish_reason == "length"

    def test_a_draft_takes_nothing_from_idle_sessions(self) -> None:
        cache = KVCache(1, 1, 16, num_pages=2, page_size=16)
        idle, busy = (cache.match_and_adopt(np.empty(0, dtype=np.int32))[0] for _ in range(2))
        for sequence in (idle, busy):
            cache.reserve(sequence, 16)
            cache.commit([sequence], [16])
        cache.rest(idle)
        with pytest.raises(OutOfPagesError):
            cache.reserve(busy, 4, from_resting=False)
        assert cache.has(idle)
        cache.reserve(busy, 4)
        assert not cache.has(idle)


class TestPromptTails:
    """With pages of 64 tokens, prompts of 25 to 40: as a short system prompt has."""

    SYSTEM = "answer in one line only"

    def play(self, session: Session) -> None:
        for message in ("one", "two two", "three"):
            session.turn(message, max_tokens=20, ignore_eos=True)

    def test_an_open_session_shares_a_part_of_a_page(self, make_engine: MakeEngine) -> None:
        engine = make_engine(page_size=64, draft=False)
        first, second, third = (engine.session(system=self.SYSTEM) for _ in range(3))
        stream = first.stream("first", max_tokens=40, ignore_eos=True)
        next(stream)
        receipt = second.turn("second", max_tokens=8, ignore_eos=True).receipt
        shared = 1 + len(self.SYSTEM) + 1 + 1  # up to the role of the user's message
        assert receipt.reused_tokens == shared
        assert receipt.computed_tokens == receipt.prompt_tokens - shared
        list(stream)
        # The same prompt as another: all of it is there, the last token is computed for its row.
        receipt = third.turn("first", max_tokens=8, ignore_eos=True).receipt
        assert receipt.computed_tokens == 1
        for session in (first, second, third):
            self.play(session)
        assert engine.check_integrity() is None
        rows = set(engine.model.rows)  # type: ignore[attr-defined]
        for session, opening, length in zip(
            (first, second, third), ("first", "second", "first"), (40, 8, 8), strict=True
        ):
            alone = make_engine(page_size=64, draft=False)
            same = alone.session(system=self.SYSTEM)
            same.turn(opening, max_tokens=length, ignore_eos=True)
            self.play(same)
            assert same.token_ids == session.token_ids
            assert isinstance(alone.model, Recorder)
            assert set(alone.model.rows) <= rows

    def test_one_copy_a_session(
        self, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        copied: list[int] = []
        copy_pages = ops.copy_pages

        def count(copies: torch.Tensor, *pools: torch.Tensor) -> None:
            copied.append(copies.shape[0])
            copy_pages(copies, *pools)

        monkeypatch.setattr(ops, "copy_pages", count)
        engine = make_engine(page_size=64)
        session = engine.session(system=self.SYSTEM)
        self.play(session)
        self.play(session)
        assert copied == [1]
        session.rewind(0)
        session.turn("one", max_tokens=4)
        assert copied == [1, 1], "the tree has this prompt: only its first write copies"
        fork = session.fork()
        fork.turn("x", max_tokens=4)
        assert copied == [1, 1, 1], "no first prompt"

    def test_the_copy_goes_once_the_page_is_full(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), page_size=64, kv_tokens=640)
        session = engine.session()
        session.turn("x" * 30, max_tokens=2)
        assert pages(engine) == (8, 1)
        session.turn("x" * 60, max_tokens=2)
        assert pages(engine) == (8, 0)

    @pytest.mark.parametrize("length", [13, 29])
    def test_a_full_pool_needs_no_room_for_it(self, make_engine: MakeEngine, length: int) -> None:
        engine = make_engine(
            Provenance(), kv_dtype="float32", kv_tokens=16 * -(-(length + 3) // 16), draft=False
        )
        reply = engine.session().turn("m" * (length - 2), max_tokens=2)
        assert reply.receipt.output_tokens == 2

    def test_a_part_of_a_page_gives_way_first(self, make_engine: MakeEngine) -> None:
        engine = make_engine(CountingUp(), kv_tokens=64, draft=False)
        session = engine.session()
        session.turn("m" * 10, max_tokens=1)
        assert pages(engine) == (2, 1)
        session.turn("m" * 44, max_tokens=1)
        assert pages(engine)[0] == 0
        assert session.num_turns == 2


class TestRoots:
    """Nothing is shared between sessions of different roots, whatever their tokens."""

    def test_equal_prompts_of_two_tenants(self, make_engine: MakeEngine) -> None:
        engine = make_engine(Provenance(), kv_dtype="float32", draft=False)
        first, same, other = (engine.session(system="s" * 40) for _ in range(3))
        other._state.root = RootKey(tenant="other")
        first.turn("hello", max_tokens=4)
        assert same.turn("hello", max_tokens=4).receipt.reused_tokens > 32
        assert other.turn("hello", max_tokens=4).receipt.reused_tokens == 0
        assert other.fork()._state.root == RootKey(tenant="other")
        tokens = np.array(first.token_ids, dtype=np.int32)
        for adapter in (RootKey(adapter="a"), RootKey(numerics="n")):
            assert engine.cache.match_len(tokens, adapter) == 0
        assert engine.cache.match_len(tokens, RootKey(tenant="other")) > 32
        assert engine.check_integrity() is None

    def test_a_prompt_does_not_wait_for_that_of_another_tenant(
        self, make_engine: MakeEngine
    ) -> None:
        engine = make_engine(CountingUp(), max_batch_tokens=20)
        sessions = [engine.session(system="s" * 60) for _ in range(2)]
        sessions[1]._state.root = RootKey(tenant="other")
        replies = engine.gather([(session, "x") for session in sessions], max_tokens=3)
        assert [reply.receipt.reused_tokens for reply in replies] == [0, 0]

    def test_keys_have_numbers_of_their_own(self) -> None:
        ids = RootIds()
        keys = [RootKey(a, b, c) for a in ("", "x") for b in ("", "x") for c in ("", "x")]
        assert len({ids[key] for key in keys}) == len(keys)
        assert [ids[key] for key in keys] == [ids[key] for key in keys]
        assert ids[DEFAULT_ROOT] == 0
