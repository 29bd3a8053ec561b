"""Commit: makes what steps gave part of sessions and cache; the only place where lengths move.

A plain step has one outcome for each turn, several steps taken at once have several; both end
here. What is raised for one turn ends that turn; the others go on.
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
        outcomes: of each turn, step by step. A step behind the one that ended the reply never
            happened.

    Returns:
        How many steps of each turn counted.
    """
    kept: list[tuple[RowPlan, int]] = []
    num_steps = []
    for row, steps in zip(rows, outcomes, strict=True):
        num_taken = 0
        turn = row.turn
        turn.is_accepting = True
        try:
            num_taken, num = _accept(row, steps)
            num_steps.append(num)
        except Exception as error:
            num_steps.append(0)
            turn.fail(error)
        turn.is_accepting = False
        if turn.error is None:
            # All that was fed but the draft has KV, and so have accepted draft tokens; the last
            # chosen token never has any yet. Where no step counted nothing was fed.
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
    """Writes committed steps into receipts and closes the books of turns that they ended.

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
        if turn.error is not None:
            continue
        turn.count_steps(num_steps=num, num_prompt_rows=num_rows, forward_s=seconds, host_s=host_s)
        if turn.is_finished and not turn.has_reader:
            try:
                turn.close_books()
            except Exception as error:
                turn.fail(error)


def _accept(row: RowPlan, steps: Sequence[Outcome]) -> tuple[int, int]:
    """Adds the tokens of each step until one ends the reply; returns tokens and steps taken."""
    turn = row.turn
    num_taken = 0
    num_steps = 0
    draft = row.draft
    for outcome in steps:
        if row.num_logit_rows == 0:
            return 0, 1
        taken = turn.accept(outcome.tokens) if outcome.tokens else 0
        num_taken += taken
        if outcome.error is not None and not turn.is_finished:
            raise outcome.error
        if not taken:
            break  # none can be chosen; a plain step finds that again and says why
        num_steps += 1
        turn.receipt.drafted_tokens += outcome.num_drafted
        turn.receipt.accepted_tokens += min(taken, outcome.num_accepted)
        if len(draft) and turn.state.drafter is not None:
            turn.state.drafter.observe(draft.first(outcome.num_drafted), outcome.num_accepted)
        draft = draft.first(0)  # the drafts of further steps are none of the drafter's
        if turn.is_finished:
            break
    return num_taken, num_steps


def _commit_kv(cache: KVCache, kept: Sequence[tuple[RowPlan, int]]) -> list[RowPlan]:
    """Moves the lengths of sequences; returns the rows for which that could be done."""
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


@traced("share")
def _share_prompt(row: RowPlan) -> None:
    """Makes prompt tokens matchable for other sessions as soon as they have KV."""
    turn, state = row.turn, row.turn.state
    try:
        if turn.phase is TurnPhase.EXTENDING:
            state.store()
            if row.num_logit_rows:
                turn.phase = TurnPhase.DECODING
        if row.num_logit_rows and turn.has_just_started_session:
            state.share_tail()
    except Exception as error:
        turn.fail(error)
