"""Multi-step: several decode steps on the device before the host looks at what they gave.

Pages for the steps are reserved, the device takes them, and then they are committed like as many
plain steps. Where that cannot be done, or fails, a plain step is taken instead: no length has
moved by then.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from stateful_kv.drafts.proposer import NO_DRAFT, Draft, StepLoad
from stateful_kv.engine.batching import decode_row, propose
from stateful_kv.engine.commit import commit, end_steps
from stateful_kv.engine.config import EngineConfig
from stateful_kv.engine.loop.device_loop import MAX_SEQUENCES, DeviceLoop, LoopRow, rounded_up
from stateful_kv.engine.step import Stepper
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.protocol import Model
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.tracing import span, traced


class MultiStep:
    """Advances running turns, by several steps at once where that can be done.

    A turn that is still computing its prompt takes plain steps, together with all others; between
    two of them the turns that decode take several steps at once. So neither kind waits longer
    than for one step, or one multi-step, of the other.

    Attributes:
        num_syncs: multi-steps taken so far.
        loop: what takes them.
    """

    MAX_PAUSE = 1024  # most plain steps between two attempts that fail

    def __init__(
        self, stepper: Stepper, model: Model, cache: KVCache, config: EngineConfig
    ) -> None:
        """Takes no memory yet.

        Args:
            stepper: takes plain steps.
            model: computes logits.
            cache: where KV lies.
            config: how many steps and rows.
        """
        self._stepper = stepper
        self._cache = cache
        self._max_steps = config.num_steps_per_sync or 1
        self._max_rows = config.max_batch_tokens
        self._max_draft = config.max_draft
        self.loop = DeviceLoop(model, cache, model.config.max_position, self._max_steps)
        self.num_syncs = 0
        self._num_plain = 0  # plain steps to take before the next attempt
        self._pause = 1  # how many after the next failure

    def advance(self, running: Sequence[Turn]) -> None:
        """Advances these unfinished turns, in the order they were opened."""
        decoding = [turn for turn in running if turn.phase is TurnPhase.DECODING]
        can_try = self._max_steps > 1 and not self._num_plain and all(map(_can_loop, decoding))
        if len(decoding) < len(running):
            self._take_plain_step(running)
            decoding = [turn for turn in decoding if not turn.is_finished]
            if can_try and decoding and not self._num_plain:
                self._take_steps(decoding)
        elif not (can_try and self._take_steps(decoding)):
            self._take_plain_step(running)

    def _take_plain_step(self, running: Sequence[Turn]) -> None:
        """Takes a step of those that a failed attempt at several has not ended."""
        self._num_plain = max(0, self._num_plain - 1)
        self._stepper.step([turn for turn in running if not turn.is_finished])

    def _take_steps(self, turns: Sequence[Turn]) -> bool:
        """Takes several steps; False if none counted, then no length has moved."""
        began_at = time.perf_counter()
        max_draft = self._draft_len(turns)
        if max_draft is None:
            return False
        rows = self._reserve(turns, max_draft)
        num_steps = min(self._max_steps, _num_steps(rows))
        outcomes = None
        forward_began_at = time.perf_counter()
        try:
            if num_steps > 1:
                num_rows = len(turns) * (max_draft + 1) * num_steps
                label = f"{'verify' if max_draft else 'decode'} {num_rows} rows"
                with span("forward", lambda: label):
                    outcomes = self.loop.run(rows, max_draft, num_steps)
        except Exception as error:
            self._fall_back(error)
        if outcomes is None:
            for turn in turns:
                turn.state.truncate_kv(turn.state.committed_len)  # gives back what was reserved
            return False
        forward_s = time.perf_counter() - forward_began_at
        self._pause = 1
        self.num_syncs += 1
        self._stepper.num_steps += 1
        if any(steps and not steps[-1].tokens for steps in outcomes):
            # Logits from which no token can be chosen: a plain step finds them again and says why.
            self._num_plain = max(self._num_plain, 1)
        num_taken = commit(self._cache, [row.plan for row in rows], outcomes)
        end_steps(
            turns,
            num_steps=num_taken,
            num_prompt_rows=[0] * len(turns),
            forward_s=[forward_s] * len(turns),
            host_s=time.perf_counter() - began_at - forward_s,
        )
        return any(num_taken)

    def _draft_len(self, turns: Sequence[Turn]) -> int | None:
        """The longest draft of a turn in each step; None if there are too many turns."""
        num_sequences = rounded_up(len(turns))
        if num_sequences > MAX_SEQUENCES:
            return None
        wants_draft = any(turn.state.drafter is not None for turn in turns)
        if wants_draft and num_sequences * (self._max_draft + 1) <= self._max_rows:
            return self._max_draft
        return 0 if num_sequences <= self._max_rows else None

    @traced("reserve")
    def _reserve(self, turns: Sequence[Turn], max_draft: int) -> list[LoopRow]:
        """Makes room for the steps; returns nothing where a plain step must be taken.

        That is where there is not even room for one token of each, or where a turn has failed.

        For the next token of each turn sequences at rest may be evicted, as in a plain step. For
        the tokens behind it, which may never come, only free and cached pages are taken.
        """
        try:
            for turn in turns:
                self._cache.reserve(_sequence_of(turn), 1)
            drafts = propose(turns, max_draft) if max_draft else [NO_DRAFT] * len(turns)
            if any(turn.is_finished for turn in turns):  # its drafter failed: it has no rows
                return []
            load = StepLoad(len(turns), len(turns))
            return [
                self._plan(turn, draft, max_draft, load)
                for turn, draft in zip(turns, drafts, strict=True)
            ]
        except Exception as error:
            if not isinstance(error, OutOfPagesError):
                self._fall_back(error)
            return []

    def _plan(self, turn: Turn, draft: Draft, max_draft: int, load: StepLoad) -> LoopRow:
        """The turn's rows, with as much room reserved as its steps may need."""
        state = turn.state
        can_draft = max_draft > 0 and state.drafter is not None
        most = min(self._max_steps * (max_draft + 1 if can_draft else 1), turn.num_left)
        # The rest of the page that the next token goes to is reserved already.
        left_in_page = self._cache.page_size - state.committed_len % self._cache.page_size
        num_reserved = 1
        for num_tokens in (most, min(most, self._max_steps), min(most, left_in_page)):
            try:
                self._cache.reserve(_sequence_of(turn), num_tokens, from_resting=False)
                num_reserved = num_tokens
                break
            except OutOfPagesError:
                continue
        return LoopRow(
            plan=decode_row(turn, draft, load),
            pages=self._cache.page_table(_sequence_of(turn)),
            kv_limit=state.committed_len + num_reserved,
            can_draft=can_draft,
        )

    def _fall_back(self, error: Exception) -> None:
        """After an attempt that failed: plain steps for a while, twice as long each time."""
        if self._pause == 1:
            warnings.warn(
                f"several steps at once failed, single steps go on: {error!r}",
                RuntimeWarning,
                stacklevel=2,
            )
        self._num_plain = self._pause
        self._pause = min(2 * self._pause, self.MAX_PAUSE)


def _can_loop(turn: Turn) -> bool:
    """Whether the device can go on alone: penalties and further tokens without KV need the host."""
    has_pending_only = turn.state.committed_len == len(turn.state.ledger) - 1
    return has_pending_only and not turn.sampler.params.has_penalties


def _num_steps(rows: Sequence[LoopRow]) -> int:
    """Steps until every reply must have ended, or some sequence has no room left.

    All take the same number of steps: as many as the sequence with the least room.
    """
    rooms = [(row.kv_limit - row.start + 1, row.num_left) for row in rows]
    ends = [num_left for room, num_left in rooms]
    return min([max(ends, default=0), *(room for room, num_left in rooms if room < num_left)])


def _sequence_of(turn: Turn) -> int:
    assert turn.state.sequence_id is not None
    return turn.state.sequence_id
