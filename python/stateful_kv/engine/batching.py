"""What the next step computes: which turns get a sequence, and which rows each of them feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from stateful_kv.drafts.policy import StepLoad
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.tracing import span, traced
from stateful_kv.types import TokenArray


@dataclass(frozen=True)
class RowPlan:
    """The rows of one turn in a step.

    Attributes:
        turn: whose rows.
        feed_ids: tokens to compute KV for; the draft is at their end.
        start_position: position of the first of them.
        num_logit_rows: how many of the last rows need logits.
        draft: proposed tokens, not part of the ledger yet.
    """

    turn: Turn
    feed_ids: TokenArray
    start_position: int
    num_logit_rows: int
    draft: list[int]

    @property
    def sequence_id(self) -> int:
        """The turn's sequence."""
        assert self.turn.state.sequence_id is not None
        return self.turn.state.sequence_id

    @property
    def num_prompt_rows(self) -> int:
        """Rows that compute prompt tokens."""
        return max(0, min(len(self.feed_ids), self.turn.prompt_len - self.start_position))

    def without_draft(self) -> RowPlan:
        """The same rows with nothing proposed."""
        kept = len(self.feed_ids) - len(self.draft)
        return replace(self, feed_ids=self.feed_ids[:kept], num_logit_rows=1, draft=[])


def admissible(turns: Sequence[Turn]) -> Iterator[Turn]:
    """Yields the queued turns that may get a sequence now; the caller admits each at once.

    A turn whose prompt begins like the one an earlier turn is computing right now waits until
    that part is in the tree, so nothing is computed twice.
    """
    for index, turn in enumerate(turns):
        if turn.phase is TurnPhase.QUEUED and not _must_wait(turn, turns[:index]):
            yield turn


def _must_wait(turn: Turn, earlier: Sequence[Turn]) -> bool:
    if turn.state.sequence_id is not None:
        return False
    if turn.waits_for is not None:
        other, num_shared = turn.waits_for
        if _is_computing(other) and other.state.committed_len < num_shared:
            return True
        turn.waits_for = None
    candidates = [other for other in earlier if _is_computing(other)]
    if not candidates:
        return False
    cache = turn.state.cache
    tokens = turn.state.ledger.tokens
    worthwhile = cache.match_len(tokens[:-1]) + cache.page_size
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


class Planner:
    """Shares the rows of a step among the running turns.

    Decode rows come first, so a long prompt never stops the others; one row is left for prompts
    when there are any. Drafts take what the decode rows leave. The rest is shared evenly among
    the prompts. When there are more turns than rows they take turns.
    """

    def __init__(self, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._rotation = 0

    @traced("plan")
    def plan(self, turns: Sequence[Turn]) -> list[RowPlan]:
        """Returns the rows of the next step, in order of `turns`; empty if nothing can run."""
        self._rotation += 1
        shift = self._rotation % len(turns) if turns else 0
        rotated = [*turns[shift:], *turns[:shift]]
        decoding = [turn for turn in rotated if turn.phase is TurnPhase.DECODING]
        extending = [turn for turn in rotated if turn.phase is TurnPhase.EXTENDING]
        budget = self._max_batch_tokens
        kept_for_extend = 1 if extending and budget > 1 else 0
        decoding = decoding[: budget - kept_for_extend]
        budget -= len(decoding)
        rows: dict[int, RowPlan] = {}
        num_rows = len(decoding) + min(budget, sum(map(_num_uncomputed, extending)))
        for turn in decoding:
            load = StepLoad(len(decoding), num_rows)
            row = _row_or_fail(partial(_decode_row, load=load), turn, budget - kept_for_extend)
            if row is not None:
                num_rows += len(row.draft)
                budget -= len(row.draft)
                rows[id(turn)] = row
        by_need = sorted(extending, key=_num_uncomputed)
        for index, turn in enumerate(by_need):
            share = -(-budget // (len(by_need) - index))
            row = _row_or_fail(_extend_row, turn, share) if share > 0 else None
            if row is not None:
                budget -= len(row.feed_ids)
                rows[id(turn)] = row
        return [rows[id(turn)] for turn in turns if id(turn) in rows]


def _row_or_fail(
    make_row: Callable[[Turn, int], RowPlan], turn: Turn, limit: int
) -> RowPlan | None:
    """The turn's rows; an error ends that turn alone."""
    try:
        return make_row(turn, limit)
    except Exception as error:
        turn.fail(error)
        return None


def _num_uncomputed(turn: Turn) -> int:
    return len(turn.state.ledger) - turn.state.committed_len


def _decode_row(turn: Turn, max_draft: int, load: StepLoad) -> RowPlan:
    state = turn.state
    committed = state.committed_len
    feed = state.ledger.tokens[committed:]
    draft: list[int] = []
    if state.drafter is not None:
        # The last token of a reply is never a draft token: a row of its own has to choose it.
        limit = min(max_draft, turn.num_left - 1)
        with span("draft"):
            draft = state.drafter.propose(state.ledger, limit, load)
    if draft:
        feed = np.concatenate([feed, np.array(draft, dtype=np.int32)])
    return RowPlan(turn, feed, committed, 1 + len(draft), draft)


def _extend_row(turn: Turn, share: int) -> RowPlan:
    state = turn.state
    committed = state.committed_len
    feed = state.ledger.tokens[committed : committed + share]
    is_last = committed + len(feed) == len(state.ledger)
    return RowPlan(turn, feed, committed, 1 if is_last else 0, [])


def describe(rows: Sequence[RowPlan]) -> str:
    """Says what kind of step computes these rows, for people: "verify 5 rows"."""
    num_rows = sum(len(row.feed_ids) for row in rows)
    if any(row.num_prompt_rows for row in rows):
        kind = "prefill"
    else:
        kind = "verify" if any(row.draft for row in rows) else "decode"
    return f"{kind} {num_rows} {'row' if num_rows == 1 else 'rows'}"


@traced("build_batch")
def build_batch(rows: Sequence[RowPlan], cache: KVCache) -> Batch:
    """Makes the tensors of a step whose rows are reserved in the cache, on its device."""
    query_lens = [len(row.feed_ids) for row in rows]
    pages = cache.batch_pages([row.sequence_id for row in rows], query_lens)
    token_ids = np.concatenate([row.feed_ids for row in rows]).astype(np.int64)
    ends = np.cumsum(query_lens)
    logit_rows = np.concatenate(
        [
            np.arange(end - row.num_logit_rows, end, dtype=np.int64)
            for row, end in zip(rows, ends, strict=True)
        ]
    )
    return Batch(
        token_ids=torch.from_numpy(token_ids),
        positions=pages.positions,
        query_offsets=pages.query_offsets,
        page_table=pages.page_table,
        seq_lens=pages.seq_lens,
        slots=pages.slots,
        logit_rows=torch.from_numpy(logit_rows),
    ).to(cache.device)
