"""The host's part of a turn costs the delta, not the history."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stateful_kv.engine import batching
from stateful_kv.engine.engine import Engine
from stateful_kv.session.ledger import Ledger
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import ByteTokenizer, CountingUp

LENGTHS = (1_000, 8_000, 100_000)
MAX_RATIO = 2.0
FLOOR_S = 3e-4
NUM_ATTEMPTS = 4


def host_seconds(engine: Engine, length: int) -> float:
    """Shortest host time of a short turn behind `length` tokens of history."""
    session = engine.session()
    session.turn("x" * length, max_tokens=1)
    times = []
    for number in range(20):
        receipt = session.turn(f"message {number % 10}", max_tokens=8).receipt
        assert receipt.computed_tokens < 20
        times.append(receipt.total_s - receipt.prefill_s - receipt.decode_s)
    session.close()
    engine.clear_cache()
    return min(times)


def is_flat(engine: Engine) -> bool:
    """Whether turns behind a long history cost the host as little as behind a short one.

    Best of many turns and of a few attempts: what else the machine does only ever adds time.
    """
    host_seconds(engine, 100)
    for _ in range(NUM_ATTEMPTS):
        seconds = [host_seconds(engine, length) for length in LENGTHS]
        if max(seconds) <= MAX_RATIO * max(seconds[0], FLOOR_S):
            return True
        print(dict(zip(LENGTHS, seconds, strict=True)))
    return False


@pytest.fixture(params=[False, True], ids=["plain", "drafts"])
def engine(make_engine: MakeEngine, request: pytest.FixtureRequest) -> Engine:
    return make_engine(CountingUp(), kv_tokens=1 << 18, page_size=64, draft=request.param)


def test_host_time_is_flat(engine: Engine) -> None:
    assert is_flat(engine)


@pytest.mark.parametrize(("owner", "name"), [(Ledger, "append"), (batching, "propose")])
def test_the_check_notices_a_walk_over_the_history(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    engine = make_engine(CountingUp(), kv_tokens=1 << 18, page_size=64)
    original = getattr(owner, name)

    def walk(first: Any, *args: Any) -> Any:
        ledgers = [first] if owner is Ledger else [turn.state.ledger for turn in first]
        for _ in range(4):  # clear of the noise of a busy machine
            for ledger in ledgers:
                ledger.tokens.tolist()
        return original(first, *args)

    monkeypatch.setattr(owner, name, walk)
    assert not is_flat(engine)


@pytest.mark.parametrize("length", LENGTHS)
def test_only_the_delta_is_rendered_and_copied(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    tokenizer = ByteTokenizer()
    engine = make_engine(CountingUp(), tokenizer, kv_tokens=1 << 18, page_size=64)
    session = engine.session()
    session.turn("x" * length, max_tokens=1)
    appended: list[int] = []
    append = Ledger.append

    def count(ledger: Ledger, tokens: object) -> None:
        appended.append(len(tokens))  # type: ignore[arg-type]
        append(ledger, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "append", count)
    tokenizer.calls.clear()
    reply = session.turn("short", max_tokens=8)
    assert tokenizer.calls == [("delta", 9)]
    assert sum(appended) == 9 + 8
    assert reply.receipt.computed_tokens == 10
    assert reply.receipt.reused_tokens == length + 3


def test_the_ledger_grows_by_doubling() -> None:
    ledger = Ledger()
    buffers = set()
    for token in range(100_000):
        ledger.append((token,))
        buffers.add(ledger.tokens.ctypes.data if token % 1000 == 0 else 0)
    assert len(buffers) < 20
    assert np.array_equal(ledger.tokens, np.arange(100_000))
