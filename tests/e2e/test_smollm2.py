"""The contract on the real model: tokens and logits are equal however they were computed.

The tiny-model tests turn every knob; here the same equalities hold with real weights (4-bit and
8-bit), real tokens and real drafts, on two threads unless a test says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.engine import Engine
from stateful_kv.models.files.loading import LoadedModel, load_model
from stateful_kv.session.session import Session
from tests.e2e.tiny import COSTS, Recorder, rows_from_scratch

SYSTEM = "You are a careful assistant. You answer with one JSON object and nothing else."
MESSAGES = (
    'Call the tool read_file for the file "src/main.py".',
    '{"tool": "read_file", "result": "def add(a, b):\\n    return a + b\\n"} Repeat the function.',
    "Now rename it to plus and show it again.",
)

FORKED = ("Write a haiku about the sea.", "And one about mountains, please.")

Make = Callable[..., Engine]


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    return load_model("smollm2")


@pytest.fixture
def make(smollm2: LoadedModel, set_num_threads: Callable[[int], None]) -> Iterator[Make]:
    set_num_threads(2)
    engines: list[Engine] = []

    def make(**config: object) -> Engine:
        engine = Engine(
            Recorder(smollm2.model),
            smollm2.tokenizer,
            EngineConfig(**{"kv_tokens": 2048, **config}),
            cost_curve=COSTS,
        )
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        assert engine.check_integrity() is None
        engine.close()
        assert engine.cache.num_free_pages == engine.cache.num_pages


def play(session: Session, messages: tuple[str, ...] = MESSAGES) -> list[int]:
    for message in messages:
        session.turn(message, max_tokens=24, ignore_eos=True)
    return session.token_ids


def rows_of(*engines: Engine) -> set[tuple[int, int, bytes]]:
    return {row for engine in engines for row in engine.model.rows}


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_incremental_equals_from_scratch(
    make: Make, smollm2: LoadedModel, set_num_threads: Callable[[int], None], num_threads: int
) -> None:
    """With state and drafts on so many threads, in one pass without either on another number."""
    set_num_threads(num_threads)
    engine = make()
    session = engine.session(system=SYSTEM)
    tokens = play(session)
    set_num_threads(num_threads % 3 + 1)
    expected = rows_from_scratch(smollm2.model, tokens, torch.float16)
    rows = rows_of(engine)
    positions = [p for turn in session.turns for p in range(turn.reply_start - 1, turn.end - 1)]
    assert len(positions) == 72
    assert all(expected[position] in rows for position in positions)


def test_drafts_forks_rewinds_and_batches_change_nothing(make: Make) -> None:
    plain = make(draft=False)
    alone = plain.session("alone", system=SYSTEM)
    expected = play(alone)

    forked = play(plain.session("forked", system=SYSTEM), (MESSAGES[0], *FORKED))

    drafted = make()
    session = drafted.session("drafted", system=SYSTEM)
    assert play(session, MESSAGES[:1]) == expected[: session.num_tokens]
    fork = session.fork()
    play(session, ("Something else entirely.",))
    session.rewind(turn=1)
    accepted = 0
    for messages in zip(MESSAGES[1:], FORKED, strict=True):
        pairs = list(zip((session, fork), messages, strict=True))
        replies = drafted.gather(pairs, max_tokens=24, ignore_eos=True)
        accepted += sum(reply.receipt.accepted_tokens for reply in replies)
    assert session.token_ids == expected
    assert fork.token_ids == forked != expected
    assert accepted > 0
    assert rows_of(plain) <= rows_of(drafted)


def test_unrelated_sessions_interleaved(make: Make) -> None:
    scripts = {
        "You translate into French.": ("Good morning.", "Where is the station?", "Thank you."),
        SYSTEM: MESSAGES,
    }
    plain, engine = make(draft=False), make()
    sessions = [engine.session(system=system) for system in scripts]
    one, other = sessions
    first, second = scripts.values()
    play(one, first[:1])
    stream = other.stream(second[0], max_tokens=24, ignore_eos=True)
    next(stream)
    play(one, first[1:2])  # the stream of the other goes on meanwhile
    assert "".join(stream)
    play(other, second[1:2])
    engine.gather([(one, first[2]), (other, second[2])], max_tokens=24, ignore_eos=True)
    for session, (system, messages) in zip(sessions, scripts.items(), strict=True):
        assert session.token_ids == play(plain.session(system=system), messages)
    assert rows_of(plain) <= rows_of(engine)


def test_evicted_and_computed_again_equals_kept(make: Make) -> None:
    kept, lossy = make(), make(max_batch_tokens=33)
    one, other = kept.session(system=SYSTEM), lossy.session(system=SYSTEM)
    for message in MESSAGES:
        first = one.turn(message, max_tokens=24, ignore_eos=True)
        other.suspend()
        lossy.clear_cache()
        second = other.turn(message, max_tokens=24, ignore_eos=True)
        assert first.token_ids == second.token_ids
        assert second.receipt.reused_tokens == 0
    assert rows_of(kept) == rows_of(lossy)


def test_a_second_agent_shares_the_prompt(make: Make) -> None:
    engine = make()
    first, second = engine.session(system=SYSTEM), engine.session(system=SYSTEM)
    play(first, MESSAGES[:1])
    receipt = second.turn("What is 2 + 2?", max_tokens=4).receipt
    pairs = zip(first.token_ids, second.token_ids, strict=False)
    shared = next(index for index, (a, b) in enumerate(pairs) if a != b)
    assert 16 < shared < engine.config.page_size
    assert receipt.reused_tokens == shared
    assert receipt.reused_tokens + receipt.computed_tokens == receipt.prompt_tokens
    play(first, MESSAGES[1:])
    plain = make(draft=False)
    fresh, alone = plain.session(system=SYSTEM), plain.session(system=SYSTEM)
    fresh.turn("What is 2 + 2?", max_tokens=4)
    plain.clear_cache()
    assert fresh.token_ids == second.token_ids
    assert play(alone) == first.token_ids
    assert rows_of(plain) <= rows_of(engine)
