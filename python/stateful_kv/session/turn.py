"""One append + generate of a session, from the rendered message to the finished reply."""

from __future__ import annotations

import asyncio
import enum
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from stateful_kv.choosing.sampler import Sampler
from stateful_kv.errors import InvariantError, SessionBusyError, without_frames
from stateful_kv.session.receipts import (
    FINISH_CANCELLED,
    FINISH_LENGTH,
    FINISH_STOP,
    ReceiptDraft,
    Reply,
)
from stateful_kv.session.state import SessionState
from stateful_kv.system.promise import Promise
from stateful_kv.system.tracing import traced
from stateful_kv.text.stopping import StopRules
from stateful_kv.types import TokenArray

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Basis:
    """The tokens of a session that a request was made for; other ones make it stale.

    Attributes:
        length: how many there are.
        revision: see `Ledger.revision`.
    """

    length: int
    revision: int

    @staticmethod
    def of(state: SessionState) -> Basis:
        """What a request made now is made for; may be asked while another thread works."""
        revision = state.ledger.revision  # first: a truncation changes it last
        return Basis(len(state.ledger), revision)


@dataclass(eq=False)
class TurnRequest:
    """What crosses from a caller to the engine: a message that is rendered, tokenised and checked.

    Attributes:
        state: the session.
        basis: the tokens of the session that the message was rendered behind.
        delta: int32[T], the tokens to append.
        max_tokens: longest reply.
        context_len: tokens a session may hold.
        sampler: how tokens are chosen.
        stops: what ends the reply.
        began_at: when the caller asked, by `time.perf_counter`.
        reader: the stream through which the text is read while the turn runs, if there is one.
        listener: called after each step of the turn and at its end, by whoever steps.
        caller: the thread or task that asked, which must not wait for this turn's end by other
            calls; see `current_caller`.
    """

    state: SessionState
    basis: Basis
    delta: TokenArray
    max_tokens: int
    context_len: int
    sampler: Sampler
    stops: StopRules
    began_at: float
    reader: weakref.ref[object] | None = None
    listener: Callable[[], None] | None = None
    caller: Caller = field(default_factory=lambda: current_caller())


@dataclass(frozen=True)
class Caller:
    """Who asks: a thread, and the asyncio task that it runs, if any. Keeps neither alive."""

    thread: weakref.ref[threading.Thread]
    task: weakref.ref[asyncio.Task[Any]] | None


def current_caller() -> Caller:
    """The running thread and asyncio task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        task = None
    thread = weakref.ref(threading.current_thread())
    return Caller(thread, None if task is None else weakref.ref(task))


def busy_error(state: SessionState) -> SessionBusyError:
    """What a call raises that would wait for a stream which its caller has to read."""
    return SessionBusyError(
        f"session {state.name!r} is in the middle of a turn; read its stream to the end or close it"
    )


class TurnPhase(enum.Enum):
    """Where a turn is on its way."""

    QUEUED = "queued"  # no sequence yet
    EXTENDING = "extending"  # prompt tokens without KV are left
    DECODING = "decoding"  # only the last sampled token has no KV
    FINISHED = "finished"


class Reader:
    """The text of a running turn that was not read yet; written by one thread, read by another.

    Attributes:
        num_pieces: pieces that were read.
        num_tokens: tokens of the reply up to the end of the last piece that was read.
    """

    def __init__(self) -> None:
        """Nothing is there, nothing was read."""
        self._lock = threading.Lock()
        self._unread: deque[tuple[str, int]] = deque()
        self.num_pieces = 0
        self.num_tokens = 0

    def put(self, text: str, num_tokens: int) -> None:
        """Adds a piece that ends with the reply's token number `num_tokens`."""
        self._unread.append((text, num_tokens))

    def take(self) -> str | None:
        """The next piece, or None if there is none yet."""
        with self._lock:
            if not self._unread:
                return None
            text, num_tokens = self._unread[0]
            # Counted as read before it leaves: whoever is interrupted here ends the turn anyway.
            self.num_pieces, self.num_tokens = self.num_pieces + 1, num_tokens
            self._unread.popleft()
            return text

    def close(self) -> tuple[int, int]:
        """Nothing can be read any more; returns the pieces and the tokens that were."""
        with self._lock:
            self._unread.clear()
            return self.num_pieces, self.num_tokens


@dataclass(eq=False)
class Turn:
    """The state of one running turn; nothing here outlives it but the reply.

    The ledger grows as tokens are accepted. `fail` takes everything back to the turn's start;
    `cancel` keeps what was read. Either way, and at a regular end, the turn is settled exactly
    once and the session is free for the next one. Each of the three may be interrupted and called
    again.

    The text of a streamed turn is read piece by piece while it runs; its books are closed only
    when the reader asks for a piece after the last one. So what an early end of the stream keeps
    depends on what was read alone, not on how many tokens a step accepted.

    Attributes:
        request: what was asked.
        start: tokens of the session before the turn.
        start_committed: of these, those with KV; None if there was no sequence.
        receipt: what was done so far.
        output: tokens of the reply.
        pieces: its text.
        reader: the part of the text that is to be read.
        is_taking: tokens are being added; a turn that is interrupted meanwhile must fail.
        must_fail: the reader was interrupted; a piece may be counted as read that never arrived.
        is_settled: there is a reply or an error, and the session is free.
        settled: has a result from then on, for who waits in another thread.
        end: the tokens of the session when there was a reply.
    """

    request: TurnRequest
    start: int
    start_committed: int | None
    receipt: ReceiptDraft
    phase: TurnPhase = TurnPhase.QUEUED
    output: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    reader: Reader = field(default_factory=Reader)
    finish_reason: str = ""
    has_reader: bool = False
    is_taking: bool = False
    must_fail: bool = False
    is_settled: bool = False
    waits_for: tuple[Turn, int] | None = None
    end: Basis | None = None
    reply: Reply | None = None
    error: BaseException | None = None
    settled: Promise[None] = field(default_factory=Promise)

    @staticmethod
    def of(request: TurnRequest) -> Turn:
        """A turn that has changed nothing yet."""
        state = request.state
        receipt = ReceiptDraft(
            prompt_tokens=request.basis.length + len(request.delta),
            seed=request.sampler.seed,
            host_s=time.perf_counter() - request.began_at,
        )
        committed = state.committed_len if state.has_kv else None
        return Turn(request, len(state.ledger), committed, receipt)

    def begin(self) -> None:
        """Makes the session busy and appends the message; the turn is known to the engine."""
        self.state.is_busy = True
        self.state.last_reply = None
        self.state.ledger.append(self.request.delta)

    @property
    def state(self) -> SessionState:
        """The session."""
        return self.request.state

    @property
    def sampler(self) -> Sampler:
        """How tokens are chosen."""
        return self.request.sampler

    @property
    def stops(self) -> StopRules:
        """What ends the reply."""
        return self.request.stops

    def is_read_by(self, caller: Caller, *, blocking: bool) -> bool:
        """Whether the turn cannot end while this caller waits for that, since it is to read it.

        Args:
            caller: who would wait.
            blocking: no other task of the thread would run meanwhile.
        """
        reader = self.request.caller
        stream = None if self.request.reader is None else self.request.reader()
        return (
            stream is not None
            and self.has_reader
            and reader.thread == caller.thread
            and (blocking or reader.task is None or reader.task == caller.task)
        )

    @property
    def is_finished(self) -> bool:
        """True when no step is left to take."""
        return self.phase is TurnPhase.FINISHED

    @property
    def prompt_len(self) -> int:
        """Tokens before the reply."""
        return self.receipt.prompt_tokens

    @property
    def has_just_started_session(self) -> bool:
        """True when exactly the first prompt of a session has KV."""
        return self.start == 0 and self.state.committed_len == self.prompt_len

    @property
    def num_left(self) -> int:
        """Tokens the reply may still get."""
        in_context = self.request.context_len - len(self.state.ledger)
        return min(self.request.max_tokens - len(self.output), in_context)

    @traced("admit")
    def admit(self) -> None:
        """Binds a sequence; from here on the turn has rows in every step."""
        self.state.bind()
        if not self.output:
            self.receipt.reused_tokens = self.state.committed_len
        self.phase = TurnPhase.EXTENDING

    def take(self, tokens: Sequence[int]) -> int:
        """Adds chosen tokens to reply and ledger until one ends the reply.

        Returns:
            How many were taken.
        """
        if not self.output:
            self.receipt.ttft_s = time.perf_counter() - self.request.began_at
        num_left = self.num_left
        num_taken = 0
        for token in tokens:
            num_taken += 1
            self.output.append(token)
            self.sampler.note(token)
            text, stopped = self.stops.push(token)
            self._show(text)
            if stopped:
                self.finish(FINISH_STOP)
            elif num_taken >= num_left:
                text, stopped = self.stops.flush()
                self._show(text)
                self.finish(FINISH_STOP if stopped else FINISH_LENGTH)
            if self.is_finished:
                break
        self.state.ledger.append(tokens[:num_taken])
        return num_taken

    def finish(self, reason: str) -> None:
        """No step is left to take; `settle` makes the reply once KV is committed."""
        self.finish_reason = reason
        self.phase = TurnPhase.FINISHED

    def count_steps(
        self, *, num_steps: int, num_prompt_rows: int, forward_s: float, host_s: float
    ) -> None:
        """Writes committed steps into the receipt."""
        self.receipt.steps += num_steps
        self.receipt.host_s += host_s
        self.receipt.computed_tokens += num_prompt_rows
        if num_prompt_rows:
            self.receipt.prefill_s += forward_s
        else:
            self.receipt.decode_s += forward_s

    def settle(self) -> None:
        """Stores the pages of the finished turn, makes the reply and records the turn."""
        if self.is_settled:
            return
        if self.must_fail:  # the step that ended the reply was quicker than the reader's request
            self.fail(KeyboardInterrupt())
            return
        state = self.state
        state.insert()
        held = 0 if state.sequence_id is None else state.cache.num_pages_of(state.sequence_id)
        reply = Reply(
            "".join(self.pieces),
            list(self.output),
            self.finish_reason,
            self.receipt.finish(
                output_tokens=len(self.output),
                total_s=time.perf_counter() - self.request.began_at,
                pages_held=held,
            ),
        )
        state.rest()
        state.ledger.end_turn(self.start, self.prompt_len)
        self._end(reply)

    def cancel(self) -> None:
        """Ends the turn early: the tokens whose text was read stay, the rest never happened.

        A turn of which nothing was read leaves no trace in the ledger.
        """
        if self.is_settled:
            return
        if self.must_fail:
            self.fail(KeyboardInterrupt())
            return
        num_pieces, kept = self.reader.close()
        self.finish(FINISH_CANCELLED)
        del self.output[kept:]
        del self.pieces[num_pieces:]
        if kept:
            self.state.truncate(self.prompt_len + kept)
            self.settle()
            return
        self._roll_back()
        total_s = time.perf_counter() - self.request.began_at
        receipt = self.receipt.finish(output_tokens=0, total_s=total_s, pages_held=0)
        self._end(Reply("", [], FINISH_CANCELLED, receipt))

    def fail(self, error: BaseException) -> None:
        """Ends the turn with an error; ledger and sequence are as they were at its start."""
        if self.is_settled:
            return
        if self.error is None:
            _log.debug("session %r: a turn fails", self.state.name, exc_info=error)
            if isinstance(error, (StopIteration, StopAsyncIteration)):
                # Raised by a stream it would look like the end of the text.
                failure = RuntimeError(f"a turn fails with {error!r}")
                failure.__cause__ = error
                error = failure
            # Without its frames: they would keep alive whatever a step had in hand.
            self.error = without_frames(error)
        self.phase = TurnPhase.FINISHED
        self.reader.close()
        self._roll_back()
        self._end(None)

    def withdraw(self, error: BaseException) -> None:
        """The turn never was, since nobody got its reply; no later call has built on it yet."""
        if not self.is_settled:
            self.fail(error)
        elif self.end == Basis.of(self.state) and not (self.state.is_busy or self.state.is_closed):
            self.state.truncate(self.start)
            self.state.last_reply = None

    def outcome(self) -> Reply | Exception:
        """The reply of a settled turn, or its error, which is kept no longer.

        Who raises it has frames in hand that lead here: if it were kept, that would be a cycle.
        """
        error, self.error = self.error, None
        if isinstance(error, Exception):
            return error
        if error is not None:
            raise error
        if self.reply is None:
            raise InvariantError(f"session {self.state.name!r}: the turn is not finished")
        return self.reply

    def announce(self) -> None:
        """Tells who waits that the turn is settled; may be repeated."""
        self.settled.set_result(None)
        self.notify()

    def notify(self) -> None:
        """Tells who waits that something may have changed."""
        if self.request.listener is not None:
            self.request.listener()

    def _roll_back(self) -> None:
        """Ledger and KV as before the turn."""
        state = self.state
        if self.start_committed is None:
            state.drop_kv()
        else:
            state.truncate_kv(self.start_committed)
        state.truncate(self.start)
        state.rest()

    def _end(self, reply: Reply | None) -> None:
        state = self.request.state
        self.end = None if reply is None else Basis.of(state)
        # Nothing can come between these: there is no call among them.
        self.reply = state.last_reply = reply
        state.is_busy = False
        self.is_settled = True
        self.announce()

    def _show(self, text: str) -> None:
        if text:
            self.pieces.append(text)
            self.reader.put(text, len(self.output))
