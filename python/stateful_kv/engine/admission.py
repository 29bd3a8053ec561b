"""Which queued turns get a sequence now, and which wait for a prompt that another computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.types import TokenArray


def admissible(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Yields the queued turns that may get a sequence now; the caller admits each at once.

    An earlier turn may be computing a prompt that begins with the same tokens. Then the later turn
    waits until that part is in the tree, so that it is computed once.
    """
    for index, turn in enumerate(turns):
        if turn.phase is TurnPhase.QUEUED and not _must_wait(turn, turns[:index]):
            yield turn


def _must_wait(turn: Turn, earlier: Sequence[Turn]) -> bool:
    if turn.state.has_kv:
        return False
    if turn.waits_for is not None:
        other, num_shared = turn.waits_for
        if _is_computing(other) and other.state.committed_len < num_shared:
            return True
        turn.waits_for = None
    root = turn.state.root
    candidates = [o for o in earlier if _is_computing(o) and o.state.root == root]
    if not candidates:
        return False
    cache = turn.state.cache
    tokens = turn.state.ledger.tokens
    worthwhile = cache.match_len(tokens[:-1], root) + cache.page_size
    for other in candidates:
        shared = _common_prefix_len(tokens, other.state.ledger.tokens)
        shared -= shared % cache.page_size
        if shared >= worthwhile and other.state.committed_len < shared:
            turn.waits_for = (other, shared)
            return True
    return False


def _is_computing(turn: Turn) -> bool:
    return turn.phase in (TurnPhase.QUEUED, TurnPhase.EXTENDING)


def _common_prefix_len(a: TokenArray, b: TokenArray) -> int:
    size = min(len(a), len(b))
    differs = a[:size] != b[:size]
    return int(differs.argmax()) if differs.any() else size
