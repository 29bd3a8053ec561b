"""Visits: several steps on the device for one look of the host, where nothing waits for the host.

A visit reserves room for its steps, lets the device take them, and then commits for each turn what
as many ordinary steps would have committed. Where a visit cannot be made, or fails, the next step
is an ordinary one; no length moved before that.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.loop.device_loop import (
    MAX_SEQUENCES,
    DeviceLoop,
    LoopOutcome,
    LoopSequence,
    rounded_up,
)
from stateful_kv.engine.step import Model, Stepper
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.tracing import span, traced


class Visits:
    """Advances running turns: by a visit where one can be made, else by a step.

    Attributes:
        num_visits: visits made so far.
        loop: what takes their steps.
    """

    MAX_PAUSE = 1024  # ordinary steps between visits that fail one after the other

    def __init__(
        self, stepper: Stepper, model: Model, cache: KVCache, config: EngineConfig
    ) -> None:
        """Takes no memory yet.

        Args:
            stepper: takes ordinary steps.
            model: computes logits.
            cache: where KV lies.
            config: how many steps and rows.
        """
        self._stepper = stepper
        self._cache = cache
        self._max_steps = config.steps_per_visit or 1
        self._max_rows = config.max_batch_tokens
        self._max_draft = config.max_draft
        self.loop = DeviceLoop(model, cache, model.config.max_position, self._max_steps)
        self.num_visits = 0
        self._num_plain = 0  # ordinary steps to take before the next visit
        self._pause = 1  # how many after the next failure

    def advance(self, running: Sequence[Turn]) -> None:
        """Advances these unfinished turns, in the order they were opened."""
        if not self._visit(running):
            self._num_plain = max(0, self._num_plain - 1)
            self._stepper.step(running)

    def _visit(self, running: Sequence[Turn]) -> bool:
        """False if none was made; then nothing has changed that a step does not change too."""
        began_at = time.perf_counter()
        if self._max_steps < 2 or self._num_plain or not all(map(_can_loop, running)):
            return False
        max_draft = self._draft_len(running)
        if max_draft is None:
            return False
        sequences = self._reserve(running, max_draft)
        num_steps = min(self._max_steps, _num_steps(sequences))
        outcomes = None
        forward_began_at = time.perf_counter()
        try:
            if num_steps > 1:
                num_rows = len(running) * (max_draft + 1) * num_steps
                label = f"{'verify' if max_draft else 'decode'} {num_rows} rows"
                with span("forward", lambda: label):
                    outcomes = self.loop.run(sequences, max_draft, num_steps)
        except Exception as error:
            self._fall_back(error)
        if outcomes is None:
            self._release(running)
            return False
        forward_s = time.perf_counter() - forward_began_at
        self._pause = 1
        self.num_visits += 1
        self._stepper.num_steps += 1
        num_taken = [self._commit(turn, one) for turn, one in zip(running, outcomes, strict=True)]
        host_s = time.perf_counter() - began_at - forward_s
        for turn, num in zip(running, num_taken, strict=True):
            turn.end_step(num_steps=num, num_prompt_rows=0, forward_s=forward_s, host_s=host_s)
        return True

    def _draft_len(self, running: Sequence[Turn]) -> int | None:
        """Tokens to draft at most in each step of all; None if there are too many turns."""
        num_sequences = rounded_up(len(running))
        if num_sequences > MAX_SEQUENCES:
            return None
        wants_draft = any(turn.state.drafter is not None for turn in running)
        if wants_draft and num_sequences * (self._max_draft + 1) <= self._max_rows:
            return self._max_draft
        return 0 if num_sequences <= self._max_rows else None

    @traced("reserve")
    def _reserve(self, running: Sequence[Turn], max_draft: int) -> list[LoopSequence]:
        """Makes room for the steps of a visit; none where there is not even room for one.

        The next token of each turn may take KV from idle sessions, as in a step. What comes behind
        it is a guess, since a reply may end at any token: it takes free pages and cached ones.
        """
        try:
            for turn in running:
                turn.state.last_used = self._stepper.num_steps + 1
                self._reserve_tokens(turn, 1, can_relieve=True)
            return [self._describe(turn, max_draft) for turn in running]
        except Exception as error:
            if not isinstance(error, OutOfPagesError):
                self._fall_back(error)
            return []

    def _reserve_tokens(self, turn: Turn, num_tokens: int, *, can_relieve: bool) -> None:
        try:
            self._cache.reserve(_sequence_of(turn), num_tokens, can_relieve=can_relieve)
        except OutOfPagesError:
            raise
        except BaseException:
            # Stopped, maybe between planning a page copy and making it: that page has no content.
            # The turn goes on with KV computed anew.
            turn.requeue()
            raise

    def _describe(self, turn: Turn, max_draft: int) -> LoopSequence:
        """The turn as the loop takes it, with as much room reserved as its steps may need."""
        state = turn.state
        can_draft = max_draft > 0 and state.drafter is not None
        most = min(self._max_steps * (max_draft + 1 if can_draft else 1), turn.num_left)
        # What is left of the page that the next token goes to is there already.
        left_in_page = self._cache.page_size - state.committed_len % self._cache.page_size
        num_reserved = 1
        for num_tokens in (most, min(most, self._max_steps), min(most, left_in_page)):
            try:
                self._reserve_tokens(turn, num_tokens, can_relieve=False)
                num_reserved = num_tokens
                break
            except OutOfPagesError:
                continue
        return LoopSequence(
            tokens=state.ledger.tokens,
            history=state.history,
            pages=self._cache.page_table(_sequence_of(turn)),
            kv_limit=state.committed_len + num_reserved,
            num_left=turn.num_left,
            can_draft=can_draft,
            sampling=turn.sampler.params,
            seed=turn.sampler.seed,
            stop_ids=turn.stops.stop_token_ids,
        )

    @traced("commit")
    def _commit(self, turn: Turn, outcome: LoopOutcome) -> int:
        """Makes what the steps gave part of session and cache; returns the steps that counted.

        A step behind the one that ended the reply (the device does not know all of its ends) never
        happened. A row of logits from which nothing can follow is left to an ordinary step, which
        finds it again and says what it holds.
        """
        if outcome.has_bad_logits:
            self._num_plain = max(self._num_plain, 1)
        num_steps = num_committed = 0
        try:
            for step in outcome.steps:
                taken = turn.accept(step.tokens) if step.tokens else 0
                if taken:
                    num_steps += 1
                    num_committed += taken
                    turn.receipt.drafted_tokens += step.num_drafted
                    turn.receipt.accepted_tokens += min(taken, step.num_accepted)
                if turn.is_finished:
                    break
            # Each step fed the pending token and kept KV of all it accepted but the last.
            self._cache.commit(_sequence_of(turn), num_committed)
            turn.state.history.length = len(turn.state.ledger)
        except Exception as error:
            turn.fail(error)
        except BaseException as error:
            turn.fail(error)  # caught half-way, whoever was interrupted
            raise
        return num_steps

    def _release(self, running: Sequence[Turn]) -> None:
        """Gives back what was reserved."""
        for turn in running:
            if turn.state.sequence_id is not None:
                self._cache.truncate(turn.state.sequence_id, turn.state.committed_len)

    def _fall_back(self, error: Exception) -> None:
        """After a visit that failed: ordinary steps for a while, twice as long each time."""
        if self._pause == 1:
            warnings.warn(
                f"a visit of several steps failed, single steps go on: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._num_plain = self._pause
        self._pause = min(2 * self._pause, self.MAX_PAUSE)


def _can_loop(turn: Turn) -> bool:
    """True if nothing but steps of its own lies ahead of the turn, and no reader waits for text."""
    return (
        turn.phase is TurnPhase.DECODING
        and not turn.is_streamed
        and not turn.sampler.params.has_penalties
    )


def _num_steps(sequences: Sequence[LoopSequence]) -> int:
    """Steps until every reply has ended, or one has no room: nobody runs ahead of who waits."""
    rooms = [(one.kv_limit - len(one.tokens) + 1, one.num_left) for one in sequences]
    ends = [num_left for room, num_left in rooms]
    return min([max(ends, default=0), *(room for room, num_left in rooms if room < num_left)])


def _sequence_of(turn: Turn) -> int:
    assert turn.state.sequence_id is not None
    return turn.state.sequence_id
