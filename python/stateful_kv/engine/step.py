"""One engine step: admit turns, plan rows, reserve pages, forward, verify, commit.

Lengths move only in commit, so an error before it leaves every session as it was. An error of one
turn ends that turn; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stateful_kv.choosing.verify import NOTHING_CHOSEN, GreedyTokens, Outcome, verify
from stateful_kv.engine.admission import admissible
from stateful_kv.engine.batching import Planner, RowPlan, build_batch, describe
from stateful_kv.engine.commit import commit, end_steps
from stateful_kv.errors import OutOfPagesError
from stateful_kv.kv.batch import Batch, BatchPages
from stateful_kv.kv.cache import KVCache
from stateful_kv.models.protocol import Model
from stateful_kv.session.turn import Turn, TurnPhase
from stateful_kv.system.device import synchronize, to_host
from stateful_kv.system.tracing import span, traced


@dataclass(frozen=True)
class _Pass:
    """One forward pass: its rows, the logits or greedy tokens it gave, its duration."""

    rows: Sequence[RowPlan]
    output: torch.Tensor | GreedyTokens
    seconds: float


class Stepper:
    """Advances running turns, all of them in one ragged batch.

    Attributes:
        num_steps: steps taken so far.
    """

    def __init__(self, model: Model, cache: KVCache, max_batch_tokens: int) -> None:
        """Keeps the model and the cache.

        Args:
            model: computes logits.
            cache: where KV lies.
            max_batch_tokens: rows of one forward pass.
        """
        self.num_steps = 0
        self._model = model
        self._cache = cache
        self._planner = Planner(max_batch_tokens)

    def step(self, running: Sequence[Turn]) -> None:
        """Runs one step of these unfinished turns, in the order they were opened."""
        began_at = time.perf_counter()
        self.num_steps += 1
        admit(running)
        rows, pages = self._reserve(self._planner.plan(running))
        forward_began_at = time.perf_counter()
        passes = self._forward(rows, pages) if rows else []
        forward_s = time.perf_counter() - forward_began_at  # attempts that failed included
        rows = [row for forward in passes for row in forward.rows]
        outcomes = [[outcome] for forward in passes for outcome in _verify(forward)]
        num_steps = commit(self._cache, rows, outcomes)
        end_steps(
            [row.turn for row in rows],
            num_steps=num_steps,
            num_prompt_rows=[row.num_prompt_rows for row in rows],
            forward_s=[forward.seconds for forward in passes for _ in forward.rows],
            host_s=time.perf_counter() - began_at - forward_s,
        )

    @traced("reserve")
    def _reserve(self, rows: list[RowPlan]) -> tuple[list[RowPlan], BatchPages | None]:
        """Makes room for each row; without room a row loses its draft, or its turn fails.

        Returns:
            The rows that have room, and where their KV goes.
        """
        if not rows:
            return rows, None
        rows = [row for row in rows if self._has_room_for_prompt(row)]
        try:
            pages = self._cache.prepare(*_lengths(rows)) if rows else None
        except Exception as error:
            pages = None
            for row in rows:
                if not row.turn.state.has_kv:
                    row.turn.fail(error)
            rows = [row for row in rows if not row.turn.is_finished]
        if pages is None:  # not enough free pages for all
            rows = [kept for row in rows if (kept := self._reserve_row(row)) is not None]
            pages = self._cache.batch_pages(*_lengths(rows)) if rows else None
        return rows, pages

    def _has_room_for_prompt(self, row: RowPlan) -> bool:
        """A prompt must fit as a whole beside the running turns; else its turn fails.

        Else a prompt that is computed in several steps could take pages from others and then not
        be finished. A reply takes a page at a time, since it may end at any token.
        """
        if row.num_prompt_rows == 0:
            return True
        try:
            num_left = row.turn.prompt_len - row.start_position
            self._cache.check_room(row.sequence_id, num_left)
            return True
        except Exception as error:
            row.turn.fail(error)
            return False

    def _reserve_row(self, row: RowPlan) -> RowPlan | None:
        """Makes room for one row, if need be by evicting cached prefixes and sequences at rest.

        A draft may be refused, so sequences at rest are not evicted for it.
        """
        try:
            try:
                num_rows = len(row.feed_ids)
                self._cache.reserve(row.sequence_id, num_rows, from_resting=not len(row.draft))
            except OutOfPagesError:
                if not len(row.draft):
                    raise
                row = row.without_draft()
                self._cache.reserve(row.sequence_id, len(row.feed_ids))
            return row
        except OutOfPagesError as error:
            row.turn.fail(error)
        except Exception as error:
            row.turn.state.drop_kv()
            row.turn.fail(error)
        return None

    def _forward(self, rows: Sequence[RowPlan], pages: BatchPages | None) -> list[_Pass]:
        """Computes the rows in one pass; if that fails, each alone, to find those at fault."""
        began_at = time.perf_counter()
        try:
            with torch.inference_mode():
                if pages is None:
                    pages = self._cache.batch_pages(*_lengths(rows))
                batch = build_batch(rows, pages, self._cache.device)
                with span("forward", lambda: describe(rows)):
                    output = self._run_model(rows, batch)
            return [_Pass(rows, output, time.perf_counter() - began_at)]
        except Exception as error:
            if len(rows) > 1:
                return [forward for row in rows for forward in self._forward([row], None)]
            rows[0].turn.fail(error)
            return []

    def _run_model(self, rows: Sequence[RowPlan], batch: Batch) -> torch.Tensor | GreedyTokens:
        """Logits, on the model's device; or only the largest of each row, if no row needs more."""
        if all(row.sampler.is_plain_greedy for row in rows if row.num_logit_rows):
            ids, values = self._model.forward_top_k(batch, self._cache, 1)
            return GreedyTokens(*to_host([ids[:, 0], values[:, 0]]))
        logits = self._model.forward(batch, self._cache)
        synchronize(
            self._cache.device
        )  # else the time of the pass would be counted as that of choosing
        return logits


def admit(running: Sequence[Turn]) -> None:
    """Gives sequences to the turns that may have one; a turn that lost its own queues again."""
    for turn in running:
        if turn.phase is not TurnPhase.QUEUED and not turn.state.has_kv:
            turn.phase = TurnPhase.QUEUED
    for turn in admissible(running):
        try:
            turn.admit()
        except Exception as error:
            turn.fail(error)


def _lengths(rows: Sequence[RowPlan]) -> tuple[list[int], list[int]]:
    return [row.sequence_id for row in rows], [len(row.feed_ids) for row in rows]


@traced("verify")
def _verify(forward: _Pass) -> list[Outcome]:
    """Chooses tokens for the rows of a pass that asked for logits; no tokens for the others."""
    asking = [row for row in forward.rows if row.num_logit_rows]
    try:
        chosen = iter(verify(asking, forward.output) if asking else [])
    except Exception as error:  # the output has another shape than was asked for
        chosen = iter([Outcome([], error=error) for _ in asking])
    return [next(chosen) if row.num_logit_rows else NOTHING_CHOSEN for row in forward.rows]
