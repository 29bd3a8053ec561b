"""One engine step: admit turns, plan rows, reserve pages, forward, verify, commit.

Lengths move only in commit, so whatever goes wrong before leaves every session as it was. What
is raised for one turn ends that turn; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stateful_kv.choosing.verify import Candidate, Choice, GreedyTokens, verify
from stateful_kv.engine.batching import Planner, RowPlan, admissible, build_batch, describe
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.batch import Batch
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.config import ModelConfig
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.device import synchronize, to_host
from stateful_kv.system.tracing import span, traced


class Model(Protocol):
    """A pure function of a batch and the cache; see `models.llama.LlamaModel`."""

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        ...

    def forward(self, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Writes KV of all rows of the batch; returns float32[R, V], logits of logit_rows."""
        ...

    def forward_top_k(
        self, batch: Batch, cache: KVCache, k: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As forward; returns ids int64[R, k] and values float32[R, k] of the largest logits.

        Largest first, NaN before every number, of equals the lowest id first.
        """
        ...


@dataclass(frozen=True)
class _Pass:
    """One forward pass: its rows, what they need to choose tokens, its duration."""

    rows: list[RowPlan]
    output: torch.Tensor | GreedyTokens
    seconds: float


class Stepper:
    """Advances running turns, all of them in one ragged batch.

    Attributes:
        num_steps: steps taken so far.
    """

    def __init__(self, model: Model, cache: KVCache, planner: Planner) -> None:
        self._model = model
        self.num_steps = 0
        self._cache = cache
        self._planner = planner

    def step(self, running: Sequence[Turn]) -> None:
        """Runs one step of these unfinished turns, in the order they were opened."""
        began_at = time.perf_counter()
        self.num_steps += 1
        for turn in admissible(running):
            try:
                turn.admit()
            except Exception as error:
                turn.fail(error)
        rows = self._reserve(self._planner.plan(running))
        forward_began_at = time.perf_counter()
        passes = self._forward(rows) if rows else []
        forward_s = time.perf_counter() - forward_began_at  # attempts that failed included
        for one in passes:
            for row, choice in zip(one.rows, _verify(one), strict=True):
                self._commit(row, choice)
        host_s = time.perf_counter() - began_at - forward_s
        for one in passes:
            for row in one.rows:
                self._end_row(row, one.seconds, host_s)

    @traced("reserve")
    def _reserve(self, rows: Sequence[RowPlan]) -> list[RowPlan]:
        """Makes room for each row; where there is none, first its draft goes, then its turn.

        A draft is a guess, so it takes no KV from idle sessions. A prompt that is computed in
        several steps must fit as a whole beside the running turns, so that one that cannot end
        takes nothing either; a reply takes a page at a time, since it may end at any token.
        """
        ready: list[RowPlan] = []
        for row in rows:
            row.turn.state.last_used = self.num_steps
            try:
                if row.num_prompt_rows:
                    num_left = row.turn.prompt_len - row.start_position
                    self._cache.check_room(row.sequence_id, num_left)
                try:
                    num_rows = len(row.feed_ids)
                    self._cache.reserve(row.sequence_id, num_rows, can_relieve=not row.draft)
                except OutOfPagesError:
                    if not row.draft:
                        raise
                    row = row.without_draft()
                    self._cache.reserve(row.sequence_id, len(row.feed_ids))
                ready.append(row)
            except OutOfPagesError as error:
                row.turn.fail(error)
            except Exception as error:
                row.turn.state.drop_kv()
                row.turn.fail(error)
            except BaseException:
                # Interrupted, maybe between planning a page copy and making it: that page has no
                # content. The turn goes on with KV computed anew.
                row.turn.requeue()
                raise
        return ready

    def _forward(self, rows: list[RowPlan]) -> list[_Pass]:
        """Computes the rows in one pass; if that fails, one by one, to find whose fault it is."""
        began_at = time.perf_counter()
        try:
            with torch.inference_mode():
                batch = build_batch(rows, self._cache)
                with span("forward", lambda: describe(rows)):
                    output = self._run_model(rows, batch)
            return [_Pass(rows, output, time.perf_counter() - began_at)]
        except Exception as error:
            if len(rows) > 1:
                return [one for row in rows for one in self._forward([row])]
            rows[0].turn.fail(error)
            return []

    def _run_model(self, rows: list[RowPlan], batch: Batch) -> torch.Tensor | GreedyTokens:
        """Logits only if some row needs more of them than the largest; on the model's device."""
        if all(row.turn.sampler.is_plain_greedy for row in rows if row.num_logit_rows):
            ids, values = self._model.forward_top_k(batch, self._cache, 1)
            return GreedyTokens(*to_host([ids[:, 0], values[:, 0]]))
        logits = self._model.forward(batch, self._cache)
        synchronize(self._cache.device)  # the time of the pass is not that of choosing tokens
        return logits

    @traced("commit")
    def _commit(self, row: RowPlan, choice: Choice) -> None:
        """Makes the row's tokens part of session and cache: the only place lengths move."""
        turn, state = row.turn, row.turn.state
        try:
            num_new = len(row.feed_ids) - len(row.draft)
            if row.num_logit_rows == 0:
                self._cache.commit(row.sequence_id, num_new)
            else:
                taken = turn.accept(choice.tokens)
                if choice.error is not None and not turn.is_finished:
                    raise choice.error
                # KV of an accepted draft token is there; the last token never has any yet.
                self._cache.commit(row.sequence_id, num_new + taken - 1)
                num_agreed = len(choice.tokens) - 1
                turn.receipt.drafted_tokens += len(row.draft)
                turn.receipt.accepted_tokens += min(taken, num_agreed)
                if row.draft and state.drafter is not None:
                    state.drafter.observe(len(row.draft), num_agreed)
            if turn.phase is TurnPhase.EXTENDING:
                state.store()
                if row.num_logit_rows:
                    turn.phase = TurnPhase.DECODING
            if row.num_logit_rows and turn.has_just_started_session:
                state.share_tail()
        except Exception as error:
            turn.fail(error)
        except BaseException as error:
            turn.fail(error)  # caught half-way, whoever was interrupted
            raise

    @traced("end_row")
    def _end_row(self, row: RowPlan, forward_s: float, host_s: float) -> None:
        """Writes the step into the turn's receipt; closes the books of a finished turn."""
        row.turn.end_step(
            num_steps=1, num_prompt_rows=row.num_prompt_rows, forward_s=forward_s, host_s=host_s
        )


@traced("verify")
def _verify(one: _Pass) -> list[Choice]:
    """Chooses tokens for the rows of a pass that asked for logits; no tokens for the others."""
    asking = [row for row in one.rows if row.num_logit_rows]
    candidates = [
        Candidate(
            row.turn.sampler, row.draft, row.start_position + len(row.feed_ids) - len(row.draft)
        )
        for row in asking
    ]
    try:
        chosen = iter(verify(candidates, one.output) if candidates else [])
    except Exception as error:  # the output as a whole is not what was asked for
        chosen = iter([Choice([], error) for _ in candidates])
    return [next(chosen) if row.num_logit_rows else Choice([], None) for row in one.rows]
