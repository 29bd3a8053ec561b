"""Commit: makes what steps gave part of turns and cache; the only place where sequences grow.

A plain step has one outcome for each turn, a multi-step has several; both end here. An error of
one turn ends that turn; the others go on.
"""

from __future__ import annotations

from collections.abc import Sequence

from stateful_kv.choosing.verify import Outcome
from stateful_kv.engine.batching import RowPlan
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.tracing import traced


@traced("commit")
def commit(
    cache: KVCache, rows: Sequence[RowPlan], outcomes: Sequence[Sequence[Outcome]]
) -> list[int]:
    """Adds the chosen tokens to their turns, and the KV of all that were fed and kept.

    Args:
        cache: where the KV was written.
        rows: what each turn fed in the first of its steps; in each further step it fed the last
            token of the step before, and drafts.
        outcomes: of each turn, step by step. Steps behind the one that ended the reply are
            ignored.

    Returns:
        How many steps of each turn counted.
    """
    kept: list[tuple[RowPlan, int]] = []
    num_steps = []
    for row, steps in zip(rows, outcomes, strict=True):
        num_taken = 0
        turn = row.turn
        has_failed = False
        turn.is_taking = True
        try:
            num_taken, num = _take_tokens(row, steps)
            num_steps.append(num)
        except Exception as error:
            num_steps.append(0)
            has_failed = True  # its caller may take the error at once
            turn.fail(error)
        turn.is_taking = False
        if not has_failed:
            # Tokens of the ledger that were fed have KV now, and so have the tokens that were
            # taken, but for the last: it is chosen and not fed yet. If no step counted, the KV
            # that was written is ignored.
            if row.num_logit_rows == 0:
                kept.append((row, row.num_new))
            elif num_taken:
                kept.append((row, row.num_new + num_taken - 1))
            else:
                kept.append((row, 0))
    for row in _commit_kv(cache, kept):
        _share_prompt(row)
    return num_steps


@traced("end_steps")
def end_steps(
    turns: Sequence[Turn],
    *,
    num_steps: Sequence[int],
    num_prompt_rows: Sequence[int],
    forward_s: Sequence[float],
    host_s: float,
) -> None:
    """Counts committed steps in receipts and settles turns whose replies they ended.

    Args:
        turns: those of the steps; of one that failed nothing is written.
        num_steps: how many steps of each counted.
        num_prompt_rows: rows of each that computed prompt tokens.
        forward_s: seconds in forward passes, for each.
        host_s: seconds outside of them, for all.
    """
    for turn, num, num_rows, seconds in zip(
        turns, num_steps, num_prompt_rows, forward_s, strict=True
    ):
        if turn.is_settled:
            continue
        turn.count_steps(num_steps=num, num_prompt_rows=num_rows, forward_s=seconds, host_s=host_s)
        if turn.is_finished and not turn.has_reader:
            try:
                turn.settle()
            except Exception as error:
                turn.fail(error)


def _take_tokens(row: RowPlan, steps: Sequence[Outcome]) -> tuple[int, int]:
    """Gives the turn the tokens of each step until one ends its reply; counts tokens and steps."""
    turn = row.turn
    num_taken = 0
    num_steps = 0
    draft = row.draft
    for outcome in steps:
        if row.num_logit_rows == 0:
            return 0, 1
        num_now = turn.take(outcome.tokens) if outcome.tokens else 0
        num_taken += num_now
        if outcome.error is not None and not turn.is_finished:
            raise outcome.error
        if not num_now:
            break  # no token can be chosen; a plain step will find that again and say why
        num_steps += 1
        turn.receipt.drafted_tokens += outcome.num_drafted
        turn.receipt.accepted_tokens += min(num_now, outcome.num_accepted)
        if len(draft) and turn.state.drafter is not None:
            turn.state.drafter.observe(draft.first(outcome.num_drafted), outcome.num_accepted)
        draft = draft.first(0)  # drafts of further steps were found on the device
        if turn.is_finished:
            break
    return num_taken, num_steps


def _commit_kv(cache: KVCache, kept: Sequence[tuple[RowPlan, int]]) -> list[RowPlan]:
    """Commits KV, of all rows at once or else of each alone; returns the rows that succeeded."""
    if not kept:
        return []
    try:
        cache.commit([row.sequence_id for row, _ in kept], [num for _, num in kept])
        return [row for row, _ in kept]
    except Exception as error:
        if len(kept) == 1:
            kept[0][0].turn.fail(error)
            return []
    return [row for item in kept for row in _commit_kv(cache, [item])]


def _share_prompt(row: RowPlan) -> None:
    """Gives prompt tokens that have KV now to the prefix tree, for other sessions to match."""
    turn, state = row.turn, row.turn.state
    try:
        if turn.phase is TurnPhase.EXTENDING:
            state.insert()
            if row.num_logit_rows:
                turn.phase = TurnPhase.DECODING
        if row.num_logit_rows and turn.has_just_started_session:
            state.insert_tail_copy()
    except Exception as error:
        turn.fail(error)
