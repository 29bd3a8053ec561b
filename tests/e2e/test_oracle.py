"""Random sessions on a model that knows where each token's KV must come from.

`Provenance` computes the next token from everything it reads back through the page table. If a
page is stale, missing, shared by mistake or in the wrong place, the text is no longer what
`oracle_token` says it should be, however consistent the bookkeeping looks.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

from stateful_kv.engine.engine import Engine
from stateful_kv.errors import OutOfPagesError
from stateful_kv.session.session import Session
from tests.e2e.conftest import MakeEngine
from tests.e2e.tiny import FIRST_BYTE, Provenance, oracle_token

WORDS = ("alpha ", "beta ", "alpha beta ", "gamma")


def assert_text_is_right(session: Session) -> None:
    tokens = np.array(session.token_ids, dtype=np.int64)
    for turn in session.turns[-2:]:
        for position in range(turn.reply_start, turn.end):
            assert tokens[position] == oracle_token(tokens[:position]), (session, position)


def message(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 6)))


def settings(rng: random.Random) -> dict:
    stops = {"stop_token_ids": (FIRST_BYTE + ord("a"),)}
    return {"max_tokens": rng.randint(1, 30), **(stops if rng.random() < 0.2 else {})}


def act(engine: Engine, sessions: list[Session], rng: random.Random) -> None:
    """One random operation; running out of pages is an outcome like any other."""
    session = rng.choice(sessions)
    operation = rng.randrange(10)
    if operation == 0 and len(sessions) < 5:
        sessions.append(engine.session(system="a common beginning for all of them"))
    elif operation == 1 and len(sessions) < 5:
        sessions.append(session.fork())
    elif operation == 2:
        session.rewind(rng.randint(0, session.num_turns))
    elif operation == 3:
        session.truncate(rng.randint(0, session.num_tokens))
    elif operation == 4:
        session.suspend()
        if rng.random() < 0.3:
            engine.clear_cache()
    elif operation == 5 and len(sessions) > 1:
        sessions.remove(session)
        session.close()
    elif operation == 6:
        chosen = rng.sample(sessions, rng.randint(1, len(sessions)))
        engine.gather(
            [(session, message(rng)) for session in chosen], return_exceptions=True, **settings(rng)
        )
    elif operation == 7:
        stream = session.stream(message(rng), **settings(rng))
        for _ in range(rng.randint(0, 20)):
            if next(stream, None) is None:
                break
        stream.close()
    else:
        session.turn(message(rng), **settings(rng))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kv_tokens", [320, 4096])
@pytest.mark.parametrize("num_steps_per_sync", [1, 3, 8])
def test_random_sessions(
    make_engine: MakeEngine, seed: int, kv_tokens: int, num_steps_per_sync: int
) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        Provenance(),
        kv_tokens=kv_tokens,
        kv_dtype="float32",
        page_size=rng.choice([1, 4, 8, 16]),
        max_batch_tokens=rng.choice([3, 16, 1024]),
        draft=rng.random() < 0.8,
        num_steps_per_sync=num_steps_per_sync,
    )
    sessions = [engine.session(system="a common beginning for all of them")]
    for _ in range(40):
        try:
            act(engine, sessions, rng)
        except OutOfPagesError:
            assert kv_tokens == 320
        assert engine.check_integrity() is None
        for session in sessions:
            assert not session.is_busy
            assert_text_is_right(session)


def test_the_oracle_notices_a_changed_key(make_engine: MakeEngine) -> None:
    engine = make_engine(Provenance(), kv_dtype="float32", draft=False)
    session = engine.session()
    session.turn("hello", max_tokens=20)
    engine.cache.k[0, :, 0, 3, 0] += 1
    session.turn("more", max_tokens=20)
    with pytest.raises(AssertionError):
        assert_text_is_right(session)
