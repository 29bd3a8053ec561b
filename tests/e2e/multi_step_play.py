"""What the tests of multi-step share: engines that take them, and what a session is compared by."""

from __future__ import annotations

from typing import Any

import torch

from stateful_kv.engine.engine import Engine
from stateful_kv.engine.multi_step import MultiStep
from stateful_kv.session.session import Session

MESSAGES = ("list the files, please", "read a.txt and read a.txt again", "ok", "now write b.txt")
STEPS = [2, 3, 8]


def multi_step(engine: Engine) -> MultiStep:
    return engine._scheduler.multi_step


def play(session: Session, messages: tuple[str, ...] = MESSAGES, **sampling: Any) -> list[int]:
    for message in messages:
        session.turn(message, **{"max_tokens": 24, "ignore_eos": True, **sampling})
    return session.token_ids


def kv_of(session: Session) -> list[bytes]:
    """Keys and values of all tokens with KV, read through the page table."""
    state, cache = session._state, session._state.cache
    pages = cache.page_table(state.sequence_id).long()
    pools = [
        pool for pool in (cache.k, cache.v, cache.k_scales, cache.v_scales) if pool is not None
    ]
    found = []
    for pool in pools:
        tokens = pool[:, pages].transpose(2, 3).flatten(1, 2)[:, : state.committed_len]
        found.append(tokens.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return found
