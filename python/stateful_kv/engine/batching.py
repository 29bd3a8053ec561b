"""What the next step computes: which rows each turn feeds, and the batch they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from stateful_kv.choosing.sampler import Sampler
from stateful_kv.drafts.ngram import NgramDrafter, propose_all
from stateful_kv.drafts.proposer import NO_DRAFT, Draft, StepLoad
from stateful_kv.kv.batch import Batch, BatchPages
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.tracing import traced
from stateful_kv.types import TokenArray


@dataclass(frozen=True)
class RowPlan:
    """The rows of one turn in a step, or in the first of several steps taken at once.

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
    draft: Draft = field(default=NO_DRAFT)

    @property
    def sequence_id(self) -> int:
        """The turn's sequence."""
        assert self.turn.state.sequence_id is not None
        return self.turn.state.sequence_id

    @property
    def num_new(self) -> int:
        """Tokens of the ledger among those that are fed."""
        return len(self.feed_ids) - len(self.draft)

    @property
    def num_prompt_rows(self) -> int:
        """Rows that compute prompt tokens."""
        return max(0, min(len(self.feed_ids), self.turn.prompt_len - self.start_position))

    @property
    def sampler(self) -> Sampler:
        """How the turn's tokens are chosen."""
        return self.turn.request.sampler

    @property
    def draft_ids(self) -> TokenArray:
        """int32[K], the proposed tokens."""
        return self.draft.tokens

    @property
    def next_position(self) -> int:
        """Where the next token of the ledger goes."""
        return self.start_position + self.num_new

    def without_draft(self) -> RowPlan:
        """The same rows with nothing proposed."""
        feed_ids = self.feed_ids[: self.num_new]
        return replace(self, feed_ids=feed_ids, num_logit_rows=1, draft=NO_DRAFT)


class Planner:
    """Shares the rows of a step among the running turns.

    Pending tokens come first, so a long prompt never stops the others; one row is left for
    prompts when there are any. Drafts take what the pending tokens leave, and prompts share the
    rest evenly. When there are more turns than rows, another one begins the list in each step.
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
        drafts = propose(decoding, budget - kept_for_extend) if decoding else []
        for turn, draft in zip(decoding, drafts, strict=True):
            if turn.is_finished:
                continue
            draft = draft.first(max(0, budget - kept_for_extend))
            load = StepLoad(len(decoding), num_rows)
            try:
                row = decode_row(turn, draft, load)
            except Exception as error:
                turn.fail(error)
                continue
            num_rows += len(row.draft)
            budget -= len(row.draft)
            rows[id(turn)] = row
        by_need = sorted(extending, key=_num_uncomputed)
        for index, turn in enumerate(by_need):
            share = -(-budget // (len(by_need) - index))
            if share > 0:
                row = _extend_row(turn, share)
                budget -= len(row.feed_ids)
                rows[id(turn)] = row
        return [rows[id(turn)] for turn in turns if id(turn) in rows]


@traced("draft")
def propose(turns: Sequence[Turn], max_draft: int) -> list[Draft]:
    """What may follow in each of these turns; a turn whose drafter raises an error fails.

    Args:
        turns: decoding ones.
        max_draft: longest draft.
    """
    drafting = [turn for turn in turns if turn.state.drafter is not None]
    if not drafting:
        return [NO_DRAFT] * len(turns)
    # The last token of a reply is never a draft token: a row of its own has to choose it.
    limits = [min(max_draft, turn.num_left - 1) for turn in drafting]
    tokens = [turn.state.ledger.tokens for turn in drafting]
    indexed = [d for turn in drafting if isinstance(d := turn.state.drafter, NgramDrafter)]
    if len(indexed) == len(drafting):
        try:
            found = dict(zip(map(id, drafting), propose_all(indexed, tokens, limits), strict=True))
            return [found.get(id(turn), NO_DRAFT) for turn in turns]
        except Exception:  # the loop below finds the turn whose fault it is
            pass
    drafts: dict[int, Draft] = {}
    for turn, text, limit in zip(drafting, tokens, limits, strict=True):
        assert turn.state.drafter is not None
        try:
            drafts[id(turn)] = turn.state.drafter.propose(text, limit)
        except Exception as error:
            turn.fail(error)
    return [drafts.get(id(turn), NO_DRAFT) for turn in turns]


def decode_row(turn: Turn, draft: Draft, load: StepLoad) -> RowPlan:
    """The pending token of a turn, and as much of a draft as is expected to pay.

    Args:
        turn: a decoding one.
        draft: as proposed.
        load: what else the step computes.
    """
    state = turn.state
    committed = state.committed_len
    feed = state.ledger.tokens[committed:]
    if state.drafter is not None:
        draft = state.drafter.worthwhile(draft, len(state.ledger), load)
    if len(draft):
        feed = np.concatenate([feed, draft.tokens])
    return RowPlan(turn, feed, committed, 1 + len(draft), draft)


def _num_uncomputed(turn: Turn) -> int:
    return len(turn.state.ledger) - turn.state.committed_len


def _extend_row(turn: Turn, share: int) -> RowPlan:
    state = turn.state
    committed = state.committed_len
    feed = state.ledger.tokens[committed : committed + share]
    is_last = committed + len(feed) == len(state.ledger)
    return RowPlan(turn, feed, committed, 1 if is_last else 0)


def describe(rows: Sequence[RowPlan]) -> str:
    """Says what kind of step computes these rows, for people: "verify 5 rows"."""
    num_rows = sum(len(row.feed_ids) for row in rows)
    if any(row.num_prompt_rows for row in rows):
        kind = "prefill"
    else:
        kind = "verify" if any(row.draft for row in rows) else "decode"
    return f"{kind} {num_rows} {'row' if num_rows == 1 else 'rows'}"


@traced("build_batch")
def build_batch(rows: Sequence[RowPlan], pages: BatchPages, device: torch.device) -> Batch:
    """Makes the tensors of a step.

    Args:
        rows: of every turn in it.
        pages: where their KV goes.
        device: where to put the tensors.
    """
    if len(rows) == 1:
        feed_ids = rows[0].feed_ids
        logit_rows = np.arange(len(feed_ids) - rows[0].num_logit_rows, len(feed_ids))
    else:
        feed_ids = np.concatenate([row.feed_ids for row in rows])
        ends = np.cumsum([len(row.feed_ids) for row in rows])
        asked = zip(rows, ends, strict=True)
        logit_rows = np.concatenate([np.arange(e - row.num_logit_rows, e) for row, e in asked])
    return Batch(
        token_ids=torch.from_numpy(feed_ids.astype(np.int64)),
        positions=pages.positions,
        query_offsets=pages.query_offsets,
        page_table=pages.page_table,
        seq_lens=pages.seq_lens,
        slots=pages.slots,
        logit_rows=torch.from_numpy(logit_rows),
    ).to(device)
