"""One append + generate of a session, from the rendered message to the finished reply."""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stateful_kv.choosing.params import SamplingParams
from stateful_kv.choosing.sampler import Sampler
from stateful_kv.drafts.ngram import Drafter
from stateful_kv.engine.loop.token_store import HistoryRow
from stateful_kv.errors import InvariantError, OutOfPagesError
from stateful_kv.kv.cache import KVCache
from stateful_kv.session.ledger import Ledger
from stateful_kv.session.receipts import (
    FINISH_CANCELLED,
    FINISH_LENGTH,
    FINISH_STOP,
    ReceiptDraft,
    Reply,
)
from stateful_kv.system.tracing import traced
from stateful_kv.text.stopping import StopRules
from stateful_kv.types import TokenArray


@dataclass(frozen=True)
class TurnRequest:
    """What a caller asks: messages to append, and how to generate the reply."""

    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    sampling: SamplingParams


@dataclass
class SessionState:
    """What lives as long as a session: its ledger, and its KV while it has some.

    Attributes:
        name: a label for people; nothing is looked up by it.
        ledger: every token of the session.
        cache: where KV lies.
        drafter: proposes tokens; None when drafting is off.
        history: which of the tokens are on the device, for visits.
        sequence_id: the session's sequence, or None while its KV is dropped.
        num_stored: tokens of this sequence the prefix tree has been given.
        turn: the running turn, if any.
        last_used: engine's step count at the last turn; the order of suspension under pressure.
        is_closed: no turn may start any more.
    """

    name: str
    ledger: Ledger
    cache: KVCache
    drafter: Drafter | None
    sequence_id: int | None = None
    num_stored: int = 0
    history: HistoryRow = field(default_factory=HistoryRow)
    turn: Turn | None = None
    last_used: int = 0
    is_closed: bool = False

    @property
    def committed_len(self) -> int:
        """Tokens of the ledger that have KV."""
        return 0 if self.sequence_id is None else self.cache.length(self.sequence_id)

    def bind(self) -> None:
        """Makes sure there is a sequence: its own, or a new one on the longest cached prefix.

        The last token is never taken from the cache, since its logits are wanted. A hit that
        ends inside a page is cut to whole pages where there is no room for that page and the
        copy that the next token needs: a few tokens known must not be why a prompt does not fit.
        """
        if self.sequence_id is None:
            self.sequence_id, length = self.cache.match_and_adopt(self.ledger.tokens[:-1])
            self.num_stored = 0
            if length % self.cache.page_size:
                try:
                    self.cache.check_room(self.sequence_id, len(self.ledger) - length)
                except OutOfPagesError:
                    whole_pages = length - length % self.cache.page_size
                    self.cache.truncate(self.sequence_id, whole_pages)

    def store(self, *, with_partial_page: bool = False) -> None:
        """Gives finished pages to the prefix tree; does nothing if it already has them."""
        if self.sequence_id is None:
            return
        length = self.cache.length(self.sequence_id)
        if not with_partial_page:
            length -= length % self.cache.page_size
        if length > self.num_stored:
            self.num_stored = self.cache.insert(
                self.sequence_id, self.ledger.tokens, with_partial_page=with_partial_page
            )

    def share_tail(self) -> None:
        """Makes the tokens behind the last full page matchable too; costs a copy of one page."""
        if self.sequence_id is not None:
            self.cache.insert_tail_copy(self.sequence_id, self.ledger.tokens)

    def drop_kv(self) -> None:
        """Releases the sequence; the ledger stays and the next turn rebuilds what it needs."""
        sequence_id, self.sequence_id = self.sequence_id, None
        self.num_stored = 0
        if sequence_id is not None:
            self.cache.release(sequence_id)

    def truncate(self, length: int) -> None:
        """Drops the tokens from `length` on, with their KV and every reservation."""
        self.ledger.truncate(length)
        self.history.truncate(length)
        if self.drafter is not None:
            self.drafter.truncate(length)
        if self.sequence_id is None:
            return
        if length == 0:
            self.drop_kv()
        else:
            length = min(length, self.cache.length(self.sequence_id))
            self.cache.truncate(self.sequence_id, length)
            self.num_stored = min(self.num_stored, length)


class TurnPhase(enum.Enum):
    """Where a turn is on its way."""

    QUEUED = "queued"  # no sequence yet
    EXTENDING = "extending"  # prompt tokens without KV are left
    DECODING = "decoding"  # only the last sampled token has no KV
    FINISHED = "finished"


@dataclass(frozen=True)
class _Start:
    """What a turn that fails goes back to."""

    length: int
    committed_len: int | None


@dataclass
class Turn:
    """The state of one running turn; nothing here outlives it but the reply.

    The ledger grows as tokens are accepted. `fail` takes everything back to the turn's start;
    `cancel` keeps what was shown. Either way, and at a regular end, the turn reaches FINISHED
    exactly once and the session is free for the next one.

    The text of a streamed turn is read piece by piece while it runs; its books are closed only
    when the reader asks for a piece after the last one. So what an early end of the stream keeps
    depends on what was read alone, not on how many tokens a step accepted.
    """

    state: SessionState
    max_tokens: int
    context_len: int
    sampler: Sampler
    stops: StopRules
    start: _Start
    began_at: float
    receipt: ReceiptDraft
    phase: TurnPhase = TurnPhase.QUEUED
    output: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    unread: deque[tuple[str, int]] = field(default_factory=deque)
    num_shown: int = 0
    finish_reason: str = ""
    is_streamed: bool = False
    has_reader: bool = False
    cancel_requested: bool = False
    waits_for: tuple[Turn, int] | None = None
    reply: Reply | None = None
    error: BaseException | None = None

    @staticmethod
    def open(
        state: SessionState,
        delta: TokenArray,
        *,
        max_tokens: int,
        context_len: int,
        sampler: Sampler,
        stops: StopRules,
        began_at: float,
    ) -> Turn:
        """Appends the rendered message to the ledger and makes the session busy."""
        has_kv = state.sequence_id is not None
        start = _Start(len(state.ledger), state.committed_len if has_kv else None)
        receipt = ReceiptDraft(
            prompt_tokens=start.length + len(delta),
            seed=sampler.seed,
            host_s=time.perf_counter() - began_at,
        )
        turn = Turn(state, max_tokens, context_len, sampler, stops, start, began_at, receipt)
        try:
            state.ledger.append(delta)
            state.turn = turn
        except BaseException as error:
            turn.fail(error)
            raise
        return turn

    @property
    def is_finished(self) -> bool:
        """True once there is a reply or an error."""
        return self.phase is TurnPhase.FINISHED

    @property
    def prompt_len(self) -> int:
        """Tokens before the reply."""
        return self.receipt.prompt_tokens

    @property
    def has_just_started_session(self) -> bool:
        """True when exactly the first prompt of a session has KV."""
        return self.start.length == 0 and self.state.committed_len == self.prompt_len

    @property
    def num_left(self) -> int:
        """Tokens the reply may still get."""
        return min(self.max_tokens - len(self.output), self.context_len - len(self.state.ledger))

    @traced("admit")
    def admit(self) -> None:
        """Binds a sequence; from here on the turn has rows in every step."""
        self.state.bind()
        committed = self.state.committed_len
        if self.phase is TurnPhase.QUEUED and not self.output:
            self.receipt.reused_tokens = committed
        self.phase = TurnPhase.EXTENDING

    def requeue(self) -> None:
        """Drops the sequence of a running turn whose KV can no longer be trusted."""
        self.state.drop_kv()
        self.phase = TurnPhase.QUEUED

    def accept(self, tokens: list[int]) -> int:
        """Adds chosen tokens to reply and ledger until one ends the reply.

        Returns:
            How many were taken.
        """
        if not self.output:
            self.receipt.ttft_s = time.perf_counter() - self.began_at
        for count, token in enumerate(tokens, start=1):
            self.state.ledger.append((token,))
            self.output.append(token)
            self.sampler.note(token)
            text, stopped = self.stops.push(token)
            self._show(text)
            if stopped:
                self.finish(FINISH_STOP)
            elif self.num_left <= 0:
                text, stopped = self.stops.flush()
                self._show(text)
                self.finish(FINISH_STOP if stopped else FINISH_LENGTH)
            if self.is_finished:
                return count
        return len(tokens)

    def finish(self, reason: str) -> None:
        """Marks the reply as complete; `close_books` writes it out once KV is committed."""
        self.finish_reason = reason
        self.phase = TurnPhase.FINISHED

    def end_step(
        self, *, num_steps: int, num_prompt_rows: int, forward_s: float, host_s: float
    ) -> None:
        """Writes committed steps into the receipt; closes the books if they ended the turn."""
        if self.error is not None:
            return
        self.receipt.steps += num_steps
        self.receipt.host_s += host_s
        self.receipt.computed_tokens += num_prompt_rows
        if num_prompt_rows:
            self.receipt.prefill_s += forward_s
        else:
            self.receipt.decode_s += forward_s
        if self.is_finished and not self.is_streamed:
            try:
                self.close_books()
            except Exception as error:
                self.fail(error)
            except BaseException as error:
                self.fail(error)
                raise

    def close_books(self) -> None:
        """Records the finished turn in the ledger, stores its pages and makes the reply."""
        state = self.state
        state.ledger.end_turn(self.start.length, self.prompt_len)
        state.store()
        held = 0 if state.sequence_id is None else state.cache.num_pages_of(state.sequence_id)
        receipt = self.receipt.finish(
            output_tokens=len(self.output),
            total_s=time.perf_counter() - self.began_at,
            pages_held=held,
        )
        text = "".join(self.pieces)
        self.reply = Reply(text, list(self.output), self.finish_reason, receipt)
        state.turn = None

    def cancel(self) -> None:
        """Ends the turn early: the tokens whose text was read stay, the rest never happened.

        A turn of which nothing was read leaves no trace in the ledger.
        """
        if self.reply is not None or self.error is not None:
            return
        kept = self.num_shown
        self.state.truncate(self.prompt_len + kept if kept else self.start.length)
        del self.output[kept:]
        shown = len(self.pieces) - len(self.unread)
        del self.pieces[shown:]
        self.unread.clear()
        self.finish(FINISH_CANCELLED)
        if kept:
            self.close_books()
        else:
            self._restore_kv()
            self.state.turn = None
            receipt = self.receipt.finish(
                output_tokens=0, total_s=time.perf_counter() - self.began_at, pages_held=0
            )
            self.reply = Reply("", [], FINISH_CANCELLED, receipt)

    def fail(self, error: BaseException) -> None:
        """Ends the turn with an error; ledger and sequence are as they were at its start."""
        if self.reply is not None or self.error is not None:
            return
        self.error = error
        self._roll_back()

    def abandon(self, error: BaseException) -> None:
        """Like `fail`, for a turn that was interrupted anywhere, in its own end too."""
        if self.reply is None:
            self.error = self.error or error
            self._roll_back()
        self.state.turn = None

    def _roll_back(self) -> None:
        self.phase = TurnPhase.FINISHED
        self.unread.clear()
        self.state.truncate(self.start.length)
        self._restore_kv()
        self.state.turn = None

    def take_piece(self) -> str | None:
        """Returns the next piece of text that was not read yet, or None."""
        if not self.unread:
            return None
        text, self.num_shown = self.unread.popleft()
        return text

    def result(self) -> Reply:
        """Returns the reply of a finished turn, or raises its error."""
        if self.error is not None:
            raise self.error
        if self.reply is None:
            raise InvariantError(f"session {self.state.name!r}: the turn is not finished")
        return self.reply

    def _restore_kv(self) -> None:
        if self.start.committed_len is None:
            self.state.drop_kv()
        elif self.state.sequence_id is not None:
            state = self.state
            length = min(self.start.committed_len, state.committed_len)
            state.cache.truncate(self.state.sequence_id, length)
            state.num_stored = min(state.num_stored, length)

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.unread.append((text, len(self.output)))
